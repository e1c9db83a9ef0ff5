import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.train.config import MeshConfig
from gla_jax.train.data import Batch
from gla_jax.train.mesh import make_mesh
from gla_jax.train.step import REASONS, Monitor, _fewest_parts, _judge, make_program

from .small import MODEL, small

CONFIG = small("r")
TOKENS = np.random.default_rng(0).integers(0, 255, (8, 33)).astype(np.uint8)
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:])


@pytest.fixture(scope="module")
def program():
    return make_program(CONFIG, make_mesh(CONFIG))


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


def stepped(config, batches):
    program = make_program(config, make_mesh(config))
    state, told = program.initialize(), []
    for batch in batches:
        before = jax.tree.map(np.asarray, state)
        state, metrics = program.train(state, program.place(batch))
        told.append(REASONS[int(metrics["rejected"])])
        if told[-1]:
            kept = (state.params, state.optimizer, state.average)
            jax.tree.map(np.testing.assert_array_equal, kept, (before.params, before.optimizer, before.average))
    return state, told


ONE = MeshConfig(data=1)
QUICK = MODEL.replace(implementation="reference")  # the op that compiles soonest
TOO_HEAVY = BATCH._replace(weights=np.full((8, 32), np.nan, np.float32))


def test_a_step_that_is_not_finite_leaves_no_trace():
    config = small("r", mesh=ONE, optimizer="adamw", model=QUICK, ema=0.9)
    state, told = stepped(config, [BATCH, TOO_HEAVY, BATCH])
    assert told == ["", "the loss is not finite", ""]
    assert int(state.step) == 3
    other, _ = stepped(config, [BATCH, BATCH])
    # But for the learning rate, which follows the optimizer's count, as if it had not been.
    jax.tree.map(np.testing.assert_array_equal, state.params, other.params)
    jax.tree.map(np.testing.assert_array_equal, state.average, other.average)


def test_a_spike_is_rejected_until_norms_have_risen_for_good():
    monitor = Monitor(jnp.float32(0), jnp.int32(0))
    reasons = []
    for norm in [1.0] * 25 + [50.0] + [1.1] * 3 + [12.0] * 30:
        rejected, monitor = _judge(10.0, monitor, jnp.float32(1), jnp.float32(norm))
        reasons.append(REASONS[int(rejected)])
    assert reasons[:25] == [""] * 25
    assert reasons[25] == "the gradient's norm is a spike"
    assert reasons[26:29] == [""] * 3
    assert reasons[-1] == ""
    assert int(_judge(None, monitor, jnp.float32(1), jnp.float32(1e9))[0]) == 0
    assert REASONS[int(_judge(10.0, monitor, jnp.float32(1), jnp.float32(jnp.inf))[0])] == "the gradient is not finite"
    # A spike among the first steps is none.
    assert int(_judge(10.0, Monitor(jnp.float32(1), jnp.int32(3)), jnp.float32(1), jnp.float32(99))[0]) == 0


def test_the_running_mean_of_the_parameters():
    config = small("r", mesh=ONE, optimizer="adamw", model=QUICK, ema=0.75)
    program = make_program(config, make_mesh(config))
    state = program.initialize()
    want = jax.tree.map(np.asarray, state.params)
    for _ in range(3):
        state, _ = program.train(state, program.place(BATCH))
        want = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * np.asarray(p), want, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.evaluated, want)


def test_bfloat16_gradients_are_nearly_the_same():
    program = {
        d: make_program(
            small("r", mesh=ONE, optimizer="adamw", model=QUICK, gradient_dtype=d), make_mesh(small("r", mesh=ONE))
        )
        for d in ("float32", "bfloat16")
    }
    norms = {}
    for name, one in program.items():
        state, metrics = one.train(one.initialize(), one.place(BATCH))
        norms[name] = float(metrics["grad_norm"])
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert norms["float32"] != norms["bfloat16"]
    assert norms["bfloat16"] == pytest.approx(norms["float32"], rel=0.02)


def test_weights_of_microbatches_are_of_tokens():
    """A microbatch with few tokens counts for few: the mean is over tokens."""
    weights = np.zeros((8, 32), np.float32)
    weights[0], weights[1:, :3] = 1, 1
    batch = BATCH._replace(weights=weights)
    whole, parts = (
        make_program(
            small("r", mesh=ONE, optimizer="adamw", model=QUICK, accumulate=n), make_mesh(small("r", mesh=ONE))
        )
        for n in (1, 4)
    )
    results = [p.train(p.initialize(), p.place(batch)) for p in (whole, parts)]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(results[0][1][name], results[1][1][name], rtol=1e-5)


def test_pieces_carry_the_state_and_stop_gradients():
    """The loss is that of whole rows, with segments that begin anywhere; the gradient is that of each piece alone."""
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (8, 32)), axis=1)
    ids[0] = np.arange(32) // 8  # segments that begin where pieces do
    ids[1, 20:] = -1
    batch = BATCH._replace(segment_ids=ids, weights=(ids >= 0).astype(np.float32))
    model = QUICK.replace(conv_size=4)
    configs = [small("r", mesh=ONE, optimizer="adamw", model=model, pieces=n) for n in (1, 4)]
    results = []
    for config in configs:
        program = make_program(config, make_mesh(config))
        results.append(program.train(program.initialize(), program.place(batch))[1])
    np.testing.assert_allclose(results[0]["loss"], results[1]["loss"], rtol=1e-5)
    assert abs(float(results[0]["grad_norm"]) - float(results[1]["grad_norm"])) > 1e-3
    # With a document a piece there is nothing to stop, and the gradients are the same.
    batch = batch._replace(segment_ids=np.broadcast_to(ids[0], (8, 32)), weights=None)
    norms = []
    for config in configs:
        program = make_program(config, make_mesh(config))
        norms.append(program.train(program.initialize(), program.place(batch))[1]["grad_norm"])
    np.testing.assert_allclose(*norms, rtol=1e-4)


def test_packed_documents_learn_as_separate_rows():
    """Two documents in a row, and the same two in rows of their own: the same loss and gradient."""
    ids = np.where(np.arange(32) < 11, 0, 1)[None].repeat(8, 0)
    packed = BATCH._replace(segment_ids=ids, weights=np.ones((8, 32), np.float32))
    inputs, targets, weights = (np.zeros((16, 32), t) for t in (np.uint8, np.uint8, np.float32))
    for row in range(8):
        for part, where in ((0, slice(0, 11)), (1, slice(11, 32))):
            size = where.stop - where.start
            inputs[2 * row + part, :size] = BATCH.inputs[row, where]
            targets[2 * row + part, :size] = BATCH.targets[row, where]
            weights[2 * row + part, :size] = 1
    apart = Batch(inputs, targets, np.where(weights > 0, 0, -1).astype(np.int32), weights)
    results = []
    for batch, rows in ((packed, 8), (apart, 16)):
        config = small("r", mesh=ONE, optimizer="adamw", batch=rows, model=QUICK.replace(conv_size=3))
        program = make_program(config, make_mesh(config))
        results.append(program.train(program.initialize(), program.place(batch))[1])
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(results[0][name], results[1][name], rtol=1e-5)


def test_logits_come_in_parts_of_half_a_gigabyte():
    config = small("r", mesh=ONE)
    assert _fewest_parts(config, (8, 2048), 256) == 1
    assert _fewest_parts(config, (8, 2048), 32000) == 4
    assert _fewest_parts(config, (1, 3), 10**9) == 3  # no less than a token
