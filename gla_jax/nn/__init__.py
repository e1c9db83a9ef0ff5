"""Flax NNX modules: gated linear attention and its siblings, language models of them, generation."""

from gla_jax.nn.attention import (
    GatedLinearAttention,
    GatedLinearAttentionConfig,
    SimpleGatedLinearAttention,
    SimpleGatedLinearAttentionConfig,
)
from gla_jax.nn.block import Block
from gla_jax.nn.config import CausalLMConfig, GLAConfig
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.generate import generate, stream
from gla_jax.nn.hgrn2 import HGRN2, HGRN2Config
from gla_jax.nn.mamba import Mamba, MambaConfig
from gla_jax.nn.mamba2 import Mamba2, Mamba2Config
from gla_jax.nn.mlp import SwiGLU
from gla_jax.nn.model import CausalLM, GLAForCausalLM
from gla_jax.nn.norm import LayerNorm, RMSNorm
from gla_jax.nn.prompt import PromptState, load_state, read_prompt, save_state
from gla_jax.nn.retention import (
    LightningAttention,
    LightningAttentionConfig,
    LinearAttention,
    LinearAttentionConfig,
    Retention,
    RetentionConfig,
)
from gla_jax.nn.rwkv6 import RWKV6, ChannelMix, RWKV6Config
from gla_jax.nn.sharding import DEFAULT_RULES, create_sharded, param_shardings
from gla_jax.nn.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig

__all__ = [
    "DEFAULT_RULES",
    "HGRN2",
    "RWKV6",
    "Block",
    "CausalLM",
    "CausalLMConfig",
    "ChannelMix",
    "GLAConfig",
    "GLAForCausalLM",
    "GatedLinearAttention",
    "GatedLinearAttentionConfig",
    "HGRN2Config",
    "LayerNorm",
    "LightningAttention",
    "LightningAttentionConfig",
    "LinearAttention",
    "LinearAttentionConfig",
    "Mamba",
    "Mamba2",
    "Mamba2Config",
    "MambaConfig",
    "PromptState",
    "RMSNorm",
    "RWKV6Config",
    "Retention",
    "RetentionConfig",
    "ShortConvolution",
    "SimpleGatedLinearAttention",
    "SimpleGatedLinearAttentionConfig",
    "SoftmaxAttention",
    "SoftmaxAttentionConfig",
    "SwiGLU",
    "create_sharded",
    "generate",
    "load_state",
    "param_shardings",
    "read_prompt",
    "save_state",
    "stream",
]
