"""Training on several GPUs: `python -m benchmarks.cluster CASE [CASE ...] [--gpus N ...] [--out FOLDER]`.

    op          sequence_parallel at --tokens a GPU, by both exchanges, against the op on one GPU with as many tokens
    fsdp        training steps of a preset, --rows rows a GPU, sharded over all of --gpus in turn
    long        one sequence of each of --lengths tokens a GPU through training steps of a preset, remat full
    restore     a state saved on the most GPUs and restored on all of --gpus: the next step's loss
    data        `gla-jax train`'s data wait and tokens a second against the bare step's

All programs are compiled first. Each case writes one JSON record into the folder as soon as it is done; one that fails
says so, and the others run.
--small makes shapes that a CPU does, to try it out:
XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m benchmarks.cluster op fsdp long restore --gpus 1 2 --small
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gla_jax import gated_linear_attention, sequence_parallel
from gla_jax.nn import GLAConfig
from gla_jax.records import begin
from gla_jax.sequence_parallel import Pieces, _exchange
from gla_jax.train import MeshConfig, TrainConfig, train
from gla_jax.train.checkpoints import Checkpoints
from gla_jax.train.data import Batch, Source, training_batches
from gla_jax.train.mesh import make_mesh
from gla_jax.train.metrics import read_log
from gla_jax.train.step import make_program
from gla_jax.train.trackers import flops_per_token, peak_flops

EXCHANGES = ("all_gather", "all_to_all")
# Calls that are timed together, and that come before.
TOGETHER, WARM = 20, 2


# What a case is: it yields what makes each of its programs, lowered, is sent them compiled, and returns its record.
type Case = Generator[dict[Any, Callable[[], Any]], dict[Any, Any], dict[Any, Any]]


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """The median time of a call, of groups of calls that the devices run one after another."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        results = [call() for _ in range(TOGETHER)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - began) / TOGETHER)
    return 1e3 * statistics.median(times)


def op(arguments: argparse.Namespace) -> Case:
    """Forward, and forward with backward, in bfloat16, gates too, as layers make them; 1.3b's heads."""
    h, k, v = (2, 16, 32) if arguments.small else (4, 256, 512)
    tokens = arguments.tokens or (256 if arguments.small else 16384)
    inputs: dict[Any, Any] = {}
    meshes: dict[int, Any] = {}
    lower: dict[Any, Callable[[], Any]] = {}

    def make(time_: int) -> tuple:
        keys = jax.random.split(jax.random.key(0), 5)
        of = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
        q, k_, g = (of(key, 1, time_, h, k) for key in keys[:3])
        v_, do = (of(key, 1, time_, h, v) for key in keys[3:])
        # Every other channel remembers for thousands of tokens, across devices.
        g = jax.nn.log_sigmoid(g) / jnp.where(jnp.arange(k) % 2, 16, 4096)
        return q, k_, v_, g.astype(jnp.bfloat16), do

    def forward(call: Callable, *inputs: Any) -> Any:
        return call(*inputs)[0]

    def both(call: Callable, do: Any, *inputs: Any) -> Any:
        o, pull = jax.vjp(functools.partial(forward, call), *inputs)
        return o, pull(do)

    def lowering(gpus: int, f: Callable, *values: Any) -> Callable[[], Any]:
        def run() -> Any:
            with jax.set_mesh(meshes[gpus]):
                return jax.jit(f).lower(*values)

        return run

    for gpus in arguments.gpus:
        kinds = (AxisType.Auto,)
        mesh = meshes[gpus] = jax.make_mesh((gpus,), ("sequence",), kinds, devices=jax.devices()[:gpus])
        place = NamedSharding(mesh, P(None, "sequence"))
        *values, do = inputs[gpus] = jax.jit(make, static_argnums=0, out_shardings=place)(tokens * gpus)
        for exchange in EXCHANGES if gpus > 1 else (None,):
            parallel = functools.partial(sequence_parallel, exchange=exchange)
            call = gated_linear_attention if exchange is None else parallel
            lower[gpus, exchange, "forward_backward"] = lowering(gpus, functools.partial(both, call), do, *values)
            if exchange != "all_to_all":
                lower[gpus, exchange, "forward"] = lowering(gpus, functools.partial(forward, call), *values)
            if exchange is not None:
                how = Pieces("sequence", gpus, False, exchange)
                of_device = P("sequence")
                alone = jax.shard_map(functools.partial(_exchange, how), in_specs=(of_device,) * 2, out_specs=of_device)
                put = functools.partial(jax.device_put, device=NamedSharding(mesh, of_device))
                pair = put(jnp.ones((gpus, h, k, 1))), put(jnp.ones((gpus, h, k, v)))
                inputs[gpus, exchange] = pair
                lower[gpus, exchange, "exchange"] = lowering(gpus, alone, *pair)
    run, found = (yield lower), {}
    # The whole sequence on one device, in plain JAX.
    most = max(arguments.gpus)
    *values, do = jax.device_put(inputs[most], jax.devices()[0])
    plain = functools.partial(gated_linear_attention, implementation="xla")
    wanted = jax.jit(functools.partial(both, plain))(do, *values)

    for (gpus, exchange, name), call in run.items():
        *values, do = inputs[gpus]
        given = [do, *values] if name == "forward_backward" else values if name == "forward" else inputs[gpus, exchange]
        row = found.setdefault(gpus, {}).setdefault(exchange or "one device", {})
        row[name] = milliseconds(functools.partial(call, *given), arguments.repeats)
    errors = {}
    for exchange in EXCHANGES if most > 1 else (None,):
        *values, do = inputs[most]
        got = jax.tree.leaves(run[most, exchange, "forward_backward"](do, *values))
        pairs = zip(("o", "dq", "dk", "dv", "dg"), got, jax.tree.leaves(wanted), strict=True)
        errors[exchange or "one device"] = {name: relative(x, jax.device_put(y, x.sharding)) for name, x, y in pairs}
    record = {"tokens_a_gpu": tokens, "h": h, "k": k, "v": v, "milliseconds": found, "errors": errors}
    record["wrong"] = max(x for row in errors.values() for x in row.values()) > 2e-2
    if 1 in found:
        one = found[1]["one device"]
        record["against_one"] = {
            gpus: {
                exchange: {name: row[name] / one[name] for name in row if name in one} for exchange, row in rows.items()
            }
            for gpus, rows in found.items()
            if gpus > 1
        }
    return record


@jax.jit
def _relative(x: Any, y: Any) -> Any:
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return jnp.sqrt(jnp.mean((x - y) ** 2) / jnp.mean(y**2))


def relative(x: Any, y: Any) -> float:
    """RMS(x - y) / RMS(y)."""
    return float(_relative(x, y))


def preset(arguments: argparse.Namespace, default: str) -> GLAConfig:
    if arguments.small:
        return GLAConfig.tiny().replace(hidden_size=64, num_layers=2, mlp_size=64, remat=arguments.remat)
    presets = {"340m": GLAConfig.gla_340m, "1.3b": GLAConfig.gla_1_3b}
    return presets[arguments.model or default]().replace(dtype="bfloat16", remat=arguments.remat)


def tokens_of(config: TrainConfig) -> Batch:
    """The same random tokens for every number of devices."""
    shape = config.batch, config.length + 1
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def programs(configs: dict[int, TrainConfig]) -> Case:
    """The program of each config with its batch, and its training step and its first state compiled."""
    made, lower = {}, {}
    for key, config in configs.items():
        mesh = make_mesh(config)
        program: Any = make_program(config, mesh)
        batch = program.place(tokens_of(config))

        def step(mesh: Any = mesh, program: Any = program, batch: Any = batch) -> Any:
            with jax.set_mesh(mesh):
                return program.train.__wrapped__.lower(program.abstract, batch)

        def first(mesh: Any = mesh, program: Any = program) -> Any:
            with jax.set_mesh(mesh):
                return program.initialize.__wrapped__.lower()

        made[key] = program, batch
        lower[key, "step"], lower[key, "first state"] = step, first
    done = yield dict(reversed(lower.items()))  # those of the most devices take longest to compile
    return {key: (*made[key], done[key, "step"], done[key, "first state"]) for key in configs}


def rates(configs: dict[int, TrainConfig], repeats: int) -> Case:
    """Tokens a second of training steps of each config, of the same batch each time."""
    made, found = (yield from programs(configs)), {}
    for key, (program, batch, train_step, first) in made.items():
        config, times, losses = configs[key], [], []
        gpus = config.mesh.fsdp * config.mesh.sequence
        try:
            state = first()
            for _ in range(WARM + repeats):
                began = time.perf_counter()
                state, metrics = train_step(state, batch)
                losses.append(float(metrics["loss"]))
                times.append(time.perf_counter() - began)
        except jax.errors.JaxRuntimeError as error:  # too much memory, say
            found[key] = {"error": str(error).split("\n")[0]}
            continue
        finally:
            state = None
        assert np.all(np.isfinite(losses)), losses
        speed, peak = config.batch * config.length / statistics.median(times[WARM:]), peak_flops()
        memory = train_step.memory_analysis()
        held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        found[key] = {
            **{"parameters": program.parameters, "batch": config.batch, "length": config.length},
            **{"step_s": times[WARM:], "losses": losses, "tokens_per_s": speed, "tokens_per_s_a_gpu": speed / gpus},
            "mfu": None if peak is None else speed * flops_per_token(config.model, program.parameters) / gpus / peak,
            "memory_gb": round(held / 1e9, 1),
        }
    return found


def fsdp(arguments: argparse.Namespace) -> Case:
    length = arguments.tokens or (64 if arguments.small else 2048)
    configs = {
        gpus: TrainConfig(
            model=preset(arguments, "1.3b"),
            mesh=MeshConfig(data=1, fsdp=gpus),
            batch=(arguments.rows or 8) * gpus,
            length=length,
            optimizer="adamw",
        )
        for gpus in arguments.gpus
    }
    found = yield from rates(configs, arguments.repeats)
    each = {gpus: row["tokens_per_s_a_gpu"] for gpus, row in found.items() if "error" not in row}
    efficiency = {gpus: x / each[min(each)] for gpus, x in each.items()}
    return {"remat": arguments.remat, "gpus": found, "efficiency": efficiency}


def long(arguments: argparse.Namespace) -> Case:
    gpus, configs = max(arguments.gpus), {}
    for each in arguments.lengths or ([256] if arguments.small else [2**18]):
        # Logits of 4096 tokens a GPU at a time: all of them would take 33 GB.
        configs[each * gpus] = TrainConfig(
            model=preset(arguments, "340m").replace(remat="full"),
            mesh=MeshConfig(data=1, sequence=gpus),
            batch=1,
            length=each * gpus,
            loss_parts=max(1, each // 4096),
            optimizer="adamw",
        )
    return {"remat": "full", "gpus": gpus, "tokens": (yield from rates(configs, max(1, arguments.repeats // 4)))}


def restore(arguments: argparse.Namespace) -> Case:
    """Two layers of the 340m preset, in plain JAX; what is saved is a state after two steps."""
    model = preset(arguments, "340m").replace(num_layers=2, implementation="xla", remat="none")
    most, losses = max(arguments.gpus), {}
    config = TrainConfig(model=model, batch=most, length=64 if arguments.small else 2048, optimizer="adamw")
    configs = {n: dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=n)) for n in arguments.gpus}
    run = yield from programs(configs)
    data = lambda: training_batches([Source(np.arange(10**5, dtype=np.uint16) % 7)], batch=most, length=64, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        _, batch, train_step, first = run[most]
        state = first()
        for _ in range(2):
            state, _ = train_step(state, batch)
        with Checkpoints(Path(folder)) as checkpoints:
            checkpoints.save(state, data())
            checkpoints.wait()
        losses["not restored"] = float(train_step(state, batch)[1]["loss"])
        for gpus, (program, batch, train_step, _) in run.items():
            with Checkpoints(Path(folder)) as checkpoints:
                state = checkpoints.restore(program.abstract, data())
            losses[f"restored on {gpus}"] = float(train_step(state, batch)[1]["loss"])
    values = list(losses.values())
    return {
        **{"saved_on": most, "loss_of_the_next_step": losses},
        "wrong": max(values) - min(values) > 1e-3 * min(values),
    }


class Done(Exception):
    """Enough steps have been taken."""


def data(arguments: argparse.Namespace) -> Case:
    """The command's own loop on Shakespeare, and the same executable with batches at hand."""
    yield {}  # that loop compiles by itself
    model, rows, gpus = preset(arguments, "340m"), arguments.rows or 8, max(arguments.gpus)
    model = model.replace(remat="none", layer_unroll=model.num_layers)
    length, repeats = arguments.tokens or (64 if arguments.small else 2048), arguments.repeats
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            run=Path(folder) / "run",
            model=model,
            batch=rows,
            length=length,
            optimizer="adamw",
            mesh=MeshConfig(data=1, fsdp=gpus),
            steps=10**6,
            eval_every=10**6,
            save_every=10**6,
            sample=0,
        )
        program = make_program(config, make_mesh(config))
        batches, kept = [], []

        # The loop runs on this program, and is left at a step: an evaluation and a save are not what is timed.
        def train_step(state: Any, batch: Any) -> Any:
            state, metrics = program.train(state, batch)
            batches.append(batch)
            if len(batches) == WARM + 1 + repeats:
                kept.append(state)
                raise Done
            return state, metrics

        counting = dataclasses.replace(program, train=train_step)
        loop = importlib.import_module("gla_jax.train.loop")
        with mock.patch.object(loop, "make_program", return_value=counting), contextlib.suppress(Done):
            train(config, sys.stderr)
        timings = [record["timing"] for record in read_log(config.run / "log.jsonl")]
    # A record's speed is that since the first step's end; a compile comes before it.
    looped, waits = timings[-1]["tokens_per_s"], [timing["data_wait_s"] for timing in timings[1:]]
    state = jax.block_until_ready(kept[0])
    began, metrics = time.perf_counter(), {}
    for i in range(repeats):
        state, metrics = program.train(state, batches[i])
    loss = float(metrics["loss"])
    bare = repeats * rows * length / (time.perf_counter() - began)
    assert np.isfinite(loss), loss
    return {
        **{"parameters": program.parameters, "batch": rows, "length": length, "tokens_per_s": looped},
        **{"bare_tokens_per_s": bare, "against_bare": looped / bare, "data_wait_ms": 1e3 * statistics.mean(waits)},
        "data_wait_share": statistics.mean(waits) * looped / rows / length,
    }


CASES = {"op": op, "fsdp": fsdp, "long": long, "restore": restore, "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", choices=CASES, nargs="+", metavar="CASE")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--model", choices=("340m", "1.3b"))
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="full", help="of fsdp")
    parser.add_argument("--tokens", type=int, help="tokens of a row (fsdp, data), or of a sequence a GPU (op)")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N", help="tokens of a sequence a GPU (long)")
    parser.add_argument("--rows", type=int, help="rows a GPU (fsdp) or in all (data)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder for the records")
    arguments = parser.parse_args()
    if max(arguments.gpus) > jax.device_count() or min(arguments.gpus) < 1:
        parser.error(f"argument --gpus: there are {jax.device_count()} devices, got {arguments.gpus}")
    if arguments.out is not None and not arguments.out.is_dir():
        parser.error(f"argument --out: must be a folder, got {arguments.out}")
    device, failed, started = jax.devices()[0].device_kind, [], {}
    # In Python, kernels are lowered one after another; meanwhile programs compile in threads.
    with ThreadPoolExecutor() as pool:
        began = time.perf_counter()
        for name in arguments.cases:
            try:
                case = CASES[name](arguments)
                programs_of = started[name] = case, {}
                for part, lower in next(case).items():
                    programs_of[1][part] = pool.submit(lower().compile)
                    print(f"{name} {part}: lowered by {time.perf_counter() - began:.1f} s", file=sys.stderr)
            except Exception:  # printed, and the exit status is 1; lent machines are too dear to lose the other cases
                traceback.print_exc()
                del started[name]
                failed.append(name)
    print(f"all compiled by {time.perf_counter() - began:.1f} s", file=sys.stderr)
    for name, (case, futures) in started.items():
        began = time.perf_counter()
        try:
            case.send({part: future.result() for part, future in futures.items()})
            raise AssertionError("a case has one set of programs")
        except StopIteration as end:
            found = end.value
        except Exception:  # as above; most often a size that does not fit in memory
            traceback.print_exc()
            failed.append(name)
            continue
        record = {
            **begin(f"cluster {name}", ["python", "-m", "benchmarks.cluster", *sys.argv[1:]], device=device),
            **found,
        }
        text = json.dumps(record, indent=1)
        print(f"{text}\n{name} took {time.perf_counter() - began:.1f} s", flush=True)
        if arguments.out is not None:
            short = device.removeprefix("NVIDIA ").split()[0].lower()
            file = f"cluster-{name}-{short}-x{max(arguments.gpus)}.json"
            (arguments.out / file).write_text(text + "\n", encoding="utf-8")
        if record.get("wrong"):
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
