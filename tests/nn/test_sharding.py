import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from gla_jax.nn import DEFAULT_RULES, GLAForCausalLM, create_sharded, param_shardings
from gla_jax.nn.sharding import MANY_ROWS, dot, linear, side_by_side

from ..cases import relative
from .options import OPTIONS, build, forward, tokens

CONFIG = OPTIONS["conv"].replace(vocab_size=36, num_kv_heads=2, implementation=None)


def mesh_of(kind=AxisType.Auto, **sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def make():
    return GLAForCausalLM(CONFIG, rngs=nnx.Rngs(0))


def test_every_parameter_names_its_axes():
    for path, param in nnx.to_flat_state(nnx.state(nnx.eval_shape(make))):
        names = param.get_metadata()["out_sharding"]
        assert len(names) == len(param.shape), path
        assert set(names) <= {None, *DEFAULT_RULES}
        assert (names[0] == "layers") == (path[0] == "layers")
        if len(param.shape) - (names[0] == "layers") == 2:
            assert any(names[1:]), path


def test_shardings_follow_the_rules_and_leave_out_absent_axes():
    abstract = nnx.eval_shape(make)
    shardings = param_shardings(abstract, mesh_of(data=2, fsdp=2, tensor=2))
    assert shardings["layers"]["mixer"]["q_proj"]["kernel"].get_value().spec == jax.P(None, "fsdp", "tensor")
    assert shardings["layers"]["mixer"]["o_proj"]["kernel"].get_value().spec == jax.P(None, "tensor", "fsdp")
    assert shardings["embed"]["embedding"].get_value().spec == jax.P("tensor", "fsdp")
    assert shardings["norm"]["scale"].get_value().spec == jax.P(None)
    shardings = param_shardings(abstract, mesh_of(data=8))
    assert all(not any(s.spec) for s in jax.tree.leaves(shardings))
    rules = {**DEFAULT_RULES, "embed": ("data", "fsdp")}
    shardings = param_shardings(nnx.state(abstract), mesh_of(data=2, fsdp=4), rules)
    assert shardings["embed"]["embedding"].get_value().spec == jax.P(None, ("data", "fsdp"))


def test_flax_reads_the_same_names():
    mesh = mesh_of(fsdp=4, tensor=2)
    state = nnx.state(nnx.eval_shape(make))
    with nnx.logical_axis_rules(tuple(DEFAULT_RULES.items())):
        theirs = nnx.get_named_sharding(state, mesh)
    ours = param_shardings(state, mesh)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.spec, b.spec), ours, theirs)


def test_what_does_not_divide_is_named():
    with pytest.raises(ValueError, match=r"^mesh: axis 'embed' of embed.embedding has 32 entries, .* of 3$"):
        param_shardings(nnx.eval_shape(make), jax.make_mesh((3,), ("fsdp",), devices=jax.devices()[:3]))
    with pytest.raises(ValueError, match=r"^rules: no entry for the logical axis 'vocab' of embed.embedding"):
        param_shardings(nnx.eval_shape(make), mesh_of(fsdp=8), {"embed": None})


def test_parameters_are_born_on_their_devices():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        model = create_sharded(make, mesh)
    kernel = model.layers.mixer.q_proj.kernel[...]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), nnx.state(model), nnx.state(make())
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_sharded_model_computes_the_same(kind):
    mesh = mesh_of(kind, data=2, fsdp=2, tensor=2)
    alone, inputs = build(CONFIG), tokens(4, 16) % 36
    ids = jnp.array([[0] * 7 + [1] * 9] * 4)
    shardings = param_shardings(alone, mesh)
    graphdef, params = nnx.split(alone)
    batch = NamedSharding(mesh, jax.P(("data", "fsdp")))

    def loss(params, inputs, ids):
        logits = nnx.merge(graphdef, params)(inputs, ids)
        return jnp.mean(logits**2), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, expected), expected_grads = step(params, inputs, ids)
    placed = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        (_, logits), grads = step(placed, *jax.device_put((inputs, ids), batch))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, expected_grads)
    # Decoding, too.
    cache, whole = alone.init_cache(4), forward(alone, inputs)
    cache = jax.device_put(cache, NamedSharding(mesh, jax.P(None, ("data", "fsdp"))))
    some, token = (jax.device_put(x, batch) for x in (inputs[:, :9], inputs[:, 9]))
    with jax.set_mesh(mesh):
        first, cache = jax.jit(lambda p, t, c: nnx.merge(graphdef, p).prefill(t, c))(placed, some, cache)
        second, _ = jax.jit(lambda p, t, c: nnx.merge(graphdef, p).step(t, c))(placed, token, cache)
    np.testing.assert_allclose(first, whole[:, 8], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(second, whole[:, 9], rtol=1e-3, atol=1e-4)


COLLECTIVE = r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\("


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_time_sharded_over_an_axis(kind):
    """The same loss and gradients, and nothing sent between the pieces that grows with time."""
    mesh = mesh_of(kind, data=2, sequence=4)
    config = CONFIG.replace(implementation="xla", num_layers=1)
    graphdef, params = nnx.split(build(config))
    pieces = nnx.graphdef(build(config.replace(sequence_axis="sequence")))
    spec = NamedSharding(mesh, jax.P("data", "sequence"))

    def loss(graphdef, params, inputs, ids):
        return jnp.mean(nnx.merge(graphdef, params)(inputs, ids) ** 2)

    step = jax.jit(
        jax.value_and_grad(loss, 1), static_argnums=0, compiler_options={"xla_backend_optimization_level": 0}
    )
    sent = []
    for time in (24, 48):
        inputs = tokens(4, time) % 36
        ids = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (4, time)).repeat(5, 1)[:, :time])
        arguments = (jax.device_put(params, NamedSharding(mesh, jax.P())), *jax.device_put((inputs, ids), spec))
        with jax.set_mesh(mesh):
            text = step.lower(pieces, *arguments).compile().as_text()
            got = step(pieces, *arguments)
        sent.append(sorted(re.findall(COLLECTIVE, text)))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
            got,
            step(graphdef, params, inputs, ids),
        )
    assert sent[0] == sent[1]
    assert any(kind == "collective-permute" for _, kind in sent[0])


@pytest.mark.parametrize("rows", [16, 512, 5632])
def test_a_single_row_s_product_on_a_gpu_is_the_product(rows, monkeypatch):
    x, w = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate([(1, rows), (rows, 48)]))
    want = jnp.dot(x, w, preferred_element_type=jnp.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    made = dot(x, w, preferred_element_type=jnp.float32)
    np.testing.assert_allclose(made, want, rtol=1e-4, atol=1e-3)
    assert dot(x, w).dtype == jnp.bfloat16
    assert "reduce_sum" in str(jax.make_jaxpr(dot)(x, w))
    assert "reduce_sum" not in str(jax.make_jaxpr(dot)(jnp.tile(x, (2, 1)), w))


@pytest.mark.parametrize("bias", [False, True])
def test_products_with_the_same_input_are_one_where_rows_are_many(bias):
    rngs = nnx.Rngs(0)
    common = {"init_std": 0.1, "dtype": jnp.bfloat16, "param_dtype": jnp.float32, "rngs": rngs}
    layers = [linear(8, width, ("embed", "heads"), bias=bias and width == 6, **common) for width in (4, 6, 2)]
    x = jax.random.normal(jax.random.key(0), (2, MANY_ROWS // 2, 8))
    beside = jax.jit(lambda x: side_by_side(layers, x))
    for found, layer in zip(beside(x), layers, strict=True):
        np.testing.assert_array_equal(found, layer(x))
    count = lambda x: beside.lower(x).as_text().count("dot_general")
    assert count(x) == (3 if bias else 1)
    assert count(x[:1]) == 3


def test_a_product_with_a_bias_is_rounded_once():
    common = {"init_std": 0.1, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    layer = linear(8, 64, (None, None), bias=True, **common)
    layer.bias[...] = jax.random.normal(jax.random.key(1), (64,), jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 50, 8), jnp.bfloat16)
    wide = [np.asarray(a, np.float32) for a in (x, layer.kernel[...], layer.bias[...])]
    np.testing.assert_array_equal(layer(x), jnp.asarray(wide[0] @ wide[1] + wide[2], jnp.bfloat16))
    assert layer(x.astype(jnp.float32)).dtype == jnp.bfloat16


@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_multiplies_bfloat16_forward_and_backward(bias):
    layer = linear(
        96, 48, (None, None), bias=bias, init_std=0.1, dtype="bfloat16", param_dtype="float32", rngs=nnx.Rngs(0)
    )
    x, dy = (jax.random.normal(jax.random.key(i), (2, 128, n), jnp.bfloat16) for i, n in enumerate((96, 48)))
    # As the products see it, so that nothing but their own roundings is left.
    layer.kernel[...] = layer.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    graphdef, state = nnx.split(layer)
    pull = jax.jit(lambda state, x, dy: jax.vjp(lambda s, x: nnx.merge(graphdef, s)(x), state, x)[1](dy))
    operands = re.findall(
        r"dot_general .*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", pull.lower(state, x, dy).as_text()
    )
    assert len(operands) >= 2
    assert set(operands) == {("bf16", "bf16")}
    dstate, dx = pull(state, x, dy)
    rows, cotangents, kernel = (
        np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x, dy, state["kernel"].get_value())
    )
    wanted = {"kernel": rows.T @ cotangents, "bias": cotangents.sum(0)}
    assert relative(dx.reshape(-1, 96), cotangents @ kernel.T) < 2e-3  # one rounding to 8 bits
    for name, param in dstate.items():
        assert relative(param.get_value(), wanted[name]) < (2e-3 if name == "kernel" else 1e-6), name
