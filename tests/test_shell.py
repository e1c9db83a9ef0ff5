"""Every shell block of the README and the docs runs, each line once.

Lines of a page run one after another in a folder of the page's own: training and its timing are made small by more
flags and the smallest presets, targets of the Makefile are only asked what they would do (`make -n`), but for
`make train`, whose command runs, and tables and plots are made anew in a copy of the repository without them. Other
programs of benchmarks/ run in processes, each program's lines in a test, with flags that make them small; kernels for
GPUs are lowered there. Blocks below a comment "run by `make exhaustive`" install packages.
"""

import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request

import pytest

from benchmarks import tables
from gla_jax import cli
from tests.interop.test_scoring import TASK

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- run by `make exhaustive`: [^\n]+ -->\n)?```sh\n(.*?)^```", re.M | re.S)
OTHER = re.compile(r"^```(?!sh$|python$|text$|\{(?!code)[\w-]+\}|$)|^ +```|^ *~~~|^(?!```)\n {4}\S", re.M)
SMALL = [
    *("--data=my.txt", "--mesh.data=1", "--optimizer=adamw"),
    *("--batch=8", "--length=32", "--steps=2", "--eval-every=2", "--sample=8"),
    *("--model.hidden-size=32", "--model.num-layers=1", "--model.num-heads=1", "--model.mlp-size=32"),
]
BENCH = ["--batch=2", "--length=32", "--steps=1", "--repeats=1", "--num-layers=1"]
SMALLEST = {"340m": "tiny", "transformer-340m": "transformer-tiny"}
LOSSES = ["--small", "--batch=2", "--length=32", "--steps=3"]
LENGTHS = [f"| {model} | {length} |" for model in ("GLA", "Transformer++", "Mamba") for length in (32, 64)]
OPS = ["| 2 x 64 | 1 x 128 |", "| GLA, 1 x (16, 16) | ", "| attention, 16 x 128 | "]
# The flags that make a program of benchmarks/ small, and what the tables show of its records then.
PROGRAMS = {
    "mqar": (["--preset=tiny", "--models=GLA"], {"mqar": ["| GLA |"]}),
    "ladder": (["--preset=tiny", "--models=GLA, 4 heads"], {"ladder": ["| GLA, 4 heads |"]}),
    "extrapolation": (["--preset=tiny", "--models=GLA, truncated"], {"extrapolation": ["| GLA, truncated |"]}),
    "lengths": (["--preset=tiny"], {"training against length": LENGTHS, "op against length": OPS}),
    "loss_curves": (LOSSES, {}),
    "cluster": (
        ["--small", "--rows=2", "--repeats=2", "--lengths=64"],
        {"cluster": ["| 2 | all_to_all |", "| restored on 1 |", "| 128 | 2 |", "| the bare step's |"]},
    ),
    "op": (["--small"], {"op timings": ["| xla | "], "peers": ["| mosaic_gpu |"]}),
    "op_gpu": (["--lower", "bars"], {}),
}
TABLE = re.compile(r"(made by benchmarks/tables\.py -->\n).*?(<!-- end of)", re.S)
TEXT = "what is past is prologue. "


def lines(page):
    """The commands of a page, as words, and whether the page says that only `make exhaustive` runs them."""
    for marked, block in BLOCK.findall(page.read_text()):
        for command in re.split(r"\n|&&", block):
            if words := shlex.split(command, comments=True):
                yield bool(marked), words


def same(words):
    """`gla-jax bench op -- gpu` as what it runs, `python -m benchmarks.op gpu`."""
    if words[:2] == ["gla-jax", "bench"] and words[2] in PROGRAMS:
        return "python", "-m", f"benchmarks.{words[2]}", *(word for word in words[3:] if word != "--")
    return tuple(words)


def runner(words):
    """What runs a line: a page's test, the test of a program of benchmarks/, or one of `make exhaustive`."""
    for word, name in (("jupyter", "jupyter"), ("pip install", "pip"), ("--tasks", "tasks")):
        if word in shlex.join(words):
            return name
    module = " ".join(same(words)[:3]).removeprefix("python -m benchmarks.")
    return module if module in PROGRAMS else "page"


EVERY = [(page, marked, words) for page in PAGES for marked, words in lines(page)]
FIRST = {}  # where each line is run
for page, _, words in EVERY:
    FIRST.setdefault(same(words), (page, words))


def lines_of(name, page=None):
    """The lines that a runner runs, of one page or of all."""
    return [words for where, words in FIRST.values() if runner(words) == name and page in (None, where)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the pages take to be there: text, a checkpoint, tokens."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("pyarrow", reason="the extra gla_jax[data] is not installed")
    import pyarrow
    import pyarrow.parquet
    import tokenizers

    for name in ("my.txt", "book.txt"):
        (tmp_path / name).write_text(TEXT * 100)
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT * 20] * 20}), "my.parquet")
    words = {word: i for i, word in enumerate([*TEXT.split(), "<eos>", *map(str, range(31995))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save("tokenizer.json")
    assert cli.main(["tokenize", "my.parquet", "other_tokens", "--tokenizer", "tokenizer.json"]) == 0
    shutil.copytree(ROOT / "tests" / "data" / "family" / "gla_official", "FOLDER")
    shutil.copy("tokenizer.json", "FOLDER")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if lines_of("page", page)], ids=lambda page: page.name)
def test_shell_blocks_run(page, folder):
    for words in lines_of("page", page):
        run(words)


@pytest.mark.large
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_benchmarks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert lines_of(name)
    for words in lines_of(name):
        run(words)
    made = list(results.glob("*.json"))
    assert [path for path in made if re.search("NaN|Infinity", path.read_text())] == []
    drawn = made if name not in ("cluster", "loss_curves") else []
    assert all(path.with_suffix(".svg").read_text().startswith("<?xml") for path in drawn)
    monkeypatch.setattr(tables, "RESULTS", results)
    shown = {table: tables.TABLES[table]() for table in PROGRAMS[name][1]}
    assert [row for table, rows in PROGRAMS[name][1].items() for row in rows if row not in shown[table]] == []


@pytest.fixture
def venv(tmp_path):
    """A new virtual environment's folder of programs."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True)
    return tmp_path / ".venv" / "bin"


@pytest.mark.exhaustive
@pytest.mark.parametrize("words", lines_of("pip"), ids=shlex.join)
def test_pip_finds_what_to_install(words, venv):
    command = [venv / words[0], *words[1:], "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Would install .*gla_jax-", done.stdout, re.M)
    assert "does not provide the extra" not in done.stderr


@pytest.mark.exhaustive
def test_jupyter_lab_shows_the_notebooks(tmp_path, venv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install, lab = lines_of("jupyter")
    subprocess.run(install, check=True)
    shutil.copytree(ROOT / "notebooks", "notebooks")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token=mine"]
    with subprocess.Popen([*lab, *flags], env=os.environ | {"HOME": str(tmp_path)}) as server:
        try:
            shown = json.loads(answer(f"http://localhost:{port}/api/contents?token=mine"))["content"]
            assert b"JupyterLab" in answer(f"http://localhost:{port}/lab?token=mine")
        finally:
            server.terminate()
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} <= {file["name"] for file in shown}


def answer(url):
    """What a server says once it is up, at most a minute from now."""
    until = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(url) as reply:
                return reply.read()
        except urllib.error.URLError:
            assert time.monotonic() < until
            time.sleep(0.5)


@pytest.mark.exhaustive
def test_a_task_of_lm_eval_runs(folder, venv, monkeypatch):
    subprocess.run([venv / "pip", "install", "lm-eval", f"{ROOT}[train,hub]"], check=True)
    tasks = folder / "TASKS"
    tasks.mkdir()
    (tasks / "mine.jsonl").write_text(json.dumps({"text": "what is", "end": " past"}) + "\n")
    (tasks / "mine.yaml").write_text(TASK.format(file=tasks / "mine.jsonl"))
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    for program, *arguments in lines_of("tasks"):
        done = subprocess.run([venv / program, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(r"^mine perplexity,none: \d", done.stdout, re.M)


def test_every_block_says_what_it_is():
    pages = {page.name: page.read_text() for page in PAGES}
    assert [name for name, text in pages.items() if OTHER.search(text)] == []
    assert [name for name, text in pages.items() if len(BLOCK.findall(text)) != text.count("```sh")] == []
    assert {page.name for page, _, _ in EVERY} >= {"README.md", "quickstart.md", "training.md", "performance.md"}


def test_every_line_is_run_and_said_to_be_if_by_make_exhaustive_alone():
    exhaustive = ("pip", "jupyter", "tasks")
    assert [words for _, marked, words in EVERY if marked != (runner(words) in exhaustive)] == []
    for words in itertools.chain(*map(lines_of, exhaustive)):
        read(words)
    everywhere = [lines_of(name) for name in ("page", *PROGRAMS, *exhaustive)]
    assert sorted(itertools.chain(*everywhere)) == sorted(words for _, words in FIRST.values())


@pytest.mark.parametrize(
    "line",
    [
        *("gla-jax train --no-such-flag 3", "python -m benchmarks.mqar --preset none", 'pip install ".[none]"'),
        *("gla-jax bench mqar -- --no-such-flag", "make nothing", "python -m benchmarks.nothing", "python nothing.py"),
        *("gla-jax bench train --preset none", ".venv/bin/jupyter lab nothing", "gla-jax eval F --tasks t --none 3"),
    ],
)
def test_lines_that_are_wrong_are_found(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    with pytest.raises((SystemExit, AssertionError)):
        (read if runner(words) in ("pip", "jupyter", "tasks") else run)(words)


def run(words):
    """A line, made small, in this folder."""
    program, *arguments = words
    name = program.removeprefix(".venv/bin/")
    if runner(words) in PROGRAMS:
        command = ["-m", "gla_jax.cli", *arguments] if name == "gla-jax" else arguments
        small, _ = PROGRAMS[runner(words)]
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        here = dict.fromkeys(("TMPDIR", "JAX_COMPILATION_CACHE_DIR"), os.getcwd())  # TMPDIR has the timings' lock
        assert "FAILED" not in python(*command, *small, PYTHONPATH=str(ROOT), XLA_FLAGS=flags, **here)
    elif name == "make":
        if "train" in made(arguments):
            run(["gla-jax", "train"])
    elif name == "gla-jax":
        given = {word.split("=")[0].split(".")[0] for word in arguments}
        small = [flag for flag in SMALL if flag.split("=")[0].split(".")[0] not in given & {"--data", "--mesh"}]
        small = {"train": small, "sample": ["--length=8"]}.get(arguments[0], [])
        if arguments[:2] == ["bench", "train"]:
            arguments, small = [SMALLEST.get(word, word) for word in arguments], BENCH
        assert cli.main([*arguments, *small]) == 0
    elif name == "python" and arguments in (["-m", "benchmarks.tables"], ["-m", "benchmarks.plots"]):
        in_a_copy(arguments)
    else:
        raise AssertionError(f"what is {shlex.join(words)}?")


def in_a_copy(arguments):
    """Runs what makes tables and plots in a copy without them, where they must come out as they are here."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("benchmarks", "gla_jax", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("_build", "__pycache__"))
        shutil.copy(ROOT / "README.md", copy)
        if arguments[1] == "benchmarks.plots":
            made = [path.relative_to(copy) for path in copy.glob("benchmarks/results/*.svg")]
        else:
            made = [path.relative_to(ROOT) for path in PAGES if TABLE.search(path.read_text())]
        assert made
        for path in made:
            if path.suffix == ".svg":
                (copy / path).unlink()
            else:
                (copy / path).write_text(TABLE.sub(r"\1\2", (copy / path).read_text()))
        python(*arguments, cwd=copy, PYTHONPATH=folder)
        assert [path for path in made if (copy / path).read_text() != (ROOT / path).read_text()] == []


def python(*arguments, cwd=None, **environment):
    """What a program of Python prints."""
    command, variables = [sys.executable, *arguments], os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(targets):
    """The first words of what make would do, which is not nothing."""
    told = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout
    return [line.split()[1] for line in told.stdout.splitlines() if line.startswith(".venv/bin/gla-jax ")]


def read(words):
    """What can be told of a line that `make exhaustive` runs, without it."""
    if runner(words) == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert (what := words[-1].removeprefix(".").strip("[]")) in ("", *extras), what
    elif words[1] == "lab":
        assert (ROOT / words[-1]).is_dir()
    elif runner(words) == "tasks":
        cli._parse(words[1:], "")
