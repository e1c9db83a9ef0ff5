import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import gated_linear_attention, pallas
from gla_jax.pallas import forward_and_states
from gla_jax.pallas.backward import backward
from gla_jax.pallas.backward_config import BackwardConfig, ChunksConfig, choose_backward, choose_time_parts
from gla_jax.pallas.config import _NARROW, _WIDE, choose_forward

from . import small
from .small import GATES, arguments, lower_for_h100, recurrence, recurrence_gradients, relative

# b, t, h, hk, k, v: both tunings, tails of a chunk, padded k and v, grouped heads.
SHAPES = [(1, 70, 2, 1, 128, 128), (1, 130, 1, 1, 64, 64), (2, 20, 1, 1, 40, 24)]
# The same of wider k and v, whose chunks go in parallel.
IN_CHUNKS = [(1, 70, 1, 1, 128, 192), (1, 130, 2, 1, 136, 136), (1, 200, 1, 1, 40, 200)]
LARGE = [
    (8, 2048, 16, 128, 128),
    (2, 8192, 16, 64, 128),
    (8, 2048, 4, 128, 256),
    (2, 192, 2, 32, 64),
    (8, 2048, 4, 256, 512),
]
# The gate's, and the others'. A gate's gradient vanishes under strong gates.
TOLERANCE = {"bfloat16": (1.5e-2, 8e-3), "float16": (5e-3, 5e-3)}
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


interpreted = functools.partial(small.interpreted, backward)
on_the_gpu = jax.jit(backward, static_argnums=4)


def cotangents(v, heads, state, dtype, scale=1.0):
    rng = np.random.default_rng(1)
    do = scale * rng.standard_normal((*v.shape[:2], heads, v.shape[3]))
    return jnp.asarray(do, dtype), jnp.asarray(scale * rng.standard_normal(state.shape), "float32")


def check(run, kind, b, t, h, hk, k, v, dtype="bfloat16", scale=1.0, **kwargs):
    q, key, value, g, state = arguments(kind, b, t, h, k, v, hk=hk, dtype=dtype, **kwargs)
    do, dfinal = cotangents(value, h, state, dtype, scale)
    got = run(q, key, value, g, k**-0.5, state, do, dfinal)
    want = recurrence_gradients(q, key, value, g, k**-0.5, state, do, dfinal)
    for x, like in zip(got, (q, key, value, g, state), strict=True):
        assert x.dtype == like.dtype
        assert x.shape == like.shape
    of_gate, of_others = TOLERANCE[dtype]
    errors = {name: relative(x, y) for name, x, y in zip(got._fields, got, want, strict=True)}
    assert errors.pop("g") < of_gate
    assert max(errors.values()) < of_others, errors
    assert not np.any(np.asarray(got.g, np.float32)[np.isneginf(np.asarray(g, np.float32))])


@pytest.mark.parametrize(
    "kind", [kind if kind in ("mild", "mixed") else pytest.param(kind, marks=pytest.mark.exhaustive) for kind in GATES]
)
def test_every_gate_strength(kind):
    check(interpreted, kind, *SHAPES[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["mild", "mixed"])
def test_shapes(kind, shape):
    check(interpreted, kind, *shape)


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_final_cotangent_made_of_what_the_tokens_do(parts):
    b, t, h, hk, k, v = (1, 20, 1, 1, 40, 24) if parts == 1 else (2, 200, 2, 1, 128, 128)
    q, key, value, g, state = arguments("mild", b, t, h, k, v, hk=hk)
    do, dfinal = cotangents(value, h, state, "bfloat16")
    found = []

    def enter(decay, own):
        found.extend((decay, own))
        return dfinal

    config = dataclasses.replace(choose_backward(k, v, q.dtype), time_parts=parts)
    got = interpreted(q, key, value, g, k**-0.5, state, do, enter, config=config)
    want = recurrence_gradients(q, key, value, g, k**-0.5, state, do, dfinal)
    assert max(relative(x, y) for x, y in zip(got, want, strict=True)) < 8e-3
    decay, own = found
    assert relative(own, recurrence_gradients(q, key, value, g, k**-0.5, state, do, 0 * dfinal)[4]) < 8e-3
    assert relative(decay[..., 0], jnp.exp(jnp.sum(g.astype("float32"), 1))) < 5e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["mild", "late"])
def test_float16(kind):
    check(interpreted, kind, 1, 70, 1, 1, 64, 64, dtype="float16")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("dtype", "scale"), [("bfloat16", 2.0**-20), ("float16", 2.0**-8)])
def test_small_cotangents_and_float32_gates(dtype, scale):
    check(interpreted, "late", 1, 70, 1, 1, 64, 64, dtype=dtype, scale=scale, gate_dtype="float32")


def test_small_values_keep_the_gates_gradient_in_float16():
    q, k, v, g, state = arguments("mild", 1, 70, 1, 64, 64, dtype="float16")
    k, v, state = k * 1e-2, v * 1e-4, state * 1e-6
    do, dfinal = cotangents(v, 1, state, "float16")
    got = interpreted(q, k, v, g, 1.0, state, do, dfinal)
    want = recurrence_gradients(q, k, v, g, 1.0, state, do, dfinal)
    assert relative(got.g, want[3]) < 2e-3


@pytest.mark.exhaustive
def test_without_states():
    q, k, v, g, state = arguments("mild", 1, 70, 1, 64, 64)
    do, _ = cotangents(v, 1, state, "bfloat16")
    got = interpreted(q, k, v, g, 1.0, None, do)
    want = recurrence_gradients(q, k, v, g, 1.0, 0 * state, do, 0 * state)
    assert max(relative(x, y) for x, y in zip(got, want, strict=True)) < 8e-3


@pytest.mark.exhaustive
@pytest.mark.parametrize("gate", ["a token", "none"])
def test_a_gate_a_token_and_none(gate):
    q, k, v, g, state = arguments("mild", 1, 20, 1, 64, 64, gate_dtype="float32")
    g = g[..., 0] if gate == "a token" else None
    do, dfinal = cotangents(v, 1, state, "bfloat16")
    got = interpreted(q, k, v, g, 1.0, state, do, dfinal)
    wide = jnp.zeros(k.shape) if g is None else jnp.broadcast_to(g[..., None], k.shape)
    want = list(recurrence_gradients(q, k, v, wide, 1.0, state, do, dfinal))
    if g is None:
        assert got.g is None
        assert max(relative(x, y) for x, y in zip(got, want, strict=True) if x is not None) < 8e-3
        return
    want[3] = want[3].sum(-1)
    assert got.g.dtype == jnp.float32
    assert max(relative(x, y) for x, y in zip(got, want, strict=True)) < 8e-3


@pytest.mark.parametrize(
    ("value_size", "power", "kernels"),
    [(64, 1, 3), (128, 2, 3), *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in [(64, 2, 4), (128, 1, 3)])],
)
def test_checkpoint_runs_no_kernel_more_than_needed(value_size, power, kernels, monkeypatch):
    """The forward's, once more only if its output or its states are needed again, and those of the backward."""
    monkeypatch.setattr(pallas, "why_unsupported", functools.partial(pallas.why_unsupported, platform="hopper"))
    monkeypatch.setattr("gla_jax.attention.runs_on_one_device", lambda q: True)
    # As with many heads: the forward in one pass.
    monkeypatch.setattr("gla_jax.pallas.config._FEW", 1)

    def loss(q, k, v, g):
        o, _ = gated_linear_attention(q, k, v, g, implementation="mosaic_gpu")
        return (o.astype(jnp.float32) ** power).sum()

    x, v = (jax.ShapeDtypeStruct((1, 128, 1, size), "bfloat16") for size in (64, value_size))
    f = jax.value_and_grad(jax.checkpoint(loss), (0, 1, 2, 3))
    assert lower_for_h100(f, x, x, v, x).as_text().count("@mosaic_gpu") == kernels


def with_states(call, tuning, parts, q, k, v, g, scale, state, do, dfinal):
    """The gradients by way of the states that the forward leaves, with the tuning of many heads."""
    o, final, states = call(forward_and_states)(q, k, v, g, scale, state, output_final_state=True, config=tuning)
    assert all(relative(x, y) < 5e-3 for x, y in zip((o, final), recurrence(q, k, v, g, scale, state), strict=True))
    config = dataclasses.replace(choose_backward(k.shape[-1], v.shape[-1], q.dtype), time_parts=parts)
    return call(backward)(q, k, v, g, scale, state, do, dfinal, saved=states, config=config)


# By k / 64: chunks with a tail, in parts that do not divide them, padded k and v, grouped heads.
SAVED = {1: (2, 140, 1, 1, 40, 100), 2: (1, 70, 2, 1, 80, 128)}
TRIED = {(1, "late"), (2, "resets")}
TUNING = {1: _NARROW, 2: _WIDE}


@pytest.mark.parametrize(
    ("blocks", "kind"),
    [
        pytest.param(
            blocks, kind, marks=() if (blocks, kind) in {(1, "late"), (2, "resets")} else pytest.mark.exhaustive
        )
        for blocks in SAVED
        for kind in GATES
    ],
)
def test_states_from_the_forward(blocks, kind):
    call = lambda f: functools.partial(small.interpreted, f)
    check(functools.partial(with_states, call, TUNING[blocks], 2 // blocks), kind, *SAVED[blocks])


@pytest.mark.parametrize(
    ("blocks", "shape"),
    [(1, (1, 128, 1, 1, 64, 128)), pytest.param(2, (2, 384, 2, 1, 128, 128), marks=pytest.mark.exhaustive)],
)
def test_states_from_a_forward_in_parts(blocks, shape):
    call = lambda f: functools.partial(small.interpreted, f)
    tuning = dataclasses.replace(TUNING[blocks], splits=shape[1] // 64)
    check(functools.partial(with_states, call, tuning, 1), "mild", *shape)


@pytest.mark.parametrize("gate", ["a token", pytest.param("none", marks=pytest.mark.exhaustive)])
def test_states_from_the_forward_of_a_gate_a_token(gate):
    q, k, v, g, state = arguments("late", 1, 140, 1, 64, 128)
    g = g[..., 0] if gate == "a token" else None
    do, dfinal = cotangents(v, 1, state, "bfloat16")
    call = lambda f: functools.partial(small.interpreted, f)
    got = with_states(call, TUNING[1], 1, q, k, v, g, 1.0, state, do, dfinal)
    wide = jnp.zeros(k.shape) if g is None else jnp.broadcast_to(g[..., None], k.shape)
    want = list(recurrence_gradients(q, k, v, wide, 1.0, state, do, dfinal))
    want[3] = None if g is None else want[3].sum(-1)
    assert max(relative(x, y) for x, y in zip(got, want, strict=True) if x is not None) < 8e-3


def test_which_states_are_saved():
    shape = lambda *s, dtype="bfloat16": jax.ShapeDtypeStruct(s, dtype)

    def saves(heads, k, v, gate="channel", dtype="bfloat16", kv_heads=None, devices=1):
        hk = kv_heads or heads
        g = {"channel": shape(8, 2048, hk, k), "wide": shape(8, 2048, hk, k, dtype="float32"), "none": None}
        g["token"] = shape(8, 2048, hk)
        q, key, value = shape(8, 2048, heads, k, dtype=dtype), shape(8, 2048, hk, k), shape(8, 2048, hk, v)
        return pallas.saves_states(q, key, value, g[gate], devices)

    assert saves(16, 128, 128)
    assert saves(16, 64, 128, "token")
    assert saves(16, 64, 128, "none")
    # More than 40 % of what the call itself takes.
    assert not saves(16, 128, 128, "token")
    assert not saves(32, 72, 72)
    assert saves(16, 128, 128, "token", kv_heads=8)
    # Gates that the backward rounds, a range that it scales, states that another kernel makes, two passes.
    assert not saves(16, 128, 128, "wide")
    assert not saves(16, 128, 128, dtype="float16")
    assert not saves(16, 128, 256)
    assert not saves(16, 64, 64)
    assert not saves(2, 128, 128)
    # On each of two devices the forward goes in one pass over halves of the sequences; with 18 heads it would take two.
    assert saves(16, 128, 128, devices=2)
    assert saves(18, 128, 128)
    assert not saves(18, 128, 128, devices=2)
    # Fewer sequences than devices.
    long = shape(1, 65536, 4, 128)
    assert pallas.saves_states(long, long, long, long, 8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("mild", SHAPES[1]), ("mixed", (2, 200, 2, 1, 128, 128)), ("mixed", (2, 260, 2, 1, 128, 192))],
    ids=str,
)
def test_a_sequence_in_parts(kind, shape, parts):
    config = dataclasses.replace(choose_backward(*shape[4:], jnp.dtype("bfloat16")), time_parts=parts)
    check(lambda *args: interpreted(*args, config=config), kind, *shape)


@pytest.mark.parametrize("kind", ["mild", "mixed"])
def test_chunks_in_parallel(kind):
    check(interpreted, kind, *IN_CHUNKS[0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", IN_CHUNKS, ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_chunks_in_parallel_for_every_gate(kind, shape, dtype):
    check(interpreted, kind, *shape, dtype=dtype)


def of_one_block(k, v):
    """The tuning with all chunks of a head in one block, one after the other."""
    config = choose_backward(k, v, jnp.dtype("bfloat16"))
    return dataclasses.replace(config, in_chunks=dataclasses.replace(config.in_chunks, blocks=1))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("late", (1, 400, 1, 1, 136, 136)),
        *(
            pytest.param(kind, shape, marks=pytest.mark.exhaustive)
            for kind, shape in (
                ("mild", (1, 400, 1, 1, 200, 200)),
                ("mild", (1, 300, 1, 1, 40, 200)),
                ("mixed", (1, 300, 1, 1, 128, 192)),
                ("resets", (1, 500, 1, 1, 136, 320)),
            )
        ),
    ],
    ids=str,
)
def test_chunks_one_after_the_other(kind, shape):
    check(functools.partial(interpreted, config=of_one_block(*shape[4:])), kind, *shape)


@pytest.mark.parametrize(("b", "t", "kernels"), [(8, 2048, 2), pytest.param(1, 16384, 3, marks=pytest.mark.exhaustive)])
def test_chunks_in_parallel_lower(b, t, kernels):
    """In one kernel after another that walks both ways; of few long sequences it walks parts first."""
    keys, values = (jax.ShapeDtypeStruct((b, t, 4, n), "bfloat16") for n in (256, 512))
    f = lambda q, v: backward(q, q, v, q, 1.0, None, v)
    assert lower_for_h100(f, keys, values).as_text().count("@mosaic_gpu") == kernels


# With states from the forward and without, all chunks in parallel, in parts.
STARTS = [
    ("mild", (1, 130, 2, 1, 64, 64), {}),
    ("mild", (1, 130, 1, 1, 128, 128), {"saved": True}),
    ("mild", (1, 130, 1, 1, 128, 192), {}),
    *(
        pytest.param(*x, marks=pytest.mark.exhaustive)
        for x in (
            ("mixed", (1, 130, 1, 1, 64, 100), {"saved": True}),
            ("mixed", (1, 130, 1, 1, 128, 128), {}),
            ("mixed", (1, 130, 1, 1, 256, 128), {}),
            ("mild", (1, 256, 1, 1, 128, 128), {"time_parts": 2}),
            ("mild", (1, 256, 1, 1, 128, 128), {"saved": True, "time_parts": 2}),
            ("mild", (1, 300, 1, 1, 128, 128), {"time_parts": 3}),
            ("mild", (1, 300, 1, 1, 128, 192), {"time_parts": 2}),
        )
    ),
]


def with_starts(call, how, where, q, k, v, g, scale, state, do, dfinal):
    """The gradients where sequences begin at `where`."""
    how, options = dict(how), {"starts": jnp.asarray(where)}
    if how.pop("saved", False):
        tuning = TUNING[-(-k.shape[-1] // 64)]
        found = call(forward_and_states)(q, k, v, g, scale, state, starts=options["starts"], config=tuning)
        options["saved"] = found[2]
    config = dataclasses.replace(choose_backward(k.shape[-1], v.shape[-1], q.dtype), **how)
    return call(backward)(q, k, v, g, scale, state, do, dfinal, config=config, **options)


def check_starts(call, kind, shape, how, where, dtype="bfloat16"):
    b, t, h, hk, k, v = shape
    q, key, value, g, state = arguments(kind, b, t, h, k, v, hk=hk, dtype=dtype)
    do, dfinal = cotangents(value, h, state, dtype)
    reset = jnp.where(where[..., None, None], -jnp.inf, g)
    want = recurrence_gradients(q, key, value, reset, k**-0.5, state, do, dfinal)
    got = with_starts(call, how, where, q, key, value, g, k**-0.5, state, do, dfinal)
    of_gate, of_others = TOLERANCE[dtype]
    errors = {name: relative(x, y) for name, x, y in zip(got._fields, got, want, strict=True)}
    assert errors.pop("g") < of_gate
    assert max(errors.values()) < of_others, errors
    assert not np.any(np.asarray(got.g, np.float32)[where])


@pytest.mark.parametrize(("kind", "shape", "how"), STARTS, ids=str)
def test_sequences_that_begin_inside_chunks(kind, shape, how):
    """As with g = -inf there: at chunks' first tokens, inside and at the last, in one chunk and in several."""
    where = np.zeros(shape[:2], bool)
    where[:, [64, 70, 90, 127]] = True
    check_starts(lambda f: functools.partial(small.interpreted, f), kind, shape, how, where)


@pytest.mark.exhaustive
def test_sequences_that_begin_inside_chunks_in_float16():
    where = np.zeros((1, 130), bool)
    where[:, [70, 128]] = True
    call = lambda f: functools.partial(small.interpreted, f)
    check_starts(call, "mild", (1, 130, 1, 1, 64, 64), {}, where, "float16")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    ("shape", "how"),
    [
        ((2, 1000, 4, 4, 64, 128), {"saved": True}),
        ((2, 1000, 4, 2, 128, 128), {"saved": True}),
        ((2, 1000, 2, 2, 128, 128), {}),
        ((2, 1500, 2, 2, 128, 256), {}),
        ((1, 1500, 2, 2, 256, 512), {}),
    ],
    ids=str,
)
def test_sequences_that_begin_inside_chunks_on_the_gpu(kind, shape, how):
    where = np.random.default_rng(3).random(shape[:2]) < 0.03
    # An initial state whose gradient does not vanish.
    where[:, :40] = False
    where[:, 128::192] = True
    check_starts(lambda f: jax.jit(f, static_argnames=("scale", "config")), kind, shape, how, where)


def test_few_blocks_cut_the_sequence():
    """132 multiprocessors, and no part under 8 chunks."""
    assert [choose_time_parts(blocks, 128) for blocks in (4, 32, 64, 128, 256)] == [16, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "states"), [("bfloat16", True), pytest.param("float16", False, marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize(
    "shape", [LARGE[0], *(pytest.param(x, marks=pytest.mark.exhaustive) for x in LARGE[1:])], ids=str
)
def test_lowers_for_an_h100(shape, dtype, states):
    b, t, h, k, v = shape
    wide, values = (jax.ShapeDtypeStruct((b, t, h, n), dtype) for n in (k, v))
    state = jax.ShapeDtypeStruct((b, h, k, v), "float32") if states else None
    f = lambda q, k, v, g, state, do: backward(q, k, v, g, 1.0, state, do, state)
    lowered = lower_for_h100(f, wide, wide, values, wide, state, values)
    assert "mosaic_gpu" in lowered.as_text()


def test_config_is_checked():
    with pytest.raises(ValueError, match="registers"):
        BackwardConfig(2, 3, 2, 1, compute_registers=248, load_registers=40)
    with pytest.raises(ValueError, match="must divide"):
        BackwardConfig(3, 3, 2, 1, compute_registers=128, load_registers=24)
    with pytest.raises(ValueError, match="token_stages"):
        BackwardConfig(2, 3, 1, 2, compute_registers=128, load_registers=24)
    with pytest.raises(ValueError, match="lends"):
        ChunksConfig(4, token_stages=2, ring=3, value_stages=2, lends=True)
    q, v = jnp.ones((1, 64, 1, 64), "bfloat16"), jnp.ones((1, 64, 1, 192), "bfloat16")
    with pytest.raises(ValueError, match="must be of one pass"):
        forward_and_states(q, q, v, q, 1.0, config=choose_forward(64, 192, 1, 1, q.dtype))
    states = pallas.States(jnp.ones((1, 1, 1, 192, 64), q.dtype), jnp.ones((1, 1, 1, 1), jnp.int32))
    with pytest.raises(ValueError, match="saved must be None for k or v above 128"):
        backward(q, q, v, q, 1.0, None, v, saved=states)
    with pytest.raises(ValueError, match="up to 128, not 64 and 192"):
        backward(q, q, v, q, 1.0, None, v, config=choose_backward(64, 64, q.dtype))


@pytest.mark.parametrize("gate_dtype", ["float16", "float32"])
@pytest.mark.parametrize("scalar", [False, True])
def test_the_initial_states_gradient_outlives_float16(scalar, gate_dtype):
    q, k, v, g, state = arguments("mild", 1, 70, 2, 64, 64, hk=1, dtype="float16", gate_dtype=gate_dtype)
    g = jnp.full_like(g[..., 0] if scalar else g, -50.0).at[:, 3].set(-0.1)
    do, dfinal = cotangents(v, 2, state, "float16")
    got = interpreted(q, k, v, g, 1.0, state, do, dfinal)
    wide = jnp.broadcast_to(g[..., None] if scalar else g, k.shape)
    want = recurrence_gradients(q, k, v, wide, 1.0, state, do, dfinal)
    assert 0 < np.abs(want[4]).max() < 1e-15
    assert relative(got.initial_state, want[4]) < 5e-3
    first = want[3][:, 0].sum(-1) if scalar else want[3][:, 0]
    assert got.g.dtype == gate_dtype
    assert np.abs(np.asarray(got.g, np.float64)[:, 0] - first).max() < 1e-15


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], *IN_CHUNKS, (2, 1100, 4, 2, 64, 128)], ids=str)
@pytest.mark.parametrize("kind", GATES)
def test_on_the_gpu(kind, shape, dtype):
    check(on_the_gpu, kind, *shape, dtype=dtype)


def jitted(f):
    static = ("scale", "config", "output_final_state")
    return jax.jit(f, static_argnames=[x for x in inspect.signature(f).parameters if x in static])


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", SAVED)
@pytest.mark.parametrize("kind", GATES)
def test_states_from_the_forward_on_the_gpu(kind, blocks):
    check(functools.partial(with_states, jitted, TUNING[blocks], 2 // blocks), kind, *SAVED[blocks])


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", SAVED)
@pytest.mark.parametrize("kind", GATES)
def test_states_from_a_forward_in_parts_on_the_gpu(kind, blocks):
    tuning = dataclasses.replace(TUNING[blocks], splits=3)
    check(functools.partial(with_states, jitted, tuning, 2), kind, 2, 1152, 2, 1, 64 * blocks, 128)


@pytest.mark.gpu
@pytest.mark.parametrize("value_size", [128, 256])
@pytest.mark.parametrize("kind", GATES)
def test_same_bits_from_run_to_run(kind, value_size):
    q, k, v, g, state = arguments(kind, 2, 1000, 60, 128, value_size)
    do, dfinal = cotangents(v, 60, state, "bfloat16")
    first = on_the_gpu(q, k, v, g, 1.0, state, do, dfinal)
    for _ in range(100):
        assert small.same_bits(first, on_the_gpu(q, k, v, g, 1.0, state, do, dfinal))
