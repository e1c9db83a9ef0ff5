"""From streams of tokens to batches, through grain.

Windows are cut out of a stream wherever they fall, and a model learns from its separators where a document ends. Packed
rows hold whole documents, or pieces of those that are longer than a row, and nothing of one is seen by another.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Integer

from gla_jax.train.config import InputError


class Batch(NamedTuple):
    """Rows of tokens [b, t] and of those to predict after each; segment_ids and weights [b, t], or None for ones."""

    inputs: Any
    targets: Any
    segment_ids: Any = None
    weights: Any = None


class Source(NamedTuple):
    """A stream of tokens to train on, and how much of the data it should be against other sources."""

    stream: Integer[np.ndarray, "tokens"]
    weight: float = 1.0


class _Cut:
    """Cuts window number i, moved by a random offset, so that each epoch cuts the text in other places."""

    def __init__(self, stream: np.ndarray, length: int):
        self._stream, self._length = stream, length

    def __call__(self, index: int, rng: np.random.Generator) -> np.ndarray:
        offset = int(rng.integers(self._length))
        start = min(index * self._length + offset, len(self._stream) - self._length - 1)
        return self._stream[start : start + self._length + 1]


class _Pieces:
    """The documents between separators, cut into pieces of at most `length` targets; each target is in one of them."""

    def __init__(self, stream: np.ndarray, length: int, separator: int):
        ends = np.flatnonzero(stream == separator)
        sizes = np.diff(ends)
        count = -(-sizes // length)
        within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        self._starts = np.repeat(ends[:-1], count) + within * length
        self._ends = np.minimum(self._starts + length, np.repeat(ends[1:], count))
        self._stream = stream

    def __len__(self) -> int:
        return len(self._starts)

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        tokens = self._stream[self._starts[index] : self._ends[index] + 1]
        return {"inputs": tokens[:-1], "targets": tokens[1:]}


def training_batches(
    sources: Sequence[Source],
    *,
    batch: int,
    length: int,
    seed: int,
    separator: int | None = None,
    process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """Endless batches of windows of the sources, each epoch in another order and cut elsewhere, or of packed documents.

    The iterator's `get_state` is its exact position, and what it gives depends on the arguments only. Batch i of
    windows has the same rows for any number of processes, and its position is the number of batches taken.

    Args:
      sources: what to draw from, in proportion to the weights.
      batch: rows of all processes together.
      length: tokens of a row.
      seed: of the order.
      separator: the token between documents, to pack these whole; None for windows.
      process: this process's number, and how many there are.

    Raises:
      InputError: if a source is shorter than one window, or holds no document.
    """
    number, processes = process
    rows = batch // processes
    each: list[grain.MapDataset] = []
    for i, source in enumerate(sources):
        if separator is not None:
            pieces = _Pieces(source.stream, length, separator)
            if not len(pieces):
                raise InputError("argument --pack: the training text must have documents, got none")
            each.append(grain.MapDataset.range(len(pieces)).seed(seed + i).shuffle().repeat().map(pieces))
            continue
        if len(source.stream) < length + 1:
            most = len(source.stream) - 1
            raise InputError(f"argument --length: must be at most {most}, the training text's tokens, got {length}")
        windows = grain.MapDataset.range((len(source.stream) - 1) // length).seed(seed + i).shuffle().repeat()
        each.append(windows.random_map(_Cut(source.stream, length)))
    dataset = each[0] if len(each) == 1 else grain.MapDataset.mix(each, [source.weight for source in sources])
    if processes > 1:
        dataset = dataset[number::processes]
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
    if separator is None:
        return iter(dataset.batch(rows, drop_remainder=True).map(_split).to_iter_dataset(options))
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset.to_iter_dataset(options),
        length_struct={"inputs": length, "targets": length},
        num_packing_bins=rows,
        seed=seed,
    )
    return iter(packed.batch(rows, drop_remainder=True).map(_packed))


def _split(tokens: np.ndarray) -> Batch:
    return Batch(tokens[:, :-1], tokens[:, 1:])


def _packed(rows: dict[str, np.ndarray]) -> Batch:
    ids = rows["inputs_segment_ids"].astype(np.int32) - 1  # grain counts from 1, and padding is 0
    return Batch(rows["inputs"], rows["targets"], ids, (ids >= 0).astype(np.float32))


def evaluation_batches(
    stream: Integer[np.ndarray, "tokens"], *, batch: int, length: int, process: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The whole stream as consecutive windows, with a weight [b, t] a target, float32.

    Every token of the stream but the first is the target of exactly one window. What fills up the last window and the
    last batch has weight 0. Of each batch, a process gets its own rows.
    """
    targets = len(stream) - 1
    rows = -(-targets // length)
    rows += -rows % batch
    number, processes = process
    own = np.arange(batch)[number * batch // processes : (number + 1) * batch // processes]
    for first in range(0, rows, batch):
        positions = (first + own)[:, None] * length + np.arange(length + 1)
        tokens = stream[np.minimum(positions, targets)]
        weights: Float32[np.ndarray, "b t"] = (positions[:, 1:] <= targets).astype(np.float32)
        yield Batch(tokens[:, :-1], tokens[:, 1:], None, weights)
