"""Gated Linear Attention for JAX (arXiv 2312.06635): the op, its step, and which implementation a call takes."""

from gla_jax.attention import Choice, gated_linear_attention, which_implementation
from gla_jax.sequence_parallel import sequence_parallel
from gla_jax.step import gated_linear_attention_step

__all__ = [
    "Choice",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "sequence_parallel",
    "which_implementation",
]
