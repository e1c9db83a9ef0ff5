import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.nn import GatedLinearAttention, LayerNorm
from gla_jax.nn.attention import _log_decay
from gla_jax.nn.recurrent import check_common

FEATURE_MAPS = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "elu1": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
}


def swish(x):
    return x / (1 + np.exp(-x))


def oracle(layer, x):
    """The docstring's equations, token by token in float64, for one sequence x [t, d] and no short convolutions."""
    kernel = {
        name: np.asarray(getattr(layer, name).kernel[...], np.float64)
        for name in ("q_proj", "k_proj", "v_proj", "gate_down", "gate_up", "o_proj")
    }
    x, feature = np.asarray(x, np.float64), FEATURE_MAPS[layer.feature_map]
    h, hk, k, v = layer.num_heads, layer.num_kv_heads, layer.head_k, layer.head_v
    logit = x @ kernel["gate_down"] @ kernel["gate_up"] + np.asarray(layer.gate_up.bias[...], np.float64)
    g = -np.log1p(np.exp(-logit)) / layer.gate_normalizer
    if layer.gate_clamp is not None:
        g = np.maximum(g, layer.gate_clamp)
    state, out = np.zeros((hk, k, v)), []
    for x_t, g_t in zip(x, g.reshape(-1, hk, k), strict=True):
        q_t = feature((x_t @ kernel["q_proj"]).reshape(h, k))
        k_t = feature((x_t @ kernel["k_proj"]).reshape(hk, k))
        v_t = (x_t @ kernel["v_proj"]).reshape(hk, v)
        state = np.exp(g_t)[..., None] * state + k_t[..., None] * v_t[:, None]
        o = np.stack([q_t[i] @ state[i // (h // hk)] for i in range(h)]) * k**-0.5
        norm = layer.o_norm
        if isinstance(norm, LayerNorm):
            o = o - o.mean(-1, keepdims=True)
        o = o / np.sqrt((o**2).mean(-1, keepdims=True) + norm.eps)
        if norm.scale is not None:
            o = o * np.asarray(norm.scale[...], np.float64)
        if isinstance(norm, LayerNorm) and norm.bias is not None:
            o = o + np.asarray(norm.bias[...], np.float64)
        y = o.reshape(-1)
        if layer.out_gate is not None:
            r = x_t @ np.asarray(layer.out_gate.kernel[...], np.float64)
            y = y * swish(r if layer.out_gate.bias is None else r + np.asarray(layer.out_gate.bias[...], np.float64))
        out.append(y @ kernel["o_proj"])
    return np.stack(out)


def build(**options):
    layer = GatedLinearAttention(
        24, **{"num_heads": 4, "gate_low_rank": 5, "init_std": 0.3, **options}, rngs=nnx.Rngs(0)
    )
    keys = iter(jax.random.split(jax.random.key(1), 20))
    for path, param in nnx.to_flat_state(nnx.state(layer)):
        if path[-1] in ("scale", "bias"):
            param.set_value(param + jax.random.normal(next(keys), param.shape))
    return layer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": 2},
        {"num_kv_heads": 1, "expand_k": 1.0, "expand_v": 0.5},
        {"gate_clamp": -0.03},
        {"gate_normalizer": 0.05},
        {"feature_map": "relu"},
        {"feature_map": "elu1", "output_gate": False},
        {"output_gate_bias": True, "output_norm": "layer", "output_norm_affine": False},
        {"output_norm": "layer"},
        {"output_norm_affine": False},
        {"implementation": "reference"},
    ],
    ids=str,
)
def test_is_its_equations(options):
    layer = build(**options)
    x = jax.random.normal(jax.random.key(2), (2, 37, 24))
    y = layer(x)
    for row in range(2):
        np.testing.assert_allclose(y[row], oracle(layer, x[row]), rtol=2e-4, atol=2e-5)


def test_short_convolutions_stand_before_the_feature_map():
    layer = build(conv_size=3, feature_map="relu")
    bare = build(feature_map="relu")
    x = jax.random.normal(jax.random.key(2), (2, 9, 24))
    # With taps (0, 0, 1) the convolution is the identity, and only its silu is left.
    for conv in (layer.q_conv, layer.k_conv, layer.v_conv):
        conv.kernel[...] = jnp.zeros_like(conv.kernel[...]).at[-1].set(1)
    streams = {name: jax.nn.silu(p) if "conv" in name else p for name, p in bare._streams(x).items()}
    q, k, v, g = bare._arguments(streams, x, None, None).values()
    from gla_jax import gated_linear_attention

    o, _ = gated_linear_attention(q, k, v, g)
    np.testing.assert_allclose(layer(x), bare._output(o, x, streams, {}), rtol=1e-5, atol=1e-6)


def test_gates_are_rounded_last_and_states_are_float32():
    layer = GatedLinearAttention(24, dtype=jnp.bfloat16, gate_low_rank=5, conv_size=3, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 5, 24), jnp.bfloat16)
    low, up = layer.gate_down(x).astype(jnp.float32), layer.gate_up.kernel[...].astype(jnp.bfloat16)
    g = jax.nn.log_sigmoid(low @ up.astype(jnp.float32) + layer.gate_up.bias[...]) / layer.gate_normalizer
    np.testing.assert_array_equal(layer.decay(x), g.reshape(2, 5, *layer.decay(x).shape[2:]).astype(jnp.bfloat16))
    y, cache = layer.prefill(x, layer.init_cache(2))
    assert y.dtype == jnp.bfloat16
    assert cache["state"].dtype == jnp.float32
    assert cache["q_conv"].dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, layer.step(x[:, 0], cache)[1])


def test_low_precision_is_near_float32():
    wide = GatedLinearAttention(64, init_std=0.2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(3), (2, 40, 64))
    expected = wide(x)
    for dtype, tolerance in ((jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)):
        layer = GatedLinearAttention(64, init_std=0.2, dtype=dtype, rngs=nnx.Rngs(0))
        error = layer(x.astype(dtype)).astype(jnp.float32) - expected
        assert jnp.sqrt(jnp.mean(error**2) / jnp.mean(expected**2)) < tolerance


def test_packed_documents_are_strangers():
    layer = build(conv_size=4)
    x = jax.random.normal(jax.random.key(2), (1, 20, 24))
    packed = layer(x, jnp.array([[-1] * 2 + [0] * 7 + [3] * 8 + [-1] * 3]))
    np.testing.assert_allclose(packed[:, 2:9], layer(x[:, 2:9]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed[:, 9:17], layer(x[:, 9:17]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: must divide num_heads = 4, got 3"),
        ({"num_heads": 5}, "expand_k: hidden_size * expand_k = 24 * 0.5 must be a multiple of num_heads = 5"),
        ({"expand_v": 0.1}, "expand_v: hidden_size * expand_v"),
        ({"feature_map": "exp"}, "feature_map: must be one of None, relu, "),
        ({"output_norm": "group"}, "output_norm: must be one of rms, layer, none, got 'group'"),
        ({"num_heads": 0}, "num_heads: must be at least 1, got 0"),
        ({"gate_normalizer": 0.0}, "gate_normalizer: must be positive, got 0.0"),
        ({"gate_low_rank": 0}, "gate_low_rank: must be at least 1, got 0"),
        ({"gate_clamp": 5.0}, "gate_clamp: must be negative or None, got 5.0"),
        ({"conv_size": -1}, "conv_size: must be 0 (none) or more, got -1"),
        ({"norm_eps": 0.0}, "norm_eps: must be positive, got 0.0"),
        ({"norm_eps": float("inf")}, "norm_eps: must be finite, got inf"),
        ({"init_std": float("nan")}, "init_std: must be finite, got nan"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options, says):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the text is compared below
        build(**options)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_what_beartype_refuses_here_is_named_elsewhere():
    # Called by itself: while tests run, beartype would refuse these values first.
    for arguments, says in (
        ((24, 1e-5, 0.02, "cuda"), "implementation: must be one of None, mosaic_gpu, xla, reference, got 'cuda'"),
        ((24.0, 1e-5, 0.02, None), "hidden_size: must be int, got 24.0"),
        ((0, 1e-5, 0.02, None), "hidden_size: must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(says) + "$"):
            inspect.unwrap(check_common)(*arguments)


def test_gradients_of_the_gate_are_those_of_its_equation():
    keys = jax.random.split(jax.random.key(0), 4)
    low, up = jax.random.normal(keys[0], (2, 7, 3)), 4 * jax.random.normal(keys[1], (3, 5))
    bias, dg = jax.random.normal(keys[2], (5,)), jax.random.normal(keys[3], (2, 7, 5))
    plain = lambda low, up, bias: jax.nn.log_sigmoid(low @ up + bias) / 16
    found, wanted = (jax.vjp(f, low, up, bias)[1](dg) for f in (functools.partial(_log_decay, 16.0), plain))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    half = low.astype(jnp.bfloat16), up.astype(jnp.bfloat16), bias
    rounded, _, _ = jax.vjp(functools.partial(_log_decay, 16.0), *half)[1](dg.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), wanted[0], rtol=0.05, atol=0.02)
