"""What a record of a measurement begins with: the command, the commit, when, on what, with which packages."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from typing import Any

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


def shell(words: Sequence[str]) -> str:
    """The words as a shell in the checkout reads them, after the variables of this process that steer XLA and JAX.

    Variables that hold folders are left out, and paths inside the checkout are relative to it.
    """
    told = sorted(
        (name, value) for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_")) and "/" not in value
    )
    relative = [word.removeprefix(f"{ROOT}{os.sep}") for word in words]
    # Where on a machine a record was written first is of no use to anybody.
    place = re.compile(r"/.*/(.+\.json)")
    relative = [place.sub(r"\1", word) if place.fullmatch(word) else word for word in relative]
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in told), shlex.join(relative)])


def commit(root: pathlib.Path = ROOT) -> str | None:
    """The short commit of the checkout `root`, with "+" if what git tracks has changed, records apart.

    GLA_JAX_COMMIT goes before it: a copy that another machine runs may have lost git's folder, or have an older one.
    None where there is neither.
    """
    if told := os.environ.get("GLA_JAX_COMMIT"):
        return told
    git = ["git", "-C", str(root)]
    try:
        said = subprocess.run([*git, "rev-parse", "--show-toplevel", "--short", "HEAD"], capture_output=True, text=True)
        top, _, name = said.stdout.strip().partition("\n")
        if said.returncode or pathlib.Path(top).resolve() != root:  # a package may lie in another project's checkout
            return None
        what = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results"]
        changed = subprocess.run([*git, *what], capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git, or one that may not read here
        return None
    return name + ("+" if changed else "")


def machine() -> str:
    """The processor, its model where Linux tells it, and how many cores this process may use."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        model = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return ", ".join([platform.machine(), *([model[1].strip()] if model else []), f"{cores} cores"])


def begin(
    what: str, words: Sequence[str], packages: Iterable[str] = ("flax", "optax"), device: str | None = None
) -> dict[str, Any]:
    """The first entries of a record of the kind `what`, made by the command `words`.

    The device is this process's first one, unless it was another process that measured. There is no entry "commit"
    where it is not known.
    """
    code = commit()
    return {
        "what": what,
        "command": shell(words),
        **({} if code is None else {"commit": code}),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device or jax.devices()[0].device_kind,
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", *packages)},
    }
