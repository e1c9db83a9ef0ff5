"""Times the op beside what a user would pick instead, on one GPU and in one run: forward, and forward and backward.

    python -m benchmarks.peers                                      # gla_jax and cuDNN attention: nothing to install
    python -m benchmarks.peers gla_jax attention fla jla --out benchmarks/results/peers-h100.json
    python -m benchmarks.peers fla --rows 0 1                       # of the shapes below, by their place

Peers: `attention` is causal softmax attention by cuDNN with 16 heads of 128, the width of all these shapes; `fla` is
flash-linear-attention's chunk_gla (PyTorch, Triton; its wheels flash-linear-attention and fla-core); `jla` is
jax-linear-attention's GLA (its wheel, and equinox). Inputs are normal, bfloat16, log-gates logsigmoid(normal) / 16.
Milliseconds are medians of 7 repeats of 20 calls. Each line has a process and a time limit of its own:
flash-linear-attention tries hundreds of kernels first, for minutes a shape, unless TRITON_CACHE_DIR holds its choices.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

# (b, t, h, k, v): milliseconds to reach forward (issue 3), and forward and backward (issue 4).
ROWS = {
    (8, 2048, 4, 256, 512): (0.12, 0.60),
    (32, 1024, 4, 256, 512): (0.22, 1.15),
    (1, 16384, 4, 256, 512): (0.16, 0.75),
    (8, 2048, 16, 128, 128): (0.13, 0.58),
    (32, 1024, 16, 128, 128): (0.25, None),
    (2, 8192, 16, 64, 128): (0.13, 0.45),
    (8, 2048, 4, 128, 256): (0.07, 0.26),
}
PACKAGES = {"gla_jax": "jax", "attention": "jax", "fla": "flash-linear-attention", "jla": "jax-linear-attention"}
LIMIT_S = 120


def milliseconds(call, wait, calls=20, repeats=7):
    wait(call())
    wait(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls - 1):
            call()
        wait(call())
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e3


def in_jax(op, *args):
    """Forward, and forward and backward, of a JAX function of arrays, and what waits for them."""
    import jax
    import jax.numpy as jnp

    do = jax.random.normal(jax.random.key(7), jax.eval_shape(op, *args).shape, jnp.bfloat16)

    def both(do, *args):
        o, pull = jax.vjp(op, *args)
        return o, pull(do)

    return functools.partial(jax.jit(op), *args), functools.partial(jax.jit(both), do, *args), jax.block_until_ready


def gla_jax(shape):
    import gla_jax
    from benchmarks.op_gpu import inputs

    op = lambda q, k, v, g: gla_jax.gated_linear_attention(q, k, v, g, implementation="mosaic_gpu")[0]
    return in_jax(op, *inputs(shape))


def attention(shape):
    import jax
    import jax.numpy as jnp

    q, k, v = (jax.random.normal(jax.random.key(i), (*shape[:2], 16, 128), jnp.bfloat16) for i in range(3))
    return in_jax(functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"), q, k, v)


def jla(shape):
    from jla import ops  # pyrefly: ignore[missing-import]

    from benchmarks.op_gpu import inputs

    return in_jax(lambda q, k, v, g: ops.linear_attention("gla", q, k, v, g=g, impl="mosaic_gpu")[0], *inputs(shape))


def fla(shape):
    import torch  # pyrefly: ignore[missing-import]
    from fla.ops.gla import chunk_gla  # pyrefly: ignore[missing-import]

    b, t, h, k, v = shape
    normal = lambda d: torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16)
    gate = torch.nn.functional.logsigmoid(torch.randn(b, t, h, k, device="cuda")) / 16
    args, do = [x.requires_grad_() for x in (normal(k), normal(k), normal(v), gate.bfloat16())], normal(v)
    forward = lambda: chunk_gla(*args)[0]
    return forward, lambda: torch.autograd.grad(forward(), args, do), lambda _: torch.cuda.synchronize()


def measure(peer, shape):
    forward, both, wait = globals()[peer](shape)
    return {"forward": milliseconds(forward, wait), "forward and backward": milliseconds(both, wait)}


def line(peer, row):
    """One measurement in a process of its own."""
    shape = list(ROWS)[row]
    command = [sys.executable, "-m", "benchmarks.peers", peer, "--rows", str(row), "--here"]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    run = subprocess.run(["timeout", str(LIMIT_S), *command], capture_output=True, text=True, env=environment)
    told = run.stderr.strip().splitlines()[-1:] or [f"no answer in {LIMIT_S} s"]
    result = json.loads(run.stdout.splitlines()[-1]) if run.returncode == 0 else {"failed": told[0][:200]}
    return {"peer": peer, "shape": shape} | result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", choices=[*PACKAGES, []], help="of " + ", ".join(PACKAGES))
    parser.add_argument("--rows", type=int, nargs="+", choices=range(len(ROWS)), default=range(len(ROWS)))
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the results")
    parser.add_argument("--here", action="store_true", help="one line, in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.peers[0], list(ROWS)[options.rows[0]])))
        return
    peers, results = options.peers or ["gla_jax", "attention"], []
    for row in options.rows:
        for peer in peers:
            results.append(line(peer, row))
            print(json.dumps(results[-1]), flush=True)
    if options.out:
        import jax

        report = {
            "what": "peers",
            "command": " ".join(["python -m benchmarks.peers", *sys.argv[1:]]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": jax.devices()[0].device_kind,
            "versions": {PACKAGES[peer]: importlib.metadata.version(PACKAGES[peer]) for peer in peers},
            "to reach": [[*shape, *bars] for shape, bars in ROWS.items()],
            "results": results,
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
