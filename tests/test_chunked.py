"""The chunkwise form against the recurrence: properties for random shapes, plans, gates and layouts."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gla_jax import gated_linear_attention
from gla_jax.chunked import Arithmetic, Plan, chunked, plan, rounded_einsum
from gla_jax.reference import recurrence

from .cases import apply, arguments, relative

STRENGTHS = [0.0, -1e-4, -0.1, -1.0, -5.0, -50.0, -1e4, -1e37, -np.inf]
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def settings(examples):
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def close(got, want, tolerance=2e-5):
    """Within `tolerance` of the largest number of each array."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max())))


@st.composite
def calls(draw):
    """Arguments of chunked() and a plan, of few and small sizes: each is compiled."""
    hk, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    b, t, k, v = (draw(st.integers(1, most)) for most in (2, 40, 9, 9))
    x = arguments(draw(st.integers(0, 2**16)), b, t, hk * group, k, v, hk=hk, gate=draw(KINDS))
    if x.g is not None:
        strengths = draw(st.lists(st.sampled_from(STRENGTHS), min_size=1, max_size=4))
        places = np.random.default_rng(t).random(x.g.shape)
        x = x._replace(g=jnp.where(places < 0.4, np.random.default_rng(k).choice(strengths, x.g.shape), x.g))
    return x, Plan(draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.integers(1, 3)))


KINDS = st.sampled_from(["none", "scalar", "vector", "vector"])


def vjp_of(f, x):
    @quick
    def run(x):
        out, pull = jax.vjp(f, x.q, x.k, x.v, x.g, x.initial_state)
        return out, pull((x.do, x.dstate))

    return run(x)


def check_a_call(call):
    x, cut = call
    scale = x.q.shape[-1] ** -0.5
    got = vjp_of(lambda q, k, v, g, state: chunked(q, k, v, g, state, scale, cut), x)
    close(got, vjp_of(lambda q, k, v, g, state: recurrence(q, k, v, g, state, scale), x))


@settings(8)
@hypothesis.given(calls())
def test_chunkwise_is_the_recurrence(call):
    check_a_call(call)


@pytest.mark.exhaustive
@settings(40)
@hypothesis.given(calls())
def test_chunkwise_is_the_recurrence_more_often(call):
    check_a_call(call)


@pytest.mark.parametrize("gate", ["none", "scalar", "vector"])
def test_on_a_cpu_bfloat16_is_rounded_where_it_comes_and_goes_alone(gate):
    x = arguments(0, 1, 65, 1, 16, 16, gate=gate, dtype="bfloat16")
    call = quick(lambda q, k, v, g: gated_linear_attention(q, k, v, g, implementation="xla")[0])
    o = call(x.q, x.k, x.v, x.g)
    exact = call(*(None if y is None else y.astype(jnp.float32) for y in (x.q, x.k, x.v, x.g)))
    assert o.dtype == jnp.bfloat16
    assert relative(o, exact) < 2e-3  # roundings to 8 bits: 2^-9 at most of a number between 1 and 2, and evenly spread


@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_second_order_gradients(gate):
    """Exact to those of the plain recurrence differentiated twice; in a scan, as layers stand."""
    x = arguments(5, 1, 9, 2, 4, 3, hk=1, gate=gate)
    qs = jnp.stack([x.q, -x.q])

    def norm_of_gradients(arrays, call):
        @jax.checkpoint
        def layer(q, rest):
            o, state = call(q, *rest, 0.5)
            return jnp.vdot(jnp.sin(o), x.do) + jnp.vdot(jnp.sin(state), x.dstate)

        def total(arrays):
            qs, *rest = arrays
            return jax.lax.scan(lambda sofar, q: (sofar + layer(q, rest), None), 0.0, qs)[0]

        return sum(jnp.sum(jnp.sin(a)) for a in jax.tree.leaves(jax.grad(total)(arrays)))

    arrays = (qs, x.k, x.v, x.g, x.initial_state)
    calls = functools.partial(chunked, cut=Plan(4, 2)), recurrence
    close(*(quick(jax.grad(functools.partial(norm_of_gradients, call=call)))(arrays) for call in calls))


def test_rounded_products_differentiated_twice_in_a_scan():
    how = Arithmetic(jnp.dtype(jnp.bfloat16), None)
    x, y = (jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32) for shape in ((2, 3), (3, 4)))

    def through_a_scan(product, x):
        turn = lambda total, _: (total + jnp.sum(jnp.sin(product(x * (1 + total / 9), y))), None)
        return jax.lax.scan(turn, 0.0, length=2)[0]

    def twice(product):
        f = functools.partial(through_a_scan, product)
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(jax.grad(f)(x)))))(x)

    rounded = twice(functools.partial(rounded_einsum, how, "ij,jk->ik"))
    assert 1e-4 < relative(rounded, twice(jnp.matmul)) < 3e-2  # of eight roundings to 8 bits, some of them to sines


def test_a_plan_covers_any_length():
    for time in (*range(1, 130), 1000, 65536):
        cut = plan(2, time, 3)
        assert cut.chunk & (cut.chunk - 1) == 0
        assert cut.chunk < 2 * max(time, 32)
        assert cut.group >= 1
    assert plan(1, 1000, 1, 16).chunk == 16


@pytest.mark.parametrize("gate", ["vector", "scalar", "none"])
def test_check_grads(gate):
    x = arguments(0, 1, 11, 2, 3, 2, hk=1, gate=gate)

    @jax.jit
    def f(q, k, v, g, state):
        return gated_linear_attention(q, k, v, g, initial_state=state, output_final_state=True, implementation="xla")

    if gate == "none":
        check_grads(
            lambda q, k, v, s: f(q, k, v, None, s),
            (*x[:3], x.initial_state),
            order=1,
            modes=["rev"],
            eps=1e-2,
            atol=2e-2,
            rtol=2e-2,
        )
    else:
        check_grads(f, x[:5], order=1, modes=["rev"], eps=1e-2, atol=2e-2, rtol=2e-2)


# One shape, compiled once, and many values.

TIME, SEQUENCES = 150, 3


def packed(seed, **options):
    return arguments(seed, 1, TIME, 2, 8, 6, hk=1, states=SEQUENCES, **options)


@st.composite
def lengths(draw):
    """cu_seqlens of SEQUENCES sequences in TIME tokens, many of them empty, short or as long as a chunk."""
    sizes = st.one_of(st.integers(0, TIME), st.sampled_from([0, 1, 63, 64, 65]))
    ends = np.cumsum([0, *draw(st.lists(sizes, min_size=SEQUENCES, max_size=SEQUENCES))])
    return np.minimum(ends, TIME)


@settings(40)
@hypothesis.given(st.integers(0, 2**16), lengths(), st.sampled_from(STRENGTHS))
def test_packed_lengths(seed, cu, strength):
    x = packed(seed)
    x = x._replace(g=jnp.where(np.random.default_rng(seed).random(x.g.shape) < 0.1, strength, x.g))
    got, want = (apply(x, cu_seqlens=cu, implementation=name) for name in ("xla", "reference"))
    close(got, want)


@st.composite
def ids(draw):
    runs = draw(st.lists(st.tuples(st.integers(-1, 2), st.integers(1, 70)), min_size=1, max_size=12))
    row = np.repeat(*np.array(runs).T)[:TIME]
    return np.pad(row, (0, TIME - row.size), mode="edge")[None]


@settings(40)
@hypothesis.given(st.integers(0, 2**16), ids())
def test_segment_ids(seed, segment_ids):
    x = arguments(seed, 1, TIME, 2, 8, 6, hk=1)
    got, want = (apply(x, segment_ids=segment_ids, implementation=name) for name in ("xla", "reference"))
    close(got, want)


@quick
def split_and_whole(x, at):
    """Gradients and results of a call that is cut at a token, the state carried over, and of the call in one piece."""

    def run(x, cu, states):
        o, ends = gated_linear_attention(
            *x[:4], initial_state=states, output_final_state=True, cu_seqlens=cu, implementation="xla"
        )
        assert ends is not None
        return o, ends

    def split(x):
        start = jnp.concatenate([x.initial_state[:1], jnp.zeros_like(x.initial_state[:1])])
        cu = jnp.stack([0, at, TIME])
        _, ends = run(x, cu, start)
        o, ends = run(x, cu, jnp.concatenate([x.initial_state[:1], ends[:1]]))
        return jnp.vdot(o, x.do) + jnp.vdot(ends[1], x.dstate[0]), (o, ends[1])

    def whole(x):
        o, end = run(x, jnp.array([0, TIME]), x.initial_state[:1])
        return jnp.vdot(o, x.do) + jnp.vdot(end[0], x.dstate[0]), (o, end[0])

    return tuple(jax.grad(f, has_aux=True)(x) for f in (split, whole))


@settings(30)
@hypothesis.given(st.integers(0, 2**16), st.integers(0, TIME))
def test_splitting_anywhere_and_carrying_the_state_is_not_splitting(seed, at):
    close(*split_and_whole(packed(seed), jnp.int32(at)))


@pytest.mark.parametrize("at", [1, 64, 77])
def test_splitting_the_arrays(at):
    x = arguments(at, 2, 130, 2, 8, 6, hk=1)
    call = quick(
        lambda q, k, v, g, state: gated_linear_attention(
            q, k, v, g, initial_state=state, output_final_state=True, implementation="xla"
        )
    )
    left, middle = call(*(a[:, :at] for a in x[:4]), x.initial_state)
    right, end = call(*(a[:, at:] for a in x[:4]), middle)
    want = apply(x, implementation="reference")
    close((jnp.concatenate([left, right], 1), end), (want.o, want.state))


@settings(20)
@hypothesis.given(st.integers(0, 2**16))
def test_reverse_is_a_flip(seed):
    x = arguments(seed, 1, TIME, 2, 8, 6, hk=1)
    flipped = jax.tree.map(lambda a: jnp.flip(a, 1), x)._replace(initial_state=x.initial_state, dstate=x.dstate)
    got, want = apply(x, reverse=True), apply(flipped)
    for name, a, b in zip(got._fields[:-1], got, want, strict=False):
        np.testing.assert_array_equal(a, b if name in ("state", "initial_state") else jnp.flip(b, 1), err_msg=name)


@settings(20)
@hypothesis.given(st.integers(0, 2**16), st.permutations(range(3)))
def test_a_permuted_batch_is_a_permuted_output(seed, order):
    x = arguments(seed, 3, 70, 2, 8, 6, hk=1)
    order = np.asarray(order)
    got, want = apply(jax.tree.map(lambda a: a[order], x)), apply(x)
    for a, b in zip(got[:-1], want[:-1], strict=True):
        assert relative(a, b[order]) < 1e-6


@settings(20)
@hypothesis.given(st.integers(0, 2**16), st.sampled_from(STRENGTHS))
def test_a_scalar_gate_is_the_same_gate_broadcast(seed, strength):
    x = arguments(seed, 1, TIME, 2, 8, 6, hk=1, gate="scalar")
    x = x._replace(g=jnp.where(np.random.default_rng(seed).random(x.g.shape) < 0.1, strength, x.g))
    scalar, vector = apply(x), apply(x._replace(g=jnp.repeat(x.g[..., None], 8, -1)))
    close(scalar, vector._replace(g=vector.g.sum(-1)))


@settings(20)
@hypothesis.given(st.integers(0, 2**16), st.floats(-3, 3))
def test_linear_in_the_values_and_the_state(seed, factor):
    x = arguments(seed, 1, TIME, 2, 8, 6, hk=1)
    got = apply(x._replace(v=factor * x.v, initial_state=factor * x.initial_state))
    want = apply(x)
    close((got.o, got.state), (factor * want.o, factor * want.state))
