"""How a record says what made it."""

import os

from gla_jax import records


def test_records_begin_with_a_command_that_a_shell_reads(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("XLA_", "JAX_"))]:
        monkeypatch.delenv(name)
    assert records.shell(["python", "-m", "x", "GLA's widths"]) == "python -m x 'GLA'\"'\"'s widths'"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_dump_to=")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/tmp/some")
    made = records.begin("op", ["python", "x.py"], packages=["flax"], device="cpu")
    assert made["command"] == "XLA_FLAGS='--xla_gpu_autotune_level=0 --xla_dump_to=' python x.py"
    assert (made["what"], made["device"], list(made["versions"])) == ("op", "cpu", ["jax", "jaxlib", "flax"])
