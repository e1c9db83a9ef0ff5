"""Packed sequences: segment_ids and cu_seqlens brought to the forms that the implementations read.

A boundary is a hard reset, g = -inf at a segment's first token (for "mosaic_gpu" a mark apart from g), and padding is
a token with q = k = v = 0 and g = 0.
Only sequences that each have a state of their own (cu_seqlens with initial or final states) need more: `Entries`, and
for the chunked form a layout in which no chunk holds two sequences.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gla_jax.array_types import Array


class Blocks(NamedTuple):
    """Which of n sequences the blocks of a row belong to (a block is a token, or a chunk).

    sequence: [blocks] int32; n for a block of no sequence.
    first, last: [blocks] bool, whether a block is the first, the last of its sequence.
    """

    sequence: Array
    first: Array
    last: Array


class Entries(NamedTuple):
    """Sequences with states of their own: the states that enter [n, hk, k, v], and where."""

    initial: Array
    blocks: Blocks


def _entries(initial: Array, sequence: Array) -> Entries:
    n = initial.shape[0]
    changes = sequence[1:] != sequence[:-1]
    first, last = jnp.pad(changes, (1, 0), constant_values=True), jnp.pad(changes, (0, 1), constant_values=True)
    return Entries(initial, Blocks(sequence, first & (sequence < n), last & (sequence < n)))


def sequence_ids(cu_seqlens: Array, time: int) -> Array:
    """[1, time] int32: the sequence of each row, -1 for rows outside of all of them."""
    n = cu_seqlens.shape[0] - 1
    ids = jnp.searchsorted(cu_seqlens, jnp.arange(time, dtype=cu_seqlens.dtype), side="right").astype(jnp.int32) - 1
    return jnp.where(ids >= n, -1, ids)[None]


def segment_starts(segment_ids: Array, before: Array | None = None) -> Array:
    """[b, t] bool: tokens whose id differs from the row's last token before it that is not padding.

    `before` [b] is that token's id for a row's first tokens, negative (or None) if there is none.
    """
    if before is not None:
        return segment_starts(jnp.concatenate([before[:, None], segment_ids], 1))[:, 1:]
    time = segment_ids.shape[1]
    valid = segment_ids >= 0
    latest = jax.lax.cummax(jnp.where(valid, jnp.arange(time), -1), axis=1)
    previous = jnp.pad(latest[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous_id = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    return valid & (previous >= 0) & (previous_id != segment_ids)


def reset_and_mask(
    q: Array, k: Array, v: Array, g: Array | None, segment_ids: Array, before: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """q, k, v and g with boundaries as g = -inf and padding as zeros; g becomes [b, t, hk] if it was None.

    `before` as in `segment_starts`.
    """
    if g is None:
        g = jnp.zeros(k.shape[:3], jnp.float32)
    q, k, v, g = mask_padding(q, k, v, g, segment_ids)
    return q, k, v, jnp.where(_trailing(segment_starts(segment_ids, before), g), -jnp.inf, g)


def mask_padding(q: Array, k: Array, v: Array, g: Any, segment_ids: Array) -> tuple[Array, Array, Array, Any]:
    """q, k, v and g (or None) with padding as zeros."""
    return jax.tree.map(lambda x: jnp.where(_trailing(segment_ids >= 0, x), x, 0), (q, k, v, g))


def token_entries(cu_seqlens: Array, time: int, initial: Array) -> Entries:
    """`Entries` with a token a block."""
    sequence = sequence_ids(cu_seqlens, time)[0]
    return _entries(initial, jnp.where(sequence < 0, initial.shape[0], sequence))


class Aligned(NamedTuple):
    """A layout of `blocks * chunk` rows in which every sequence begins with a chunk of its own.

    source: [rows] int32, the token in each row; `time` where the row is empty.
    target: [time] int32, the row of each token; `rows` for tokens outside of all sequences.
    """

    source: Array
    target: Array
    entries: Entries

    def spread(self, x: Array) -> Array:
        """[1, time, ...] to [1, rows, ...], zeros in empty rows."""
        return jnp.take(x, self.source, axis=1, mode="fill", fill_value=0)

    def collect(self, x: Array) -> Array:
        """[1, rows, ...] to [1, time, ...], zeros for tokens outside of all sequences."""
        return jnp.take(x, self.target, axis=1, mode="fill", fill_value=0)


def align(cu_seqlens: Array, time: int, chunk: int, initial: Array) -> Aligned:
    """The aligned layout of n sequences: time // chunk + n chunks hold any lengths, which may be traced."""
    n = cu_seqlens.shape[0] - 1
    cu = cu_seqlens.astype(jnp.int32)
    chunks = -(-jnp.diff(cu) // chunk)
    end = jnp.cumsum(chunks)
    begin = end - chunks

    block = jnp.arange(time // chunk + n, dtype=jnp.int32)
    sequence = jnp.searchsorted(end, block, side="right").astype(jnp.int32)
    within = jnp.minimum(sequence, n - 1)
    offset = (block - begin[within])[:, None] * chunk + jnp.arange(chunk)
    token = cu[within][:, None] + offset
    source = jnp.where((sequence < n)[:, None] & (token < cu[within + 1][:, None]), token, time)

    ids = sequence_ids(cu, time)[0]
    row = begin[ids] * chunk + jnp.arange(time, dtype=jnp.int32) - cu[ids]
    target = jnp.where(ids < 0, block.size * chunk, row)
    return Aligned(source.reshape(-1), target, _entries(initial, sequence))


def _trailing(mask: Array, x: Array) -> Array:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))
