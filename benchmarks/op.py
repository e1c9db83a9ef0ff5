"""Times the op's implementations, and the peers that are installed, in one run on one device; writes one JSON file.

    pip install --no-deps jax-linear-attention==0.1.0 && pip install equinox      # the peer, for the CPU's run
    python benchmarks/op.py cpu --out benchmarks/results/op-cpu.json
    python benchmarks/op.py gpu --out benchmarks/results/op-xla-h100.json

Milliseconds are medians over repeats; each repeat runs every entry once, so that drift falls on all alike.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import sys
import time

import jax
import jax.numpy as jnp

from gla_jax import gated_linear_attention

# name: ((b, t, h, k, v), dtype, calls a timing)
CASES = {
    "cpu": ((1, 2048, 4, 128, 256), jnp.float32, 1),
    "gpu": ((8, 2048, 4, 256, 512), jnp.bfloat16, 10),
}


def gates(kind: str, key, shape) -> jax.Array:
    """Log decays: "mild" are the published models', "strong" have a tenth of their values from -5 to -inf."""
    g = jax.nn.log_sigmoid(jax.random.normal(key, shape)) / 16
    if kind == "mild":
        return g
    if kind == "logsigmoid":
        return 16 * g
    choice = jax.random.choice(jax.random.fold_in(key, 1), jnp.array([-5.0, -50.0, -1e4, -jnp.inf]), shape)
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 2), 0.1, shape), choice, g)


def entries(device: str, peers: list[str]):
    """(name, forward, gate kind) of all that is timed."""

    def ours(implementation):
        return lambda q, k, v, g: gated_linear_attention(q, k, v, g, implementation=implementation)[0]

    yield "xla", ours("xla"), "mild"
    yield "xla, logsigmoid(randn) gates", ours("xla"), "logsigmoid"
    yield "xla, a tenth of the gates from -5 to -inf", ours("xla"), "strong"
    if device == "cpu":
        yield "reference", ours("reference"), "mild"
    if "jla" in peers:
        from jla import ops  # pyrefly: ignore[missing-import]

        yield "jax-linear-attention", lambda q, k, v, g: ops.linear_attention("gla", q, k, v, g=g)[0], "mild"


def with_backward(forward):
    """The forward and the gradients of q, k, v and g for a cotangent do."""

    def run(q, k, v, g, do):
        o, pull = jax.vjp(forward, q, k, v, g)
        return o, pull(do)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("device", choices=CASES)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=["jla"], help="peers to time: jla (only on a CPU)")
    args = parser.parse_args()
    shape, dtype, calls = CASES[args.device]
    b, t, h, k, v = shape
    keys = jax.random.split(jax.random.key(0), 5)
    widths = (k, k, v, v)
    q, key, value, do = (jax.random.normal(i, (b, t, h, d), dtype) for i, d in zip(keys[:4], widths, strict=True))

    peers = args.peers if args.device == "cpu" else []
    runs, times = [], {}
    for name, forward, kind in entries(args.device, peers):
        inputs = (q, key, value, gates(kind, keys[4], (b, t, h, k)).astype(dtype))
        runs.append((name, "forward", jax.jit(forward), inputs))
        runs.append((name, "forward + backward", jax.jit(with_backward(forward)), (*inputs, do)))
    for _, _, f, inputs in runs:
        jax.block_until_ready(f(*inputs))
    for _ in range(args.repeats):
        for name, what, f, inputs in runs:
            start = time.perf_counter()
            jax.block_until_ready([f(*inputs) for _ in range(calls)][-1])
            times.setdefault(name, {}).setdefault(what, []).append((time.perf_counter() - start) / calls * 1e3)

    table = {name: {what: sorted(ms)[len(ms) // 2] for what, ms in row.items()} for name, row in times.items()}
    for name, row in table.items():
        print(f"{name:45} " + "  ".join(f"{what} {ms:9.3f} ms" for what, ms in row.items()))
    ours = table["xla"]
    for name in ("jax-linear-attention", "reference"):
        if name in table:
            ratio = ours["forward + backward"] / table[name]["forward + backward"]
            print(f"xla / {name}, forward + backward: {ratio:.3f}")
    packages = ["jax", "jaxlib", *(["jax-linear-attention"] if peers else [])]
    record = {
        "what": "op",
        "command": "python " + " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(jax.devices()[0].device_kind),
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "shape_bthkv": shape,
        "dtype": jnp.dtype(dtype).name,
        "repeats": args.repeats,
        "milliseconds": table,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
