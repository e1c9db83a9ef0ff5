"""Writes trained_gates.npz: the gates of a tiny GLA model, trained on Shakespeare until some are strong.

    python tests/data/make_trained_gates.py

Plain JAX and the op. Training stops when some channel's decay over some 64 tokens of held-out text is below exp(-130);
four rows of that layer, the strongest one first, are kept in float16: g [rows, t, hk, k].
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gla_jax import gated_linear_attention
from gla_jax.train.corpus import load_corpus

LAYERS, WIDTH, HEADS, KEY, VALUE, RANK = 2, 96, 3, 16, 32, 16
BATCH, TIME, RATE, STEPS = 8, 256, 3e-3, 4000
WINDOW, ENOUGH = 64, -130.0


def initial(rng):
    def normal(rows, columns):
        return jnp.asarray(rng.normal(0, rows**-0.5, (rows, columns)), jnp.float32)

    layer = {
        "q": (WIDTH, HEADS * KEY),
        "k": (WIDTH, HEADS * KEY),
        "v": (WIDTH, HEADS * VALUE),
        "low": (WIDTH, RANK),
        "gate": (RANK, HEADS * KEY),
        "o": (HEADS * VALUE, WIDTH),
        "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH),
    }
    layers = [{name: normal(*shape) for name, shape in layer.items()} for _ in range(LAYERS)]
    return {"embed": normal(256, WIDTH) * 1.6, "layers": layers, "head": normal(WIDTH, 256)}


def norm(x):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def forward(params, tokens):
    x, gates = params["embed"][tokens], []
    for p in params["layers"]:
        y = norm(x)
        q, k, v = ((y @ p[name]).reshape(*x.shape[:2], HEADS, -1) for name in "qkv")
        g = jax.nn.log_sigmoid(y @ p["low"] @ p["gate"]).reshape(k.shape) / 16
        o, _ = gated_linear_attention(q, k, v, g)
        x = x + norm(o).reshape(*x.shape[:2], -1) @ p["o"]
        x = x + jax.nn.silu(norm(x) @ p["up"]) @ p["down"]
        gates.append(g)
    return norm(x) @ params["head"], gates


def loss(params, tokens):
    logits, _ = forward(params, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def main():
    corpus, rng = load_corpus(), np.random.default_rng(0)
    params = initial(rng)
    optimizer = optax.adam(RATE)
    held_out = jnp.asarray(corpus.validation[: BATCH * TIME].reshape(BATCH, TIME), jnp.int32)

    @jax.jit
    def step(params, state, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for i in range(STEPS):
        at = rng.integers(0, corpus.train.size - TIME - 1, BATCH)
        tokens = jnp.asarray(np.stack([corpus.train[j : j + TIME + 1] for j in at]), jnp.int32)
        params, state, value = step(params, state, tokens)
        if i % 50 == 49:
            _, gates = jax.jit(forward)(params, held_out)
            gates = np.stack(gates).astype(np.float64)  # [layer, b, t, hk, k]
            sums = np.cumsum(np.pad(gates, ((0, 0), (0, 0), (1, 0), (0, 0), (0, 0))), 2)
            decay = sums[:, :, WINDOW:] - sums[:, :, :-WINDOW]
            print(f"step {i + 1}: loss {value:.3f}, worst sum over {WINDOW} tokens {decay.min():.1f}", flush=True)
            if decay.min() < ENOUGH:
                break
    worst_of = decay.min((2, 3, 4))
    layer, row = np.unravel_index(worst_of.argmin(), worst_of.shape)
    rows = [row, *(r for r in range(BATCH) if r != row)][:4]
    path = Path(__file__).with_name("trained_gates.npz")
    np.savez_compressed(path, g=gates[layer, rows].astype(np.float16), loss=np.float32(value), steps=i + 1)
    print(f"{path}: {path.stat().st_size} bytes, layer {layer}, worst sum {worst_of.min():.1f}")


if __name__ == "__main__":
    main()
