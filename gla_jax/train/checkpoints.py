"""Checkpoints through orbax, whole or not at all, and checked when they are read back."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from gla_jax.array_types import Array
from gla_jax.train.config import InputError
from gla_jax.train.step import TrainState


class DiskFull(InputError):
    """There is no room for a checkpoint; the message names the last whole one."""


class Checkpoints:
    """The checkpoints of a run: saved in the background, of which the newest few are kept.

    A checkpoint is written beside its place and renamed when complete, so a process that dies while saving leaves the
    one before as the newest. Each holds the parameters, the optimizer with the step, the data's exact position, and
    fingerprints of the first two.

    Args:
      directory: their folder; made if missing.
      keep: how many of the newest stay; None for all.
      note: told, in a line, of a checkpoint that cannot be used.
    """

    def __init__(self, directory: Path, *, keep: int | None = 2, note: Callable[[str], None] = print):
        training: Any = ocp.training  # its own policies do not fit its own protocols
        self._note, self._directory = note, directory
        self._orbax = training.Checkpointer(
            directory.absolute(),
            save_decision_policy=training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=None if keep is None else training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._orbax.close()

    def save(self, state: TrainState, data: grain.DatasetIterator) -> None:
        """Save a state and the data's position at its step; returns when both are copied, before they are written.

        Raises:
          DiskFull: if there was no room for this checkpoint, or for the one before.
        """
        parts = _parts(state)
        prints = {name: fingerprint(part) for name, part in parts.items()}
        checks = {**prints, "processes": np.array(jax.process_count(), np.uint32)}
        parts = {**parts, "checks": checks, "data": data}
        with self._room():
            self._orbax.save_checkpointables_async(int(state.step), parts, overwrite=True)

    def wait(self) -> None:
        """Return when every save has been written; raises what went wrong in the background, as `save` does."""
        with self._room():
            self._orbax.wait()

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # orbax wraps what the file system said
            if not _is_full(error):
                raise
            whole = [checkpoint.step for checkpoint in self._orbax.checkpoints]
            last = f"the last whole checkpoint is step {whole[-1]}" if whole else "there is no checkpoint yet"
            raise DiskFull(
                f"argument --run: the disk of {self._directory.parent} is full; {last}; make room and call again"
            ) from None

    def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> TrainState | None:
        """The newest state that is whole, with `data` moved to its position; None if nothing has been saved.

        Raises:
          InputError: if there are checkpoints, and none is whole.
        """
        parts = self._newest(abstract, _parts(abstract), data)
        if parts is None:
            return None
        rest = parts["optimizer"]
        monitor = None if abstract.monitor is None else rest["monitor"]
        return TrainState(rest["step"], parts["params"], rest["state"], parts.get("average"), monitor)

    def restore_params(self, abstract: TrainState) -> Any:
        """The parameters for evaluation and sampling of the newest checkpoint that is whole.

        Raises:
          InputError: if there is none.
        """
        name = "params" if abstract.average is None else "average"
        parts = self._newest(abstract, {name: abstract.evaluated}, None)
        if parts is None:
            raise InputError(f"argument RUN: {self._directory.parent} has no checkpoint yet; train it first")
        return parts[name]

    def _newest(self, abstract: TrainState, wanted: dict[str, Any], data: Any) -> dict[str, Any] | None:
        scalar = jax.ShapeDtypeStruct((), np.uint32, sharding=abstract.step.sharding)
        checks = dict.fromkeys([*_parts(abstract), "processes"], scalar)
        found = [checkpoint.step for checkpoint in self._orbax.checkpoints]
        for step in reversed(found):
            try:
                parts = self._orbax.load_checkpointables(step, {**wanted, "checks": checks})
                for name in wanted:
                    if int(fingerprint(parts[name])) != int(parts["checks"][name]):
                        raise ValueError(f"the {name} are not those that were saved")
                if data is not None:
                    self._restore_position(step, data, int(parts["checks"]["processes"]))
                return parts
            except Exception as error:  # whatever a damaged file makes orbax and its readers raise
                reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
                self._note(f"checkpoint {self._directory / str(step)} is damaged, trying the one before ({reason})")
        if found:
            raise InputError(
                f"argument --run: every checkpoint in {self._directory} is damaged; give a new folder to start over"
            )
        return None

    def _restore_position(self, step: int, data: grain.DatasetIterator, processes: int) -> None:
        now = jax.process_count()
        if processes == now:
            self._orbax.load_checkpointables(step, {"data": data})
            return
        said = f"step {step} was saved by {processes} processes, and there are {now}"
        position = data.get_state()
        if position.keys() == {"next_index"}:  # of windows, a batch a step, whose rows are the same for any processes
            data.set_state({"next_index": step})
            self._note(f"{said}: the batches that follow are the same")
        else:
            self._note(f"{said}: packed documents begin again, in the order of a new run; all else is kept")


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came of, says that the disk is full."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _parts(state: TrainState) -> dict[str, Any]:
    """What is saved of a state, each under a name of its own."""
    rest = {"step": state.step, "state": state.optimizer}
    if state.monitor is not None:
        rest["monitor"] = state.monitor
    parts = {"params": state.params, "optimizer": rest}
    return parts if state.average is None else {**parts, "average": state.average}


@jax.jit
def fingerprint(tree: Any) -> Array:
    """A uint32 that depends on every bit of a tree's arrays, and on its place; the same on any mesh."""
    result = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        bits = _bits(leaf)
        # The element's number, by its axes: flattening would gather what is sharded.
        number, stride = jnp.zeros(bits.shape, jnp.uint32), 1
        for axis in reversed(range(bits.ndim)):
            number += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= bits.shape[axis]
        # Odd weights: a change of one element always changes the sum.
        weights = number * jnp.uint32(2654435762) + jnp.uint32(1)
        result = result * jnp.uint32(16777619) + jnp.sum(bits * weights, dtype=jnp.uint32)
    return result


def _bits(x: Array) -> Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
