"""One token of the recurrence, for decoding."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax import checks
from gla_jax.array_types import Array, Bonus, Float, Gate, State
from gla_jax.mesh import runs_on_one_device
from gla_jax.pallas import step as kernel

HIGHEST = jax.lax.Precision.HIGHEST


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
    o = scale * jnp.einsum("bhrk,bhkv->bhrv", grouped, read, precision=HIGHEST)
    return o.reshape(*q.shape[:2], v.shape[-1]).astype(v.dtype), state


class Stacked(NamedTuple):
    """One layer's state in a stack of all layers' states.

    states: [n, b, hk, k, v], float32.
    layer: int32, in 0 <= layer < n.
    """

    states: Array
    layer: Array


def step_in_stack(q, k, v, g, state: Stacked, *, bonus=None, scale=None) -> tuple[Float[Array, "b h v"], Stacked]:
    """`gated_linear_attention_step` of one layer of a stack, in place; on Hopper by a kernel, given enough work."""
    states, layer = state
    kernels = runs_on_one_device(q) and kernel.why_unsupported(q, states) is None
    o, states = (_by_kernel if kernels else _by_xla)(q, k, v, g, states, bonus, layer, scale)
    return o, Stacked(states, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _by_kernel(q, k, v, g, states, bonus, layer, scale):
    checks.check_step(q, k, v, g, jax.eval_shape(lambda: states[0]), bonus, scale)
    dtype, (batch, heads, width) = v.dtype, k.shape
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    q = (width**-0.5 if scale is None else scale) * q
    decay = jnp.ones_like(k) if g is None else jnp.exp(g.astype(jnp.float32))
    decay = jnp.broadcast_to(decay if decay.ndim == 3 else decay[..., None], k.shape)
    o, states = kernel.step(q, k, v, decay, states, layer, early=bonus is not None)
    if bonus is not None:
        grouped, k = q.reshape(batch, heads, -1, width), bonus.astype(jnp.float32) * k
        own = jnp.einsum("bhrk,bhk->bhr", grouped, k, precision=HIGHEST)
        o = o + (own[..., None] * v[:, :, None]).reshape(o.shape)
    return o.astype(dtype), states


def _by_kernel_fwd(*arguments):
    return _by_kernel(*arguments), arguments[:-1]


def _by_kernel_bwd(scale, arguments, cotangents):
    return jax.vjp(functools.partial(_by_xla, scale=scale), *arguments)[1](cotangents)


_by_kernel.defvjp(_by_kernel_fwd, _by_kernel_bwd)


def _by_xla(q, k, v, g, states, bonus, layer, scale):
    state = jax.lax.dynamic_index_in_dim(states, layer, keepdims=False)
    o, state = gated_linear_attention_step(q, k, v, g, state, bonus=bonus, scale=scale)
    return o, jax.lax.dynamic_update_index_in_dim(states, state, layer, 0)
