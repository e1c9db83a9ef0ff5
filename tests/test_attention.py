"""gated_linear_attention against the float64 oracle: every gate, dtype and length; then JAX's transformations."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import gated_linear_attention, which_implementation

from .cases import MILD, STRONG, WEAK, Arguments, apply, arguments, check, expected, logsigmoid, relative
from .fla_cases import CASES

DTYPES = ("float32", "bfloat16", "float16")
STRENGTHS = (-1e-4, -5.0, -50.0, -1e4, -1e37, -np.inf)
# One shape for what can share it, so that it compiles once a dtype: grouped heads, k != v, t no multiple of a chunk.
TIME, HEADS, GROUPS, KEY, VALUE = 250, 6, 3, 16, 24
TRAINED = np.load(Path(__file__).parent / "data" / "trained_gates.npz")["g"]


def shared(seed, g=None, gate="vector", **options) -> Arguments:
    return arguments(seed, 1, TIME, HEADS, KEY, VALUE, hk=GROUPS, g=g, gate=gate, **options)


def _mark(case):
    if case.small:
        return ()
    return pytest.mark.large if case.dtype == "float32" else pytest.mark.exhaustive


@pytest.mark.parametrize("case", [pytest.param(c, marks=_mark(c), id=c.name) for c in CASES])
def test_cases_of_flash_linear_attention(case):
    x = arguments(
        42,
        case.batch,
        case.time,
        case.heads,
        case.key,
        case.value,
        gate=case.gate,
        normalizer=case.normalizer,
        dtype=case.dtype,
        gate_dtype="float32" if case.gate == "head" else case.dtype,
        states=case.batch if case.cu is None else len(case.cu) - 1,
    )
    tolerance = (
        WEAK if case.gate in ("head", "none") or case.normalizer > 1 else MILD if case.normalizer == 1 else STRONG
    )
    check(x, tolerance, scale=case.scale, cu_seqlens=case.cu, optimized=x.q.size > 2**20)


def gate_mixtures(shape):
    """Each strength everywhere, on some tokens, channels and places of mild gates, and all of them mixed."""
    rng = np.random.default_rng(7)
    mild = logsigmoid(rng.standard_normal(shape))
    tokens = rng.random(shape[:2] + (1,) * (len(shape) - 2)) < 0.1
    channels = rng.random((shape[0], 1, *shape[2:])) < 0.3
    places = rng.random(shape) < 0.1
    mixtures = {}
    for strength in STRENGTHS:
        mixtures[f"{strength:g} everywhere"] = np.full(shape, strength)
        mixtures[f"{strength:g} on tokens"] = np.where(tokens, strength, mild)
        mixtures[f"{strength:g} on channels"] = np.where(channels, strength, mild)
        mixtures[f"{strength:g} at places"] = np.where(places, strength, mild / 16)
    mixtures["all, at places"] = rng.choice(STRENGTHS, shape)
    mixtures["all, on tokens"] = np.broadcast_to(rng.choice(STRENGTHS, tokens.shape), shape)
    mixtures["all, on channels"] = np.broadcast_to(rng.choice(STRENGTHS, channels.shape), shape)
    mixtures["uniform from 0 to -50"] = -50 * rng.random(shape)
    odd = np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)) % 2
    mixtures["alternating -1e4 and 0"] = np.broadcast_to(np.where(odd, -1e4, 0), shape)
    return mixtures


@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_every_strength(dtype, gate):
    shape = (1, TIME, GROUPS, KEY)[: 4 if gate == "vector" else 3]
    for i, (name, g) in enumerate(gate_mixtures(shape).items()):
        uniform = name.endswith("everywhere") and not name.startswith("-0.0001")
        bounds = STRONG[dtype]._replace(vanishing=1e-2) if uniform and dtype != "float32" else STRONG[dtype]
        bounds = WEAK[dtype] if name == "-0.0001 everywhere" else bounds
        check(shared(i, g, dtype=dtype), {dtype: bounds}, label=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_trained_gates(dtype):
    window = np.lib.stride_tricks.sliding_window_view(TRAINED.astype(np.float64), 64, 1).sum(-1)
    assert window.min() < -130
    for row, g in enumerate(TRAINED[:, :TIME].astype(np.float32)):
        check(shared(row, g[None], dtype=dtype), STRONG, label=f"row {row}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_cotangents_and_small_keys_and_values(dtype):
    check(shared(0, dtype=dtype, cotangents=1e-6), MILD, label="cotangents times 1e-6")
    check(shared(1, dtype=dtype, size=1e-2), MILD, label="k and v times 1e-2")
    check(shared(2, dtype=dtype, cotangents=1e-6, normalizer=0.05), STRONG, label="cotangents times 1e-6, strong")
    check(shared(3, dtype=dtype, size=1e-2, normalizer=0.05), STRONG, label="k and v times 1e-2, strong")
    check(shared(4, dtype=dtype, cotangents=1e-6, size=1e-2, normalizer=16), WEAK, label="both, weak")


@pytest.mark.parametrize("gate", ["none", "head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_that_are_constant(dtype, gate):
    check(arguments(0, 1, TIME, 8, KEY, VALUE, gate=gate, dtype=dtype), WEAK)


def test_constant_gates_of_every_strength():
    for g in ([-5.0, -np.inf, -1e-4], [-1e4, 0.0, -50.0], [-1e37, -1.0, -0.25]):
        check(shared(0, np.asarray(g), gate="head"), STRONG, label=f"{g}")


@pytest.mark.parametrize("time", [1, 15, 63, 65])
def test_lengths(time):
    check(arguments(time, 2, time, 2, 8, 5), MILD)


@pytest.mark.parametrize(("key", "value"), [(1, 1), (1, 7), (33, 2)])
def test_head_dimensions(key, value):
    check(arguments(0, 2, 17, 3, key, value), MILD)


@pytest.mark.large
@pytest.mark.parametrize(
    ("dtype", "gate"),
    [("float32", "scalar"), ("float32", "none"), ("bfloat16", "vector"), ("float16", "vector"), ("bfloat16", "scalar")],
)
@pytest.mark.parametrize("time", [1, 15, 63, 65])
def test_lengths_of_every_dtype(time, dtype, gate):
    check(arguments(0, 2, time, 2, 8, 5, gate=gate, dtype=dtype), MILD)


@pytest.mark.large
@pytest.mark.parametrize("gate", ["vector", "scalar", "head", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_thousand_tokens(dtype, gate):
    tolerance = MILD if gate in ("vector", "scalar") else WEAK
    # The gradient of a constant gate is one number a head: an RMS needs some.
    heads = 16 if gate == "head" else 4
    check(arguments(0, 2, 1000, heads, 32, 48, hk=heads // 2, gate=gate, dtype=dtype), tolerance, optimized=True)


@pytest.mark.large
@pytest.mark.parametrize(
    ("dtype", "gate", "normalizer"),
    [
        ("float32", "vector", 1),
        ("float32", "vector", 16),
        ("float32", "scalar", 1),
        ("float32", "none", 1),
        ("bfloat16", "vector", 16),
        ("bfloat16", "vector", 1),
        ("bfloat16", "scalar", 16),
        ("float16", "vector", 1),
    ],
)
def test_long(dtype, gate, normalizer):
    x = arguments(0, 1, 65536, 2, 16, 32, hk=1, gate=gate, normalizer=normalizer, dtype=dtype)
    check(x, WEAK if gate == "none" or normalizer == 16 else MILD, optimized=True)


@pytest.mark.large
@pytest.mark.parametrize("strength", [-1e-4, -5.0, -50.0, -1e4, -1e37, -np.inf])
def test_long_with_one_gate_everywhere(strength):
    """A decay that is nearly 1 remembers 10000 tokens: its rounding must not add up over them."""
    x = arguments(0, 1, 65536, 2, 16, 32, gate="head", g=np.full(2, strength))
    check(x, WEAK if strength == -1e-4 else STRONG, optimized=True)


@pytest.mark.large
def test_long_with_strong_gates_and_segments():
    rng = np.random.default_rng(0)
    g = rng.choice(
        [-1e-4, -0.1, -1.0, -5.0, -50.0, -1e4, -1e37, -np.inf], (1, 65536, 1, 16), p=[0.3, 0.3, 0.3] + [0.02] * 5
    )
    ids = np.cumsum(rng.random((1, 65536)) < 1e-3, axis=1) - 1
    x = arguments(0, 1, 65536, 2, 16, 32, hk=1, g=g)
    check(x, STRONG, optimized=True)
    check(x, STRONG, optimized=True, segment_ids=ids)


@pytest.mark.large
@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_of_every_strength_optimized(dtype, gate):
    """As users compile, over many chunks, with a gate of q's dtype."""
    shape = (1, 1000, 2, 64)[: 4 if gate == "vector" else 3]
    for i, (name, g) in enumerate(gate_mixtures(shape).items()):
        if not name.endswith("everywhere"):
            x = arguments(i, 1, 1000, 2, 64, 64, gate=gate, g=g, dtype=dtype, gate_dtype=dtype)
            check(x, STRONG, label=name, optimized=True)


def test_hard_resets_forget_everything_before():
    x = shared(0)
    g = np.array(x.g)
    g[:, 100] = -np.inf
    got = apply(x._replace(g=jnp.asarray(g)))
    moved = apply(x._replace(g=jnp.asarray(g), v=x.v.at[:, :100].multiply(1e3), initial_state=x.initial_state + 1e3))
    np.testing.assert_array_equal(got.o[:, 100:], moved.o[:, 100:])
    np.testing.assert_array_equal(got.state, moved.state)
    assert not np.asarray(got.g[:, 100]).any()


def test_a_scalar_gate_is_the_same_gate_broadcast_and_a_constant_one_is_a_scalar():
    x = shared(0, gate="scalar")
    vector = apply(x._replace(g=jnp.broadcast_to(x.g[..., None], (*x.g.shape, KEY))))
    scalar = apply(x)
    for name, a, b in zip(scalar._fields[:-1], scalar, vector, strict=False):
        assert relative(a, b.sum(-1) if name == "g" else b) < 1e-5, name
    x = shared(0, gate="head")
    constant, repeated = apply(x), apply(x._replace(g=jnp.broadcast_to(x.g, (1, TIME, GROUPS))))
    for name, a, b in zip(scalar._fields[:-1], constant, repeated, strict=False):
        assert relative(a, b.sum((0, 1)) if name == "g" else b) < 1e-5, name


def test_a_gate_of_the_dtype_of_q_and_one_in_float32_agree():
    x = shared(0, dtype="bfloat16", gate_dtype="bfloat16")
    check(x, MILD)
    low, high = apply(x), apply(x._replace(g=x.g.astype(jnp.float32)))
    assert low.g.dtype == jnp.bfloat16
    assert high.g.dtype == jnp.float32
    np.testing.assert_array_equal(low.o, high.o)


@pytest.mark.parametrize("gate", ["vector", "head"])
def test_reverse(gate):
    check(shared(0, gate=gate), MILD, reverse=True)


def test_scale_and_no_states():
    x = shared(0)._replace(initial_state=None, dstate=None)
    got = check(x, MILD, scale=0.3)
    assert got.state is None
    assert got.initial_state is None


# Transformations.

SMALL = arguments(3, 2, 37, 2, 8, 4, hk=1)


def loss(x: Arguments, implementation: Any = "xla"):
    o, state = gated_linear_attention(
        x.q,
        x.k,
        x.v,
        x.g,
        initial_state=x.initial_state,
        output_final_state=True,
        implementation=implementation,
    )
    assert state is not None
    return jnp.vdot(o, x.do) + jnp.vdot(state, x.dstate)


def gradients(x, **options):
    return jax.grad(loss)(x, **options)


def close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert relative(one, other) < tolerance


def quick(f):
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def small_gradients():
    return quick(gradients)(SMALL)


def test_gradients_match_the_oracle_and_finite_differences():
    want = expected(SMALL)
    for name in ("q", "k", "v", "g", "initial_state"):
        assert relative(getattr(small_gradients(), name), getattr(want, name)) < 1e-5, name
    directions = arguments(4, 2, 37, 2, 8, 4, hk=1)
    at = quick(lambda e: loss(jax.tree.map(lambda a, d: a + e * d, SMALL, directions)))
    slope = float(at(1e-2) - at(-1e-2)) / 2e-2
    along = sum(
        float(jnp.vdot(a, d)) for a, d in zip(*map(jax.tree.leaves, (small_gradients(), directions)), strict=True)
    )
    assert slope == pytest.approx(along, rel=1e-2)


def test_vmap():
    stacked = jax.tree.map(lambda a: jnp.stack([a, 2 * a, a * a * 0.5]), SMALL)._replace(
        g=jnp.stack([SMALL.g, 2 * SMALL.g, SMALL.g / 4])
    )
    mapped = quick(jax.vmap(gradients))(stacked)
    one = quick(gradients)
    for i in range(3):
        close(jax.tree.map(lambda a, i=i: a[i], mapped), one(jax.tree.map(lambda a, i=i: a[i], stacked)))


def test_remat():
    close(quick(jax.grad(jax.checkpoint(loss)))(SMALL), small_gradients())


def test_gates_that_are_constants_of_a_traced_call():
    decay = jnp.asarray([-0.5])
    o = quick(lambda q: gated_linear_attention(q, SMALL.k, SMALL.v, decay)[0])(SMALL.q)
    want = expected(SMALL._replace(g=decay, initial_state=None, dstate=None))
    assert relative(o, want.o) < 2e-6


def test_scan_over_layers():
    def layer(v, q):
        o, _ = gated_linear_attention(q, SMALL.k, v, SMALL.g)
        return o[:, :, :1] + o[:, :, 1:], None

    def scanned(v, qs):
        return jnp.sum(jax.lax.scan(layer, v, qs)[0] ** 2)

    def unrolled(v, qs):
        for q in qs:
            v, _ = layer(v, q)
        return jnp.sum(v**2)

    qs = jnp.stack([SMALL.q, -SMALL.q])
    close(quick(jax.grad(scanned, (0, 1)))(SMALL.v, qs), quick(jax.grad(unrolled, (0, 1)))(SMALL.v, qs))


def test_forward_mode_works_for_reference_and_is_refused_by_xla():
    tangents = jax.tree.map(jnp.ones_like, SMALL)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(loss, (SMALL,), (tangents,))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(jax.grad(loss), (SMALL,), (tangents,))
    by_reference = functools.partial(loss, implementation="reference")
    _, along = quick(lambda x, d: jax.jvp(by_reference, (x,), (d,)))(SMALL, tangents)
    assert float(along) == pytest.approx(sum(float(jnp.sum(a)) for a in jax.tree.leaves(small_gradients())), rel=1e-4)


def test_eager_and_jitted_agree():
    o, _ = gated_linear_attention(*SMALL[:4])
    jitted, state = jax.jit(gated_linear_attention)(*SMALL[:4])
    assert state is None
    assert relative(o, jitted) < 1e-6


# The choice of an implementation.


def test_which_implementation():
    arrays = SMALL[:4]
    assert which_implementation(*arrays).name == "xla"
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
    assert which_implementation(*specs, output_final_state=True).name == "xla"
    wide = [jax.ShapeDtypeStruct(a.shape, jnp.float64) for a in arrays]
    choice = which_implementation(*wide)
    assert choice.name == "reference"
    assert "float64" in choice.refused["xla"]


def test_a_sequence_of_implementations_takes_the_first_that_works():
    by_name = gated_linear_attention(*SMALL[:4], implementation="reference")[0]
    in_turn = gated_linear_attention(*SMALL[:4], implementation=("reference", "xla"))[0]
    np.testing.assert_array_equal(by_name, in_turn)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in SMALL[:4]]
        o, _ = gated_linear_attention(*wide, implementation=("xla", "reference"))
        assert o.dtype == jnp.float64
        assert relative(o, expected(SMALL._replace(initial_state=None, dstate=None)).o) < 1e-6
        with pytest.raises(ValueError, match="'xla': it computes in float32"):
            gated_linear_attention(*wide, implementation="xla")


# Memory.


def test_memory_of_a_long_call():
    """Peak of forward and backward at most 6 times the arguments and results of the compiled vjp call."""

    def struct(width, heads=4):
        return jax.ShapeDtypeStruct((1, 65536, heads, width), jnp.bfloat16)

    def call(q, k, v, g, do):
        o, pull = jax.vjp(lambda *x: gated_linear_attention(*x, implementation="xla")[0], q, k, v, g)
        return o, pull(do)

    compiled = jax.jit(call).lower(struct(256), struct(256), struct(512), struct(256), struct(512)).compile()
    memory: Any = compiled.memory_analysis()
    ends = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert ends >= 65536 * 4 * 2 * 2 * (256 * 3 + 512 * 2)
    peak = ends + memory.temp_size_in_bytes - memory.alias_size_in_bytes
    assert peak <= 6 * ends, f"peak {peak / ends:.2f} times the arguments and results"


def test_the_gate_s_gradient_keeps_its_dtype_in_x64():
    with jax.enable_x64(True):
        x = jnp.ones((1, 4, 1, 2), jnp.float32)
        dg = jax.grad(lambda g: gated_linear_attention(x, x, x, g)[0].sum())(-x)
    assert dg.dtype == jnp.float32
