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
# # 2. A GLA layer in your own Flax model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload)
#
# `GatedLinearAttention` is a Flax NNX module like any other: `x [b, t, d]` to `[b, t, d]`. Here it stands in a small classifier, once in
# NNX and once in Linen, on a task that needs memory: a marker stands somewhere in a sequence of letters and again at its end, and
# the label is the letter that came after the first one.

# %%
import importlib.util
import pathlib
import subprocess
import sys

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen, nnx

from gla_jax.nn import GatedLinearAttention, RMSNorm, SwiGLU

plt.rcParams.update({"figure.dpi": 70, "figure.figsize": (7, 3)})

# %%
letters, length, width = 8, 32, 32
marker = letters


def batch(key, size=64):
    """Sequences [b, t] with a marker in their first half and at the end, and the letter after the first [b]."""
    first, second = jax.random.split(key)
    x = jax.random.randint(first, (size, length), 0, letters)
    place = jax.random.randint(second, (size,), 0, length // 2)
    x = x.at[jnp.arange(size), place].set(marker)
    label = x[jnp.arange(size), place + 1]
    return x.at[:, -1].set(marker), label


x, label = batch(jax.random.key(0), 2)
print(*x[0], "->", label[0])

# %% [markdown]
# ## NNX
#
# A block as in the paper: norm, mixing over time, norm, MLP, each added to what came in. `conv_size` puts a short convolution
# before the op, by which a token knows its neighbour. Everything that the library exports can be replaced by parts of your own.


# %%
class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.norm_1, self.norm_2 = RMSNorm(width, rngs=rngs), RMSNorm(width, rngs=rngs)
        self.mix = GatedLinearAttention(width, num_heads=2, conv_size=2, init_std=0.1, rngs=rngs)
        self.mlp = SwiGLU(width, 2 * width, init_std=0.1, rngs=rngs)

    def __call__(self, x):
        x = x + self.mix(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Classifier(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(letters + 1, width, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(width, letters, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, -1])


model = Classifier(rngs=nnx.Rngs(0))
print("parameters:", sum(p.size for p in jax.tree.leaves(nnx.state(model))))

# %%
optimizer = nnx.Optimizer(model, optax.adam(5e-3), wrt=nnx.Param)


def loss_of(logits, label):
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


@nnx.jit
def step(model, optimizer, key):
    x, label = batch(key)
    loss, grads = nnx.value_and_grad(lambda model: loss_of(model(x), label))(model)
    optimizer.update(model, grads)
    return loss


steps = 150
in_nnx = [float(step(model, optimizer, jax.random.key(i))) for i in range(steps)]
x, label = batch(jax.random.key(10**6), 500)
print("right on new sequences:", float(jnp.mean(model(x).argmax(-1) == label)))

# %% [markdown]
# ## One token at a time
#
# The layer's memory is a state of constant size. `init_cache`, `prefill` and `step` are the same function as the call, so a model
# that streams needs no past tokens:

# %%
layer = model.blocks[0].mix
x = jax.random.normal(jax.random.key(1), (1, 20, width))
whole = layer(x)
y, cache = layer.prefill(x[:, :15], layer.init_cache(1))
for i in range(15, 20):
    y, cache = layer.step(x[:, i], cache)
print("largest difference at the last token:", float(jnp.abs(y - whole[:, -1]).max()))
print({name: array.shape for name, array in cache.items()})

# %% [markdown]
# ## Several sequences in one row
#
# `segment_ids` packs them: no sequence sees the one before, in the op or in the convolution. A negative id is padding.

# %%
ids = jnp.array([[0] * 8 + [1] * 9 + [-1] * 3])
packed, alone = layer(x, ids), layer(x[:, 8:17])
print("largest difference:", float(jnp.abs(packed[:, 8:17] - alone).max()))

# %% [markdown]
# ## Linen
#
# `flax.nnx.bridge.to_linen` makes a Linen module of any of the layers; parameters get the same names.


# %%
class LinenClassifier(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(letters + 1, width)(tokens)
        options = {"num_heads": 2, "conv_size": 2, "init_std": 0.1}
        for i in range(2):
            layer = nnx.bridge.to_linen(GatedLinearAttention, width, name=f"gla_{i}", **options)
            x = x + layer(linen.RMSNorm()(x))
            x = x + linen.Dense(width)(jax.nn.silu(linen.Dense(2 * width)(linen.RMSNorm()(x))))
        return linen.Dense(letters)(x[:, -1])


module = LinenClassifier()
params = linen.meta.unbox(module.init(jax.random.key(0), batch(jax.random.key(0))[0]))["params"]
jax.tree.map(jnp.shape, params["gla_0"])

# %%
adam = optax.adam(5e-3)


@jax.jit
def linen_step(params, moments, key):
    x, label = batch(key)
    loss, grads = jax.value_and_grad(lambda p: loss_of(module.apply({"params": p}, x), label))(params)
    updates, moments = adam.update(grads, moments)
    return optax.apply_updates(params, updates), moments, loss


moments, in_linen = adam.init(params), []
for i in range(steps):
    params, moments, loss = linen_step(params, moments, jax.random.key(i))
    in_linen.append(float(loss))

# %%
for name, losses in (("NNX", in_nnx), ("Linen", in_linen)):
    plt.plot(losses, label=name)
plt.axhline(float(jnp.log(letters)), color="grey", linestyle=":", label="guessing")
plt.xlabel("step")
plt.ylabel("loss")
_ = plt.legend()

# %% [markdown]
# For a language model there is no need to build one: `gla_jax.nn.CausalLM` takes any of the layers, or a pattern of them. On to
# [3](3_train_and_sample.ipynb), which trains one.
