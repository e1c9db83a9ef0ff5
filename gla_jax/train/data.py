"""From a stream of bytes to batches of windows, through grain."""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Float32, UInt8

from gla_jax.train.config import InputError

__all__ = ["Tokens", "evaluation_batches", "training_batches"]

Tokens = UInt8[np.ndarray, "b t_and_1"]
Weights = Float32[np.ndarray, "b t"]


class _Cut:
    """Cuts window number i, moved by a random offset, so that each epoch cuts the text in other places."""

    def __init__(self, stream: np.ndarray, length: int):
        self._stream, self._length = stream, length

    def __call__(self, index: int, rng: np.random.Generator) -> np.ndarray:
        offset = int(rng.integers(self._length))
        start = min(index * self._length + offset, len(self._stream) - self._length - 1)
        return self._stream[start : start + self._length + 1]


def training_batches(stream: np.ndarray, *, batch: int, length: int, seed: int) -> grain.DatasetIterator:
    """Endless batches [batch, length + 1] of windows of the stream, each epoch in another order and cut elsewhere.

    The iterator's `get_state` is its exact position. What it gives depends on the arguments only.

    Raises:
      InputError: if the stream is shorter than one window.
    """
    if len(stream) < length + 1:
        raise InputError(
            f"argument --length: must be at most {len(stream) - 1}, the training text's bytes, got {length}"
        )
    dataset = (
        grain.MapDataset.range((len(stream) - 1) // length)
        .seed(seed)
        .shuffle()
        .repeat()
        .random_map(_Cut(stream, length))
        .batch(batch, drop_remainder=True)
    )
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def evaluation_batches(stream: np.ndarray, *, batch: int, length: int) -> Iterator[tuple[Tokens, Weights]]:
    """The whole stream as consecutive windows: tokens [batch, length + 1] and a weight [batch, length] a target.

    Every byte of the stream but the first is the target of exactly one window. What fills up the last window and the
    last batch has weight 0.
    """
    targets = len(stream) - 1
    rows = -(-targets // length)
    rows += -rows % batch
    padded = np.pad(stream, (0, rows * length + 1 - len(stream)))
    weights = (np.arange(rows * length) < targets).astype(np.float32).reshape(rows, length)
    starts = np.arange(rows) * length
    for first in range(0, rows, batch):
        tokens = padded[starts[first : first + batch, None] + np.arange(length + 1)]
        yield tokens, weights[first : first + batch]
