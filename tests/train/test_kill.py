"""kill -9 at any moment, and the same command again: the same end, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from gla_jax.train import load_model
from gla_jax.train.metrics import read_log

from .small import records

ROOT = Path(__file__).parents[2]
# Not the eight devices of tests/conftest.py.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
KILLED = Path(__file__).with_name("killed.py")
FLAGS = {
    **{"steps": 24, "batch": 8, "length": 32, "eval-every": 8, "save-every": 4, "sample": 20},
    **{"model.hidden-size": 32, "model.num-layers": 1, "model.num-heads": 1, "model.mlp-size": 32},
}


def command(run, text):
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    return [f"--run={run}", f"--data={text}", *flags]


def call(*arguments, environment=None):
    return subprocess.run(
        [sys.executable, *arguments],
        env=ENVIRONMENT | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def parameters(run):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(load_model(run))))


@pytest.fixture
def reference(tmp_path, text):
    run = tmp_path / "whole"
    result = call("-m", "gla_jax.cli", "train", *command(run, text))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return run


def assert_same_run(run, reference):
    assert records(run) == records(reference)
    steps = [record["step"] for record in read_log(run / "log.jsonl") if "loss" in record]
    assert steps == list(range(1, FLAGS["steps"] + 1))
    jax.tree.map(np.testing.assert_array_equal, parameters(run), parameters(reference))


def test_killed_at_every_kind_of_moment(tmp_path, text, reference):
    run = tmp_path / "killed"
    # The compiled step is kept between the processes that are killed; the reference compiled its own.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    # Each process goes on where the last one died; a save every 4 steps, an evaluation every 8.
    points = [
        ("step", 2, 0),  # before any checkpoint
        ("save", 1, 0),  # while the first is written
        ("save", 1, 5),
        ("save", 2, 15),
        ("log", 3, 0),  # half a line in the log
        ("evaluate", 1, 0),
        ("save", 1, 30),
        ("step", 3, 0),
        ("save", 2, 10),  # while the last is written
    ]
    for where, number, after in points:
        result = call(str(KILLED), where, str(number), str(after), *command(run, text), environment=cache)
        assert result.returncode in (-signal.SIGKILL, 0), (where, result.stderr)
        assert "Traceback" not in result.stderr
    result = call("-m", "gla_jax.cli", "train", *command(run, text), environment=cache)
    assert result.returncode == 0, result.stderr
    assert_same_run(run, reference)
    end = [line for line in result.stdout.splitlines() if line.startswith(("loss of the last step", "held-out text"))]
    final = json.loads((reference / "log.jsonl").read_text().splitlines()[-2])
    assert end[0] == f"loss of the last step: {final['loss']:.4f}"


@pytest.mark.exhaustive
def test_killed_from_outside_at_random_moments(tmp_path, text, reference):
    run, chance = tmp_path / "killed", random.Random(0)
    kills = 0
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-m", "gla_jax.cli", "train", *command(run, text)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            log = run / "log.jsonl"
            size, began = log.stat().st_size if log.exists() else 0, time.monotonic()
            # From the first new record on, within the time that all steps take.
            while process.poll() is None and time.monotonic() - began < 120:
                if log.exists() and log.stat().st_size > size:
                    break
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.3))
            if process.poll() is None:
                process.kill()
                kills += 1
            process.communicate()
    result = call("-m", "gla_jax.cli", "train", *command(run, text))
    assert result.returncode == 0, result.stderr
    assert kills > 0
    assert_same_run(run, reference)
