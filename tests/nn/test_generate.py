import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.files import CheckpointError
from gla_jax.nn import GLAConfig, GLAForCausalLM, generate, load_state, read_prompt, save_state, stream
from gla_jax.nn.generate import _checked_start, _compiled, _generate, checked_draw, checked_stops, likeliest, sample
from gla_jax.nn.prompt import check_state

from .family import CONFIGS
from .options import OPTIONS, build, forward, tokens


@pytest.fixture(scope="module")
def model():
    return build(OPTIONS["conv"])


def greedily(model, prompt, new):
    """The argmax of the full forward, again and again; it sees zeros in place of the tokens to come."""
    b, t = prompt.shape
    row = jnp.zeros((b, 20), jnp.int32).at[:, :t].set(prompt)
    for i in range(t, t + new):
        row = row.at[:, i].set(jnp.argmax(forward(model, row)[:, i - 1], -1))
    return row[:, t : t + new]


def test_greedy_is_the_argmax_of_the_full_forward(model):
    prompt = tokens(2, 11)
    made = generate(model, prompt, 8)
    assert made.dtype == jnp.int32
    np.testing.assert_array_equal(made, greedily(model, prompt, 8))


@pytest.mark.parametrize("prefill_chunk", [1, 4, 11, 100])
def test_pieces_of_a_prompt_make_no_difference(model, prefill_chunk):
    prompt = tokens(2, 11)
    np.testing.assert_array_equal(generate(model, prompt, 4, prefill_chunk=prefill_chunk), greedily(model, prompt, 4))


@pytest.mark.parametrize("prefill_chunk", [4, 100])
def test_left_padding_never_enters(model, prefill_chunk):
    prompt, lengths = tokens(4, 11), [3, 11, 1, 6]
    padded = jnp.where(jnp.arange(11) < 11 - jnp.array(lengths)[:, None], -1, prompt)
    made = generate(model, padded, 5, prompt_lengths=lengths, prefill_chunk=prefill_chunk)
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(made[row], greedily(model, prompt[row : row + 1, -length:], 5)[0])


def test_samples_of_one_prompt_are_those_of_the_prompt_repeated(model):
    prompt = tokens(2, 11)
    draw = {"key": jax.random.key(5), "temperature": 1.2, "prompt_lengths": [4, 11]}
    made = generate(model, prompt, 6, num_samples=3, **draw)
    draw["prompt_lengths"] = [4, 4, 4, 11, 11, 11]
    np.testing.assert_array_equal(made, generate(model, jnp.repeat(prompt, 3, 0), 6, **draw))
    assert len({tuple(row) for row in np.asarray(made).tolist()}) > 2


@pytest.mark.parametrize("name", ["gla", "hybrid", "rwkv6"])
def test_a_prompt_s_state_can_be_kept_saved_and_gone_on_from(name, tmp_path):
    model, prompt = build(CONFIGS[name]), tokens(2, 11)
    state = read_prompt(model, prompt[:, :6], prefill_chunk=4)
    state = read_prompt(model, prompt[:, 6:], state=state)
    expected = generate(model, prompt, 5)
    np.testing.assert_array_equal(generate(model, state, 5), expected)
    save_state(tmp_path / "prompt.safetensors", state)
    loaded = load_state(tmp_path / "prompt.safetensors", model)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)
    np.testing.assert_array_equal(generate(model, loaded, 5), expected)
    np.testing.assert_array_equal(np.stack(list(stream(model, loaded, 5)), 1), expected)
    np.testing.assert_array_equal(generate(model, loaded, 5), expected)
    with pytest.raises(
        ValueError, match=r"^prompt_lengths: must be None with a state, which has read its prompts, got"
    ):
        generate(model, state, 5, prompt_lengths=[1, 1])
    with pytest.raises(CheckpointError, match=r": cache\.\S+ is .* there, and .* in this model$"):
        load_state(tmp_path / "prompt.safetensors", build(CONFIGS["gla"].replace(num_layers=3)))


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}])
def test_stream_yields_what_generate_returns(model, draw):
    prompt = tokens(2, 11)
    draw = {**draw, "key": jax.random.key(3)} if draw else draw
    streamed = list(stream(model, prompt, 7, **draw))
    assert all(token.shape == (2,) for token in streamed)
    np.testing.assert_array_equal(np.stack(streamed, 1), generate(model, prompt, 7, **draw))


def test_stop_tokens_end_rows(model):
    prompt = tokens(3, 11)
    free = np.asarray(generate(model, prompt, 12))
    stops = (int(free[0, 2]), int(free[1, 5]))
    made = np.asarray(generate(model, prompt, 12, stop_tokens=stops))
    ends = []
    for row in range(3):
        hits = np.flatnonzero(np.isin(free[row], stops))
        end = hits[0] if hits.size else 11
        ends.append(end)
        np.testing.assert_array_equal(made[row, : end + 1], free[row, : end + 1])
        assert (made[row, end:] == made[row, end]).all()
    streamed = np.stack(list(stream(model, prompt, 12, stop_tokens=stops)), 1)
    assert streamed.shape[1] == max(ends) + 1
    np.testing.assert_array_equal(streamed, made[:, : streamed.shape[1]])


def test_sampling_needs_a_key_and_repeats_with_it(model):
    prompt = tokens(4, 5)
    a, b, c = (generate(model, prompt, 9, key=jax.random.key(s), temperature=1.5) for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_temperature_near_zero_is_greedy(model):
    prompt = tokens(2, 5)
    made = generate(model, prompt, 4, key=jax.random.key(0), temperature=1e-7)
    np.testing.assert_array_equal(made, greedily(model, prompt, 4))


def frequencies(logits, **draw):
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: sample(logits[None], key, **draw)[0])(keys)
    return np.bincount(drawn, minlength=logits.size) / 4000


def test_sample_draws_from_the_distribution_it_says():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.3, 0.15]))
    close = {"atol": 0.03}
    np.testing.assert_allclose(frequencies(logits, temperature=1.0), np.exp(logits), **close)
    np.testing.assert_allclose(
        frequencies(logits, temperature=0.5), np.exp(2 * logits) / np.exp(2 * logits).sum(), **close
    )
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_k=2), [0, 4 / 7, 0, 3 / 7, 0], **close)
    np.testing.assert_allclose(
        frequencies(logits, temperature=1.0, top_p=0.71), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], **close
    )
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_p=1e-6), [0, 1, 0, 0, 0])
    # top_p is of what top_k has left: 4/7 already reaches one half.
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_k=2, top_p=0.5), [0, 1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(logits, temperature=1.0, top_k=99, top_p=1.0), np.exp(logits), **close)


def in_order(row, top_p, top_k):
    """The tokens that are kept, by numpy in float64."""
    order = np.argsort(-row, kind="stable")[:top_k]
    if top_p is None:
        return order
    probability = np.exp(row[order] - row.max())
    before = np.concatenate([[0], np.cumsum(probability / probability.sum())[:-1]])
    return order[before < top_p]


@pytest.mark.parametrize("top_k", [None, 1, 3, 7, 99])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.35, 0.8, 1.0])
def test_ties_at_the_edge_are_cut_in_the_order_of_tokens(top_k, top_p):
    # One of three values each: every edge lies within a tie.
    logits = np.random.default_rng(0).integers(0, 3, (20, 40)).astype(np.float32)
    tokens, left = map(np.asarray, likeliest(jnp.asarray(logits), top_p, top_k))
    for row, own, values in zip(logits.astype(np.float64), tokens, left, strict=True):
        want = in_order(row, top_p, top_k)
        np.testing.assert_array_equal(own[np.isfinite(values)], want)
        np.testing.assert_array_equal(values[: len(want)], row[want])
        assert top_p is not None or len(want) == min(top_k or 40, 40)


def test_draws_stay_within_a_cut_tie():
    tied = jnp.zeros((5,))
    close = {"atol": 0.03}
    np.testing.assert_allclose(frequencies(tied, temperature=1.0, top_k=2), [0.5, 0.5, 0, 0, 0], **close)
    np.testing.assert_allclose(frequencies(tied, temperature=1.0, top_p=0.5), [1 / 3] * 3 + [0, 0], **close)


def test_memory_does_not_depend_on_lengths():
    config = GLAConfig.tiny().replace(layer_unroll=1)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: GLAForCausalLM(config, rngs=nnx.Rngs(0))))

    def temporaries(prompt: int, new: int) -> int:
        from gla_jax.nn.generate import _Draw, _How

        shape = jax.ShapeDtypeStruct((1, prompt), jnp.int32)
        program = _compiled(_generate, static=(0, 5, 6))
        lowered = program.lower(graphdef, params, shape, None, _Draw(None, None, None), new, _How(None, (), 1, 128))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    short, long = temporaries(256, 16), temporaries(256 * 64, 16 * 64)
    tokens_alone = 16 * 4 * (256 * 64 + 16 * 64)  # a few int32 copies of the tokens themselves
    assert long < short + tokens_alone


@pytest.mark.large
def test_2000_tokens_after_1000_are_the_full_forward_s_argmax():
    model = GLAForCausalLM(GLAConfig.tiny(), rngs=nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(0), (1, 1000), 0, 256)
    made = generate(model, prompt, 2000, prefill_chunk=512)
    logits = nnx.jit(lambda m, x: m(x))(model, jnp.concatenate([prompt, made], 1))[0, 999:-1]
    chosen = jnp.take_along_axis(logits, made[0][:, None], 1)[:, 0]
    # Where two logits are closer than rounding, either may be chosen.
    assert (logits.max(-1) - chosen < 1e-4).all()
    assert (jnp.argmax(logits, -1) == made[0]).mean() > 0.99


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": jnp.zeros((3,), jnp.int32)}, "prompt: must be integers [b, t], b and t >= 1, got int32 [3]"),
        ({"prompt": jnp.zeros((1, 3))}, "prompt: must be integers [b, t], b and t >= 1, got float32 [1, 3]"),
        ({"prompt": jnp.zeros((1, 0), jnp.int32)}, "prompt: must be"),
        ({"prompt": jnp.array([[1, 37]])}, "prompt: tokens must be from 0 to 36, got 1 to 37"),
        ({"prompt": np.array([[1, 2**40]])}, "prompt: tokens must be from 0 to 36, got 1 to 1099511627776"),
        ({"prompt": jnp.array([[-1, 3]]), "prompt_lengths": [2]}, "prompt: tokens must be from 0 to 36, got -1 to 3"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk: must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature: must be 0 (the likeliest token) or positive, got -1.0"),
        ({"temperature": float("nan")}, "temperature: must be"),
        ({"temperature": 1.0}, "key: a temperature above 0 needs a jax.random.key"),
        ({"top_k": 0}, "top_k: must be at least 1 or None, got 0"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1, or None, got 0.0"),
        ({"top_p": 1.5}, "top_p: must be"),
        ({"prompt_lengths": [4, 3]}, "prompt_lengths: must have shape [b] = [1], got [2]"),
        ({"prompt_lengths": [0]}, "prompt_lengths: must be from 1 to t = 4, got [0]"),
        ({"prompt_lengths": [5]}, "prompt_lengths: must be from 1 to t = 4, got [5]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_arguments_are_named(model, function, arguments, says):
    arguments = {"prompt": tokens(1, 4), "max_new_tokens": 3, **arguments}
    with pytest.raises(ValueError) as error:  # noqa: PT011  the text is compared below
        function(model, **arguments)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: _checked_start(None, [[1]], None, 2.5, 1, 8), "max_new_tokens: must be at least 1, got 2.5"),
        (lambda: _checked_start(None, [[1]], None, True, 1, 8), "max_new_tokens: must be at least 1, got True"),
        (lambda: _checked_start(None, [[1]], None, 1, 1, "8"), "prefill_chunk: must be at least 1, got '8'"),
        (lambda: _checked_start(None, [[1]], [1.0], 1, 1, 8), "prompt_lengths: must be integers, got float32"),
        (lambda: _checked_start(None, [[1]], None, 1, 0, 8), "num_samples: must be at least 1, got 0"),
        (lambda: checked_draw(None, "hot", None, None), "temperature: must be 0 (the likeliest token) or positive"),
        (lambda: checked_draw(None, np.inf, None, None), "temperature: must be 0 (the likeliest token) or positive"),
        (lambda: checked_draw(None, 1.0, 1.5, None), "key: a temperature above 0 needs"),
        (lambda: checked_draw(0, 1.0, 1.5, None), "top_k: must be at least 1 or None, got 1.5"),
        (lambda: checked_draw(0, 1.0, None, None), "key: must be a jax.random.key, got 0"),
        (lambda: checked_draw(jnp.int32(0), 1.0, None, None), "key: must be a jax.random.key, got int32 []"),
        (
            lambda: checked_draw(jax.random.split(jax.random.key(0)), 1.0, None, None),
            "key: must be a jax.random.key, got key<",
        ),
        (
            lambda: _checked_start(None, [[1, 2], [3]], None, 1, 1, 8),
            "prompt: must be an array of integers [b, t], got",
        ),
        (
            lambda: _checked_start(None, "To be", None, 1, 1, 8),
            "prompt: must be an array of integers [b, t], got",
        ),
        (
            lambda: _checked_start(None, [[1]], "a", 1, 1, 8),
            "prompt_lengths: must be an array of integers",
        ),
        (lambda: check_state("state", None, 3), "state: must be a PromptState, got int"),
        (lambda: checked_draw(0, 1.0, None, "0.9"), "top_p: must be above 0 and at most 1, or None, got '0.9'"),
        (lambda: checked_stops(7), "stop_tokens: must be a sequence of integers, got 7"),
        (lambda: checked_stops(("a",)), "stop_tokens: must be a sequence of integers, got ('a',)"),
        (lambda: checked_stops([0.5]), "stop_tokens: must be a sequence of integers, got [0.5]"),
    ],
)
def test_wrong_types_are_named(call, says):
    # The checks by themselves: while tests run, beartype would refuse most of these values at `generate` first.
    with pytest.raises(ValueError, match="^" + re.escape(says)) as error:
        call()
    assert "\n" not in str(error.value)


def test_a_state_of_another_model_is_refused():
    def state(config):
        return jax.eval_shape(lambda model: read_prompt(model, jnp.zeros((1, 2), jnp.int32)), build(config))

    config = OPTIONS["plain"]
    own = build(config)
    for other in (config.replace(num_layers=config.num_layers + 1), config.replace(vocab_size=config.vocab_size + 1)):
        for call in (generate, stream):
            with pytest.raises(ValueError, match=r"^prompt: must be a state of this model, whose "):
                call(own, state(other), 3)
        with pytest.raises(ValueError, match=r"^state: must be a state of this model, whose "):
            read_prompt(own, jnp.zeros((1, 2), jnp.int32), state=state(other))
