"""Loading and saving checkpoints of other libraries: safetensors and config.json, nothing that could run code."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.interop.configs import from_json, to_json
from gla_jax.interop.names import LAYOUTS, Place, places
from gla_jax.nn.config import ModelConfig
from gla_jax.nn.model import CausalLM
from gla_jax.safetensors import (
    CheckpointError,
    Tensor,
    brief,
    open_checkpoint,
    read_json,
    save_checkpoint,
)

__all__ = ["load_pretrained", "save_pretrained"]


def load_pretrained(folder: Path | str, **changes: Any) -> CausalLM:
    """The model of a checkpoint folder: config.json and model.safetensors, or its shards.

    Reads flash-linear-attention's GLA (with either layout of the MLP), RetNet, HGRN2, linear attention, RWKV-6,
    Mamba-2, Transformer and hybrids of these, the paper's first release, and transformers' Mamba, Mamba-2, Llama and
    Mistral. Every name and shape is compared with what the config asks for before any array is read; parameters are
    then read one at a time from a memory map.

    Args:
      folder: with config.json beside the arrays.
      changes: fields of our config that it does not say: param_dtype ("float32" unless given), dtype, remat,
        implementation.

    Raises:
      CheckpointError: naming the file, and the field or arrays that are missing, too much, or of another shape.
    """
    folder = Path(folder)
    config, dialect = from_json(read_json(folder / "config.json"), **changes)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    wanted = places(config, dialect, {path: param.shape for path, param in flat.items()})
    found = _match(folder, wanted, _with_split_mlp(open_checkpoint(folder)), config)
    rows: dict[tuple, list[tuple[Place, Tensor]]] = {}
    for place, tensor in zip(wanted, found, strict=True):
        rows.setdefault(place.path, []).append((place, tensor))
    loaded = []
    for path, param in flat.items():
        values = np.empty(param.shape, param.dtype)
        for place, tensor in rows[path]:
            value = LAYOUTS[place.layout].ours(tensor.read())
            values[... if place.row is None else place.row] = value if place.scale == 1 else value * place.scale
        loaded.append((path, param.replace(jnp.asarray(values))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save_pretrained(model: CausalLM, folder: Path | str, *, shard_bytes: int = 5_000_000_000) -> None:
    """Write a model as the library that has its kind writes it: config.json and safetensors, which that library loads.

    Args:
      model: of a kind that `load_pretrained` reads; arrays keep their dtype, config.param_dtype.
      folder: made if it is not there.
      shard_bytes: at most this many bytes a file.

    Raises:
      CheckpointError: no other library has such a model; the message says which option is ours alone.
    """
    fields, dialect = to_json(model.config)
    flat = {path: param.get_value() for path, param in nnx.to_flat_state(nnx.state(model))}
    arrays = {}
    for place in places(model.config, dialect, {path: value.shape for path, value in flat.items()}):
        value = flat[place.path] if place.row is None else flat[place.path][place.row]
        value = np.asarray(jax.device_get(value))
        value = value if place.scale == 1 else (value / place.scale).astype(value.dtype)
        arrays[place.names[0]] = LAYOUTS[place.layout].theirs(value)
    folder = Path(folder)
    save_checkpoint(folder, arrays, shard_bytes)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _match(folder: Path, wanted: list[Place], there: dict[str, Tensor], config: ModelConfig) -> list[Tensor]:
    """The array for each place, once all names and shapes have been found right."""
    found, missing, shapes = [], [], []
    for place in wanted:
        name = next((name for name in place.names if name in there), None)
        if name is None:
            missing.append(place.names[0])
            continue
        tensor = there.pop(name)
        if tensor.shape != place.shape:
            shapes.append(f"{name} {list(tensor.shape)}, not {list(place.shape)}")
        found.append(tensor)
    extra = [name for name in there if not name.endswith("inv_freq")]
    if config.tie_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    complaints = (("missing", missing), ("not expected", extra), ("of another shape", shapes))
    said = [f"{what}: {brief(sorted(names))}" for what, names in complaints if names]
    if said:
        raise CheckpointError(f"{folder}: its arrays do not fit its config.json; " + "; ".join(said))
    return found


def _with_split_mlp(there: dict[str, Tensor]) -> dict[str, Tensor]:
    """flash-linear-attention before February 2025 kept gate_proj and up_proj as one [2 mlp, d], the gate first."""
    split = {}
    for name, tensor in there.items():
        up = name.replace("mlp.gate_proj", "mlp.up_proj")
        if name.endswith("mlp.gate_proj.weight") and up not in there and len(tensor.shape) == 2:
            half = (tensor.shape[0] // 2, tensor.shape[1])
            offset = tensor.offset + half[0] * half[1] * tensor.dtype.itemsize
            split[name], split[up] = tensor._replace(shape=half), tensor._replace(shape=half, offset=offset)
        else:
            split[name] = tensor
    return split
