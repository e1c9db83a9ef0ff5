import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from gla_jax.train import InputError, loop, train
from gla_jax.train.data import evaluation_batches
from gla_jax.train.metrics import read_log

from .small import records as logged
from .small import small

TWO_DEVICES = """
import dataclasses, pathlib, sys
import jax
from gla_jax.train import train
from gla_jax.train.run_folder import load_config

assert jax.device_count() == 2
config, run = load_config(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2])
train(dataclasses.replace(config, run=run))
train(dataclasses.replace(config, run=run.with_name("other"), batch=3, steps=1))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    source, out = folder / "text.jsonl", io.StringIO()
    source.write_text("".join(json.dumps({"text": "to be or not to be, that is " * 5}) + "\n" for _ in range(20)))
    config = small(folder / "run", data=source)
    return config, train(config, out), out.getvalue()


def test_a_run_leaves_a_log_checkpoints_and_a_result(trained):
    config, result, out = trained
    records = read_log(config.run / "log.jsonl")
    assert [record["step"] for record in records] == [*range(1, 7), 6, *range(7, 13), 12]
    steps = [record for record in records if "loss" in record]
    assert steps[-1]["timing"].keys() == {"tokens_per_s", "data_wait_s", "memory_gb", "step_s"}
    assert steps[0].keys() == {"step", "loss", "grad_norm", "learning_rate", "timing"}
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert result.loss == steps[-1]["loss"]
    assert result.bits_per_byte == records[-1]["held_out_bits_per_byte"]
    assert result.run == config.run
    assert sorted(path.name for path in (config.run / "checkpoints").iterdir()) == ["10", "12"]
    lines = out.splitlines()
    assert re.fullmatch(
        r"step +1/12 +8% \| loss 5\.\d+ \| 7\.\d+ bits per byte \| \d+\.\dk tokens/s \| \S+ left", lines[0]
    )
    assert re.fullmatch(r"step 12: \d\.\d{4} bits per byte on 140 held-out bytes", lines[-2])
    assert lines[-1].startswith("trained 12 steps in ")


def test_a_finished_run_is_not_trained_again(trained):
    config, result, _ = trained
    before, out = logged(config.run), io.StringIO()
    assert train(config, out) == result
    assert logged(config.run) == before
    assert out.getvalue() == f"going on from step 12 in {config.run}\n"


def test_stopped_and_called_again_ends_the_same(trained, monkeypatch, tmp_path):
    whole, result, _ = trained
    config = small(tmp_path / "run", data=whole.data)
    record, calls = loop._Run._record, iter(range(100))

    def stopping(*arguments):
        if next(calls) == 8:
            raise KeyboardInterrupt
        record(*arguments)

    monkeypatch.setattr(loop._Run, "_record", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(config, io.StringIO())
    monkeypatch.undo()
    out = io.StringIO()
    assert train(config, out).loss == result.loss
    assert out.getvalue().startswith("going on from step 5 in ")
    assert logged(config.run) == logged(whole.run)


def test_a_loss_that_is_no_number_stops_the_run(trained, tmp_path):
    config = small(tmp_path / "run", data=trained[0].data, learning_rate=1e30, clip=1e30, optimizer="adamw", warmup=0.0)
    with pytest.raises(
        InputError,
        match=r"argument --learning-rate: the (loss|gradient) is not finite at step \d+, the 5th in a row; try a lower",
    ):
        train(config, io.StringIO())


def test_evaluation_is_over_all_held_out_bytes_and_their_documents_ends(trained):
    config, result, _ = trained
    corpus = loop.load_corpus(config.data)
    program = loop.make_program(config, loop.make_mesh(config))
    with loop.Checkpoints(config.run / "checkpoints") as checkpoints:
        params = checkpoints.restore_params(program.abstract)
    nats = [
        float(program.evaluate(params, program.place(batch)))
        for batch in evaluation_batches(corpus.validation, batch=8, length=32)
    ]
    assert result.bits_per_byte == pytest.approx(sum(nats) / np.log(2) / 140, rel=1e-6)


@pytest.mark.exhaustive
def test_two_devices_take_the_same_steps_as_one(trained, tmp_path):
    config, _, _ = trained
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES, str(config.run), str(run)],
        env={**os.environ, "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\non 1 of 2 devices: --batch 3 is no multiple of 2\n" in done.stdout
    for two, one in zip(read_log(run / "log.jsonl"), read_log(config.run / "log.jsonl"), strict=True):
        for name in one.keys() - {"timing"}:
            assert two[name] == pytest.approx(one[name], rel=1e-4), name
