"""Time over 2, 4 and 8 simulated devices: the single-device op's tolerances, and what devices send each other."""

import functools
import inspect
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gla_jax import gated_linear_attention, pallas, sequence_parallel
from gla_jax.mesh import vary_alike
from gla_jax.pallas.backward import Gradients

from .cases import MILD, STRONG, WEAK, arguments, compare, expected, relative
from .oracle import Result

COLLECTIVE = r"= (.*?) (all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)(?:-start)?\("
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "pred": 1}
KINDS = [AxisType.Auto, AxisType.Explicit]


def mesh_of(kind=AxisType.Auto, batch=1, heads=1, sequence=8):
    devices = jax.devices()[: batch * heads * sequence]
    names = ("batch", "heads", "sequence")
    return jax.make_mesh((batch, heads, sequence), names, axis_types=(kind,) * 3, devices=devices)


def vjp(x, ids=None, **options):
    """o, the final state and the gradients."""

    def call(q, k, v, g, state):
        options_ = {"initial_state": state, "output_final_state": x.dstate is not None, "segment_ids": ids, **options}
        return sequence_parallel(q, k, v, g, **options_)

    (o, state), pull = jax.vjp(call, x.q, x.k, x.v, x.g, x.initial_state)
    return o, state, *pull((x.do, x.dstate))


def specs_of(x):
    tokens, states = P("batch", "sequence", "heads"), P("batch", "heads")
    gate = None if x.g is None else P("heads") if x.g.ndim == 1 else tokens
    state, dstate = (None if s is None else states for s in (x.initial_state, x.dstate))
    return type(x)(tokens, tokens, tokens, gate, state, tokens, dstate)


def compiled(mesh, x, ids=None, **options):
    """The call and its gradients for arguments that lie on the mesh, and the arguments there."""
    place = lambda a, spec: None if a is None else jax.device_put(a, NamedSharding(mesh, spec))
    placed = (type(x)(*map(place, x, specs_of(x))), place(ids, P("batch", "sequence")))
    with jax.set_mesh(mesh):
        f = jax.jit(functools.partial(vjp, **options)).lower(*placed)
        return f.compile(compiler_options={"xla_backend_optimization_level": 0}), placed


def check(x, mesh, tolerance=MILD, ids=None, **options):
    f, placed = compiled(mesh, x, ids, **options)
    want = expected(x, segment_ids=ids, reverse=options.get("reverse", False))
    got = Result(*f(*placed))
    compare(x, got, want, tolerance, label=f"{dict(mesh.shape)}")
    assert got.o.sharding.is_equivalent_to(NamedSharding(mesh, P("batch", "sequence", "heads")), 4)


def sent(f):
    """(kind, HLO type) of every collective, by kind and the largest first."""
    found = [(kind, shape) for shape, kind in re.findall(COLLECTIVE, f.as_text())]
    return sorted(found, key=lambda pair: [pair[0], -size(pair[1])])


def size(shape):
    """Bytes of what an HLO type like "(f32[2,3]{1,0}, f32[4])" holds."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in arrays)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
@pytest.mark.parametrize(
    ("devices", "gate"),
    [(2, "vector"), (4, "vector"), (8, "vector"), (8, "scalar"), (4, "head"), (2, "none"), (8, "none")],
)
def test_devices_and_gates(devices, gate, exchange):
    x = arguments(0, 2, 8 * 13, 4, 8, 6, hk=2, gate=gate)
    check(x, mesh_of(sequence=devices), exchange=exchange)


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision(dtype, devices):
    x = arguments(0, 1, 8 * 20, 2, 16, 16, dtype=dtype, gate_dtype=dtype, normalizer=16.0)
    check(x, mesh_of(sequence=devices), WEAK)


@pytest.mark.parametrize("kind", ["vector", "scalar"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_gates_of_every_strength(devices, kind):
    rng = np.random.default_rng(devices)
    shape = (2, 80, 2, 8) if kind == "vector" else (2, 80, 2)
    g = rng.choice([-1e-4, -0.1, -5, -50, -1e4, -1e37, -np.inf], shape, p=[0.5, 0.3, 0.1, 0.04, 0.02, 0.02, 0.02])
    g[:, 20:30] = -1e-4  # pieces that forget nothing
    check(arguments(1, 2, 80, 2, 8, 8, g=g), mesh_of(sequence=devices), STRONG)


@pytest.mark.parametrize("strength", [-1e-4, -50.0, -1e37, -np.inf])
def test_one_strength(strength):
    g = np.full((1, 32, 1, 4), strength)
    x = arguments(2, 1, 32, 1, 4, 4, g=g)
    if strength != -50.0:
        check(x, mesh_of(sequence=4), STRONG)
        return
    # A gate's gradient vanishes there: it is held to the size of its terms.
    check(x, mesh_of(sequence=4), {"float32": STRONG["float32"]._replace(vanishing=1e-4)})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gate", ["vector", "none"])
def test_segments_begin_and_end_in_any_piece(gate, reverse):
    rng = np.random.default_rng(3)
    x = arguments(3, 3, 64, 2, 4, 5, gate=gate)
    ids = rng.integers(-1, 2, (3, 64)).repeat(5, axis=1)[:, :64]
    ids[1, 5:43] = -1  # pieces of nothing but padding, after which the same segment goes on
    ids[1, 43:50] = ids[1, 4] = 0
    ids[2] = np.arange(64) // 8  # boundaries where pieces meet
    check(x, mesh_of(), ids=jnp.asarray(ids), reverse=reverse)


def test_a_boundary_at_every_token_around_two_pieces_meeting():
    x = arguments(4, 12, 16, 1, 4, 4)
    ids = np.stack([np.arange(16) >= cut for cut in range(2, 14)]).astype(np.int32)
    check(x, mesh_of(sequence=2), ids=jnp.asarray(ids))


def test_reverse_and_no_states():
    check(arguments(5, 2, 24, 2, 4, 4), mesh_of(sequence=4), reverse=True)
    check(arguments(5, 2, 24, 2, 4, 4, states=0, gate="scalar"), mesh_of(sequence=8), reverse=True)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("gate", ["vector", "head"])
def test_with_batch_and_heads_on_other_axes(kind, gate):
    x = arguments(6, 2, 32, 4, 4, 6, hk=2, gate=gate)
    ids = jnp.asarray(np.random.default_rng(6).integers(0, 2, (2, 32)).repeat(7, axis=1)[:, :32])
    mesh = mesh_of(kind, batch=2, heads=2, sequence=2)
    for exchange in ("all_gather", "all_to_all"):
        check(x, mesh, ids=ids, exchange=exchange)


def test_the_reference_and_second_derivatives():
    x = arguments(7, 1, 16, 1, 3, 3, states=0)

    def slope(call, *arguments):
        loss = lambda q, k, v, g: jnp.sum(jnp.tanh(call(q, k, v, g)[0]))
        inner = lambda *a: sum(jnp.sum(jnp.sin(d)) for d in jax.grad(loss, (0, 1, 2, 3))(*a))
        return jax.grad(inner, (0, 1, 2, 3))(*arguments)

    with jax.set_mesh(mesh_of(sequence=4)):
        call = functools.partial(sequence_parallel, implementation="reference")
        got = jax.jit(functools.partial(slope, call))(*x[:4])
    want = jax.jit(functools.partial(slope, functools.partial(gated_linear_attention, implementation="reference")))(
        *x[:4]
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    x, mesh = arguments(8, 2, 32, 2, 4, 4), mesh_of(sequence=4)
    specs = specs_of(x)

    def call(q, k, v, g, state):
        return sequence_parallel(q, k, v, g, initial_state=state, output_final_state=True)

    inside = jax.shard_map(
        call, mesh=mesh, in_specs=specs[:5], out_specs=(specs.q, specs.initial_state), check_vma=check_vma
    )
    o, state = jax.jit(inside)(*x[:5])
    want = expected(x)
    for got, reference in ((o, want.o), (state, want.state)):
        np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exchange", ["all_gather", "all_to_all"])
def test_what_is_sent_does_not_depend_on_time(exchange):
    b, h, k, v, devices = 2, 3, 8, 16, 8
    traffic = []
    for time in (64, 512):
        ids = jnp.zeros((b, time), jnp.int32)
        f, _ = compiled(mesh_of(), arguments(0, b, time, h, k, v), ids, exchange=exchange)
        traffic.append(sent(f))
    assert traffic[0] == traffic[1]
    # A state of each device forward and a state's cotangent backward; the rest are decays [b, h, k], ids [b], and a sum
    # for the final state and for the initial state's cotangent.
    state, decay = 4 * b * h * k * v, 4 * b * h * k
    exchanges = ["all-gather"] * 2 if exchange == "all_gather" else ["all-to-all"] * 4
    each = devices * state if exchange == "all_gather" else state
    assert [(kind, size(shape)) for kind, shape in traffic[0]] == sorted(
        [
            *((kind, each) for kind in exchanges),
            ("all-gather", devices * decay),
            ("all-gather", devices * 4 * b),
            ("all-reduce", 2 * state),
        ],
        key=lambda pair: [pair[0], -pair[1]],
    )


def test_many_devices_take_all_to_all_by_default():
    kinds = {}
    for devices in (4, 8):
        f, _ = compiled(mesh_of(sequence=devices), arguments(0, 1, 16, 1, 4, 8, gate="none", states=0))
        kinds[devices] = {kind for kind, _ in sent(f)}
    assert kinds == {4: {"all-gather"}, 8: {"all-to-all"}}


@pytest.mark.parametrize(("exchange", "states"), [("all_gather", {"states": 0}), ("all_to_all", {})])
def test_the_exchange_inside_of_kernels(exchange, states, monkeypatch):
    """With plain JAX in the place of kernels that make the state that enters of what their tokens do to a state."""

    def plain(q, k, v, g, scale, state):
        return gated_linear_attention(q, k, v, g, scale=scale, initial_state=state, output_final_state=True)

    def forward(q, k, v, g, scale, enter):
        zeros = jnp.zeros((q.shape[0], *k.shape[2:], v.shape[3]))
        zeros, *_ = vary_alike((zeros, q))
        decay, turned = jnp.exp(jnp.sum(g.astype(jnp.float32), 1))[:, :, None], lambda x: jnp.swapaxes(x, 2, 3)
        state = turned(enter(decay, turned(plain(q, k, v, g, scale, zeros)[1])))
        return plain(q, k, v, g, scale, state)

    def backward(q, k, v, g, scale, state, do, enter):
        _, pull = jax.vjp(lambda *x: plain(*x[:4], scale, x[4]), q, k, v, g, state)
        decay = jnp.exp(jnp.sum(g.astype(jnp.float32), 1))[..., None]
        return Gradients(*pull((do, enter(decay, pull((do, jnp.zeros_like(state)))[4]))))

    monkeypatch.setattr(sys.modules[sequence_parallel.__module__], "choose", lambda *_: "mosaic_gpu")
    monkeypatch.setattr(pallas, "forward", forward)
    monkeypatch.setattr(pallas, "backward", backward)
    x = arguments(10, 2, 96, 4, 8, 12, hk=2, dtype="bfloat16", gate_dtype="bfloat16", **states)
    ids = jnp.asarray(np.random.default_rng(10).integers(0, 2, (2, 8)).repeat(12, axis=1))
    check(x, mesh_of(sequence=4), ids=ids, exchange=exchange, reverse=not states)


def test_under_pmap():
    x = arguments(9, 2, 32, 2, 4, 4, states=0)
    want = expected(x)
    whole = lambda q, k, v, g: gated_linear_attention(q, k, v, g)[0]
    rows = [a[:, None] for a in x[:4]]  # a row of the batch a device
    np.testing.assert_allclose(jax.pmap(whole)(*rows)[:, 0], want.o, rtol=1e-4, atol=1e-5)

    def loss(q, k, v, g, do):
        return jax.lax.psum(jnp.sum(whole(q, k, v, g) * do), "devices")

    grads = jax.pmap(jax.grad(loss, (0, 1, 2, 3)), axis_name="devices")(*rows, x.do[:, None])
    for got, reference in zip(grads, (want.q, want.k, want.v, want.g), strict=True):
        assert relative(got[:, 0] / 2, reference) < 1e-5  # psum's transpose sums the devices' cotangents
    pieces = [jnp.moveaxis(a.reshape(2, 4, 8, *a.shape[2:]), 1, 0) for a in x[:4]]  # a piece of time a device
    o = jax.pmap(lambda *a: sequence_parallel(*a, axis="time")[0], axis_name="time")(*pieces)
    np.testing.assert_allclose(jnp.moveaxis(o, 0, 1).reshape(want.o.shape), want.o, rtol=1e-4, atol=1e-5)


def test_bad_calls():
    x, call = arguments(0, 1, 12, 1, 4, 4), inspect.unwrap(sequence_parallel)  # without the tests' own type checks
    with pytest.raises(ValueError, match=r"axis: must be an axis of the mesh in use, got 'sequence' and .* has none"):
        call(*x[:4])
    with jax.set_mesh(mesh_of()):
        with pytest.raises(ValueError, match=r"^axis: must be an axis of .* has 'batch', 'heads', 'sequence'$"):
            call(*x[:4], axis="time")
        with pytest.raises(ValueError, match=r"^q, k and v: t must be a multiple of the 8 devices of axis 'sequence'"):
            call(*x[:4])
        with pytest.raises(ValueError, match=r"^exchange: must be None, 'all_gather' or 'all_to_all', got 'ring'"):
            call(*x[:4], exchange="ring")
        with pytest.raises(ValueError, match="q and k must have the same key dimension"):
            call(x.q[..., :2], *x[1:4])
