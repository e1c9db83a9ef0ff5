"""Loading and saving checkpoints of other libraries: safetensors and config.json, nothing that could run code."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.files import (
    CheckpointError,
    Tensor,
    brief,
    open_checkpoint,
    read_json,
    save_checkpoint,
)
from gla_jax.interop.configs import from_json, to_json
from gla_jax.interop.names import LAYOUTS, Place, places
from gla_jax.nn.config import DTYPES, ModelConfig
from gla_jax.nn.model import CausalLM


def load_pretrained(folder: Path | str, **changes: Any) -> CausalLM:
    """The model of a checkpoint folder: config.json and model.safetensors, or its shards.

    Reads flash-linear-attention's GLA (with either layout of the MLP), RetNet, HGRN2, linear attention, RWKV-6,
    Mamba-2, Transformer and hybrids of these, the paper's first release, and transformers' Mamba, Mamba-2, Llama and
    Mistral. Every name and shape is compared with what the config asks for before any array is read; parameters are
    then read one at a time.

    Args:
      folder: with config.json beside the arrays.
      changes: fields of our config that it does not say: param_dtype ("float32" unless given), dtype, remat,
        implementation; and cache_size, of all its softmax attention (max_position_embeddings by default).

    Raises:
      ValueError: naming a change that is none of these, or whose value is not allowed.
      CheckpointError: naming the file, and the field or arrays that are missing, too much, of another shape, no floats,
        or not finite.
    """
    folder = Path(folder)
    config, dialect = from_json(read_json(folder / "config.json"), **changes)
    try:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0))))
    except ValueError as error:  # what a layer's options and the width do not allow together
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
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
            if not np.isfinite(value).all():
                raise CheckpointError(f"{folder}: {tensor.name} has numbers that are not finite")
            values[... if place.row is None else place.row] = value if place.scale == 1 else value * place.scale
        loaded.append((path, param.replace(jnp.asarray(values))))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def save_pretrained(
    model: CausalLM,
    folder: Path | str,
    *,
    dtype: str | None = None,
    end_of_text: int | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a model as the library that has its kind writes it: config.json and safetensors, which that library loads.

    Args:
      model: of a kind that `load_pretrained` reads.
      dtype: float32, bfloat16 or float16, of the arrays; None for the parameters' own.
      folder: made if it is not there.
      end_of_text: the token that stands before and after each text, if config.json is to say so.
      shard_bytes: at most this many bytes a file.

    Raises:
      CheckpointError: no other library has such a model, naming the option that is ours alone; or no such dtype.
    """
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"dtype: must be one of {', '.join(DTYPES)} or None, got {dtype!r}")
    fields, dialect = to_json(model.config if dtype is None else model.config.replace(param_dtype=dtype))
    flat = {path: param.get_value() for path, param in nnx.to_flat_state(nnx.state(model))}
    arrays = {}
    for place in places(model.config, dialect, {path: value.shape for path, value in flat.items()}):
        value = flat[place.path] if place.row is None else flat[place.path][place.row]
        value = np.asarray(jax.device_get(value))
        value = (value if place.scale == 1 else value / place.scale).astype(fields["dtype"])
        arrays[place.names[0]] = LAYOUTS[place.layout].theirs(value)
    if end_of_text is not None:
        fields |= {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    folder = Path(folder)
    save_checkpoint(folder, arrays, shard_bytes)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def convert(source: Path | str, target: Path | str, *, dtype: str | None = None) -> None:
    """Read a checkpoint folder and write the same model in its library's current layout, tokenizer files included.

    Args:
      source: as `load_pretrained` takes it.
      target: as `save_pretrained`.
      dtype: of the arrays written; None for the one that config.json names, or else float32.

    Raises:
      CheckpointError: as those two; or target is the source.
    """
    source, fields = Path(source), read_json(Path(source) / "config.json")
    if Path(target).resolve() == source.resolve():
        raise CheckpointError(f"target: must be another folder than the source, got {target}")
    dtype = dtype or fields.get("dtype") or fields.get("torch_dtype") or "float32"
    save_pretrained(load_pretrained(source), target, dtype=dtype)
    written = read_json(Path(target) / "config.json")
    kept = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in fields}
    (Path(target) / "config.json").write_text(json.dumps(written | kept, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, Path(target) / name)


def end_of_text(folder: Path | str) -> int:
    """The token that ends a text, by a checkpoint folder's config.json.

    Raises:
      CheckpointError: it names none, or there is no such file.
    """
    token = read_json(Path(folder) / "config.json").get("eos_token_id")
    token = token[0] if isinstance(token, list) and token else token
    if not isinstance(token, int):
        raise CheckpointError(f"{folder}: config.json has no eos_token_id")
    return token


def _match(folder: Path, wanted: list[Place], there: dict[str, Tensor], config: ModelConfig) -> list[Tensor]:
    """The array for each place, once all names and shapes have been found right."""
    found, missing, shapes, dtypes = [], [], [], []
    for place in wanted:
        name = next((name for name in place.names if name in there), None)
        if name is None:
            missing.append(place.names[0])
            continue
        tensor = there.pop(name)
        if tensor.shape != place.shape:
            shapes.append(f"{name} {list(tensor.shape)}, not {list(place.shape)}")
        if "float" not in tensor.dtype:
            dtypes.append(f"{name} {tensor.dtype}")
        found.append(tensor)
    extra = [name for name in there if not name.endswith("inv_freq")]
    if config.tie_embeddings:
        extra = [name for name in extra if name != "lm_head.weight"]
    complaints = (("missing", missing), ("not expected", extra), ("of another shape", shapes), ("no floats", dtypes))
    said = [f"{what}: {brief(sorted(names))}" for what, names in complaints if names]
    if said:
        raise CheckpointError(f"{folder}: its arrays do not fit its config.json; " + "; ".join(said))
    return found


def _with_split_mlp(there: dict[str, Tensor]) -> dict[str, Tensor]:
    """flash-linear-attention before February 2025 kept gate_proj and up_proj as one [2 mlp, d], the gate first."""
    split = {}
    for name, tensor in there.items():
        up = name.replace("mlp.gate_proj", "mlp.up_proj")
        fused = name.endswith("mlp.gate_proj.weight") and up not in there
        if fused and len(tensor.shape) == 2 and tensor.shape[0] % 2 == 0:
            width = tensor.shape[0] // 2
            for part, rows in ((name, slice(width)), (up, slice(width, 2 * width))):
                split[part] = tensor._replace(shape=(width, tensor.shape[1]), rows=rows)
        else:
            split[name] = tensor
    return split
