"""Training and the op against length at the same number of tokens (arXiv 2312.06635, figures 6 and 2), on one GPU.

    python -m benchmarks.lengths --out benchmarks/results/lengths-h100.json     # about two minutes
    python -m benchmarks.lengths --preset tiny                                  # a CPU, to see that it runs

Training steps are those of `gla-jax bench train`, of models with a quarter of the 340M presets' blocks, so that all
programs compile in a minute; Mamba's scan is plain JAX. Memory is what the compiled step needs, parameters and
optimizer included. The op is timed forward, and forward and backward, in bfloat16, beside cuDNN's causal softmax
attention of the same width. All is compiled before anything is timed. Medians of repeats.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.op_gpu import inputs
from benchmarks.peers import in_jax, milliseconds
from gla_jax import gated_linear_attention
from gla_jax.train.bench import PRESETS as MODELS
from gla_jax.train.bench import BenchTrainConfig, lower_step, time_steps

# The widths of the op's heads, and as many of softmax attention's as make the same width of values.
OPS: dict[str, Any] = {"GLA, 4 x (256, 512)": (4, 256, 512), "GLA, 16 x (128, 128)": (16, 128, 128)}
ATTENTION = "attention, 16 x 128"
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "models": {"GLA": "tiny"},
        "tokens": 64,
        "lengths": [32, 64],
        "ops": {"GLA, 1 x (16, 16)": (1, 16, 16)},
        "op tokens": 128,
        "op lengths": [64, 128],
        "steps": 1,
        "calls": 1,
        "repeats": 1,
    },
    "h100": {
        "models": {"GLA": "340m", "Transformer++": "transformer-340m", "Mamba": "mamba-340m"},
        "tokens": 16384,
        "lengths": [2048, 4096, 8192, 16384],
        "ops": OPS,
        "op tokens": 32768,
        "op lengths": [1024, 2048, 4096, 8192, 16384, 32768],
        "steps": 4,
        "calls": 5,
        "repeats": 5,
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


def time_ops(how: dict[str, Any], pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Milliseconds of every op at every length."""
    ops = {**how["ops"], ATTENTION: (16, 128, 128)}
    made = {(name, n): op(name, ops[name], how["op tokens"], n) for n in how["op lengths"] for name in ops}

    def warm(functions: tuple[Callable, Callable, Callable]) -> None:
        forward, both, wait = functions
        wait((forward(), both()))

    list(pool.map(warm, made.values()))
    rows = []
    for (name, length), (forward, both, wait) in made.items():
        count = {"calls": how["calls"], "repeats": how["repeats"]}
        ms = {
            "forward": milliseconds(forward, wait, **count),
            "forward and backward": milliseconds(both, wait, **count),
        }
        rows.append({"op": name, "length": length, "batch": how["op tokens"] // length, **ms})
        print(f"{name:22s} {length:6d}  {ms['forward']:8.3f} {ms['forward and backward']:8.3f} ms", flush=True)
    return rows


def time_training(how: dict[str, Any], pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """Tokens a second and the memory of a step of every model at every length."""
    rows, configs, states = [], {}, {}
    for name, preset in how["models"].items():
        few: dict[str, Any] = {"num_layers": MODELS[preset]().num_layers // 4, "steps": how["steps"]}
        for length in how["lengths"]:
            sizes: dict[str, Any] = {"length": length, "batch": how["tokens"] // length, "repeats": how["repeats"]}
            configs[name, length] = BenchTrainConfig(preset=preset, **few, **sizes)
    lowered = {}
    for key, config in configs.items():
        program, step, batch = lower_step(config)
        lowered[key] = program, pool.submit(step.compile), batch
    compiled = {key: step.result() for key, (_, step, _) in lowered.items()}
    print("compiled", flush=True)
    for (name, length), config in configs.items():
        program, _, batch = lowered[name, length]
        step = compiled[name, length]
        if name not in states:  # what the steps of one length make of it is the next one's
            states = {name: program.initialize()}
        states[name], times = time_steps(config, step, states.pop(name), batch)
        memory = step.memory_analysis()
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        rows.append(
            {
                "model": name,
                "layers": config.num_layers,
                "parameters": program.parameters,
                "op_kernels": step.as_text().count('custom_call_target="mosaic_gpu'),
                "length": length,
                "batch": config.batch,
                "step_ms": [round(1e3 * x, 3) for x in times],
                "tokens_per_s": round(how["tokens"] / statistics.median(times)),
                "memory_gb": round((held + memory.temp_size_in_bytes) / 1e9, 3),
            }
        )
        row = rows[-1]
        print(f"{name:22s} {length:6d}  {row['tokens_per_s']:9,d} tokens/s  {row['memory_gb']:.2f} GB", flush=True)
    return rows


def claims(record: dict[str, Any]) -> dict[str, bool]:
    """What the paper says of figures 6 and 2, and whether it was seen."""
    speed = {(row["model"], row["length"]): row["tokens_per_s"] for row in record["training"]}
    memory = {(row["model"], row["length"]): row["memory_gb"] for row in record["training"]}
    both = {(row["op"], row["length"]): row["forward and backward"] for row in record["op"]}
    lengths = sorted({length for _, length in speed})
    longer = [n for n in lengths if n > 4096]
    found = {}
    if {"GLA", "Transformer++", "Mamba"} <= {name for name, _ in speed}:
        slowest = lambda n: speed["Mamba", n] < min(speed["GLA", n], speed["Transformer++", n])
        found["Mamba trains slowest at every length"] = all(map(slowest, lengths))
        found["GLA trains faster than Transformer++ beyond 4096"] = bool(longer) and all(
            speed["GLA", n] > speed["Transformer++", n] for n in longer
        )
        most = lambda n: max(memory[name, n] for name in ("GLA", "Transformer++", "Mamba"))
        least = lambda n: min(memory[name, n] for name in ("GLA", "Transformer++", "Mamba"))
        found["the three need nearly the same memory (within 20 %)"] = all(most(n) <= 1.2 * least(n) for n in lengths)
    for name in {name: None for name, _ in both if name != ATTENTION}:
        faster = all(ms < both[ATTENTION, n] for (op, n), ms in both.items() if op == name)
        found[f"{name}: faster than attention from 1024 on, with the backward"] = faster
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="h100")
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args(arguments)
    how = PRESETS[given.preset]
    record: dict[str, Any] = {
        "what": "lengths",
        "command": " ".join(["python", "-m", "benchmarks.lengths", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "settings": how,
        "training": [],
        "op": [],
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for what, measure in (("op", time_ops), ("training", time_training)):
            record[what] = measure(how, pool)
            record["claims"] = claims(record)
            if given.out is not None:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(record, indent=1) + "\n")
    for claim, seen in record["claims"].items():
        print(f"{'seen' if seen else 'NOT seen'}: {claim}")
    return record


if __name__ == "__main__":
    main()
