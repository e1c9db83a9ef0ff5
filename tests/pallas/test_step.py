"""The step's kernel in Pallas' interpreter: against float64, through the layers' entry, and lowered for an H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas import step as kernel
from gla_jax.step import Stacked, _by_kernel, _by_xla, step_in_stack

from .small import lower_for_h100, relative

# n, b, hk, h / hk, k, v
SHAPES = [(2, 1, 2, 1, 8, 128), (3, 2, 1, 2, 16, 256)]


def arguments(n, b, hk, group, k, v):
    rng = np.random.default_rng(0)
    shapes = (b, hk * group, k), (b, hk, k), (b, hk, v), (b, hk, k), (n, b, hk, k, v), (hk, k)
    q, key, value, g, states, bonus = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return q, key, value, -np.abs(g), states, bonus


def expected(q, k, v, g, states, bonus, layer, scale):
    q, k, v, g, states = (np.asarray(x, np.float64) for x in (q, k, v, g, states))
    write = k[..., None] * v[..., None, :]
    new = states.copy()
    new[layer] = np.exp(g)[..., None] * states[layer] + write
    read = new[layer] if bonus is None else states[layer] + bonus[..., None] * write
    return np.einsum("bhk,bhkv->bhv", scale * q, np.repeat(read, q.shape[1] // k.shape[1], 1)), new


@pytest.fixture
def interpreted(monkeypatch):
    run = functools.partial(kernel.step, interpret=plgpu.InterpretGPUParams(detect_races=True))
    monkeypatch.setattr(kernel, "step", run)


@pytest.mark.parametrize("with_bonus", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_layer_is_stepped_and_the_others_stay(shape, with_bonus, interpreted):
    *inputs, bonus = arguments(*shape)
    inputs = (*inputs, bonus if with_bonus else None)
    want_o, want = expected(*inputs, 1, 0.3)
    o, states = _by_kernel(*map(jnp.asarray, inputs[:5]), inputs[5], jnp.int32(1), 0.3)
    assert relative(o, want_o) < 1e-6
    assert relative(states, want) < 1e-6
    np.testing.assert_array_equal(np.delete(states, 1, 0), np.delete(inputs[4], 1, 0))


@pytest.mark.parametrize("gate", ["none", "head", "scalar"])
def test_gates_that_are_no_vectors(gate, interpreted):
    q, k, v, g, states, _ = map(jnp.asarray, arguments(*SHAPES[1]))
    g = {"none": None, "head": g[0, :, 0], "scalar": g[..., 0]}[gate]
    got, want = (f(q, k, v, g, states, None, jnp.int32(0), None) for f in (_by_kernel, _by_xla))
    assert relative(got[0], want[0]) < 1e-6
    assert relative(got[1], want[1]) < 1e-6


def test_gradients_are_those_of_the_plain_form(interpreted):
    q, k, v, g, states, bonus = map(jnp.asarray, arguments(*SHAPES[0]))

    def gradients(f):
        def loss(q, states, bonus):
            o, states = f(q, k, v, g, states, bonus, jnp.int32(1), None)
            return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.sin(states))

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, states, bonus)

    got, want = gradients(_by_kernel), gradients(_by_xla)
    for x, y in zip(got, want, strict=True):
        assert relative(x, y) < 1e-5


def test_the_kernel_is_chosen_where_there_is_work_for_it(interpreted, monkeypatch):
    q, k, v, g, states, _ = map(jnp.asarray, arguments(*SHAPES[0]))
    state = Stacked(states, jnp.int32(1))
    plain = step_in_stack(q, k, v, g, state)
    monkeypatch.setattr(kernel, "why_no_hopper", lambda platform: None)
    monkeypatch.setattr("gla_jax.step.runs_on_one_device", lambda q: True)
    assert "too few blocks" in kernel.why_unsupported(q, states)
    monkeypatch.setattr(kernel, "FULL", 1)
    jaxpr = str(jax.make_jaxpr(step_in_stack)(q, k, v, g, state))
    assert "mpmd_map" in jaxpr
    fast = step_in_stack(q, k, v, g, state)
    assert relative(fast[0], plain[0]) < 1e-6
    assert relative(fast[1].states, plain[1].states) < 1e-6


def test_what_it_does_not_take_is_said():
    def why(k=256, v=512, batch=128, dtype="float32", **options):
        q, states = (batch, 4, k), (2, batch, 4, k, v)
        return kernel.why_unsupported(
            jax.ShapeDtypeStruct(q, "float32"), jax.ShapeDtypeStruct(states, dtype), **options
        )

    assert why(platform="hopper") is None
    assert why() == "it needs a Hopper GPU, and the device is cpu"
    assert why(dtype="float64") == "it takes float32 states, and they are float64"
    assert why(k=12) == "it takes k in multiples of 8 and v of 128, and they are 12 and 512"
    assert why(batch=16) == "it takes b * hk * v / 128 of at least 264: fewer are too few blocks"


@pytest.mark.parametrize("shape", [(24, 128, 4, 1, 256, 512), (2, 64, 2, 2, 64, 384)], ids=str)
def test_it_lowers_for_an_h100(shape):
    n, b, hk, group, k, v = shape
    shapes = (b, hk * group, k), (b, hk, k), (b, hk, v), (b, hk, k), (n, b, hk, k, v)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    text = lower_for_h100(kernel.step, *arrays, jax.ShapeDtypeStruct((), jnp.int32)).as_text()
    assert "mosaic_gpu" in text
    assert "output_operand_aliases" in text
