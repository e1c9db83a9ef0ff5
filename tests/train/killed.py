"""Runs `gla-jax train` and dies by SIGKILL at a given point: python -m tests.train.killed WHERE NUMBER FLAGS...

step N      when step N has been handed to the device
log N       when half of log record N of this process is written
save N      D/1000 seconds after the N-th save has begun, for "save N D"
evaluate N  when the N-th evaluation begins
"""

import os
import signal
import sys
import threading
import time
from typing import Any

from gla_jax import cli
from gla_jax.train import checkpoints, loop, metrics


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(number: int, owner: Any, name: str, act: Any) -> None:
    """Call `act` instead of the number-th call of a method."""
    method, calls = getattr(owner, name), iter(range(1, 1_000_000))

    def counted(*arguments: Any) -> Any:
        return act(method, *arguments) if next(calls) == number else method(*arguments)

    setattr(owner, name, counted)


def half_a_record(write: Any, log: metrics.Log, record: dict[str, Any]) -> None:
    log._file.write(str(record)[: len(str(record)) // 2])
    log._file.flush()
    die()


def during_save(after: float) -> Any:
    def save(method: Any, *arguments: Any) -> None:
        threading.Timer(after, die).start()
        method(*arguments)
        time.sleep(10)

    return save


def main() -> int:
    where, number, after, *flags = sys.argv[1:]
    points: dict[str, tuple[Any, str, Any]] = {
        "step": (loop._Run, "_record", lambda *_: die()),
        "log": (metrics.Log, "write", half_a_record),
        "save": (checkpoints.Checkpoints, "save", during_save(int(after) / 1000)),
        "evaluate": (loop._Run, "_evaluate", lambda *_: die()),
    }
    before_call(int(number), *points[where])
    return cli.main(["train", *flags])


if __name__ == "__main__":
    sys.exit(main())
