"""Checks and times the Mosaic GPU backward on one Hopper GPU. Each line is printed as it is known.

    python -m benchmarks.backward_gpu                             # every group, one to two minutes
    python -m benchmarks.backward_gpu times --out benchmarks/results/backward-h100.json
    python -m benchmarks.backward_gpu --lower                     # no GPU: only lowers each kernel for an H100

Values: RMS(error) / RMS(reference) of every gradient against the recurrence in float64. Milliseconds are medians of 8
runs of each kernel, by CUPTI: compiling takes most of the time here, so every line has a process of its own, which
compiles beside the others and takes the GPU for itself when it measures.
"""

import argparse
import json
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from benchmarks.op_gpu import H100, inputs
from benchmarks.processes import alone, each
from gla_jax.pallas import backward, forward, forward_and_states, saves_states
from gla_jax.pallas.backward import Gradients
from gla_jax.records import begin
from gla_jax.reference import recurrence

# (b, t, h, k, v) and the milliseconds to reach, forward and backward (issue 4).
BARS = {
    (8, 2048, 4, 256, 512): 0.60,
    (32, 1024, 4, 256, 512): 1.15,
    (1, 16384, 4, 256, 512): 0.75,
    (8, 2048, 16, 128, 128): 0.58,
    (2, 8192, 16, 64, 128): 0.45,
    (8, 2048, 4, 128, 256): 0.26,
}
CHECKED = [(2, 300, 2, 128, 128), (2, 300, 2, 64, 128), (2, 300, 2, 128, 256), (1, 1100, 1, 256, 512)]
KINDS = ("mild", "logsigmoid", "resets", "packed", "tenth", "all strong")
LIMIT_S = 90


def cotangents(shape):
    b, t, h, k, v = shape
    first, second, third = jax.random.split(jax.random.key(1), 3)
    do = jax.random.normal(first, (b, t, h, v), jnp.bfloat16)
    return do, *(jax.random.normal(key, (b, h, k, v)) for key in (second, third))


def both(do, q, k, v, g, starts=None):
    """o and the gradients, as the op computes them."""
    if not saves_states(q, k, v, g):
        return forward(q, k, v, g, 1.0, starts=starts)[0], backward(q, k, v, g, 1.0, None, do, starts=starts)
    o, _, states = forward_and_states(q, k, v, g, 1.0, starts=starts)
    return o, backward(q, k, v, g, 1.0, None, do, starts=starts, saved=states)


def compiled(f, *args, lower):
    """f, compiled for arguments of these shapes; with `lower` only lowered for an H100, and None."""
    if not lower:
        return jax.jit(f).lower(*args).compile()
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
    return None


def kernels(run, *args, runs=8):
    """Milliseconds of a compiled call, and of each of its kernels above 3 us."""
    from jax.experimental.mosaic.gpu import profiler

    with alone():
        jax.block_until_ready(run(*args))
        jax.block_until_ready(run(*args))
        _, measured = profiler.measure(run, aggregate=False, iterations=runs)(*args)
    if measured is None:
        raise RuntimeError("the profiler saw no kernel")
    median = lambda x: sorted(x)[len(x) // 2]
    each = [(one[0][0], median([ms for _, ms in one])) for one in zip(*measured, strict=True)]
    total = median([sum(ms for _, ms in one) for one in measured])
    return {"ms": total, "kernels": [[name, round(ms, 4)] for name, ms in each if ms > 3e-3]}


def check(shape, kind, lower):
    def run(q, k, v, g, state, do, dfinal, *starts):
        return backward(q, k, v, g, 1.0, state, do, dfinal, starts=starts[0] if starts else None)

    (q, k, v, g, *starts), (do, state, dfinal) = inputs(shape, kind), cotangents(shape)
    run = compiled(run, q, k, v, g, state, do, dfinal, *starts, lower=lower)
    if run is None:
        return {"lowered": True}
    with alone():
        got = jax.device_get(run(q, k, v, g, state, do, dfinal, *starts))
    for where in starts:
        g = jnp.where(where[..., None, None], -jnp.inf, g)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, g, state)]
        _, pull = jax.vjp(lambda q, k, v, g, state: recurrence(q, k, v, g, state, 1.0), *wide)
        want = pull(tuple(jnp.asarray(np.asarray(x, np.float64)) for x in (do, dfinal)))
    errors = {}
    for name, x, y in zip(Gradients._fields, got, want, strict=True):
        y = np.nan_to_num(np.asarray(y))
        errors[name] = float(np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2) / np.mean(y**2)))
    return errors


def times(shape, kind, lower):
    shapes = jax.eval_shape(lambda: (cotangents(shape)[0], *inputs(shape, kind)))
    run = compiled(both, *shapes, lower=lower)
    if run is None:
        return {"lowered": True}
    return kernels(run, cotangents(shape)[0], *inputs(shape, kind)) | {"to reach": BARS[shape]}


def bits(shape, kind, lower):
    shapes = jax.eval_shape(lambda: (cotangents(shape)[0], *inputs(shape, kind)))
    run = compiled(lambda *args: both(*args)[1][:4], *shapes, lower=lower)
    if run is None:
        return {"lowered": True}
    args = cotangents(shape)[0], *inputs(shape, kind)
    same = jax.jit(lambda a, b: jnp.all(jnp.array([jnp.array_equal(x, y) for x, y in zip(a, b, strict=True)])))
    with alone():
        first = run(*args)
        return {"runs of 100 with the same bits": sum(bool(same(first, run(*args))) for _ in range(100))}


FIRST = (8, 2048, 16, 128, 128)
GROUPS = {
    "check": (check, [(shape, kind) for shape in CHECKED for kind in KINDS]),
    "bits": (
        bits,
        [(FIRST, "mild"), (FIRST, "tenth"), ((2, 8192, 16, 64, 128), "mild"), ((8, 2048, 4, 256, 512), "mild")],
    ),
    "times": (times, [(shape, "mild") for shape in BARS]),
    "gates": (
        times,
        [(FIRST, kind) for kind in KINDS[1:]]
        + [((8, 2048, 4, 256, 512), kind) for kind in ("resets", "packed", "tenth", "all strong")],
    ),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="of " + ", ".join(GROUPS))
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")
    parser.add_argument("--lower", action="store_true", help="only lower each kernel for an H100")
    parser.add_argument("--line", type=int, help="this line of one group alone, in this process")
    options = parser.parse_args()
    if options.line is not None:
        measure, lines = GROUPS[options.groups[0]]
        shape, kind = lines[options.line]
        name = {"group": options.groups[0], "shape": shape, "gates": kind}
        print(json.dumps(name | measure(shape, kind, options.lower)), flush=True)
        return
    lines = [(group, i) for group in options.groups or GROUPS for i in range(len(GROUPS[group][1]))]
    commands = [[group, "--line", str(i), *["--lower"] * options.lower] for group, i in lines]
    results = {}
    for place, result in each("benchmarks.backward_gpu", commands, min(8, os.cpu_count() or 1), LIMIT_S):
        group, i = lines[place]
        results[place] = {"group": group, "line": i} | result if "FAILED" in result else result
        print(json.dumps(results[place]), flush=True)
    if options.out:
        words = ["python", "-m", "benchmarks.backward_gpu", *sys.argv[1:]]
        report = begin("backward_gpu", words, packages=(), device="lowered only" if options.lower else None)
        report |= {"results": [results[place] for place in sorted(results)]}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
