"""One optimizer step and one evaluation step, each a single executable over a mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, UInt8

from gla_jax.array_types import Array
from gla_jax.nn import GLAForCausalLM, param_shardings
from gla_jax.train.config import TrainConfig
from gla_jax.train.optimizer import make_optimizer, make_schedule

__all__ = ["Program", "TrainState", "make_mesh", "make_program"]

Tokens = UInt8[Array, "b t_and_1"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: the steps taken, the parameters (a dict of arrays), the optimizer's own state."""

    step: Any
    params: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a run; see `make_program`."""

    graphdef: Any
    initialize: Callable[[], TrainState]
    train: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    evaluate: Callable[[Any, Any, Any], Array]
    abstract: TrainState
    place: Callable[[Any], Any]


def make_mesh(batch: int) -> Mesh:
    """One axis, "data", of as many devices as divide the batch."""
    count = max(n for n in range(1, jax.device_count() + 1) if batch % n == 0)
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def make_program(config: TrainConfig, mesh: Mesh) -> Program:
    """The run's executables: the batch is split over the mesh's data axis, parameters lie by their logical axes.

    `initialize()` gives the first state; `train(state, tokens)` takes tokens [batch, length + 1], uses up the state,
    and returns the next one with its "loss" (mean nats a target token), "grad_norm" (before clipping) and
    "learning_rate"; `evaluate(params, tokens, weights)` returns the weighted sum of nats; `abstract` is the state's
    shapes and shardings; `place` puts a host batch onto the mesh, whose size must divide config.batch.
    """

    def make_model() -> GLAForCausalLM:
        return GLAForCausalLM(config.model, rngs=nnx.Rngs(config.seed))

    graphdef, variables = nnx.split(nnx.eval_shape(make_model))
    optimizer, schedule = make_optimizer(config, variables), make_schedule(config)
    replicated, by_batch = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("data")))
    shardings = TrainState(replicated, nnx.to_pure_dict(param_shardings(variables, mesh)), replicated)

    def initialize() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(make_model()))
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    def nats(params: Any, tokens: Tokens, weights: Float[Array, "b t"] | None) -> tuple[Array, Array]:
        return next_token_nats(nnx.merge(graphdef, params), tokens.astype(jnp.int32), weights)

    def train(state: TrainState, tokens: Tokens) -> tuple[TrainState, dict[str, Any]]:
        def mean(params: Any) -> Array:
            total, count = nats(params, tokens, None)
            return total / count

        loss, gradients = jax.value_and_grad(mean)(state.params)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(gradients), "learning_rate": schedule(state.step)}
        return TrainState(state.step + 1, params, optimizer_state), metrics

    shapes = jax.eval_shape(initialize)
    full = dataclasses.replace(shardings, optimizer=jax.tree.map(lambda _: replicated, shapes.optimizer))
    return Program(
        graphdef=graphdef,
        initialize=jax.jit(initialize, out_shardings=full),
        train=jax.jit(train, donate_argnums=0, in_shardings=(full, by_batch), out_shardings=(full, replicated)),
        evaluate=jax.jit(lambda *batch: nats(*batch)[0], in_shardings=(full.params, by_batch, by_batch)),
        abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, full),
        place=lambda batch: jax.device_put(batch, by_batch),
    )


def next_token_nats(
    model: Callable[[Array], Array], tokens: Int[Array, "b t_and_1"], weights: Float[Array, "b t"] | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sum over targets of -log p(target | what is before it) in nats, and the sum of weights; float32.

    Args:
      model: tokens [b, t] -> logits [b, t, vocab].
      tokens: [b, t + 1]; all but the last are read, all but the first are targets.
      weights: [b, t], one a target; None for ones.
    """
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    if weights is None:
        return jnp.sum(losses), jnp.float32(losses.size)
    return jnp.sum(losses * weights), jnp.sum(weights)
