"""A bonus, and reads before writes, against the oracle: gates, dtypes, segments, sequences, direction, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import gated_linear_attention

from .cases import MILD, STRONG, arguments, check, relative
from .test_segments import CU, LAYOUTS, TIME


def shared(seed, **options):
    return arguments(seed, 1, TIME, 4, 16, 12, **{"hk": 2, "bonus": True, **options})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("gate", ["none", "head", "scalar", "vector"])
def test_every_gate(gate, dtype):
    check(shared(0, gate=gate, dtype=dtype), MILD)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_implementations_rows_and_scale(implementation):
    check(arguments(0, 3, 37, 2, 8, 5, bonus=True), MILD, implementation=implementation, scale=1.0)
    check(arguments(0, 2, 1, 2, 8, 5, bonus=True), MILD, implementation=implementation)


def test_strong_gates():
    rng = np.random.default_rng(0)
    g = rng.choice([-1e-4, -1.0, -5.0, -50.0, -1e4, -1e37, -np.inf], (1, TIME, 2, 16))
    check(shared(1, g=g), STRONG)


def test_segments():
    for name, ids in LAYOUTS.items():
        check(shared(0), MILD, label=name, segment_ids=ids)
        check(shared(0, gate="scalar"), MILD, label=name, segment_ids=ids, reverse=True)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_sequences_with_states_of_their_own(implementation):
    for name, cu in CU.items():
        x = shared(0, states=len(cu) - 1)
        check(x, MILD, label=name, cu_seqlens=cu, implementation=implementation)
        check(x, MILD, label=name, cu_seqlens=cu, implementation=implementation, reverse=True)


def test_sequences_without_states():
    check(shared(0, states=0), MILD, cu_seqlens=CU["odd"])


def test_a_bonus_of_ones_is_the_inclusive_read_of_undecayed_tokens():
    x = shared(0, gate="none")
    inclusive, _ = gated_linear_attention(x.q, x.k, x.v)
    same, _ = gated_linear_attention(x.q, x.k, x.v, bonus=jnp.ones((2, 16)))
    assert relative(same, inclusive) < 2e-6


def test_vmap_over_rows():
    x = arguments(0, 3, 20, 2, 8, 5, bonus=True, states=0)
    rows = jax.vmap(lambda q, k, v, g: gated_linear_attention(q[None], k[None], v[None], g[None], bonus=x.bonus)[0][0])
    whole, _ = gated_linear_attention(*x[:4], bonus=x.bonus)
    np.testing.assert_allclose(rows(*x[:4]), whole, rtol=1e-4, atol=1e-5)
