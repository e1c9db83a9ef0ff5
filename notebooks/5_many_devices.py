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
# # 5. Sharded training and sequence parallelism
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload)
#
# Everything here runs on eight devices that JAX simulates on one CPU; on eight GPUs or TPU cores it is the same code without the first
# line. Four axes of a mesh shard a run: the batch (`data`), parameters and batch (`fsdp`), heads and MLP (`tensor`), and time
# (`sequence`).

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

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before JAX is imported

import io
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gla_jax import gated_linear_attention, sequence_parallel
from gla_jax.nn import GLAConfig, GLAForCausalLM, create_sharded, param_shardings
from gla_jax.train import MeshConfig, TrainConfig, load_corpus, train

plt.rcParams.update({"figure.dpi": 70, "figure.figsize": (7, 3)})
print(jax.devices())

# %% [markdown]
# ## The same run on any mesh
#
# `TrainConfig(mesh=...)`, or `--mesh.fsdp 4 --mesh.sequence 2` on the command line. Loss curves are one device's, to the last digits:
# what is summed in another order differs by rounding.

# %%
folder, curves = Path(tempfile.mkdtemp()), {}
(folder / "mine.txt").write_bytes(bytes(load_corpus().train[:20_000]).replace(b"\xff", b"\n"))
model = GLAConfig(vocab_size=256, hidden_size=64, num_layers=1, num_heads=2, mlp_size=128, tie_embeddings=True)
meshes = {
    "one device": MeshConfig(data=1),
    "2 fsdp x 2 tensor x 2 sequence": MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
}
for i, (name, mesh) in enumerate(meshes.items()):
    settings = {"data": folder / "mine.txt", "steps": 15, "batch": 4, "length": 64, "optimizer": "adamw"}
    run = train(TrainConfig(run=folder / str(i), model=model, mesh=mesh, **settings), out=io.StringIO()).run
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    curves[name] = jnp.array([r["loss"] for r in records if "loss" in r])

# %%
for name, curve in curves.items():
    apart = float(jnp.abs(curve - curves["one device"]).max())
    print(f"{name:32s} last loss {curve[-1]:.5f}, at most {apart:.1e} from one device's")
    plt.plot(curve, label=name)
plt.xlabel("step")
plt.ylabel("loss")
_ = plt.legend()

# %% [markdown]
# ## Where parameters lie
#
# Every parameter names its axes (`embed`, `heads`, `mlp`, ...), and rules say which axis of the mesh each name goes to.
# `create_sharded` builds a model whose parameters are never whole on one device.

# %%
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
make = lambda: GLAForCausalLM(model, rngs=nnx.Rngs(0))
with jax.set_mesh(mesh):
    sharded = create_sharded(make, mesh)
for path, leaf in nnx.to_flat_state(param_shardings(nnx.eval_shape(make), mesh))[:8]:
    print(f"{'.'.join(map(str, path)):40s} {leaf.get_value().spec}")
jax.debug.visualize_array_sharding(sharded.embed.embedding[...])

# %% [markdown]
# ## The op with time sharded
#
# A device's piece of a sequence needs one thing of all pieces before it: the state that enters. Each device computes what its own
# piece adds, states go round, and nothing that grows with the sequence is ever sent.

# %%
line = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
b, t, h, k, v = 1, 8 * 256, 2, 16, 32


def arguments(t):
    keys = jax.random.split(jax.random.key(0), 4)
    q, key, g = (jax.random.normal(i, (b, t, h, k)) for i in keys[:3])
    return q, key, jax.random.normal(keys[3], (b, t, h, v)), jax.nn.log_sigmoid(g) / 16


x = arguments(t)
whole, state = gated_linear_attention(*x, output_final_state=True)
with jax.set_mesh(line):
    pieces = jax.device_put(x, NamedSharding(line, P(None, "sequence")))
    o, last = jax.jit(lambda *x: sequence_parallel(*x, output_final_state=True))(*pieces)
print("o", o.sharding.spec, float(jnp.abs(o - whole).max()), "state", float(jnp.abs(last - state).max()))

# %% [markdown]
# What is sent can be read from the compiled program. Sequence parallelism of softmax attention would send all keys and values, $t (k + v)$
# numbers a head; here it is decays and states, whatever $t$ is:

# %%
import math
import re


def sent(t):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=pieces[0].sharding), arguments(t))
    with jax.set_mesh(line):
        text = jax.jit(lambda *x: sequence_parallel(*x)[0]).lower(*shapes).compile().as_text()
    lines = [x for x in text.splitlines() if re.search(r"= .*\b(all-to-all|all-gather|collective-permute)\(", x)]
    sizes = [re.findall(r"f32\[([\d,]+)\]", line.split("(%")[0].split(" = ")[1]) for line in lines]
    return sum(math.prod(map(int, size.split(","))) for found in sizes for size in found)


lengths = [512, 8192]
numbers = [sent(t) for t in lengths]
print(dict(zip(lengths, numbers, strict=True)))
plt.loglog(lengths, numbers, "o-", label="decays and states, received by a device")
plt.loglog(lengths, [h * t * (k + v) * 7 / 8 for t in lengths], "o:", label="all keys and values, for comparison")
plt.xlabel("tokens")
plt.ylabel("numbers")
_ = plt.legend()

# %% [markdown]
# ## Gradients, and a model of one's own
#
# Gradients go the other way round the ring by themselves, and `GLAConfig(sequence_axis="sequence")` shards a model's time,
# short convolutions included.

# %%
long = GLAForCausalLM(model.replace(sequence_axis="sequence", conv_size=4), rngs=nnx.Rngs(0))
short = GLAForCausalLM(model.replace(conv_size=4), rngs=nnx.Rngs(0))
tokens = jnp.asarray(load_corpus().train[:256])[None].astype(jnp.int32)


def loss(model, tokens):
    logits = jax.nn.log_softmax(model(tokens)[:, :-1])
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()


with jax.set_mesh(line):
    there = jax.device_put(tokens, NamedSharding(line, P(None, "sequence")))
    value, grads = nnx.jit(nnx.value_and_grad(loss))(long, there)
expected, others = nnx.jit(nnx.value_and_grad(loss))(short, tokens)
apart = max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True))
print(f"loss {value:.5f} and {expected:.5f}; gradients at most {apart:.1e} apart")

# %% [markdown]
# More on meshes, accumulation, faults and many hosts: `docs/training.md`. Last:
# [6](6_inside_the_kernel.ipynb), what runs on a GPU.
