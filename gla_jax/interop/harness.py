"""lm-evaluation-harness: its tasks, on our models, from local files."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from gla_jax.interop.scoring import continuation_likelihoods
from gla_jax.nn.generate import checked_draw, generate
from gla_jax.nn.prompt import check_count
from gla_jax.nn.text import Tokenizer, text_after

# The harness's names for the same, the first that is given counts (lm_eval.models.utils.normalize_gen_kwargs).
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
ALLOWED = ("until", *LENGTHS, "do_sample", "temperature", "top_k", "top_p", "num_beams")


class Harness:
    """The three questions that lm-evaluation-harness asks of a language model (`lm_eval.api.model.LM`).

    Args:
      model: a language model over the tokenizer's tokens.
      tokenizer: with `encode(text).ids` and `decode(ids)`.
      end_of_text: the token that stands before an empty context, and that ends what is generated.
      batch_size: rows at once.
      max_length: tokens of a window of `loglikelihood_rolling`, and the most that a context keeps (its end); before
        softmax attention without a window generates, a context keeps no more than leaves room in the cache.
      max_new_tokens: of `generate_until`, where a request does not say.

    Raises:
      ValueError: batch_size, max_length or max_new_tokens is no integer of at least 1.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        end_of_text: int,
        *,
        batch_size: int = 8,
        max_length: int = 2048,
        max_new_tokens: int = 256,
    ):
        sizes = {"batch_size": batch_size, "max_length": max_length, "max_new_tokens": max_new_tokens}
        for name, value in sizes.items():
            check_count(name, value)
        self.model: Any = model
        self.tokenizer, self.end_of_text = tokenizer, end_of_text
        self.batch_size, self.max_length, self.max_new_tokens = batch_size, max_length, max_new_tokens

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each of the requests' (context, continuation): its log-likelihood, and whether it is greedy."""
        pairs = [self._pair(*request.args) for request in requests]
        return [tuple(x) for x in continuation_likelihoods(self.model, pairs, self.batch_size)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each of the requests' (text,): its log-likelihood, in windows of max_length tokens that do not overlap.

        A window's first token is predicted from the last one of the window before, the first of all from what
        `text_after` puts there.
        """
        pairs, owners = [], []
        for i, request in enumerate(requests):
            ids = text_after(self.tokenizer, request.args[0], self.end_of_text)
            for begin in range(1, len(ids), self.max_length):
                pairs.append((ids[begin - 1 : begin], ids[begin : begin + self.max_length]))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, score in zip(owners, continuation_likelihoods(self.model, pairs, self.batch_size), strict=True):
            totals[i] += score.log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each of the requests' (context, options): text until one of options["until"], greedy or drawn.

        Options are the harness's generation_kwargs, and mean what they do there: until (empty strings end nothing),
        max_gen_toks or one of its other names, do_sample, temperature, top_k (0 for all), top_p, and num_beams = 1.
        Without do_sample, tokens are drawn if temperature > 0. Draws depend on the requests and their order alone.

        Raises:
          ValueError: naming the option that is none of these, or whose value is not allowed.
        """
        pairs = [request.args for request in requests]
        asked = [(self._context(context), _Asked.of(options, self.max_new_tokens)) for context, options in pairs]
        order = sorted(range(len(asked)), key=lambda i: (*map(str, asked[i][1]), len(asked[i][0])))
        texts = [""] * len(asked)
        while order:
            how = asked[order[0]][1]
            chosen = [i for i in order[: self.batch_size] if asked[i][1] == how]
            order = order[len(chosen) :]
            made = self._generate([asked[i][0] for i in chosen], how, len(order))
            for i, row in zip(chosen, made, strict=False):
                texts[i] = self._text(row, how.until)
        return texts

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Spaces belong to the continuation, whose tokens are those that joining changes nothing before.
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        before, whole = (list(self.tokenizer.encode(text).ids) for text in (context, context + continuation))
        own = whole[len(before) :] or whole[-1:]
        before = whole[: len(whole) - len(own)]
        return (before or [self.end_of_text])[-self.max_length :], own

    def _context(self, context: str) -> list[int]:
        return list(self.tokenizer.encode(context).ids) or [self.end_of_text]

    def _generate(self, contexts: list[list[int]], how: "_Asked", salt: int) -> list[list[int]]:
        keep, limit = self.max_length, self.model.config.cache_limit
        if limit is not None and how.new >= limit:
            raise ValueError(f"max_gen_toks: must be below the model's cache_size = {limit}, got {how.new}")
        contexts = [ids[-(keep if limit is None else min(keep, limit - how.new)) :] for ids in contexts]
        # Few shapes, as each is compiled: rows of a power of two, and as many as always.
        contexts += contexts[:1] * (self.batch_size - len(contexts))
        lengths = [len(ids) for ids in contexts]
        rows = np.zeros((len(contexts), max(16, 1 << (max(lengths) - 1).bit_length())), np.int32)
        for row, ids in zip(rows, contexts, strict=True):
            row[-len(ids) :] = ids
        new = generate(
            self.model,
            rows,
            how.new,
            key=jax.random.fold_in(jax.random.key(0), salt),
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            prompt_lengths=lengths,
            stop_tokens=(self.end_of_text,),
        )
        return np.asarray(new).tolist()

    def _text(self, made: list[int], until: tuple[str, ...]) -> str:
        text = self.tokenizer.decode(made[: made.index(self.end_of_text)] if self.end_of_text in made else made)
        return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


class _Asked(NamedTuple):
    """What a request's options come to."""

    new: int
    temperature: float
    top_k: int | None
    top_p: float | None
    until: tuple[str, ...]

    @classmethod
    def of(cls, options: dict[str, Any], new: int) -> "_Asked":
        if unknown := sorted(options.keys() - set(ALLOWED)):
            raise ValueError(f"generation_kwargs: must be of {', '.join(ALLOWED)}, got {unknown[0]!r}")
        given = {name: value for name, value in options.items() if value is not None}
        length = next((name for name in LENGTHS if name in given), None)
        if length is not None:
            check_count(length, given[length])
        until = given.get("until", ())
        until = (until,) if isinstance(until, str) else until
        if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
            raise ValueError(f"until: must be a string or a list of strings, got {until!r}")
        if given.get("num_beams", 1) != 1:
            raise ValueError(f"num_beams: must be 1, got {given['num_beams']!r}")
        temperature = given.get("temperature", 0.0)
        sampled = given.get("do_sample", temperature != 0)
        if sampled not in (True, False):
            raise ValueError(f"do_sample: must be true or false, got {sampled!r}")
        if sampled and temperature == 0:
            raise ValueError(f"temperature: must be above 0 with do_sample, got {options.get('temperature')!r}")
        top_k = None if given.get("top_k") == 0 else given.get("top_k")
        checked_draw(jax.random.key(0), temperature, top_k, given.get("top_p"))
        return cls(
            int(new if length is None else given[length]),
            temperature if sampled else 0.0,
            top_k,
            given.get("top_p"),
            tuple(stop for stop in until if stop),
        )


def make_lm(harness: Harness) -> Any:
    """The `harness` as an `lm_eval.api.model.LM`, which `lm_eval.simple_evaluate(model=...)` takes.

    Raises:
      ModuleNotFoundError: the package lm-eval is missing.
    """
    LM = importlib.import_module("lm_eval.api.model").LM

    class GLALM(LM):
        def loglikelihood(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            return harness.loglikelihood(requests)

        def loglikelihood_rolling(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            return harness.loglikelihood_rolling(requests)

        def generate_until(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            return harness.generate_until(requests)

    return GLALM()


def run_tasks(
    harness: Harness, tasks: Sequence[str], *, folder: Path | str | None = None, limit: int | None = None
) -> dict[str, dict[str, Any]]:
    """The results of lm-evaluation-harness's tasks, {task: {metric: value}}.

    Args:
      harness: the model.
      tasks: their names.
      folder: of task files (YAML) of your own, whose data sets may be local files; None for those of the package.
      limit: at most so many documents a task.

    Raises:
      ModuleNotFoundError: the package lm-eval is missing.
      ValueError: there is no such task, or one has options that `Harness.generate_until` refuses.
    """
    lm_eval, kind = importlib.import_module("lm_eval"), importlib.import_module("lm_eval.tasks").TaskManager
    manager = kind(include_path=None if folder is None else str(folder))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        where = "lm-evaluation-harness" if folder is None else f"lm-evaluation-harness or {folder}"
        raise ValueError(f"tasks: must be of {where}, got {unknown[0]!r}")
    # Its bootstrap forks, which a process with JAX in it may not survive; a thousand draws take it a moment.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    options = {"limit": limit, "task_manager": manager, "bootstrap_iters": 1000}
    found = lm_eval.simple_evaluate(model=make_lm(harness), tasks=list(tasks), **options)
    return found["results"]
