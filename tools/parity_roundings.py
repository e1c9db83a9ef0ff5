"""How far each rounding to bfloat16, ours or fla's, moves a GLA or RetNet model's logits; on a CPU.

    python -c "import pathlib, parity_gpu as p; p.make('gla', pathlib.Path('/tmp/gla'), False)"  # in tools/, with fla
    python tools/parity_roundings.py /tmp/gla/theirs --out benchmarks/results/parity-roundings.json

Reads checkpoints that tools/parity_gpu.py made of fla's classes, and computes everything in float32 (the op also in
float64), with a rounding wherever one of the two has one: what the projections, norms and gates write, and inside the
op, whose chunks of 64 tokens are as ours (gla_jax/pallas) or as theirs (fla/ops/gla/chunk.py, common/chunk_h.py and
chunk_o.py of 0.6.0). Beside each choice stand RMS(x - y) / RMS(y) of the logits to theirs and to float32.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from parity_gpu import ratio, tokens  # pyrefly: ignore[missing-import]
from safetensors.numpy import load_file

from gla_jax.records import begin

jax.config.update("jax_enable_x64", True)
CHUNK, SUB = 64, 16
LOWER = np.tril(np.ones((CHUNK, CHUNK), np.float32))
Array = jax.Array


class Roundings(NamedTuple):
    """Who rounds where."""

    any: bool = True
    """False: nothing is rounded."""
    op: str = "ours"
    """Inside the op: ours, theirs (in float64 but for its roundings), none, "ours but" q~ and k~, A, or the state."""
    gate: str = "ours"
    """The log decay: ours once, theirs after the product, after logsigmoid and after the quotient."""
    norm_of_sum: str = "ours"
    """The MLP's norm: ours of the rounded sum, theirs of the sum before it is rounded."""
    rotation: str = "ours"
    """Cosine and sine: theirs rounded."""
    logits: str = "ours"
    """Theirs rounded."""
    swish: str = "once"
    """Or "each": every step of swish, the heads' norm, and the products."""


OURS = Roundings()
THEIRS = Roundings(op="theirs", gate="theirs", norm_of_sum="theirs", rotation="theirs", logits="theirs")
NONE = Roundings(any=False, op="none")
CHOICES = {
    "ours": OURS,
    "ours, swish and gate step by step": OURS._replace(swish="each"),
    "ours, their rotation": OURS._replace(rotation="theirs"),
    "ours, norm of the unrounded sum": OURS._replace(norm_of_sum="theirs"),
    "ours, q~ and k~ exact": OURS._replace(op="ours but q~ and k~"),
    "ours, A exact": OURS._replace(op="ours but A"),
    "ours, state exact": OURS._replace(op="ours but state"),
    "ours, the op exact": OURS._replace(op="none"),
    "theirs": THEIRS,
    "ours, their op": OURS._replace(op="theirs"),
    "theirs, our op": THEIRS._replace(op="ours"),
    "theirs, our op, q~ and k~ exact": THEIRS._replace(op="ours but q~ and k~"),
    "theirs, the op exact": THEIRS._replace(op="none"),
    "theirs, our gate": THEIRS._replace(gate="ours"),
    "theirs, the op in float64 but for its roundings": THEIRS._replace(op="theirs in float64"),
    "theirs, norm of the rounded sum": THEIRS._replace(norm_of_sum="ours"),
    "float32": NONE,
}


def half(x: Array) -> Array:
    """Rounded to bfloat16."""
    return jax.lax.reduce_precision(x, 8, 7)


def tf32(x: Array) -> Array:
    """Rounded as a tensor core takes float32."""
    return jax.lax.reduce_precision(x, 8, 10)


def scan(q: Array, k: Array, v: Array, g: Array, kind: str) -> Array:
    """The gated scan over q, k, v, g [b, t, h, ...] in chunks; g a number a channel, or [h] for all tokens."""
    scale, scalar = q.shape[-1] ** -0.5, g.ndim == 1
    if scalar:
        g = jnp.broadcast_to(g[:, None], (*q.shape[:3], 1))
    if kind in ("none", "theirs in float64"):
        q, k, v, g = (x.astype(jnp.float64) for x in (q, k, v, g))
    kind = kind.removesuffix(" in float64")
    chunked = (x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:]).transpose(1, 0, 3, 2, 4) for x in (q, k, v, g))
    exact = lambda x: x
    r = {name: exact if kind in ("none", f"ours but {name}") else half for name in ("q~ and k~", "A", "state")}

    def one(state: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, v, g = chunk
        b = jnp.cumsum(g, -2)
        total = b[..., -1:, :]
        decay, grown = jnp.exp(b), jnp.exp(total - b)
        keep = jnp.swapaxes(jnp.exp(total), -1, -2)
        if scalar:
            a = q @ jnp.swapaxes(k, -1, -2) * jnp.exp(jnp.minimum(b - jnp.swapaxes(b, -1, -2), 0)) * LOWER
            if kind == "theirs":
                o = scale * (q @ half(state)) * decay + scale * (half(a) @ v)
                return keep * state + jnp.swapaxes(k, -1, -2) @ half(v * grown), o
            o = scale * (r["q~ and k~"](q * decay) @ r["state"](state) + r["A"](a) @ v)
            return keep * state + jnp.swapaxes(r["q~ and k~"](k * grown), -1, -2) @ v, o
        if kind == "theirs":
            o = scale * (half(q * decay) @ half(state)) + half(scores(q, k, b) * scale) @ v
            return keep * state + jnp.swapaxes(half(k * grown), -1, -2) @ v, o
        root, centred = jnp.sqrt(keep), b - total / 2
        q, k = r["q~ and k~"](q * jnp.exp(centred)), r["q~ and k~"](k * jnp.exp(-centred))
        a = r["A"](q @ jnp.swapaxes(k, -1, -2) * LOWER)
        o = scale * (q @ r["state"](root * state) + a @ v)
        return root * (root * state + jnp.swapaxes(k, -1, -2) @ v), o

    start = jnp.zeros((q.shape[0], q.shape[2], q.shape[3], v.shape[3]), q.dtype)
    o = jax.lax.scan(one, start, tuple(chunked))[1]
    return o.transpose(1, 0, 3, 2, 4).reshape(v.shape[0], v.shape[1], q.shape[2], -1).astype(jnp.float32)


def scores(q: Array, k: Array, b: Array) -> Array:
    """Their scores of a chunk: within a sub-chunk in float32, of others in TF32, from the sub-chunk's start."""
    a = jnp.zeros((*q.shape[:-1], CHUNK), q.dtype)
    for i in range(0, CHUNK, SUB):
        for j in range(0, i + 1, SUB):
            start = b[..., i : i + 1, :]
            x = q[..., i : i + SUB, :] * jnp.exp(b[..., i : i + SUB, :] - start)
            y = jnp.swapaxes(k[..., j : j + SUB, :] * jnp.exp(start - b[..., j : j + SUB, :]), -1, -2)
            a = a.at[..., i : i + SUB, j : j + SUB].set(x @ y if i == j else tf32(x) @ tf32(y))
    return a * LOWER


@functools.partial(jax.jit, static_argnums=(0, 3))
def logits(shape: tuple[int, int, float, bool], weights: dict[str, Array], x: Array, r: Roundings) -> Array:
    """Of tokens x; shape is the number of layers and of heads, the norms' epsilon, and whether it is a RetNet."""
    layers, heads, eps, retnet = shape
    rounded: Callable[[Array], Array] = half if r.any else lambda x: x
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)

    def norm(x: Array, scale: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale

    def gated(x: Array, gate: Array) -> Array:
        if r.swish == "once":
            return rounded(jax.nn.silu(gate) * x)
        return half(half(gate * half(1 / half(1 + half(jnp.exp(-gate))))) * half(x))

    x = weights["model.embeddings.weight"][x]
    for layer in range(layers):
        own = lambda name, layer=layer: weights[f"model.layers.{layer}.{name}"]
        dense = lambda x, name, own=own: x @ own(f"{name}.weight").T
        y = rounded(norm(x, own("attn_norm.weight")))
        q, k, v, gate = (rounded(dense(y, f"attn.{name}_proj")) for name in "qkvg")
        q, k = split(q), split(k)
        if retnet:
            q, k = (rounded(rotate(z, r.any and r.rotation == "theirs")) for z in (q, k))
            g = jnp.log1p(-(2.0 ** (-5 - jnp.arange(heads, dtype=jnp.float32))))
        else:
            g = dense(rounded(dense(y, "attn.gk_proj.0")), "attn.gk_proj.1") + own("attn.gk_proj.1.bias")
            theirs = half if r.any and r.gate == "theirs" else lambda x: x
            g = split(rounded(theirs(jax.nn.log_sigmoid(theirs(g))) / 16))
        o = rounded(scan(q, k, split(v), g, r.op))
        o = norm(o, own("attn.g_norm_swish_gate.weight")).reshape(gate.shape)
        total = x + rounded(dense(gated(o, gate), "attn.o_proj"))
        x = rounded(total)
        y = rounded(norm(total if r.norm_of_sum == "theirs" else x, own("mlp_norm.weight")))
        gate, up = (rounded(dense(y, f"mlp.{name}_proj")) for name in ("gate", "up"))
        x = rounded(x + rounded(dense(gated(up, gate), "mlp.down_proj")))
    y = rounded(norm(x, weights["model.norm.weight"])) @ weights["lm_head.weight"].T
    return half(y) if r.any and r.logits == "theirs" else y


def rotate(x: Array, rounded: bool) -> Array:
    """Rotary embedding of heads x [b, t, h, k]."""
    width = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None, None] * 10000.0 ** (-jnp.arange(width, dtype=jnp.float32) / width)
    cos, sin = (half(f(angle)) if rounded else f(angle) for f in (jnp.cos, jnp.sin))
    left, right = x[..., :width], x[..., width:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1).astype(jnp.float32)


def run(path: pathlib.Path) -> dict[str, Any]:
    """Every choice of one checkpoint's."""
    config = json.loads((path / "config.json").read_text())
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_heads", "intermediate_size")
    shape = tuple(config[name] for name in ("num_hidden_layers", "num_heads", "norm_eps"))
    shape = (*shape, config["model_type"] == "retnet")
    weights = {name: jnp.asarray(x) for name, x in load_file(path / "model.safetensors").items()}
    of = lambda choice: np.asarray(logits(shape, weights, jnp.asarray(tokens(False)), choice))
    theirs, full = of(THEIRS), of(NONE)
    found, other = {}, "gate" if shape[-1] else "rotation"
    for name, choice in CHOICES.items():
        if getattr(choice, other) != getattr(THEIRS if name.startswith("theirs") else OURS, other):
            continue
        y = of(choice)
        found[name] = {
            "to theirs": ratio(y, theirs),
            "to float32": ratio(y, full),
            "to float32, first tokens left out": ratio(y[:, 1:], full[:, 1:]),
        }
    return {"options": {name: config[name] for name in names}, "of": found}


def main() -> None:
    """All checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=pathlib.Path, nargs="+", help="folders of fla's GLA or RetNet models")
    parser.add_argument("--out", type=pathlib.Path, help="where the result goes")
    options = parser.parse_args()
    record: dict[str, Any] = {
        **begin("parity, rounding by rounding", ["python", "tools/parity_roundings.py", *sys.argv[1:]], packages=()),
        "tokens_bt": list(tokens(False).shape),
        "results": {},
    }
    for path in options.checkpoints:
        record["results"][path.parent.name] = result = run(path)
        print(path.parent.name, json.dumps(result, indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
