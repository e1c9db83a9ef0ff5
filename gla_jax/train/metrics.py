"""What a run tells: a JSONL log that survives interruptions, and one line on the console."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any


def bits(nats: float) -> float:
    """Nats as bits."""
    return nats / math.log(2)


def duration(seconds: float) -> str:
    """Seconds as 7s, 3m05s or 2h03m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log's records in order; a last line that was cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class Log:
    """A JSONL file of records {"step": ..., ...}, of which those after a given step can be taken back.

    Args:
      path: the file; it is made if missing.
      step: the step that the run goes on from: later records, of steps that will be done again, are dropped.
    """

    def __init__(self, path: Path, step: int):
        kept = [record for record in read_log(path) if record["step"] <= step]
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        fresh.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one record and hand it to the operating system, where it outlives this process."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Return when every record is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Progress:
    """One line on the console that is written over on a terminal, and written anew every `every` seconds elsewhere.

    Args:
      steps: steps in all.
      tokens: tokens a step.
      out: a text stream; default: standard output.
      every: seconds between lines when `out` is no terminal.
    """

    def __init__(self, steps: int, tokens: int, out: Any = None, every: float = 10.0):
        self._out = sys.stdout if out is None else out
        self._steps, self._tokens, self._every = steps, tokens, every
        self._live = self._out.isatty()
        self._shown = -math.inf
        self._loss: float | None = None
        self._width = 0
        self._marks: list[tuple[float, int]] = []

    def pause(self) -> None:
        """Leave out of the speed what happens until the next `step`, such as an evaluation."""
        self._marks = []

    def step(self, step: int, loss: float | None) -> float:
        """Note that a step is done, show it if it is time, and return the speed in tokens a second (0: not known yet).

        The speed is that of the last 50 steps; the first, which waits for the compiler, is not among them.
        """
        now = time.monotonic()
        if loss is not None:
            self._loss = loss if self._loss is None else 0.95 * self._loss + 0.05 * loss
        self._marks = [*self._marks[-50:], (now, step)]
        then, first = self._marks[0]
        speed = (step - first) * self._tokens / (now - then) if now > then else 0.0
        if step == self._steps or now - self._shown >= (0.2 if self._live else self._every):
            self._shown = now
            self._line(self._text(step, speed))
        return speed

    def note(self, text: str) -> None:
        """Print a line of its own."""
        if self._live and self._width:
            self._out.write("\r" + " " * self._width + "\r")
            self._width = 0
        self._out.write(text + "\n")
        self._out.flush()

    def _text(self, step: int, speed: float) -> str:
        left = duration((self._steps - step) * self._tokens / speed) if speed else "?"
        loss = self._loss or 0.0
        return (
            f"step {step:>{len(str(self._steps))}}/{self._steps} {100 * step / self._steps:3.0f}%"
            f" | loss {loss:.3f} | {bits(loss):.3f} bits per byte | {speed / 1e3:.1f}k tokens/s | {left} left"
        )

    def _line(self, text: str) -> None:
        if not self._live:
            self.note(text)
            return
        self._out.write("\r" + text.ljust(self._width))
        self._out.flush()
        self._width = len(text)
