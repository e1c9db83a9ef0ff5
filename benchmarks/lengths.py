"""Training, or the op, against length at the same number of tokens (arXiv 2312.06635, figures 6 and 2), on one GPU.

    python -m benchmarks.lengths training --out benchmarks/results/lengths-training-h100.json
    python -m benchmarks.lengths op --out benchmarks/results/lengths-op-h100.json
    python -m benchmarks.lengths op --preset tiny          # a CPU, to see that it runs

Training steps are those of `gla-jax bench train`, of models with a quarter of the 340M presets' blocks, so that all
programs compile in a minute; Mamba's scan is plain JAX. Memory is what the compiled step needs, parameters and
optimizer included. The op is timed forward, and forward and backward, in bfloat16, beside cuDNN's causal softmax
attention of the same width. Each length of each has a process; they compile side by side, then time one by one, and
the record is written after each. Medians of repeats.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import plots
from benchmarks.op import in_jax, milliseconds
from benchmarks.op_gpu import inputs
from benchmarks.processes import alone, compiling, each
from gla_jax import gated_linear_attention
from gla_jax.records import begin
from gla_jax.train.bench import PRESETS as MODELS
from gla_jax.train.bench import BenchTrainConfig, lower_step, time_steps

# The widths of the op's heads, and as many of softmax attention's as make the same width of values.
OPS: dict[str, Any] = {"GLA, 4 x (256, 512)": (4, 256, 512), "GLA, 16 x (128, 128)": (16, 128, 128)}
ATTENTION: dict[str, Any] = {"attention, 16 x 128": (16, 128, 128)}
LIMIT_S = 240  # of a line, its wait for the others included
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "models": {"GLA": "tiny", "Transformer++": "transformer-tiny", "Mamba": "mamba-tiny"},
        "part of the blocks": 1,
        "tokens": 64,
        "lengths": [32, 64],
        "ops": {"GLA, 1 x (16, 16)": (1, 16, 16)},
        "op tokens": 128,
        "op lengths": [64, 128],
        "steps": 1,
        "slow": {},
        "calls": 1,
        "repeats": 1,
    },
    "h100": {
        "models": {"GLA": "340m", "Transformer++": "transformer-340m", "Mamba": "mamba-340m"},
        "part of the blocks": 4,
        "tokens": 16384,
        "lengths": [2048, 4096, 8192, 16384],
        "ops": OPS,
        "op tokens": 32768,
        "op lengths": [1024, 2048, 4096, 8192, 16384, 32768],
        "steps": 4,
        "slow": {"Mamba": 1},
        "calls": 20,
        "repeats": 3,
    },
}


def op(name: str, heads: tuple[int, int, int], tokens: int, length: int) -> tuple[Callable, Callable, Callable]:
    """Forward, forward and backward, and what waits for them."""
    h, k, v = heads
    if not name.startswith("GLA"):
        cudnn = "cudnn" if jax.default_backend() == "gpu" else None
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=cudnn)
        shape = (tokens // length, length, h, v)
        return in_jax(attend, *(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3)))
    ours: Any = "mosaic_gpu" if jax.default_backend() == "gpu" else None
    call = lambda q, k, v, g: gated_linear_attention(q, k, v, g, implementation=ours)[0]
    return in_jax(call, *inputs((tokens // length, length, h, k, v)))


def time_op(how: dict[str, Any], name: str, length: int) -> dict[str, Any]:
    """Milliseconds of an op at a length."""
    with compiling():
        forward, both, wait = op(name, (how["ops"] | ATTENTION)[name], how["op tokens"], length)
        wait((forward(), both()))
    calls, repeats = how["calls"], how["repeats"]
    with alone():
        return {
            "op": name,
            "length": length,
            "batch": how["op tokens"] // length,
            "forward": milliseconds(forward, wait, calls, repeats),
            "forward and backward": milliseconds(both, wait, calls, repeats),
        }


def time_training(how: dict[str, Any], name: str, length: int) -> dict[str, Any]:
    """Tokens a second, and the memory of a step, of a model at a length."""
    preset: Any = how["models"][name]
    layers, steps = MODELS[preset]().num_layers // how["part of the blocks"], how["slow"].get(name, how["steps"])
    sizes: dict[str, Any] = {"num_layers": layers, "length": length, "batch": how["tokens"] // length}
    config = BenchTrainConfig(preset=preset, steps=steps, repeats=how["repeats"], **sizes)
    with compiling():
        program, lowered, batch = lower_step(config)
        step, state = lowered.compile(), program.initialize()
    with alone():
        _, times = time_steps(config, step, state, batch)
    memory = step.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "model": name,
        "layers": layers,
        "parameters": program.parameters,
        "op_kernels": step.as_text().count('custom_call_target="mosaic_gpu'),
        "length": length,
        "batch": config.batch,
        "step_ms": [round(1e3 * x, 3) for x in times],
        "tokens_per_s": round(how["tokens"] / statistics.median(times)),
        "memory_gb": round((held + memory.temp_size_in_bytes) / 1e9, 3),
    }


def claims_of_training(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What the paper says of its figure 6, and whether it was seen, if all models were timed at all lengths."""
    speed = {(row["model"], row["length"]): row["tokens_per_s"] for row in rows}
    memory = {(row["model"], row["length"]): row["memory_gb"] for row in rows}
    names, lengths = ("GLA", "Transformer++", "Mamba"), sorted({length for _, length in speed})
    found: dict[str, bool] = {}
    if not rows:
        return found
    if all((name, n) in speed for name in names[:2] for n in lengths):
        lead = {n: speed["GLA", n] / speed["Transformer++", n] for n in lengths}
        for n in lengths:
            found[f"GLA trains faster than Transformer++ at {n} tokens"] = lead[n] > 1
        for n in lengths[1:]:
            found[f"GLA's lead over Transformer++ at {n} tokens is above that at {lengths[0]}"] = (
                lead[n] > lead[lengths[0]]
            )
    if {(name, n) for name in names for n in lengths} <= set(speed):
        slowest = [speed["Mamba", n] < min(speed["GLA", n], speed["Transformer++", n]) for n in lengths]
        found["Mamba trains slowest at every length"] = all(slowest)
        needs = [[memory[name, n] for name in names] for n in lengths]
        found["the three need nearly the same memory (within 20 %)"] = all(max(x) <= 1.2 * min(x) for x in needs)
    return found


def claims_of_ops(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """What the paper says of its figure 2, and whether it was seen."""
    (attention,) = ATTENTION
    ms = {(row["op"], row["length"]): row["forward and backward"] for row in rows}
    return {
        f"{name} is faster than attention at every length, with the backward": all(
            ms[op, n] < ms.get((attention, n), 0) for op, n in ms if op == name
        )
        for name in dict.fromkeys(op for op, _ in ms if op != attention)
    }


PARTS: dict[str, tuple[Callable, Callable]] = {
    "training": (time_training, claims_of_training),
    "op": (time_op, claims_of_ops),
}


def lines(part: str, how: dict[str, Any]) -> list[tuple[str, int]]:
    """Every name and length of a part, in the order of its table."""
    if part == "training":
        return [(name, n) for name in how["models"] for n in how["lengths"]]
    return [(name, n) for n in how["op lengths"] for name in how["ops"] | ATTENTION]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--preset", choices=PRESETS, default="h100")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--line", type=int, help="this line of the table alone, in this process")
    given = parser.parse_args(arguments)
    how, (measure, claims) = PRESETS[given.preset], PARTS[given.part]
    every = lines(given.part, how)
    if given.line is not None:
        row = measure(how, *every[given.line])
        print(json.dumps({"device": jax.devices()[0].device_kind} | row), flush=True)
        return row
    words = ["python", "-m", "benchmarks.lengths", *(sys.argv[1:] if arguments is None else arguments)]
    record: dict[str, Any] = {
        **begin(f"{given.part} against length", words, device="no line has been measured"),
        "settings": how,
        "results": [],
        "failed": [],
    }
    commands = [[given.part, "--preset", given.preset, "--line", str(i)] for i in range(len(every))]
    rows: dict[int, dict[str, Any]] = {}
    for i, row in each("benchmarks.lengths", commands, 2 * (os.cpu_count() or 1), LIMIT_S):
        if "FAILED" in row:
            record["failed"].append([*every[i], row["FAILED"]])
            print(f"{every[i]} FAILED: {row['FAILED']}", flush=True)
        else:
            record["device"], rows[i] = row.pop("device"), row
            numbers = (f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in row.items())
            print(", ".join(numbers), flush=True)
        record["results"] = [rows[i] for i in sorted(rows)]
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
    for claim, seen in claims(record["results"]).items():
        print(f"{'seen' if seen else 'NOT seen'}: {claim}")
    plots.draw_or_say_why(given.out)
    return record


if __name__ == "__main__":
    main()
