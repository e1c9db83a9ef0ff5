"""Continue prompts: parallel prefill in bounded memory, then one token at a time from a cache of constant size."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from gla_jax.array_types import Array

__all__ = ["generate", "sample", "stream"]


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
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 2048,
) -> Int[Array, "b new"]:
    """Continue each prompt of a batch by max_new_tokens tokens.

    Prompts are read `prefill_chunk` tokens at a time and tokens are then made one by one, in one compiled program whose
    memory depends neither on the prompt's length nor on max_new_tokens (but for the tokens themselves).

    Args:
      model: with `init_cache`, `prefill` and `step`, such as `GLAForCausalLM`.
      prompt: [b, t] integers, t >= 1; one prompt a row, at the right end of its row.
      max_new_tokens: how many to make, at least 1.
      key: a `jax.random.key`; needed if temperature > 0.
      temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
      top_k: draw only from the k likeliest tokens, k >= 1.
      top_p: draw only from the fewest tokens that together have this probability, 0 < p <= 1 (after top_k).
      prompt_lengths: [b], how many tokens at the right of each row are its prompt, 1 to t; the rest is padding that
        nothing depends on. None for all of them.
      stop_tokens: a row ends with the first of these; the rest of the row repeats it.
      prefill_chunk: tokens read at a time, at least 1.

    Returns:
      [b, max_new_tokens] int32: the new tokens, without the prompt.

    Raises:
      ValueError: naming the argument and what is allowed.
    """
    prompt, lengths = _checked_prompt(prompt, prompt_lengths, max_new_tokens, prefill_chunk)
    draw, top_k = _checked_draw(key, temperature, top_k, top_p)
    stops = _checked_stops(stop_tokens)
    graphdef, params = nnx.split(model)
    return _generate(graphdef, params, prompt, lengths, draw, max_new_tokens, top_k, stops, prefill_chunk)


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
    stop_tokens: Sequence[int] = (),
    prefill_chunk: int = 2048,
) -> Iterator[np.ndarray]:
    """The tokens of `generate`, from the same arguments, one [b] int32 array at a time as they are made.

    Ends after max_new_tokens, or when every row has met a stop token. Raises at the call, as `generate` does.
    """
    prompt, lengths = _checked_prompt(prompt, prompt_lengths, max_new_tokens, prefill_chunk)
    draw, top_k = _checked_draw(key, temperature, top_k, top_p)
    stop_tokens = _checked_stops(stop_tokens)
    graphdef, params = nnx.split(model)

    def tokens() -> Iterator[np.ndarray]:
        token, done, cache = _first(graphdef, params, prompt, lengths, draw, top_k, stop_tokens, prefill_chunk)
        yield np.asarray(token)
        for i in range(1, max_new_tokens):
            if stop_tokens and done.all():
                return
            token, done, cache = _next(graphdef, params, token, done, cache, i, draw, top_k, stop_tokens)
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
    if top_k is not None:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p is not None:
        ordered = jnp.sort(logits, -1, descending=True)
        probability = jax.nn.softmax(ordered, -1)
        before = jnp.cumsum(probability, -1) - probability
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    assert key is not None, "drawing needs a key"
    return jax.random.categorical(key, logits, -1).astype(jnp.int32)


class _Draw(NamedTuple):
    """How tokens are drawn; None for what is not wanted, so that it is part of the compiled program's type."""

    key: Array | None
    temperature: float | None
    top_p: float | None


def _checked_prompt(prompt: Any, lengths: Any, max_new_tokens: Any, prefill_chunk: Any) -> tuple[Array, Array | None]:
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or 0 in prompt.shape or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt: must be integers [b, t], b and t >= 1, got {prompt.dtype} {list(prompt.shape)}")
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value!r}")
    if lengths is not None:
        lengths, (b, t) = jnp.asarray(lengths), prompt.shape
        if not jnp.issubdtype(lengths.dtype, jnp.integer):
            raise ValueError(f"prompt_lengths: must be integers, got {lengths.dtype}")
        if lengths.shape != (b,):
            raise ValueError(f"prompt_lengths: must have shape [b] = [{b}], got {list(lengths.shape)}")
        if not isinstance(lengths, jax.core.Tracer) and (lengths.min() < 1 or lengths.max() > t):
            raise ValueError(f"prompt_lengths: must be from 1 to t = {t}, got {lengths.tolist()}")
    return prompt.astype(jnp.int32), lengths


def _checked_draw(key: Any, temperature: Any, top_k: Any, top_p: Any) -> tuple[_Draw, int | None]:
    if not _is_number(temperature) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: must be 0 (the likeliest token) or positive, got {temperature!r}")
    if temperature > 0 and key is None:
        raise ValueError("key: a temperature above 0 needs a jax.random.key, got None")
    if top_k is not None and (not _is_integer(top_k) or top_k < 1):
        raise ValueError(f"top_k: must be at least 1 or None, got {top_k!r}")
    if top_p is not None and (not _is_number(top_p) or not 0 < top_p <= 1):
        raise ValueError(f"top_p: must be above 0 and at most 1, or None, got {top_p!r}")
    if temperature == 0:
        return _Draw(None, None, None), None
    return _Draw(key, temperature, top_p), top_k


def _checked_stops(stop_tokens: Any) -> tuple[int, ...]:
    tokens = np.asarray(() if stop_tokens is None else list(stop_tokens) if np.iterable(stop_tokens) else stop_tokens)
    if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
        raise ValueError(f"stop_tokens: must be a sequence of integers, got {stop_tokens!r}")
    return tuple(tokens.tolist())


def _is_integer(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _is_number(x: Any) -> bool:
    return _is_integer(x) or isinstance(x, float | np.floating)


def _prefill(model: Any, prompt: Array, lengths: Array | None, piece: int) -> tuple[Array, Any]:
    """Logits [b, vocab] after the prompts and the cache there, reading at most `piece` tokens at a time."""
    b, t = prompt.shape
    cache = model.init_cache(b)
    pieces = -(-t // piece)
    if pieces == 1 and lengths is None:
        return model.prefill(prompt, cache)
    if pieces > 1:
        prompt = jnp.pad(prompt, ((0, 0), (pieces * piece - t, 0)))
    width = prompt.shape[1]
    ids = jnp.where(jnp.arange(width) < width - (t if lengths is None else lengths[:, None]), -1, 0)
    ids = jnp.broadcast_to(ids, prompt.shape)
    if pieces == 1:
        return model.prefill(prompt, cache, ids)

    def read(carry: tuple[Array, Any], inputs: tuple[Array, Array]) -> tuple[tuple[Array, Any], None]:
        return model.prefill(inputs[0], carry[1], inputs[1]), None

    def by_piece(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(b, pieces, piece), 1, 0)

    xs = (by_piece(prompt), by_piece(ids))
    logits = jax.eval_shape(model.step, prompt[:, 0], cache)[0]
    return jax.lax.scan(read, (jnp.zeros(logits.shape, logits.dtype), cache), xs)[0]


def _pick(logits: Array, i: Any, draw: _Draw, top_k: int | None) -> Array:
    key = None if draw.key is None else jax.random.fold_in(draw.key, i)
    return sample(logits, key, draw.temperature, draw.top_p, top_k)


def _stops(token: Array, stop_tokens: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(token.shape, bool)


def _advance(model, token, done, cache, i, draw, top_k, stop_tokens):
    logits, cache = model.step(token, cache)
    token = jnp.where(done, token, _pick(logits, i, draw, top_k))
    return token, done | _stops(token, stop_tokens), cache


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _first(graphdef, params, prompt, lengths, draw, top_k, stop_tokens, piece):
    logits, cache = _prefill(nnx.merge(graphdef, params), prompt, lengths, piece)
    token = _pick(logits, 0, draw, top_k)
    return token, _stops(token, stop_tokens), cache


@functools.partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=4)
def _next(graphdef, params, token, done, cache, i, draw, top_k, stop_tokens):
    return _advance(nnx.merge(graphdef, params), token, done, cache, i, draw, top_k, stop_tokens)


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8))
def _generate(graphdef, params, prompt, lengths, draw, new, top_k, stop_tokens, piece):
    model = nnx.merge(graphdef, params)
    token, done, cache = _first(graphdef, params, prompt, lengths, draw, top_k, stop_tokens, piece)
    out = jnp.zeros((new, prompt.shape[0]), jnp.int32).at[0].set(token)

    def unfinished(carry):
        i, _, done, _, _ = carry
        return (i < new) & ~jnp.all(done)

    def body(carry):
        i, token, done, cache, out = carry
        token, done, cache = _advance(model, token, done, cache, i, draw, top_k, stop_tokens)
        return i + 1, token, done, cache, out.at[i].set(token)

    made, token, _, _, out = jax.lax.while_loop(unfinished, body, (jnp.int32(1), token, done, cache, out))
    # What the loop did not reach, because every row has ended, repeats each row's last token.
    return jnp.where(jnp.arange(new)[:, None] < made, out, token).T
