"""How a record says what made it."""

import os
import subprocess

from gla_jax import records


def test_records_begin_with_a_command_that_a_shell_reads(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("XLA_", "JAX_"))]:
        monkeypatch.delenv(name)
    assert records.shell(["python", "-m", "x", "GLA's widths"]) == "python -m x 'GLA'\"'\"'s widths'"
    assert records.shell(["python", str(records.ROOT / "tools" / "x.py"), "/tmp"]) == "python tools/x.py /tmp"
    assert records.shell(["python", "--out", "/some/place/x.json"]) == "python --out x.json"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=0 --xla_dump_to=")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/tmp/some")
    made = records.begin("op", ["python", "x.py"], packages=["flax"], device="cpu")
    assert made["command"] == "XLA_FLAGS='--xla_gpu_autotune_level=0 --xla_dump_to=' python x.py"
    assert (made["what"], made["device"], list(made["versions"])) == ("op", "cpu", ["jax", "jaxlib", "flax"])
    assert made["machine"].endswith(f", {len(os.sched_getaffinity(0))} cores")


def test_records_name_the_commit(tmp_path, monkeypatch):
    monkeypatch.delenv("GLA_JAX_COMMIT", raising=False)
    assert records.commit(tmp_path) is None
    monkeypatch.setattr(records, "commit", lambda: None)
    assert "commit" not in records.begin("op", ["x"], packages=())
    monkeypatch.undo()
    monkeypatch.setenv("GLA_JAX_COMMIT", "abc1234")
    assert records.commit(tmp_path) == "abc1234"

    def git(*words):
        given = ["-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(["git", *given], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    code, record = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "op.json"
    for file in (code, record):
        file.write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert records.commit(tmp_path) == "abc1234"
    monkeypatch.delenv("GLA_JAX_COMMIT")
    name = git("rev-parse", "--short", "HEAD")
    assert records.commit(tmp_path) == name
    record.write_text("2")  # a record is no change of what it was made with
    assert records.commit(tmp_path) == name
    code.write_text("2")
    assert records.commit(tmp_path) == f"{name}+"
    # A folder in the checkout of something else.
    assert records.commit(tmp_path / "benchmarks") is None
