"""The paper's ladder of gates (arXiv 2312.06635, table 4) on Shakespeare, in minutes on one GPU.

    python -m benchmarks.ladder --out benchmarks/results/ladder-h100.json
    python -m benchmarks.ladder --preset cpu --out benchmarks/results/ladder-cpu.json      # smaller, for two CPU cores
    python -m benchmarks.ladder --preset tiny                                              # to see that it runs

Models differ in nothing but the gate and the number of heads: no gate, a constant decay a head (RetNet's), a scalar a
token, and GLA's vector a token. All see the same bytes in the same order; measured are bits a byte of plays held out.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.small_runs import Batch, Experiment, compare, losses_and_hits, parse, verdict
from gla_jax.nn import (
    CausalLMConfig,
    GatedLinearAttentionConfig,
    LinearAttentionConfig,
    RetentionConfig,
    SimpleGatedLinearAttentionConfig,
)
from gla_jax.train import load_corpus

SAME: dict[str, Any] = {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0}
MODELS: dict[str, Any] = {
    "no gate": LinearAttentionConfig(**SAME, feature_map=None, output_gate=True),
    "constant decay": RetentionConfig(**SAME, rope_theta=None),
    "scalar gate": SimpleGatedLinearAttentionConfig(**SAME, conv_size=0),
    "GLA, 8 heads": GatedLinearAttentionConfig(num_heads=8),
    "GLA, 4 heads": GatedLinearAttentionConfig(num_heads=4),
    "GLA, 1 head": GatedLinearAttentionConfig(num_heads=1),
}
# Perplexity there: 340M parameters, 7 B tokens of SlimPajama.
PAPER = {
    "no gate": 23.21,
    "constant decay": 16.55,
    "scalar gate": 15.56,
    "GLA, 8 heads": 15.29,
    "GLA, 4 heads": 14.77,
    "GLA, 1 head": 14.61,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"length": 32, "width": 16, "layers": 1, "batch": 2, "steps": 3, "rates": [3e-3], "seeds": 2, "rows": 2},
    "cpu": {
        "length": 256,
        "width": 64,
        "layers": 2,
        "batch": 4,
        "steps": 1000,
        "rates": [4e-3],
        "seeds": 3,
        "rows": 64,
    },
    "h100": {
        "length": 512,
        "width": 128,
        "layers": 4,
        "batch": 8,
        "steps": 800,
        "rates": [3e-3],
        "seeds": 20,
        "rows": 128,
    },
}


def windows(stream: np.ndarray, starts: Any, length: int) -> Batch:
    """Bytes [b, length] of the stream from each start, and the bytes after them."""
    rows = jnp.asarray(stream)[starts[:, None] + jnp.arange(length + 1)].astype(jnp.int32)
    return Batch(rows[:, :-1], rows[:, 1:], jnp.ones((len(starts), length)))


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    given = parse(__doc__, PRESETS, MODELS, arguments)
    how, corpus = PRESETS[given.preset], load_corpus()
    length = how["length"]

    def draw(key):
        starts = jax.random.randint(key, (how["batch"],), 0, len(corpus.train) - length - 1)
        return windows(corpus.train, starts, length)

    def bits(model):
        starts = jnp.linspace(0, len(corpus.validation) - length - 2, how["rows"]).astype(jnp.int32)
        one = lambda start: losses_and_hits(model, windows(corpus.validation, start[None], length))[0]
        return jax.lax.map(one, starts).mean() / np.log(2)

    def experiment(name):
        sizes = {"vocab_size": 256, "hidden_size": how["width"], "num_layers": how["layers"]}
        common: dict[str, Any] = {"mlp_size": 2 * how["width"], "tie_embeddings": True, "init_std": 0.05}
        config = CausalLMConfig(mixer=MODELS[name], implementation="xla", **sizes, **common)
        return Experiment(config, draw, bits, how["steps"], how["rates"], how["seeds"])

    print("bits a byte of held-out text: mean and standard deviation over seeds", flush=True)
    return compare(given, "ladder", "bits a byte", how, experiment, claims)


def claims(results: dict[str, dict]) -> dict[str, str]:
    """Whether each step of the paper's ladder was seen."""
    names = [name for name in sorted(PAPER, key=lambda name: -PAPER[name]) if name in results]
    bits = {name: np.array(results[name]["measured"]) for name in names}
    steps = [*itertools.pairwise(names), ("scalar gate", "GLA, 4 heads")]  # the paper's default model last
    return {
        f"{better} is better than {worse}": verdict(bits[worse] - bits[better])
        for worse, better in steps
        if {worse, better} <= set(bits)
    }


if __name__ == "__main__":
    main()
