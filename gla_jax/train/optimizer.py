"""The learning rate's course, and the optimizer, from a config."""

from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon

from gla_jax.train.config import TrainConfig

# Projections, by the logical names of their axes: what is left is embeddings, norms, biases, filters and the gate's
# low-rank pair.
PROJECTION_AXES = {"embed", "heads", "kv_heads", "mlp"}


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Step (0 for the first) -> learning rate: a linear rise over the warm-up, then the schedule."""
    warmup = round(config.warmup * config.steps)
    final = config.final_learning_rate
    peak, after = config.learning_rate, max(1, config.steps - warmup)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(peak, after, alpha=final)
    else:
        decay = min(after, max(1, round(config.decay * config.steps)))
        fall = optax.linear_schedule(peak, final * peak, decay, transition_begin=after - decay)
    if warmup == 0:
        return fall
    # From 1/(w+1), not from 0: the first step should count too.
    rise = optax.linear_schedule(config.learning_rate / (warmup + 1), config.learning_rate, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: TrainConfig, variables: Any) -> optax.GradientTransformation:
    """The optimizer over the pure dict of `variables`' values, which it masks by their logical axis names.

    Args:
      config: names the optimizer and its settings.
      variables: the model's state, with metadata; values may be abstract.
    """
    schedule = make_schedule(config)
    matrices = matrix_axes(variables)
    is_matrix = jax.tree.map(lambda axes: axes is not None, matrices, is_leaf=_is_axes)
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


def matrix_axes(variables: Any) -> dict[str, Any]:
    """The pure dict of `variables` with a projection's input and output axes in place of its array, None elsewhere."""

    def axes(variable: nnx.Variable) -> nnx.Variable:
        names = variable.get_metadata().get("out_sharding") or ()
        named = [axis for axis, name in enumerate(names) if name in PROJECTION_AXES]
        is_matrix = len(named) == 2 and set(names) <= PROJECTION_AXES | {"layers"}
        return variable.replace(MuonDimensionNumbers(*named) if is_matrix else None)

    return nnx.to_pure_dict(jax.tree.map(axes, variables, is_leaf=lambda x: isinstance(x, nnx.Variable)))


def _is_axes(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)
