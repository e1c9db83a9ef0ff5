"""Tuning of the forward kernel: how many warpgroups take each role, and how deep each ring of tiles is."""

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
      qk_slots, g_slots: tiles of 64 tokens and 64 channels of q and k, and of g, in shared memory.
      v_slots, score_slots: chunks of v, and of scores for each gater of a chunk, in shared memory.
      matmul_registers, gate_registers, load_registers: a thread's, in each role.
      copies: a matmul warpgroup's tiles for copies of the state and for o: 2 in turns, or 3 with one for o alone.
      mild: largest decay of a chunk, in nats, for the centred form.
      auto_barriers: whether the compiler puts a barrier around each access of shared memory, besides the kernel's own.
    """

    key_blocks: int
    matmul_groups: int
    gaters: int
    block_gaters: int
    qk_slots: int
    g_slots: int
    v_slots: int
    score_slots: int
    matmul_registers: int
    gate_registers: int
    load_registers: int = 24
    mild: float = 96.0
    copies: int = 2
    auto_barriers: bool = False

    def __post_init__(self):
        if self.key_blocks % self.block_gaters or self.gaters % self.block_gaters:
            raise ValueError(f"block_gaters={self.block_gaters} must divide key_blocks and gaters")
        if self.gaters > 1:
            # A barrier's waiter has to see each of its completions: a slot belongs to one gater.
            for name, unit in (("qk_slots", self.key_blocks), ("g_slots", self.key_blocks), ("score_slots", 1)):
                if getattr(self, name) % (unit * self.turns):
                    raise ValueError(f"{name}={getattr(self, name)} must be a multiple of {unit * self.turns}")
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


_NARROW = ForwardConfig(1, 1, 2, 1, 4, 4, 4, 2, matmul_registers=120, gate_registers=184)
_WIDE = ForwardConfig(2, 2, 1, 1, 4, 4, 2, 2, matmul_registers=144, gate_registers=200)
_WIDE_FEW = ForwardConfig(2, 1, 2, 2, 4, 4, 3, 2, matmul_registers=152, gate_registers=168)
_WIDEST = ForwardConfig(4, 2, 1, 1, 4, 4, 2, 2, matmul_registers=192, gate_registers=104, copies=3)
# Blocks below which a block should do less, so that more of the GPU's 132 multiprocessors have one.
_FULL = 120


def choose_forward(
    key_size: int, value_size: int, heads: int, dtype: jnp.dtype, wide_gate: bool = False
) -> ForwardConfig:
    """The tuning for [key_size, value_size] states of `heads` sequences (batch x query heads).

    wide_gate: whether the gates are float32, and a tile of them takes two.
    """
    parts = -(-value_size // (2 * WIDTH))
    if key_size <= WIDTH:
        config = _NARROW
    elif key_size > 2 * WIDTH:
        config = _WIDEST
    else:
        config = _WIDE if heads * parts >= _FULL and value_size > WIDTH else _WIDE_FEW
    if wide_gate:
        config = dataclasses.replace(config, g_slots=2)
    # float16 ends at 65504: exp(mild / 2) times a key has to stay below.
    return config if dtype == jnp.bfloat16 else dataclasses.replace(config, mild=8.0)
