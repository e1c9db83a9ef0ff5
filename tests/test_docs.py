"""Every Python block of the README and the docs runs, each page's blocks one after another."""

import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import extrapolation, ladder, lengths, mqar, op, plots, processes, small_runs, tables
from gla_jax import cli, nn
from gla_jax.nn.config import ModelConfig
from gla_jax.nn.recurrent import MixerConfig
from tests.test_api import on_the_page
from tools import layers_table

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))  # whose text is comments
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(BLOCK.findall(page.read_text()))
    exec(compile(code, str(page), "exec"), {})


def broken_links(page):
    """The relative links, on a page as it lies in the repository, to no file or to no heading of a page."""
    for link in LINK.findall(CODE.sub("", page.read_text())):
        path, _, heading = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (heading and heading not in headings(target)):
            yield link


def headings(page):
    """The anchors that a page's headings have, on GitHub as on the site."""
    lines = re.findall(r"^#+ (.+)$", CODE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_relative_links_lead_somewhere_in_the_repository(page):
    assert list(broken_links(page)) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# What it's for\n")
    page.write_text(
        "# Here\n[1](other.md#what-its-for) [2](#here) [3](https://a.b) ![4](other.md) `[5](none.md)`\n"
        "```text\n[6](none.md)\n```\n[7](none.md), [8](other.md#what), [9](#there), ![10](none.svg), [11](../none)\n"
    )
    assert list(broken_links(page)) == ["none.md", "other.md#what", "#there", "none.svg", "../none"]


@pytest.mark.parametrize("name", tables.PAGES)
def test_tables_are_those_of_the_results(name):
    page = (ROOT / name).read_text()
    assert "made by benchmarks/tables.py" in page
    assert tables.with_tables(page) == page


def test_every_table_is_on_its_pages():
    found = {
        name: [page for page in tables.PAGES if f"<!-- {name}, made by" in (ROOT / page).read_text()]
        for name in tables.TABLES
    }
    assert found["op timings"] == found["peers"] == ["README.md", "docs/performance.md"]
    assert found["training speed"] == ["README.md"]
    assert all(found.values()), found


@pytest.mark.parametrize(
    "page", ["<!-- peers, made by benchmarks/tables.py -->\n<!-- end of pears -->", "<!-- end of peers -->"]
)
def test_a_table_without_both_marks_is_an_error(page):
    with pytest.raises(ValueError, match="pairs"):
        tables.with_tables(page)


def test_every_record_says_what_was_measured_where_and_when():
    for path in tables.RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        assert {"what", "command", "date", "device"} <= set(record), path
        assert shlex.split(record["command"]), path


def test_every_record_is_in_a_table_or_named_on_a_page(monkeypatch):
    shown, records = set(), tables.records

    def noted(what):
        found = records(what)
        shown.update(name for name, _ in found)
        return found

    monkeypatch.setattr(tables, "records", noted)
    pages = "".join(page.read_text() for page in PAGES)
    tables.with_tables(pages)
    names = {path.stem for path in tables.RESULTS.glob("*.json")}
    assert {name for name in names - shown if f"{name}.json" not in pages} == set()


def test_the_op_is_timed_line_by_line(tmp_path, monkeypatch, capsys):
    lines = [("mosaic_gpu", "strong"), ("attention", "mild"), ("fla", "mild"), ("xla", "strong")]
    monkeypatch.setitem(op.SETS, "peers", ("peers", [(*line, op.WIDE) for line in lines]))
    monkeypatch.setattr(op, "missing", lambda name: "it is not here" if name == "fla" else None)

    def in_this_process(module, commands, at_once, limit_s):
        assert module == "benchmarks.op"
        yield 1, {"FAILED": "no memory"}
        yield 0, op.main(commands[0])

    monkeypatch.setattr(op, "each", in_this_process)
    out = tmp_path / "peers-cpu.json"
    assert cli.main(["bench", "op", "--", "peers", "--small", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    (row,) = record["results"]
    assert (record["what"], record["device"], row["dtype"]) == ("peers", "cpu", "float32")
    assert (row["op"], row["shape"]) == ("xla, a tenth of the gates from -5 to -inf", [1, 64, 1, 64, 64])
    assert 0 < row["forward"] < 1e4
    assert 0 < row["forward and backward"] < 1e4
    assert [line[0] + ": " + line[-1] for line in record["failed"]] == ["fla: it is not here", "attention: no memory"]
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    row |= {"op": "mosaic_gpu", "forward": 0.25}
    out.write_text(json.dumps(record))
    assert "| 1, 64, 1, 64, 64 | 0.25 / " in tables.peers_table()


def test_arguments_of_benchmarks_need_no_dashes():
    found = [cli._parse(["bench", "mqar", *dashes, "--preset", "tiny"], "").what.arguments for dashes in ([], ["--"])]
    assert found == [("--preset", "tiny")] * 2


def test_decoding_is_timed(tmp_path, monkeypatch):
    out = tmp_path / "decode-cpu.json"
    assert cli.main(["bench", "decode", "--", "--tiny", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert (record["what"], record["device"]) == ("decode", "cpu")
    assert [row["position"] for row in record["positions"]] == [20, 100]
    assert record["step"]["op"]["over_read_and_write"] > 0
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert "| 4 | the prompt | " in tables.decode_table()


def test_the_tables_of_layers_and_presets_are_those_of_the_code():
    page = (ROOT / "docs" / "layers.md").read_text()
    assert layers_table.with_tables(page) == page
    for kind, names in layers_table.PRESETS.items():
        made = {name for name, x in vars(getattr(nn, kind)).items() if isinstance(x, classmethod)}
        assert set(names) == made - ({"tiny"} if kind == "CausalLMConfig" else set())  # which takes an argument
    layers = {name.split(",")[0] for name in layers_table.LAYERS}
    assert layers == {kind.__name__.removesuffix("Config") for kind in mixers()}


def mixers():
    """The config of every layer that gla_jax.nn exports, but for the models'."""
    kinds = (getattr(nn, name) for name in nn.__all__)
    return [k for k in kinds if isinstance(k, type) and issubclass(k, MixerConfig) and not issubclass(k, ModelConfig)]


def test_the_plots_are_those_of_the_results(tmp_path, monkeypatch, capsys):
    for path in tables.RESULTS.glob("*.json"):
        shutil.copy(path, tmp_path)
    drawn = plots.draw_all(tmp_path)
    committed = {path.name: path.read_text() for path in tables.RESULTS.glob("*.svg")}
    assert {path.name: path.read_text() for path in drawn} == committed, "run python -m benchmarks.plots"
    pages = "".join((ROOT / name).read_text() for name in tables.PAGES)
    assert set(committed) == set(re.findall(r"\(\.\./benchmarks/results/([\w-]+\.svg)\)", pages))
    plots.draw_or_say_why(None)
    monkeypatch.setattr(plots, "plt", None)
    plots.draw_or_say_why(tmp_path / "op-cpu.json")
    assert capsys.readouterr().out == (
        "no plot: matplotlib is missing, which the extra notebooks has: pip install '.[notebooks]'\n"
    )


def test_a_deviation_is_the_samples_and_one_seed_has_none():
    assert small_runs.plus_minus([1.0, 3.0]) == "2.000 ± 1.414"
    assert small_runs.plus_minus([0.5]) == "0.500"
    assert plots.spread(np.array([[1.0], [3.0]])) == pytest.approx(2**0.5)
    assert plots.spread(np.array([[1.0]])) is None


def test_questions_of_mqar_have_the_answers_told():
    told = [1, 2, 4, 8, 8]
    batch = mqar.sequences(jax.random.key(0), np.array(told), length=64, pairs=8, vocab=32)
    tokens, labels, weights = (np.asarray(x) for x in batch)
    assert mqar.counts(8) == told[:4]
    assert weights.sum(1).tolist() == told
    for row, count in enumerate(told):
        pairs = dict(zip(tokens[row, : 2 * count : 2], tokens[row, 1 : 2 * count : 2], strict=True))
        asked = np.flatnonzero(weights[row])
        assert len(pairs) == count
        assert asked.min() >= 16
        assert sorted(tokens[row, asked]) == sorted(pairs)
        assert [pairs[token] for token in tokens[row, asked]] == labels[row, asked].tolist()
        assert np.count_nonzero(tokens[row]) == 3 * count


def test_a_claim_is_seen_if_the_seeds_have_it_by_more_than_chance():
    say = small_runs.verdict
    assert [say([1.0]), say([-1.0])] == ["seen in the one seed", "not seen in the one seed"]
    # The t of three seeds is 4.30: 1 with a deviation of 0.41 and of 0.40 on either side of it.
    assert say([0.59, 1.0, 1.41]) == "not told apart from chance" == say([0.0, 0.0, 0.0])
    assert [say([0.61, 1.0, 1.39]), say([-0.61, -1.0, -1.39])] == ["seen", "not seen"]


def test_claims_of_mqar_are_compared():
    most = (("attention", 1.0), ("GLA", 0.7), ("RetNet", 0.8), ("Mamba", 0.5))
    rows = {name: {"measured": [[1.0, x - 0.01], [1.0, x]]} for name, x in most}
    rows["attention"]["measured"][0] = [1.0, 0.999]
    seen = mqar.claims(rows)
    assert seen.pop("GLA recalls more than RetNet, at the most pairs") == "not seen"
    assert list(seen.values()) == ["seen"] * 3
    assert mqar.claims({"GLA": rows["GLA"]}) == {}
    assert list(mqar.claims({"attention": {"measured": [[0.9, 1.0]]}}).values()) == ["not seen in the one seed"]


@pytest.mark.large
def test_attention_read_in_pieces_sees_all_that_came_before():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_layers": 1, "mlp_size": 16}
    config = nn.CausalLMConfig(mixer=nn.SoftmaxAttentionConfig(num_heads=2, cache_size=32), init_std=0.5, **sizes)
    model = nn.CausalLM(config, rngs=nnx.Rngs(0))
    batch = ladder.windows(np.arange(100) ** 2 % 32, np.array([0, 40]), 32)
    whole, _ = small_runs.losses_and_hits(model, batch)
    np.testing.assert_allclose(small_runs.losses_in_pieces(model, batch, 4), whole, rtol=1e-5)


def test_claims_of_the_ladder_follow_the_paper():
    rows = {name: {"measured": [bits, bits + 0.1]} for name, bits in ladder.PAPER.items()}
    assert list(ladder.claims(rows).values()) == ["seen"] * 6
    rows["scalar gate"] = {"measured": [20.0, 20.1]}
    assert [claim for claim, seen in ladder.claims(rows).items() if seen != "seen"] == [
        "scalar gate is better than constant decay"
    ]


def test_claims_of_extrapolation_are_compared():
    flat, rising = {"measured": [[2.0, 1.9, 2.0]] * 2}, {"measured": [[2.0, 1.9, 2.2]] * 2}
    worse, mixed = {"measured": [[2.1, 2.0, 2.3]] * 2}, {"measured": [[1.9, 1.8, 2.5]] * 2}
    seen = extrapolation.claims({"GLA": flat, "GLA, truncated": rising, "RetNet": worse, "Transformer++": rising})
    assert list(seen.values()) == ["seen", "not seen", "seen", "seen", "not seen"]
    same = extrapolation.claims({"GLA, truncated": flat, "GLA, the same windows": rising})
    assert list(same.values()) == ["seen"]
    # Ahead in two of three buckets, though behind in the mean.
    assert list(extrapolation.claims({"GLA": flat, "RetNet": mixed}).values()) == ["seen", "not seen", "not seen"]
    assert list(extrapolation.claims({"Mamba": rising}).values()) == ["seen"]
    # The text of a later bucket may be easier for all.
    assert list(extrapolation.claims({"Mamba": {"measured": [[2.0, 1.9, 1.95]] * 2}}).values()) == ["not seen"]


def test_claims_of_lengths_are_compared():
    speeds = {"GLA": (90, 90), "Transformer++": (99, 80), "Mamba": (10, 85)}
    rows = [
        {"model": name, "length": n, "tokens_per_s": x, "memory_gb": 10 + x / 100}
        for name, both in speeds.items()
        for n, x in zip((4096, 8192), both, strict=True)
    ]
    # Faster at 4096, faster at 8192, a greater lead there; Mamba slowest; memory.
    assert list(lengths.claims_of_training(rows).values()) == [False, True, True, False, True]
    assert list(lengths.claims_of_training(rows[:-1]).values()) == [False, True, True]
    assert lengths.claims_of_training(rows[:2]) == {}
    assert lengths.claims_of_training([]) == {}
    (attention,) = lengths.ATTENTION
    times = [{"op": "GLA", "length": n, "forward and backward": 2.0} for n in (1024, 2048)]
    times += [{"op": attention, "length": n, "forward and backward": n / 800} for n in (1024, 2048)]
    assert list(lengths.claims_of_ops(times).values()) == [False]
    assert list(lengths.claims_of_ops(times[1::2]).values()) == [True]


def test_processes_measure_one_at_a_time_and_say_what_failed(tmp_path, monkeypatch):
    # Writes when it was alone; the second line fails, and the third takes too long.
    (tmp_path / "measured.py").write_text(
        "import json, sys, time\nfrom benchmarks.processes import alone\n"
        "if sys.argv[1] == 'fails': raise SystemExit('no such thing')\n"
        "if sys.argv[1] == 'hangs': time.sleep(60)\n"
        "with alone():\n    began = time.time()\n    time.sleep(0.2)\n    ended = time.time()\n"
        "print('a warning')\nprint(json.dumps({'began': began, 'ended': ended}))\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    found = dict(processes.each("measured", [["works"], ["fails"], ["hangs"], ["works"]], 4, 10.0))
    assert found[1] == {"FAILED": "no such thing"}
    assert found[2] == {"FAILED": "no result in 10 s"}
    first, second = sorted((found[0], found[3]), key=lambda row: row["began"])
    assert first["ended"] <= second["began"]


@pytest.mark.large
def test_the_site_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    link = r'href="notebooks/1_recurrence_to_chunks.html"><span class="[\w -]+">Notebook 1<'
    assert re.search(link, (tmp_path / "concepts.html").read_text())
    shown = set(re.findall(r'id="(gla_jax[\w.]+)"', (tmp_path / "api.html").read_text()))
    assert on_the_page() - shown == set()
