"""How Sphinx builds the site: `make docs`."""

import pathlib
import re
import shutil
import sys

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

project, author, language = "gla_jax", "the gla_jax authors", "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "gla_jax"
exclude_patterns = ["_build"]

# Notebooks are shown with the outputs that they were committed with (tools/notebooks.py).
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

# Docstrings name shapes and dtypes themselves; single backticks in them are code.
default_role = "code"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False


def show_equations_as_they_are(app, what, name, obj, options, lines):
    """In docstrings an indented block after an empty line is an equation, or a table; `name`s is code and an s."""
    out, block = [], False
    for i, line in enumerate(lines):
        indented, before = line.startswith("    "), lines[i - 1] if i else ""
        if indented and not block and not before.strip() and out:
            out += ["::", ""]
            block = True
        elif line.strip() and not indented:
            block = False
        out.append(re.sub(r"(?<=\w)`(?=\w)", r"`\\ ", line))
    lines[:] = out


def bring_notebooks(app):
    """Copies the notebooks into the sources."""
    target = HERE / "notebooks"
    target.mkdir(exist_ok=True)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, target)


def lead_to_the_copies(app, name, source):
    """Links to notebooks, which lie beside docs/ in the repository, lead to the copies."""
    source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def setup(app):
    """Connects the three."""
    # Before napoleon, which reads sections and leaves the rest.
    app.connect("autodoc-process-docstring", show_equations_as_they_are, priority=100)
    app.connect("builder-inited", bring_notebooks)
    app.connect("source-read", lead_to_the_copies)
