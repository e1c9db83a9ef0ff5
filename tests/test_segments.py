"""Packed sequences: segment_ids and cu_seqlens against the oracle, at every offset, with padding and empty ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import gated_linear_attention, segments

from .cases import MILD, STRONG, Arguments, apply, arguments, check, expected, relative

DTYPES = ("float32", "bfloat16", "float16")
TIME = 200
CHUNK = 64
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def ids_of(*runs):
    """[1, TIME] from (id, tokens); the last run goes on to the end."""
    row = np.concatenate([np.full(tokens, own) for own, tokens in runs])
    return np.pad(row, (0, TIME - row.size), mode="edge")[None]


LAYOUTS = {
    "one segment": ids_of((3, 1)),
    "the same id again": ids_of((0, 50), (1, 60), (0, 30), (1, 1)),
    "a token each": np.arange(TIME)[None],
    "two tokens each": np.arange(TIME)[None] // 2,
    "padding left": ids_of((-1, 70), (0, 20), (1, 1)),
    "padding right": ids_of((0, 70), (1, 20), (-1, 1)),
    "padding inside a segment": ids_of((0, 30), (-1, 40), (0, 50), (-1, 1), (0, 1)),
    "padding between segments": ids_of((0, 64), (-1, 64), (1, 32), (-7, 1), (2, 1)),
    "padding everywhere": ids_of((-1, 1)),
    "one token": ids_of((-1, 129), (5, 1), (-2, 1)),
    "every other token": np.where(np.arange(TIME) % 2, -1, np.arange(TIME) // 30)[None],
    "ends of a chunk": ids_of((0, 63), (1, 1), (2, 1), (3, 63), (4, 63), (5, 1)),
}


def shared(seed, gate="vector", states=1, **options) -> Arguments:
    return arguments(seed, 1, TIME, 2, 16, 12, hk=1, gate=gate, states=states, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    for name, ids in LAYOUTS.items():
        check(shared(0, dtype=dtype), MILD, label=name, segment_ids=ids)


@pytest.mark.parametrize("gate", ["none", "head", "scalar"])
def test_layouts_of_other_gates(gate):
    for name, ids in LAYOUTS.items():
        check(shared(0, gate=gate), MILD, label=name, segment_ids=ids)


def test_a_segment_beginning_at_every_offset_within_a_chunk():
    for offset in range(CHUNK + 1):
        ids = ids_of((0, offset), (1, CHUNK), (2, 1))
        check(shared(offset), MILD, label=f"offset {offset}", segment_ids=ids)


def test_segments_and_strong_gates():
    rng = np.random.default_rng(0)
    for i, ids in enumerate(LAYOUTS.values()):
        g = rng.choice([-1e-4, -1.0, -5.0, -50.0, -1e4, -1e37, -np.inf], (1, TIME, 1, 16))
        check(shared(i, g=g), STRONG, segment_ids=ids)


def test_reverse_within_segments():
    for name, ids in LAYOUTS.items():
        check(shared(0), MILD, label=name, segment_ids=ids, reverse=True)


def test_the_gate_at_a_boundary_is_not_read_and_padding_is_neither():
    x, ids = shared(0), LAYOUTS["padding between segments"]
    starts, padding = np.flatnonzero(np.diff(ids[0]) > 0) + 1, ids[0] < 0
    starts = [i for i in starts if ids[0, i] >= 0]
    before = apply(x, segment_ids=ids)
    assert not np.asarray(before.g)[:, starts].any()

    def spoil(a):
        return jnp.where(padding[:, None, None], 1e3, a)

    g = spoil(x.g).at[:, jnp.asarray(starts)].set(-3.0)
    after = apply(x._replace(q=spoil(x.q), k=spoil(x.k), v=spoil(x.v), g=g, do=spoil(x.do)), segment_ids=ids)
    for name, a, b in zip(before._fields, before, after, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
        if name not in ("state", "initial_state", "bonus"):
            assert not np.asarray(a)[:, padding].any(), name


def test_segment_ids_of_several_rows():
    ids = np.concatenate([LAYOUTS[name] for name in ("padding left", "a token each", "the same id again")])
    check(arguments(0, 3, TIME, 2, 16, 12, hk=1), MILD, segment_ids=ids)


# cu_seqlens, with lengths that are traced: `apply` jits over them.

CU = {
    "full": [0, 64, 128, 192, 200, 200],
    "empty ones first, between and last": [0, 0, 100, 100, 200, 200],
    "rows past the last": [0, 1, 2, 65, 129, 150],
    "all empty": [0, 0, 0, 0, 0, 0],
    "one, then empty": [0, 200, 200, 200, 200, 200],
    "odd": [0, 15, 78, 79, 145, 199],
    "the last one alone": [0, 0, 0, 0, 0, 137],
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_cu_seqlens_with_states(dtype):
    for name, cu in CU.items():
        got = check(shared(0, states=5, dtype=dtype), MILD, label=name, cu_seqlens=cu)
        assert not np.asarray(got.o)[:, cu[-1] :].any()
        empty = np.diff(cu) == 0
        np.testing.assert_array_equal(
            np.asarray(got.state)[empty], np.asarray(shared(0, states=5).initial_state)[empty]
        )


@pytest.mark.parametrize("gate", ["none", "scalar"])
def test_cu_seqlens_of_other_gates(gate):
    for name, cu in CU.items():
        check(shared(0, states=5, gate=gate), MILD, label=name, cu_seqlens=cu)


def test_cu_seqlens_without_states():
    for name, cu in CU.items():
        x = shared(0, states=0)
        got = check(x, MILD, label=name, cu_seqlens=cu)
        assert got.state is None
        assert not np.asarray(got.o)[:, cu[-1] :].any()


@pytest.mark.parametrize("missing", ["initial_state", "dstate"])
def test_cu_seqlens_with_one_of_the_states(missing):
    for name, cu in CU.items():
        x = shared(0, states=5)
        x = x._replace(initial_state=None) if missing == "initial_state" else x._replace(dstate=None)
        check(x, MILD, label=name, cu_seqlens=cu)


def test_cu_seqlens_in_reverse():
    for name, cu in CU.items():
        check(shared(0, states=5), MILD, label=name, cu_seqlens=cu, reverse=True)


def test_cu_seqlens_with_strong_gates():
    rng = np.random.default_rng(0)
    for i, (name, cu) in enumerate(CU.items()):
        g = rng.choice([-1e-4, -1.0, -5.0, -50.0, -1e4, -1e37, -np.inf], (1, TIME, 1, 16))
        check(shared(i, g=g, states=5), STRONG, label=name, cu_seqlens=cu)


def test_cu_seqlens_that_begin_at_every_offset_within_a_chunk():
    for offset in range(CHUNK + 1):
        cu = [0, offset, offset + 1, offset + 64, offset + 130, TIME]
        check(shared(offset, states=5), MILD, label=f"offset {offset}", cu_seqlens=cu)


def test_cu_seqlens_shorter_than_a_chunk_and_more_sequences_than_tokens():
    check(arguments(0, 1, 5, 2, 4, 3, states=9), MILD, cu_seqlens=[0, 0, 1, 1, 2, 4, 4, 4, 5, 5])


def test_cu_seqlens_that_are_known():
    x, cu = shared(0, states=5), CU["odd"]

    def call(*x):
        return gated_linear_attention(
            *x[:4], initial_state=x[4], output_final_state=True, cu_seqlens=np.asarray(cu), implementation="xla"
        )

    o, state = quick(call)(*x[:5])
    want = expected(x, cu_seqlens=cu)
    assert relative(o, want.o) < 2e-6
    assert relative(state, want.state) < 2e-6


def test_vmap_over_cu_seqlens():
    x = shared(0, states=5)
    layouts = jnp.asarray([CU["odd"], CU["full"], CU["all empty"]])

    def call(cu):
        return gated_linear_attention(
            *x[:4], initial_state=x.initial_state, output_final_state=True, cu_seqlens=cu, implementation="xla"
        )

    o, state = quick(jax.vmap(call))(layouts)
    for i, cu in enumerate(layouts):
        want = expected(x, cu_seqlens=np.asarray(cu))
        assert relative(o[i], want.o) < 2e-6
        assert relative(state[i], want.state) < 2e-6


# Properties.


def test_packing_is_separate_sequences():
    x, cu = shared(0, states=5), [0, 70, 70, 140, 140, 197]
    ids = np.searchsorted(cu, np.arange(TIME), side="right")[None] - 1
    by_cu = apply(x, cu_seqlens=cu)
    by_ids = apply(x._replace(initial_state=None, dstate=None), segment_ids=np.where(ids < 5, ids, -1))

    @quick
    def alone(q, k, v, g, state):
        return gated_linear_attention(
            q, k, v, g, initial_state=state, output_final_state=True, implementation="reference"
        )

    for i in (0, 2, 4):
        own = slice(cu[i], cu[i + 1])
        tokens, state = [a[:, own] for a in x[:4]], x.initial_state[i : i + 1]
        o, end = alone(*tokens, state)
        assert relative(by_cu.o[:, own], o) < 2e-6
        assert relative(by_cu.state[i], end[0]) < 2e-6
        o, _ = alone(*tokens, jnp.zeros_like(state))
        assert relative(by_ids.o[:, own], o) < 2e-6


# The module's own functions.


def test_segment_starts():
    ids = jnp.asarray([[0, 0, 1, -1, 1, 2, -1, 2, 0], [-1, -1, 4, 4, 4, -1, -1, 0, 0]])
    starts = segments.segment_starts(ids)
    np.testing.assert_array_equal(np.flatnonzero(starts[0]), [2, 5, 8])
    np.testing.assert_array_equal(np.flatnonzero(starts[1]), [7])


def test_sequence_ids():
    ids = segments.sequence_ids(jnp.asarray([0, 0, 2, 2, 5]), 7)
    np.testing.assert_array_equal(ids, [[1, 1, 3, 3, 3, -1, -1]])


def test_aligned_layout_holds_any_lengths():
    rng = np.random.default_rng(0)
    align = jax.jit(lambda cu: segments.align(cu, 50, 8, jnp.zeros((6, 1, 1, 1))))
    for _ in range(50):
        cu = np.sort(rng.integers(0, 51, 7))
        cu[0] = 0
        layout = align(jnp.asarray(cu))
        source, target = np.asarray(layout.source), np.asarray(layout.target)
        inside = np.arange(50) < cu[-1]
        np.testing.assert_array_equal(source[target[inside]], np.arange(50)[inside])
        assert (target[~inside] == source.size).all()
        assert (source < 50).sum() == inside.sum()
        sequence = np.searchsorted(cu, np.arange(50), side="right") - 1
        for block, tokens in enumerate(source.reshape(-1, 8)):
            own = {int(sequence[i]) for i in tokens if i < 50}
            assert own <= {int(layout.entries.blocks.sequence[block])}
        for i in range(6):
            blocks = np.flatnonzero(np.asarray(layout.entries.blocks.sequence) == i)
            assert len(blocks) == -(-(cu[i + 1] - cu[i]) // 8)
            assert [b for b in blocks if layout.entries.blocks.first[b]] == list(blocks[:1])
            assert [b for b in blocks if layout.entries.blocks.last[b]] == list(blocks[-1:])


def test_small_integers_in_cu_seqlens_do_not_overflow():
    q, g = jnp.ones((1, 300, 1, 2)), jnp.full((1, 300, 1), -0.1)
    cu = jnp.array([0, 40, 100])
    for reverse in (False, True):
        wide, _ = gated_linear_attention(q, q, q, g, cu_seqlens=cu, reverse=reverse)
        narrow, _ = gated_linear_attention(q, q, q, g, cu_seqlens=cu.astype(jnp.int8), reverse=reverse)
        np.testing.assert_array_equal(narrow, wide)
