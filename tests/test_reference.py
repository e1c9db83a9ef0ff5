"""The token-by-token reference against the oracle, in every precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import gated_linear_attention

from .cases import MILD, STRONG, arguments, check, expected, relative

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("gate", ["none", "head", "scalar", "vector"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype, gate):
    check(arguments(0, 2, 37, 4, 8, 5, hk=2, gate=gate, dtype=dtype), MILD, implementation="reference")


def test_strong_gates():
    for seed in range(4):
        g = np.random.default_rng(seed).choice([-1e-4, -5.0, -50.0, -1e4, -1e37, -np.inf], (2, 37, 2, 8))
        check(arguments(seed, 2, 37, 4, 8, 5, hk=2, g=g), STRONG, implementation="reference")


@pytest.mark.parametrize("reverse", [False, True])
def test_segments(reverse):
    ids = np.array([[0] * 10 + [1] * 7 + [-1] * 5 + [1] * 5 + [0] * 10, [-1] * 3 + [4] * 30 + [2] * 3 + [-1]])
    x = arguments(0, 2, 37, 4, 8, 5, hk=2)
    check(x, MILD, segment_ids=ids, reverse=reverse, implementation="reference")


@pytest.mark.parametrize("reverse", [False, True])
def test_cu_seqlens(reverse):
    for cu in ([0, 0, 9, 9, 30], [0, 37, 37, 37, 37], [0, 0, 0, 0, 0], [0, 5, 6, 20, 37]):
        x = arguments(0, 1, 37, 4, 8, 5, hk=2, states=4)
        check(x, MILD, cu_seqlens=cu, reverse=reverse, implementation="reference")
        x = x._replace(initial_state=None, dstate=None)
        check(x, MILD, cu_seqlens=cu, reverse=reverse, implementation="reference")


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_float64(gate):
    x = arguments(0, 2, 37, 4, 8, 5, hk=2, gate=gate, bonus=True)
    want = expected(x)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in x]

        def call(q, k, v, g, state, bonus):
            return gated_linear_attention(
                q, k, v, g, bonus=bonus, initial_state=state, output_final_state=True, implementation="reference"
            )

        (o, state), pull = jax.vjp(call, *wide[:5], wide[7])
        grads = pull((wide[5], wide[6]))
    for name, got in zip(want._fields, (o, state, *grads), strict=True):
        assert got is not None, name
        assert got.dtype == jnp.float64, name
        assert relative(got, getattr(want, name)) < 1e-13, name
