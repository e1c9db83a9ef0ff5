"""The recurrence as written, one token at a time: slow, and right in any precision."""

import jax
import jax.numpy as jnp

from gla_jax.array_types import Array
from gla_jax.segments import Entries


def recurrence(
    q: Array, k: Array, v: Array, g: Array | None, state: Array, scale: float, entries: Entries | None = None
) -> tuple[Array, Array]:
    """S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t (arXiv 2312.06635, equation 3).

    Args:
      q: [b, t, h, k].
      k: [b, t, hk, k].
      v: [b, t, hk, v].
      g: log decay, [b, t, hk] or [b, t, hk, k]; None for no decay.
      state: [b, hk, k, v] before the first token; its dtype is the one computed in.
      scale: factor of the output.
      entries: sequences with states of their own, a token a block (b = 1); `state` is then only a place to start.

    Returns:
      o [b, t, h, v] in v's dtype, and the state after the last token, or after each of the entries' sequences
      [n, hk, k, v].
    """
    dtype = state.dtype
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])
    decay = jnp.exp(jnp.zeros(k.shape[:3], dtype) if g is None else g.astype(dtype))
    decay = decay[..., None] if decay.ndim == 3 else decay
    steps = tuple(jnp.moveaxis(x.astype(dtype), 1, 0) for x in (grouped, k, v, decay))

    def step(s, x):
        q_t, k_t, v_t, a_t = x
        s = a_t[..., None] * s + k_t[..., :, None] * v_t[..., None, :]
        return s, scale * jnp.einsum("bhrk,bhkv->bhrv", q_t, s, precision=jax.lax.Precision.HIGHEST)

    if entries is None:
        state, o = jax.lax.scan(step, state, steps)
    else:
        initial, blocks = entries

        def step_of_sequence(carry, x):
            s, finals = carry
            block, x = x
            s, o = step(jnp.where(block.first, initial[block.sequence][None], s), x)
            return (s, finals.at[block.sequence].set(s[0], mode="drop")), o

        (_, state), o = jax.lax.scan(step_of_sequence, (state, initial), (blocks, steps))
    return jnp.moveaxis(o, 0, 1).reshape(*q.shape[:3], v.shape[-1]).astype(v.dtype), state
