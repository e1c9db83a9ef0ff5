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

# If gla_jax is not installed yet, it is from SOURCE: the checkout that this notebook lies in or, in Colab, a zip of it
# that you have uploaded ("gla_jax.zip"); "git+https://..." of a repository that you trust will do, too.
SOURCE = ".."
if importlib.util.find_spec("gla_jax") is None:
    source = SOURCE if "://" in SOURCE else pathlib.Path(SOURCE).resolve().as_uri()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"gla_jax[notebooks] @ {source}"], check=True)

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

from gla_jax import gated_linear_attention
from gla_jax.nn import CausalLM, CausalLMConfig, GatedLinearAttention, GatedLinearAttentionConfig, generate
from gla_jax.nn.config import MIXERS
from gla_jax.train import TrainConfig, load_corpus, load_model
from gla_jax.train import train as train_run

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


layer = SpreadGate(64, num_heads=2, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (2, 64, 64))
print(layer(x).shape, "decays from", float(layer.decay(x).min()), "to", float(layer.decay(x).max()))

# %% [markdown]
# ## Checks
#
# What a gate must not break: decoding token by token is the same function, no token sees the future, and gradients are
# those of the recurrence.

# %%
whole = layer(x)
y, cache = layer.prefill(x[:, :56], layer.init_cache(2))
for i in range(56, 64):
    y, cache = layer.step(x[:, i], cache)
np.testing.assert_allclose(y, whole[:, -1], rtol=1e-3, atol=1e-5)

changed = layer(x.at[:, 50:].set(0.0))
np.testing.assert_allclose(changed[:, :50], whole[:, :50], rtol=1e-4, atol=1e-6)

graphdef, params = nnx.split(layer)
slow = nnx.merge(graphdef, params)
slow.implementation = "reference"
of = lambda module: nnx.grad(lambda module: (module(x) ** 2).sum())(module)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), of(layer), of(slow))
print("the same")

# %% [markdown]
# ## Two models
#
# The same but for the gate, from the same seed.


# %%
def make(mixer, seed=0):
    sizes = {"vocab_size": 256, "hidden_size": 96, "num_layers": 2, "mlp_size": 192, "tie_embeddings": True}
    return CausalLM(CausalLMConfig(mixer=mixer, init_std=0.05, **sizes), rngs=nnx.Rngs(seed))


options = {"num_heads": 2, "conv_size": 4}
mixers = {"GLA": GatedLinearAttentionConfig(**options), "spread": SpreadGateConfig(**options)}
for name, mixer in mixers.items():
    print(f"{name:8s}", sum(p.size for p in jax.tree.leaves(nnx.state(make(mixer)))), "parameters")

# %%
corpus, length, rows = load_corpus(), 128, 4
optimizer_of = lambda steps: optax.adamw(optax.cosine_decay_schedule(4e-3, steps), weight_decay=0.01)


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def step(model, optimizer, tokens):
    loss, grads = nnx.value_and_grad(loss_of)(model, tokens)
    optimizer.update(model, grads)
    return loss


evaluate = nnx.jit(loss_of)


def windows(stream, count, seed):
    starts = np.random.default_rng(seed).integers(0, len(stream) - length - 1, (count, rows))
    return np.stack([[stream[s : s + length + 1] for s in row] for row in starts]).astype(np.int32)


# %%
steps = 80
train, held_out = windows(corpus.train, steps, 0), windows(corpus.validation, 10, 1)
models, curves = {}, {}
for name, mixer in mixers.items():
    model = models[name] = make(mixer)
    optimizer = nnx.Optimizer(model, optimizer_of(steps), wrt=nnx.Param)
    curves[name] = [float(step(model, optimizer, batch)) for batch in train]
    score = np.mean([float(evaluate(model, batch)) for batch in held_out])
    print(f"{name:8s} held out: {score / np.log(2):.3f} bits a byte")

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
tokens = jnp.asarray(held_out[0])
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
# To train it as `gla-jax train` does, with checkpoints, a log and the same data, give it a name, which the run's folder keeps. Here
# are a few steps of a model that is smaller than the command's:

# %%
MIXERS["spread"] = SpreadGateConfig
model = CausalLMConfig.tiny("spread").replace(hidden_size=64, num_layers=2, mlp_size=128)
with tempfile.TemporaryDirectory() as folder:
    result = train_run(TrainConfig(run=Path(folder), model=model, steps=20, length=64, sample=0))
    again = load_model(Path(folder))  # in another process too, once the name is given there
print(f"held out: {result.bits_per_byte:.2f} bits a byte")

# %% [markdown]
# A gate with a formula that no layer has can use the op itself, with `g` of any of its shapes:

# %%
q = jax.random.normal(jax.random.key(1), (1, 64, 2, 16))
by_clock = -jnp.where(jnp.arange(64) % 16 == 0, jnp.inf, 0.01)[None, :, None]  # all forgotten every 16 tokens
o, state = gated_linear_attention(q, q, q, jnp.broadcast_to(by_clock, (1, 64, 2)), output_final_state=True)
print(o.shape, state.shape)
