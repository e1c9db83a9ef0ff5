import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.train.step import make_mesh, make_program, next_token_nats

from .small import small

CONFIG = small("r")
TOKENS = np.random.default_rng(0).integers(0, 255, (8, 33)).astype(np.uint8)


@pytest.fixture(scope="module")
def program():
    return make_program(CONFIG, make_mesh(CONFIG.batch))


def test_nats_are_the_weighted_negative_log_likelihood():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5)), jnp.bfloat16)
    tokens, weights = jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]]), jnp.array([[1.0, 0.0, 2.0], [1.0, 1.0, 0.5]])
    total, count = next_token_nats(lambda _: logits, tokens, weights)
    likelihood = jax.nn.log_softmax(logits.astype(jnp.float32))
    expected = -sum(float(weights[i, j] * likelihood[i, j, tokens[i, j + 1]]) for i in range(2) for j in range(3))
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert [total.dtype, float(count)] == [jnp.float32, 5.5]
    assert float(next_token_nats(lambda _: logits, tokens, None)[1]) == 6


def test_steps_learn_and_count(program):
    state, losses = program.initialize(), []
    for _ in range(10):
        state, metrics = program.train(state, program.place(TOKENS))
        losses.append(float(metrics["loss"]))
    assert metrics.keys() == {"loss", "grad_norm", "learning_rate"}
    assert losses[0] == pytest.approx(np.log(256), rel=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 10


def test_the_first_loss_is_what_evaluation_says(program):
    state = program.initialize()
    total = float(program.evaluate(state.params, program.place(TOKENS), program.place(np.ones((8, 32), np.float32))))
    _, metrics = program.train(state, program.place(TOKENS))
    np.testing.assert_allclose(total / (8 * 32), float(metrics["loss"]), rtol=1e-5)


def test_what_is_abstract_is_what_is_made(program):
    state = program.initialize()
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    assert described == program.abstract


def test_seeds_decide_the_weights(program):
    a, b = program.initialize(), program.initialize()
    jax.tree.map(np.testing.assert_array_equal, a, b)
    other = make_program(small("r", seed=1), make_mesh(8)).initialize()
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(other), strict=True))
