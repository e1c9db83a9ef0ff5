import numpy as np
import pytest

from gla_jax.train import InputError
from gla_jax.train.data import evaluation_batches, training_batches

STREAM = (np.arange(1000) % 251).astype(np.uint8)


def take(iterator, n):
    return [next(iterator).copy() for _ in range(n)]


def test_windows_are_pieces_of_the_stream_and_differ_between_epochs():
    batches = take(training_batches(STREAM, batch=4, length=10, seed=3), 100)
    windows = np.concatenate(batches)
    assert windows.shape == (400, 11)
    assert windows.dtype == np.uint8
    np.testing.assert_array_equal(np.diff(windows.astype(int)) % 251, 1)
    first, second = windows[:99], windows[100:199]
    assert len({bytes(w) for w in first} & {bytes(w) for w in second}) < 50
    # An epoch takes each piece of the stream about once.
    assert len(np.unique(first)) > 200


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    a, b, c = (take(training_batches(STREAM, batch=4, length=10, seed=s), 5) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("taken", [0, 1, 24, 25, 60])
def test_the_state_is_the_exact_position(taken):
    iterator = training_batches(STREAM, batch=4, length=10, seed=1)
    take(iterator, taken)
    state, following = iterator.get_state(), take(iterator, 5)
    other = training_batches(STREAM, batch=4, length=10, seed=1)
    other.set_state(state)
    np.testing.assert_array_equal(take(other, 5), following)


def test_a_text_of_one_window_trains_and_a_shorter_one_is_refused():
    (batch,) = take(training_batches(STREAM[:11], batch=2, length=10, seed=0), 1)
    np.testing.assert_array_equal(batch, [STREAM[:11]] * 2)
    with pytest.raises(InputError, match="argument --length: must be at most 9, the training text's bytes, got 10"):
        training_batches(STREAM[:10], batch=2, length=10, seed=0)


@pytest.mark.parametrize("size", [2, 11, 12, 61, 1000])
def test_evaluation_counts_every_byte_but_the_first_once(size):
    seen = []
    for tokens, weights in evaluation_batches(STREAM[:size], batch=3, length=10):
        assert tokens.shape == (3, 11)
        assert weights.shape == (3, 10)
        seen.append(tokens[:, 1:][weights > 0])
    np.testing.assert_array_equal(np.concatenate(seen), STREAM[1:size])
