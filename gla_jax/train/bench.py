"""How fast a preset trains: tokens a second, the model's FLOPs utilisation, memory, and where the time goes."""

import collections
import dataclasses
import functools
import json
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np
from jax.profiler import ProfileData

from gla_jax.attention import Implementation
from gla_jax.nn import CausalLMConfig, GLAConfig, SoftmaxAttentionConfig
from gla_jax.nn.config import ModelConfig
from gla_jax.records import begin
from gla_jax.train.config import InputError, MeshConfig, TrainConfig
from gla_jax.train.data import Batch
from gla_jax.train.mesh import make_mesh
from gla_jax.train.step import SCOPES, Program, TrainState, make_program
from gla_jax.train.trackers import memory_gb, peak_flops

PRESETS = {
    "tiny": GLAConfig.tiny,
    "340m": GLAConfig.gla_340m,
    "1.3b": GLAConfig.gla_1_3b,
    "transformer-tiny": functools.partial(CausalLMConfig.tiny, "attention"),
    "transformer-340m": CausalLMConfig.transformer_340m,
    "transformer-1.3b": CausalLMConfig.transformer_1_3b,
    "mamba-tiny": functools.partial(CausalLMConfig.tiny, "mamba"),
    "mamba-340m": CausalLMConfig.mamba_340m,
}
# Steps that are profiled, and that come before anything is timed.
PROFILED, WARM = 3, 2


@dataclasses.dataclass(frozen=True)
class BenchTrainConfig:
    """Time the training step of a preset on random tokens, with AdamW, on one device."""

    preset: Literal[
        "tiny",
        "340m",
        "1.3b",
        "transformer-tiny",
        "transformer-340m",
        "transformer-1.3b",
        "mamba-tiny",
        "mamba-340m",
    ] = "340m"
    """The model: GLA, the Transformer++ of the same size, on GPUs through cuDNN's attention, or Mamba."""
    batch: int = 8
    """Sequences a step."""
    length: int = 2048
    """Tokens of a sequence."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What is computed in; parameters and the optimizer are float32."""
    implementation: Implementation | None = None
    """Of the op: None for the best there is, or a name."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes."""
    num_layers: int | None = None
    """Blocks; None for the preset's."""
    layer_unroll: int | None = None
    """Blocks written out in a turn of the loop over layers; None for all of them."""
    loss_parts: int | None = None
    """Parts of a sequence whose logits are held one after another; None for the fewest of half a gigabyte each."""
    steps: int = 10
    """Steps of a timing."""
    repeats: int = 5
    """Timings, of which the median counts."""
    profile: bool = False
    """Say which kernels the time goes to."""
    out: Path | None = None
    """A JSON file for what was found."""

    def __post_init__(self) -> None:
        for name in ("batch", "length", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"argument --{name.replace('_', '-')}: must be at least 1, got {getattr(self, name)}")
        for name in ("num_layers", "layer_unroll", "loss_parts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"argument --{name.replace('_', '-')}: must be at least 1 or None, got {value}")

    def model(self) -> ModelConfig:
        """The preset with these options."""
        preset = PRESETS[self.preset]()
        layers = self.num_layers or preset.num_layers
        unroll = self.layer_unroll or layers
        options: dict[str, Any] = {"implementation": self.implementation, "remat": self.remat, "layer_unroll": unroll}
        if isinstance(preset, CausalLMConfig) and jax.default_backend() == "gpu" and self.dtype == "bfloat16":
            cudnn = lambda x: x.replace(kernel="cudnn") if isinstance(x, SoftmaxAttentionConfig) else x
            options["mixer"] = tuple(cudnn(mixer) for mixer in preset.mixers)
        return preset.replace(dtype=self.dtype, num_layers=layers, **options)


def bench_train(config: BenchTrainConfig) -> dict[str, Any]:
    """What a step takes, as one JSON record, which is also written to config.out.

    "tokens_per_s" is of the median timing; "mfu_6n" is 6 times the number of parameters a token against the device's
    dense bfloat16 peak, None where that is not known; "memory_gb" the most memory in use so far; "op_kernels" how many
    Mosaic GPU kernels the compiled step has. With config.profile, "kernels" has the device's milliseconds a step by
    part of the model and kind of work.

    Raises:
      InputError: if config.out is in no folder.
    """
    if config.out is not None and not config.out.parent.is_dir():
        raise InputError(f"argument --out: {config.out.parent} is no folder")
    began = time.perf_counter()
    program, lowered, batch = lower_step(config)
    train = lowered.compile()
    compiling = time.perf_counter() - began
    state, times = time_steps(config, train, program.initialize(), batch)
    step, peak = statistics.median(times), peak_flops()
    speed = config.batch * config.length / step
    program_text = train.as_text()
    record = {
        **begin("train", ["gla-jax", *sys.argv[1:]]),
        **{name: x for name, x in dataclasses.asdict(config).items() if name not in ("out", "profile")},
        "parameters": program.parameters,
        "op_kernels": len(re.findall(r'custom_call_target="mosaic_gpu', program_text)),
        "compile_s": round(compiling, 1),
        "step_ms": [round(1e3 * x, 3) for x in times],
        "tokens_per_s": round(speed),
        "mfu_6n": None if peak is None else round(6 * program.parameters * speed / peak, 4),
        "memory_gb": memory_gb(),
    }
    if config.profile:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                _steps(train, state, batch, PROFILED)
            (trace,) = Path(folder).rglob("*.xplane.pb")
            with warnings.catch_warnings():  # jaxlib's own, of types without a module
                warnings.simplefilter("ignore", DeprecationWarning)
                record["kernels"] = _kernels(ProfileData.from_file(str(trace)), program_text)
    if config.out is not None:
        config.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def lower_step(config: BenchTrainConfig) -> tuple[Program, Any, Any]:
    """The program of config's run, its training step to compile, and the random batch that it is timed on."""
    run = TrainConfig(
        batch=config.batch,
        length=config.length,
        loss_parts=config.loss_parts,
        optimizer="adamw",
        mesh=MeshConfig(data=1),
        model=config.model(),
    )
    mesh = make_mesh(run)
    program = make_program(run, mesh)
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, (config.batch, config.length + 1), np.int32)
    batch = program.place(Batch(tokens[:, :-1], tokens[:, 1:]))
    with jax.set_mesh(mesh):
        return program, cast(Any, program.train).__wrapped__.lower(program.abstract, batch), batch


def time_steps(config: BenchTrainConfig, train: Callable, state: TrainState, batch: Any) -> tuple[TrainState, list]:
    """The last state, and the seconds a step of each timing."""
    state, _ = _steps(train, state, batch, WARM)
    times = []
    for _ in range(config.repeats):
        state, seconds = _steps(train, state, batch, config.steps)
        times.append(seconds / config.steps)
    return state, times


def _steps(train: Callable, state: TrainState, batch: Any, count: int) -> tuple[TrainState, float]:
    began, metrics = time.perf_counter(), {}
    for _ in range(count):
        state, metrics = train(state, batch)
    loss = float(metrics["loss"])
    seconds = time.perf_counter() - began
    if not np.isfinite(loss):
        raise InputError(f"argument --preset: the loss is {loss}")
    return state, seconds


def _kernels(profile: ProfileData, program: str) -> list[dict[str, Any]]:
    """Milliseconds a step of each kind of work in each part of the model, the longest first, and its largest kernel."""
    sources = dict(re.findall(r"^ +(?:ROOT )?%([\w.-]+) = .*op_name=\"([^\"]*)\"", program, re.MULTILINE))
    spent: dict[tuple[str, str], collections.Counter] = collections.defaultdict(collections.Counter)
    calls: collections.Counter = collections.Counter()
    for plane in profile.planes:
        for line in plane.lines:
            if plane.name.startswith("/device") and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = {name: value for name, value in event.stats if name in ("hlo_op", "memcpy_details")}
                if not stats:
                    continue
                key = _work(str(stats.get("hlo_op", "")), event.name, sources)
                spent[key][event.name[:80]] += event.duration_ns
                calls[key] += 1
    total = sum(x.total() for x in spent.values())
    rows = [
        {
            **{"part": part, "work": work, "ms": round(times.total() / PROFILED / 1e6, 3)},
            **{"share": round(times.total() / total, 4), "calls": round(calls[part, work] / PROFILED)},
            "largest": times.most_common(1)[0][0],
        }
        for (part, work), times in spent.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _work(instruction: str, kernel: str, sources: dict[str, str]) -> tuple[str, str]:
    """Which part of the model a kernel is of, and what it does.

    A kernel that runs from a CUDA graph does not say which instruction it is; a fused one has the instruction's name.
    """
    source = sources.get(instruction) or sources.get(re.sub(r"_(\d+)$", r".\1", kernel)) or ""
    part = next((name for name in SCOPES if f"/{name}/" in source or f"({name})/" in source), "all parts")
    if re.search("nvjet|gemm|cutlass|xmma|splitK|dot", f"{kernel} {instruction}"):
        return part, "matrix products"
    if "rms_norm" in kernel:
        return part, "norms' gradients"
    if "mosaic" in kernel:
        which = "backward" if "transpose(" in source else "forward"
        return "op", which if source else "forward and backward"
    copies = re.search("copy|memcpy|memset", f"{kernel} {instruction}", re.IGNORECASE)
    return part, "copies" if copies else "elementwise"
