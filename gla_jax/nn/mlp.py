"""The feed-forward half of a block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array
from gla_jax.nn.sharding import linear, side_by_side


def mlp_width(hidden_size: int, ratio: float = 4.0) -> int:
    """Two thirds of ratio * hidden_size, rounded up to a multiple of 256 (as flash-linear-attention and Llama do)."""
    return -(-int(hidden_size * ratio * 2 / 3) // 256) * 256


@functools.partial(jax.checkpoint, prevent_cse=False)
def silu(x: Array) -> Array:
    """x sigmoid(x), computed in float32 and rounded once; for its gradient nothing but x is kept."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.checkpoint, prevent_cse=False)
def gated(x: Array, gate: Array) -> Array:
    """swish(gate) * x in gate's dtype, rounded once; for its gradients nothing but the arguments is kept."""
    return (jax.nn.silu(gate.astype(jnp.float32)) * x.astype(jnp.float32)).astype(gate.dtype)


class SwiGLU(nnx.Module):
    """The gated MLP, y = (swish(x W_gate) * x W_up) W_down (Shazeer, arXiv 2002.05202, eq. 6; arXiv 2312.06635, 4.4).

    Args:
      hidden_size: width d of input and output.
      intermediate_size: width between; None for `mlp_width(hidden_size)`.
      init_std: standard deviation of the initial weights.
      dtype: computed in; None follows input and parameters.
      param_dtype: of the weights.
      rngs: of the initial weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int | None = None,
        *,
        init_std: float = 0.02,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = mlp_width(hidden_size) if intermediate_size is None else intermediate_size
        common = {"init_std": init_std, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.gate_proj = linear(hidden_size, width, ("embed", "mlp"), **common)
        self.up_proj = linear(hidden_size, width, ("embed", "mlp"), **common)
        self.down_proj = linear(width, hidden_size, ("mlp", "embed"), **common)

    def __call__(self, x: Float[Array, "*rows d"]) -> Float[Array, "*rows d"]:
        """Apply to x [..., d], each row on its own."""
        gate, up = side_by_side((self.gate_proj, self.up_proj), x)
        return self.down_proj(gated(up, gate))
