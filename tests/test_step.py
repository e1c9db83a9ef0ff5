"""One token of the recurrence: against the op, token by token, and against the equations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import gated_linear_attention_step

from .cases import arguments, expected, relative

TOLERANCE = {"float32": 2e-6, "bfloat16": 5e-3, "float16": 1e-3}


@pytest.mark.parametrize("gate", ["none", "head", "scalar", "vector"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_steps_are_the_recurrence(dtype, gate):
    x = arguments(0, 3, 20, 4, 8, 5, hk=2, gate=gate, dtype=dtype)
    step = jax.jit(lambda q, k, v, g, state: gated_linear_attention_step(q, k, v, g, state, scale=0.7))
    state, outputs = x.initial_state, []
    for i in range(20):
        g = x.g if gate in ("none", "head") else x.g[:, i]
        o, state = step(x.q[:, i], x.k[:, i], x.v[:, i], g, state)
        outputs.append(o)
    want = expected(x, scale=0.7)
    assert outputs[0].dtype == x.v.dtype
    assert state.dtype == jnp.float32
    assert relative(jnp.stack(outputs, 1), want.o) < TOLERANCE[dtype]
    assert relative(state, want.state) < 2e-6


@pytest.mark.parametrize("gate", ["head", "vector"])
def test_steps_with_a_bonus(gate):
    x = arguments(0, 3, 20, 4, 8, 5, hk=2, gate=gate, bonus=True)
    step = jax.jit(gated_linear_attention_step)
    state, outputs = x.initial_state, []
    for i in range(20):
        o, state = step(x.q[:, i], x.k[:, i], x.v[:, i], x.g if gate == "head" else x.g[:, i], state, bonus=x.bonus)
        outputs.append(o)
    want = expected(x)
    assert relative(jnp.stack(outputs, 1), want.o) < 2e-6
    assert relative(state, want.state) < 2e-6


@pytest.mark.parametrize("strength", [-1e-4, -5.0, -50.0, -1e4, -1e37, -np.inf])
def test_strong_gates(strength):
    x = arguments(0, 2, 1, 2, 8, 5, g=np.where(np.arange(8) % 2, strength, -0.5) * np.ones((2, 1, 2, 1)))
    want = expected(x)
    o, state = gated_linear_attention_step(x.q[:, 0], x.k[:, 0], x.v[:, 0], x.g[:, 0], x.initial_state)
    assert relative(o, want.o[:, 0]) < 2e-6
    assert relative(state, want.state) < 2e-6


def test_gradients():
    x = arguments(0, 2, 1, 4, 8, 5, hk=2)
    want = expected(x)

    def loss(q, k, v, g, state):
        o, state = gated_linear_attention_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], state)
        return jnp.vdot(o, x.do) + jnp.vdot(state, x.dstate)

    grads = jax.grad(loss, (0, 1, 2, 3, 4))(*x[:5])
    for name, got in zip(("q", "k", "v", "g", "initial_state"), grads, strict=True):
        assert relative(got, getattr(want, name)) < 2e-6, name


def test_float64():
    x = arguments(0, 2, 1, 4, 8, 5, hk=2)
    want = expected(x)
    with jax.enable_x64(True):
        q, k, v, g = (jnp.asarray(np.asarray(a, np.float64)[:, 0]) for a in x[:4])
        o, state = gated_linear_attention_step(q, k, v, g, state=jnp.asarray(np.asarray(x.initial_state, np.float64)))
    assert o.dtype == state.dtype == jnp.float64
    assert relative(o, want.o[:, 0]) < 1e-14
    assert relative(state, want.state) < 1e-14


def test_vmap_scan_and_forward_mode():
    x = arguments(0, 3, 6, 2, 4, 4, hk=1)

    def one_row(q, k, v, g, state):
        def body(state, token):
            q, k, v, g = (a[None] for a in token)
            o, state = gated_linear_attention_step(q, k, v, g, state[None])
            return state[0], o[0]

        return jax.lax.scan(body, state, (q, k, v, g))

    state, o = jax.jit(jax.vmap(one_row))(*x[:5])
    want = expected(x)
    assert relative(o, want.o) < 2e-6
    assert relative(state, want.state) < 2e-6
    token = [a[:, 0] for a in x[:4]]
    directions = [a[:, 1] for a in x[:4]]
    (_, state), (_, along) = jax.jvp(
        lambda q, k, v, g: gated_linear_attention_step(q, k, v, g, x.initial_state), token, directions
    )
    _, k, v, g = (np.asarray(a, np.float64) for a in token)
    _, dk, dv, dg = (np.asarray(a, np.float64) for a in directions)
    by_hand = (dg * np.exp(g))[..., None] * np.asarray(x.initial_state) + dk[..., None] * v[..., None, :]
    assert relative(along, by_hand + k[..., None] * dv[..., None, :]) < 2e-6
    assert state.shape == (3, 1, 4, 4)


def test_a_donated_state_is_updated_in_place():
    x = arguments(0, 2, 1, 2, 64, 64)
    q, k, v, g = (a[:, 0] for a in x[:4])
    step = jax.jit(gated_linear_attention_step, donate_argnums=4)
    memory: Any = step.lower(q, k, v, g, x.initial_state).compile().memory_analysis()
    assert memory.alias_size_in_bytes == x.initial_state.nbytes
