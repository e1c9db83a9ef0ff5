"""config.json of flash-linear-attention and transformers as our configs, and back."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from gla_jax.files import CheckpointError
from gla_jax.nn.attention import GatedLinearAttentionConfig
from gla_jax.nn.config import CausalLMConfig, GLAConfig, ModelConfig
from gla_jax.nn.hgrn2 import HGRN2Config
from gla_jax.nn.mamba import MambaConfig
from gla_jax.nn.mamba2 import Mamba2Config
from gla_jax.nn.mlp import mlp_width
from gla_jax.nn.recurrent import MixerConfig
from gla_jax.nn.retention import LinearAttentionConfig, RetentionConfig
from gla_jax.nn.rwkv6 import RWKV6Config
from gla_jax.nn.softmax_attention import SoftmaxAttentionConfig


class Foreign(NamedTuple):
    """A config of ours, and the dialect (see names.py) in which its checkpoint is written."""

    config: ModelConfig
    dialect: str


class _Fields:
    """A config.json that tells which field is wrong."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there and not null."""
        return next((self.fields[n] for n in names if self.fields.get(n) is not None), default)

    def given(self, names: dict[str, str]) -> dict[str, Any]:
        """Ours by name for those of theirs that are there and not null; the others keep our defaults."""
        return {ours: self.fields[theirs] for theirs, ours in names.items() if self.fields.get(theirs) is not None}

    def need(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise CheckpointError(f"config.json: has no {name}")
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """A CheckpointError unless the field is absent or one of those that we have."""
        if name in self.fields and self.fields[name] not in allowed:
            raise CheckpointError(
                f"config.json: {name} must be {' or '.join(map(repr, allowed))} here, got {self.fields[name]!r}"
            )


# What load_pretrained may be told of a model beside what config.json says.
CHANGES = ("param_dtype", "dtype", "remat", "layer_unroll", "implementation", "sequence_axis", "cache_size")
_SILU = ("swish", "silu")
# What the libraries take where config.json says nothing; 1e-6 for all others.
_NORM_EPS = {"rwkv6": 1e-5, "mamba": 1e-5, "mamba2": 1e-5, "official": 1e-5}
# Fields that mean the same, theirs to ours; defaults are the same, too.
_HEADS = {name: name for name in ("num_heads", "num_kv_heads", "expand_k", "expand_v")}
_RWKV6 = {
    **{name: name for name in ("num_heads", "expand_k", "expand_v")},
    **{"proj_low_rank_dim": "shift_low_rank", "gate_low_rank_dim": "gate_low_rank"},
}
_ATTENTION = {
    **{name: name for name in ("num_heads", "num_kv_heads", "qkv_bias", "rope_theta")},
    "window_size": "window",
}
_MAMBA = {
    **{"state_size": "state_size", "expand": "expand", "conv_kernel": "conv_size"},
    **{"use_conv_bias": "conv_bias", "use_bias": "projection_bias"},
}
_FEATURES = {None: None, "elu": "elu1", "relu": "relu", "identity": None, "elementwise_product": "product"}


def from_json(fields: dict[str, Any], **changes: Any) -> Foreign:
    """Our config for a config.json's fields, with some of ours changed, as `load_pretrained` takes them.

    Raises:
      CheckpointError: the model is of another kind, or has an option that we do not.
      ValueError: a change is none of CHANGES, or its value is not allowed.
    """
    x = _Fields(fields)
    kind = x.need("model_type")
    if not isinstance(kind, str) or kind not in _READ or kind == "official":
        kinds = ", ".join(sorted(_READ.keys() - {"official"}))
        raise CheckpointError(f"config.json: model_type must be one of {kinds}, got {kind!r}")
    if kind == "gla" and "d_model" in fields:
        kind = "official"
    x.only("attnres_block_size", None)
    x.only("dtype", None, "float32", "bfloat16", "float16")
    x.only("quantization_config", None)
    x.only("partial_rotary_factor", None, 1, 1.0)
    try:
        made, dialect = _READ[kind](x)
        common: dict[str, Any] = {
            "vocab_size": x.need("vocab_size"),
            "hidden_size": x.get("hidden_size", "d_model"),
            "num_layers": x.get("num_hidden_layers", "n_layer"),
            "norm_eps": float(
                x.get("norm_eps", "rms_norm_eps", "layer_norm_epsilon", default=_NORM_EPS.get(kind, 1e-6))
            ),
            "tie_embeddings": x.get("tie_word_embeddings", default=kind == "mamba"),
        }
        if dialect in ("fla", "llama"):
            common["mlp_size"] = x.get("intermediate_size")
            if common["mlp_size"] is None:
                common["mlp_size"] = mlp_width(common["hidden_size"], x.get("hidden_ratio", default=4))
        if "mixer" in made and (hybrid := x.get("attn")) is not None:
            kept = x.get("max_position_embeddings", default=2048)
            made["mixer"] = _with_attention(made["mixer"], hybrid, common["num_layers"], kept)
        config: Any = CausalLMConfig if "mixer" in made else GLAConfig
        found = config(**common, **made)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json: {error}") from None
    return Foreign(_changed(found, changes), dialect)


def _changed(config: Any, changes: dict[str, Any]) -> ModelConfig:
    for name in changes:
        if name not in CHANGES:
            raise ValueError(f"changes: must be of {', '.join(CHANGES)}, got {name!r}")
    if "cache_size" in changes:
        if not any(isinstance(mixer, SoftmaxAttentionConfig) for mixer in config.mixers):
            raise ValueError(f"cache_size: must be left out without softmax attention, got {changes['cache_size']!r}")
        size = {"cache_size": changes.pop("cache_size")}
        mixers = (m.replace(**size) if isinstance(m, SoftmaxAttentionConfig) else m for m in config.mixers)
        changes["mixer"] = tuple(mixers) if isinstance(config.mixer, tuple) else next(mixers)
    return config.replace(**changes)


def to_json(config: ModelConfig) -> tuple[dict[str, Any], str]:
    """The fields of a config.json for our config, and the dialect that belongs to it.

    Raises:
      CheckpointError: no model there is like ours.
    """
    mixers = config.mixers
    recurrent = [m for m in mixers if not isinstance(m, SoftmaxAttentionConfig)]
    first = recurrent[0] if recurrent else mixers[0]
    if len({type(m) for m in mixers}) > 2 or any(m != first for m in recurrent or mixers):
        kinds = ", ".join(type(m).__name__ for m in mixers)
        raise CheckpointError(
            f"mixer: must be one layer's config, and softmax attention beside it, for config.json, got {kinds}"
        )
    write = next((w for kind, w in _WRITE.items() if isinstance(first, kind)), None)
    if write is None:
        kinds = ", ".join(kind.__name__ for kind in _WRITE)
        raise CheckpointError(f"mixer: must be one of {kinds} for config.json, got {type(first).__name__}")
    fields, dialect = write(first, config)
    fields |= {
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "dtype": config.param_dtype,
        "use_cache": True,
    }
    if dialect == "official":
        return {**fields, "d_model": config.hidden_size, "n_layer": config.num_layers}, dialect
    fields |= {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers}
    if config.mlp != "none":
        fields["intermediate_size"] = config.mlp_width
    eps = {"llama": "rms_norm_eps", "mamba": "layer_norm_epsilon"}.get(dialect, "norm_eps")
    fields[eps] = config.norm_eps
    if dialect == "mamba":
        fields["norm_eps"] = config.norm_eps  # flash-linear-attention's name for the same
    if recurrent and len(recurrent) < len(mixers):
        fields["attn"] = _hybrid_to_json(config)
        attending = (m for m in mixers if isinstance(m, SoftmaxAttentionConfig))
        fields["max_position_embeddings"] = max(m.cache_size for m in attending)
    rwkv6 = dialect == "rwkv6"
    for name, given, allowed in (
        ("norm", config.norm, "layer" if rwkv6 else "rms"),
        ("embed_norm", config.embed_norm, config.embed_norm if rwkv6 else False),
        ("mlp", config.mlp, {"rwkv6": "channel_mix", "mamba": "none"}.get(dialect, "swiglu")),
    ):
        if given != allowed:
            raise CheckpointError(
                f"{name}: must be {allowed!r} for {fields['model_type']}'s config.json, got {given!r}"
            )
    return fields, dialect


def _with_attention(mixer: MixerConfig, hybrid: Any, layers: int, cache_size: int) -> Any:
    """The shortest pattern with softmax attention in the layers that fla's `attn` lists."""
    pattern: list[MixerConfig] = [mixer] * layers
    for spec in hybrid if isinstance(hybrid, list) else [hybrid]:
        if not isinstance(spec, dict) or not {"layers", "num_heads"} <= spec.keys():
            raise CheckpointError(f"config.json: attn must have layers and num_heads, got {spec!r}")
        if not isinstance(spec["layers"], list) or not set(spec["layers"]) <= set(range(layers)):
            raise CheckpointError(
                f"config.json: attn's layers must be a list of 0 to {layers - 1}, got {spec['layers']!r}"
            )
        attention = SoftmaxAttentionConfig(cache_size=cache_size, **_Fields(spec).given(_ATTENTION))
        for layer in spec["layers"]:
            pattern[layer] = attention
    period = next(p for p in range(1, layers + 1) if layers % p == 0 and pattern == pattern[:p] * (layers // p))
    return tuple(pattern[:period]) if period > 1 else pattern[0]


def _hybrid_to_json(config: ModelConfig) -> list[dict[str, Any]]:
    specs: dict[SoftmaxAttentionConfig, list[int]] = {}
    for layer in range(config.num_layers):
        mixer = config.mixers[layer % len(config.mixers)]
        if isinstance(mixer, SoftmaxAttentionConfig):
            if mixer.head_size not in (None, config.hidden_size // mixer.num_heads):
                width = config.hidden_size // mixer.num_heads
                raise CheckpointError(
                    f"head_size: must be hidden_size / num_heads = {width} for a pattern's config.json, "
                    f"got {mixer.head_size}"
                )
            specs.setdefault(mixer, []).append(layer)
    return [{"layers": layers, **_named(mixer, _ATTENTION)} for mixer, layers in specs.items()]


def _projected(x: _Fields) -> dict[str, Any]:
    """What fla's GLA and RetNet have in common."""
    x.only("hidden_act", *_SILU)
    x.only("elementwise_affine", True, None)
    feature = x.get("feature_map")
    convolved = x.get("use_short_conv", default=False)
    x.need("num_heads")
    return {
        **x.given(_HEADS),
        "conv_size": x.get("conv_size", default=4) if convolved else 0,
        "feature_map": "silu" if feature == "swish" else feature,
        "output_gate": x.get("use_output_gate", default=True),
    }


def _named(mixer: Any, names: dict[str, str]) -> dict[str, Any]:
    """Fields of ours by their names."""
    return {theirs: getattr(mixer, ours) for theirs, ours in names.items()}


def _written_only_with(mixer: MixerConfig, **fields: Any) -> None:
    """A CheckpointError for a field that config.json has no place for, unless it has this value."""
    for name, value in fields.items():
        if getattr(mixer, name) != value:
            raise CheckpointError(f"{name}: must be {value!r} for config.json, got {getattr(mixer, name)!r}")


def _projected_to_json(mixer: Any) -> dict[str, Any]:
    plain = {"output_norm": "rms", "output_norm_affine": True, "output_gate_bias": False, "conv_bias": False}
    _written_only_with(mixer, **plain)
    if mixer.feature_map == "elu1":
        raise CheckpointError("feature_map: must be another for config.json, got 'elu1'")
    return {
        **_named(mixer, _HEADS),
        "use_short_conv": mixer.conv_size > 0,
        "conv_size": mixer.conv_size or 4,
        "feature_map": mixer.feature_map,
        "use_output_gate": mixer.output_gate,
    }


def _read_gla(x: _Fields) -> tuple[dict[str, Any], str]:
    options = {**_projected(x), "gate_clamp": x.get("clamp_min")}
    return (options if x.get("attn") is None else {"mixer": GatedLinearAttentionConfig(**options)}), "fla"


def _read_official(x: _Fields) -> tuple[dict[str, Any], str]:
    x.only("use_gk", True)
    x.only("use_gv", False)
    options = {"num_heads": x.get("n_head", default=8), "output_gate_bias": True}
    return {**options, "output_norm": "layer", "output_norm_affine": False}, "official"


def _write_gla(mixer: GatedLinearAttentionConfig, config: ModelConfig) -> tuple[dict[str, Any], str]:
    if mixer.output_gate_bias and mixer.output_norm == "layer":
        first = GatedLinearAttentionConfig(
            num_heads=mixer.num_heads, output_gate_bias=True, output_norm="layer", output_norm_affine=False
        )
        _written_only_with(mixer, **first.options())
        for name, given, allowed in (
            ("mlp_size", config.mlp_width, mlp_width(config.hidden_size)),
            ("norm_eps", config.norm_eps, 1e-5),
        ):
            if given != allowed:
                raise CheckpointError(f"{name}: must be {allowed} in the paper's first release, got {given}")
        return {"model_type": "gla", "n_head": mixer.num_heads, "use_gk": True, "use_gv": False}, "official"
    _written_only_with(mixer, gate_low_rank=16, gate_normalizer=16)
    fields = {"model_type": "gla", "architectures": ["GLAForCausalLM"], "clamp_min": mixer.gate_clamp}
    return {**fields, **_projected_to_json(mixer)}, "fla"


def _read_retnet(x: _Fields) -> tuple[dict[str, Any], str]:
    options = _projected(x)
    if (given := options.get("num_kv_heads")) not in (None, options["num_heads"]):
        raise CheckpointError(f"config.json: num_kv_heads must be num_heads or null for retnet here, got {given}")
    # The model there never hands use_short_conv to its layers.
    return {"mixer": RetentionConfig(**options | {"conv_size": 0})}, "fla"


def _write_retnet(mixer: RetentionConfig, config: ModelConfig) -> tuple[dict[str, Any], str]:
    kv_heads = None if mixer.num_kv_heads is None else mixer.num_heads
    _written_only_with(mixer, rope_theta=10000.0, conv_size=0, num_kv_heads=kv_heads)
    return {"model_type": "retnet", "architectures": ["RetNetForCausalLM"], **_projected_to_json(mixer)}, "fla"


def _read_hgrn2(x: _Fields) -> tuple[dict[str, Any], str]:
    x.only("hidden_act", *_SILU)
    x.only("use_lower_bound", True)
    ratio = x.get("expand_ratio") or x.need("hidden_size") // x.need("num_heads")
    convolved = x.get("use_short_conv", default=False)
    mixer = HGRN2Config(expand_ratio=ratio, conv_size=x.get("conv_size", default=4) if convolved else 0)
    return {"mixer": mixer}, "fla"


def _write_hgrn2(mixer: HGRN2Config, config: ModelConfig) -> tuple[dict[str, Any], str]:
    fields: dict[str, Any] = {"model_type": "hgrn2", "architectures": ["HGRN2ForCausalLM"]}
    fields |= {"expand_ratio": mixer.expand_ratio, "use_short_conv": mixer.conv_size > 0}
    return {**fields, "conv_size": mixer.conv_size or 4, "use_lower_bound": True}, "fla"


def _read_linear(x: _Fields) -> tuple[dict[str, Any], str]:
    x.only("hidden_act", *_SILU)
    for name in ("norm_q", "norm_k", "tie_feature_map_qk"):
        x.only(name, False, None)
    x.only("feature_map", *_FEATURES)
    x.need("num_heads")
    mixer = LinearAttentionConfig(
        **x.given(_HEADS),
        feature_map=_FEATURES[x.get("feature_map", default="elementwise_product")],
        normalize=x.get("norm_feature_map", default=False),
    )
    return {"mixer": mixer}, "fla"


def _write_linear(mixer: LinearAttentionConfig, config: ModelConfig) -> tuple[dict[str, Any], str]:
    maps = {ours: theirs for theirs, ours in _FEATURES.items() if theirs is not None}
    _written_only_with(mixer, output_gate=False, conv_size=0, output_norm="rms")
    if mixer.feature_map not in maps:
        allowed = ", ".join(map(str, maps))
        raise CheckpointError(f"feature_map: must be one of {allowed} for config.json, got {mixer.feature_map!r}")
    fields = {"model_type": "linear_attn", "architectures": ["LinearAttentionForCausalLM"]}
    return {
        **fields,
        **_named(mixer, _HEADS),
        "feature_map": maps[mixer.feature_map],
        "norm_feature_map": mixer.normalize,
    }, "fla"


def _read_rwkv6(x: _Fields) -> tuple[dict[str, Any], str]:
    x.only("hidden_act", "sqrelu")
    x.only("norm_bias", True)
    x.need("num_heads")
    mixer = RWKV6Config(**x.given(_RWKV6))
    width = x.get("intermediate_size")
    width = -(-int(x.need("hidden_size") * x.get("hidden_ratio", default=3.5)) // 32) * 32 if width is None else width
    rest = {"norm": "layer", "embed_norm": x.get("norm_first", default=True), "mlp": "channel_mix", "mlp_size": width}
    return {"mixer": mixer, **rest}, "rwkv6"


def _write_rwkv6(mixer: RWKV6Config, config: ModelConfig) -> tuple[dict[str, Any], str]:
    fields: dict[str, Any] = {"model_type": "rwkv6", "architectures": ["RWKV6ForCausalLM"], "hidden_act": "sqrelu"}
    return {**fields, **_named(mixer, _RWKV6), "norm_bias": True, "norm_first": config.embed_norm}, "rwkv6"


def _limit(x: _Fields, name: str) -> tuple[float, float | None]:
    """A pair of bounds, of which the upper may be infinite in one of the ways that JSON writers have for it."""
    low, high = x.get(name, default=(0.0, math.inf))
    high = high["__float__"] if isinstance(high, dict) else high
    return float(low), None if math.isinf(float(high)) else float(high)


def _read_mamba2(x: _Fields) -> tuple[dict[str, Any], str]:
    x.only("hidden_act", *_SILU)
    x.only("rmsnorm", True)
    for name in ("norm_before_gate", "D_has_hdim"):
        x.only(name, False)
    low, high = _limit(x, "time_step_limit" if "time_step_limit" in x.fields else "dt_limit")
    own = x.given({"head_dim": "head_size", "n_groups": "num_groups"})
    return {"mixer": Mamba2Config(time_step_min=low, time_step_max=high, **own, **_mamba(x)), "mlp": "none"}, "mamba"


def _write_mamba2(mixer: Mamba2Config, config: ModelConfig) -> tuple[dict[str, Any], str]:
    high = {"__float__": "Infinity"} if mixer.time_step_max is None else mixer.time_step_max
    heads = mixer.expand * config.hidden_size // mixer.head_size
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        **_named(mixer, _MAMBA),
        "head_dim": mixer.head_size,
        "num_heads": heads,
        "n_groups": mixer.num_groups,
        "time_step_limit": [mixer.time_step_min, high],
        "dt_limit": [mixer.time_step_min, high],
    }, "mamba"


def _read_mamba(x: _Fields) -> tuple[dict[str, Any], str]:
    x.only("hidden_act", *_SILU)
    rank = None if x.get("time_step_rank") == "auto" else x.get("time_step_rank")
    return {"mixer": MambaConfig(time_step_rank=rank, **_mamba(x)), "mlp": "none"}, "mamba"


def _write_mamba(mixer: MambaConfig, config: ModelConfig) -> tuple[dict[str, Any], str]:
    rank = mixer.time_step_rank or -(-config.hidden_size // 16)
    fields: dict[str, Any] = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    inner = {"intermediate_size": mixer.expand * config.hidden_size, "time_step_rank": rank}
    return {**fields, **_named(mixer, _MAMBA), **inner}, "mamba"


def _mamba(x: _Fields) -> dict[str, Any]:
    options = x.given(_MAMBA)
    return options | {"expand": int(options["expand"])} if "expand" in options else options


def _read_attention(x: _Fields) -> tuple[dict[str, Any], str]:
    x.only("hidden_act", *_SILU)
    x.only("qk_norm", False)
    for name in ("attention_bias", "mlp_bias"):
        x.only(name, False)
    rope = x.get("rope_parameters", "rope_scaling", default={})
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"config.json: rope_type must be 'default' here, got {rope}")
    theta = rope.get("rope_theta") or x.get("rope_theta", default=10000.0)
    fla = x.get("num_attention_heads") is None
    mixer = SoftmaxAttentionConfig(
        num_heads=x.need("num_heads" if fla else "num_attention_heads"),
        num_kv_heads=x.get("num_kv_heads", "num_key_value_heads"),
        head_size=x.get("head_dim"),
        window=x.get("window_size", "sliding_window"),
        cache_size=x.get("max_position_embeddings", default=2048),
        rope_theta=float(theta),
        qkv_bias=x.get("qkv_bias", default=False),
    )
    return {"mixer": mixer}, "fla" if fla else "llama"


def _write_attention(mixer: SoftmaxAttentionConfig, config: ModelConfig) -> tuple[dict[str, Any], str]:
    _written_only_with(mixer, qkv_bias=False)
    fields: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    if mixer.window is not None:
        fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": mixer.window}
    return {
        **fields,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads or mixer.num_heads,
        "head_dim": mixer.head_size or config.hidden_size // mixer.num_heads,
        "max_position_embeddings": mixer.cache_size,
        "rope_theta": mixer.rope_theta,
        "rope_parameters": {"rope_theta": mixer.rope_theta, "rope_type": "default"},
    }, "llama"


_READ: dict[str, Callable[[_Fields], tuple[dict[str, Any], str]]] = {
    "gla": _read_gla,
    "official": _read_official,
    "retnet": _read_retnet,
    "hgrn2": _read_hgrn2,
    "linear_attn": _read_linear,
    "rwkv6": _read_rwkv6,
    "mamba2": _read_mamba2,
    "mamba": _read_mamba,
    "transformer": _read_attention,
    "llama": _read_attention,
    "mistral": _read_attention,
}
_WRITE: dict[type, Callable[[Any, ModelConfig], tuple[dict[str, Any], str]]] = {
    GatedLinearAttentionConfig: _write_gla,
    RetentionConfig: _write_retnet,
    HGRN2Config: _write_hgrn2,
    LinearAttentionConfig: _write_linear,
    RWKV6Config: _write_rwkv6,
    Mamba2Config: _write_mamba2,
    MambaConfig: _write_mamba,
    SoftmaxAttentionConfig: _write_attention,
}
