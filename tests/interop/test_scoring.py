"""Scores against the softmax of a plain call, in batches of unequal rows, blocks and buckets."""

import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gla_jax.interop.harness import Harness, make_lm, run_tasks
from gla_jax.interop.scoring import continuation_likelihoods, perplexity_by_place, token_log_likelihoods
from gla_jax.nn import generate
from tests.nn.family import CONFIGS
from tests.nn.options import build, forward
from tests.nn.test_text import Bytes


@pytest.fixture(scope="module")
def model():
    return build(CONFIGS["gla"].replace(vocab_size=257))


def plainly(model, ids):
    """log p of each token but the first, and whether it is the argmax, from all logits at once in float64."""
    logits = np.asarray(forward(model, jnp.asarray([ids], jnp.int32))[0], np.float64)[:-1]
    logs = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    rows = np.arange(len(ids) - 1)
    return logs[rows, ids[1:]], logits.argmax(-1) == np.asarray(ids[1:])


def text(n, seed=0):
    return np.random.default_rng(seed).integers(0, 257, n).tolist()


@pytest.mark.parametrize("piece", [4, 7, 256])
def test_pieces_of_the_logits_change_nothing(model, piece):
    ids = text(20)
    scores, greedy = token_log_likelihoods(model, jnp.asarray([ids]), None, piece)
    want, want_greedy = plainly(model, ids)
    np.testing.assert_allclose(scores[0], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(greedy[0], want_greedy)


def test_continuations_of_unequal_lengths(model):
    pairs = [(text(a, a), text(b, 50 + b)) for a, b in ((5, 3), (1, 1), (20, 9), (2, 30), (7, 2))]
    found = continuation_likelihoods(model, pairs, batch_size=2)
    for (context, continuation), score in zip(pairs, found, strict=True):
        want, _ = plainly(model, context + continuation)
        assert score.log_likelihood == pytest.approx(want[len(context) - 1 :].sum(), rel=1e-4)
        assert not score.greedy
    likeliest = int(jnp.argmax(forward(model, jnp.asarray([pairs[0][0]]))[0, -1]))
    assert continuation_likelihoods(model, [(pairs[0][0], [likeliest])])[0].greedy
    with pytest.raises(ValueError, match=r"^pairs: contexts and continuations must have at least one token"):
        continuation_likelihoods(model, [([], [1])])


def test_perplexity_by_place(model):
    documents = [text(13), text(9, 1), text(11, 2)]
    joined = [token for document in documents for token in document]
    buckets = perplexity_by_place(model, documents, block=14, bucket=5)
    losses: dict[int, list[float]] = {}
    for begin in range(0, 33, 14):
        own, _ = plainly(model, joined[begin : begin + 14])
        for place, value in enumerate(own, 1):
            losses.setdefault(place // 5, []).append(-value)
    assert [(b.start, b.stop, b.tokens) for b in buckets] == [
        (0, 5, len(losses[0])),
        (5, 10, len(losses[1])),
        (10, 14, len(losses[2])),
    ]
    for i, bucket in enumerate(buckets):
        assert bucket.loss == pytest.approx(np.mean(losses[i]), rel=1e-4)
        assert bucket.perplexity == pytest.approx(math.exp(bucket.loss))
    with pytest.raises(ValueError, match=r"^documents: must have at least two tokens together, got 1"):
        perplexity_by_place(model, [[3]])
    with pytest.raises(ValueError, match=r"^block and bucket: must be at least 2 and 1"):
        perplexity_by_place(model, documents, block=1)


def request(*args):
    return SimpleNamespace(args=args)


def test_the_harness_s_questions(model):
    harness = Harness(model, Bytes(), 256, max_length=8, batch_size=3, max_new_tokens=6)
    ids = [256, *b"to be or not to be"]
    (score, greedy), (empty, _) = harness.loglikelihood([request("to be ", "or"), request("", "or")])
    want, _ = plainly(model, list(b"to be or")[-10:])
    assert score == pytest.approx(want[-3:].sum(), rel=1e-4)  # the space is the continuation's
    assert greedy in (True, False)
    assert empty == pytest.approx(plainly(model, [256, *b"or"])[0].sum(), rel=1e-4)
    (rolling,) = harness.loglikelihood_rolling([request("to be or not to be")])
    windows = [ids[begin - 1 : begin + 8] for begin in range(1, len(ids), 8)]
    assert rolling == pytest.approx(sum(plainly(model, window)[0].sum() for window in windows), rel=1e-4)
    (whole,) = harness.generate_until([request("to be", {})])
    (cut,) = harness.generate_until([request("to be", {"until": [whole[2]]})])
    assert cut == whole[: whole.index(whole[2])]


def test_generation_s_options_are_the_harness_s(model):
    harness = Harness(model, Bytes(), 256, max_length=8, batch_size=2, max_new_tokens=6)
    one = lambda context, **options: harness.generate_until([request(context, options)])[0]
    want = one("to be")
    assert one("to be", until=[""]) == one("to be", until="", top_k=0) == want != ""
    short = one("to be", max_gen_toks=2)
    assert one("to be", max_tokens=2) == short
    assert want.startswith(short.rstrip("�"))
    assert len(want) > len(short)
    assert one("to be", do_sample=False, temperature=0.7) == one("to be", temperature=5.0, top_k=1) == want
    drawn = {"do_sample": True, "temperature": 9.0}
    # Requests of different lengths and options, twice the same among them: each is answered as it would be alone.
    asked = [("to be", {}), ("or not", {"max_gen_toks": 2}), ("to be or not to be", {}), ("", {}), ("to be", drawn)]
    several = harness.generate_until([request(*args) for args in [*asked, ("to be", drawn)]])
    assert several[:4] == [one(context, **options) for context, options in asked[:4]]
    assert several[2] == one("ot to be")  # a context's end
    assert several[4] != several[5]
    assert several == harness.generate_until([request(*args) for args in [*asked, ("to be", drawn)]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_gen_toks": 0}, "max_gen_toks: must be at least 1, got 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: must be at least 1, got 1.5"),
        ({"until": [3]}, "until: must be a string or a list of strings, got [3]"),
        ({"beams": 3}, "generation_kwargs: must be of until, max_gen_toks, "),
        ({"num_beams": 2}, "num_beams: must be 1, got 2"),
        ({"do_sample": True}, "temperature: must be above 0 with do_sample, got None"),
        ({"do_sample": "yes"}, "do_sample: must be true or false, got 'yes'"),
        ({"temperature": -1}, "temperature: must be 0 (the likeliest token) or positive, got -1"),
        ({"temperature": "hot"}, "temperature: must be 0 (the likeliest token) or positive, got 'hot'"),
        ({"top_k": -1}, "top_k: must be at least 1 or None, got -1"),
        ({"top_p": 2.0}, "top_p: must be above 0 and at most 1, or None, got 2.0"),
    ],
)
def test_generation_s_bad_options_are_named(model, options, says):
    with pytest.raises(ValueError, match=r"^\w+: must be ") as error:
        Harness(model, Bytes(), 256).generate_until([request("to be", options)])
    assert str(error.value).startswith(says)


def test_a_context_leaves_room_in_the_cache_of_softmax_attention():
    config = CONFIGS["softmax"].replace(vocab_size=257, num_layers=1)
    config = config.replace(mixer=config.mixers[0].replace(cache_size=9))
    model = build(config)
    harness = Harness(model, Bytes(), 256, batch_size=1, max_new_tokens=4)
    (made,) = harness.generate_until([request("to be or not", {})])
    assert made == Bytes().decode(np.asarray(generate(model, jnp.asarray([list(b"r not")]), 4))[0].tolist())
    with pytest.raises(ValueError, match=r"^max_gen_toks: must be below the model's cache_size = 9, got 9$"):
        harness.generate_until([request("to be or not", {"max_gen_toks": 9})])
    with pytest.raises(ValueError, match=r"^max_length: must be at least 1, got 0$"):
        Harness(model, Bytes(), 256, max_length=0)


def test_lm_eval_takes_it(model):
    pytest.importorskip("lm_eval", reason="lm-eval (with its data set libraries) is not installed")
    from lm_eval.api.instance import Instance

    lm = make_lm(Harness(model, Bytes(), 256))
    asked = [Instance("loglikelihood", {}, ("to be ", "or"), 0)]
    assert lm.loglikelihood(asked) == Harness(model, Bytes(), 256).loglikelihood(asked)
    assert jax.tree.structure(lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("or",), 0)]))


TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{end}}}}"
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


def test_a_task_of_lm_eval_from_local_files(model, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval (with its data set libraries) is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    lines = [("to be ", "or"), ("not to", " be"), ("that", " is")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": a, "end": b}) + "\n" for a, b in lines))
    (tmp_path / "mine.yaml").write_text(TASK.format(file=tmp_path / "mine.jsonl"))
    found = run_tasks(Harness(model, Bytes(), 256), ["mine"], folder=tmp_path, limit=2)
    scores = [plainly(model, list((a + b).encode()))[0][-3:].sum() for a, b in lines[:2]]
    assert found["mine"]["perplexity,none"] == pytest.approx(math.exp(-np.mean(scores)), rel=1e-4)
    with pytest.raises(ValueError, match=r"^tasks: must be of lm-evaluation-harness or .*, got 'yours'$"):
        run_tasks(Harness(model, Bytes(), 256), ["yours"], folder=tmp_path)


def test_tokens_that_the_model_lacks_are_named(model):
    with pytest.raises(ValueError, match=r"^documents: tokens must be from 0 to 256, got 1 to 257$"):
        perplexity_by_place(model, [[1, 257]])
    with pytest.raises(ValueError, match=r"^pairs: tokens must be from 0 to 256, got -1 to 2$"):
        continuation_likelihoods(model, [([1], [2, -1])])
