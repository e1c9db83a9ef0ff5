"""What a record of a measurement begins with: the command, when, on what device, with which packages."""

import datetime
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import jax

__all__ = ["begin", "shell"]


def shell(words: Sequence[str]) -> str:
    """The words as a shell reads them, after the variables of this process that steer XLA and JAX; folders left out."""
    told = sorted(
        (name, value) for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_")) and "/" not in value
    )
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in told), shlex.join(words)])


def begin(
    what: str, words: Sequence[str], packages: Iterable[str] = ("flax", "optax"), device: str | None = None
) -> dict[str, Any]:
    """The first entries of a record of the kind `what`, made by the command `words`.

    The device is this process's first one, unless it was another process that measured.
    """
    return {
        "what": what,
        "command": shell(words),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device or jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", *packages)},
    }
