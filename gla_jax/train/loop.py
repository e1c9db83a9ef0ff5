"""The training loop."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gla_jax.train.checkpoints import Checkpoints
from gla_jax.train.config import InputError, TrainConfig
from gla_jax.train.corpus import DOCUMENT, Corpus, load_corpus
from gla_jax.train.data import Source, evaluation_batches, training_batches
from gla_jax.train.mesh import make_mesh
from gla_jax.train.metrics import Log, Progress, bits, duration, read_log
from gla_jax.train.run_folder import CHECKPOINTS, LOG, open_run
from gla_jax.train.step import Program, TrainState, make_program

__all__ = ["Result", "train"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to: where it lies, and its last training loss (nats) and evaluation (bits per byte)."""

    run: Path
    loss: float
    bits_per_byte: float


def train(config: TrainConfig, out: Any = None) -> Result:
    """Train to the end of the run, from its beginning or from the newest checkpoint in its folder.

    An interrupted run that is called again takes the same steps on the same data as one that never stopped, and ends
    with the same parameters and the same log but for timings.

    Args:
      config: the run.
      out: a text stream for the progress; default: standard output.

    Raises:
      InputError: if the corpus, the folder or the settings cannot be used.
    """
    corpus = load_corpus(config.data)
    with open_run(config, corpus.sha256) as folder:
        return _Run(config, corpus, folder, out).finish()


class _Run:
    def __init__(self, config: TrainConfig, corpus: Corpus, folder: Path, out: Any):
        self._config, self._folder, self._out = config, folder, out
        self._data = training_batches(
            [Source(corpus.train)], batch=config.batch, length=config.length, seed=config.seed
        )
        self._held_out = corpus.validation
        mesh = make_mesh(config)
        self._program: Program = make_program(config, mesh)
        self._progress = Progress(config.steps, config.batch * config.length, out)
        if mesh.size < jax.device_count():
            count = jax.device_count()
            self._progress.note(f"on {mesh.size} of {count} devices: --batch {config.batch} is no multiple of {count}")

    def finish(self) -> Result:
        config, note = self._config, self._progress.note
        with Checkpoints(self._folder / CHECKPOINTS, keep=config.keep, note=note) as checkpoints:
            state = checkpoints.restore(self._program.abstract, self._data)
            if state is None:
                state = self._program.initialize()
            start = int(state.step)
            if start:
                note(f"going on from step {start} in {self._folder}")
            log = Log(self._folder / LOG, start)
            try:
                if start < config.steps:
                    self._steps(state, start, checkpoints, log)
            finally:
                log.close()
        return _result(self._folder)

    def _steps(self, state: TrainState, start: int, checkpoints: Checkpoints, log: Log) -> None:
        config = self._config
        began = time.monotonic()
        waiting: tuple[int, Any] | None = None
        for step in range(start + 1, config.steps + 1):
            tokens = self._program.place(next(self._data))
            state, metrics = self._program.train(state, tokens)
            # Read one step late: the device has its next step before the host looks at the last one's loss.
            self._record(waiting, log)
            waiting = (step, metrics)
            evaluating = step % config.eval_every == 0 or step == config.steps
            saving = step % config.save_every == 0 or step == config.steps
            if evaluating or saving:
                self._record(waiting, log)
                waiting = None
            if evaluating:
                self._evaluate(state, step, log)
            if saving:
                # The log is on the disk before the checkpoint can be: a run that goes on from it lacks no record.
                log.sync()
                checkpoints.save(state, self._data)
        checkpoints.wait()
        self._progress.note(f"trained {config.steps - start} steps in {duration(time.monotonic() - began)}")

    def _record(self, waiting: tuple[int, Any] | None, log: Log) -> None:
        if waiting is None:
            return
        step, metrics = waiting
        values = {name: float(value) for name, value in metrics.items()}
        loss = values["loss"]
        if not np.isfinite(loss):
            raise InputError(f"argument --learning-rate: the loss is {loss} at step {step}; try a lower one")
        speed = self._progress.step(step, loss)
        log.write({"step": step, **values, "timing": {"tokens_per_s": round(speed)}})

    def _evaluate(self, state: TrainState, step: int, log: Log) -> None:
        began = time.monotonic()
        config = self._config
        # Summed in float64 on the host, a batch at a time. The ends of documents cost bits too, and are no bytes.
        nats, size = 0.0, int(np.sum(self._held_out != DOCUMENT))
        for batch in evaluation_batches(self._held_out, batch=config.batch, length=config.length):
            nats += float(self._program.evaluate(state.evaluated, self._program.place(batch)))
        per_byte = bits(nats) / size
        timing = {"seconds": round(time.monotonic() - began, 3)}
        log.write({"step": step, "held_out_bits_per_byte": per_byte, "timing": timing})
        self._progress.note(f"step {step}: {per_byte:.4f} bits per byte on {size:,} held-out bytes")
        self._progress.pause()


def _result(folder: Path) -> Result:
    records = read_log(folder / LOG)
    loss = [record["loss"] for record in records if "loss" in record][-1]
    per_byte = [record["held_out_bits_per_byte"] for record in records if "held_out_bits_per_byte" in record][-1]
    return Result(folder, loss, per_byte)
