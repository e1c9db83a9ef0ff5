# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. A new gate
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload)
#
# A research variation from end to end: an idea for a gate, the layer, checks, a comparison on text, a look at what it learned. The
# op is exact for every gate between 0 and 1, so a new one is a few lines of plain JAX.
#
# **The idea.** GLA's gate is $\alpha = \sigma(x W_1 W_2 + b)^{1/16}$ with $b = 0$ at the start: every channel begins with the same
# half-life, 16 tokens. RetNet instead gives heads constants that reach from short to long. Let us have both: a gate that
# depends on the data, whose biases start so that half-lives spread evenly, on a log scale, from 2 to 512 tokens.

# %%
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

# If gla_jax is not installed yet, it is from the checkout that this notebook lies in or, where there is none (Colab),
# from SOURCE: a zip of a checkout that you have uploaded, or "git+https://..." of a repository that you trust.
SOURCE = "gla_jax.zip"
if importlib.util.find_spec("gla_jax") is None:
    source, checkout = SOURCE, pathlib.Path("..").resolve()
    if (checkout / "gla_jax" / "attention.py").is_file():
        source = checkout.as_uri()
    elif "://" not in SOURCE:
        source = pathlib.Path(SOURCE).resolve(strict=True).as_uri()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"gla_jax[notebooks] @ {source}"], check=True)

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

from gla_jax import gated_linear_attention
from gla_jax.nn import CausalLMConfig, GatedLinearAttention, GatedLinearAttentionConfig, generate
from gla_jax.nn.config import MIXERS
from gla_jax.train import TrainConfig, load_corpus, load_model, train

plt.rcParams.update({"figure.dpi": 70, "figure.figsize": (7, 3)})

# %% [markdown]
# ## The layer
#
# A layer asks its method `decay` for the log decays: `[..., heads, k]` for a gate a channel. Ours is $-\mathrm{softplus}$, which is at most 0
# and never saturates. A config names its options and builds it; that is all that models ask for.


# %%
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpreadGateConfig(GatedLinearAttentionConfig):
    shortest: float = 2.0
    longest: float = 512.0

    def build(self, hidden_size: int, **common: Any) -> "SpreadGate":
        return SpreadGate(hidden_size, **self.options(), **common)


class SpreadGate(GatedLinearAttention):
    def __init__(self, hidden_size, *, shortest=2.0, longest=512.0, rngs, **options):
        super().__init__(hidden_size, rngs=rngs, **options)
        half_life = jnp.geomspace(shortest, longest, self.gate_up.out_features)
        rate = jnp.log(2) / half_life  # softplus(bias) = rate
        self.gate_up.bias[...] = jnp.log(jnp.expm1(rate)).astype(self.gate_up.bias.dtype)

    def decay(self, x, layer_input=None):
        g = -jax.nn.softplus(self.gate_up(self.gate_down(x)).astype(jnp.float32))
        return g.reshape(*x.shape[:-1], self.num_kv_heads, self.head_k)


call = nnx.jit(lambda layer, x: layer(x))
layer = SpreadGate(64, num_heads=2, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (2, 64, 64))
print(call(layer, x).shape, "decays from", float(layer.decay(x).min()), "to", float(layer.decay(x).max()))

# %% [markdown]
# ## Checks
#
# What a gate must not break: decoding token by token is the same function, no token sees the future, and gradients are
# those of the recurrence.

# %%
assert (layer.decay(x) <= 0).all(), "a log decay above 0 lets the state grow"
whole = call(layer, x)
y, cache = nnx.jit(lambda layer, x, cache: layer.prefill(x, cache))(layer, x[:, :56], layer.init_cache(2))
decode = nnx.jit(lambda layer, x, cache: layer.step(x, cache))
for i in range(56, 64):
    y, cache = decode(layer, x[:, i], cache)
np.testing.assert_allclose(y, whole[:, -1], rtol=1e-3, atol=1e-5)

changed = call(layer, x.at[:, 50:].set(0.0))
np.testing.assert_allclose(changed[:, :50], whole[:, :50], rtol=1e-4, atol=1e-6)

graphdef, params = nnx.split(layer)
slow = nnx.merge(graphdef, params)
slow.implementation = "reference"
of = nnx.jit(nnx.grad(lambda layer, x: (layer(x) ** 2).sum()))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), of(layer, x), of(slow, x))
print("the same")

# %% [markdown]
# ## Two models
#
# The same but for the gate, from the same seed, trained as `gla-jax train` does it, on a text file. The name in `MIXERS` is what a run's
# folder keeps of the new gate; another process that loads the run has to give it, too. Change the formula, and take a new folder: a run in an
# old one goes on from where the old gate was.

# %%
MIXERS["spread"] = SpreadGateConfig
folder, length = Path(tempfile.mkdtemp()), 128
corpus = load_corpus()
(folder / "mine.txt").write_bytes(bytes(corpus.train[:500_000]).replace(b"\xff", b"\n"))

options = {"num_heads": 2, "conv_size": 4}
mixers = {"GLA": GatedLinearAttentionConfig(**options), "spread": SpreadGateConfig(**options)}
sizes = {"vocab_size": 256, "hidden_size": 96, "num_layers": 2, "mlp_size": 192, "tie_embeddings": True}
how = {"data": folder / "mine.txt", "steps": 80, "length": length, "optimizer": "adamw", "sample": 0}
models, curves = {}, {}
for name, mixer in mixers.items():
    model = CausalLMConfig(mixer=mixer, init_std=0.05, **sizes)
    result = train(TrainConfig(run=folder / name, model=model, **how))
    models[name] = load_model(result.run)
    records = [json.loads(line) for line in (result.run / "log.jsonl").read_text().splitlines()]
    curves[name] = [record["loss"] for record in records if "loss" in record]
    print(f"{name:8s} held out: {result.bits_per_byte:.3f} bits a byte")

# %%
smooth = lambda x: np.convolve(x, np.ones(10) / 10, "valid")
for name, losses in curves.items():
    plt.plot(smooth(losses), label=name)
plt.xlabel("step")
plt.ylabel("loss, mean of 10 steps")
_ = plt.legend()

# %% [markdown]
# One seed and a few steps of a tiny model say little: before believing a difference, take several seeds and train longer. What can be
# looked at is *what* the gates do.

# %%
tokens = jnp.asarray(corpus.validation[: 4 * length].reshape(4, length), jnp.int32)
for name, model in models.items():
    graphdef, params = nnx.split(model.layers)
    first = nnx.merge(graphdef, jax.tree.map(lambda p: p[0], params))  # blocks are stacked; take the first
    g = first.mixer.decay(first.mixer_norm(model.embed(tokens)))
    half_life = np.log(2) / -np.asarray(g.mean((0, 1))).ravel()
    plt.semilogy(np.sort(half_life), label=name)
plt.xlabel("channel of the first layer, sorted")
plt.ylabel("half-life, tokens")
_ = plt.legend()

# %% [markdown]
# A model with the new gate generates, packs documents, shards and so on as any other:

# %%
prompt = [list(b"KING. ")]
out = generate(models["spread"], prompt, 80, key=jax.random.key(0), temperature=0.7)
print(bytes(out[0].tolist()).decode(errors="replace"))

# %% [markdown]
# A gate with a formula that no layer has can use the op itself, with `g` of any of its shapes:

# %%
q = jax.random.normal(jax.random.key(1), (1, 64, 2, 16))
by_clock = -jnp.where(jnp.arange(64) % 16 == 0, jnp.inf, 0.01)[None, :, None]  # all forgotten every 16 tokens
o, state = gated_linear_attention(q, q, q, jnp.broadcast_to(by_clock, (1, 64, 2)), output_final_state=True)
print(o.shape, state.shape)
