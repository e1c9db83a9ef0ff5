import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.train.data import Batch
from gla_jax.train.mesh import make_mesh
from gla_jax.train.step import make_program, weighted_nats

from .small import small

CONFIG = small("r")
TOKENS = np.random.default_rng(0).integers(0, 255, (8, 33)).astype(np.uint8)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.fixture(scope="module")
def program():
    return make_program(CONFIG, make_mesh(CONFIG))


def test_nats_are_the_weighted_negative_log_likelihood():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5)), jnp.bfloat16)
    targets, weights = jnp.array([[1, 2, 3], [3, 2, 1]]), jnp.array([[1.0, 0.0, 2.0], [1.0, 1.0, 0.5]])
    total = weighted_nats(logits, targets, weights)
    likelihood = jax.nn.log_softmax(logits.astype(jnp.float32))
    each = np.array([[-float(likelihood[i, j, targets[i, j]]) for j in range(3)] for i in range(2)])
    np.testing.assert_allclose(total, np.sum(each * weights), rtol=1e-6)
    np.testing.assert_allclose(weighted_nats(logits, targets, None), np.sum(each), rtol=1e-6)
    assert total.dtype == jnp.float32


def test_steps_learn_and_count(program):
    state, losses = program.initialize(), []
    for _ in range(10):
        state, metrics = program.train(state, program.place(BATCH))
        losses.append(float(metrics["loss"]))
    assert metrics.keys() == {"loss", "grad_norm", "learning_rate", "rejected"}
    assert losses[0] == pytest.approx(np.log(256), rel=0.1)
    assert losses[-1] < losses[0] - 0.5
    assert int(state.step) == 10


def test_the_first_loss_is_what_evaluation_says(program):
    state = program.initialize()
    total = float(program.evaluate(state.params, program.place(BATCH)))
    _, metrics = program.train(state, program.place(BATCH))
    np.testing.assert_allclose(total / (8 * 32), float(metrics["loss"]), rtol=1e-5)


def test_what_is_abstract_is_what_is_made(program):
    state = program.initialize()
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    assert described == program.abstract


def test_seeds_decide_the_weights(program):
    a, b = program.initialize(), program.initialize()
    jax.tree.map(np.testing.assert_array_equal, a, b)
    other = make_program(small("r", seed=1), make_mesh(CONFIG)).initialize()
    assert any(np.any(x != y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(other), strict=True))
