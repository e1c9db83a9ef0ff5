"""Lines of a benchmark, each measured in a process of its own: they compile beside each other and time one at a time.

Lowering is Python's, which runs on one core of a process. The processes end with the group that started them.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
LOCK = pathlib.Path(tempfile.gettempdir()) / "gla_jax-benchmark.lock"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The device to itself, once no process is inside `compiling`."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Beside others that compile, while none is inside `alone`: both the host and the device would be shared."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def each(module: str, lines: list[list[str]], at_once: int, limit_s: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """Place and result of every line, as they end: the JSON that `python -m module LINE` has printed last.

    A line that fails, or takes longer than limit_s, gives {"FAILED": what it said last}.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": path}

    def result(line: list[str]) -> dict[str, Any]:
        command = [sys.executable, "-m", module, *line]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"FAILED": f"no result in {limit_s:g} s"}
        if done.returncode or not done.stdout:
            return {"FAILED": done.stderr.strip()[-400:] or f"exit status {done.returncode}"}
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(at_once) as pool:
        running = {pool.submit(result, line): i for i, line in enumerate(lines)}
        for task in as_completed(running):
            yield running[task], task.result()
