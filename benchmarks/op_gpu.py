"""Checks and times the Mosaic GPU forward on one Hopper GPU, beside the machine's ceilings and cuDNN's attention.

    python -m benchmarks.op_gpu                               # every group, about three minutes
    python -m benchmarks.op_gpu check bars --out benchmarks/results/op-gpu-h100.json
    python -m benchmarks.op_gpu tune --lower                  # no GPU: only lowers each kernel for an H100

Each group, and of bars and gates each shape, runs in a process of its own with a time limit, so that a kernel that
hangs or faults costs its own alone. Milliseconds are medians of 7 repeats of 30 calls each, launches included; "of
kernels" is the median of 11 calls' kernels by CUPTI, without what lies between them, and what gates' ratios are of.
Bytes are one pass over q, k, g, v and o.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.processes import alone, compiling
from gla_jax.pallas import forward
from gla_jax.pallas.config import choose_forward
from gla_jax.records import begin

# (b, t, h, k, v) and the milliseconds to reach (issue 3).
BARS = {
    (8, 2048, 4, 256, 512): 0.12,
    (32, 1024, 4, 256, 512): 0.22,
    (1, 16384, 4, 256, 512): 0.16,
    (8, 2048, 16, 128, 128): 0.13,
    (32, 1024, 16, 128, 128): 0.25,
    (2, 8192, 16, 64, 128): 0.13,
    (8, 2048, 4, 128, 256): 0.07,
}
# The gates, and the most they may cost as a multiple of the mild ones.
GATES = {"logsigmoid": 1.05, "resets": 1.4, "tenth": 1.6, "packed": 1.15, "a token": 1.0, "all strong": None}
GROUPS = ("ceilings", "check", "bars", "gates", "bits", "tune")
LIMIT_S = 180
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def gates(kind, shape, key):
    g = jax.nn.log_sigmoid(jax.random.normal(key, shape))
    token, tile = ((*shape[:3], 1), (shape[0], -(-shape[1] // 64), shape[2], 1))
    first, second = jax.random.split(jax.random.fold_in(key, 1))
    if kind == "logsigmoid":
        return g
    if kind == "a token":
        return g[..., 0] / 16
    if kind == "all strong":
        return 4 * g
    if kind == "resets":
        return jnp.where(jax.random.bernoulli(first, 0.01, token), -jnp.inf, g / 16)
    if kind == "tenth":
        strong = jnp.array([-5.0, -50.0, -1e4])[jax.random.randint(second, shape, 0, 3)]
        here = jnp.repeat(jax.random.bernoulli(first, 0.1, tile), 64, axis=1)[:, : shape[1]]
        return jnp.where(here, strong, g / 16)
    return g / 16


@functools.partial(jax.jit, static_argnums=(0, 1))
def inputs(shape, kind="mild"):
    b, t, h, k, v = shape
    keys = jax.random.split(jax.random.key(0), 4)
    q, key, value = (jax.random.normal(x, (b, t, h, n), jnp.bfloat16) for x, n in zip(keys, (k, k, v), strict=False))
    g = gates(kind, (b, t, h, k), keys[3]).astype(jnp.bfloat16)
    if kind == "packed":
        return q, key, value, g, jnp.broadcast_to(jnp.arange(t) % (t // 16) == 0, (b, t))
    return q, key, value, g


def milliseconds(f, *args, calls=30, repeats=7):
    out = jax.block_until_ready(f(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = f(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return sorted(times)[repeats // 2] * 1e3


@functools.cache
def call(k, config=None):
    """The forward without states; one function for all gates, so that a shape compiles once."""
    return jax.jit(
        lambda q, key, value, g, starts=None: forward(q, key, value, g, k**-0.5, starts=starts, config=config)[0]
    )


@functools.cache
def call_with_states():
    return jax.jit(lambda q, k, v, g, state, starts=None: forward(q, k, v, g, 1.0, state, True, starts=starts))


def ready(shape, kinds=("mild",), config=None, lower=False):
    """The compiled call and its arguments for each kind of gates."""
    f = call(shape[3], config)
    if lower:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
            for kind in kinds:
                jax.jit(f).trace(*jax.eval_shape(lambda kind=kind: inputs(shape, kind))).lower(
                    lowering_platforms=("cuda",)
                )
        return {}
    with compiling():
        arguments = {kind: jax.block_until_ready(inputs(shape, kind)) for kind in kinds}
        form = lambda args: (args[3].ndim, len(args))
        programs = {form(args): args for args in arguments.values()}
        programs = {which: f.lower(*args).compile() for which, args in programs.items()}
    return {kind: (programs[form(args)], args) for kind, args in arguments.items()}


def timed(shape, kind="mild", config=None, lower=False, prepared=None):
    from jax.experimental.mosaic.gpu import profiler

    prepared = prepared or ready(shape, (kind,), config, lower)
    if lower:
        return {"lowered": True}
    b, t, h, k, v = shape
    f, args = prepared[kind]
    with alone():
        ms = milliseconds(f, *args)
        _, of_kernels = profiler.measure(f, iterations=11)(*args)
    if of_kernels is None:
        raise RuntimeError("the profiler saw no kernel")
    flop = b * h * t * (4 * k * v + 2 * 64 * v + 4 * 64 * k)
    rates = {"TB/s": b * h * t * (6 * k + 4 * v) / ms / 1e9, "TFLOP/s": flop / ms / 1e9}
    return {"ms": ms, "of kernels": sorted(of_kernels)[5]} | rates


def small(kind, k, v, time_steps=1000):
    q, key, value, g, *starts = inputs((2, time_steps, 4, k, v), kind)
    return q, key, value, g, jax.random.normal(jax.random.key(1), (2, 4, k, v)), *starts


@jax.jit
def equal(a, b):
    return jnp.all(jnp.array([jnp.array_equal(x, y) for x, y in zip(a, b, strict=True)]))


def recurrence(q, k, v, g, state, *starts):
    q, k, v, g, state = (np.asarray(x, np.float64) for x in (q, k, v, g, state))
    for where in starts:
        g = np.where(np.asarray(where)[..., None, None], -np.inf, g)
    decay, out = np.exp(np.broadcast_to(g.reshape(*g.shape, *[1] * (4 - g.ndim)), k.shape)), []
    for i in range(q.shape[1]):
        state = decay[:, i, :, :, None] * state + k[:, i, :, :, None] * v[:, i, :, None, :]
        out.append(np.einsum("bhk,bhkv->bhv", q[:, i], state))
    return np.stack(out, 1), state


def run_ceilings(lower):
    if lower:
        return
    x = jnp.ones((2**28,), jnp.bfloat16)
    yield "copy", {"TB/s": 4 * x.size / milliseconds(jax.jit(lambda x: x + 1), x, calls=10) / 1e9}
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    yield "matmul", {"TFLOP/s": 2 * 8192**3 / milliseconds(jax.jit(lambda a: a @ a), a, calls=10) / 1e9}
    for b, t in ((32, 1024), (8, 2048), (2, 8192), (1, 16384)):
        qkv = jax.random.normal(jax.random.key(0), (3, b, t, 16, 128), jnp.bfloat16)
        attend = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"))
        yield f"cuDNN attention {(b, t, 16, 128)}", {"ms": milliseconds(attend, *qkv)}


def run_check(lower):
    for k, v in ((64, 128), (128, 128), (128, 256), (256, 512)):
        for kind in ("mild", *GATES):
            if lower:
                yield f"{k}x{v} {kind}", timed((2, 1000, 4, k, v), kind, lower=True)
                continue
            args = small(kind, k, v)
            pairs = zip(call_with_states()(*args), recurrence(*args), strict=True)
            errors = [np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2) / np.mean(y**2)) for x, y in pairs]
            yield f"{k}x{v} {kind}", {"o": errors[0], "state": errors[1]}


def run_bits(lower):
    if lower:
        return
    for k, v in ((64, 128), (128, 128), (128, 256), (256, 512)):
        for kind in ("mild", "resets", "tenth"):
            args = small(kind, k, v, 2000)
            first = call_with_states()(*args)
            same = sum(bool(equal(first, call_with_states()(*args))) for _ in range(100))
            yield f"{k}x{v} {kind}", {"runs of 100 with the same bits": same}


def run_bars(lower, shapes=tuple(BARS)):
    for shape in shapes:
        yield str(shape), timed(shape, lower=lower) | {"to reach": BARS[shape]}


def run_gates(lower, shapes=tuple(BARS)):
    for shape in shapes:
        prepared = ready(shape, ("mild", *GATES), lower=lower)
        mild = timed(shape, lower=lower, prepared=prepared)
        for kind, most in GATES.items():
            result = timed(shape, kind, lower=lower, prepared=prepared)
            ratio = {} if lower else {"ratio": result["of kernels"] / mild["of kernels"]}
            yield f"{shape} {kind}", result | ratio | {"at most": most}


def tunings(chosen):
    """The table's tuning, and some beside it."""
    yield chosen
    if isinstance(chosen, tuple):
        gate, scan = chosen
        yield gate, dataclasses.replace(scan, slots=scan.slots + 1)
        yield gate, dataclasses.replace(scan, matmul_groups=3 - scan.matmul_groups)
        yield gate, dataclasses.replace(scan, splits=max(1, scan.splits // 2))
    else:
        yield dataclasses.replace(chosen, g_slots=chosen.g_slots // 2)
        yield dataclasses.replace(chosen, v_slots=chosen.v_slots + 1)


def run_tune(lower):
    for shape in BARS:
        b, t, h, k, v = shape
        for config in dict.fromkeys(
            tunings(choose_forward(k, v, b * h, -(-t // 64), jnp.dtype(jnp.bfloat16), may_split=t % 64 == 0))
        ):
            try:
                yield f"{shape} {config}", timed(shape, config=config, lower=lower)
            except ValueError as error:
                yield f"{shape} {config}", {"refused": str(error)}


def run_group(group, lower, *shapes):
    for name, result in globals()[f"run_{group}"](lower, *shapes):
        print(json.dumps({"group": group, "name": name} | result), flush=True)


def show(line):
    numbers = (f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in line.items())
    print(", ".join(numbers), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="of " + ", ".join(GROUPS))
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")
    parser.add_argument("--lower", action="store_true", help="only lower each kernel for an H100")
    parser.add_argument("--here", action="store_true", help="run in this process, without a time limit")
    parser.add_argument("--shape", type=int, help="the number of the one shape that bars or gates take")
    options = parser.parse_args()
    if options.here:
        for group in options.groups:
            run_group(group, options.lower, *([[list(BARS)[options.shape]]] if options.shape is not None else []))
        return
    # The groups' processes need the memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    words = ["python", "-m", "benchmarks.op_gpu", *sys.argv[1:]]
    what = "op_gpu" if "bars" in (options.groups or GROUPS) else "op_gpu, values"
    lines, record = [], begin(what, words, packages=(), device="lowered only" if options.lower else None)

    writing = threading.Lock()

    def place(line):
        shapes = [i for i, shape in enumerate(BARS) if line["name"].startswith(str(shape))]
        return GROUPS.index(line["group"]), *shapes

    def add(line):
        with writing:
            lines.append(line)
            lines.sort(key=place)
            show(line)
            if options.out:
                options.out.write_text(json.dumps(record | {"results": lines}, indent=1) + "\n")

    def run(group, *more):
        command = [sys.executable, "-m", "benchmarks.op_gpu", group, "--here", *more] + ["--lower"] * options.lower
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            limit = threading.Timer(LIMIT_S, process.kill)
            limit.start()
            for text in process.stdout or ():
                add(json.loads(text))
            limit.cancel()
        if process.returncode:
            add({"group": group, "name": "FAILED or hung", "exit status": process.returncode})

    for group in options.groups or GROUPS:
        # A process each shape: they compile beside each other and time one at a time.
        shapes = {"bars": range(len(BARS)), "gates": range(len(BARS))}.get(group)
        with ThreadPoolExecutor(len(BARS)) as pool:
            list(pool.map(lambda i, group=group: run(group, "--shape", str(i)), shapes) if shapes else [run(group)])


if __name__ == "__main__":
    main()
