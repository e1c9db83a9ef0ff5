"""Checkpoint folders: safetensors files, whole or in shards with an index, and JSON beside them; never pickles."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file and why."""


class Tensor(NamedTuple):
    """An array in an open file, not yet read; of `rows`, if given, those alone."""

    file: Any
    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: slice | None = None

    def read(self) -> np.ndarray:
        """The array."""
        return self.file.get_tensor(self.name) if self.rows is None else self.file.get_slice(self.name)[self.rows]


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The arrays of a folder's model.safetensors, or of the shards that its index names, or of one file.

    Raises:
      CheckpointError: there is no such file, or one is not what it says.
    """
    if folder.is_file():
        return _open(folder)
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map must map names to files")
        found: dict[str, Tensor] = {}
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{folder / INDEX}: names the shard {name!r}, which is not in its folder")
            found |= {key: x for key, x in _open(folder / name).items() if weight_map.get(key, name) == name}
        if missing := sorted(weight_map.keys() - found.keys()):
            raise CheckpointError(f"{folder / INDEX}: no shard holds {brief(missing)}")
        return found
    if (folder / SINGLE).is_file():
        return _open(folder / SINGLE)
    raise CheckpointError(f"{folder}: has neither {SINGLE} nor {INDEX}, and pickles are not read")


def save_checkpoint(folder: Path, arrays: Mapping[str, np.ndarray], shard_bytes: int = 5_000_000_000) -> None:
    """Write arrays as model.safetensors, or as shards of at most `shard_bytes` (or one array) and their index."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, array in arrays.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    if len(shards) == 1:
        write(folder / SINGLE, shards[0])
        (folder / INDEX).unlink(missing_ok=True)  # of an older checkpoint: it would be read first
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / SINGLE).unlink(missing_ok=True)


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to one file, which appears when it is whole."""
    fresh = path.with_suffix(".tmp")
    # What safetensors writes is the memory that an array begins in: of a transposed one, the wrong order.
    try:
        save_file({name: np.asarray(x, order="C") for name, x in arrays.items()}, fresh, metadata={"format": "pt"})
    except SafetensorError as error:  # no such folder, or no room
        raise OSError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]})") from None
    fresh.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a CheckpointError if it holds none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return fields


def brief(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _open(path: Path) -> dict[str, Tensor]:
    try:
        file = safe_open(path, "np")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is no safetensors file ({' '.join(str(error).split())[:200]})") from None
    found = {}
    for name in file.keys():  # noqa: SIM118  it is no mapping
        header = file.get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise CheckpointError(f"{path}: {name} is {header.get_dtype()}, which is not one of {', '.join(DTYPES)}")
        found[name] = Tensor(file, name, DTYPES[header.get_dtype()], tuple(header.get_shape()))
    return found
