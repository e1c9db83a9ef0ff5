import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.train.loss import linear_cross_entropy, weighted_nats


def test_nats_are_the_weighted_negative_log_likelihood():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5)), jnp.bfloat16)
    targets, weights = jnp.array([[1, 2, 3], [3, 2, 1]]), jnp.array([[1.0, 0.0, 2.0], [1.0, 1.0, 0.5]])
    total = weighted_nats(logits, targets, weights)
    likelihood = jax.nn.log_softmax(logits.astype(jnp.float32))
    each = np.array([[-float(likelihood[i, j, targets[i, j]]) for j in range(3)] for i in range(2)])
    np.testing.assert_allclose(total, np.sum(each * weights), rtol=1e-6)
    np.testing.assert_allclose(weighted_nats(logits, targets, None), np.sum(each), rtol=1e-6)
    assert total.dtype == jnp.float32


def plain(hidden, weight, targets, weights):
    return weighted_nats(jnp.dot(hidden, weight, preferred_element_type=jnp.float32), targets, weights)


def case(dtype, weighted, parts=3, rows=(2, 5), d=16, vocab=37):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((parts, *rows, d)), dtype)
    weight = jnp.asarray(rng.standard_normal((d, vocab)), dtype)
    targets = jnp.asarray(rng.integers(0, vocab, (parts, *rows)))
    return hidden, weight, targets, jnp.asarray(rng.random((parts, *rows)), jnp.float32) if weighted else None


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_loss_and_gradients_are_those_of_all_logits_at_once(dtype, rtol, weighted):
    arguments = case(dtype, weighted)
    # Through a mean, so that the cotangent is not 1.
    value, (dhidden, dweight) = jax.value_and_grad(lambda *x: linear_cross_entropy(*x) / 30, (0, 1))(*arguments)
    exact = tuple(jnp.asarray(x, jnp.float32) for x in arguments[:2]) + arguments[2:]
    want, (want_hidden, want_weight) = jax.value_and_grad(lambda *x: plain(*x) / 30, (0, 1))(*exact)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert dhidden.dtype == dweight.dtype == dtype
    for got, wanted in ((dhidden, want_hidden), (dweight, want_weight)):
        difference = np.linalg.norm(np.asarray(got, np.float64) - wanted)
        assert difference <= rtol * np.linalg.norm(wanted)
    np.testing.assert_allclose(linear_cross_entropy(*arguments), 30 * value, rtol=1e-5)  # not differentiated


def test_large_logits_do_not_overflow():
    hidden, weight, targets, _ = case(jnp.float32, False)
    found = jax.value_and_grad(linear_cross_entropy, (0, 1))(1e3 * hidden, weight, targets, None)
    want = jax.value_and_grad(plain, (0, 1))(1e3 * hidden, weight, targets, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), found, want)


def test_no_more_than_a_part_of_the_logits_is_held():
    hidden, weight, targets, _ = case(jnp.float32, False, parts=8, rows=(64,), vocab=512)
    step = jax.jit(jax.value_and_grad(linear_cross_entropy, (0, 1))).lower(hidden, weight, targets, None).compile()
    at_once = jax.jit(jax.value_and_grad(plain, (0, 1))).lower(hidden, weight, targets, None).compile()
    assert "f32[8,64,512]" in at_once.as_text()
    assert "f32[8,64,512]" not in step.as_text()
    held = step.memory_analysis().temp_size_in_bytes, at_once.memory_analysis().temp_size_in_bytes
    assert held[0] < held[1] / 2, held


def test_a_second_derivative_is_refused():
    hidden, *rest = case(jnp.float32, False)
    gradient = jax.grad(linear_cross_entropy)
    with pytest.raises(TypeError, match="linear_cross_entropy: its gradients have no derivatives"):
        jax.grad(lambda hidden: jnp.sum(jax.checkpoint(gradient)(hidden, *rest) ** 2))(hidden)
    # As in a scan of steps, which is not differentiated itself.
    _, each = jax.lax.scan(lambda carry, x: (carry, jax.checkpoint(gradient)(x, *rest)), None, hidden[None])
    np.testing.assert_allclose(each[0], gradient(hidden, *rest), rtol=1e-6)
