import re

import pytest
from flax import nnx

from gla_jax import cli
from gla_jax.interop import load_pretrained, perplexity_by_place
from gla_jax.nn import CausalLM, CausalLMConfig
from gla_jax.train.corpus import DOCUMENT
from gla_jax.train.sampling import run_tokenizer, tokens_of

SMALL = [
    *("--batch=8", "--length=32", "--steps=3", "--eval-every=3", "--sample=8"),
    *("--model.hidden-size=32", "--model.num-layers=1", "--model.num-heads=1", "--model.mlp-size=32"),
]


def test_train_then_sample(tmp_path, capsys):
    text, run = tmp_path / "a.txt", tmp_path / "run"
    text.write_text("what is past is prologue. " * 50)
    assert cli.main(["train", f"--run={run}", f"--data={text}", *SMALL]) == 0
    out = capsys.readouterr().out
    for line in ("loss of the last step: ", "held-out text: ", "sample:", f"settings, log and checkpoints: {run}"):
        assert f"\n{line}" in out
    assert cli.main(["sample", str(run), "what is", "--length=8", "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("what is")
    # The same folder for another run.
    assert cli.main(["train", f"--run={run}", f"--data={text}", *SMALL, "--seed=1"]) == 2
    captured = capsys.readouterr()
    assert captured.err == (
        f"gla-jax: argument --run: {run} holds a run with other settings: --seed (0 there, 1 here); "
        "give the same settings to go on with it, or another --run\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "/nothing"], "argument --data: /nothing does not exist; give a text or .jsonl file"),
        (
            ["train", "--model.mixer=retnet", "--model.mixer.num-heads=3"],
            "argument --model.mixer: expand_k: hidden_size * expand_k = 128 * 1.0 must be a multiple of num_heads = 3",
        ),
        (["sample", "/nothing"], "argument RUN: /nothing has no config.json; give a folder that `gla-jax train` made"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"gla-jax: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--steps=0"], "argument --steps: must be at least 1, got 0"),
        (["train", "--steps=many"], "--steps"),
        (["train", "--optimizer=sgd"], "--optimizer"),
        (["train", "--model.dtype=float8"], "dtype: must be one of float32"),
        (["dance"], "dance"),
    ],
)
def test_flags_are_checked(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert "`gla-jax train` goes on from the last checkpoint" in capsys.readouterr().err


def test_sample_names_the_flag_that_is_out_of_range(capsys):
    assert cli.main(["sample", "nowhere", "To be", "--length", "0"]) == 2
    assert capsys.readouterr().err == "gla-jax: argument --length: must be at least 1, got 0\n"


def test_a_run_is_converted_and_both_score_the_same(tmp_path, capsys):
    pytest.importorskip("tokenizers", reason="the extra gla_jax[hub] is not installed")
    text, run, there = tmp_path / "a.txt", tmp_path / "run", tmp_path / "there"
    text.write_text("what is past is prologue. " * 50)
    assert cli.main(["train", f"--run={run}", f"--data={text}", *SMALL]) == 0
    assert cli.main(["convert", str(run), str(there)]) == 0
    assert (there / "model.safetensors").exists()
    capsys.readouterr()
    scores = ["--text", str(text), "--block=256", "--bucket=100"]
    assert cli.main(["eval", str(run), *scores]) == 0
    ours = capsys.readouterr().out
    assert [line.split(":")[0] for line in ours.splitlines()] == [
        "places 0 to 99",
        "places 100 to 199",
        "places 200 to 255",
    ]
    tokens = [255, *text.read_bytes()]
    (first, *_) = perplexity_by_place(load_pretrained(there), [tokens], block=256, bucket=100)
    printed = re.match(r"places 0 to 99: perplexity ([0-9.]+),", ours)
    assert printed
    assert float(printed[1]) == pytest.approx(first.perplexity, abs=1e-3)
    assert cli.main(["eval", str(there), *scores]) == 0
    assert capsys.readouterr().out == ours
    again = tmp_path / "again"
    assert cli.main(["convert", str(there), str(again), "--dtype=bfloat16"]) == 0
    assert (again / "model.safetensors").stat().st_size < 0.6 * (there / "model.safetensors").stat().st_size
    assert '"eos_token_id": 255' in (again / "config.json").read_text()
    capsys.readouterr()
    assert cli.main(["convert", str(there), str(again)]) == 2
    assert capsys.readouterr().err == f"gla-jax: argument TARGET: {again} must be a new or empty folder\n"


def test_values_that_only_the_library_can_judge_name_the_flag(tmp_path, capsys, monkeypatch):
    model = CausalLM(CausalLMConfig.tiny("attention").replace(num_layers=1, layer_unroll=1), rngs=nnx.Rngs(0))
    monkeypatch.setattr(cli, "load_model", lambda run: model)
    assert cli.main(["sample", str(tmp_path), "To be", "--length=2048"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(
        "gla-jax: argument --length: max_new_tokens: softmax attention without a window must"
    )
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "argument --text or --tasks: give one of them, got neither"),
        (["eval", "nowhere", "--tasks=a", "--limit=0"], "argument --limit: must be at least 1, got 0"),
        (["eval", "nowhere", "--text=a", "--block=1"], "argument --block: must be at least 2, got 1"),
        (["eval", "nowhere", "--text=a"], "nowhere/config.json: no such file"),
        (["convert", "nowhere", "there"], "nowhere/config.json: no such file"),
    ],
)
def test_errors_of_convert_and_eval_are_one_line(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == f"gla-jax: {message}\n"


def test_a_run_is_scored_by_the_tokenizer_that_it_was_trained_with(tmp_path):
    assert tokens_of(run_tokenizer(tmp_path))[1] == DOCUMENT
    tokenizers = pytest.importorskip("tokenizers", reason="the extra gla_jax[hub] is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"be": 0, "or": 1, "<s>": 2}, unk_token="<s>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer, end = tokens_of(run_tokenizer(tmp_path))
    assert tokenizer.encode("be or be").ids == [0, 1, 0]
    assert tokenizer.decode([0, 1]) == "be or"
    assert end == 3
