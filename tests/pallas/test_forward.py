import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from gla_jax.pallas import forward, why_unsupported
from gla_jax.pallas.config import ForwardConfig, choose_forward

from . import small
from .small import GATES, arguments, lower_for_h100, recurrence, relative

# b, t, h, hk, k, v: every tuning, tails of a chunk, padded k and v, grouped heads.
SMALL = [(1, 130, 2, 1, 64, 64), (1, 136, 1, 1, 128, 64), (1, 20, 1, 1, 40, 24), (1, 136, 1, 1, 256, 128)]
WIDE = (1, 70, 60, 60, 80, 256)
TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}
STRONG_TOLERANCE = {"bfloat16": 5e-3, "float16": 4e-3}
SHAPES = [
    (8, 2048, 16, 128, 128),
    (2, 8192, 16, 64, 128),
    (8, 2048, 4, 128, 256),
    (8, 2048, 4, 256, 512),
    (1, 16384, 4, 256, 512),
    (2, 192, 2, 32, 64),
]
# Numpy, which the interpreter computes with, warns of sums of -inf that the kernel makes to find them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


interpreted = functools.partial(small.interpreted, forward)
on_the_gpu = jax.jit(forward, static_argnums=(4, 6))


def agree(got, want, tolerance=5e-3):
    """Outputs and final states."""
    for x, y in zip(got, want, strict=True):
        assert relative(x, y) < tolerance


def check(run, kind, b, t, h, hk, k, v, dtype="bfloat16", **kwargs):
    q, key, value, g, state = arguments(kind, b, t, h, k, v, hk=hk, dtype=dtype, **kwargs)
    o, final = run(q, key, value, g, k**-0.5, state, True)
    want = recurrence(q, key, value, g, k**-0.5, state)
    assert o.dtype == value.dtype
    agree((o, final), want, TOLERANCE[dtype] if kind == "mild" else STRONG_TOLERANCE[dtype])


@pytest.mark.parametrize("kind", GATES)
def test_every_gate_strength(kind):
    check(interpreted, kind, *SMALL[0])


@pytest.mark.parametrize("shape", SMALL[1:], ids=str)
@pytest.mark.parametrize("kind", ["mild", "mixed"])
def test_shapes(kind, shape):
    check(interpreted, kind, *shape)


@pytest.mark.parametrize("kind", ["mild", pytest.param("mixed", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("k", [64, 128, pytest.param(256, marks=pytest.mark.exhaustive)])
def test_as_with_many_heads(kind, k, monkeypatch):
    """One pass for k up to 128, and two warpgroups with states."""
    monkeypatch.setattr("gla_jax.pallas.config._FULL", 1)
    monkeypatch.setattr("gla_jax.pallas.config._FEW", 1)
    check(interpreted, kind, 1, 70, 2, 1, k, 128)


@pytest.mark.exhaustive
def test_split_sequences():
    """Of 17 chunks, two parts of 9 and 8."""
    check(interpreted, "late", 1, 1050, 2, 1, 64, 64)


@pytest.mark.parametrize(("gate", "batch"), [("channel", 2), ("token", 1), ("none", 1)])
@pytest.mark.parametrize("kind", ["mild", pytest.param("mixed", marks=pytest.mark.exhaustive)])
def test_one_pass_over_the_parts_of_sequences(kind, gate, batch):
    """In parts of a chunk; what all but the last leave is walked ahead."""
    q, k, v, g, state = arguments(kind, batch, 128, 1, 64, 64)
    g = {"channel": g, "token": g[..., 0].astype("float32"), "none": None}[gate]
    config = dataclasses.replace(choose_forward(64, 64, 64, 2, q.dtype), splits=2)
    o, final = interpreted(q, k, v, g, 0.5, state, True, config=config)
    want = recurrence(q, k, v, g, 0.5, state)
    agree((o, final), want, STRONG_TOLERANCE["bfloat16"])


def test_parts_that_cannot_be_are_refused():
    config = dataclasses.replace(choose_forward(64, 64, 64, 3, jnp.dtype("bfloat16")), splits=2)
    q, _, v, g, _ = arguments("mild", 1, 192, 1, 64, 64)
    with pytest.raises(ValueError, match=r"config\.splits=2 takes times that are multiples of 128"):
        forward(q, q, v, g, 1.0, config=config)
    with pytest.raises(ValueError, match="no gates of float32 a channel"):
        forward(q[:, :128], q[:, :128], v[:, :128], g[:, :128].astype("float32"), 1.0, config=config)


@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_an_initial_state_made_of_what_the_tokens_do(splits):
    b, t, h, hk, k, v = (1, 20, 1, 1, 40, 24) if splits == 1 else (2, 200, 2, 1, 64, 64)
    q, key, value, g, state = arguments("mixed", b, t, h, k, v, hk=hk)
    gate, scan = choose_forward(k, v, b * h, 2, q.dtype, two_passes=True)
    found = []

    def enter(decay, own):
        found.extend(jnp.swapaxes(x, 2, 3) for x in (decay, own))
        return jnp.swapaxes(state, 2, 3)

    config = gate, dataclasses.replace(scan, splits=splits)
    o, final = interpreted(q, key, value, g, k**-0.5, enter, True, config=config)
    want = recurrence(q, key, value, g, k**-0.5, state)
    agree((o, final), want, STRONG_TOLERANCE["bfloat16"])
    decay, own = found
    assert relative(own, recurrence(q, key, value, g, 1.0, 0 * state)[1]) < STRONG_TOLERANCE["bfloat16"]
    np.testing.assert_allclose(decay[..., 0], np.exp(np.sum(np.asarray(g, np.float32), 1)), 2e-2, 1e-30)


@pytest.mark.parametrize("kind", ["mild", "late"])
def test_float16(kind):
    check(interpreted, kind, 1, 130, 1, 1, 64, 64, dtype="float16")


@pytest.mark.parametrize("kind", ["mild", "mixed", "resets"])
def test_float32_gates(kind):
    check(interpreted, kind, 1, 130, 1, 1, 64, 64, gate_dtype="float32")


def test_float32_gates_of_the_largest_key():
    check(interpreted, "mixed", 1, 70, 1, 1, 256, 64, gate_dtype="float32")


@pytest.mark.parametrize("shape", [(1, 70, 1, 64, 64), (1, 100, 1, 128, 64)], ids=str)
@pytest.mark.parametrize("kind", ["mild", "mixed"])
def test_a_gate_a_token(kind, shape):
    q, k, v, g, state = arguments(kind, *shape, gate_dtype="float32")
    agree(interpreted(q, k, v, g[..., 0], 0.5, state, True), recurrence(q, k, v, g[..., 0], 0.5, state))


def test_no_gate_and_no_states():
    q, k, v, _, state = arguments("mild", 1, 70, 1, 64, 64)
    o, final = interpreted(q, k, v, None, 1.0)
    assert final is None
    assert relative(o, recurrence(q, k, v, None, 1.0, 0 * state)[0]) < 5e-3


@pytest.mark.parametrize(("dtype", "states"), [("bfloat16", False), ("float16", True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lowers_for_an_h100(shape, dtype, states):
    b, t, h, k, v = shape
    wide, values = (jax.ShapeDtypeStruct((b, t, h, n), dtype) for n in (k, v))
    state = jax.ShapeDtypeStruct((b, h, k, v), "float32") if states else None
    f = lambda q, k, v, g, state: forward(q, k, v, g, 1.0, state, states)
    gates = wide if states else wide.update(dtype="float32")
    lowered = lower_for_h100(f, wide, wide, values, gates, state)
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_a_gate_a_token_lowers(shape):
    b, t, h, k, v = shape
    wide, values = (jax.ShapeDtypeStruct((b, t, h, n), "bfloat16") for n in (k, v))
    gate = jax.ShapeDtypeStruct((b, t, h), "float32")
    lower_for_h100(lambda q, k, v, g: forward(q, k, v, g, 1.0), wide, wide, values, gate)


@pytest.mark.parametrize("few", [1, 33], ids=["one pass", "two passes"])
def test_traces_inside_shard_map(few, monkeypatch):
    monkeypatch.setattr("gla_jax.pallas.config._FEW", few)
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=small.H100)
    wide, state = jax.ShapeDtypeStruct((2, 1100, 1, 64), "bfloat16"), jax.ShapeDtypeStruct((2, 1, 64, 64), "float32")
    spec = jax.P("data")
    call = lambda q, k, v, g, state: forward(q, k, v, g, 1.0, state, True)
    sharded = jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec, spec))
    with jax.sharding.use_abstract_mesh(mesh):
        o, final = jax.eval_shape(sharded, wide, wide, wide, wide, state)
    assert (o.shape, final.shape) == (wide.shape, state.shape)


def test_lowers_with_64_bit_types():
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
        lower_for_h100(lambda q, k, v, g: forward(q, k, v, g, 1.0), x, x, x, x)


def test_why_unsupported():
    def why(dtype="bfloat16", k=64, **options):
        q, v = jax.ShapeDtypeStruct((1, 64, 1, k), dtype), jax.ShapeDtypeStruct((1, 64, 1, 64), dtype)
        return why_unsupported(q, q, v, None, **options) or "supported"

    assert why(platform="hopper") == "supported"
    assert "float32" in why("float32", platform="hopper")
    assert "257" in why(k=257, platform="hopper")
    assert why(k=256, platform="hopper") == "supported"
    assert "cu_seqlens" in why(own_states=True, platform="hopper")
    assert "Hopper" in why(platform="cpu")
    if jax.default_backend() == "cpu":
        assert "Hopper" in why()


def test_config_is_checked():
    choose = lambda k, v, heads, chunks=32: choose_forward(k, v, heads, chunks, jnp.dtype("bfloat16"))
    good = choose(64, 128, 32)
    with pytest.raises(ValueError, match="registers"):
        dataclasses.replace(good, gate_registers=256)
    with pytest.raises(ValueError, match="must divide"):
        dataclasses.replace(good, block_gaters=2)
    with pytest.raises(ValueError, match="qk_slots=3 must be a multiple of 2"):
        dataclasses.replace(good, qk_slots=3)
    assert isinstance(choose(128, 128, 128), ForwardConfig)
    assert choose(256, 512, 32)[1].splits == 1
    assert choose(256, 512, 4, 256)[1].splits == 8
    assert choose(256, 512, 1, 7)[1].splits == 1
    split = lambda *shape: choose_forward(*shape, jnp.dtype("bfloat16"), may_split=True)
    assert [split(64, 128, 32, 128).splits, split(128, 128, 32, 128).splits, split(64, 128, 4, 256).splits] == [
        2,
        4,
        16,
    ]
    assert split(64, 128, 32, 127).splits == 1
    assert isinstance(split(128, 128, 32, 127), tuple)
    assert isinstance(split(128, 256, 32, 128), tuple)
    assert split(128, 128, 128, 128).splits == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(2, 1000, 4, 2, 64, 128), (2, 200, 60, 60, 128, 128), (2, 300, 2, 1, 256, 512)], ids=str
)
@pytest.mark.parametrize("kind", GATES)
def test_float32_gates_on_the_gpu(kind, shape):
    check(on_the_gpu, kind, *shape, gate_dtype="float32")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "shape",
    [
        *SMALL,
        WIDE,
        (2, 1000, 4, 2, 64, 128),
        (2, 200, 60, 60, 128, 128),
        (2, 300, 2, 1, 256, 512),
        # In parts.
        (1, 8192, 8, 4, 64, 128),
        (1, 8192, 8, 8, 128, 128),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", GATES)
def test_on_the_gpu(kind, shape, dtype):
    check(on_the_gpu, kind, *shape, dtype=dtype)


# One pass for k of 64 and of 128, two passes. Two tunings of the first, of which one cuts the sequence in two.
STARTS = [
    ("mild", (1, 130, 2, 1, 64, 64), {"one_pass": True}),
    ("mild", (1, 200, 1, 1, 128, 128), {"one_pass": True}),
    ("mild", (1, 130, 1, 1, 256, 64), {}),
    ("mixed", (1, 130, 1, 1, 128, 128), {"one_pass": True}),
    *(
        pytest.param(*x, marks=pytest.mark.exhaustive)
        for x in (
            ("mixed", (1, 130, 2, 1, 64, 64), {"one_pass": True}),
            ("mixed", (1, 130, 2, 1, 256, 64), {}),
            ("mild", (1, 130, 2, 1, 64, 64), {"one_pass": True, "wide_gate": True}),
            ("mixed", (1, 130, 1, 1, 256, 64), {"wide_gate": True}),
            ("resets", (2, 200, 1, 1, 128, 128), {}),
            ("mild", (2, 256, 1, 1, 64, 64), {"one_pass": True, "splits": 2}),
        )
    ),
]


@pytest.mark.parametrize(("kind", "shape", "how"), STARTS, ids=str)
def test_sequences_that_begin_inside_chunks(kind, shape, how):
    """As with g = -inf there: inside a chunk and at its last token; at the first of one, and both."""
    b, t, h, hk, k, v = shape
    how = dict(how)
    splits = how.pop("splits", 1)
    gate_dtype = "float32" if how.get("wide_gate") else None
    q, key, value, g, state = arguments(kind, b, t, h, k, v, hk=hk, gate_dtype=gate_dtype)
    config = choose_forward(k, v, b * h, -(-t // 64), q.dtype, **how)
    config = dataclasses.replace(config, splits=splits) if splits > 1 else config
    where = np.zeros((b, t), bool)
    where[:, [5, 40, 63, 64, 128, 129]] = True
    o, final = interpreted(q, key, value, g, k**-0.5, state, True, starts=jnp.asarray(where), config=config)
    want = recurrence(q, key, value, jnp.where(where[..., None, None], -jnp.inf, g), k**-0.5, state)
    agree((o, final), want, (TOLERANCE if kind == "mild" else STRONG_TOLERANCE)["bfloat16"])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GATES)
# 60 heads make one pass of it, and the reference slow: fewer tokens.
@pytest.mark.parametrize(
    "shape", [(2, 1000, 4, 64, 128), (2, 300, 60, 128, 128), (2, 4096, 8, 128, 128), (2, 500, 2, 256, 512)], ids=str
)
def test_sequences_that_begin_inside_chunks_on_the_gpu(kind, shape):
    q, k, v, g, state = arguments(kind, *shape)
    rng = np.random.default_rng(3)
    where = rng.random(shape[:2]) < 0.03
    where[:, 64 * np.arange(0, shape[1] // 64, 3)] = True
    call = jax.jit(lambda *x: forward(*x[:4], 1.0, x[4], True, starts=x[5]))
    want = recurrence(q, k, v, jnp.where(where[..., None, None], -jnp.inf, g), 1.0, state)
    agree(call(q, k, v, g, state, jnp.asarray(where)), want)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GATES)
def test_a_gate_a_token_on_the_gpu(kind):
    for shape in ((2, 1000, 4, 64, 128), (2, 300, 2, 128, 256), (2, 300, 60, 128, 128)):
        q, k, v, g, state = arguments(kind, *shape, gate_dtype="float32")
        agree(on_the_gpu(q, k, v, g[..., 0], 1.0, state, True), recurrence(q, k, v, g[..., 0], 1.0, state))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize(
    "shape", [(2, 1000, 4, 64, 128), (2, 1000, 8, 128, 128), (2, 1000, 60, 128, 128), (2, 500, 2, 256, 512)], ids=str
)
def test_same_bits_from_run_to_run(shape, kind):
    q, k, v, g, state = arguments(kind, *shape)
    first = on_the_gpu(q, k, v, g, 1.0, state, True)
    for _ in range(100):
        assert small.same_bits(first, on_the_gpu(q, k, v, g, 1.0, state, True))
