"""What each parameter of ours is called in a checkpoint of theirs, and how it lies there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gla_jax.nn.attention import GatedLinearAttentionConfig
from gla_jax.nn.config import ModelConfig
from gla_jax.nn.hgrn2 import HGRN2Config
from gla_jax.nn.mamba import MambaConfig
from gla_jax.nn.mamba2 import Mamba2Config
from gla_jax.nn.retention import LinearAttentionConfig, RetentionConfig
from gla_jax.nn.rwkv6 import RWKV6Config
from gla_jax.nn.softmax_attention import SoftmaxAttentionConfig


class Layout(NamedTuple):
    """From their array to ours, and back."""

    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]


LAYOUTS = {
    "same": Layout(lambda x: x, lambda x: x),
    "linear": Layout(lambda x: x.T, lambda x: x.T),  # [out, in] there, [in, out] here
    "conv": Layout(lambda x: x[:, 0].T, lambda x: x.T[:, None]),  # [c, 1, w] there, [w, c] here
    # Five low-rank maps, [d, 5 r] there, [5, r, d] here.
    "shift": Layout(
        lambda x: x.reshape(x.shape[0], 5, -1).transpose(1, 2, 0),
        lambda x: x.transpose(2, 0, 1).reshape(x.shape[2], -1),
    ),
}


class Dialect(NamedTuple):
    """The names outside of mixers: "{}" is the layer's number."""

    embed: str = "model.embeddings"
    layer: str = "model.layers.{}."
    mixer_norm: str = "attn_norm"
    mixer: str = "attn."
    mlp_norm: str = "mlp_norm"
    mlp: str = "mlp."
    norm: str = "model.norm"
    renamed: dict[str, str] = {}  # noqa: RUF012  modules of the MLP


DIALECTS = {
    "fla": Dialect(),
    "rwkv6": Dialect(
        mlp_norm="ffn_norm",
        mlp="ffn.",
        renamed={
            "up_proj": "key.linear",
            "mu_k": "key.mu",
            "r_proj": "receptance.linear",
            "mu_r": "receptance.mu",
            "down_proj": "value",
        },
    ),
    "llama": Dialect(
        embed="model.embed_tokens",
        mixer_norm="input_layernorm",
        mixer="self_attn.",
        mlp_norm="post_attention_layernorm",
    ),
    "mamba": Dialect(
        embed="backbone.embeddings",
        layer="backbone.layers.{}.",
        mixer_norm="norm",
        mixer="mixer.",
        norm="backbone.norm_f",
    ),
    # The paper's first release, github.com/berlino/gated_linear_attention.
    "official": Dialect(
        embed="transformer.wte",
        layer="transformer.h.{}.",
        mixer_norm="ln_1",
        mlp_norm="ln_2",
        mlp="",
        norm="transformer.ln_f",
        renamed={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
}

_CONVOLUTIONS = {f"{letter}_conv": f"{letter}_conv1d" for letter in "qkvf"}
# Modules and bare parameters of each kind of mixer whose names differ; "a|b" is either, and a is written.
_MIXERS: dict[type, dict[str, str]] = {
    GatedLinearAttentionConfig: {
        "gate_down": "gk_proj.0",
        "gate_up": "gk_proj.1",
        "out_gate": "g_proj",
        "o_norm": "g_norm_swish_gate|g_norm",
        **_CONVOLUTIONS,
    },
    RetentionConfig: {"out_gate": "g_proj", "o_norm": "g_norm_swish_gate|g_norm", **_CONVOLUTIONS},
    LinearAttentionConfig: {
        "o_norm": "norm",
        **{f"{x}_maps.{i}": f"feature_map_{x}.layer{i + 1}" for x in "qk" for i in range(2)},
    },
    HGRN2Config: {**_CONVOLUTIONS, "v_proj": "i_proj", "v_conv": "i_conv1d", "o_norm": "g_norm"},
    RWKV6Config: {
        **{f"{x}_proj": f"{x}_proj.linear" for x in "rkv"},
        "out_gate": "g_proj.linear",
        "gate_down": "w_proj.linear.lora.0",
        "gate_up": "w_proj.linear.lora.2",
        "shift_down": "x_proj.0.linear",
        "mu_x": "x_proj.0.mu",
        "mu": "x_bias",
        "shift_up": "x_proj.2.weight",
        "norm_scale": "g_norm.weight",
        "norm_bias": "g_norm.bias",
    },
    Mamba2Config: {"conv": "conv1d", "norm_scale": "norm.weight"},
    MambaConfig: {"conv": "conv1d", "dt_bias": "dt_proj.bias"},
    SoftmaxAttentionConfig: {},
}
_OFFICIAL = {"gate_down": "k_gate.0", "gate_up": "k_gate.1", "out_gate": "g_proj", "o_proj": "out_proj"}
_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


class Place(NamedTuple):
    """Where one array of theirs belongs: a parameter, and the row of it if it is stacked over layers.

    names: what it may be called; the first is written.
    path: of the parameter in the model's state.
    row: of the stack; None if there is none.
    layout: one of LAYOUTS.
    shape: of their array.
    scale: ours is theirs times this.
    """

    names: tuple[str, ...]
    path: tuple[Any, ...]
    row: int | None
    layout: str
    shape: tuple[int, ...]
    scale: float


def places(config: ModelConfig, dialect: str, shapes: dict[tuple[Any, ...], tuple[int, ...]]) -> list[Place]:
    """A place for every array of theirs, from the shapes of our parameters by path."""
    words, found = DIALECTS[dialect], []
    period = len(config.mixers)
    for path, shape in shapes.items():
        if path[0] != "layers":
            found.append(_place(_outside(words, path), path, None, shape))
            continue
        place = path[1] if period > 1 else 0
        local = [str(part) for part in path[2 if period > 1 else 1 :]]
        mixer = config.mixers[place]
        if dialect == "official":
            renamed = _OFFICIAL
        else:
            renamed = next(names for kind, names in _MIXERS.items() if isinstance(mixer, kind))
        if not getattr(mixer, "output_gate", True):
            renamed = {**renamed, "o_norm": renamed.get("o_norm", "").split("|")[-1]}
        for row in range(shape[0]):
            prefix = words.layer.format(row * period + place)
            if local[0] == "mixer":
                name = prefix + words.mixer + _rename(local[1:], renamed)
            elif local[0] == "mlp":
                name = prefix + words.mlp + _rename(local[1:], words.renamed)
            else:
                name = prefix + _rename(local, {"mixer_norm": words.mixer_norm, "mlp_norm": words.mlp_norm})
            scaled = dialect == "official" and local == ["mixer", "k_proj", "kernel"]
            # Its keys are divided by the square root of a value head's width, besides the op's own scale.
            scale = (config.hidden_size / getattr(mixer, "num_heads", 1)) ** -0.5 if scaled else 1.0
            found.append(_place(name, path, row, shape[1:], scale))
    return found


def _outside(words: Dialect, path: tuple[Any, ...]) -> str:
    if path[0] == "embed_norm":
        return _rename(path, {"embed_norm": words.layer.format(0) + "pre_norm"})
    return _rename(path, {"embed": words.embed, "norm": words.norm, "lower_bounds": "model.lower_bounds"})


def _rename(path: Any, renamed: dict[str, str]) -> str:
    """Their name of a module's parameter, or of a bare one."""
    whole = ".".join(str(part) for part in path)
    if whole in renamed:
        return renamed[whole]
    module, _, leaf = whole.rpartition(".")
    return f"{renamed.get(module, module)}.{_LEAVES[leaf]}" if module else leaf


def _place(name: str, path: tuple[Any, ...], row: int | None, shape: tuple[int, ...], scale: float = 1.0) -> Place:
    layout = "same"
    if path[-1] == "kernel":
        layout = "conv" if str(path[-2]).endswith("conv") else "linear"
    elif path[-1] == "shift_up":
        layout = "shift"
    empty = np.broadcast_to(np.zeros((), np.int8), shape)  # takes no memory, whatever its shape
    theirs = (
        LAYOUTS[layout].theirs(empty) if layout != "shift" else np.broadcast_to(empty[0, 0, 0], _shift_shape(shape))
    )
    return Place(_alternatives(name), path, row, layout, theirs.shape, scale)


def _shift_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[2], shape[0] * shape[1]


def _alternatives(name: str) -> tuple[str, ...]:
    """attn.a|b.weight as attn.a.weight and attn.b.weight."""
    if "|" not in name:
        return (name,)
    head, tail = name.split("|")
    prefix, _, _ = head.rpartition(".")
    _, _, leaf = tail.rpartition(".")
    return f"{head}.{leaf}", f"{prefix}.{tail}"
