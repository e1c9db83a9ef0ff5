"""Places of tokens in their documents, and rotary position embedding."""

import jax
import jax.numpy as jnp

from gla_jax.array_types import Array, Float, Ids, Int
from gla_jax.segments import segment_starts


def positions_after(
    shape: tuple[int, ...], start: Int[Array, " b"] | None, segment_ids: Ids | None
) -> tuple[Int[Array, "b t"], Int[Array, " b"]]:
    """Each token's place in its document [b, t], and the place of the token that comes next [b].

    start [b] is how many tokens of the first document came before (None for none). Padding takes no place.
    """
    batch, time = shape
    start = jnp.zeros((batch,), jnp.int32) if start is None else start
    if segment_ids is None:
        return start[:, None] + jnp.arange(time, dtype=jnp.int32), start + time
    valid, starts = segment_ids >= 0, segment_starts(jnp.asarray(segment_ids))
    own = valid.astype(jnp.int32)
    before = jnp.cumsum(own, 1, dtype=jnp.int32) - own + start[:, None]
    base = jax.lax.cummax(jnp.where(starts, before, 0), axis=1)
    return before - base, before[:, -1] + own[:, -1] - base[:, -1]


def rotate(x: Float[Array, "*b h k"], position: Int[Array, "*b"], theta: float) -> Float[Array, "*b h k"]:
    """Rotary embedding (arXiv 2104.09864, equation 34) of heads x [..., h, k] at position [...].

    Channels i and i + k / 2 are a pair, as in Llama and flash-linear-attention, turned by position * theta^(-2 i / k).
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    left, right = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(x.dtype)
