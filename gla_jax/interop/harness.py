"""lm-evaluation-harness: its tasks, on our models, from local files."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gla_jax.interop.scoring import continuation_likelihoods
from gla_jax.interop.text import Tokenizer, text_after
from gla_jax.nn.generate import generate

__all__ = ["Harness", "make_lm", "run_tasks"]


class Harness:
    """The three questions that lm-evaluation-harness asks of a language model (`lm_eval.api.model.LM`).

    Args:
      model: a language model over the tokenizer's tokens.
      tokenizer: with `encode(text).ids` and `decode(ids)`.
      end_of_text: the token that stands before an empty context, and that ends what is generated.
      batch_size: rows at once.
      max_length: tokens of a window of `loglikelihood_rolling`, and the most that a context keeps (its end).
      max_new_tokens: of `generate_until`, where a request does not say.
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
        self.model, self.tokenizer, self.end_of_text = model, tokenizer, end_of_text
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
        """For each of the requests' (context, options): text until one of options["until"], greedy or drawn."""
        return [self._until(*request.args) for request in requests]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # Spaces belong to the continuation, whose tokens are those that joining changes nothing before.
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        before, whole = (list(self.tokenizer.encode(text).ids) for text in (context, context + continuation))
        own = whole[len(before) :] or whole[-1:]
        before = whole[: len(whole) - len(own)]
        return (before or [self.end_of_text])[-self.max_length :], own

    def _until(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        ids = (list(self.tokenizer.encode(context).ids) or [self.end_of_text])[-self.max_length :]
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        new = generate(
            self.model,
            np.asarray([ids], np.int32),
            int(options.get("max_gen_toks") or self.max_new_tokens),
            key=jax.random.key(0) if temperature > 0 else None,
            temperature=temperature,
            top_p=options.get("top_p") if temperature > 0 else None,
            stop_tokens=(self.end_of_text,),
        )
        made = np.asarray(new[0]).tolist()
        text = self.tokenizer.decode(made[: made.index(self.end_of_text)] if self.end_of_text in made else made)
        return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]


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
    """
    lm_eval, manager = importlib.import_module("lm_eval"), importlib.import_module("lm_eval.tasks").TaskManager
    found = lm_eval.simple_evaluate(
        model=make_lm(harness),
        tasks=list(tasks),
        limit=limit,
        task_manager=manager(include_path=None if folder is None else str(folder)),
    )
    return found["results"]
