"""One layer of the model: mixing over time, then the MLP."""

from typing import Any, cast

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.attention import Implementation
from gla_jax.nn.attention import GatedLinearAttention
from gla_jax.nn.config import GLAConfig
from gla_jax.nn.mlp import SwiGLU
from gla_jax.nn.norm import RMSNorm

__all__ = ["GLABlock"]


class GLABlock(nnx.Module):
    """A pre-norm block, Y = X + GLA(norm(X)), then Y + SwiGLU(norm(Y)).

    arXiv 2312.06635, section 4.4, where the second line prints "+ X"; the authors' code adds Y, and so do we.
    The block asks of its mixer only `__call__`, `init_cache`, `prefill` and `step`.

    Args:
      config: shapes, options and dtypes.
    """

    def __init__(self, config: GLAConfig, *, rngs: nnx.Rngs):
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, **common)
        self.mixer = _mixer(config, **common)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps, **common)
        self.mlp = SwiGLU(config.hidden_size, config.mlp_width, init_std=config.init_std, **common)

    def init_cache(self, batch_size: int) -> Any:
        """The mixer's cache before the first token: a pytree of arrays, batch first."""
        return self.mixer.init_cache(batch_size)

    def __call__(self, x: Float[Array, "b t d"], segment_ids: Ids | None = None) -> Float[Array, "b t d"]:
        """The block over whole sequences x [b, t, d]."""
        return self._feed_forward(x + self.mixer(self.mixer_norm(x), segment_ids))

    def prefill(
        self, x: Float[Array, "b t d"], cache: Any, segment_ids: Ids | None = None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The block over x [b, t, d] after what the cache has seen, and the cache after x."""
        y, cache = self.mixer.prefill(self.mixer_norm(x), cache, segment_ids)
        return self._feed_forward(x + y), cache

    def step(self, x: Float[Array, "b d"], cache: Any) -> tuple[Float[Array, "b d"], Any]:
        """The block for one token x [b, d], and the cache after it."""
        y, cache = self.mixer.step(self.mixer_norm(x), cache)
        return self._feed_forward(x + y), cache

    def _feed_forward(self, y: Array) -> Array:
        return y + self.mlp(self.mlp_norm(y))


def _mixer(config: GLAConfig, **common: Any) -> GatedLinearAttention:
    return GatedLinearAttention(
        config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        expand_k=config.expand_k,
        expand_v=config.expand_v,
        gate_low_rank=config.gate_low_rank,
        gate_normalizer=config.gate_normalizer,
        gate_clamp=config.gate_clamp,
        conv_size=config.conv_size,
        conv_bias=config.conv_bias,
        feature_map=config.feature_map,
        output_gate=config.output_gate,
        output_gate_bias=config.output_gate_bias,
        output_norm=config.output_norm,
        output_norm_affine=config.output_norm_affine,
        norm_eps=config.norm_eps,
        init_std=config.init_std,
        implementation=cast(Implementation | None, config.implementation),
        sequence_axis=config.sequence_axis,
        **common,
    )
