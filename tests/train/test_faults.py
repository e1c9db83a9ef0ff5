"""What a run meets with on a cluster: a signal, a full disk, a NaN, kills. docs/training.md has a table."""

import dataclasses
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gla_jax import cli
from gla_jax.train import InputError, Stopped, loop, train
from gla_jax.train.metrics import read_log
from gla_jax.train.processes import Stop

from .small import records, small
from .test_kill import ENVIRONMENT, ROOT, call, command


@pytest.fixture
def config(tmp_path, text):
    return small(tmp_path / "run", data=text, optimizer="adamw")


@pytest.mark.large
def test_sigterm_saves_and_the_run_goes_on_as_if_it_had_not_been(config, tmp_path, monkeypatch, capsys):
    whole = dataclasses.replace(config, run=tmp_path / "whole")
    train(whole, io.StringIO())

    def told(stop, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(stop, step)

    asked, handler = Stop.told, signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(Stop, "told", told)
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM at step 7, which is saved in "):
        train(config, io.StringIO())
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert sorted(path.name for path in (config.run / "checkpoints").iterdir()) == ["5", "7"]
    out = io.StringIO()
    train(config, out)
    assert out.getvalue().startswith("going on from step 7 in ")
    assert records(config.run) == records(whole.run)

    def stopping(_):
        raise Stopped("stopped by SIGTERM at step 3, which is saved in r")

    monkeypatch.setattr(cli, "train", stopping)
    assert cli.main(["train"]) == cli.STOPPED == 75
    told = capsys.readouterr().err
    assert told == "gla-jax: stopped by SIGTERM at step 3, which is saved in r; call again to go on\n"


def test_a_batch_of_nan_costs_its_own_step(config, monkeypatch):
    """Weights of a batch that are NaN: the step is rejected, with its reason, and training goes on."""

    def poisoned(*arguments):
        program, taken = make_program(*arguments), iter(range(1, 100))

        def place(batch):
            if batch.weights is None:
                worth = np.nan if next(taken) == 4 else 1.0
                batch = batch._replace(weights=np.full(batch.targets.shape, worth, np.float32))
            return program.place(batch)

        return dataclasses.replace(program, place=place)

    make_program = loop.make_program
    monkeypatch.setattr(loop, "make_program", poisoned)
    out = io.StringIO()
    result = train(config, out)
    assert "\nstep 4 is rejected: the loss is not finite (loss nan)\n" in out.getvalue()
    steps = [record for record in records(config.run) if "loss" in record]
    assert [record["step"] for record in steps if "rejected" in record] == [4]
    assert steps[3]["loss"] is None
    assert steps[3]["rejected"] == "the loss is not finite"
    assert all(np.isfinite(record["loss"]) for record in steps if record["step"] != 4)
    assert result.loss == steps[-1]["loss"] < steps[0]["loss"]


FULL = """
run=$1; shift
mkdir -p "$run"
mount -t tmpfs -o size=$1k tmpfs "$run" || exit 99; shift
"$@"; echo "first $?"
ls "$run"/checkpoints
mount -o remount,size=100m "$run"
"$@"; echo "second $?"
cat "$run"/log.jsonl
"""


@pytest.mark.large
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, for a small disk")
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path, text):
    one = tmp_path / "one"
    options = command(one, text)
    assert call("-m", "gla_jax.cli", "train", *options).returncode == 0
    files = [path for path in (one / "checkpoints" / "24").rglob("*") if path.is_file()]
    size = sum(-(-path.stat().st_size // 4096) * 4 for path in files)  # KiB
    # Room for two checkpoints, and not for the third beside them.
    run = tmp_path / "run"
    program = [sys.executable, "-m", "gla_jax.cli", "train", *command(run, text)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", FULL, "sh", str(run), str(int(2.5 * size) + 100), *program],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode == 99:
        pytest.skip(f"cannot mount a small disk here: {done.stderr}")
    assert "\nfirst 2\n" in done.stdout, done
    assert [line for line in done.stdout.split("first 2\n")[1].splitlines()[:4] if line in ("4", "8")] == ["4", "8"]
    (told,) = done.stderr.splitlines()
    assert told == (
        f"gla-jax: argument --run: the disk of {run} is full; the last whole checkpoint is step 8; "
        "make room and call again"
    )
    assert f"going on from step 8 in {run}" in done.stdout
    assert "\nsecond 0\n" in done.stdout
    (tmp_path / "log.jsonl").write_text(done.stdout.split("second 0\n")[1])
    assert records(tmp_path) == records(one)


@pytest.mark.exhaustive
def test_fifty_kills_from_outside_at_random_moments(tmp_path, text):
    """Saves take most of the time here, so that many kills fall into one."""
    chance, kills = random.Random(1), 0
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = ["--steps=2000", "--save-every=10", "--eval-every=1000"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = call("-m", "gla_jax.cli", "train", *command(whole, text), *flags, environment=cache)
    assert result.returncode == 0, result.stderr
    while kills < 50:
        log = run / "log.jsonl"
        size, began = log.stat().st_size if log.exists() else 0, time.monotonic()
        arguments = [sys.executable, "-m", "gla_jax.cli", "train", *command(run, text), *flags]
        with subprocess.Popen(
            arguments, env=ENVIRONMENT | cache, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            while process.poll() is None and time.monotonic() - began < 120:
                if log.exists() and log.stat().st_size > size:
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.1))
            assert process.poll() is None, (kills, process.stderr.read())
            process.kill()
            kills += 1
    result = call("-m", "gla_jax.cli", "train", *command(run, text), *flags, environment=cache)
    assert result.returncode == 0, result.stderr
    assert records(run) == records(whole)
    assert [record["step"] for record in read_log(run / "log.jsonl") if "loss" in record] == list(range(1, 2001))


def test_flags_of_data_are_checked(config):
    for mix in ("a.txt", "a.txt=-1", "=1", "a.txt=many"):
        with pytest.raises(InputError, match=r"^argument --mix: must be PATH=WEIGHT with a positive weight, got "):
            train(dataclasses.replace(config, mix=(mix,)), io.StringIO())
