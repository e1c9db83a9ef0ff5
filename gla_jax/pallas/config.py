"""Tuning of the forward kernel: how many warpgroups take each role, and how deep the ring of stages is."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

# Channels of a tile, of q and k and of v.
WIDTH = 64


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """One tuning of the forward kernel, checked when built.

    Attributes:
      key_blocks: k / 64.
      matmul_groups: warpgroups that carry states, 64 columns of v each.
      gaters: warpgroups that gate.
      block_gaters: how many of them share the key blocks of one chunk; more of them take turns at the chunks.
      stages: chunks in shared memory.
      matmul_registers, gate_registers, load_registers: a thread's, in each role.
      mild: largest decay of a chunk, in nats, for the centred form.
      auto_barriers: whether the compiler puts a barrier around each access of shared memory, besides the kernel's own.
    """

    key_blocks: int
    matmul_groups: int
    gaters: int
    block_gaters: int
    stages: int
    matmul_registers: int
    gate_registers: int
    load_registers: int = 24
    mild: float = 96.0
    auto_barriers: bool = True

    def __post_init__(self):
        if self.key_blocks % self.block_gaters or self.gaters % self.block_gaters:
            raise ValueError(f"block_gaters={self.block_gaters} must divide key_blocks and gaters")
        if self.stages % self.turns:
            # A barrier's waiter has to see each of its completions: a slot belongs to one gater.
            raise ValueError(f"stages={self.stages} must be a multiple of the gaters that take turns, {self.turns}")
        pool = self.threads * self.launch_registers
        used = self.matmul_groups * self.matmul_registers + self.gaters * self.gate_registers + self.load_registers
        if used > pool:
            raise ValueError(f"{used} registers for {self.threads} warpgroups, and there are {pool}")

    @property
    def turns(self) -> int:
        """How many chunks are gated at the same time."""
        return self.gaters // self.block_gaters

    @property
    def value_width(self) -> int:
        """Columns of v in a block."""
        return self.matmul_groups * WIDTH

    @property
    def threads(self) -> int:
        """Warpgroups in a block."""
        return self.matmul_groups + self.gaters + 1

    @property
    def launch_registers(self) -> int:
        """Registers of each thread at launch."""
        return 65536 // (128 * self.threads) // 8 * 8

    def action(self, registers: int) -> Literal["increase", "decrease"]:
        """What `set_max_registers` has to be told for a role with this many."""
        return "increase" if registers >= self.launch_registers else "decrease"


_NARROW = ForwardConfig(
    key_blocks=1, matmul_groups=1, gaters=2, block_gaters=1, stages=4, matmul_registers=120, gate_registers=184
)
_WIDE = ForwardConfig(
    key_blocks=2, matmul_groups=2, gaters=1, block_gaters=1, stages=2, matmul_registers=144, gate_registers=200
)
_WIDE_FEW = ForwardConfig(
    key_blocks=2, matmul_groups=1, gaters=2, block_gaters=2, stages=2, matmul_registers=152, gate_registers=168
)
# Blocks below which a block should do less, so that more of the GPU's 132 multiprocessors have one.
_FULL = 120


def choose_forward(key_size: int, value_size: int, heads: int, dtype: jnp.dtype) -> ForwardConfig:
    """The tuning for [key_size, value_size] states of `heads` sequences (batch x query heads)."""
    parts = -(-value_size // (2 * WIDTH))
    wide = _WIDE if heads * parts >= _FULL and value_size > WIDTH else _WIDE_FEW
    config = _NARROW if key_size <= WIDTH else wide
    # float16 ends at 65504: exp(mild / 2) times a key has to stay below.
    return config if dtype == jnp.bfloat16 else dataclasses.replace(config, mild=8.0)
