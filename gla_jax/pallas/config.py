"""Tuning of the forward kernel: how many warpgroups take each role, and how deep each ring of tiles is."""

import abc
import dataclasses
from typing import Literal

import jax.numpy as jnp

# Channels of a tile, of q and k and of v.
WIDTH = 64


class Roles(abc.ABC):
    """A tuning whose warpgroups, `threads` in number, divide a block's registers between roles."""

    @property
    @abc.abstractmethod
    def threads(self) -> int:
        """Warpgroups in a block."""

    @property
    def launch_registers(self) -> int:
        """Registers of each thread at launch."""
        return min(248, 65536 // (128 * self.threads) // 8 * 8)

    def action(self, registers: int) -> Literal["increase", "decrease"]:
        """What `set_max_registers` has to be told for a role with this many."""
        return "increase" if registers >= self.launch_registers else "decrease"


@dataclasses.dataclass(frozen=True)
class ForwardConfig(Roles):
    """One tuning of the forward kernel, checked when built.

    Attributes:
      key_blocks: k / 64.
      matmul_groups: warpgroups that carry states, 64 columns of v each.
      gaters: warpgroups that gate.
      block_gaters: how many of them share the key blocks of one chunk; more of them take turns at the chunks.
      qk_slots, g_slots: tiles of 64 tokens and 64 channels of q and k, and of g, in shared memory.
      v_slots, score_slots: chunks of v, and of scores for each gater of a chunk, in shared memory.
      matmul_registers, gate_registers, load_registers: a thread's, in each role.
      mild: largest decay of a chunk, in nats, for the centred form.
      splits: parts of the sequence that go at the same time, where there are few heads; the states between them are
        computed first.
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
    splits: int = 1

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


@dataclasses.dataclass(frozen=True)
class ScanConfig:
    """One tuning of the second pass.

    Attributes:
      key_blocks: k / 64.
      matmul_groups: warpgroups that carry states, 64 columns of v each.
      shares: tiles that sum up to a chunk's A.
      slots: chunks in shared memory.
      splits: parts of the sequence that go at the same time, where there are few heads; the states between them are
        computed first.
      matmul_registers, load_registers: a thread's, in each role.
    """

    key_blocks: int
    matmul_groups: int
    shares: int
    slots: int
    splits: int
    matmul_registers: int = 232
    load_registers: int = 40

    @property
    def value_width(self) -> int:
        """Columns of v in a block."""
        return self.matmul_groups * WIDTH

    @property
    def threads(self) -> int:
        """Warpgroups in a block."""
        return self.matmul_groups + 1


# A chunk's channels, gated ahead of the recurrence (gate_kernel.py), by k / 64.
_GATE = {
    1: ForwardConfig(1, 0, 2, 1, 6, 4, 0, 2, matmul_registers=0, gate_registers=208, load_registers=40),
    2: ForwardConfig(2, 0, 2, 2, 6, 4, 0, 2, matmul_registers=0, gate_registers=208, load_registers=40),
    4: ForwardConfig(4, 0, 2, 2, 8, 4, 0, 1, matmul_registers=0, gate_registers=208, load_registers=40),
}
_NARROW = ForwardConfig(1, 1, 2, 1, 4, 4, 4, 2, matmul_registers=120, gate_registers=184)
_WIDE = ForwardConfig(2, 2, 1, 1, 4, 4, 3, 2, matmul_registers=136, gate_registers=216)
# The GPU's multiprocessors; blocks that fill it; and most of it; blocks that leave most of it idle.
_BLOCKS, _FULL, _MOST, _FEW = 132, 120, 100, 33


def choose_forward(
    key_size: int,
    value_size: int,
    heads: int,
    chunks: int,
    dtype: jnp.dtype,
    *,
    wide_gate: bool = False,
    two_passes: bool = False,
    one_pass: bool = False,
    may_split: bool = False,
) -> ForwardConfig | tuple[ForwardConfig, ScanConfig]:
    """The tuning for [key_size, value_size] states of `heads` sequences (batch x query heads): of one pass, or of two.

    chunks: of 64 tokens, of one sequence.
    wide_gate: whether the gates are float32, and a tile of them takes two.
    two_passes: whether one pass will not do; one_pass: whether two will not, for k up to 128.
    may_split: whether one pass may cut sequences in parts (forward.py says when it can).
    """
    blocks = 1 if key_size <= WIDTH else 2 if key_size <= 2 * WIDTH else 4
    pairs = heads * -(-value_size // (2 * WIDTH))
    many = value_size > WIDTH and pairs >= _FULL
    single = heads * -(-value_size // WIDTH) if blocks == 1 else pairs
    splits = _splits(single, chunks) if may_split and (blocks == 1 or WIDTH < value_size <= 2 * WIDTH) else 1
    fills = single * splits >= _MOST
    if two_passes or blocks == 4:
        one_pass = False
    elif blocks == 1:
        one_pass |= fills or single >= _FEW
    else:
        one_pass |= many or (splits > 1 and fills)
    gate = (_NARROW if blocks == 1 else _WIDE) if one_pass else _GATE[blocks]
    if one_pass and splits > 1:
        gate = dataclasses.replace(gate, splits=splits)
    if wide_gate:
        # Twice the memory a tile: half as many, but all tiles of a chunk when gaters share it.
        halved = {"qk_slots": gate.qk_slots // 2} if blocks == 4 else {"g_slots": gate.g_slots // 2}
        gate = dataclasses.replace(gate, **halved)
    # float16 ends at 65504: exp(mild / 2) times a key has to stay below.
    gate = gate if dtype == jnp.bfloat16 else dataclasses.replace(gate, mild=8.0)
    if one_pass:
        return gate
    groups = 2 if value_size > WIDTH and (many or (blocks == 4 and pairs < _FEW)) else 1
    scans = heads * -(-value_size // (groups * WIDTH))
    # A split costs the states between the parts: half as much again.
    splits = max(1, min(_BLOCKS // scans, chunks // 8)) if scans <= _FEW else 1
    return gate, ScanConfig(blocks, groups, gate.block_gaters, 2 if blocks == 4 else 3, splits)


def _splits(blocks: int, chunks: int) -> int:
    """The most equal parts of 8 chunks or more that `blocks` blocks a part leave multiprocessors for."""
    most = max(1, min(_BLOCKS // blocks, chunks // 8))
    return next(n for n in range(most, 0, -1) if chunks % n == 0)
