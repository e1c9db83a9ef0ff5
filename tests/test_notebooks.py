"""The notebooks: each pair holds the same cells, none longer than a screen, and all run."""

import jupytext
import nbformat
import pytest

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
    assert max(cell.source.count("\n") + 1 for cell in source.cells) <= LINES
    outputs = [output for cell in written.cells for output in cell.get("outputs", ())]
    assert outputs
    assert all(output.output_type != "error" for output in outputs)


# The three that train for a minute or more are for `make exhaustive`.
RUN = [
    pytest.param(path, id=path.stem, marks=pytest.mark.exhaustive if path.stem[0] in "345" else pytest.mark.large)
    for path in SOURCES
]


@pytest.mark.parametrize("path", RUN)
def test_runs(path):
    notebooks.run(path)
