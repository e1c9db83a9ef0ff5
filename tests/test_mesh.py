"""Sharded calls on 8 simulated devices: right, and without gathering, on Auto and Explicit axes and in shard_map."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gla_jax import gated_linear_attention, pallas

from .cases import arguments, expected, relative

COLLECTIVES = r"\b(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("


def mesh_of(kind, batch=4, heads=2):
    return jax.make_mesh((batch, heads), ("batch", "heads"), axis_types=(kind, kind))


def vjp(x, ids=None, cu=None, implementation="xla"):
    """o, the final state and the gradients."""

    def call(q, k, v, g, state, bonus):
        return gated_linear_attention(
            q,
            k,
            v,
            g,
            bonus=bonus,
            initial_state=state,
            output_final_state=x.dstate is not None,
            segment_ids=ids,
            cu_seqlens=cu,
            implementation=implementation,
        )

    (o, state), pull = jax.vjp(call, x.q, x.k, x.v, x.g, x.initial_state, x.bonus)
    return o, state, *pull((x.do, x.dstate))


def specs_of(x, batch="batch", heads="heads", states="batch"):
    """The specs of the arguments, and of what `vjp` gives."""
    tokens = P(batch, None, heads, None)
    gate = None if x.g is None else {1: P(heads), 3: P(batch, None, heads), 4: tokens}[x.g.ndim]
    state = None if x.initial_state is None else P(states, heads, None, None)
    bonus = None if x.bonus is None else P(heads, None)
    arguments = type(x)(tokens, tokens, tokens, gate, state, tokens, None if x.dstate is None else state, bonus)
    results = (tokens, arguments.dstate, tokens, tokens, tokens, gate, state, bonus)
    return arguments, results


def place(mesh, tree, specs):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs)


def check(got, want, results, mesh):
    for a, b, spec in zip(got, want, results, strict=True):
        if a is not None:
            assert relative(a, b) < 1e-5
            assert a.sharding.is_equivalent_to(NamedSharding(mesh, spec), a.ndim)


def run(mesh, f, *placed, allowed=()):
    """f compiled for the placed arguments, after a look at the collectives in it."""
    with jax.set_mesh(mesh):
        compiled = jax.jit(f).lower(*placed).compile(compiler_options={"xla_backend_optimization_level": 0})
        assert set(re.findall(COLLECTIVES, str(compiled.as_text()))) <= set(allowed)
        return compiled(*placed)


KINDS = [AxisType.Auto, AxisType.Explicit]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("gate", ["vector", "scalar", "none"])
def test_batch_and_heads(kind, gate):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2, gate=gate), mesh_of(kind)
    specs, results = specs_of(x)
    check(run(mesh, vjp, place(mesh, x, specs)), expected(x), results, mesh)


@pytest.fixture
def shapes_in_kernels(monkeypatch):
    """The shapes of q that kernels see, in whose place plain JAX computes on this CPU."""
    seen = []

    def forward(q, k, v, g, scale, state, output_final_state, starts=None):
        seen.append(q.shape)
        if starts is not None:
            assert starts.shape == k.shape[:2]
            seen.append("starts")
            g = jnp.where(starts[..., None, None], -jnp.inf, g)
        options = {"scale": scale, "initial_state": state, "output_final_state": output_final_state}
        return gated_linear_attention(q, k, v, g, **options, implementation="xla")

    def forward_and_states(*given, **more):
        batch, _, heads, _ = given[1].shape
        states = pallas.States(jnp.ones((batch, heads, 2, 64, 64)), jnp.ones((batch, heads, 2, 1)))
        return *forward(*given, **more), states

    def backward(q, k, v, g, scale, state, do, dfinal, starts, saved):
        seen.append(q.shape)
        if saved is not None:
            assert saved.states.shape[:2] == saved.mild.shape[:2] == (k.shape[0], k.shape[2])
            seen.append("saved")
        call = lambda *given: forward(*given[:4], scale, given[4], dfinal is not None, starts)
        return jax.vjp(call, q, k, v, g, state)[1]((do, dfinal))

    monkeypatch.setattr(pallas, "why_unsupported", lambda *_, **__: None)
    monkeypatch.setattr(pallas, "forward", forward)
    monkeypatch.setattr(pallas, "forward_and_states", forward_and_states)
    monkeypatch.setattr(pallas, "backward", backward)
    jax.clear_caches()
    return seen


ON_KERNELS = functools.partial(vjp, implementation="mosaic_gpu")


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("gate", "states"), [("vector", 4), ("scalar", 4), ("none", 0)])
def test_kernels_run_on_each_share(kind, gate, states, shapes_in_kernels):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2, gate=gate, states=states), mesh_of(kind)
    specs, results = specs_of(x)
    check(run(mesh, ON_KERNELS, place(mesh, x, specs)), expected(x), results, mesh)
    # The first is traced whole, to find the results' shapes; the partitioner asks for a share.
    assert shapes_in_kernels[-1] == (1, 70, 2, 8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_kernels_are_told_where_sequences_begin(kind, shapes_in_kernels):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2), mesh_of(kind)
    ids = np.random.default_rng(0).integers(-1, 2, (4, 70)).repeat(3, axis=1)[:, :70]
    specs, results = specs_of(x)
    placed = place(mesh, x, specs), jax.device_put(jnp.asarray(ids), NamedSharding(mesh, P("batch")))
    check(run(mesh, ON_KERNELS, *placed), expected(x, segment_ids=ids), results, mesh)
    assert shapes_in_kernels.count("starts") >= 2
    assert shapes_in_kernels[-2] == (1, 70, 2, 8)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_states_that_the_forward_leaves_lie_as_its_arguments(kind, shapes_in_kernels, monkeypatch):
    asked = []
    monkeypatch.setattr(pallas, "saves_states", lambda *given: asked.append(given[-1]) or True)
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2), mesh_of(kind)
    specs, results = specs_of(x)
    check(run(mesh, ON_KERNELS, place(mesh, x, specs)), expected(x), results, mesh)
    assert shapes_in_kernels[-2:] == ["saved", (1, 70, 2, 8)]
    assert asked[-1] == (8 if kind == AxisType.Auto else 1)


def test_kernels_run_on_shares_that_only_results_ask_for(shapes_in_kernels):
    x, mesh = arguments(0, 8, 30, 2, 8, 6, states=0), mesh_of(AxisType.Auto, 8, 1)

    def share(q, k, v, g):
        o, _ = gated_linear_attention(q, k, v, g, implementation="mosaic_gpu")
        return jax.lax.with_sharding_constraint(o, P("batch"))

    with jax.set_mesh(mesh):
        o = jax.jit(share)(jax.device_put(x.q, P()), x.k, x.v, x.g)
        assert relative(o, expected(x).o) < 1e-5
        assert shapes_in_kernels[-1] == (1, 30, 2, 8)
        with pytest.raises(jax.errors.JaxRuntimeError, match="put an argument of the jitted function on the mesh"):
            jax.jit(share)(x.q, x.k, x.v, x.g)


def test_kernels_get_time_and_channels_whole(shapes_in_kernels):
    x, mesh = arguments(0, 4, 64, 8, 8, 8, hk=4, states=0), mesh_of(AxisType.Auto)
    for spec in (P(None, "batch", "heads"), P(None, None, None, ("batch", "heads")), P(None, None, ("heads", "batch"))):
        placed = [jax.device_put(a, NamedSharding(mesh, spec if a is x.q else P())) for a in (x.q, x.k, x.v, x.g)]
        o, _ = jax.jit(functools.partial(gated_linear_attention, implementation="mosaic_gpu"))(*placed)
        assert relative(o, expected(x).o) < 1e-5
        assert shapes_in_kernels[-1][1::2] == (64, 8)


def test_kernels_under_vmap_on_shares(shapes_in_kernels):
    """One more axis is more rows of the batch; what is not mapped is repeated."""
    x, mesh = arguments(0, 8, 30, 2, 8, 6, states=0), mesh_of(AxisType.Auto)
    q, k, v, g = (a.reshape(2, 4, *a.shape[1:]) for a in (x.q, x.k, x.v, x.g))
    q, v = (jax.device_put(a, NamedSharding(mesh, P(None, "batch", None, "heads"))) for a in (q, v))
    call = lambda q, v: gated_linear_attention(q, k[0], v, g[1], implementation="mosaic_gpu")[0]
    twice = [jnp.tile(a, (2, 1, 1, 1)) for a in (k[0], g[1])]
    want = gated_linear_attention(x.q, twice[0], x.v, twice[1], implementation="xla")[0]
    assert relative(jax.jit(jax.vmap(call))(q, v).reshape(want.shape), want) < 1e-5


def test_kernels_are_refused_where_kinds_of_axes_mix(shapes_in_kernels):
    mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Explicit, AxisType.Auto))
    x = arguments(0, 4, 30, 2, 8, 6, states=0)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="Auto axes beside others"):
        gated_linear_attention(jax.device_put(x.q, P("batch")), x.k, x.v, x.g, implementation="mosaic_gpu")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_constant_gate_sums_its_gradient_over_the_batch(kind):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2, gate="head"), mesh_of(kind)
    specs, results = specs_of(x)
    check(run(mesh, vjp, place(mesh, x, specs), allowed=["all-reduce"]), expected(x), results, mesh)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_bonus_sums_its_gradient_over_the_batch(kind):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2, bonus=True), mesh_of(kind)
    specs, results = specs_of(x)
    check(run(mesh, vjp, place(mesh, x, specs), allowed=["all-reduce"]), expected(x), results, mesh)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_axis_for_all_and_no_states(kind):
    x, mesh = arguments(0, 8, 20, 1, 4, 4, states=0), mesh_of(kind)
    specs, results = specs_of(x, batch=("batch", "heads"), heads=None)
    check(run(mesh, vjp, place(mesh, x, specs)), expected(x), results, mesh)
    x = arguments(0, 1, 20, 8, 4, 4, states=0)
    specs, results = specs_of(x, batch=None, heads=("batch", "heads"))
    check(run(mesh, vjp, place(mesh, x, specs)), expected(x), results, mesh)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_segment_ids(kind):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2), mesh_of(kind)
    ids = np.random.default_rng(0).integers(-1, 2, (4, 70)).repeat(3, axis=1)[:, :70]
    specs, results = specs_of(x)
    placed = place(mesh, x, specs), jax.device_put(jnp.asarray(ids), NamedSharding(mesh, P("batch")))
    check(run(mesh, vjp, *placed), expected(x, segment_ids=ids), results, mesh)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_cu_seqlens_over_heads(kind):
    cu = [0, 0, 30, 65, 68]
    x, mesh = arguments(0, 1, 70, 4, 8, 6, hk=2, states=4), mesh_of(kind)
    specs, results = specs_of(x, batch=None, states=None)
    placed = place(mesh, x, specs), jax.device_put(jnp.asarray(cu), NamedSharding(mesh, P()))
    got = run(mesh, lambda x, cu: vjp(x, cu=cu), *placed)
    check(got, expected(x, cu_seqlens=cu), results, mesh)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("states", [0, 4])
def test_shard_map(check_vma, states):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2, states=states), mesh_of(AxisType.Auto)
    specs, results = specs_of(x)
    inside = jax.shard_map(vjp, mesh=mesh, in_specs=(specs,), out_specs=results, check_vma=check_vma)
    check(run(mesh, inside, place(mesh, x, specs)), expected(x), results, mesh)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_through_shard_map(check_vma):
    x, mesh = arguments(0, 4, 70, 4, 8, 6, hk=2, states=0), mesh_of(AxisType.Explicit)
    specs, results = specs_of(x)

    def loss(q, k, v, g, do):
        one = functools.partial(gated_linear_attention, implementation="xla")
        o = jax.shard_map(lambda *a: one(*a)[0], mesh=mesh, in_specs=specs[:4], out_specs=specs.q, check_vma=check_vma)(
            q, k, v, g
        )
        return jnp.sum(o * do)

    placed = place(mesh, x, specs)
    got = run(mesh, jax.grad(loss, (0, 1, 2, 3)), *placed[:4], placed.do, allowed=["all-reduce"])
    want = expected(x)
    check(got, (want.q, want.k, want.v, want.g), results[2:6], mesh)


def test_explicit_axes_of_the_results():
    x, mesh = arguments(0, 4, 20, 2, 4, 4, states=0), mesh_of(AxisType.Explicit)
    specs, _ = specs_of(x)
    with jax.set_mesh(mesh):
        placed = place(mesh, x, specs)
        o, state = jax.eval_shape(functools.partial(gated_linear_attention, output_final_state=True), *placed[:4])
    assert o.sharding.spec == P("batch", None, "heads", None)
    assert state.sharding.spec == P("batch", "heads", None, None)


def test_time_sharded_on_an_explicit_axis_is_refused():
    x, mesh = arguments(0, 4, 20, 2, 4, 4, states=0), mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = place(mesh, x, specs_of(x, batch=None, heads=None)[0])
        q = jax.device_put(x.q, NamedSharding(mesh, P(None, "batch")))
        with pytest.raises(ValueError, match="q may be sharded over batch and heads"):
            gated_linear_attention(q, *placed[1:4])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_the_gpu_kernel_is_traced_a_shard_each(axis_type, monkeypatch):
    """A kernel's results vary over the axes that its arguments vary over, and so do all gradients."""
    monkeypatch.setattr(pallas, "why_unsupported", functools.partial(pallas.why_unsupported, platform="hopper"))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    spec = P("data", None, "tensor")

    def gradients(q, k, v, g):
        def loss(*arguments):
            o, state = gated_linear_attention(*arguments, implementation="mosaic_gpu", output_final_state=True)
            return o.astype(jnp.float32).sum() + state.sum()

        return jax.grad(loss, (0, 1, 2, 3))(q, k, v, g)

    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, spec) if axis_type == AxisType.Explicit else None
        q = jax.ShapeDtypeStruct((8, 128, 4, 64), jnp.bfloat16, sharding=sharding)
        g = jax.ShapeDtypeStruct(q.shape, jnp.float32, sharding=sharding)
        if axis_type == AxisType.Auto:
            assert "custom_partitioning" in str(jax.jit(gradients).trace(q, q, q, g).jaxpr)
            gradients = jax.shard_map(gradients, in_specs=(spec,) * 4, out_specs=spec)
        jaxpr = str(jax.jit(gradients).trace(q, q, q, g).jaxpr)
    assert "mpmd_map" in jaxpr
