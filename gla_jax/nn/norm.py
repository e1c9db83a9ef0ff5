"""Normalisation over the last axis, computed in float32."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array
from gla_jax.nn.sharding import parameter

__all__ = ["LayerNorm", "RMSNorm"]


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
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale[...].astype(jnp.float32)
        return y.astype(self.dtype or x.dtype)


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
