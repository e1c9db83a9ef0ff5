"""Length extrapolation (arXiv 2312.06635, figure 5) on Shakespeare: trained at one length, tested by place far beyond.

    python -m benchmarks.extrapolation --out benchmarks/results/extrapolation-h100.json
    python -m benchmarks.extrapolation --preset cpu --out benchmarks/results/extrapolation-cpu.json    # two CPU cores
    python -m benchmarks.extrapolation --preset tiny                                        # to see that it runs

All models take the same bytes a step. "GLA, truncated" reads windows of 4 training lengths piece by piece, each from
the state that the one before has left, without gradients through it; "GLA, the same windows" reads those pieces each
from an empty state, which tells what comes of the state from what comes of fewer windows a step. Measured are bits a
byte of plays held out, by buckets of the training length, each row read once from its start; attention sees all that
came before.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ladder import windows
from benchmarks.small_runs import Experiment, compare, losses_in_pieces, parse, verdict
from gla_jax.nn import (
    CausalLMConfig,
    GatedLinearAttentionConfig,
    MambaConfig,
    RetentionConfig,
    SoftmaxAttentionConfig,
)
from gla_jax.train import load_corpus

TRUNCATED, SAME = "GLA, truncated", "GLA, the same windows"
GLA = GatedLinearAttentionConfig(num_heads=4)
MODELS: dict[str, dict[str, Any]] = {
    "GLA": {"mixer": GLA},
    TRUNCATED: {"mixer": GLA},
    SAME: {"mixer": GLA},
    "RetNet": {"mixer": RetentionConfig(num_heads=4)},
    "Transformer++": {"mixer": SoftmaxAttentionConfig(num_heads=4)},
    "Mamba": {"mixer": MambaConfig(), "mlp": "none"},
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "length": 16,
        "buckets": 4,
        "pieces": 4,
        "width": 16,
        "layers": 1,
        "batch": 4,
        "steps": 3,
        "rates": [3e-3],
        "seeds": 1,
        "rows": 2,
    },
    "cpu": {
        "length": 256,
        "buckets": 12,
        "pieces": 4,
        "width": 64,
        "layers": 2,
        "batch": 4,
        "steps": 500,
        "rates": [4e-3],
        "seeds": 3,
        "rows": 32,
    },
    "h100": {
        "length": 2048,
        "buckets": 12,
        "pieces": 4,
        "width": 128,
        "layers": 4,
        "batch": 4,
        "steps": 1000,
        "rates": [3e-3],
        "seeds": 3,
        "rows": 12,
    },
}


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    given = parse(__doc__, PRESETS, MODELS, arguments)
    how, corpus = PRESETS[given.preset], load_corpus()
    far = how["length"] * how["buckets"]

    def by_place(model):
        starts = jnp.linspace(0, len(corpus.validation) - far - 2, how["rows"]).astype(jnp.int32)
        one = lambda start: losses_in_pieces(model, windows(corpus.validation, start[None], far), how["buckets"])
        nats = jax.lax.map(one, starts)
        return nats.reshape(how["rows"], how["buckets"], how["length"]).mean((0, 2)) / np.log(2)

    def experiment(name):
        pieces = how["pieces"] if name in (TRUNCATED, SAME) else 1
        length, rows = how["length"] * pieces, how["batch"] // pieces

        def draw(key):
            starts = jax.random.randint(key, (rows,), 0, len(corpus.train) - length - 1)
            batch = windows(corpus.train, starts, length)
            return jax.tree.map(lambda x: x.reshape(-1, how["length"]), batch) if name == SAME else batch

        sizes = {"vocab_size": 256, "hidden_size": how["width"], "num_layers": how["layers"]}
        common: dict[str, Any] = {"mlp_size": 2 * how["width"], "tie_embeddings": True, "init_std": 0.05}
        model = dict(MODELS[name])
        if isinstance(model["mixer"], SoftmaxAttentionConfig):
            model["mixer"] = model["mixer"].replace(cache_size=far)
        config = CausalLMConfig(**model, implementation="xla", **sizes, **common)
        carried = pieces if name == TRUNCATED else 1
        return Experiment(config, draw, by_place, how["steps"], how["rates"], how["seeds"], carried)

    print("bits a byte of held-out text, by buckets of the training length", flush=True)
    show = lambda found: " ".join(f"{bits:.3f}" for bits in found.measured.mean(0))
    return compare(given, "extrapolation", "bits a byte", how, experiment, claims, show)


def claims(results: dict[str, dict]) -> dict[str, str]:
    """What the paper's figure says of these models, and whether it was seen."""
    bits = {name: np.array(row["measured"]) for name, row in results.items()}
    rise = {name: x[:, -1] - 1.01 * x[:, 0] for name, x in bits.items()}
    found = {}
    for name in ("GLA", "RetNet"):
        if name in rise:
            found[f"{name} holds to the last bucket (at most 1 % above its first)"] = verdict(-rise[name])
    for name in ("Transformer++", "Mamba"):
        if name in rise:
            claim = f"{name} fails far out (its last bucket is more than 1 % above its first)"
            found[claim] = verdict(rise[name])
    for name in ("RetNet", "Mamba"):
        if {"GLA", name} <= set(bits):
            # Above 0 for a seed if GLA is ahead in more than half of the buckets.
            ahead = np.median(bits[name] - bits["GLA"], axis=1)
            found[f"GLA is better than {name} in most buckets"] = verdict(ahead)
    for name in ("GLA", SAME):
        if {name, TRUNCATED} <= set(bits):
            better = bits[name][:, -1] - bits[TRUNCATED][:, -1]
            found[f"truncated backpropagation is better than {name} in the last bucket"] = verdict(better)
    return found


if __name__ == "__main__":
    main()
