"""Reading and writing safetensors files, without a framework and without anything that could run code.

A file is 8 bytes, the length n of a header (little-endian); n bytes of JSON, {name: {"dtype", "shape",
"data_offsets"}}; and the arrays' bytes, which the offsets cut up without gaps. Nothing is read but the header until an
array is asked for; then it comes from a memory map.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

__all__ = ["CheckpointError", "Tensor", "brief", "open_checkpoint", "read_json", "save_checkpoint", "write"]

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which file and why."""


class Tensor(NamedTuple):
    """An array in a file, not yet read: `read` maps it into memory."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """The array, read-only, backed by the file."""
        if 0 in self.shape:
            return np.zeros(self.shape, self.dtype)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)


def open_checkpoint(folder: Path) -> dict[str, Tensor]:
    """The arrays of a folder's model.safetensors, or of the shards that its index names, or of one file.

    Raises:
      CheckpointError: there is no such file, or one is not what it says.
    """
    if folder.is_file():
        return _read_header(folder)
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX}: weight_map must map names to files")
        found: dict[str, Tensor] = {}
        for name in sorted(set(weight_map.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise CheckpointError(f"{folder / INDEX}: names the shard {name!r}, which is not in its folder")
            found |= _read_header(folder / name)
        if missing := sorted(weight_map.keys() - found.keys()):
            raise CheckpointError(f"{folder / INDEX}: no shard holds {brief(missing)}")
        return found
    if (folder / SINGLE).is_file():
        return _read_header(folder / SINGLE)
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
        return
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; a CheckpointError if it holds none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return fields


def _read_header(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, LARGEST_HEADER):
            raise CheckpointError(f"{path}: is no safetensors file (header of {length} bytes, file of {size})")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: is no safetensors file ({error})") from None
    found = {}
    for name, entry in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        found[name] = _entry(path, name, entry, 8 + length, size)
    return found


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    """The array that a header's entry describes, in a file of `size` bytes whose arrays start at `data`."""
    try:
        begin, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), np.dtype(DTYPES[entry["dtype"]])
        counts = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
        if counts and end - begin == math.prod(shape) * dtype.itemsize and data + end <= size:
            return Tensor(path, data + begin, dtype, shape)
    except (KeyError, TypeError, ValueError):
        pass
    raise CheckpointError(f"{path}: the header's entry of {name!r} is not one of safetensors: {entry!r}"[:300])


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to one file, which appears when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, array in arrays.items():
        end = begin + array.nbytes
        entry = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        header[name], begin = entry, end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    fresh = path.with_suffix(".tmp")
    with fresh.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).tobytes())
    fresh.replace(path)


def brief(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
