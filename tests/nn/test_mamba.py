"""The selective scan against its equation in float64, with resets, in chunks of any size, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.nn.mamba import selective_scan


def arguments(b=2, t=21, c=3, n=4, seed=0):
    rng = np.random.default_rng(seed)
    u, dt = rng.normal(size=(b, t, c)), np.abs(rng.normal(size=(b, t, c)))
    B, C = rng.normal(size=(b, t, n)), rng.normal(size=(b, t, n))
    A, state = -np.abs(rng.normal(size=(c, n))), rng.normal(size=(b, c, n))
    return u, dt, B, C, A, state


def by_hand(u, dt, B, C, A, state, starts=None):
    out = []
    for t in range(u.shape[1]):
        if starts is not None:
            state = np.where(starts[:, t, None, None], 0, state)
        state = np.exp(dt[:, t, :, None] * A) * state + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        out.append(np.einsum("bcn,bn->bc", state, C[:, t]))
    return np.stack(out, 1), state


@pytest.mark.parametrize("chunk", [1, 4, 7, 21, 64])
@pytest.mark.parametrize("resets", [False, True])
def test_is_its_equation(chunk, resets):
    given = arguments()
    starts = np.random.default_rng(1).random((2, 21)) < 0.2 if resets else None
    want, last = by_hand(*given, starts)
    y, state = selective_scan(
        *(jnp.asarray(x, jnp.float32) for x in given), starts if starts is None else jnp.asarray(starts), chunk=chunk
    )
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_the_chunk():
    given = tuple(jnp.asarray(x, jnp.float32) for x in arguments())

    def grads(chunk):
        return jax.grad(lambda *x: jnp.sum(selective_scan(*x, chunk=chunk)[0] ** 2), tuple(range(6)))(*given)

    for a, b in zip(grads(5), grads(21), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_memory_of_the_backward_is_linear_and_far_below_all_states():
    def temporaries(time):
        shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in arguments(1, time, 32, 16)]
        loss = jax.jit(jax.grad(lambda *x: jnp.sum(selective_scan(*x)[0] ** 2), (0, 1, 2, 3)))
        return loss.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(4096)
    assert long < 4.2 * short
    assert long < 4096 * 32 * 16 * 4  # float32 states of all tokens
