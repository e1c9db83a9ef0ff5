"""Other libraries' checkpoints: flash-linear-attention's and transformers', as safetensors."""

from gla_jax.interop.pretrained import load_pretrained, save_pretrained
from gla_jax.safetensors import CheckpointError

__all__ = ["CheckpointError", "load_pretrained", "save_pretrained"]
