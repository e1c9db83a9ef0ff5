"""Every Python block of the README and the docs runs, each page's blocks one after another."""

import pathlib
import re

import pytest

from benchmarks.tables import with_table
from gla_jax import nn
from gla_jax.nn.config import ModelConfig
from gla_jax.nn.recurrent import MixerConfig
from tools import layers_table

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(BLOCK.findall(page.read_text()))
    exec(compile(code, str(page), "exec"), {})


def test_readme_tables_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    assert with_table(readme) == readme


def test_the_table_of_layers_is_that_of_the_code():
    page = (ROOT / "docs" / "layers.md").read_text()
    assert layers_table.with_table(page) == page
    layers = {name.split(",")[0] for name in layers_table.LAYERS}
    assert layers == {kind.__name__.removesuffix("Config") for kind in mixers()}


def mixers():
    """The config of every layer that gla_jax.nn exports, but for the models'."""
    kinds = (getattr(nn, name) for name in nn.__all__)
    return [k for k in kinds if isinstance(k, type) and issubclass(k, MixerConfig) and not issubclass(k, ModelConfig)]
