"""One token of the recurrence, for decoding."""

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax import checks
from gla_jax.array_types import Array, Bonus, Float, Gate, State


def gated_linear_attention_step(
    q: Float[Array | np.ndarray, "b h k"],
    k: Float[Array | np.ndarray, "b hk k"],
    v: Float[Array | np.ndarray, "b hk v"],
    g: Gate | None,
    state: State,
    *,
    bonus: Bonus | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "b h v"], Float[Array, "b hk k v"]]:
    """One token of `gated_linear_attention`: S = Diag(exp g) S + k^T v and o = scale * q S.

    (arXiv 2312.06635, equation 3.) With a bonus u, o = scale * q (S + Diag(u) k^T v) of the state before. Donate the
    state under `jax.jit` and it is updated in place.

    Args:
      q: [b, h, k]; h is a multiple of hk.
      k: [b, hk, k], of q's dtype.
      v: [b, hk, v], of q's dtype.
      g: natural logarithm of the decay, at most 0: None, [hk], [b, hk] or [b, hk, k], of q's dtype or float32.
      state: [b, hk, k, v], float32 (float64 for float64).
      bonus: u [hk, k], of q's dtype or float32, or None.
      scale: factor of the output; k**-0.5 if None.

    Returns:
      o [b, h, v] of v's dtype, and the new state.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value.
    """
    q, k, v, g, state, bonus = checks.as_jax(q, k, v, g, state, bonus)
    checks.check_step(q, k, v, g, state, bonus, scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, (batch, heads, _) = state.dtype, k.shape
    read = None
    write = k.astype(dtype)[..., :, None] * v.astype(dtype)[..., None, :]
    if bonus is not None:
        read = state + bonus.astype(dtype)[..., None] * write
    if g is not None:
        decay = jnp.exp(g.astype(dtype))
        state = (decay[..., None] if g.ndim == 3 else decay[..., None, None]) * state
    state = state + write
    grouped = q.astype(dtype).reshape(batch, heads, -1, q.shape[-1])
    read = state if read is None else read
    o = scale * jnp.einsum("bhrk,bhkv->bhrv", grouped, read, precision=jax.lax.Precision.HIGHEST)
    return o.reshape(*q.shape[:2], v.shape[-1]).astype(v.dtype), state
