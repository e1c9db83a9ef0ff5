"""Checkpoints through orbax, whole or not at all, and checked when they are read back."""

from collections.abc import Callable
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

__all__ = ["Checkpoints", "fingerprint"]


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
        """Save a state and the data's position at its step; returns when both are copied, before they are written."""
        parts = _parts(state)
        checks = {name: fingerprint(part) for name, part in parts.items()}
        parts = {**parts, "checks": checks, "data": data}
        self._orbax.save_checkpointables_async(int(state.step), parts, overwrite=True)

    def wait(self) -> None:
        """Return when every save has been written; raises what went wrong in the background."""
        self._orbax.wait()

    def restore(self, abstract: TrainState, data: grain.DatasetIterator) -> TrainState | None:
        """The newest state that is whole, with `data` moved to its position; None if nothing has been saved.

        Raises:
          InputError: if there are checkpoints, and none is whole.
        """
        parts = self._newest(abstract, _parts(abstract), {"data": data})
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
        parts = self._newest(abstract, {name: abstract.evaluated}, {})
        if parts is None:
            raise InputError(f"argument RUN: {self._directory.parent} has no checkpoint yet; train it first")
        return parts[name]

    def _newest(self, abstract: TrainState, wanted: dict[str, Any], stateful: dict[str, Any]) -> dict[str, Any] | None:
        scalar = jax.ShapeDtypeStruct((), np.uint32, sharding=abstract.step.sharding)
        checks = dict.fromkeys(_parts(abstract), scalar)
        found = [checkpoint.step for checkpoint in self._orbax.checkpoints]
        for step in reversed(found):
            try:
                parts = self._orbax.load_checkpointables(step, {**wanted, **stateful, "checks": checks})
                for name in wanted:
                    if fingerprint(parts[name]) != parts["checks"][name]:
                        raise ValueError(f"the {name} are not those that were saved")
                return parts
            except Exception as error:  # whatever a damaged file makes orbax and its readers raise
                reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
                self._note(f"checkpoint {self._directory / str(step)} is damaged, trying the one before ({reason})")
        if found:
            raise InputError(
                f"argument --run: every checkpoint in {self._directory} is damaged; give a new folder to start over"
            )
        return None


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
        bits = _bits(leaf).reshape(-1)
        # Odd weights: a change of one element always changes the sum.
        weights = jax.lax.iota(jnp.uint32, bits.size) * jnp.uint32(2654435762) + jnp.uint32(1)
        result = result * jnp.uint32(16777619) + jnp.sum(bits * weights, dtype=jnp.uint32)
    return result


def _bits(x: Array) -> Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    if x.dtype == jnp.bool:
        return x.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
