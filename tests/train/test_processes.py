"""Two processes of four devices through jax.distributed: as one, killed and called again, stopped, and on fewer."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from gla_jax.train import InputError
from gla_jax.train.metrics import read_log
from gla_jax.train.processes import start_processes

from .small import records

ROOT = Path(__file__).parents[2]
FLAGS = {
    **{"steps": 24, "batch": 8, "length": 32, "eval-every": 12, "save-every": 4, "sample": 0, "optimizer": "adamw"},
    **{"model.hidden-size": 32, "model.num-layers": 1, "model.num-heads": 2, "model.mlp-size": 32},
}


def start(run, text, *more, number=0, processes=1, port=0, devices=2):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices)}
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    if processes > 1:
        flags.append(f"--distributed=127.0.0.1:{port},{processes},{number}")
    command = [sys.executable, "-m", "gla_jax.cli", "train", f"--run={run}", f"--data={text}", *flags, *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_pair(run, text, *more):
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(run, text, *more, number=i, processes=2, port=port) for i in range(2)]


def finish(processes):
    return [(*process.communicate(timeout=300), process.returncode) for process in processes]


def wait_for_step(run, step, processes):
    began = time.monotonic()
    while time.monotonic() - began < 200 and all(process.poll() is None for process in processes):
        found = read_log(run / "log.jsonl")
        if found and found[-1]["step"] >= step:
            return
        time.sleep(0.02)


def losses(run):
    return [record["loss"] for record in records(run) if "loss" in record]


@pytest.mark.large
def test_two_processes_killed_and_called_again_end_as_uninterrupted(tmp_path, text):
    mesh = ("--mesh.fsdp=2",)
    whole, run = tmp_path / "whole", tmp_path / "run"
    for _, error, code in finish(start_pair(whole, text, *mesh)):
        assert code == 0, error
    processes = start_pair(run, text, *mesh)
    wait_for_step(run, 9, processes)
    processes[1].kill()
    time.sleep(1)
    processes[0].kill()  # it would only wait for the other
    finish(processes)
    assert 9 <= len(losses(run)) < FLAGS["steps"]
    results = finish(start_pair(run, text, *mesh))
    assert [code for *_, code in results] == [0, 0], results
    assert "going on from step" in results[0][0]
    assert "step" not in results[1][0]  # one process speaks
    assert records(run) == records(whole)

    # One process goes on where two have stopped, and says so; SIGTERM reaches all processes through one.
    run = tmp_path / "stopped"
    processes = start_pair(run, text, *mesh)
    wait_for_step(run, 5, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for *_, code in results] == [75, 75], results
    ((out, error, code),) = finish([start(run, text, "--mesh.fsdp=2", devices=4)])
    assert code == 0, error
    assert "was saved by 2 processes, and there are 1: the batches that follow are the same" in out
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


def test_what_is_no_address_is_refused():
    for given in ("here", "host:1,2", "host:1,2,2", "host,2,0", "host:1,two,0"):
        with pytest.raises(
            InputError, match=r'^argument --distributed: must be "auto" or ADDRESS:PORT,PROCESSES,NUMBER'
        ):
            start_processes(given)
    start_processes(None)
