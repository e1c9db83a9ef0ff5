"""Runs the notebooks: each notebooks/*.py (the source, jupytext's percent format) becomes the .ipynb beside it.

python tools/notebooks.py                  # all, with outputs; minutes
python tools/notebooks.py 1_recurrence     # some, by the start of their names
python tools/notebooks.py --links          # none: only writes badges, installation and metadata anew
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
# "owner/name" on GitHub, once a public repository is there. No notebook names one that somebody else could claim.
REPOSITORY = ""
BADGE = re.compile(r"\[!\[Open in Colab\]\([^)]*\)\]\([^)]*\)")
# What the first cell with code begins with, after its imports.
INSTALL = """
# If gla_jax is not installed yet, it is from the checkout that this notebook lies in or, where there is none (Colab),
# from SOURCE: a zip of a checkout that you have uploaded, or "git+https://..." of a repository that you trust.
SOURCE = "gla_jax.zip"
if importlib.util.find_spec("gla_jax") is None:
    source, checkout = SOURCE, pathlib.Path("..").resolve()
    if (checkout / "gla_jax" / "attention.py").is_file():
        source = checkout.as_uri()
    elif "://" not in SOURCE:
        source = pathlib.Path(SOURCE).resolve(strict=True).as_uri()
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"gla_jax[notebooks] @ {source}"], check=True)
"""
INSTALLS = re.compile(r"^\n# If gla_jax is not installed yet.*?check=True\)\n", re.M | re.S)
# For `jupytext --sync`, as in the sources' own headers.
METADATA = {
    "jupytext": {"formats": "ipynb,py:percent", "notebook_metadata_filter": "-jupytext.text_representation"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
# Of a whole notebook, its kernel's start included.
LIMIT_S = 180


def sources() -> list[pathlib.Path]:
    """The notebooks' sources, by number."""
    return sorted(FOLDER.glob("[0-9]_*.py"))


def badge(path: pathlib.Path) -> str:
    """The link to Colab in a notebook's first cell: to the notebook, or to where one uploads it."""
    place = f"github/{REPOSITORY}/blob/main/notebooks/{path.stem}.ipynb" if REPOSITORY else "#upload"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})](https://colab.research.google.com/{place})"


def install() -> str:
    """What installs gla_jax in the first cell with code: where there is no checkout, from the repository or a zip."""
    return INSTALL.replace("gla_jax.zip", f"git+https://github.com/{REPOSITORY}") if REPOSITORY else INSTALL


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
    notebook.metadata = METADATA
    return notebook


def links(path: pathlib.Path) -> None:
    """Writes badge and installation into a source, and its cells and METADATA into its pair, whose outputs stay."""
    text = INSTALLS.sub(lambda _: install(), path.read_text())
    path.write_text(BADGE.sub(badge(path), text))
    file = path.with_suffix(".ipynb")
    source: Any = jupytext.read(path)
    written: Any = nbformat.read(file, as_version=4)
    if len(source.cells) == len(written.cells):
        for new, old in zip(source.cells, written.cells, strict=True):
            old.source = new.source
        written.metadata = METADATA
        nbformat.write(written, file)


def main(starts: list[str]) -> None:
    """Run the notebooks whose names start so (all, if none is given), and write them; point the links of all."""
    for path in sources():
        links(path)
        if starts and not any(path.stem.startswith(start) for start in starts):
            continue
        began = time.monotonic()
        nbformat.write(run(path), path.with_suffix(".ipynb"))
        print(f"{path.stem}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
