"""GPU kernels in Pallas' Mosaic GPU, for Hopper. The glue (forward.py, backward.py) is apart from the kernel bodies."""

from gla_jax.pallas.backward import backward
from gla_jax.pallas.forward import States, forward, saves_states, why_unsupported

__all__ = ["States", "backward", "forward", "saves_states", "why_unsupported"]
