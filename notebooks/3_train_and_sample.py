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
# # 3. Train on text, and sample
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/#upload)
#
# What `gla-jax train` and `gla-jax sample` do, from Python: a small byte-level model on Shakespeare. With the defaults below it
# takes a minute or so on two CPU cores (80 seconds with much other work on them) and learns to spell a little; a `TrainConfig()` with nothing
# given is the run of the README, which takes five minutes.

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

import json
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt

from gla_jax.interop import ByteTokenizer, perplexity_by_place
from gla_jax.nn import GLAConfig, generate, stream
from gla_jax.train import TrainConfig, continue_text, load_corpus, load_model, train

plt.rcParams.update({"figure.dpi": 70, "figure.figsize": (7, 3)})

# %% [markdown]
# ## The data
#
# `load_corpus()` is the library's own Shakespeare as bytes, documents separated by byte 255. A path in its place reads UTF-8 text,
# `.jsonl`, `.parquet` or a folder that `gla-jax tokenize` made. Here is a short file of our own:

# %%
folder = Path(tempfile.mkdtemp())
corpus = load_corpus()
text = bytes(corpus.train[:1_000_000]).replace(b"\xff", b"\n")
(folder / "mine.txt").write_bytes(text)
print(text[5000:5300].decode())

# %% [markdown]
# ## The run
#
# A config says all; the same values on the same machine give the same model, bit for bit. A run is a folder: call `train` again after an
# interruption and it goes on from the last checkpoint.

# %%
model_config = GLAConfig.tiny()
config = TrainConfig(
    run=folder / "run", data=folder / "mine.txt", model=model_config, steps=120, length=128, batch=8, eval_every=60
)
result = train(config)
print(f"{result.bits_per_byte:.3f} bits per byte on text that was held out")

# %%
records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
steps = [r for r in records if "loss" in r]
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot([r["step"] for r in steps], [r["loss"] for r in steps])
axes[0].set(xlabel="step", ylabel="loss, nats a byte")
axes[1].plot([r["step"] for r in steps], [r["grad_norm"] for r in steps])
axes[1].set(xlabel="step", ylabel="norm of the gradient")
print("a record:", {name: steps[-1][name] for name in ("step", "loss", "learning_rate")})

# %% [markdown]
# ## Samples
#
# `continue_text` gives pieces of text as they are made. So early in training, expect words and not sense.

# %%
model = load_model(folder / "run")
for piece in continue_text(model, "ROMEO.\n", length=300, temperature=0.7, seed=1):
    print(piece, end="")

# %% [markdown]
# `generate` does it in one compiled program for a batch of prompts; `num_samples` reads each prompt once and copies its state.

# %%
tokenizer = ByteTokenizer()
prompt = [tokenizer.encode("What ").ids]
rows = generate(model, prompt, 30, key=jax.random.key(0), temperature=0.7, top_p=0.9, num_samples=3)
for row in rows:
    print("What " + tokenizer.decode(row.tolist()).replace("\n", " / "))

# %% [markdown]
# ## Constant cost a token
#
# The cache is the states of the layers: a token costs the same after ten tokens and after ten thousand.

# %%
import time

tokens = stream(model, [[*corpus.train[:10].tolist()]], 450, key=jax.random.key(0), temperature=1.0)
next(tokens)
marks = []
for _ in tokens:
    marks.append(time.perf_counter())
each = [(marks[i + 50] - marks[i]) / 50 * 1e3 for i in range(0, len(marks) - 50, 50)]
plt.plot(range(0, len(marks) - 50, 50), each)
plt.ylim(0)
plt.xlabel("tokens so far")
_ = plt.ylabel("ms a token")

# %% [markdown]
# ## Where in a text is it good?
#
# Loss by distance from the text's start, four times as far as the model has been trained to read:

# %%
held_out = [corpus.validation[i : i + 513].tolist() for i in range(1000, 21000, 2000)]
buckets = perplexity_by_place(model, held_out, block=512, bucket=64)
plt.bar([b.start for b in buckets], [b.loss for b in buckets], width=56, align="edge")
plt.axvline(config.length, color="black", linestyle=":")
plt.xlabel("place; trained on those left of the line")
_ = plt.ylabel("loss")

# %% [markdown]
# From a shell, the same is `gla-jax train --data mine.txt --run runs/mine` and `gla-jax sample runs/mine "ROMEO."`. Next:
# [4](4_a_new_gate.ipynb), another gate.
