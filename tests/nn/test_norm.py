import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.nn import LayerNorm, RMSNorm


def test_rms_norm_is_its_equation():
    x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    norm = RMSNorm(7, eps=0.1, rngs=nnx.Rngs(0))
    norm.scale[...] = jnp.arange(1.0, 8.0)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.1) * np.arange(1, 8)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-6)


def test_layer_norm_is_its_equation():
    x = np.random.default_rng(1).normal(3, 2, size=(4, 7)).astype(np.float32)
    norm = LayerNorm(7, eps=0.1, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jnp.arange(1.0, 8.0), jnp.arange(7.0)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 0.1)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected * np.arange(1, 8) + np.arange(7), rtol=2e-5)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_without_parameters(norm):
    plain = norm(7, affine=False, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(plain))
    x = jnp.arange(14.0).reshape(2, 7)
    np.testing.assert_array_equal(plain(x), norm(7, rngs=nnx.Rngs(0))(x))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_computes_in_float32_whatever_comes_in(norm):
    x = jax.random.normal(jax.random.key(0), (4, 512)) * 300  # its squares overflow float16
    half = norm(512, rngs=nnx.Rngs(0))(x.astype(jnp.float16))
    assert half.dtype == jnp.float16
    np.testing.assert_allclose(half, norm(512, rngs=nnx.Rngs(0))(x), atol=5e-3)
    assert norm(512, dtype=jnp.float32, rngs=nnx.Rngs(0))(x.astype(jnp.bfloat16)).dtype == jnp.float32
