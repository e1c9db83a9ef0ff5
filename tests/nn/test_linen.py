"""A Linen user's view of the modules, through flax.nnx.bridge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from gla_jax.nn import DEFAULT_RULES, GatedLinearAttention, GLAForCausalLM

from .options import OPTIONS, build, tokens


class Classifier(nn.Module):
    """A Linen model with a gated linear attention layer inside."""

    classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = x + nnx.bridge.to_linen(GatedLinearAttention, 16, num_heads=2, conv_size=3, name="gla")(x)
        return nn.Dense(self.classes)(x.mean(1))


def test_a_layer_inside_a_linen_model_trains():
    model = Classifier(classes=3)
    x, labels = jax.random.normal(jax.random.key(0), (12, 10, 5)), jnp.arange(12) % 3
    variables = nn.meta.unbox(model.init(jax.random.key(1), x))
    assert variables["params"]["gla"]["q_proj"]["kernel"].shape == (16, 8)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, moments):
        def loss(params):
            return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), labels).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, updates), moments, value, grads

    params, moments = variables["params"], optimizer.init(variables["params"])
    params, moments, before, grads = update(params, moments)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    for _ in range(30):
        params, moments, after, _ = update(params, moments)
    assert after < 0.5 * before


def test_the_language_model_is_the_same_function():
    config = OPTIONS["conv"]
    model, linen = build(config), nnx.bridge.to_linen(GLAForCausalLM, config)
    variables = {"params": nnx.to_pure_dict(nnx.state(model))}
    inputs = tokens(2, 12)
    np.testing.assert_allclose(jax.jit(linen.apply)(variables, inputs), model(inputs), rtol=1e-4, atol=1e-5)
    # Other methods, by nnx_method: prefill, then a step.
    cache = linen.apply(variables, 2, nnx_method=GLAForCausalLM.init_cache)
    _, cache = linen.apply(variables, inputs[:, :-1], cache, nnx_method=GLAForCausalLM.prefill)
    logits, _ = linen.apply(variables, inputs[:, -1], cache, nnx_method=GLAForCausalLM.step)
    np.testing.assert_allclose(logits, model(inputs)[:, -1], rtol=1e-3, atol=1e-4)


def test_initial_values_have_the_same_tree_and_names():
    config = OPTIONS["grouped"]
    linen = nnx.bridge.to_linen(GLAForCausalLM, config)
    variables = jax.jit(linen.init)(jax.random.key(0), tokens(1, 4))
    model = nnx.to_pure_dict(nnx.state(GLAForCausalLM(config, rngs=nnx.Rngs(0))))
    shapes = jax.tree.map(jnp.shape, nn.meta.unbox(variables["params"]))
    assert shapes == jax.tree.map(jnp.shape, model)
    specs = nn.get_partition_spec(variables)["params"]
    assert specs["layers"]["mlp"]["up_proj"]["kernel"] == jax.P("layers", "embed", "mlp")
    on_mesh = nn.logical_to_mesh(specs, rules=tuple(DEFAULT_RULES.items()))
    assert on_mesh["layers"]["mlp"]["up_proj"]["kernel"] == jax.P(None, "fsdp", "tensor")


def test_gradients_through_the_boxes():
    config = OPTIONS["plain"]
    linen = nnx.bridge.to_linen(GLAForCausalLM, config)
    variables = linen.init(jax.random.key(0), tokens(1, 4))
    grads = jax.grad(lambda v: linen.apply(v, tokens(1, 4)).std())(variables)
    assert jax.tree.structure(grads) == jax.tree.structure(variables)
