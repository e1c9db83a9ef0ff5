"""GPU kernels in Pallas' Mosaic GPU: the forward on Hopper. The glue (forward.py) is apart from the kernel bodies."""

from gla_jax.pallas.forward import forward, why_unsupported

__all__ = ["forward", "why_unsupported"]
