"""Every Python block of the README and the docs runs, each page's blocks one after another."""

import pathlib
import re

import pytest

from benchmarks.tables import with_table

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
