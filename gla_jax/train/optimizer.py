"""The learning rate's course, and the optimizer, from a config."""

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from gla_jax.train.config import TrainConfig

__all__ = ["make_optimizer", "make_schedule"]

# Projections, by the logical names of their axes: what is left is embeddings, norms, biases, filters and the gate's
# low-rank pair.
PROJECTION_AXES = {"embed", "heads", "kv_heads", "mlp"}


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Step (0 for the first) -> learning rate: a linear rise over the warm-up, then a cosine to the last step."""
    warmup = round(config.warmup * config.steps)
    final = config.final_learning_rate
    cosine = optax.cosine_decay_schedule(config.learning_rate, max(1, config.steps - warmup), alpha=final)
    if warmup == 0:
        return cosine
    # From 1/(w+1), not from 0: the first step should count too.
    rise = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([rise, cosine], [warmup])


def make_optimizer(config: TrainConfig, variables: nnx.State) -> optax.GradientTransformation:
    """The optimizer over the pure dict of `variables`' values, which it masks by their logical axis names.

    Args:
      config: names the optimizer and its settings.
      variables: the model's state, with metadata; values may be abstract.
    """
    schedule = make_schedule(config)
    matrices = nnx.to_pure_dict(jax.tree.map(_matrix_axes, variables, is_leaf=_is_variable))
    is_matrix = jax.tree.map(lambda axes: axes is not None, matrices, is_leaf=_is_leaf)
    decay = config.weight_decay
    if config.optimizer == "adamw":
        update = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=decay, mask=is_matrix)
    else:
        update = muon(
            schedule,
            weight_decay=decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as Adam's, so that one learning rate serves both
            adam_b1=0.9,
            adam_b2=0.95,
        )
    return optax.chain(optax.clip_by_global_norm(config.clip), update)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _is_leaf(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def _matrix_axes(variable: nnx.Variable) -> nnx.Variable:
    """Which axes of a parameter are a projection's input and output, or None; a stack's axis is neither."""
    names = variable.get_metadata().get("out_sharding") or ()
    axes = [axis for axis, name in enumerate(names) if name in PROJECTION_AXES]
    stacked = 1 if "layers" in names else 0
    if len(axes) != 2 or len(names) != 2 + stacked:
        return variable.replace(None)
    return variable.replace(MuonDimensionNumbers(*axes))
