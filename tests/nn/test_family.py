"""Every layer in a model: in pieces as in one, packed as alone, in a batch of different lengths, and differentiable."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.nn import DEFAULT_RULES, CausalLM, generate, read_prompt, stream
from gla_jax.nn.generate import _checked_start

from .family import CONFIGS, model_of
from .options import build, forward, lengths_as_ids, prefill, step, tokens

# A test of numbers alone runs on one model of each kind.
KINDS = sorted(
    CONFIGS.keys() - {"linear, normalised", "retention, no positions", "hgrn2, convolved", "window", "hybrid"}
)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def ratio(x, reference) -> float:
    x, reference = (np.asarray(a, np.float64) for a in (x, reference))
    return np.sqrt(np.mean((x - reference) ** 2) / np.mean(reference**2))


@pytest.mark.parametrize("name", CONFIGS)
def test_in_pieces_it_is_the_full_forward(name):
    # Bar 2's 2e-3 is flash-linear-attention's; in float32 every layer is far below it.
    model, inputs = build(CONFIGS[name]), tokens(2, 30)
    whole = forward(model, inputs)
    logits, cache = prefill(model, inputs[:, :9], model.init_cache(2))
    made = [logits]
    logits, cache = prefill(model, inputs[:, 9:18], cache)
    for t in range(18, 30):
        made.append(logits)
        logits, cache = step(model, inputs[:, t], cache)
    expected = jnp.concatenate([whole[:, 8:9], whole[:, 17:29]], 1)
    assert ratio(jnp.stack(made, 1), expected) < 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_different_lengths_in_one_batch(name):
    model, lengths = build(CONFIGS[name]), (3, 17, 1, 24)
    inputs, following = tokens(4, 24), tokens(4, 3, seed=1)
    logits, cache = prefill(model, inputs, model.init_cache(4), lengths_as_ids(lengths, 24, "right"))
    together = [logits]
    for t in range(3):
        logits, cache = step(model, following[:, t], cache)
        together.append(logits)
    rows = jnp.zeros((4, 27), jnp.int32)
    for row, length in enumerate(lengths):
        rows = rows.at[row, : length + 3].set(jnp.concatenate([inputs[row, -length:], following[row]]))
    alone = forward(model, rows)
    for row, length in enumerate(lengths):
        assert ratio(jnp.stack(together)[:, row], alone[row, length - 1 : length + 3]) < 2e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_documents_are_strangers(name):
    model, inputs = build(CONFIGS[name]), tokens(1, 24)
    ids = jnp.array([[-1] * 3 + [7] * 5 + [2] * 1 + [7] * 11 + [-1] * 4])
    packed = forward(model, inputs, ids)
    rows = jnp.zeros((3, 24), jnp.int32)
    for row, (start, stop) in enumerate(((3, 8), (8, 9), (9, 20))):
        rows = rows.at[row, : stop - start].set(inputs[0, start:stop])
    alone = forward(model, rows.at[2, 11].set(inputs[0, 0]))
    for row, (start, stop) in enumerate(((3, 8), (8, 9), (9, 20))):
        np.testing.assert_allclose(packed[0, start:stop], alone[row, : stop - start], **CLOSE)
    # The same in a prefill of two documents: the cache is the last one's.
    _, cache = prefill(model, inputs, model.init_cache(1), ids)
    logits, _ = step(model, inputs[:, 0], cache)
    np.testing.assert_allclose(logits[0], alone[2, 11], **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_has_a_gradient_that_is_finite(name):
    model, inputs = build(CONFIGS[name]), tokens(2, 12)
    graphdef, params = nnx.split(model)

    def loss(params):
        return jnp.mean(nnx.merge(graphdef, params)(inputs, jnp.array([[0] * 5 + [1] * 7] * 2)) ** 2)

    grads = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})(params)
    for path, grad in nnx.to_flat_state(grads):
        values = np.asarray(grad.get_value())
        assert np.isfinite(values).all(), path
        assert np.abs(values).max() > 0, path


@pytest.mark.parametrize("name", KINDS)
def test_low_precision_is_near_float32(name):
    inputs = tokens(2, 30)
    wide = forward(build(CONFIGS[name]), inputs)
    model = build(CONFIGS[name].replace(dtype="bfloat16"))
    low = forward(model, inputs)
    assert low.dtype == jnp.float32
    assert ratio(low, wide) < 8e-2  # numbers of three digits, rounded a few dozen times
    logits, cache = prefill(model, inputs[:, :20], model.init_cache(2))
    assert ratio(logits, low[:, 19]) < 4e-2
    after = step(model, inputs[:, 20], cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after[1]) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)


@pytest.mark.parametrize("name", KINDS)
def test_no_dtype_is_promoted_by_itself(name):
    attends = name in ("softmax", "hybrid, two")  # JAX's own attention masks bfloat16 with a float32
    config = CONFIGS[name].replace(dtype="float32" if attends else "bfloat16")
    model, inputs, ids = build(config), tokens(2, 6), jnp.array([[0, 0, 1, 1, 1, -1]] * 2)
    graphdef, params = nnx.split(model)

    def decode(params, cache):
        model = nnx.merge(graphdef, params)
        return model.step(inputs[:, 0], model.prefill(inputs, cache, ids)[1])

    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(jax.grad(lambda params: jnp.sum(nnx.merge(graphdef, params)(inputs, ids))), params)
        jax.eval_shape(decode, params, model.init_cache(2))


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("hybrid")])
def test_a_layer_alone_on_explicit_axes(name):
    mixer: Any = CONFIGS[name].mixer
    own = {"depth": 0.5, "lower_bound": np.zeros(32, np.float32)}.get(type(mixer).layer_input)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x = jax.ShapeDtypeStruct((2, 6, 32), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P("data")))
    with jax.set_mesh(mesh):
        y = jax.eval_shape(lambda x: mixer.build(32, rngs=nnx.Rngs(0))(x, None, own), x)
    assert y.sharding.spec == jax.P("data", None, None)


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_no_input(name):
    model = build(CONFIGS[name])
    with pytest.raises(ValueError, match=r"^x must have no empty axis, got shape \(2, 0, 32\)"):
        model(jnp.zeros((2, 0), jnp.int32))


@pytest.mark.parametrize("name", ["rwkv6", "mamba2, groups", "retention", "linear, normalised", "hybrid"])
def test_the_default_implementation_agrees(name):
    inputs, config = tokens(2, 40), CONFIGS[name]
    np.testing.assert_allclose(
        forward(build(config.replace(implementation=None)), inputs),
        forward(build(config), inputs),
        rtol=1e-3,
        atol=3e-4,
    )


def test_remat_and_unrolling_of_a_pattern_change_nothing():
    inputs = tokens(2, 12)

    def run(**changes):
        model = build(model_of("hybrid, two", num_layers=4, **changes))
        graphdef, params = nnx.split(model)
        loss = jax.value_and_grad(lambda params: jnp.mean(nnx.merge(graphdef, params)(inputs) ** 2))
        return jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})(params)

    value, grads = run()
    other, other_grads = run(remat="full", layer_unroll=2)
    np.testing.assert_allclose(other, value, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), other_grads, grads)


def test_layers_of_a_pattern_are_its_blocks_in_turn():
    model, inputs = build(CONFIGS["hybrid, two"]), tokens(2, 12)
    x = model.embed.embedding[...][inputs]
    for i in range(4):
        graphdef, params = nnx.split(model.layers[i % 2])
        x = nnx.merge(graphdef, jax.tree.map(lambda p, i=i: p[i // 2], params))(x)
    np.testing.assert_allclose(forward(model, inputs), model.logits(model.norm(x)), **CLOSE)


def test_generation_of_a_hybrid_with_a_padded_batch():
    model, prompt = build(CONFIGS["hybrid, two"]), tokens(3, 9)
    made = generate(model, prompt, 5, prompt_lengths=[2, 9, 5], prefill_chunk=4)
    for row, length in enumerate([2, 9, 5]):
        np.testing.assert_array_equal(made[row], generate(model, prompt[row : row + 1, -length:], 5)[0])


@pytest.mark.parametrize("piece", [1, 3, 5, 20])
def test_attention_past_its_cache_is_a_window_of_that_size_whatever_the_pieces(piece):
    # In compiled code, which cannot know how much the cache has seen.
    ring, inputs = small_cache("softmax", 5), tokens(2, 20)
    expected = forward(build(model_of("window")), inputs)[:, -1]
    cache = ring.init_cache(2)
    for t in range(0, 20, piece):
        part = inputs[:, t : t + piece]
        logits, cache = step(ring, part[:, 0], cache) if piece == 1 else prefill(ring, part, cache, 0 * part)
    np.testing.assert_allclose(logits, expected, **CLOSE)
    if piece == 1:
        assert ratio(forward(build(model_of("softmax")), inputs)[:, -1], logits) > 1e-2


def test_more_tokens_than_a_cache_without_a_window_are_refused():
    model, prompt = small_cache("softmax", 9), tokens(2, 6)
    says = "softmax attention without a window must have at most cache_size = 9 tokens, got"
    state = read_prompt(model, prompt)
    full = jax.tree_util.tree_map_with_path(lambda path, x: x + 3 * (path[-1].key == "position"), state.cache)
    _checked_start(model, prompt, None, 3, 1, 4)
    _checked_start(model, tokens(2, 20), [2, 6], 3, 1, 4)  # padding is no token
    layer, x = model.config.mixers[0].build(32, rngs=nnx.Rngs(0)), jnp.ones((1, 10, 32))
    for call, wrong in (
        (lambda: generate(model, prompt, 4), f"max_new_tokens: {says} 4 after 6"),
        (lambda: stream(model, state, 4), f"max_new_tokens: {says} 4 after 6"),
        (lambda: generate(model, prompt, 8, prompt_lengths=[1, 2]), f"max_new_tokens: {says} 8 after 2"),
        (lambda: read_prompt(model, tokens(1, 10)), f"prompt: {says} 10 after 0"),
        (lambda: read_prompt(model, tokens(2, 4), state=state), f"prompt: {says} 4 after 6"),
        (lambda: model.prefill(tokens(2, 4), state.cache), f"tokens: {says} 4 after 6"),
        (lambda: forward_after(model, tokens(1, 10)), f"tokens: {says} 10 after 0"),
        (lambda: model.step(prompt[:, 0], full), f"token: {says} 1 after 9"),
        (lambda: layer.prefill(x, layer.init_cache(1)), f"x: {says} 10 after 0"),
        (lambda: layer.step(x[:, 0], {**layer.init_cache(1), "position": jnp.array([9])}), f"x: {says} 1 after 9"),
    ):
        with pytest.raises(ValueError, match=r"^\w+: softmax attention") as error:
            call()
        assert str(error.value) == wrong
    # With a window nothing is lost, and a layer on the op has no bound.
    assert build(CONFIGS["hybrid"]).config.cache_limit is None
    assert CONFIGS["gla"].cache_limit is None


def small_cache(name: str, size: int) -> CausalLM:
    mixers = (m.replace(cache_size=size) if hasattr(m, "cache_size") else m for m in CONFIGS[name].mixers)
    return build(CONFIGS[name].replace(mixer=tuple(mixers)))


def forward_after(model, inputs):
    return jax.eval_shape(lambda x: model.hidden_after(x, model.init_cache(1)), inputs)


def test_a_bad_mixer_is_named():
    for changes, says in (
        ({"mixer": ()}, "mixer: must be a layer's config, or a tuple of them, got ()"),
        ({"num_layers": 3}, "mixer: a pattern of 4 layers must divide num_layers = 3"),
        ({"mlp": "moe"}, "mlp: must be one of swiglu, channel_mix, none, got 'moe'"),
        ({"norm": "batch"}, "norm: must be one of rms, layer, got 'batch'"),
    ):
        with pytest.raises(ValueError, match=r"^(mixer|mlp|norm): ") as error:
            CONFIGS["hybrid"].replace(**changes)
        assert str(error.value) == says


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("hgrn2", {"expand_ratio": 5}, "expand_ratio: must divide hidden_size = 32, got 5"),
        ("hgrn2", {"expand_ratio": 0}, "expand_ratio: must be at least 1, got 0"),
        ("mamba2", {"head_size": 5}, "head_size: must divide expand * hidden_size = 64, got 5"),
        ("mamba2", {"num_groups": 3}, "num_groups: must divide the heads, 4, got 3"),
        ("mamba2", {"time_step_max": 0.0}, "time_step_max: must be above time_step_min = 0.0 or None, got 0.0"),
        ("mamba", {"chunk": 0}, "chunk: must be at least 1, got 0"),
        ("softmax", {"num_heads": 3, "num_kv_heads": None}, "num_heads: must divide hidden_size = 32, got 3"),
        ("softmax", {"num_kv_heads": 3}, "num_kv_heads: must divide num_heads = 4, got 3"),
        ("softmax", {"head_size": 3}, "head_size: rotary embedding needs an even head width, got 3"),
        ("softmax", {"kernel": "flash"}, "kernel: must be one of None, xla, cudnn, got 'flash'"),
        ("window", {"window": 0}, "window: must be at least 1 or None, got 0"),
        ("retention", {"rope_theta": -1.0}, "rope_theta: must be positive or None, got -1.0"),
        ("retention", {"num_heads": 32}, "expand_k: rotary embedding needs an even head width, got 1"),
        ("rwkv6", {"num_heads": 5}, "expand_k: hidden_size * expand_k = 32 * 0.5 must be a multiple of num_heads = 5"),
        ("linear", {"feature_map": "cos"}, "feature_map: must be one of None, relu, "),
        ("lightning", {"num_heads": 5}, "num_heads: hidden_size * num_heads = 32 * 1.0 must be a multiple"),
    ],
)
def test_bad_options_are_named(name, changes, says):
    def make():
        config = CONFIGS[name].replace(mixer=CONFIGS[name].mixers[0].replace(**changes))
        nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))

    with pytest.raises(ValueError, match=r"^\w+: ") as error:
        make()
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    # A layer's variants, named after a comma, are only tried exhaustively.
    [pytest.param(name, marks=pytest.mark.exhaustive if "," in name else pytest.mark.large) for name in CONFIGS],
)
def test_a_quarter_of_2000_tokens_then_1500_single_steps(name):
    # flash-linear-attention's own generation test, with prompts of different lengths; its bound is 2e-3.
    config = CONFIGS[name].replace(implementation=None)
    wide = (m.replace(cache_size=2000) if hasattr(m, "cache_size") else m for m in config.mixers)
    model = build(config.replace(mixer=tuple(wide)))
    inputs, lengths = tokens(4, 2000), jnp.array([500, 432, 290, 1])
    position = jnp.arange(2000)[None]
    ids = jnp.where(position >= 500 - lengths[:, None], 0, -1)
    # Each row's tokens from its left end: causal, so that zeros at the right change nothing.
    whole = jnp.take_along_axis(inputs, jnp.minimum(position + 500 - lengths[:, None], 1999), 1)
    graphdef, params = nnx.split(model)

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        logits, cache = model.prefill(inputs[:, :500], model.init_cache(4), ids[:, :500])

        def step(cache, token):
            logits, cache = model.step(token, cache)
            return cache, logits

        _, rest = jax.lax.scan(step, cache, inputs[:, 500:].T)
        return jnp.concatenate([logits[:, None], jnp.moveaxis(rest, 0, 1)], 1), model(whole)

    made, full = run(params)
    expected = jnp.take_along_axis(full, (lengths[:, None] - 1 + jnp.arange(1501))[..., None], 1)
    worst = max(ratio(a, b) for a, b in zip(made, expected, strict=True))
    assert worst < 2e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_names_its_axes(name):
    model = nnx.eval_shape(lambda: CausalLM(CONFIGS[name], rngs=nnx.Rngs(0)))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        names = param.get_metadata()["out_sharding"]
        assert len(names) == len(param.shape), path
        assert set(names) <= {None, *DEFAULT_RULES}, path
        assert (names[0] == "layers") == (path[0] == "layers"), path
