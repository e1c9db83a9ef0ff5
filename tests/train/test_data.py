import numpy as np
import pytest

from gla_jax.train import InputError
from gla_jax.train.data import Source, evaluation_batches, training_batches

STREAM = (np.arange(1000) % 251).astype(np.uint8)
# Twenty documents of 1 to 30 tokens between separators (255); no two documents share a token but for the long ones.
DOCUMENTS = [np.random.default_rng(i).integers(0, 250, n).astype(np.uint8) for i, n in enumerate([*range(1, 20), 30])]
SEPARATED = np.concatenate([[255], *(np.append(d, 255) for d in DOCUMENTS)]).astype(np.uint8)


def batches(stream=STREAM, *, seed=1, batch=4, length=10, **options):
    return training_batches([Source(stream)], batch=batch, length=length, seed=seed, **options)


def take(iterator, n):
    """Windows [b, t + 1]."""
    taken = [next(iterator) for _ in range(n)]
    for batch in taken:
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    return [np.concatenate([batch.inputs, batch.targets[:, -1:]], 1) for batch in taken]


def test_windows_are_pieces_of_the_stream_and_differ_between_epochs():
    windows = np.concatenate(take(batches(seed=3), 100))
    assert windows.shape == (400, 11)
    assert windows.dtype == np.uint8
    np.testing.assert_array_equal(np.diff(windows.astype(int)) % 251, 1)
    first, second = windows[:99], windows[100:199]
    assert len({bytes(w) for w in first} & {bytes(w) for w in second}) < 50
    # An epoch takes each piece of the stream about once.
    assert len(np.unique(first)) > 200


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    a, b, c = (take(batches(seed=s), 5) for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("options", [{}, {"separator": 255, "stream": SEPARATED}], ids=["windows", "packed"])
@pytest.mark.parametrize("taken", [0, 1, 24, 25, 60])
def test_the_state_is_the_exact_position(taken, options):
    iterator = batches(**options)
    for _ in range(taken):
        next(iterator)
    state, following = iterator.get_state(), [next(iterator) for _ in range(5)]
    other = batches(**options)
    other.set_state(state)
    for batch in following:
        for a, b in zip(next(other), batch, strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_text_of_one_window_trains_and_a_shorter_one_is_refused():
    (batch,) = take(batches(STREAM[:11], batch=2), 1)
    np.testing.assert_array_equal(batch, [STREAM[:11]] * 2)
    with pytest.raises(InputError, match="argument --length: must be at most 9, the training text's tokens, got 10"):
        batches(STREAM[:10], batch=2)


def test_processes_share_the_rows_of_each_batch():
    whole = batches(batch=4)
    halves = [batches(batch=4, process=(i, 2)) for i in range(2)]
    for _ in range(30):
        rows = np.concatenate([take(half, 1)[0] for half in halves])
        assert sorted(map(bytes, rows)) == sorted(map(bytes, take(whole, 1)[0]))
    # The position of a run of one process is that of each of two.
    assert halves[0].get_state() == whole.get_state()


def test_sources_are_mixed_by_weight():
    other = (np.arange(500) % 3 + 252).astype(np.uint8)
    mixed = training_batches([Source(STREAM), Source(other, 3.0)], batch=4, length=10, seed=0)
    rows = np.concatenate(take(mixed, 200))
    assert np.mean(rows[:, 0] >= 252) == pytest.approx(0.75, abs=0.01)
    assert all((row >= 252).all() or (row < 252).all() for row in rows)


def test_packing_loses_nothing_and_mixes_no_documents():
    """An epoch has each target once, in order within a row's segments; pieces of longer documents follow their text."""
    length, wanted = 12, []
    for document in DOCUMENTS:
        tokens = np.concatenate([[255], document, [255]])
        for start in range(0, len(tokens) - 1, length):
            piece = tokens[start : start + length + 1]
            wanted.append((tuple(piece[:-1]), tuple(piece[1:])))
    iterator, seen = batches(SEPARATED, batch=3, length=length, separator=255), []
    while len(seen) < 4 * len(wanted):
        batch = next(iterator)
        np.testing.assert_array_equal(batch.weights, (batch.segment_ids >= 0).astype(np.float32))
        for inputs, targets, ids in zip(*batch[:3], strict=True):
            for i in range(ids.max() + 1):
                seen.append((tuple(inputs[ids == i]), tuple(targets[ids == i])))
            assert np.all(np.diff(np.where(ids < 0, 99, ids)) >= 0)  # padding is last
    assert set(seen) == set(wanted)
    # Rows are full of whole pieces in another order than they came, so an epoch's end is not sharp.
    counts = [seen.count(piece) for piece in set(wanted)]
    assert max(counts) - min(counts) <= 2


def test_a_text_without_documents_is_not_packed():
    with pytest.raises(InputError, match=r"^argument --pack: the training text must have documents, got none$"):
        batches(STREAM, separator=254)


@pytest.mark.parametrize("size", [2, 11, 12, 61, 1000])
@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_counts_every_token_but_the_first_once(size, processes):
    seen = []
    each = [evaluation_batches(STREAM[:size], batch=3, length=10, process=(i, processes)) for i in range(processes)]
    for parts in zip(*each, strict=True):
        for batch in parts:
            assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (3 // processes, 10)
            seen.append(batch.targets[batch.weights > 0])
    np.testing.assert_array_equal(np.concatenate(seen), STREAM[1:size])
