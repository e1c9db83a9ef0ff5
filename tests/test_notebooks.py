"""The notebooks: each pair holds the same cells, none longer than a screen, and all run."""

import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import time

import jupytext
import nbformat
import pytest
from nbclient.exceptions import CellTimeoutError

from tools import notebooks

SOURCES = notebooks.sources()
LINES = 40


def test_there_are_six():
    assert [path.stem[:2] for path in SOURCES] == [f"{i}_" for i in range(1, 7)]


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_the_pair_agrees_and_cells_are_short(path):
    source, written = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert notebooks.cells(source) == notebooks.cells(written), "run python tools/notebooks.py"
    assert notebooks.badge(path) in source.cells[0].source
    assert len(notebooks.BADGE.findall(path.read_text())) == 1
    assert notebooks.install() in next(cell.source + "\n" for cell in source.cells if cell.cell_type == "code")
    assert written.metadata == notebooks.METADATA  # by which `jupytext --sync` finds the pair
    assert source.metadata["jupytext"]["formats"] == notebooks.METADATA["jupytext"]["formats"]
    assert max(cell.source.count("\n") + 1 for cell in source.cells) <= LINES
    outputs = [output for cell in written.cells for output in cell.get("outputs", ())]
    assert outputs
    assert all(output.output_type != "error" for output in outputs)


def test_they_install_from_what_the_reader_has(tmp_path, monkeypatch):
    called = []
    names = {"importlib": importlib, "pathlib": pathlib, "subprocess": subprocess, "sys": sys}
    monkeypatch.setattr(subprocess, "run", lambda command, check: called.append(command[-1]))
    exec(notebooks.install(), names)
    assert called == []  # as it is installed here
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(notebooks.FOLDER)
    exec(notebooks.install(), names)
    (colab := tmp_path / "content").mkdir()
    monkeypatch.chdir(colab)
    with pytest.raises(FileNotFoundError, match=r"gla_jax\.zip"):
        exec(notebooks.install(), names)
    (colab / "gla_jax.zip").touch()
    exec(notebooks.install(), names)
    monkeypatch.setattr(notebooks, "REPOSITORY", "owner/name")
    exec(notebooks.install(), names)
    places = [notebooks.ROOT.as_uri(), (colab / "gla_jax.zip").as_uri(), "git+https://github.com/owner/name"]
    assert called == [f"gla_jax[notebooks] @ {place}" for place in places]


def test_badge_and_installation_name_the_repository_once_there_is_one(tmp_path, monkeypatch):
    assert "github" not in notebooks.badge(SOURCES[0])  # no name that nobody holds
    monkeypatch.setattr(notebooks, "REPOSITORY", "owner/name")
    copies = [pathlib.Path(shutil.copy(SOURCES[0].with_suffix(end), tmp_path)) for end in (".py", ".ipynb")]
    notebooks.links(copies[0])
    for path in copies:
        assert "blob/main/notebooks/1_recurrence_to_chunks.ipynb)" in path.read_text()
        assert re.search(r'SOURCE = \\?"git\+https://github.com/owner/name\\?"', path.read_text())
    assert notebooks.badge(SOURCES[0]).endswith("/github/owner/name/blob/main/notebooks/1_recurrence_to_chunks.ipynb)")


@pytest.mark.large
@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_runs(path, record_property):
    began = time.monotonic()
    notebooks.run(path)
    seconds = time.monotonic() - began
    record_property("seconds", seconds)
    assert seconds < notebooks.LIMIT_S


def test_the_limit_is_of_the_whole_notebook(tmp_path, monkeypatch):
    cells = [nbformat.v4.new_code_cell("import time; time.sleep(1.2)") for _ in range(9)]
    path = tmp_path / "1_slow.py"
    jupytext.write(nbformat.v4.new_notebook(cells=cells), path, fmt="py:percent")
    monkeypatch.setattr(notebooks, "LIMIT_S", 4)
    with pytest.raises(CellTimeoutError):
        notebooks.run(path)
