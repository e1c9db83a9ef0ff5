"""Training on several GPUs: `python benchmarks/cluster.py CASE [--gpus N] [--out FILE.json]`; writes one JSON record.

    op          sequence_parallel at --tokens a GPU on N GPUs, against the op on one GPU with as many tokens
    fsdp        training steps of a preset on N GPUs, --rows rows a GPU: tokens a second (run it with 1, 2, 4 GPUs)
    long        one sequence of --tokens tokens a GPU through forward and backward of a preset, remat full
    data        `gla-jax train`'s data wait and tokens a second against the bare step's

Timings are medians; the first calls, which compile, are left out. --small makes shapes that a CPU does, to try it out:
XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/cluster.py op --gpus 2 --small
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gla_jax import gated_linear_attention, sequence_parallel
from gla_jax.nn import GLAConfig
from gla_jax.train import MeshConfig, TrainConfig, load_corpus, train
from gla_jax.train.data import Batch, Source, training_batches
from gla_jax.train.mesh import make_mesh
from gla_jax.train.metrics import read_log
from gla_jax.train.step import Program, make_program
from gla_jax.train.trackers import flops_per_token, memory_gb, peak_flops


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    """Times of calls, each to its end, after two that are not counted."""
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return times[2:]


def op(arguments: argparse.Namespace) -> dict[str, Any]:
    """Forward, and forward with backward, in bfloat16; 1.3b's heads."""
    h, k, v = (2, 16, 32) if arguments.small else (4, 256, 512)
    tokens = arguments.tokens or (256 if arguments.small else 16384)
    found: dict[str, Any] = {"tokens_a_gpu": tokens, "h": h, "k": k, "v": v}
    for gpus in sorted({1, arguments.gpus}):
        mesh = jax.make_mesh((gpus,), ("sequence",), axis_types=(AxisType.Auto,), devices=jax.devices()[:gpus])
        place = NamedSharding(mesh, P(None, "sequence"))
        keys, time_ = jax.random.split(jax.random.key(0), 5), tokens * gpus

        def make(mesh_keys: Any, time_: int = time_) -> tuple:
            q, k_ = (jax.random.normal(i, (1, time_, h, k), jnp.bfloat16) for i in mesh_keys[:2])
            v_, do = (jax.random.normal(i, (1, time_, h, v), jnp.bfloat16) for i in mesh_keys[2:4])
            return q, k_, v_, jax.nn.log_sigmoid(jax.random.normal(mesh_keys[4], (1, time_, h, k))) / 16, do

        *inputs, do = jax.jit(make, out_shardings=place)(keys)
        call = gated_linear_attention
        if gpus > 1:
            call = functools.partial(sequence_parallel, exchange=arguments.exchange)

        def forward(*inputs: Any, call: Any = call) -> Any:
            return call(*inputs)[0]

        def both(do: Any, *inputs: Any, forward: Any = forward) -> Any:
            o, pull = jax.vjp(forward, *inputs)
            return o, pull(do)

        with jax.set_mesh(mesh):
            runs = {"forward": functools.partial(jax.jit(forward), *inputs)}
            runs["forward_backward"] = functools.partial(jax.jit(both), do, *inputs)
            found[f"seconds_{gpus}"] = {
                name: statistics.median(seconds(run, arguments.repeats)) for name, run in runs.items()
            }
    if arguments.gpus > 1:
        one, many = found["seconds_1"], found[f"seconds_{arguments.gpus}"]
        found["many_against_one"] = {name: many[name] / one[name] for name in one}
    return found


def preset(arguments: argparse.Namespace, default: str) -> GLAConfig:
    if arguments.small:
        return GLAConfig.tiny().replace(hidden_size=64, num_layers=2, mlp_size=64, remat="full")
    presets = {"340m": GLAConfig.gla_340m, "1.3b": GLAConfig.gla_1_3b}
    return presets[arguments.model or default]().replace(dtype="bfloat16", remat="full")


def steps(config: TrainConfig, repeats: int) -> tuple[Program, list[float]]:
    """Times of training steps on random tokens, of the same data each time."""
    program = make_program(config, make_mesh(config))
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (config.batch, config.length + 1), np.int32)
    batch, state = program.place(Batch(tokens[:, :-1], tokens[:, 1:])), program.initialize()
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        state, metrics = program.train(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - began)
    assert np.isfinite(float(metrics["loss"]))
    return program, times[2:]


def rates(config: TrainConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    program, times = steps(config, arguments.repeats)
    speed, peak = config.batch * config.length / statistics.median(times), peak_flops()
    use = None if peak is None else speed * flops_per_token(config.model, program.parameters) / arguments.gpus / peak
    return {
        **{"parameters": program.parameters, "batch": config.batch, "length": config.length, "step_s": times},
        **{"tokens_per_s": speed, "tokens_per_s_a_gpu": speed / arguments.gpus, "mfu": use, "memory_gb": memory_gb()},
    }


def fsdp(arguments: argparse.Namespace) -> dict[str, Any]:
    mesh = MeshConfig(data=1, fsdp=arguments.gpus)
    length = arguments.tokens or (64 if arguments.small else 2048)
    batch = (arguments.rows or 8) * arguments.gpus
    model = preset(arguments, "1.3b")
    return rates(TrainConfig(model=model, mesh=mesh, batch=batch, length=length, optimizer="adamw"), arguments)


def long(arguments: argparse.Namespace) -> dict[str, Any]:
    mesh = MeshConfig(data=1, sequence=arguments.gpus)
    length = (arguments.tokens or (256 if arguments.small else 2**18)) * arguments.gpus
    # Logits of 4096 tokens a GPU at a time: all of them would take 33 GB.
    parts = max(1, length // arguments.gpus // 4096)
    config = TrainConfig(model=preset(arguments, "340m"), mesh=mesh, batch=1, length=length, loss_parts=parts)
    return rates(dataclasses.replace(config, optimizer="adamw"), arguments)


def data(arguments: argparse.Namespace) -> dict[str, Any]:
    """The command's own loop on bytes of Shakespeare, and the same steps with the data at hand."""
    model, rows = preset(arguments, "340m"), arguments.rows or (4 if arguments.small else 16)
    model = model.replace(vocab_size=256, remat="none", layer_unroll=model.num_layers)
    length = arguments.tokens or (64 if arguments.small else 2048)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run=Path(folder) / "run", model=model, batch=rows, length=length, optimizer="adamw", sample=0
        )
        config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=arguments.gpus), steps=arguments.repeats + 20)
        config = dataclasses.replace(config, eval_every=10**6, save_every=10**6)
        train(config, sys.stderr)
        records = [r for r in read_log(config.run / "log.jsonl") if "loss" in r][10:]
    program = make_program(config, make_mesh(config))
    batches = training_batches([Source(load_corpus().train)], batch=rows, length=length, seed=0)
    state, at_hand = program.initialize(), [program.place(next(batches)) for _ in range(4)]
    began = 0.0
    for i in range(arguments.repeats + 5):
        if i == 5:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, _ = program.train(state, at_hand[i % 4])
    jax.block_until_ready(state)
    bare = arguments.repeats * rows * length / (time.perf_counter() - began)
    timings = [record["timing"] for record in records]
    step = statistics.median(t["step_s"] for t in timings)
    return {
        "data_wait_share": statistics.mean(t["data_wait_s"] for t in timings) / step,
        "tokens_per_s": rows * length / step,
        "bare_tokens_per_s": bare,
        "against_bare": rows * length / step / bare,
    }


CASES = {"op": op, "fsdp": fsdp, "long": long, "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--model", choices=("340m", "1.3b"))
    parser.add_argument("--tokens", type=int, help="tokens of a row (fsdp, data), or of a sequence a GPU (op, long)")
    parser.add_argument("--rows", type=int, help="rows a GPU (fsdp) or in all (data)")
    parser.add_argument("--exchange", choices=("all_gather", "all_to_all"))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.gpus > jax.device_count():
        parser.error(f"argument --gpus: there are {jax.device_count()} devices, got {arguments.gpus}")
    given = {name: value for name, value in vars(arguments).items() if name != "out" and value is not None}
    device = jax.devices()[0].device_kind
    record = {**given, "device": device, "jax": jax.__version__, **CASES[arguments.case](arguments)}
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
