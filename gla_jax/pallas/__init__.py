"""GPU kernels in Pallas' Mosaic GPU, for Hopper. The glue (forward.py, backward.py) is apart from the kernel bodies."""

from gla_jax.pallas.backward import backward
from gla_jax.pallas.forward import States, forward, forward_and_states, saves_states, why_unsupported

__all__ = ["States", "backward", "forward", "forward_and_states", "saves_states", "why_unsupported"]
