"""Continue prompts: parallel prefill in bounded memory, then one token at a time from a cache of constant size."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

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
    settings = _check(
        prompt, max_new_tokens, key, temperature, top_k, top_p, prompt_lengths, stop_tokens, prefill_chunk
    )
    graphdef, params = nnx.split(model)
    return _generate(graphdef, params, *settings.traced, max_new_tokens, *settings.static)


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
    """The tokens of `generate`, with the same arguments, one [b] int32 array at a time as they are made.

    Ends after max_new_tokens, or when every row has met a stop token. Arguments are checked at the call.
    """
    settings = _check(
        prompt, max_new_tokens, key, temperature, top_k, top_p, prompt_lengths, stop_tokens, prefill_chunk
    )
    graphdef, params = nnx.split(model)
    prompt, lengths, *sampling = settings.traced
    top_k, stop_tokens, prefill_chunk = settings.static

    def tokens() -> Iterator[np.ndarray]:
        token, done, cache = _first(graphdef, params, prompt, lengths, *sampling, top_k, stop_tokens, prefill_chunk)
        yield np.asarray(token)
        for i in range(1, max_new_tokens):
            if done.all():
                return
            token, done, cache = _next(graphdef, params, token, done, cache, i, *sampling, top_k, stop_tokens)
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
    return jax.random.categorical(key, logits, -1).astype(jnp.int32)


class _Settings:
    def __init__(self, traced: tuple, static: tuple):
        self.traced, self.static = traced, static


def _check(
    prompt: Any,
    max_new_tokens: int,
    key: Array | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    prompt_lengths: Any,
    stop_tokens: Sequence[int],
    prefill_chunk: int,
) -> _Settings:
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or prompt.shape[1] < 1 or not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise ValueError(f"prompt: must be integers [b, t] with t >= 1, got {prompt.dtype}{list(prompt.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: must be at least 1, got {max_new_tokens}")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk: must be at least 1, got {prefill_chunk}")
    if not temperature >= 0:
        raise ValueError(f"temperature: must be 0 (greedy) or positive, got {temperature}")
    if temperature > 0 and key is None:
        raise ValueError("key: sampling at a temperature above 0 needs a jax.random.key")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: must be at least 1 or None, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: must be above 0 and at most 1, or None, got {top_p}")
    if prompt_lengths is not None:
        prompt_lengths = jnp.asarray(prompt_lengths, jnp.int32)
        if prompt_lengths.shape != prompt.shape[:1]:
            raise ValueError(
                f"prompt_lengths: must be [b] = {list(prompt.shape[:1])}, got {list(prompt_lengths.shape)}"
            )
        if not isinstance(prompt_lengths, jax.core.Tracer):
            low, high = int(prompt_lengths.min()), int(prompt_lengths.max())
            if low < 1 or high > prompt.shape[1]:
                raise ValueError(f"prompt_lengths: must be from 1 to t = {prompt.shape[1]}, got {low} to {high}")
    if temperature == 0:
        key = temperature = top_k = top_p = None
    return _Settings(
        (prompt.astype(jnp.int32), prompt_lengths, key, temperature, top_p), (top_k, tuple(stop_tokens), prefill_chunk)
    )


def _prefill(model: Any, prompt: Array, lengths: Array | None, piece: int) -> tuple[Array, Any]:
    """Logits [b, vocab] after the prompts and the cache there, reading `piece` tokens at a time."""
    b, t = prompt.shape
    cache = model.init_cache(b)
    if lengths is None and t <= piece:
        return model.prefill(prompt, cache)
    if lengths is None:
        lengths = jnp.full((b,), t)
    pieces = -(-t // piece) if t > piece else 1
    padding = pieces * piece - t if t > piece else 0
    prompt = jnp.pad(prompt, ((0, 0), (padding, 0)))
    ids = jnp.where(jnp.arange(prompt.shape[1]) >= prompt.shape[1] - lengths[:, None], 0, -1)
    if pieces == 1:
        return model.prefill(prompt, cache, ids)
    stacked = (jnp.moveaxis(x.reshape(b, pieces, piece), 1, 0) for x in (prompt, ids))

    def read(carry: tuple, inputs: tuple) -> tuple[tuple, None]:
        return model.prefill(inputs[0], carry[1], inputs[1]), None

    logits = jax.eval_shape(model.step, prompt[:, 0], cache)[0]
    (logits, cache), _ = jax.lax.scan(read, (jnp.zeros(logits.shape, logits.dtype), cache), tuple(stacked))
    return logits, cache


def _pick(logits: Array, key: Array | None, i: Any, temperature: Any, top_p: Any, top_k: int | None) -> Array:
    return sample(logits, None if key is None else jax.random.fold_in(key, i), temperature, top_p, top_k)


def _stops(token: Array, stop_tokens: tuple[int, ...]) -> Array:
    return jnp.isin(token, jnp.asarray(stop_tokens, jnp.int32)) if stop_tokens else jnp.zeros(token.shape, bool)


@functools.partial(jax.jit, static_argnums=(0, 7, 8, 9))
def _first(graphdef, params, prompt, lengths, key, temperature, top_p, top_k, stop_tokens, piece):
    logits, cache = _prefill(nnx.merge(graphdef, params), prompt, lengths, piece)
    token = _pick(logits, key, 0, temperature, top_p, top_k)
    return token, _stops(token, stop_tokens), cache


def _advance(model, token, done, cache, i, key, temperature, top_p, top_k, stop_tokens):
    logits, cache = model.step(token, cache)
    token = jnp.where(done, token, _pick(logits, key, i, temperature, top_p, top_k))
    return token, done | _stops(token, stop_tokens), cache


@functools.partial(jax.jit, static_argnums=(0, 9, 10), donate_argnums=(4,))
def _next(graphdef, params, token, done, cache, i, key, temperature, top_p, top_k, stop_tokens):
    model = nnx.merge(graphdef, params)
    return _advance(model, token, done, cache, i, key, temperature, top_p, top_k, stop_tokens)


@functools.partial(jax.jit, static_argnums=(0, 7, 8, 9, 10))
def _generate(graphdef, params, prompt, lengths, key, temperature, top_p, new, top_k, stop_tokens, piece):
    model = nnx.merge(graphdef, params)
    token, done, cache = _first(graphdef, params, prompt, lengths, key, temperature, top_p, top_k, stop_tokens, piece)
    # Columns that the loop never reaches, because every row has ended, repeat the row's last token.
    out = jnp.zeros((new, prompt.shape[0]), jnp.int32).at[0].set(token)

    def unfinished(carry):
        i, _, done, _, _ = carry
        return (i < new) & ~jnp.all(done)

    def body(carry):
        i, token, done, cache, out = carry
        token, done, cache = _advance(model, token, done, cache, i, key, temperature, top_p, top_k, stop_tokens)
        return i + 1, token, done, cache, out.at[i].set(token)

    made, token, _, _, out = jax.lax.while_loop(unfinished, body, (jnp.int32(1), token, done, cache, out))
    return jnp.where(jnp.arange(new)[:, None] < made, out, token).T
