"""Every shell block of the README and the docs runs, each page's in a folder of its own, and each line on one page.

Training and its timing are made small by more flags and the smallest presets, and targets of the Makefile are only
asked what they would do (`make -n`), but for `make train`, whose command runs. Tables and plots are made anew in a copy
of the repository without them. A block below a comment "not run by the tests" has its arguments read by the very
parsers that would read them, and no more: it needs a GPU, the network, lm-eval, or many minutes. Of those the
experiments, the op, lengths and decoding run in tests/test_docs.py, at their smallest.
"""

import argparse
import importlib
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib

import pytest

from gla_jax import cli

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run by the tests, which read its arguments: .+ -->\n)?```sh\n(.*?)^```", re.M | re.S)
OTHER = re.compile(r"^```(?!sh$|python$|text$|\{[\w-]+\}|$)|^(?!```)\n {4}\S", re.M)
WITH_SHELL = [page for page in PAGES if "```sh" in page.read_text()]
SMALL = [
    *("--data=my.txt", "--mesh.data=1", "--optimizer=adamw"),
    *("--batch=8", "--length=32", "--steps=2", "--eval-every=2", "--sample=8"),
    *("--model.hidden-size=32", "--model.num-layers=1", "--model.num-heads=1", "--model.mlp-size=32"),
]
BENCH = ["--batch=2", "--length=32", "--steps=1", "--repeats=1", "--num-layers=1"]
SMALLEST = {"340m": "tiny", "transformer-340m": "transformer-tiny"}
TABLE = re.compile(r"(made by benchmarks/tables\.py -->\n).*?(<!-- end of)", re.S)
TEXT = "what is past is prologue. "


def lines(page):
    """The commands of a page, as words, and whether the page says that they are not run."""
    for skipped, block in BLOCK.findall(page.read_text()):
        for command in re.split(r"\n|&&", block):
            if words := shlex.split(command, comments=True):
                yield bool(skipped), words


RUN_BY = {tuple(words): page for page in reversed(PAGES) for skipped, words in lines(page) if not skipped}


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


@pytest.mark.large
@pytest.mark.parametrize("page", WITH_SHELL, ids=[page.name for page in WITH_SHELL])
def test_shell_blocks_run(page, folder, monkeypatch):
    done = 0
    for skipped, words in lines(page):
        (read if skipped or RUN_BY[tuple(words)] != page else run)(words, monkeypatch)
        done += 1
    assert done


def test_every_block_says_what_it_is():
    assert [page.name for page in PAGES if OTHER.search(page.read_text())] == []
    assert {page.name for page in WITH_SHELL} >= {"README.md", "quickstart.md", "training.md", "performance.md"}


@pytest.mark.parametrize(
    "line",
    [
        *("gla-jax train --no-such-flag 3", "python -m benchmarks.mqar --preset none", 'pip install ".[none]"'),
        *("gla-jax bench mqar -- --no-such-flag", "make nothing", "python -m benchmarks.nothing", "python nothing.py"),
        *("gla-jax bench train --preset none", ".venv/bin/jupyter lab nothing"),
    ],
)
def test_arguments_that_are_wrong_are_found(line, monkeypatch):
    with pytest.raises((SystemExit, AssertionError, ModuleNotFoundError)):
        read(shlex.split(line), monkeypatch)


def run(words, monkeypatch):
    program, *arguments = words
    name = program.removeprefix(".venv/bin/")
    if name == "make":
        if "train" in made(arguments):
            run(["gla-jax", "train"], monkeypatch)
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
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run([sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [path for path in made if (copy / path).read_text() != (ROOT / path).read_text()] == []


def made(targets):
    """The first words of what make would do, which is not nothing."""
    told = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert told.stdout
    return [line.split()[1] for line in told.stdout.splitlines() if line.startswith(".venv/bin/gla-jax ")]


class _Read(Exception):
    pass


def read(words, monkeypatch):
    """The arguments, by the program's own parser, which raises SystemExit for what it does not know."""
    program, *arguments = words
    name = program.removeprefix(".venv/bin/")
    if name == "make":
        made(arguments)
    elif name == "gla-jax":
        config = cli._parse(arguments, "")
        if isinstance(config, cli.BenchConfig) and isinstance(config.what, cli.BenchScript):
            read(["python", "-m", f"benchmarks.{config.what.name}", *config.what.arguments], monkeypatch)
    elif name == "pip" or arguments[:2] == ["-m", "pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert (what := arguments[-1].removeprefix(".").strip("[]")) in ("", "jupyterlab", *extras), what
    elif name == "jupyter":
        assert arguments[0] == "lab"
        assert (ROOT / arguments[1]).is_dir()
    elif name == "python":
        module = arguments[0] == "-m"
        file, given = (arguments[1], arguments[2:]) if module else (arguments[0], arguments[1:])
        parse = argparse.ArgumentParser.parse_args

        def stop(parser, *args):
            parse(parser, *args)
            raise _Read

        if module:
            found = importlib.import_module(file)
            call = getattr(found, "main", None)
        else:
            assert (ROOT / file).is_file(), file
            call = runpy.run_path(str(ROOT / file)).get("main")
        if not call:  # takes no arguments
            assert given == []
            return
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            patch.setattr(sys, "argv", [file, *given])
            with pytest.raises(_Read):
                call()
    else:
        raise AssertionError(f"what is {shlex.join(words)}?")
