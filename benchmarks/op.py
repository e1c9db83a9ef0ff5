"""Times the op beside what a user would pick instead, forward and with the backward, on one device, and writes JSON.

    gla-jax bench op                                                            # "gpu" where there is one, else "cpu"
    python -m benchmarks.op gpu --out benchmarks/results/op-h100.json
    python -m benchmarks.op cpu --out benchmarks/results/op-cpu.json            # pip install ".[peers]"
    python -m benchmarks.op peers --out benchmarks/results/peers-h100.json      # and the same, on a GPU
    python -m benchmarks.op slow-peers --limit 1200                             # minutes a line
    python -m benchmarks.op --small                                             # to see that it runs

"attention" is causal softmax attention with 16 heads of 128, the width of the shapes, by cuDNN on GPUs. "fla" is
flash-linear-attention's chunk_gla (PyTorch, Triton), which tries hundreds of kernels the first time that it sees a pair
of widths, for minutes, unless TRITON_CACHE_DIR holds its choices: "peers" has the widths 256 and 512 alone of it,
"slow-peers" the others. "jla" is jax-linear-attention's GLA. Inputs are normal, gates logsigmoid(normal) / 16 unless it
says otherwise. Each line has a process and a time limit of its own: they compile beside each other (but not those of
"cpu"), and are timed one by one, those of each peer after all before. Milliseconds are medians of repeats; the file is
written after each line.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import plots
from benchmarks.processes import alone, compiling, each
from gla_jax.records import begin

Shape = tuple[int, int, int, int, int]
WIDE, NARROW = (8, 2048, 4, 256, 512), (8, 2048, 16, 128, 128)
# (b, t, h, k, v)
SHAPES: list[Shape] = [
    *(WIDE, (32, 1024, 4, 256, 512), (1, 16384, 4, 256, 512)),
    *(NARROW, (32, 1024, 16, 128, 128), (2, 8192, 16, 64, 128), (8, 2048, 4, 128, 256)),
]
GATES = {"mild": "", "logsigmoid": ", logsigmoid(normal) gates", "strong": ", a tenth of the gates from -5 to -inf"}
PACKAGES = {"fla": "flash-linear-attention", "jla": "jax-linear-attention"}
HERE: Shape = (1, 2048, 4, 128, 256)
SMALL: Shape = (1, 64, 1, 64, 64)
# The kind of record, and each line's name, gates and shape. jla has kernels for widths of 64 and 128 alone.
SETS: dict[str, tuple[str, list[tuple[str, str, Shape]]]] = {
    "cpu": ("op", [*(("xla", g, HERE) for g in GATES), ("reference", "mild", HERE), ("jla", "mild", HERE)]),
    "gpu": (
        "op",
        [
            *((name, gates, WIDE) for name in ("mosaic_gpu", "xla") for gates in GATES),
            *((name, "mild", NARROW) for name in ("mosaic_gpu", "xla")),
            ("attention", "mild", NARROW),
        ],
    ),
    "peers": (
        "peers",
        [
            *(("mosaic_gpu", "mild", shape) for shape in SHAPES),
            *(("attention", "mild", (b, t, 16, 128, 128)) for b, t in dict.fromkeys(x[:2] for x in SHAPES)),
            *(("jla", "mild", shape) for shape in (NARROW, (2, 8192, 16, 64, 128))),
            *(("fla", "mild", shape) for shape in SHAPES[:3]),
        ],
    ),
    "slow-peers": ("peers", [("fla", "mild", shape) for shape in SHAPES[3:]]),
}
LIMIT_S = 120


def milliseconds(call: Callable, wait: Callable, calls: int, repeats: int) -> float:
    """Of one call, in a row of calls that are waited for together."""
    wait(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        wait(call())
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def in_jax(op: Callable, *args: Any) -> tuple[Callable, Callable, Callable]:
    """Forward, and forward and backward, of a JAX function of arrays, and what waits for them."""
    import jax

    out = jax.eval_shape(op, *args)
    do = jax.random.normal(jax.random.key(7), out.shape, out.dtype)

    def both(do, *args):
        o, pull = jax.vjp(op, *args)
        return o, pull(do)

    return functools.partial(jax.jit(op), *args), functools.partial(jax.jit(both), do, *args), jax.block_until_ready


def inputs(shape: Shape, kind: str) -> tuple[Any, Any, Any, Any]:
    """q, k, v and log decays: bfloat16 on GPUs, else float32."""
    import jax
    import jax.numpy as jnp

    b, t, h, k, v = shape
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    keys = jax.random.split(jax.random.key(0), 6)
    q, key, value = (jax.random.normal(i, (b, t, h, d), dtype) for i, d in zip(keys, (k, k, v), strict=False))
    g = jax.nn.log_sigmoid(jax.random.normal(keys[3], (b, t, h, k)))
    if kind != "logsigmoid":
        g = g / 16
    if kind == "strong":
        choice = jax.random.choice(keys[4], jnp.array([-5.0, -50.0, -1e4, -jnp.inf]), g.shape)
        g = jnp.where(jax.random.bernoulli(keys[5], 0.1, g.shape), choice, g)
    return q, key, value, g.astype(dtype)


def calls_of(name: str, gates: str, shape: Shape) -> tuple[Callable, Callable, Callable]:
    """Forward, forward and backward, and what waits for them, of a line."""
    if name == "fla":
        return fla(shape)
    import jax

    if name == "attention":
        cudnn = "cudnn" if jax.default_backend() == "gpu" else None
        attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=cudnn)
        b, t, h, width, _ = shape
        return in_jax(attend, *inputs((b, t, h, width, width), "mild")[:3])
    if name == "jla":
        from jla import ops  # pyrefly: ignore[missing-import]

        return in_jax(lambda q, k, v, g: ops.linear_attention("gla", q, k, v, g=g)[0], *inputs(shape, gates))
    from gla_jax import gated_linear_attention

    which: Any = name
    ours = lambda q, k, v, g: gated_linear_attention(q, k, v, g, implementation=which)[0]
    return in_jax(ours, *inputs(shape, gates))


def fla(shape: Shape) -> tuple[Callable, Callable, Callable]:
    import torch  # pyrefly: ignore[missing-import]
    from fla.ops.gla import chunk_gla  # pyrefly: ignore[missing-import]

    b, t, h, k, v = shape
    normal = lambda d: torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16)
    gate = torch.nn.functional.logsigmoid(torch.randn(b, t, h, k, device="cuda")) / 16
    args, do = [x.requires_grad_() for x in (normal(k), normal(k), normal(v), gate.bfloat16())], normal(v)
    forward = lambda: chunk_gla(*args)[0]
    return forward, lambda: torch.autograd.grad(forward(), args, do), lambda _: torch.cuda.synchronize()


def device_of(name: str) -> tuple[str, bool]:
    """What a line was measured on, and whether that is a GPU."""
    if name == "fla":
        import torch  # pyrefly: ignore[missing-import]

        return torch.cuda.get_device_name(), True
    import jax

    return jax.devices()[0].device_kind, jax.default_backend() == "gpu"


def measure(name: str, gates: str, shape: Shape) -> dict[str, Any]:
    device, gpu = device_of(name)
    how = (20, 7) if gpu else (1, 7)
    with compiling():
        forward, both, wait = calls_of(name, gates, shape)
        wait(forward())
        wait(both())
    with alone():
        row = {
            "forward": milliseconds(forward, wait, *how),
            "forward and backward": milliseconds(both, wait, *how),
        }
    dtype = "bfloat16" if gpu else "float32"
    return {"op": PACKAGES.get(name, name) + GATES[gates], "shape": shape, "dtype": dtype, **row, "device": device}


def missing(name: str) -> str | None:
    """Why a line cannot be measured here."""
    if name in PACKAGES and importlib.util.find_spec(name) is None:
        return f"{PACKAGES[name]} is not installed: pip install '.[peers]'"
    return None


def default() -> str:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the lines need the memory
    import jax

    return "gpu" if jax.default_backend() == "gpu" else "cpu"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="?", choices=SETS, help="by default what suits this machine: gpu or cpu")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the record")
    names = dict.fromkeys(line[0] for _, lines in SETS.values() for line in lines)
    parser.add_argument("--ops", nargs="+", choices=names, default=list(names), help="the lines of these alone")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds of a line, its wait for others included")
    parser.add_argument("--small", action="store_true", help="64 tokens and channels, and xla in place of mosaic_gpu")
    parser.add_argument("--line", type=int, help="this line alone, in this process")
    given = parser.parse_args(arguments)
    which = given.lines or default()
    what, lines = SETS[which]
    if given.small:
        lines = list(dict.fromkeys((name.replace("mosaic_gpu", "xla"), gates, SMALL) for name, gates, _ in lines))
    if given.line is not None:
        row = measure(*lines[given.line])
        print(json.dumps(row), flush=True)
        return row
    rows: dict[int, dict[str, Any]] = {}
    failed = [[*line, why] for line in lines if line[0] in given.ops and (why := missing(line[0]))]
    for *line, why in failed:
        print(f"{line} left out: {why}", flush=True)
    here = [i for i, line in enumerate(lines) if line[0] in given.ops and not missing(line[0])]
    peers = {PACKAGES[lines[i][0]] for i in here if lines[i][0] in PACKAGES}
    words = ["python", "-m", "benchmarks.op", *(sys.argv[1:] if arguments is None else arguments)]
    record = begin(what, words, sorted(peers), device="no line has been measured")
    # A line waits for all that compile: what a peer takes for that, or hangs in, must cost the others nothing.
    parts = [[i for i in here if (lines[i][0] if lines[i][0] in PACKAGES else "") == name] for name in ("", *PACKAGES)]
    at_once = (
        1 if which == "cpu" else 2 * (os.cpu_count() or 1)
    )  # even a process that starts would slow the others there
    for part in parts:
        commands = [[which, *["--small"] * given.small, "--line", str(i)] for i in part]
        for place, row in each("benchmarks.op", commands, at_once, given.limit) if part else ():
            i = part[place]
            if "FAILED" in row:
                failed.append([*lines[i], row["FAILED"]])
                print(f"{lines[i]} FAILED: {row['FAILED']}", flush=True)
            else:
                record["device"], rows[i] = row.pop("device"), row
                times = ", ".join(f"{x} {row[x]:.3f} ms" for x in ("forward", "forward and backward"))
                print(f"{row['op']}, {tuple(row['shape'])}, {row['dtype']}: {times}", flush=True)
            record |= {"results": [rows[i] for i in sorted(rows)], "failed": failed}
            if given.out is not None:
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(record, indent=1) + "\n")
    plots.draw_or_say_why(given.out)
    return record


if __name__ == "__main__":
    main()
