import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.nn import ShortConvolution


def oracle(conv, x, segment_ids=None):
    """Token by token, in float64, over each document's own tokens."""
    x = np.asarray(x, np.float64)
    taps, y = np.asarray(conv.kernel[...], np.float64), np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        for j in range(conv.size):
            inside = t - j >= 0
            if inside and segment_ids is not None:
                between = np.asarray(segment_ids)[b, t - j : t + 1]
                inside = (between == between[0]).all()
            if inside:
                y[b, t] += taps[conv.size - 1 - j] * x[b, t - j]
    if conv.bias is not None:
        y += np.asarray(conv.bias[...], np.float64)
    return y / (1 + np.exp(-y)) if conv.activation else y


def inputs(t=13, c=5, b=3):
    return jax.random.normal(jax.random.key(1), (b, t, c))


@pytest.mark.parametrize("size", [1, 2, 4, 20])
@pytest.mark.parametrize("plain", [True, False])
def test_is_its_equation(size, plain):
    conv = ShortConvolution(5, size, bias=not plain, activation=not plain, rngs=nnx.Rngs(0))
    x = inputs()
    np.testing.assert_allclose(conv(x), oracle(conv, x), rtol=1e-5, atol=1e-6)
    ids = jnp.array([[0] * 4 + [1] * 3 + [0] * 6, [-1] * 2 + [5] * 11, [2] * 9 + [-1] * 4])
    valid = np.asarray(ids >= 0)
    np.testing.assert_allclose(np.asarray(conv(x, ids))[valid], oracle(conv, x, ids)[valid], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4, 20])
@pytest.mark.parametrize("split", [1, 2, 7, 12])
def test_a_sequence_in_parts_is_the_sequence(size, split):
    conv = ShortConvolution(5, size, bias=True, rngs=nnx.Rngs(0))
    x, whole = inputs(), conv(inputs())
    y, cache = conv.prefill(x[:, :split], conv.init_cache(3))
    np.testing.assert_allclose(y, whole[:, :split], rtol=1e-5, atol=1e-6)
    middle, cache = conv.prefill(x[:, split:-1], cache)
    np.testing.assert_allclose(middle, whole[:, split:-1], rtol=1e-5, atol=1e-6)
    last, cache = conv.step(x[:, -1], cache)
    np.testing.assert_allclose(last, whole[:, -1], rtol=1e-5, atol=1e-6)
    assert cache.shape == (3, size - 1, 5)


def test_the_cache_after_padding_and_documents_is_that_of_the_last_tokens():
    conv = ShortConvolution(5, 4, rngs=nnx.Rngs(0))
    x, following = inputs(), jax.random.normal(jax.random.key(2), (3, 5))
    # Right padding; left padding; a document that began one token ago.
    ids = jnp.array([[0] * 9 + [-1] * 4, [-1] * 4 + [0] * 9, [0] * 12 + [1]])
    alone = [x[0, :9], x[1, 4:], x[2, 12:]]
    y, _ = conv.step(following, conv.prefill(x, conv.init_cache(3), ids)[1])
    for row, own in enumerate(alone):
        expected = conv(jnp.concatenate([own, following[row : row + 1]])[None])[0, -1]
        np.testing.assert_allclose(y[row], expected, rtol=1e-5, atol=1e-6)


def test_a_row_of_padding_keeps_its_cache():
    conv = ShortConvolution(5, 4, rngs=nnx.Rngs(0))
    _, before = conv.prefill(inputs(), conv.init_cache(3))
    _, after = conv.prefill(2 * inputs(), before, jnp.full((3, 13), -1).at[0].set(0))
    np.testing.assert_array_equal(after[1:], before[1:])
    assert not np.array_equal(after[0], before[0])


def test_the_cache_enters_the_first_document_only():
    conv = ShortConvolution(5, 4, rngs=nnx.Rngs(0))
    x = inputs(20)
    _, cache = conv.prefill(x[:, :7], conv.init_cache(3))
    ids = jnp.array([[3] * 2 + [4] * 11] * 3)
    y, _ = conv.prefill(x[:, 7:], cache, ids)
    np.testing.assert_allclose(y[:, :2], conv(x)[:, 7:9], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y[:, 2:], conv(x[:, 9:]), rtol=1e-5, atol=1e-6)


def test_gradients_stay_inside_a_document():
    conv = ShortConvolution(5, 4, rngs=nnx.Rngs(0))
    ids = jnp.array([[0] * 5 + [1] * 8] * 3)
    dx = jax.grad(lambda x: conv(x, ids)[:, 5:].sum())(inputs())
    assert not dx[:, :5].any()
    assert dx[:, 5:].all()


def test_computes_in_its_dtype():
    conv = ShortConvolution(5, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert conv(inputs()).dtype == conv.init_cache(1).dtype == jnp.bfloat16
    assert conv.kernel.dtype == jnp.float32


def test_needs_a_tap():
    with pytest.raises(ValueError, match=r"^size: .*got 0"):
        ShortConvolution(5, 0, rngs=nnx.Rngs(0))
