"""What a training run is: one frozen dataclass, and the JSON that a run folder keeps of it."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from gla_jax.nn import CausalLMConfig, GLAConfig
from gla_jax.nn.config import MIXERS, ModelConfig


class InputError(ValueError):
    """Something the user gave is unusable; the message is one line that names the argument and what is allowed."""


def _check_types(config: Any, prefix: str = "") -> None:
    """An InputError that names a field whose value is not of its declared type."""
    for field in dataclasses.fields(config):
        kind: Any = field.type
        value = getattr(config, field.name)
        allowed = f"of type {getattr(kind, '__name__', str(kind).replace('pathlib.', ''))}"
        if get_origin(kind) is Literal:
            fits, allowed = value in get_args(kind), f"one of {', '.join(get_args(kind))}"
        elif isinstance(value, bool):
            fits = kind is bool
        else:
            plain = get_origin(kind) if get_origin(kind) is tuple else kind
            fits = isinstance(value, plain) or (isinstance(value, int) and float in (kind, *get_args(kind)))
        if not fits:
            raise InputError(f"argument --{prefix}{field.name.replace('_', '-')}: must be {allowed}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh; their product is the number of devices that train."""

    data: int | None = None
    """Copies of the model, each with its part of the batch; None for as many as there are devices for."""
    fsdp: int = 1
    """Devices that share a copy's parameters and optimizer, each with its part of the batch."""
    tensor: int = 1
    """Devices that share the heads and the MLP."""
    sequence: int = 1
    """Devices that share each sequence's time."""
    axes: Literal["auto", "explicit"] = "auto"
    """Whether JAX's partitioner or JAX's types say where arrays lie between steps; steps compute the same."""

    def __post_init__(self) -> None:
        _check_types(self, "mesh.")
        for name in ("data", "fsdp", "tensor", "sequence"):
            given = getattr(self, name)
            if not (given is None and name == "data") and given < 1:
                raise InputError(f"argument --mesh.{name}: must be at least 1, got {given}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run: the same values on the same machine give the same model, bit for bit."""

    run: Path = Path("runs/shakespeare")
    """Folder of the run; if it holds an unfinished run with the same settings, that run goes on."""
    data: Path | None = None
    """UTF-8 text, .jsonl or .parquet with a "text" field, .array_record, or a folder of `gla-jax tokenize`."""
    mix: tuple[str, ...] = ()
    """More data to train on, each PATH=WEIGHT against --data's weight of 1; what is held out is --data's."""
    pack: bool = False
    """Pack whole documents into rows, of which none sees another, in place of windows over all text."""
    model: ModelConfig = dataclasses.field(default_factory=GLAConfig.tiny)
    """The model, a GLAConfig or a CausalLMConfig; its vocabulary is the 256 bytes, or holds the tokenizer's."""
    steps: int = 2200
    """Optimizer steps in all."""
    batch: int = 4
    """Sequences a step."""
    length: int = 256
    """Bytes of a sequence."""
    mesh: MeshConfig = MeshConfig()
    """The devices; a run may go on with others."""
    accumulate: int = 1
    """Parts that a batch is cut into along its sequences, one after another on the devices, for less memory."""
    pieces: int = 1
    """Parts that a sequence is cut into in time: each starts from the state of the one before, and gradients stop."""
    loss_parts: int | None = None
    """Parts of a sequence whose logits are held one after another; None for the fewest of half a gigabyte each."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: matrices orthogonalised, all else by AdamW. adamw: the paper's."""
    learning_rate: float = 4e-3
    """The highest learning rate."""
    warmup: float = 0.02
    """Share of the steps in which the learning rate rises from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """What leads to the last learning rate: a cosine, or a constant and a linear decay."""
    decay: float = 0.2
    """wsd: share of the steps in which the learning rate falls."""
    final_learning_rate: float = 0.02
    """The last step's learning rate as a share of the highest."""
    weight_decay: float = 0.01
    """Decoupled weight decay of matrices."""
    clip: float = 1.0
    """The gradient's norm is scaled down to this."""
    spike: float | None = 10.0
    """A step is rejected if its gradient's norm is this many times its running mean; None for never."""
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients are computed and summed over devices in; microbatches are summed in float32."""
    ema: float = 0.0
    """Decay of a running mean of the parameters, which evaluation and sampling then use; 0 for none."""
    seed: int = 0
    """Of the initial weights, the order of the data and the closing sample."""
    eval_every: int = 1100
    """Steps between evaluations on all held-out bytes; the last step always has one."""
    save_every: int = 200
    """Steps between checkpoints; the last step always has one."""
    keep: int = 2
    """Checkpoints kept."""
    sample: int = 400
    """Bytes of the closing sample."""
    distributed: str | None = None
    """Many processes: "auto" on a cluster that JAX knows, or ADDRESS:PORT,PROCESSES,NUMBER of this one; None: one."""
    profile: int | None = None
    """First step of five that are written to the run's folder profile/, for xprof."""
    tensorboard: bool = False
    """Log to the run's folder tensorboard/, too."""
    wandb: str | None = None
    """Log to this project of Weights & Biases, too."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in (
            "steps",
            "batch",
            "length",
            "accumulate",
            "pieces",
            "eval_every",
            "save_every",
            "keep",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "clip"):
            self._require(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("warmup", "decay", "final_learning_rate"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        self._require("spike", self.spike is None or 1 < self.spike < math.inf, "above 1 or None")
        self._require("ema", 0 <= self.ema < 1, "at least 0 and below 1")
        for name, size in (("accumulate", "batch"), ("pieces", "length")):
            whole = getattr(self, size)
            self._require(name, whole % getattr(self, name) == 0, f"a divisor of --{size} = {whole}")
        each = self.length // (self.pieces * self.mesh.sequence)
        divides = f"a divisor of --length / --pieces / --mesh.sequence = {each}"
        parts = self.loss_parts
        self._require("loss_parts", parts is None or (parts >= 1 and each % parts == 0), f"None or {divides}")
        self._require("pieces", self.pieces == 1 or self.mesh.sequence == 1, "1 with --mesh.sequence above 1")
        self._require("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0")
        self._require("sample", self.sample >= 0, "at least 0")
        if (limit := self.model.cache_limit) is not None:
            self._require("sample", self.sample < limit, f"below --model.mixer.cache-size = {limit}")
            read = self.pieces == 1 or self.length <= limit
            self._require("pieces", read, f"1 with --length above --model.mixer.cache-size = {limit}")
        self._require("profile", self.profile is None or self.profile >= 1, "at least 1 or None")
        self._require("seed", 0 <= self.seed < 2**32, "between 0 and 2^32 - 1")
        if self.model.vocab_size < 256:
            raise InputError(f"argument --model.vocab-size: must be at least 256, got {self.model.vocab_size}")

    @property
    def sources(self) -> list[tuple[Path, float]]:
        """The paths and weights of `mix`."""
        sources = []
        for text in self.mix:
            path, _, weight = text.rpartition("=")
            try:
                sources.append((Path(path), float(weight)))
            except ValueError:
                sources.append((Path(path), math.nan))
            if not path or not 0 < sources[-1][1] < math.inf:
                raise InputError(f"argument --mix: must be PATH=WEIGHT with a positive weight, got {text!r}")
        return sources

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            flag = name.replace("_", "-")
            raise InputError(f"argument --{flag}: must be {allowed}, got {getattr(self, name)!r}")


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON values; each mixer of a CausalLMConfig has its name in MIXERS as its "kind".

    Raises:
      InputError: if a mixer has none.
    """
    fields: dict[str, Any] = dataclasses.asdict(config)
    fields = {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    if isinstance(config.model, CausalLMConfig):
        kinds = {kind: name for name, kind in MIXERS.items()}
        for unnamed in (type(mixer).__name__ for mixer in config.model.mixers if type(mixer) not in kinds):
            named = f'gla_jax.nn.config.MIXERS["some name"] = {unnamed}'
            raise InputError(f"argument --model.mixer: {unnamed} has no name to be saved by; give it one: {named}")
        mixers = [{"kind": kinds[type(mixer)], **mixer.options()} for mixer in config.model.mixers]
        fields["model"]["mixer"] = mixers if isinstance(config.model.mixer, tuple) else mixers[0]
    return fields | {"mix": list(config.mix)}


def config_from_json(fields: dict[str, Any]) -> TrainConfig:
    """The config of `config_to_json`; ValueError or TypeError where it is none."""
    fields = dict(fields)
    data = fields.pop("data")
    return TrainConfig(
        run=Path(fields.pop("run")),
        data=None if data is None else Path(data),
        model=_model_from_json(fields.pop("model")),
        mesh=MeshConfig(**fields.pop("mesh", {})),
        mix=tuple(fields.pop("mix", ())),
        **fields,
    )


def _model_from_json(fields: dict[str, Any]) -> ModelConfig:
    def made(kind: str, **options: Any) -> Any:
        if kind not in MIXERS:
            known = f"gla_jax.nn.config.MIXERS does not have ({', '.join(MIXERS)})"
            raise ValueError(f"its mixer is of kind {kind!r}, which {known}; a layer of your own must join it first")
        return MIXERS[kind](**options)

    if "mixer" not in fields:
        return GLAConfig(**fields)
    fields = dict(fields)
    mixer = fields.pop("mixer")
    mixer = made(**mixer) if isinstance(mixer, dict) else tuple(made(**one) for one in mixer)
    return CausalLMConfig(mixer=mixer, **fields)


def differences(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    """The flags in which two JSON configs differ, each as "--flag (saved there, given here)"."""
    found = []
    for name in sorted(saved.keys() | given.keys()):
        flag = f"{prefix}{name.replace('_', '-')}"
        old, new = saved.get(name), given.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{flag}.")
        elif old != new:
            found.append(f"--{flag} ({json.dumps(old)} there, {json.dumps(new)} here)")
    return found
