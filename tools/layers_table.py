"""Writes the tables of docs/layers.md: every layer of gla_jax.nn at a width of 1024, and every preset of a model."""

import math
import pathlib
from typing import Any

import jax
from flax import nnx

from gla_jax import nn

BEGIN, END = "<!-- {}, made by tools/layers_table.py -->\n", "<!-- end of {} -->\n"
# The options of the 340M-class models of arXiv 2312.06635 where it has the layer; else the layer's own defaults.
LAYERS: dict[str, tuple[Any, str, str]] = {
    "GatedLinearAttention": (nn.GatedLinearAttentionConfig(), "a vector a token", "2312.06635"),
    "SimpleGatedLinearAttention": (nn.SimpleGatedLinearAttentionConfig(), "a scalar a token", "2405.05254"),
    "Retention": (nn.RetentionConfig(num_heads=4), "a constant a head", "2307.08621"),
    "LightningAttention": (nn.LightningAttentionConfig(num_heads=8), "a constant a head and depth", "2501.08313"),
    "LinearAttention": (nn.LinearAttentionConfig(), "none", "2006.16236"),
    "LinearAttention, normalize": (nn.LinearAttentionConfig(normalize=True), "none", "2006.16236"),
    "HGRN2": (nn.HGRN2Config(), "a vector a token, k = 1 - exp g", "2404.07904"),
    "RWKV6": (nn.RWKV6Config(), "a vector a token, and a bonus", "2404.05892"),
    "Mamba2": (nn.Mamba2Config(), "a scalar a token", "2405.21060"),
    "Mamba": (nn.MambaConfig(), "a number a channel and state", "2312.00752"),
    "SoftmaxAttention": (nn.SoftmaxAttentionConfig(), "none", "1706.03762"),
    "SoftmaxAttention, window=512": (nn.SoftmaxAttentionConfig(window=512), "none", "2004.05150"),
}


PRESETS = {
    "GLAConfig": ("tiny", "gla_340m", "gla_1_3b", "gla_2_7b"),
    "CausalLMConfig": (
        *("transformer_340m", "transformer_1_3b", "retnet_340m", "retnet_1_3b", "mamba_340m", "mamba_1_3b"),
    ),
}


def size(tree: Any) -> int:
    """Numbers in a tree of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def presets() -> str:
    """The table of presets in Markdown."""
    rows = ["| preset | layers | width | heads | MLP | tokens | parameters |", "|---" * 7 + "|"]
    for kind, names in PRESETS.items():
        for name in names:
            config = getattr(getattr(nn, kind), name)()
            (mixer,) = config.mixers
            heads = getattr(mixer, "num_heads", "-")
            mlp = "-" if config.mlp == "none" else config.mlp_width
            model = jax.eval_shape(lambda config=config: nnx.state(nn.CausalLM(config, rngs=nnx.Rngs(0))))
            sizes = f"{config.num_layers} | {config.hidden_size} | {heads} | {mlp} | {config.vocab_size}"
            rows.append(f"| `{kind}.{name}()` | {sizes} | {size(model):,} |")
    return "\n".join(rows)


def layers() -> str:
    """The table of layers in Markdown."""
    rows = ["| layer | decay | arXiv | parameters | state, numbers |", "|---|---|---|---|---|"]
    for name, (config, gate, paper) in LAYERS.items():

        def make(config: Any = config) -> tuple[Any, Any]:
            layer = config.build(1024, rngs=nnx.Rngs(0))
            return nnx.state(layer), layer.init_cache(1)

        parameters, cache = jax.eval_shape(make)
        rows.append(f"| `{name}` | {gate} | {paper} | {size(parameters):,} | {size(cache):,} |")
    return "\n".join(rows)


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in (("layers", layers), ("presets", presets)):
        begin, end = BEGIN.format(name), END.format(name)
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n{table()}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    page = pathlib.Path(__file__).parent.parent / "docs" / "layers.md"
    page.write_text(with_tables(page.read_text()))
