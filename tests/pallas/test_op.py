"""On a Hopper GPU: the foundation's cases through `implementation="mosaic_gpu"`, against the float64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax import gated_linear_attention, which_implementation

from ..cases import MILD, STRONG, WEAK, arguments, check
from ..fla_cases import CASES
from ..test_attention import GROUPS, HEADS, KEY, TIME, TRAINED, VALUE, gate_mixtures

pytestmark = pytest.mark.gpu
HALF = ("bfloat16", "float16")
ON = {"implementation": "mosaic_gpu", "optimized": True}
SMALL = [c for c in CASES if c.small and c.dtype in HALF and c.cu is None]


def shared(seed, g=None, key=KEY, **options):
    return arguments(seed, 1, TIME, HEADS, key, VALUE, hk=GROUPS, g=g, **options)


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_cases_of_flash_linear_attention(case):
    gate_dtype = "float32" if case.gate == "head" else case.dtype
    options = {"gate": case.gate, "normalizer": case.normalizer, "dtype": case.dtype, "gate_dtype": gate_dtype}
    x = arguments(42, case.batch, case.time, case.heads, case.key, case.value, **options)
    weak = case.gate in ("head", "none") or case.normalizer > 1
    check(x, WEAK if weak else MILD if case.normalizer == 1 else STRONG, scale=case.scale, **ON)


@pytest.mark.parametrize("key", [KEY, 80, 160])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("dtype", HALF)
def test_gates_of_every_strength(dtype, gate, key):
    shape = (1, TIME, GROUPS, key)[: 4 if gate == "vector" else 3]
    for i, (name, g) in enumerate(gate_mixtures(shape).items()):
        uniform = name.endswith("everywhere") and not name.startswith("-0.0001")
        bounds = STRONG[dtype]._replace(vanishing=1e-2) if uniform else STRONG[dtype]
        bounds = WEAK[dtype] if name == "-0.0001 everywhere" else bounds
        check(shared(i, g, key, gate=gate, dtype=dtype), {dtype: bounds}, label=name, **ON)


@pytest.mark.parametrize("gate_dtype", ["float32", None])
@pytest.mark.parametrize("dtype", HALF)
def test_trained_gates(dtype, gate_dtype):
    for row, g in enumerate(TRAINED[:, :TIME].astype(np.float32)):
        x = shared(row, g[None], dtype=dtype, gate_dtype=gate_dtype or dtype)
        check(x, STRONG, label=f"row {row}", **ON)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("seed", "normalizer", "bound"), [(1, None, MILD), (3, 0.05, STRONG)], ids=["mild", "strong"])
def test_small_keys_and_values(seed, normalizer, bound, dtype):
    gates = {} if normalizer is None else {"normalizer": normalizer}
    check(shared(seed, dtype=dtype, size=1e-2, **gates), bound, **ON)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("gate", ["none", "head"])
def test_constant_gates(gate, dtype):
    check(arguments(0, 1, TIME, 8, KEY, VALUE, gate=gate, dtype=dtype), WEAK, **ON)


@pytest.mark.parametrize("time", [1, 15, 63, 65, 1000])
def test_lengths(time):
    check(arguments(time, 2, time, 2, 128, 96, dtype="bfloat16"), MILD, **ON)


@pytest.mark.parametrize("gate", ["vector", "scalar"])
@pytest.mark.parametrize("reverse", [False, True])
def test_segments_padding_and_direction(reverse, gate):
    ids = np.repeat([0, 3, 3, -1, 1, -1, 0, 1], [40, 24, 70, 9, 1, 30, 60, 16])[None]
    check(shared(0, gate=gate, dtype="bfloat16"), MILD, segment_ids=ids, reverse=reverse, **ON)


@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_sequences_laid_end_to_end(gate):
    x = arguments(0, 1, TIME, 2, 64, 64, gate=gate, dtype="bfloat16", states=0)
    check(x, MILD, cu_seqlens=np.array([0, 30, 30, 128, 200]), **ON)


def test_it_is_what_a_hopper_gpu_takes():
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    gates = (None, jax.ShapeDtypeStruct((1, 64, 1), jnp.float32), x, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    assert all(which_implementation(x, x, x, g).name == "mosaic_gpu" for g in gates)
    y = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    assert which_implementation(y, y, y).name == "xla"


def test_inside_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = arguments(0, 2, 100, 2, 64, 64, dtype="bfloat16")
    call = lambda q, k, v, g: gated_linear_attention(q, k, v, g, implementation="mosaic_gpu")[0]
    spec = jax.P("data")
    sharded = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec))
    np.testing.assert_array_equal(sharded(x.q, x.k, x.v, x.g), call(x.q, x.k, x.v, x.g))
