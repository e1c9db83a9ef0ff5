"""Files cut, forged and foreign, and in shards; what is written against what is read."""

import json

import ml_dtypes
import numpy as np
import pytest

from gla_jax.files import CheckpointError, open_checkpoint, save_checkpoint, write


def arrays():
    rng = np.random.default_rng(0)
    return {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b.c": rng.normal(size=(7,)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=(2, 2)).astype(np.float16),
        "none": np.zeros((0, 4), np.float32),
        "one": np.array(3, np.int64),
        "yes": np.array([True, False, True]),
    }


@pytest.mark.parametrize("shard_bytes", [1, 40, 10**6])
def test_what_is_written_is_read(tmp_path, shard_bytes):
    save_checkpoint(tmp_path, arrays(), shard_bytes)
    found = open_checkpoint(tmp_path)
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name].read(), array)
    assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 10**6)


def test_any_memory_order_is_written_as_it_reads(tmp_path):
    path, turned = tmp_path / "x.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(path, {"turned": turned, "strided": np.arange(8)[::2], "number": np.array(3.0)})
    found = open_checkpoint(path)
    np.testing.assert_array_equal(found["turned"].read(), turned)
    np.testing.assert_array_equal(found["turned"]._replace(rows=slice(1, 3)).read(), turned[1:3])
    np.testing.assert_array_equal(found["strided"].read(), [0, 2, 4, 6])
    assert found["number"].shape == ()


def forged(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        ["F32"],
        None,
    ],
    ids=str,
)
def test_an_entry_that_does_not_add_up_is_refused(tmp_path, entry):
    path = forged(tmp_path / "x.safetensors", {"w": entry}, bytes(8))
    with pytest.raises(CheckpointError, match=r"x.safetensors: is no safetensors file \(.*\)$"):
        open_checkpoint(path)


def test_dtypes_that_numpy_lacks_are_refused(tmp_path):
    path = forged(
        tmp_path / "x.safetensors", {"w": {"dtype": "F8_E5M2", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)
    )
    with pytest.raises(CheckpointError, match=r"w is F8_E5M2, which is not one of F64, F32"):
        open_checkpoint(path)


def test_what_is_no_file_of_the_kind_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((10**15).to_bytes(8, "little"))  # a header that would fill the memory
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        open_checkpoint(path)
    path.write_bytes(b"PK\3")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        open_checkpoint(forged(path, b"\xff\xfe"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="and pickles are not read"):
        open_checkpoint(tmp_path)


def test_an_index_names_only_what_is_beside_it(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for weight_map, says in (
        ({"a": "../x.safetensors"}, "names the shard '../x.safetensors', which is not in its folder"),
        ({"a": "gone.safetensors"}, "names the shard 'gone.safetensors'"),
        (["a"], "weight_map must map names to files"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(tmp_path)
    write(tmp_path / "s.safetensors", {"a": np.zeros(1, np.float32)})
    index.write_text(json.dumps({"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"no shard holds b$"):
        open_checkpoint(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_checkpoint(tmp_path)


def test_an_array_is_of_the_shard_that_the_index_names(tmp_path):
    for i, name in enumerate("st"):
        write(tmp_path / f"{name}.safetensors", {"a": np.full(1, i, np.float32), name: np.zeros(1, np.float32)})
    weight_map = {"a": "s.safetensors", "s": "s.safetensors", "t": "t.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_checkpoint(tmp_path)["a"].read() == 0


def test_a_checkpoint_takes_the_place_of_an_older_one(tmp_path):
    for value, shard_bytes in ((1, 4), (2, 100), (3, 4)):
        arrays = {name: np.full(1, value, np.float32) for name in "ab"}
        save_checkpoint(tmp_path, arrays, shard_bytes)
        assert open_checkpoint(tmp_path)["a"].read() == value
        assert (tmp_path / "model.safetensors").exists() == (shard_bytes == 100)


def test_what_cannot_be_written_is_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"x.safetensors: cannot be written"):
        write(tmp_path / "gone" / "x.safetensors", {"a": np.zeros(1, np.float32)})
