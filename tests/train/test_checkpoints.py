import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.train import InputError
from gla_jax.train.checkpoints import Checkpoints, fingerprint
from gla_jax.train.data import Source, training_batches
from gla_jax.train.step import TrainState

STREAM = np.arange(200, dtype=np.uint8)


def state_at(step):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    values = {"a": jnp.arange(6.0).reshape(2, 3) + step, "b": {"c": jnp.full((300, 70), step, jnp.bfloat16)}}
    state = TrainState(jnp.int32(step), values, (jnp.ones(3, jnp.int32) * step, {"m": jnp.arange(4.0)}))
    return jax.device_put(state, device)


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))


def data():
    return training_batches([Source(STREAM)], batch=2, length=9, seed=0)


def save_steps(folder, steps, keep=2):
    iterator, following = data(), {}
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step in range(1, max(steps) + 1):
            batch = next(iterator)
            following[step - 1] = batch
            if step in steps:
                checkpoints.save(state_at(step), iterator)
    following[step] = next(iterator)
    return following


def test_what_is_saved_comes_back_with_the_datas_position(tmp_path):
    following = save_steps(tmp_path, [2, 5])
    iterator = data()
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(), iterator)
        jax.tree.map(np.testing.assert_array_equal, restored, state_at(5))
        assert restored is not None
        assert restored.params["b"]["c"].dtype == jnp.bfloat16
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(abstract()), state_at(5).params)
    np.testing.assert_array_equal(next(iterator).targets, following[5].targets)


def test_only_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_nothing_saved(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(), data()) is None
        with pytest.raises(InputError, match=r"argument RUN: .*run has no checkpoint yet; train it first"):
            checkpoints.restore_params(abstract())


def damage(folder):
    """Change some bytes in the middle of each of a checkpoint's data files."""
    for path in (folder / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            content = bytearray(path.read_bytes())
            middle = len(content) // 2
            content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
            path.write_bytes(content)


@pytest.fixture
def collected():
    yield
    gc.collect()


def unread(test):
    """What orbax had begun to read when it met the damage is collected by the test itself, not in the next one."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignored(pytest.mark.usefixtures("collected")(test))


@unread
@pytest.mark.parametrize("how", ["changed", "cut short", "gone"])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_taken(tmp_path, how):
    following = save_steps(tmp_path, [2, 5])
    files = [path for path in (tmp_path / "5" / "params").rglob("*") if path.is_file() and path.parent.name == "d"]
    assert files
    if how == "changed":
        damage(tmp_path / "5")
    for path in files:
        if how == "cut short":
            path.write_bytes(path.read_bytes()[:10])
        elif how == "gone":
            path.unlink()
    told, iterator = [], data()
    with Checkpoints(tmp_path, note=told.append) as checkpoints:
        restored = checkpoints.restore(abstract(), iterator)
        jax.tree.map(np.testing.assert_array_equal, restored, state_at(2))
        np.testing.assert_array_equal(next(iterator).targets, following[2].targets)
        (line,) = told
        assert line.startswith(f"checkpoint {tmp_path / '5'} is damaged, trying the one before (")
        # The damaged one is replaced when its step comes again.
        checkpoints.save(dataclasses.replace(state_at(5)), iterator)
        checkpoints.wait()
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract(), data()), state_at(5))
    assert len(told) == 1


@unread
def test_every_checkpoint_damaged(tmp_path):
    save_steps(tmp_path, [2, 5])
    for name in ("2", "5"):
        damage(tmp_path / name)
    with (
        Checkpoints(tmp_path, note=lambda _: None) as checkpoints,
        pytest.raises(
            InputError, match=r"argument --run: every checkpoint in .* is damaged; give a new folder to start over"
        ),
    ):
        checkpoints.restore(abstract(), data())


def test_a_save_that_never_finished_is_cleared_away(tmp_path):
    save_steps(tmp_path, [2])
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(), data())
    assert restored is not None
    assert int(restored.step) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]


def test_a_fingerprint_depends_on_every_element_and_its_place():
    tree = {"a": jnp.arange(10.0), "b": jnp.arange(10), "c": jnp.ones(3, bool), "d": jnp.ones((2, 2), jnp.bfloat16)}
    prints = {int(fingerprint(tree))}
    for name, leaf in tree.items():
        for i in range(leaf.size):
            changed = leaf.reshape(-1).at[i].set(leaf.reshape(-1)[i] == 0).reshape(leaf.shape)
            prints.add(int(fingerprint({**tree, name: changed})))
    assert len(prints) == 1 + sum(leaf.size for leaf in tree.values())
    assert int(fingerprint({**tree, "a": tree["a"][::-1]})) not in prints
    assert int(fingerprint(tree)) in prints


@unread
@pytest.mark.parametrize("seed", range(10))
def test_any_damaged_file_is_told_of_or_makes_no_difference(tmp_path, seed):
    """A file of the newest checkpoint changed, cut short, emptied or gone: what comes back is whole, old or new."""
    save_steps(tmp_path, [2, 5])
    chance = np.random.default_rng(seed)
    files = sorted(path for path in (tmp_path / "5").rglob("*") if path.is_file() and path.stat().st_size)
    path = files[chance.integers(len(files))]
    content = bytearray(path.read_bytes())
    how = seed % 4
    if how == 0:
        content[chance.integers(len(content))] ^= 0xFF
    elif how == 1:
        content = content[: len(content) // 2]
    elif how == 2:
        content = bytearray()
    if how == 3:
        path.unlink()
    else:
        path.write_bytes(content)
    told, iterator = [], data()
    with Checkpoints(tmp_path, note=told.append) as checkpoints:
        restored = checkpoints.restore(abstract(), iterator)
    assert restored is not None
    step = int(restored.step)
    assert step in (2, 5)
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(step))
    reference = data()
    for _ in range(step):
        next(reference)
    np.testing.assert_array_equal(next(iterator).targets, next(reference).targets)
    assert len(told) == (0 if step == 5 else 1)


def test_another_mesh_and_other_processes(tmp_path, monkeypatch):
    save_steps(tmp_path, [5])
    mesh = jax.make_mesh((2, 3), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:6])
    places = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P()), abstract())
    places.params["a"] = jax.NamedSharding(mesh, jax.P("x", "y"))
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract(), places)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(wanted, data())
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(5))
    assert restored is not None
    assert restored.params["a"].sharding == places.params["a"]

    # As if two processes had saved it.
    told, iterator = [], data()
    with Checkpoints(tmp_path, note=told.append) as checkpoints:
        checkpoints._restore_position(5, iterator, 2)
        np.testing.assert_array_equal(next(iterator).targets, next_after(5).targets)
        separated = np.append(STREAM, 0)[::-1].copy()
        packed = training_batches([Source(separated)], batch=2, length=9, seed=0, separator=0)
        checkpoints._restore_position(5, packed, 2)
    assert told == [
        "step 5 was saved by 2 processes, and there are 1: the batches that follow are the same",
        "step 5 was saved by 2 processes, and there are 1: packed documents begin again, in the order of a new run; "
        "all else is kept",
    ]


def next_after(step):
    iterator = data()
    for _ in range(step):
        next(iterator)
    return next(iterator)
