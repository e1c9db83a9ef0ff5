"""Continue prompts: parallel prefill in bounded memory, then one token at a time from a cache of constant size."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from gla_jax.array_types import Array
from gla_jax.nn.prompt import (
    PromptState,
    check_count,
    check_state,
    checked_prompt,
    is_integer,
    longest,
    prefill_in_pieces,
)
from gla_jax.nn.softmax_attention import check_room

# Decoding takes the time of reading all weights. XLA's Triton products would first copy a layer's weights out of their
# stack, and products with one left side would become one, of weights copied side by side.
ON_GPU = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}


def generate(
    model: nnx.Module,
    prompt: Any,
    max_new_tokens: int,
    *,
    key: Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt_lengths: Any = None,
    num_samples: int = 1,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 2048,
) -> Int[Array, "rows new"]:
    """Continue each prompt of a batch by max_new_tokens tokens.

    Prompts are read `prefill_chunk` tokens at a time and tokens are then made one by one, in one compiled program whose
    memory depends neither on the prompt's length nor on max_new_tokens (but for the tokens themselves).

    Args:
      model: with `config`, `init_cache`, `prefill` and `step`, such as `CausalLM`.
      prompt: [b, t] integers, t >= 1; one prompt a row, at the right end of its row. Or the `PromptState` of prompts
        that `read_prompt` has read.
      max_new_tokens: how many to make, at least 1. With softmax attention without a window, prompt and new tokens
        together are at most its cache_size.
      key: a `jax.random.key`; needed if temperature > 0.
      temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
      top_k: draw only from the k likeliest tokens, k >= 1; of equal ones, from the lowest.
      top_p: draw only from the fewest tokens that together have this probability, 0 < p <= 1 (after top_k), in the
        order of their probabilities, equal ones in that of their tokens.
      prompt_lengths: [b], how many tokens at the right of each row are its prompt, 1 to t; the rest is padding that
        nothing depends on. None for all of them.
      num_samples: continuations of each prompt, which is read once; its state is copied. Row i * num_samples + j of the
        result is the j-th of prompt i.
      stop_tokens: a row ends with the first of these; the rest of the row repeats it.
      prefill_chunk: tokens read at a time, at least 1.

    Returns:
      [b * num_samples, max_new_tokens] int32: the new tokens, without the prompt.

    Raises:
      ValueError: naming the argument and what is allowed.
    """
    prompt, lengths = _checked_start(model, prompt, prompt_lengths, max_new_tokens, num_samples, prefill_chunk)
    draw, top_k = checked_draw(key, temperature, top_k, top_p)
    stops = checked_stops(stop_tokens)
    graphdef, params = nnx.split(model)
    how = _How(top_k, stops, num_samples, prefill_chunk)
    program = _compiled(_generate, static=(0, 5, 6))
    return program(graphdef, params, prompt, lengths, draw, max_new_tokens, how)


def stream(
    model: nnx.Module,
    prompt: Any,
    max_new_tokens: int,
    *,
    key: Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prompt_lengths: Any = None,
    num_samples: int = 1,
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 2048,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, from the same arguments, one [b] int32 array at a time as they are made.

    Ends after max_new_tokens, or when every row has met a stop token. Raises at the call, as `generate` does.
    """
    prompt, lengths = _checked_start(model, prompt, prompt_lengths, max_new_tokens, num_samples, prefill_chunk)
    draw, top_k = checked_draw(key, temperature, top_k, top_p)
    how = _How(top_k, checked_stops(stop_tokens), num_samples, prefill_chunk)
    graphdef, params = nnx.split(model)

    def tokens() -> Iterator[np.ndarray]:
        # Each step takes the cache before it: a state that was given is the caller's to keep.
        start = jax.tree.map(jnp.copy, prompt) if isinstance(prompt, PromptState) else prompt
        first, following = _compiled(_first, static=(0, 5)), _compiled(_next, static=(0, 7), donate=4)
        token, done, cache = first(graphdef, params, start, lengths, draw, how)
        yield np.asarray(token)
        for i in range(1, max_new_tokens):
            if how.stops and done.all():
                return
            token, done, cache = following(graphdef, params, token, done, cache, i, draw, how)
            yield np.asarray(token)

    return tokens()


def sample(
    logits: Float[Array, "b vocab"],
    key: Array | None,
    temperature: Array | float | None = None,
    top_p: Array | float | None = None,
    top_k: int | None = None,
) -> Int[Array, " b"]:
    """One token [b] a row of logits [b, vocab]: the likeliest if temperature is None, else drawn as in `generate`."""
    if temperature is None:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = (logits - jnp.max(logits, -1, keepdims=True)) / temperature
    assert key is not None, "drawing needs a key"
    if top_k is None and top_p is None:
        return jax.random.categorical(key, logits, -1).astype(jnp.int32)
    tokens, logits = likeliest(logits, top_p, top_k)
    chosen = jax.random.categorical(key, logits, -1)
    return jnp.take_along_axis(tokens, chosen[:, None], 1)[:, 0]


def likeliest(
    logits: Float[Array, "b vocab"], top_p: Array | float | None, top_k: int | None
) -> tuple[Int[Array, "b n"], Float[Array, "b n"]]:
    """The tokens [b, n] that top_k and top_p leave, from the likeliest on, and their logits: -inf for one left out.

    Equal logits stand in the order of their tokens, so that of a tie at the edge the lower token stays (transformers
    keeps all of such a tie for top_k, and for top_p what its sort puts first).
    """
    logits, tokens = jax.lax.top_k(logits, min(top_k or logits.shape[-1], logits.shape[-1]))
    if top_p is not None:
        probability = jax.nn.softmax(logits, -1)
        before = jnp.cumsum(probability, -1) - probability
        # Rounded sums may reach 1 before the last token; the likeliest always stays.
        kept = (before < top_p) | (top_p >= 1) | (jnp.arange(logits.shape[-1]) == 0)
        logits = jnp.where(kept, logits, -jnp.inf)
    return tokens, logits


class _Draw(NamedTuple):
    """How tokens are drawn; None for what is not wanted, so that it is part of the compiled program's type."""

    key: Array | None
    temperature: float | None
    top_p: float | None


class _How(NamedTuple):
    """What is fixed when a program is compiled."""

    top_k: int | None
    stops: tuple[int, ...]
    samples: int
    piece: int


def _checked_start(
    model: Any, prompt: Any, lengths: Any, max_new_tokens: Any, num_samples: Any, prefill_chunk: Any
) -> tuple[Any, Array | None]:
    check_count("max_new_tokens", max_new_tokens)
    check_count("num_samples", num_samples)
    if isinstance(prompt, PromptState):
        if lengths is not None:
            raise ValueError(f"prompt_lengths: must be None with a state, which has read its prompts, got {lengths!r}")
        check_count("prefill_chunk", prefill_chunk)
        check_state("prompt", model, prompt)
        cache: Any = prompt.cache
    else:
        prompt, lengths = checked_prompt(model, prompt, lengths, prefill_chunk)
        cache = {"position": np.asarray(longest(prompt, lengths))}
    check_room("max_new_tokens", model.config.cache_limit, cache, max_new_tokens)
    return prompt, lengths


def checked_draw(key: Any, temperature: Any, top_k: Any, top_p: Any) -> tuple[_Draw, int | None]:
    """What `sample` takes, or a ValueError that names the argument."""
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: must be 0 (the likeliest token) or positive, got {temperature!r}")
    if temperature > 0 and key is None:
        raise ValueError("key: a temperature above 0 needs a jax.random.key, got None")
    if top_k is not None and (not is_integer(top_k) or top_k < 1):
        raise ValueError(f"top_k: must be at least 1 or None, got {top_k!r}")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p: must be above 0 and at most 1, or None, got {top_p!r}")
    if temperature == 0:
        return _Draw(None, None, None), None
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not isinstance(key, jax.Array) or key.ndim != (0 if typed else 1):  # the older kind is an array [2]
        given = f"{key.dtype} {list(key.shape)}" if isinstance(key, jax.Array) else repr(key)
        raise ValueError(f"key: must be a jax.random.key, got {given}")
    return _Draw(key, temperature, top_p), top_k


def checked_stops(stop_tokens: Any) -> tuple[int, ...]:
    """What `stop_tokens` holds, or a ValueError that names it."""
    tokens = np.asarray(() if stop_tokens is None else list(stop_tokens) if np.iterable(stop_tokens) else stop_tokens)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"stop_tokens: must be a sequence of integers, got {stop_tokens!r}")
    if tokens.size and (tokens.min() < -(2**31) or tokens.max() >= 2**31):
        raise ValueError(f"stop_tokens: must be within int32, got {stop_tokens!r}")
    return tuple(tokens.tolist())


def _is_number(x: Any) -> bool:
    return is_integer(x) or isinstance(x, float | np.floating)


def _pick(logits: Array, i: Any, draw: _Draw, top_k: int | None) -> Array:
    key = None if draw.key is None else jax.random.fold_in(draw.key, i)
    return sample(logits, key, draw.temperature, draw.top_p, top_k)


def _stops(token: Array, stop_tokens: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(token.shape, bool)


def _advance(model, token, done, cache, i, draw, how):
    logits, cache = model.step(token, cache)
    token = jnp.where(done, token, _pick(logits, i, draw, how.top_k))
    return token, done | _stops(token, how.stops), cache


def _compiled(program: Callable, static: tuple[int, ...], donate: int | None = None) -> Callable:
    # Options are for a program of its own alone; inside another, even a constant is traced.
    alone = jax.default_backend() == "gpu" and not isinstance(jnp.zeros(()), jax.core.Tracer)
    return _jitted(program, static, donate, alone)


@functools.cache
def _jitted(program: Callable, static: tuple[int, ...], donate: int | None, on_gpu: bool) -> Callable:
    options: Any = ON_GPU if on_gpu else None
    return jax.jit(program, static_argnums=static, donate_argnums=donate, compiler_options=options)


def _first(graphdef, params, prompt, lengths, draw, how):
    if isinstance(prompt, PromptState):
        logits, cache = prompt
    else:
        logits, cache = prefill_in_pieces(nnx.merge(graphdef, params), prompt, lengths, None, how.piece)
    if how.samples > 1:
        logits = jnp.repeat(logits, how.samples, 0)
        cache = jax.tree.map(lambda x: jnp.repeat(x, how.samples, 1), cache)
    token = _pick(logits, 0, draw, how.top_k)
    return token, _stops(token, how.stops), cache


def _next(graphdef, params, token, done, cache, i, draw, how):
    return _advance(nnx.merge(graphdef, params), token, done, cache, i, draw, how)


def _generate(graphdef, params, prompt, lengths, draw, new, how):
    model = nnx.merge(graphdef, params)
    token, done, cache = _first(graphdef, params, prompt, lengths, draw, how)
    out = jnp.zeros((new, token.shape[0]), jnp.int32).at[0].set(token)

    def unfinished(carry):
        i, _, done, _, _ = carry
        return (i < new) & ~jnp.all(done)

    def body(carry):
        i, token, done, cache, out = carry
        token, done, cache = _advance(model, token, done, cache, i, draw, how)
        return i + 1, token, done, cache, out.at[i].set(token)

    made, token, _, _, out = jax.lax.while_loop(unfinished, body, (jnp.int32(1), token, done, cache, out))
    # What the loop did not reach, because every row has ended, repeats each row's last token.
    return jnp.where(jnp.arange(new)[:, None] < made, out, token).T
