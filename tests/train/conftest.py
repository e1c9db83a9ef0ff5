from pathlib import Path

import pytest

from gla_jax.train import load_corpus


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(load_corpus().train[1:6001].tobytes())
    return path
