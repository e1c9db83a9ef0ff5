"""Flax NNX modules: the gated linear attention layer, the GLA language model, generation."""

from gla_jax.nn.attention import (
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    SimpleGatedLinearAttention,
    SimpleGatedLinearAttentionConfig,
)
from gla_jax.nn.block import GLABlock
from gla_jax.nn.config import GLAConfig
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.generate import generate, stream
from gla_jax.nn.mlp import SwiGLU
from gla_jax.nn.model import GLAForCausalLM
from gla_jax.nn.norm import LayerNorm, RMSNorm
from gla_jax.nn.sharding import DEFAULT_RULES, create_sharded, param_shardings

__all__ = [
    "DEFAULT_RULES",
    "GLABlock",
    "GLAConfig",
    "GLAForCausalLM",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "LayerNorm",
    "RMSNorm",
    "ShortConvolution",
    "SimpleGatedLinearAttention",
    "SimpleGatedLinearAttentionConfig",
    "SwiGLU",
    "create_sharded",
    "generate",
    "param_shardings",
    "stream",
]
