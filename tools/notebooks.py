"""Runs the notebooks: each notebooks/*.py (the source, jupytext's percent format) becomes the .ipynb beside it.

python tools/notebooks.py                  # all, with outputs; minutes
python tools/notebooks.py 1_recurrence     # some, by the start of their names
python tools/notebooks.py --links          # none: only points their links to REPOSITORY
"""

import os
import pathlib
import re
import sys
import time
from typing import Any

import jupytext
import nbclient
import nbformat

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
# On GitHub: where the badges and the notebooks' first cells look for the library. There is no public repository yet;
# once there is, its name goes here, and `python tools/notebooks.py --links` writes it into all of them.
REPOSITORY = "gla-jax/gla_jax"
LINK = re.compile(r"(?<=github/)[\w.-]+/[\w.-]+(?=/blob/)|(?<=git\+https://github\.com/)[\w.-]+/[\w.-]+")
COLAB = "https://colab.research.google.com/github/" + REPOSITORY + "/blob/main/notebooks/{}.ipynb"
# Of a whole notebook, its kernel's start included.
LIMIT_S = 180


def sources() -> list[pathlib.Path]:
    """The notebooks' sources, by number."""
    return sorted(FOLDER.glob("[0-9]_*.py"))


def badge(path: pathlib.Path) -> str:
    """What a notebook's first cell must hold, so that it opens in Colab."""
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({COLAB.format(path.stem)})"


def linked(text: str) -> str:
    """A notebook's text with its links to REPOSITORY."""
    return LINK.sub(REPOSITORY, text)


def cells(notebook: Any) -> list[tuple[str, str]]:
    """Kind and text of each cell: what the two files of a pair must agree in."""
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def run(path: pathlib.Path) -> Any:
    """The notebook with outputs, from a fresh process on as many devices as the machine has.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
      nbclient.exceptions.CellTimeoutError: the whole took more than LIMIT_S.
    """
    notebook: Any = jupytext.read(path)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ends = time.monotonic() + LIMIT_S
    client = nbclient.NotebookClient(
        notebook,
        timeout_func=lambda _: max(1, int(ends - time.monotonic())),
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    )
    client.execute(env=environment)
    # What is this machine's own is no part of a notebook.
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = output.text.replace(f"{ROOT}/", "")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main(starts: list[str]) -> None:
    """Run the notebooks whose names start so (all, if none is given), and write them; point the links of all."""
    for path in sources():
        for file in (path, path.with_suffix(".ipynb")):
            if (text := file.read_text()) != linked(text):
                file.write_text(linked(text))
        if starts and not any(path.stem.startswith(start) for start in starts):
            continue
        began = time.monotonic()
        nbformat.write(run(path), path.with_suffix(".ipynb"))
        print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
