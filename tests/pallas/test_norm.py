"""RMSNorm's gradients: the kernel in Pallas' interpreter against float64, its choice, its cuts, lowered for an H100."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.nn import norm as nn_norm
from gla_jax.nn.norm import LayerNorm, RMSNorm, fork, gated_norm
from gla_jax.pallas import norm as kernel

from .small import get_races, lower_for_h100, relative

EPS = 1e-3
# b, t, h, d, and the rows of a block.
SHAPES = [(1, 16, 1, 512, 8), (2, 8, 4, 256, 8), (1, 8, 2, 256, 4)]


def arguments(b, t, h, d, dtype="bfloat16"):
    rng = np.random.default_rng(0)
    x, dy, beside = (jnp.asarray(rng.standard_normal((b, t, h, d)), dtype) for _ in range(3))
    return x, dy, beside, jnp.asarray(1 + 0.3 * rng.standard_normal(d), "float32")


def expected(x, dy, beside, scale, gated):
    """In float64, by their equations."""
    x, dy, beside, scale = (np.asarray(y, np.float64) for y in (x, dy, beside, scale))
    inverse = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    sigmoid = 1 / (1 + np.exp(-beside))
    w = dy * beside * sigmoid if gated else dy
    dscale = (w * x * inverse).sum((0, 1, 2))
    dx = inverse * (w * scale - x * inverse**2 * (w * scale * x).mean(-1, keepdims=True))
    if not gated:
        return dx + beside, dscale
    return dx, dy * x * inverse * scale * sigmoid * (1 + beside * (1 - sigmoid)), dscale


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_are_their_equations(shape, gated, dtype):
    *shape, each = shape
    x, dy, beside, scale = arguments(*shape, dtype)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    wide = jnp.broadcast_to(scale, (shape[0], shape[-1]))
    *found, parts = kernel.norm_gradients(x, dy, beside, wide, EPS, each, gated=gated, interpret=interpret)
    assert not get_races().races_found
    want = expected(x, dy, beside, scale, gated)
    for got, reference in zip((*found, parts.sum((0, 1, 2))), want, strict=True):
        assert relative(got, reference) < (1e-6 if got.dtype == jnp.float32 else 3e-3)


@pytest.fixture
def by_kernel(monkeypatch):
    """The kernel, interpreted, for what it would take on a Hopper GPU."""
    calls = []

    def run(*arguments, **options):
        calls.append(arguments[0].shape)
        return compute(*arguments, **options, interpret=plgpu.InterpretGPUParams())

    compute = kernel.norm_gradients
    monkeypatch.setattr(kernel, "norm_gradients", run)
    monkeypatch.setattr(kernel, "FEW", 1)
    monkeypatch.setattr(kernel, "why_no_hopper", lambda platform: None)
    monkeypatch.setattr(nn_norm, "mixes_axes", lambda x: False)
    monkeypatch.setattr(nn_norm, "runs_on_one_device", lambda x: True)
    return calls


def gradients(b, t, h, d, dtype):
    """Of the parameters and arguments of a fork and of a gated norm, through both."""
    x, dy, gate, _ = arguments(b, t, h, d, dtype)
    x, dy, gate = (y.reshape(b, t, -1) for y in (x, dy, gate))
    whole, heads = RMSNorm(h * d, eps=EPS, dtype=dtype, rngs=nnx.Rngs(0)), RMSNorm(d, eps=EPS, rngs=nnx.Rngs(0))

    def loss(norms, x, gate):
        x, y = fork(norms[0], x)
        z = gated_norm(norms[1], y.reshape(b, t, h, d), gate)
        return jnp.sum((jnp.sin(x) + z).astype(jnp.float32) * dy)

    split = nnx.split(nnx.List([whole, heads]))
    found = jax.grad(lambda state, *xs: loss(nnx.merge(split[0], state), *xs), (0, 1, 2))(split[1], x, gate)
    return jax.tree.leaves(found)


def test_modules_take_the_kernel_and_agree_with_autodiff(by_kernel):
    fast = gradients(1, 16, 4, 256, "bfloat16")
    assert by_kernel == [(1, 16, 4, 256), (1, 16, 1, 1024)]
    plain = gradients(1, 16, 4, 256, "float32")
    assert len(by_kernel) == 2
    for got, want in zip(fast, plain, strict=True):
        assert relative(got, np.asarray(want, np.float64)) < 1e-2


def test_other_norms_are_left_alone():
    x, _, gate, _ = arguments(1, 8, 2, 256, "float32")
    for norm in (LayerNorm(256, rngs=nnx.Rngs(0)), RMSNorm(256, affine=False, rngs=nnx.Rngs(0)), None):
        y = x if norm is None else norm(x)
        want = (jax.nn.silu(gate) * y).reshape(1, 8, 512)
        np.testing.assert_allclose(gated_norm(norm, x, gate.reshape(1, 8, 512)), want, rtol=1e-5, atol=1e-6)
        if norm is not None:
            np.testing.assert_array_equal(fork(norm, x[:, :, 0])[1], norm(x[:, :, 0]))


def test_devices_cut_batch_time_and_heads(monkeypatch):
    """On Auto axes, with a plain function in the kernel's place: no array is gathered, and values are those of one."""

    def plain(x, dy, beside, scale, eps, each, *, gated):
        w = dy * beside if gated else dy
        parts = (w * x).reshape(x.shape[0], -1, each, *x.shape[2:]).sum(2)
        return (w + x * scale[:, None, None], *([beside + x] if gated else []), parts)

    monkeypatch.setattr(kernel, "norm_gradients", plain)
    monkeypatch.setattr(kernel, "FULL", 1)
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for gated in (False, True):
        x, dy, beside, scale = arguments(2, 64, 2 if gated else 1, 256, "float32")
        spec = jax.P("data", "sequence", "tensor" if gated else None)
        run = jax.jit(functools.partial(nn_norm._gradients, EPS, gated))
        with jax.set_mesh(mesh):
            placed = (jax.device_put(y, jax.NamedSharding(mesh, spec)) for y in (x, dy, beside))
            lowered = run.lower(*placed, scale).compile()
        assert "all-gather" not in lowered.as_text()
        assert "all-to-all" not in lowered.as_text()
        with jax.set_mesh(mesh):
            found = run(*(jax.device_put(y, jax.NamedSharding(mesh, spec)) for y in (x, dy, beside)), scale)
        wide = jnp.broadcast_to(scale, (2, 256))
        *want, parts = plain(x, dy, beside, wide, EPS, 64, gated=gated)
        for got, reference in zip(found, (*want, parts.sum((0, 1, 2))), strict=True):
            np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-4)


def through_both(x, scale):
    """A number, of what a fork and a gated norm make of x, whose gradients are the kernel's."""
    x, y = nn_norm._fork(EPS, x, scale)
    z = nn_norm._gated_norm(EPS, y[:, :, None], x, scale)
    return jnp.sum((x + z).astype(jnp.float32) ** 2)


def lowered_gradients(f, *arguments):
    return lower_for_h100(f, *arguments).as_text().count("@mosaic_gpu")


X, SCALE = jax.ShapeDtypeStruct((2, 1024, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.float32)


def test_without_a_mesh_on_a_host_of_several_devices():
    assert jax.device_count() > 1
    assert jax.eval_shape(jax.grad(through_both), X, SCALE).shape == X.shape


@pytest.fixture
def on_one_device(monkeypatch):
    monkeypatch.setattr(nn_norm, "runs_on_one_device", lambda x: True)
    monkeypatch.setattr("gla_jax.mesh.runs_on_one_device", lambda x: True)


def test_many_rows_of_gradients_by_vmap(on_one_device):
    many = jax.ShapeDtypeStruct((3, *X.shape), X.dtype)
    assert lowered_gradients(jax.vmap(jax.grad(through_both, (0, 1)), (0, None)), many, SCALE) == 2


def test_gradients_inside_shard_map(on_one_device):
    """A scale that is the same on all devices has the sum of their gradients."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    graph, _ = nnx.split(RMSNorm(256, eps=EPS, rngs=nnx.Rngs(0)))
    specs = jax.P("data"), jax.P()

    def loss(x, scale):
        norm = nnx.merge(graph, nnx.State({"scale": nnx.Param(scale)}))
        return jnp.sum(fork(norm, x)[1].astype(jnp.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "why_no_hopper", lambda platform: None)
        f = jax.shard_map(jax.grad(loss, (0, 1)), mesh=mesh, in_specs=specs, out_specs=specs)
        wide = X.update(shape=(4, *X.shape[1:]))
        assert "rms_norm_gradients" in str(jax.make_jaxpr(f)(wide, SCALE))


def test_gradients_of_gradients(on_one_device):
    """Those of the kernel's are those of its equations."""
    x, dy, beside, scale = arguments(1, 8, 2, 256, "float32")
    wide = jnp.broadcast_to(scale, (1, 256))
    for gated in (False, True):
        plain = nn_norm._plain_gradients(EPS, gated, 8, x, dy, beside, wide)
        for got, want in zip(plain[:-1], expected(x, dy, beside, scale, gated)[:-1], strict=True):
            assert relative(got, want) < 1e-5
        assert relative(plain[-1].sum((0, 1, 2)), expected(x, dy, beside, scale, gated)[-1]) < 1e-5
    twice = jax.grad(lambda x, scale: jnp.sum(jax.grad(through_both)(x, scale).astype(jnp.float32) ** 2))
    assert lowered_gradients(twice, X, SCALE) > 0


def test_forward_mode_where_there_is_no_kernel():
    x = jnp.ones((1, 8, 256))
    norm = RMSNorm(256, rngs=nnx.Rngs(0))
    assert jax.jvp(lambda x: fork(norm, x)[1], (x,), (x,))[1].shape == x.shape
    gates = lambda x: gated_norm(norm, x[:, :, None], x)
    assert jax.jvp(gates, (x,), (x,))[1].shape == x.shape


def test_what_it_does_not_take_is_said():
    def why(b=8, t=2048, h=4, d=256, dtype="bfloat16", platform="hopper"):
        return kernel.why_unsupported(jax.ShapeDtypeStruct((b, t, h, d), dtype), platform=platform)

    assert why() is None
    assert why(platform=None) == "it needs a Hopper GPU, and the device is cpu"
    assert why(dtype="float32") == "it takes bfloat16 and float16, and x is float32"
    assert why(t=2049) == "it takes t in multiples of 8 and b * t of at least 2048, and they are 2049 and 16392"
    assert why(b=1, t=1024) == "it takes t in multiples of 8 and b * t of at least 2048, and they are 1024 and 1024"
    assert why(d=320) == "it takes d in multiples of 256 and h * d of at most 4096, and they are 320 and 1280"
    assert why(h=1, d=8192) == "it takes d in multiples of 256 and h * d of at most 4096, and they are 8192 and 8192"


def test_blocks_fill_the_gpu_where_there_are_rows_for_them():
    assert [kernel.rows_of_a_block(*shape) for shape in ((8, 2048), (32, 1024), (4, 1024), (1, 24))] == [64, 128, 16, 8]
    assert [kernel.rows_of_a_block(8, 2048, devices) for devices in (2, 8)] == [32, 8]
    assert kernel.rows_of_a_block(8, 40, 4) == 8


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 1024), (1, 2048), (1, 768), (4, 256), (4, 512), (2, 256)], ids=str)
def test_it_lowers_for_an_h100(shape, gated):
    x = jax.ShapeDtypeStruct((8, 2048, *shape), jnp.bfloat16)
    scale = jax.ShapeDtypeStruct((8, shape[-1]), jnp.float32)
    run = functools.partial(kernel.norm_gradients, eps=EPS, each=64, gated=gated)
    assert "mosaic_gpu" in lower_for_h100(run, x, x, x, scale).as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(1, 1024), (1, 2048), (1, 768), (4, 256), (4, 512), (16, 256), (2, 256)], ids=str)
def test_on_a_gpu(shape, gated):
    x, dy, beside, scale = arguments(3, 1024, *shape)
    run = jax.jit(functools.partial(nn_norm._gradients, EPS, gated))
    assert kernel.why_unsupported(x) is None
    found, again = run(x, dy, beside, scale), run(x, dy, beside, scale)
    for got, same, reference in zip(found, again, expected(x, dy, beside, scale, gated), strict=True):
        np.testing.assert_array_equal(got, same)
        assert relative(got, reference) < (1e-6 if got.dtype == jnp.float32 else 3e-3)
