import dataclasses
import json
import re

import jax
import pytest
from flax import nnx

from gla_jax.nn import CausalLM, CausalLMConfig, GLAConfig
from gla_jax.nn.checked import check_type

PRESETS = {"tiny": 902_784, "gla_340m": 341_707_776, "gla_1_3b": 1_365_514_240, "gla_2_7b": 2_703_583_744}
# 341.1 M, 1.364 B, 347 M, 1.352 B, 352.8 M, 1.335 B: the baselines of arXiv 2312.06635, sizes from their code.
BASELINES = {
    "transformer_340m": 341_099_520,
    "transformer_1_3b": 1_364_297_728,
    "retnet_340m": 347_403_264,
    "retnet_1_3b": 1_351_727_104,
    "mamba_340m": 352_797_696,
    "mamba_1_3b": 1_334_740_992,
}


@pytest.mark.parametrize("name", PRESETS | BASELINES)
def test_presets_have_the_published_parameter_counts(name):
    config = getattr(GLAConfig if name in PRESETS else CausalLMConfig, name)()
    state = jax.eval_shape(lambda: nnx.state(CausalLM(config, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == {**PRESETS, **BASELINES}[name]


def test_survives_json():
    config = GLAConfig.tiny().replace(num_kv_heads=1, gate_clamp=-5.0, remat="dots")
    assert GLAConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_becomes_flags():
    import tyro

    flags = ["--hidden-size", "64", "--num-kv-heads", "2", "--gate-clamp", "-5", "--no-output-gate", "--remat", "full"]
    config = tyro.cli(GLAConfig, args=flags, default=GLAConfig.tiny())
    assert config == GLAConfig.tiny().replace(
        hidden_size=64, num_kv_heads=2, gate_clamp=-5.0, output_gate=False, remat="full"
    )


@pytest.mark.parametrize(
    ("declared", "value", "allowed"),
    [
        ("int", 128.0, False),
        ("int", True, False),
        ("bool", 1, False),
        ("str", None, False),
        ("int | None", "4", False),
        ("float", 1, True),
        ("int | None", None, True),
        ("str | None", "x", True),
        ("bool", False, True),
    ],
)
def test_types_are_checked(declared, value, allowed):
    # Called by itself: while tests run, beartype would refuse these values first.
    if allowed:
        check_type("field", declared, value)
    else:
        with pytest.raises(ValueError, match=rf"^field: must be {re.escape(declared)}, got {value!r}$"):
            check_type("field", declared, value)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("vocab_size", 0, "at least 1, got 0"),
        ("num_layers", -1, "at least 1, got -1"),
        ("num_kv_heads", 3, "must divide num_heads = 2, got 3"),
        ("num_kv_heads", 0, "must divide num_heads = 2, got 0"),
        ("expand_k", 0.3, "multiple of num_heads = 2"),
        ("expand_v", 0.0, "positive, got 0.0"),
        ("gate_clamp", 1.0, "negative or None, got 1.0"),
        ("gate_normalizer", -16.0, "positive, got -16.0"),
        ("conv_size", -4, "0 (none) or more, got -4"),
        ("feature_map", "exp", "one of None, relu"),
        ("output_norm", "batch", "one of rms, layer, none, got 'batch'"),
        ("mlp_size", 0, "at least 1 or None, got 0"),
        ("dtype", "float8", "one of float32, bfloat16, float16, got 'float8'"),
        ("param_dtype", "fp32", "one of float32"),
        ("remat", "everything", "one of none, dots, full"),
        ("layer_unroll", 0, "at least 1, got 0"),
        ("implementation", "cuda", "one of None, "),
        ("norm_eps", float("inf"), "must be finite, got inf"),
        ("gate_clamp", float("-inf"), "must be finite, got -inf"),
    ],
)
def test_a_bad_field_is_named_in_one_line(field, value, says):
    with pytest.raises(ValueError, match=f"^{field}: ") as error:
        GLAConfig.tiny().replace(**{field: value})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_tiny_names_the_layers_that_there_are():
    with pytest.raises(ValueError, match=r"^mixer: must be one of gla, .*, got 'gru'$"):
        CausalLMConfig.tiny("gru")
