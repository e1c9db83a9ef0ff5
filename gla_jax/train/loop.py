"""The training loop."""

import dataclasses
import hashlib
import io
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gla_jax.nn.text import TOKENIZER
from gla_jax.train.checkpoints import Checkpoints
from gla_jax.train.config import InputError, TrainConfig
from gla_jax.train.corpus import Corpus, load_corpus
from gla_jax.train.data import Source, evaluation_batches, training_batches
from gla_jax.train.mesh import make_mesh
from gla_jax.train.metrics import Log, Progress, bits, duration, read_log
from gla_jax.train.processes import Stop, Stopped, is_first, start_processes, together
from gla_jax.train.run_folder import CHECKPOINTS, LOG, open_run
from gla_jax.train.step import REASONS, Program, TrainState, make_program
from gla_jax.train.trackers import Trackers, flops_per_token, memory_gb, peak_flops

# Steps in a row that are not finite before a run gives up, and the steps of a profile.
GIVE_UP, PROFILED = 5, 5


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run came to: where it lies, and its last training loss (nats) and evaluation (bits per byte)."""

    run: Path
    """The folder."""
    loss: float
    """Of the last step, in nats a token."""
    bits_per_byte: float
    """Of the text held out."""


def train(config: TrainConfig, out: Any = None) -> Result:
    """Train to the end of the run, from its beginning or from the newest checkpoint in its folder.

    An interrupted run that is called again takes the same steps on the same data as one that never stopped, and ends
    with the same parameters and the same log but for timings.

    Args:
      config: the run.
      out: a text stream for the progress; default: standard output.

    Raises:
      InputError: if the corpus, the folder or the settings cannot be used, or the disk is full.
      Stopped: if the process is told to stop (SIGTERM), after the state has been saved.
    """
    start_processes(config.distributed)
    corpora = [load_corpus(path) for path in (config.data, *(path for path, _ in config.sources))]
    _check_corpora(config, corpora)
    sha256 = corpora[0].sha256
    if len(corpora) > 1:
        sha256 = hashlib.sha256("".join(corpus.sha256 for corpus in corpora).encode()).hexdigest()
    with _folder(config, sha256) as folder:
        if corpora[0].tokenizer is not None and is_first():
            shutil.copyfile(corpora[0].tokenizer, folder / TOKENIZER)
        return _Run(config, corpora, folder, out if is_first() else io.StringIO()).finish()


@contextmanager
def _folder(config: TrainConfig, sha256: str) -> Iterator[Path]:
    """The run's folder, which the first process opens for all."""
    if is_first():
        with open_run(config, sha256) as folder:
            together("folder is open")
            yield folder
    else:
        together("folder is open")
        yield config.run


def _check_corpora(config: TrainConfig, corpora: list[Corpus]) -> None:
    first = corpora[0]
    if config.model.vocab_size < first.vocab_size:
        raise InputError(
            f"argument --model.vocab-size: must be at least {first.vocab_size}, the data's tokens, "
            f"got {config.model.vocab_size}"
        )
    for text, corpus in zip(config.mix, corpora[1:], strict=True):
        same = first.tokenizer is None or (
            corpus.tokenizer is not None and corpus.tokenizer.read_bytes() == first.tokenizer.read_bytes()
        )
        if corpus.separator != first.separator or not same:
            raise InputError(f"argument --mix: {text} must have the tokens of --data; tokenise it with the same file")


class _Run:
    def __init__(self, config: TrainConfig, corpora: list[Corpus], folder: Path, out: Any):
        self._config, self._folder = config, folder
        self._process = jax.process_index(), jax.process_count()
        if config.batch % jax.process_count():
            raise InputError(f"argument --batch: must be a multiple of the {jax.process_count()} processes")
        weights = [1.0, *(weight for _, weight in config.sources)]
        self._data = training_batches(
            [Source(corpus.train, weight) for corpus, weight in zip(corpora, weights, strict=True)],
            batch=config.batch,
            length=config.length,
            seed=config.seed,
            separator=corpora[0].separator if config.pack else None,
            process=self._process,
        )
        self._held_out, self._held_out_bytes = corpora[0].validation, corpora[0].validation_bytes
        mesh = make_mesh(config)
        self._program: Program = make_program(config, mesh)
        self._progress = Progress(config.steps, config.batch * config.length, out)
        self._not_finite = 0
        peak = peak_flops()
        flops = flops_per_token(config.model, self._program.parameters, config.length)
        self._use = None if peak is None else flops / mesh.size / peak
        if mesh.size < jax.device_count():
            self._progress.note(f"on {mesh.size} of {jax.device_count()} devices: {_why_fewer(config)}")

    def finish(self) -> Result:
        config, note = self._config, self._progress.note
        with Checkpoints(self._folder / CHECKPOINTS, keep=config.keep, note=note) as checkpoints:
            state = checkpoints.restore(self._program.abstract, self._data)
            if state is None:
                state = self._program.initialize()
            start = int(state.step)
            if start:
                note(f"going on from step {start} in {self._folder}")
            log = Log(self._folder / LOG, start) if is_first() else None
            trackers = Trackers(config if is_first() else TrainConfig(), self._folder)
            self._write = lambda record: (log and log.write(record), trackers.write(record))
            try:
                if start < config.steps:
                    with Stop().listening() as stop:
                        self._steps(state, start, checkpoints, log, stop)
            finally:
                if log:
                    log.close()
                trackers.close()
        together("log is whole")
        return _result(self._folder)

    def _steps(self, state: TrainState, start: int, checkpoints: Checkpoints, log: Log | None, stop: Stop) -> None:
        config = self._config
        began = time.monotonic()
        waiting: tuple[int, Any, float] | None = None
        for step in range(start + 1, config.steps + 1):
            if step == config.profile:
                jax.profiler.start_trace(self._folder / "profile")
            asked = time.monotonic()
            batch = next(self._data)
            waited = time.monotonic() - asked
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = self._program.train(state, self._program.place(batch))
            # Read one step late: the device has its next step before the host looks at the last one's loss.
            self._record(waiting)
            waiting = (step, metrics, waited)
            evaluating = step % config.eval_every == 0 or step == config.steps
            stopping = stop.told(step) and step < config.steps
            saving = step % config.save_every == 0 or step == config.steps or stopping
            profiled = config.profile is not None and step == min(config.profile + PROFILED - 1, config.steps)
            if evaluating or saving or profiled:
                self._record(waiting)
                waiting = None
            if profiled and step >= (config.profile or 0):
                jax.profiler.stop_trace()
            if evaluating:
                self._evaluate(state, step)
            if saving:
                # The log is on the disk before the checkpoint can be: a run that goes on from it lacks no record.
                if log:
                    log.sync()
                checkpoints.save(state, self._data)
            if stopping:
                checkpoints.wait()
                raise Stopped(f"stopped by SIGTERM at step {step}, which is saved in {self._folder}")
        checkpoints.wait()
        self._progress.note(f"trained {config.steps - start} steps in {duration(time.monotonic() - began)}")

    def _record(self, waiting: tuple[int, Any, float] | None) -> None:
        if waiting is None:
            return
        step, metrics, waited = waiting
        values: dict[str, Any] = {name: float(value) for name, value in metrics.items()}
        reason = REASONS[int(values.pop("rejected"))]
        loss = values["loss"]
        if reason:
            values = {name: value if np.isfinite(value) else None for name, value in values.items()}
            values["rejected"] = reason
            self._progress.note(f"step {step} is rejected: {reason} (loss {loss:.4g})")
        self._not_finite = self._not_finite + 1 if "not finite" in reason else 0
        if self._not_finite == GIVE_UP:
            raise InputError(
                f"argument --learning-rate: {reason} at step {step}, the {GIVE_UP}th in a row; try a lower one"
            )
        speed = self._progress.step(step, None if reason else loss)
        timing = {"tokens_per_s": round(speed), "data_wait_s": round(waited, 5), "memory_gb": memory_gb()}
        if self._use is not None:
            timing["mfu"] = round(speed * self._use, 4)
        if speed:
            timing["step_s"] = round(self._config.batch * self._config.length / speed, 5)
        self._write({"step": step, **values, "timing": timing})

    def _evaluate(self, state: TrainState, step: int) -> None:
        began = time.monotonic()
        config = self._config
        # Summed in float64 on the host, a batch at a time. The ends of documents cost bits too, and are no bytes.
        nats, size = 0.0, self._held_out_bytes
        rows = {"batch": config.batch, "length": config.length, "process": self._process}
        for batch in evaluation_batches(self._held_out, **rows):
            nats += float(self._program.evaluate(state.evaluated, self._program.place(batch)))
        per_byte = bits(nats) / size
        timing = {"seconds": round(time.monotonic() - began, 3)}
        self._write({"step": step, "held_out_bits_per_byte": per_byte, "timing": timing})
        self._progress.note(f"step {step}: {per_byte:.4f} bits per byte on {size:,} held-out bytes")
        self._progress.pause()


def _why_fewer(config: TrainConfig) -> str:
    count = jax.device_count()
    if config.mesh.data is not None:
        return "as --mesh says"
    return f"--batch {config.batch} is no multiple of {count}"


def _result(folder: Path) -> Result:
    records = read_log(folder / LOG)
    loss = [record["loss"] for record in records if record.get("loss") is not None][-1]
    per_byte = [record["held_out_bits_per_byte"] for record in records if "held_out_bits_per_byte" in record][-1]
    return Result(folder, loss, per_byte)
