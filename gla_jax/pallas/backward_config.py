"""Tuning of the backward's kernels: rings of shared memory and registers."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl

from gla_jax.pallas.config import WIDTH, Roles

# Tiles of 64 columns of v that a block takes.
VALUE_BLOCKS = 2


@dataclasses.dataclass(frozen=True)
class ChunksConfig(Roles):
    """One tuning of the gradients of all chunks in parallel (backward_chunks.py).

    Attributes:
      key_blocks: k / 64.
      token_stages: chunks of q, k and g in shared memory.
      ring: 64 columns of states, or of their cotangents, in shared memory.
      value_stages: 64 columns of v and do in shared memory.
      lends: g and the triangle lie in the last places of the ring and of v and do, which are theirs while q, k and g
        are gated and their gradients made.
      compute_registers, load_registers: a thread's, in each role.
      blocks: how many a call has at most: one a multiprocessor.
    """

    key_blocks: int
    token_stages: int
    ring: int
    value_stages: int
    lends: bool = False
    compute_registers: int = 240
    load_registers: int = 24
    blocks: int = 132

    def __post_init__(self):
        if self.lends and (self.token_stages > 1 or self.ring < 3 or self.value_stages < 2):
            raise ValueError(f"lends=True takes one token stage, a ring of 3 and two value stages, not {self}")

    @property
    def groups(self) -> int:
        """Warpgroups that compute."""
        return min(2, self.key_blocks)

    @property
    def tiles(self) -> int:
        """64 channels that a warpgroup takes."""
        return self.key_blocks // self.groups

    @property
    def threads(self) -> int:
        """Warpgroups in a block."""
        return self.groups + 1


@dataclasses.dataclass(frozen=True)
class BackwardConfig(Roles):
    """One tuning of the backward, checked when built.

    Attributes:
      key_blocks: k / 64; in both kernels a warpgroup each computes, and one more moves data.
      state_stages: chunks of k, v and g in shared memory, in the kernel that makes the states.
      token_stages: chunks of q, k and g in shared memory, in the kernel that makes the gradients.
      value_stages: the same of v, do and the states.
      compute_registers, load_registers: a thread's, in each role of the second kernel.
      mild: largest decay of a chunk, in nats, for the centred form.
      time_parts: how many parts a sequence is cut in; None for as many as fill a GPU.
      in_chunks: the tuning of backward_chunks.py, where that makes the gradients; None for backward_kernel.py, for
        k and v up to 128.
    """

    key_blocks: int
    state_stages: int
    token_stages: int
    value_stages: int
    compute_registers: int
    load_registers: int
    mild: float = 96.0
    time_parts: int | None = None
    in_chunks: ChunksConfig | None = None

    def __post_init__(self):
        if VALUE_BLOCKS % self.key_blocks:
            raise ValueError(f"key_blocks={self.key_blocks} must divide the {VALUE_BLOCKS} blocks of v")
        if self.value_stages > self.token_stages:
            raise ValueError(f"value_stages={self.value_stages} must not exceed token_stages={self.token_stages}")
        used = self.key_blocks * self.compute_registers + self.load_registers
        if used > self.threads * self.launch_registers:
            raise ValueError(f"{used} registers for {self.threads} warpgroups of {self.launch_registers}")

    @property
    def threads(self) -> int:
        """Warpgroups in a block."""
        return self.key_blocks + 1


_NARROW = BackwardConfig(
    key_blocks=1, state_stages=4, token_stages=2, value_stages=2, compute_registers=240, load_registers=40
)
_WIDE = BackwardConfig(
    key_blocks=2, state_stages=3, token_stages=2, value_stages=1, compute_registers=240, load_registers=24
)


def choose_time_parts(blocks: int, chunks: int) -> int:
    """How many parts to cut a sequence in, if uncut it takes `blocks` blocks of a GPU's 132 multiprocessors."""
    return max(1, min(132 // blocks, chunks // 8))


# Gradients of all chunks in parallel, by k / 64.
_CHUNKS = {
    1: ChunksConfig(1, token_stages=2, ring=6, value_stages=3),
    2: ChunksConfig(2, token_stages=2, ring=3, value_stages=2),
    4: ChunksConfig(4, token_stages=1, ring=3, value_stages=2, lends=True),
}


def choose_backward(key_size: int, value_size: int, dtype: jnp.dtype) -> BackwardConfig:
    """The tuning for keys of `key_size` channels, up to 256, and values of `value_size`."""
    config = _NARROW if key_size <= WIDTH else _WIDE
    if key_size > 2 * WIDTH or value_size > VALUE_BLOCKS * WIDTH:
        config = dataclasses.replace(config, in_chunks=_CHUNKS[pl.next_power_of_2(pl.cdiv(key_size, WIDTH))])
    # float16 ends at 65504: exp(mild / 2) times a key has to stay below.
    return config if dtype == jnp.bfloat16 else dataclasses.replace(config, mild=8.0)
