"""Normalisation over the last axis, computed in float32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array
from gla_jax.mesh import cut_along, devices_of, is_cut_explicitly, mixes_axes, runs_on_one_device, vary_alike
from gla_jax.nn.mlp import gated
from gla_jax.nn.sharding import parameter
from gla_jax.pallas import norm as kernel


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, y = x / sqrt(mean(x^2) + eps) * scale, over the last axis.

    Args:
      features: size of the last axis.
      eps: added to the mean square, > 0.
      affine: whether to multiply by a learned scale [features], which starts at 1.
      dtype: of the result; None for the input's. The arithmetic is float32 (arXiv 1910.07467, equation 4).
      param_dtype: of the scale.
      rngs: not drawn from.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps, self.dtype = eps, dtype
        self.scale = _constant(nnx.initializers.ones, features, affine, param_dtype, rngs)

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Normalise x [..., d]."""
        scale = None if self.scale is None else self.scale[...]
        return _rms_norm(x, scale, self.eps, jnp.dtype(self.dtype or x.dtype))


class LayerNorm(nnx.Module):
    """Layer normalisation, y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias, over the last axis.

    Args:
      features: size of the last axis.
      eps: added to the variance, > 0.
      affine: whether to apply a learned scale (from 1) and bias (from 0), both [features].
      dtype: of the result; None for the input's. The arithmetic is float32 (arXiv 1607.06450, equation 4).
      param_dtype: of scale and bias.
      rngs: not drawn from.
    """

    def __init__(
        self,
        features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.eps, self.dtype = eps, dtype
        self.scale = _constant(nnx.initializers.ones, features, affine, param_dtype, rngs)
        self.bias = _constant(nnx.initializers.zeros, features, affine, param_dtype, rngs)

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Normalise x [..., d]."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        if self.scale is not None and self.bias is not None:
            y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype or x.dtype)


def _constant(init: Any, features: int, present: bool, param_dtype: Any, rngs: nnx.Rngs) -> Any:
    if not present:
        return nnx.data(None)
    return parameter(init, (features,), (None,), param_dtype=param_dtype, rngs=rngs)


def fork(norm: Any, x: Float[Array, "*rows d"]) -> tuple[Float[Array, "*rows d"], Float[Array, "*rows d"]]:
    """x and norm(x), where a residual stream goes on beside a layer.

    Where there is a kernel for it, the gradient of an `RMSNorm` is added there to that of the stream.
    """
    if x.ndim == 3 and getattr(norm, "dtype", None) in (None, x.dtype) and _has_kernel(norm, x, 1):
        return _fork(norm.eps, *vary_alike((x, norm.scale[...])))
    return x, norm(x)


def gated_norm(norm: Any, o: Float[Array, "*rows h d"], gate: Float[Array, "*rows hd"]) -> Float[Array, "*rows hd"]:
    """swish(gate) * norm(o), heads side by side, rounded once; for its gradients nothing but the arguments is kept."""
    if o.ndim == 4 and gate.dtype == o.dtype and _has_kernel(norm, o, o.shape[2]):
        return _gated_norm(norm.eps, *vary_alike((o, gate, norm.scale[...])))
    finish = lambda o, gate: gated((o if norm is None else norm(o)).reshape(gate.shape), gate)
    return jax.checkpoint(finish, prevent_cse=False)(o, gate)


def _rms_norm(x: Array, scale: Array | None, eps: float, dtype: Any) -> Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return (y if scale is None else y * scale.astype(jnp.float32)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fork(eps: float, x: Array, scale: Array) -> tuple[Array, Array]:
    return x, _rms_norm(x, scale, eps, x.dtype)


def _fork_forward(eps: float, x: Array, scale: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return _fork(eps, x, scale), (x, scale)


def _fork_backward(eps: float, kept: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, scale), (dx, dy) = kept, cotangents
    heads = lambda y: y[:, :, None]
    found, dscale = _gradients(eps, False, heads(x), heads(dy), heads(dx), scale)
    return found.reshape(x.shape), dscale


_fork.defvjp(_fork_forward, _fork_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_norm(eps: float, o: Array, gate: Array, scale: Array) -> Array:
    return gated(_rms_norm(o, scale, eps, jnp.float32).reshape(gate.shape), gate)


def _gated_norm_forward(eps: float, *arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _gated_norm(eps, *arguments), arguments


def _gated_norm_backward(eps: float, arguments: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    o, gate, scale = arguments
    do, dgate, dscale = _gradients(eps, True, o, dy.reshape(o.shape), gate.reshape(o.shape), scale)
    return do, dgate.reshape(gate.shape), dscale


_gated_norm.defvjp(_gated_norm_forward, _gated_norm_backward)


def _has_kernel(norm: Any, x: Array, heads: int) -> bool:
    """Whether there is one for the gradients of norm over each of `heads` parts of x's rows, [b, t, ...]."""
    if not isinstance(norm, RMSNorm) or norm.scale is None or is_cut_explicitly(x) or mixes_axes(x):
        return False
    return not kernel.why_unsupported(jax.ShapeDtypeStruct((*x.shape[:2], heads, x.shape[-1]), x.dtype))


def _gradients(eps: float, is_gated: bool, x: Array, dy: Array, beside: Array, scale: Array) -> tuple[Array, ...]:
    """By the kernel: x's, [the gate's,] and scale's."""
    wide = jnp.broadcast_to(scale.astype(jnp.float32), (x.shape[0], *scale.shape))
    *found, parts = _by_kernel(eps, is_gated, *vary_alike((x, dy, beside, wide)))
    return *found, jnp.sum(parts, (0, 1, 2)).astype(scale.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(eps: float, is_gated: bool, *arrays: Array) -> tuple[Array, ...]:
    x = arrays[0]
    each = kernel.rows_of_a_block(x.shape[0], x.shape[1], devices_of(x))

    def run(x: Array, dy: Array, beside: Array, wide: Array) -> tuple[Array, ...]:
        return kernel.norm_gradients(x, dy, beside, wide, eps, each, gated=is_gated)

    if runs_on_one_device(x):
        return vary_alike((run(*arrays), x))[0]
    whole, parts = "bthd", "bnhd"
    inputs, outputs = (whole, whole, whole, "bd"), (*[whole] * (1 + is_gated), parts)
    return cut_along(run, arrays, inputs, outputs, "bnh" if is_gated else "bn", {"t": ("n", each)})


def _plain_gradients(eps: float, is_gated: bool, each: int, *arrays: Array) -> tuple[Array, ...]:
    """What the kernel gives, in plain JAX: its derivatives are the kernel's."""
    x, dy, beside, wide = (y.astype(jnp.float32) for y in arrays)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    x_hat, weight = x * inverse, wide[:, None, None]
    through = dy * jax.nn.silu(beside) if is_gated else dy
    total = (through * x_hat).reshape(x.shape[0], -1, each, *x.shape[2:]).sum(2)
    w = through * weight
    dx = (w - x_hat * jnp.mean(w * x_hat, -1, keepdims=True)) * inverse
    if not is_gated:
        return (dx + beside).astype(arrays[0].dtype), total
    slope = jax.nn.sigmoid(beside) * (1 + beside * (1 - jax.nn.sigmoid(beside)))
    return dx.astype(arrays[0].dtype), (dy * x_hat * weight * slope).astype(arrays[0].dtype), total


def _by_kernel_forward(eps: float, is_gated: bool, *arrays: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return _by_kernel(eps, is_gated, *arrays), arrays


def _by_kernel_backward(eps: float, is_gated: bool, arrays: tuple[Array, ...], cotangents: tuple[Array, ...]) -> tuple:
    each = arrays[0].shape[1] // cotangents[-1].shape[1]
    return jax.vjp(functools.partial(_plain_gradients, eps, is_gated, each), *arrays)[1](tuple(cotangents))


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)
