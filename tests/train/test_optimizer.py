import jax
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from gla_jax.nn import GLAForCausalLM
from gla_jax.train.optimizer import make_optimizer, make_schedule, matrix_axes

from .small import MODEL, small


def test_the_learning_rate_rises_then_falls_to_its_last_value():
    config = small("r", steps=100, warmup=0.1, learning_rate=1e-2, final_learning_rate=0.1)
    rate = np.array([make_schedule(config)(step) for step in range(101)])
    assert rate[0] == pytest.approx(1e-2 / 11)
    assert np.all(np.diff(rate[:11]) > 0)
    assert rate[10] == pytest.approx(1e-2)
    assert np.all(np.diff(rate[10:]) < 0)
    assert rate[100] == pytest.approx(1e-3)
    flat = small("r", steps=100, warmup=0.0, final_learning_rate=1.0)
    np.testing.assert_allclose(np.array([make_schedule(flat)(s) for s in (0, 50)]), flat.learning_rate, rtol=1e-6)


def test_wsd_is_constant_between_its_rise_and_its_fall():
    config = small("r", steps=100, warmup=0.1, schedule="wsd", decay=0.3, learning_rate=1e-2, final_learning_rate=0.1)
    rate = np.array([make_schedule(config)(step) for step in range(101)])
    np.testing.assert_allclose(rate[10:71], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(np.diff(rate[70:101]), -9e-3 / 30, rtol=1e-3)
    assert rate[0] == pytest.approx(1e-2 / 11)
    assert rate[100] == pytest.approx(1e-3)


def test_matrices_are_the_projections_and_their_stack_axis_is_no_matrix_axis():
    variables = nnx.split(nnx.eval_shape(lambda: GLAForCausalLM(MODEL, rngs=nnx.Rngs(0))))[1]
    is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    axes = jax.tree_util.tree_leaves_with_path(matrix_axes(variables), is_leaf=is_leaf)
    names = {path[-2].key: found for path, found in axes if found is not None}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "out_gate", "gate_proj", "up_proj", "down_proj"}
    assert names.keys() == projections
    assert set(names.values()) == {MuonDimensionNumbers(1, 2)}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_decay_reaches_matrices_only(name):
    config = small("r", optimizer=name, weight_decay=0.5, warmup=0.0, final_learning_rate=1.0)
    params = nnx.split(GLAForCausalLM(MODEL, rngs=nnx.Rngs(0)))[1]
    optimizer, values = make_optimizer(config, params), nnx.to_pure_dict(params)
    zeros = jax.tree.map(np.zeros_like, values)
    updates, _ = optimizer.update(zeros, optimizer.init(values), values)
    after = optax.apply_updates(values, updates)
    shrunk = jax.tree.map(lambda new, old: float(np.max(np.abs(new - old))) > 0, after, values)
    is_matrix = jax.tree.map(
        lambda x: x is not None, matrix_axes(params), is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
    )
    assert shrunk == is_matrix
    kernel = lambda tree: tree["layers"]["mixer"]["q_proj"]["kernel"]
    np.testing.assert_allclose(kernel(after), kernel(values) * (1 - 0.5 * config.learning_rate), rtol=1e-5)


def test_the_gradient_is_clipped_before_all_else():
    config = small("r", optimizer="adamw", clip=1.0)
    params = nnx.split(GLAForCausalLM(MODEL, rngs=nnx.Rngs(0)))[1]
    optimizer, values = make_optimizer(config, params), nnx.to_pure_dict(params)
    state = optimizer.init(values)
    gradients = jax.tree.map(lambda x: np.full(x.shape, 1.0, np.float32), values)
    updates = [optimizer.update(jax.tree.map(lambda g, s=s: g * s, gradients), state, values)[1] for s in (1e3, 1e6)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *updates)
