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
# # 1. From the recurrence to the chunkwise form
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload)
#
# Gated linear attention ([arXiv 2312.06635](https://arxiv.org/abs/2312.06635)) is a recurrence over a matrix state. Token by
# token it is slow; this notebook derives the form by chunks, sees where the textbook version breaks, and mends it.

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

import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from gla_jax import gated_linear_attention

plt.rcParams.update({"figure.dpi": 70, "figure.figsize": (7, 3), "image.cmap": "magma"})

# %% [markdown]
# ## The recurrence
#
# One head. Queries and keys have $k$ channels, values $v$. The state $S$ is a $k \times v$ matrix, and each of its rows decays by
# a gate $\alpha_t = e^{g_t}$ of its own (equation 3 of the paper):
#
# $$S_t = \mathrm{Diag}(\alpha_t)\, S_{t-1} + k_t^\top v_t \qquad o_t = q_t S_t$$

# %%
t, k, v = 64, 8, 16
keys = jax.random.split(jax.random.key(0), 4)
q, key = (jax.random.normal(i, (t, k)) for i in keys[:2])
value = jax.random.normal(keys[2], (t, v))
g = jax.nn.log_sigmoid(jax.random.normal(keys[3], (t, k))) / 4


def recurrence(q, key, value, g):
    def token(state, x):
        q, key, value, g = x
        state = jnp.exp(g)[:, None] * state + jnp.outer(key, value)
        return state, q @ state

    return jax.lax.scan(token, jnp.zeros((k, v)), (q, key, value, g))[1]


o = recurrence(q, key, value, g)

# %% [markdown]
# The library's op takes arrays `[b, t, h, k]`, and gives the same:

# %%
batched = (x[None, :, None] for x in (q, key, value, g))
by_op, _ = gated_linear_attention(*batched, scale=1.0)
print("largest difference:", float(jnp.abs(by_op[0, :, 0] - o).max()))

# %% [markdown]
# ## Decays
#
# Left: the gates. Middle: what is left of a token written at 0, channel by channel, $b_t = \prod_{i \le t} \alpha_i$. Right: for one
# channel the whole matrix of decays from token $j$ (column) to token $i$ (row), $e^{G_i - G_j}$, where $G = \log b$.

# %%
total = jnp.cumsum(g, 0)
decays = jnp.exp(jnp.tril(total[:, None, 0] - total[None, :, 0])) * jnp.tril(jnp.ones((t, t)))
figure, axes = plt.subplots(1, 3, figsize=(10, 3))
axes[0].imshow(jnp.exp(g).T, aspect="auto", vmin=0, vmax=1)
axes[0].set(title="gates", xlabel="token", ylabel="channel")
axes[1].semilogy(jnp.exp(total))
axes[1].set(title="decay from the start", xlabel="token")
axes[2].imshow(decays, vmin=0, vmax=1)
axes[2].set(title="decay, channel 0", xlabel="from token", ylabel="to token")
figure.tight_layout()

# %% [markdown]
# ## All tokens at once
#
# Unrolled, $o_i = \sum_{j \le i} \big(\sum_c q_{ic}\, k_{jc}\, e^{G_{ic} - G_{jc}}\big) v_j$. The sum over channels becomes a matrix product once
# the exponential is split, $e^{G_i} \cdot e^{-G_j}$: queries times $b$, keys divided by $b$.
#
# $$O = \big(((Q \odot B)(K / B)^\top) \odot M\big) V$$


# %%
def parallel(q, key, value, g):
    b = jnp.exp(jnp.cumsum(g, 0))
    return jnp.tril((q * b) @ (key / b).T) @ value


print("largest difference:", float(jnp.abs(parallel(q, key, value, g) - o).max()))

# %% [markdown]
# The second factor grows without bound. Here are both forms against the recurrence in float64 as gates get stronger: the split
# one loses digits and then overflows, and the op does not mind.


# %%
def exact(q, key, value, g):
    q, key, value, g = (np.asarray(x, np.float64) for x in (q, key, value, g))
    state, out = np.zeros((k, v)), []
    for i in range(len(q)):
        state = np.exp(g[i])[:, None] * state + np.outer(key[i], value[i])
        out.append(q[i] @ state)
    return np.stack(out)


def op(q, key, value, g):
    return gated_linear_attention(*(x[None, :, None] for x in (q, key, value, g)), scale=1.0)[0][0, :, 0]


strengths = np.geomspace(0.25, 256, 11)
for name, f in (("all at once", parallel), ("op", op)):
    errors = [np.sqrt(np.mean((f(q, key, value, s * g) - exact(q, key, value, s * g)) ** 2)) for s in strengths]
    plt.loglog(strengths, np.where(np.isfinite(errors), errors, np.nan), "o-", label=name)
    print(f"{name:12s}", " ".join(f"{e:.0e}" for e in errors))
plt.xlabel("gates times")
plt.ylabel("rms error")
_ = plt.legend()

# %% [markdown]
# ## Chunks
#
# Cut time into chunks of $c$ tokens. What a chunk needs of the past is one state. With the decays from the chunk's start to each
# token (`prefix`) and from each token to its end (`suffix`), both at most 1,
#
# $$S' = \mathrm{Diag}(\gamma) S + (K \odot \mathrm{suffix})^\top V \qquad
#   O = (Q \odot \mathrm{prefix})\, S + O_\mathrm{inside}$$
#
# and only $O_\mathrm{inside}$, over $c$ tokens, still needs the form of above. Memory for states falls from one a token to
# one a chunk, and nearly all work is matrix products.


# %%
def chunkwise(q, key, value, g, chunk, inside):
    state, out = jnp.zeros((k, v)), []
    for start in range(0, len(q), chunk):
        part = slice(start, start + chunk)
        total = jnp.cumsum(g[part], 0)
        suffix = jnp.cumsum(g[part][::-1], 0)[::-1] - g[part]
        scores = inside(q[part], key[part], g[part])
        out.append((q[part] * jnp.exp(total)) @ state + scores @ value[part])
        state = jnp.exp(total[-1])[:, None] * state + (key[part] * jnp.exp(suffix)).T @ value[part]
    return jnp.concatenate(out)


def split_scores(q, key, g):
    b = jnp.exp(jnp.cumsum(g, 0))
    return jnp.tril((q * b) @ (key / b).T)


for chunk in (4, 16, 64):
    error = jnp.abs(chunkwise(q, key, value, g, chunk, split_scores) - o).max()
    print(f"chunks of {chunk:2d}: largest difference {error:.1e}")

# %% [markdown]
# ## Two levels of chunks
#
# The paper cuts a chunk again, into sub-chunks (section 4.3). For sub-chunk $a$ after sub-chunk $b$, the decay from a token of $b$
# to one of $a$ passes $a$'s first row: *to that row* and *from that row* are both sums of logs of decays, at most 0, so a matrix
# product is safe. Only the sub-chunks on the diagonal take the exact sum over channels.


# %%
def two_level_scores(q, key, g, sub=8):
    n = len(q) // sub
    total, rows = jnp.cumsum(g, 0), []
    for a in range(n):
        i = slice(a * sub, (a + 1) * sub)
        start = total[a * sub] - g[a * sub]
        left = (q[i] * jnp.exp(total[i] - start)) @ (key[: a * sub] * jnp.exp(start - total[: a * sub])).T
        gap = jnp.minimum(total[i][:, None] - total[i][None], 0)
        diagonal = jnp.tril(jnp.einsum("ic,jc,ijc->ij", q[i], key[i], jnp.exp(gap)))
        rows.append(jnp.concatenate([left, diagonal, jnp.zeros((sub, len(q) - (a + 1) * sub))], 1))
    return jnp.concatenate(rows)


for strength in (1, 16, 256):
    got = chunkwise(q, key, value, strength * g, 32, two_level_scores)
    print(f"gates times {strength:3d}: largest error {np.abs(got - exact(q, key, value, strength * g)).max():.1e}")

# %% [markdown]
# ## Halves of halves
#
# The library's `"xla"` goes on until nothing is left on the diagonal. Across the middle of a block, the decay is (middle to $i$) times
# ($j$ to middle); each half is a smaller block. Six levels make a chunk of 64, all of them matrix products of factors at
# most 1, and no logarithm is ever subtracted: even $g = -\infty$ is exact.


# %%
def picture(n, level_of):
    return np.array([[level_of(i, j) if i >= j else np.nan for j in range(n)] for i in range(n)])


n, sub, chunk = 64, 8, 32
kinds = lambda i, j: 0 if i // chunk != j // chunk else 1 if i // sub != j // sub else 2
level = lambda i, j: 6 - int(i ^ j).bit_length() if i != j else 6
figure, axes = plt.subplots(1, 2, figsize=(9, 4))
axes[0].imshow(picture(n, kinds), cmap="viridis")
axes[0].set_title("two levels: through the state, product, exact sum", fontsize=9)
axes[1].imshow(picture(n, level), cmap="viridis")
axes[1].set_title("halves of halves: a colour a level", fontsize=9)
for axis in axes:
    axis.set(xlabel="token j", ylabel="token i")

# %%
resets = jnp.where(jax.random.bernoulli(jax.random.key(9), 0.1, g.shape), -jnp.inf, g)
print("with a tenth of all gates -inf:", float(np.abs(op(q, key, value, resets) - exact(q, key, value, resets)).max()))

# %% [markdown]
# ## What it buys
#
# The same op by name: `"reference"` is the recurrence, `"xla"` the chunks, here on a CPU, forward and backward.


# %%
def seconds(implementation, length):
    shape = (1, length, 4, 64)
    q, key, value, g = (jax.random.normal(i, shape) for i in keys)
    loss = lambda *x: gated_linear_attention(*x, implementation=implementation)[0].sum()
    f = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    x = (q, key, value, jax.nn.log_sigmoid(g) / 16)
    jax.block_until_ready(f(*x))
    began = time.perf_counter()
    jax.block_until_ready(f(*x))
    return time.perf_counter() - began


lengths = [256, 512, 1024, 2048]
for name in ("reference", "xla"):
    plt.loglog(lengths, [seconds(name, n) for n in lengths], "o-", label=name)
plt.xlabel("tokens")
plt.ylabel("seconds, with gradients")
_ = plt.legend()

# %% [markdown]
# On to [2](2_your_own_model.ipynb): a layer of it in a model of your own. What the GPU kernel does with a chunk is in
# [6](6_inside_the_kernel.ipynb).
