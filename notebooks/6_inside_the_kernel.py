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
# # 6. Inside the GPU kernel
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload)
#
# On a Hopper GPU the op runs in kernels written in JAX's Pallas for Mosaic GPU: one or two for the forward, by the shape, and others for the
# gradients (`docs/kernels.md`). This notebook says what bounds the forward (roofline), runs it without a GPU (interpreter, with a
# detector of races), lowers it for a GPU that is not there, and times it on one that is.

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

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # threads for the interpreter: one a role

import time
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

from gla_jax import gated_linear_attention, which_implementation
from gla_jax.pallas import forward, why_unsupported
from gla_jax.pallas.config import choose_forward

plt.rcParams.update({"figure.dpi": 70, "figure.figsize": (7, 4)})
# The interpreter computes with numpy, which warns of sums with -inf.
warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)

# %% [markdown]
# ## Roofline
#
# In bfloat16 the forward must read q, k, g ($2k$ bytes each a token and head) and v and write o ($2v$ each). In one kernel nothing else is
# stored, since the state stays in registers; where there are two, the first also writes queries, keys and scores for the second. By chunks of $c = 64$ tokens it multiplies
# $2kv$ (read the state) $+\,2kv$ (update it) $+\,2ck$ (scores) $+\,2cv$ (scores times values) floating-point operations a token. An H100 has
# 3.35 TB/s and 989 TFLOP/s (its data sheet); the ratio of the two says which one bounds.

# %%
BYTES, FLOPS = 3.35e12, 989e12
SHAPES = [(8, 2048, 16, 128, 128), (2, 8192, 16, 64, 128), (8, 2048, 4, 128, 256), (8, 2048, 4, 256, 512)]


def work(b, t, h, k, v, chunk=64):
    tokens = b * t * h
    return tokens * (6 * k + 4 * v), tokens * (4 * k * v + 2 * chunk * (k + v))


for shape in SHAPES:
    size, flop = work(*shape)
    memory, compute = size / BYTES * 1e3, flop / FLOPS * 1e3
    bound = "memory" if memory > compute else "matmuls"
    print(f"{shape!s:25s} {size / 1e6:6.0f} MB {memory:.3f} ms, {flop / 1e9:5.0f} GFLOP {compute:.3f} ms: {bound}")

# %%
intensity = np.geomspace(10, 3000, 50)
plt.loglog(intensity, np.minimum(intensity * BYTES, FLOPS) / 1e12, "k")
for shape in SHAPES:
    size, flop = work(*shape)
    plt.loglog(flop / size, min(flop / size * BYTES, FLOPS) / 1e12, "o", label=f"k, v = {shape[3:]}")
plt.xlabel("floating-point operations a byte")
plt.ylabel("TFLOP/s, at most")
_ = plt.legend()

# %% [markdown]
# Every shape is left of the corner: memory is the bound to reach. What the kernel does reach, and which other limit stands in its way (the
# shared memory of a multiprocessor, 128 bytes a clock), is measured in `docs/kernels.md`.
#
# ## Which calls it takes


# %%
def inputs(b, t, h, k, v, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    q, key, g = (jax.random.normal(i, (b, t, h, k), dtype) for i in keys[:3])
    return q, key, jax.random.normal(keys[3], (b, t, h, v), dtype), jax.nn.log_sigmoid(g) / 16


print("bfloat16:", why_unsupported(*inputs(1, 128, 1, 64, 64)) or "yes")
print("float32: ", why_unsupported(*inputs(1, 128, 1, 64, 64, jnp.float32)))

# %% [markdown]
# ## In the interpreter
#
# Pallas interprets kernels on a CPU, with their barriers, asynchronous copies and warpgroups as threads. It is slow, and it tells what a
# GPU would not: its detector prints a line for each race (none here).
# Warpgroups have roles and work on neighbouring tiles at the same time: a loader, gaters (queries and keys times their decays, and the
# scores), and those that multiply and carry the state. In one kernel a block has all three; of two kernels, which so few heads take, the
# first has the gaters, for all chunks at once, and the second those that multiply.

# %%
q, key, value, g = inputs(1, 130, 1, 64, 64)
for heads in (1, 64):
    tuning = choose_forward(64, 64, heads, 3, jnp.dtype(jnp.bfloat16))  # a tuple for two kernels
    print(f"{heads} heads:", "two kernels" if isinstance(tuning, tuple) else "one kernel")
began = time.perf_counter()
o, state = forward(q, key, value, g, 1.0, None, True, interpret=plgpu.InterpretGPUParams(detect_races=True))
print(f"{time.perf_counter() - began:.1f} s for {q.shape[1]} tokens")


def error(x, exact):
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return np.sqrt(np.mean((x - exact) ** 2) / np.mean(exact**2))


wide = [x.astype(jnp.float32) for x in (q, key, value, g)]
exact = gated_linear_attention(*wide, scale=1.0, output_final_state=True, implementation="reference")
print(f"relative error: o {error(o, exact[0]):.1e}, state {error(state, exact[1]):.1e}")

# %% [markdown]
# ## Strong gates
#
# A tile of 64 tokens by 64 channels takes one of three ways: mild decays are centred on half the tile's own, resets of whole tokens
# are cut out, and anything else is halved six times, as in notebook 1. The result does not depend on the way:

# %%
choices = jnp.array([-1e-3, -5.0, -50.0, -jnp.inf], jnp.bfloat16)
wild = jax.random.choice(jax.random.key(5), choices, g.shape, p=jnp.array([0.7, 0.2, 0.05, 0.05]))
reset = jnp.where(jax.random.bernoulli(jax.random.key(6), 0.03, (*g.shape[:3], 1)), -jnp.inf, g)
for name, gates in (("resets", reset), ("anything", wild)):
    o, _ = forward(q, key, value, gates, 1.0, interpret=plgpu.InterpretGPUParams())
    exact, _ = gated_linear_attention(*wide[:3], gates.astype(jnp.float32), scale=1.0, implementation="reference")
    print(f"{name:10s} relative error {error(o, exact):.1e}")

# %% [markdown]
# ## Lowered for a GPU that is not there
#
# Layouts, shapes of copies, the size of shared memory: most mistakes in a kernel are found when it is lowered, and that takes
# no GPU.

# %%
h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h100)):
    run = jax.jit(lambda q, k, v, g: forward(q, k, v, g, 1.0)[0])
    shapes = jax.eval_shape(lambda: inputs(*SHAPES[0]))
    lowered = run.trace(*shapes).lower(lowering_platforms=("cuda",))
print("kernels:", lowered.as_text().count("custom_call @mosaic_gpu"))

# %% [markdown]
# ## Timing
#
# On a Hopper GPU this cell times the kernel against its bound; elsewhere it times plain JAX on a small shape. Rules: random inputs
# (zeros draw less power), compile first, many calls before one wait, and the median of several repeats.

# %%
hopper = getattr(jax.devices()[0], "compute_capability", None) == "9.0"
for shape in SHAPES if hopper else [(1, 1024, 4, 64, 64)]:
    run = jax.jit(lambda *x: gated_linear_attention(*x)[0])
    x, times = inputs(*shape), []
    jax.block_until_ready(run(*x))
    for _ in range(5):
        began = time.perf_counter()
        jax.block_until_ready([run(*x) for _ in range(20)])
        times.append((time.perf_counter() - began) / 20 * 1e3)
    name = which_implementation(*x).name
    print(f"{shape} {name}: {np.median(times):.3f} ms; an H100's memory would take {work(*shape)[0] / BYTES * 1e3:.3f}")
