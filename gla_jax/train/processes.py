"""Runs of many processes: how they start, who writes, when they stop together."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils

from gla_jax.train.config import InputError


class Stopped(Exception):
    """The run was told to stop (SIGTERM) and has saved its state; the message says at which step."""


def start_processes(distributed: str | None) -> None:
    """Connect to the run's other processes, as `TrainConfig.distributed` says; before anything else asks for devices.

    Raises:
      InputError: if it is neither None, "auto" nor ADDRESS:PORT,PROCESSES,NUMBER.
    """
    if distributed is None or jax.distributed.is_initialized():
        return
    if distributed == "auto":
        jax.distributed.initialize()
        return
    try:
        address, processes, number = distributed.split(",")
        count, own = int(processes), int(number)
    except ValueError:
        count, own, address = 0, 0, ""
    if not (0 <= own < count and ":" in address):
        raise InputError(
            f'argument --distributed: must be "auto" or ADDRESS:PORT,PROCESSES,NUMBER with 0 <= NUMBER < PROCESSES, '
            f"got {distributed!r}"
        )
    jax.distributed.initialize(address, count, own)


def is_first() -> bool:
    """Whether this process writes what one process has to."""
    return jax.process_index() == 0


def together(name: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Stop:
    """Whether the run has been told to stop, asked once a step; processes agree on the step."""

    def __init__(self) -> None:
        self._told = False

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """While the context lasts, SIGTERM is taken note of and does nothing else."""

        def note(number: int, frame: FrameType | None) -> None:
            self._told = True

        if jax.process_count() > 1:  # JAX listens by itself, for all processes
            yield self
            return
        before = signal.signal(signal.SIGTERM, note)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    def told(self, step: int) -> bool:
        """Whether to stop after this step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._told
