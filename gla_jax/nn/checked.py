"""Frozen dataclasses of plain values that are checked when they are built."""

import dataclasses
import math
from typing import Any, cast


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
    """A config of ints, floats, bools and strings; a bad field raises a ValueError of one line that names it."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            declared = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            if declared.split(" | ")[0] in _KINDS:
                check_type(field.name, declared, getattr(self, field.name))
        self._check()

    def _check(self) -> None:
        """Raises a ValueError that names a field out of its range; types have been checked."""

    def replace[C](self: C, **changes: Any) -> C:
        """The same config with the fields in `changes` changed, checked anew."""
        return dataclasses.replace(cast(Any, self), **changes)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: must be {allowed}, got {getattr(self, name)!r}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) >= least, f"at least {least}")

    def _positive(self, *names: str) -> None:
        for name in names:
            self._require(name, getattr(self, name) > 0, "positive")

    def _one_of(self, name: str, allowed: tuple) -> None:
        self._require(name, getattr(self, name) in allowed, f"one of {', '.join(map(str, allowed))}")


_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str}


def check_type(name: str, declared: str, value: Any) -> None:
    """A ValueError if `value` is not of the `declared` type: int, float, bool or str, perhaps with " | None"."""
    base, *optional = declared.split(" | ")
    fits = isinstance(value, _KINDS[base]) and (base == "bool" or not isinstance(value, bool))
    if not (fits or (optional and value is None)):
        raise ValueError(f"{name}: must be {declared}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}: must be finite, got {value!r}")
