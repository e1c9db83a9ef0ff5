import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.nn import GLAConfig, GLAForCausalLM

from .options import OPTIONS, SMALL, build, forward, lengths_as_ids, prefill, step, tokens

CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.mark.parametrize("option", OPTIONS)
def test_prefill_then_steps_is_the_full_forward(option):
    config = OPTIONS[option]
    if option in ("plain", "one kv head", "strong gates"):
        config = config.replace(implementation=None)
    model, inputs = build(config), tokens(2, 22)
    expected = forward(model, inputs)
    assert expected.dtype == jnp.float32
    logits, cache = prefill(model, inputs[:, :9], model.init_cache(2))
    np.testing.assert_allclose(logits, expected[:, 8], **CLOSE)
    logits, cache = prefill(model, inputs[:, 9:18], cache)
    np.testing.assert_allclose(logits, expected[:, 17], **CLOSE)
    for t in range(18, 22):
        logits, cache = step(model, inputs[:, t], cache)
        np.testing.assert_allclose(logits, expected[:, t], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("option", ["conv", "one kv head"])
def test_prompts_of_different_lengths_in_one_batch(option, side):
    model, lengths = build(OPTIONS[option].replace(implementation=None)), (3, 17, 1, 24)
    inputs, following = tokens(4, 24), tokens(4, 3, seed=1)
    ids = lengths_as_ids(lengths, 24, side)
    logits, cache = prefill(model, inputs, model.init_cache(4), ids)
    together = [logits]
    for t in range(3):
        logits, cache = step(model, following[:, t], cache)
        together.append(logits)
    for row, length in enumerate(lengths):
        own = inputs[row, -length:] if side == "right" else inputs[row, :length]
        # Tokens after those asked for change nothing, and keep the shapes equal.
        whole = jnp.zeros(27, jnp.int32).at[: length + 3].set(jnp.concatenate([own, following[row]]))
        alone = forward(model, whole[None])[0, length - 1 : length + 3]
        np.testing.assert_allclose(jnp.stack(together)[:, row], alone, **CLOSE)


def test_a_second_turn_may_be_padded_anywhere():
    model, first = build(OPTIONS["conv"]), tokens(2, 10)
    _, cache = prefill(model, first, model.init_cache(2))
    second = tokens(2, 6, seed=1)
    logits, _ = prefill(model, second, cache, jnp.array([[-1, -1, 0, -1, 0, 0], [-1] * 6]))
    whole = jnp.concatenate([first[0], second[0, jnp.array([2, 4, 5])]])
    np.testing.assert_allclose(logits[0], model(whole[None])[0, -1], **CLOSE)
    # The row of padding goes on as if nothing had happened.
    _, after = prefill(model, second, cache, jnp.full((2, 6), -1))
    jax.tree.map(np.testing.assert_array_equal, after, cache)


@pytest.mark.parametrize("option", ["plain", "conv", "grouped"])
def test_packing_and_padding_change_nothing(option):
    model, inputs = build(OPTIONS[option]), tokens(1, 24)
    ids = jnp.array([[-1] * 3 + [7] * 5 + [2] * 1 + [7] * 11 + [-1] * 4])
    packed = forward(model, inputs, ids)
    for start, stop in ((3, 8), (8, 9), (9, 20)):
        alone = jnp.zeros_like(inputs).at[:, : stop - start].set(inputs[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], forward(model, alone)[:, : stop - start], **CLOSE)
    other_padding = jnp.where(ids < 0, (inputs + 1) % 37, inputs)
    np.testing.assert_array_equal(forward(model, other_padding, ids)[ids >= 0], packed[ids >= 0])


def test_gradients_do_not_cross_documents():
    model, inputs = build(OPTIONS["conv"]), tokens(1, 12)
    ids = jnp.array([[0] * 5 + [1] * 7])

    @nnx.jit
    @nnx.grad
    def of_second(model):
        return model(inputs, ids)[:, 5:].sum()

    first_only = jnp.setdiff1d(inputs[0, :5], inputs[0, 5:])
    assert first_only.size
    assert not of_second(model).embed.embedding[...][first_only].any()


@functools.cache
def loss_and_grads(config):
    return nnx.jit(nnx.value_and_grad(lambda model: jnp.mean(model(tokens(2, 16)) ** 2)))(build(config))


@pytest.mark.parametrize("changes", [{"remat": "full"}, {"remat": "dots"}, {"layer_unroll": 9}])
def test_remat_and_unrolling_change_nothing(changes):
    expected, expected_grads = loss_and_grads(OPTIONS["conv"])
    value, grads = loss_and_grads(OPTIONS["conv"].replace(**changes))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), grads, expected_grads)


def test_remat_saves_less():
    def saved(remat: str) -> int:
        model = build(SMALL.replace(num_layers=6, remat=remat))
        graphdef, params = nnx.split(model)
        step = jax.jit(jax.grad(lambda p: jnp.mean(nnx.merge(graphdef, p)(tokens(4, 64)) ** 2)))
        return step.lower(params).compile().memory_analysis().temp_size_in_bytes

    assert saved("full") < saved("dots") < saved("none")


def test_scanned_layers_equal_layers_one_by_one():
    model, inputs = build(OPTIONS["conv"]), tokens(2, 16)
    graphdef, params = nnx.split(model.layers)
    x = model.embed.embedding[...][inputs]
    for i in range(model.config.num_layers):
        x = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i], params))(x)
    np.testing.assert_allclose(model(inputs), model.logits(model.norm(x)), **CLOSE)


def test_layers_start_different():
    kernel = GLAForCausalLM(SMALL, rngs=nnx.Rngs(0)).layers.mixer.q_proj.kernel
    assert not np.array_equal(kernel[0], kernel[1])
    assert abs(jnp.std(kernel[...]) - SMALL.init_std) < 0.02


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_program_does_not_grow_with_depth(remat):
    def size(layers: int) -> int:
        config = GLAConfig.tiny().replace(num_layers=layers, remat=remat, layer_unroll=1)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: GLAForCausalLM(config, rngs=nnx.Rngs(0))))
        step = jax.jit(jax.grad(lambda p, inputs: jnp.mean(nnx.merge(graphdef, p)(inputs))))
        lowered = step.lower(params, jax.ShapeDtypeStruct((2, 64), jnp.int32))
        return len(lowered.as_text().splitlines())

    assert size(12) == size(2)


def test_low_precision_models():
    wide = build(SMALL)
    inputs = tokens(2, 40)
    expected = wide(inputs)
    for dtype, param_dtype, tolerance in (
        ("bfloat16", "float32", 4e-2),
        ("bfloat16", "bfloat16", 4e-2),
        ("float16", "float32", 5e-3),
    ):
        model = build(SMALL.replace(dtype=dtype, param_dtype=param_dtype))
        logits = forward(model, inputs)
        assert logits.dtype == jnp.float32
        assert jnp.sqrt(jnp.mean((logits - expected) ** 2) / jnp.mean(expected**2)) < tolerance
    last, _ = prefill(model, inputs, model.init_cache(2))
    assert jnp.sqrt(jnp.mean((last - logits[:, -1]) ** 2) / jnp.mean(expected**2)) < tolerance


def test_the_cache_is_plain_and_constant():
    model = build(OPTIONS["conv"])
    cache = model.init_cache(3)
    shapes = jax.tree.map(jnp.shape, cache)
    assert shapes == {
        "state": (2, 3, 4, 4, 8),
        "q_conv": (2, 3, 3, 16),
        "k_conv": (2, 3, 3, 16),
        "v_conv": (2, 3, 3, 32),
    }
    for length in (1, 30):
        assert jax.tree.map(jnp.shape, prefill(model, tokens(3, length), cache)[1]) == shapes


def test_a_step_is_in_place():
    model = build(SMALL.replace(num_layers=8, expand_k=2.0, expand_v=4.0))
    graphdef, params = nnx.split(model)
    cache = jax.eval_shape(lambda: model.init_cache(16))
    one = jax.jit(lambda p, t, c: nnx.merge(graphdef, p).step(t, c), donate_argnums=2)
    memory = one.lower(params, jax.ShapeDtypeStruct((16,), jnp.int32), cache).compile().memory_analysis()
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size / 2


def test_tied_embeddings_share_one_array():
    tied, untied = (GLAForCausalLM(SMALL.replace(tie_embeddings=t), rngs=nnx.Rngs(0)) for t in (True, False))
    assert tied.lm_head is None
    h = jax.random.normal(jax.random.key(0), (3, 32))
    np.testing.assert_allclose(tied.logits(h), h @ tied.embed.embedding[...].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(untied.logits(h), h @ untied.lm_head.kernel[...], rtol=1e-4, atol=1e-5)


def test_hidden_then_logits_is_the_call():
    model, inputs = build(SMALL), tokens(2, 8)
    np.testing.assert_array_equal(model.logits(model.hidden(inputs)), model(inputs))
