"""One optimizer step and one evaluation step, each a single executable over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gla_jax.array_types import Array
from gla_jax.nn import CausalLM, param_shardings
from gla_jax.segments import segment_starts
from gla_jax.train.config import InputError, TrainConfig
from gla_jax.train.data import Batch
from gla_jax.train.loss import linear_cross_entropy, weighted_nats
from gla_jax.train.mesh import batch_sharding, like_params
from gla_jax.train.optimizer import make_optimizer, make_schedule

# What metrics["rejected"] says: why a step has left parameters and optimizer as they were.
REASONS = ("", "the loss is not finite", "the gradient is not finite", "the gradient's norm is a spike")
# Steps whose norms are looked at before one can be a spike, and the weight of the newest in their running mean.
SPIKE_AFTER, SPIKE_WEIGHT = 20, 0.05
# Parts of a step by the names that their instructions carry in the compiled program, and so in a profile.
SCOPES = ("embed", "mixer", "mlp", "head", "optimizer")
# Most bytes of float32 logits on a device at a time, if the config does not say in how many parts they come.
HELD = 2**29
# What XLA is told for GPUs (docs/performance.md): matrix products as large as a model's are cuBLAS' own ground, and
# which of those that share an input are made one is for the layers to say.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0, "xla_gpu_enable_triton_gemm": False}


class Monitor(NamedTuple):
    """What spikes are told by: the running mean of the gradient's norm, and over how many steps."""

    norm: Any
    steps: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    step: steps taken, rejected ones among them.
    params: the parameters, a dict of arrays.
    optimizer: the optimizer's own state.
    average: the running mean of the parameters, or None.
    monitor: of the gradient's norm.
    """

    step: Any
    params: Any
    optimizer: Any
    average: Any = None
    monitor: Any = None

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluation and sampling use."""
        return self.params if self.average is None else self.average


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a run; see `make_program`."""

    graphdef: Any
    initialize: Callable[[], TrainState]
    train: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    evaluate: Callable[[Any, Any], Array]
    abstract: TrainState
    place: Callable[[Any], Any]
    parameters: int


def make_program(config: TrainConfig, mesh: Mesh) -> Program:
    """The run's executables on a mesh of `make_mesh`: batches over data, fsdp and sequence, parameters by their axes.

    `initialize()` gives the first state; `train(state, batch)` uses up the state, and returns the next one with its
    "loss" (mean nats a target token), "grad_norm" (before clipping), "learning_rate" and "rejected" (an index of
    REASONS; 0 if the step counts); `evaluate(params, batch)` returns the weighted sum of nats; `abstract` is the
    state's shapes and shardings; `place` puts a host's rows of a `Batch` onto the mesh; `parameters` is their number.

    Raises:
      InputError: if the mesh does not divide a parameter.
    """
    explicit = AxisType.Explicit in mesh.axis_types
    sequence_axis = "sequence" if mesh.shape["sequence"] > 1 else None

    def make_model() -> CausalLM:
        return CausalLM(config.model.replace(sequence_axis=sequence_axis), rngs=nnx.Rngs(config.seed))

    graphdef, variables = nnx.split(nnx.eval_shape(make_model))
    optimizer, schedule = make_optimizer(config, variables), make_schedule(config)
    replicated, by_batch = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    try:
        param_places = nnx.to_pure_dict(param_shardings(variables, mesh))
    except ValueError as error:
        raise InputError(f"argument --mesh: {error}") from None

    def initialize() -> TrainState:
        params = nnx.to_pure_dict(nnx.state(make_model()))
        average = jax.tree.map(jnp.copy, params) if config.ema else None
        monitor = Monitor(jnp.float32(0), jnp.int32(0))
        return TrainState(jnp.int32(0), params, optimizer.init(params), average, monitor)

    def train(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        loss, gradients = _mean_gradient(config, graphdef, state.params, batch)
        norm = optax.tree.norm(gradients)
        rejected, monitor = _judge(config.spike, state.monitor, loss, norm)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            average = state.average
            if average is not None:
                average = jax.tree.map(lambda a, p: config.ema * a + (1 - config.ema) * p, average, params)
            new = TrainState(state.step + 1, params, optimizer_state, average, monitor)
            old = dataclasses.replace(state, step=new.step, monitor=monitor)
            kept = jax.tree.map(lambda new, old: jnp.where(rejected == 0, new, old), new, old)
        metrics = {"loss": loss, "grad_norm": norm, "learning_rate": schedule(state.step), "rejected": rejected}
        return kept, metrics

    def evaluate(params: Any, batch: Batch) -> Array:
        return _nats(config, nnx.merge(graphdef, params), batch)

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(initialize)
    full = TrainState(
        replicated,
        param_places,
        like_params(shapes.optimizer, shapes.params, param_places, replicated),
        None if shapes.average is None else param_places,
        Monitor(replicated, replicated),
    )

    def compiled(f: Callable, results: Any, **options: Any) -> Callable:
        if explicit:
            f = jax.sharding.auto_axes(f, out_sharding=results)
        is_cuda = mesh.devices.flat[0].platform == "gpu"
        run = jax.jit(f, out_shardings=results, compiler_options=GPU_OPTIONS if is_cuda else None, **options)

        @functools.wraps(run)
        def call(*arguments: Any) -> Any:
            with jax.set_mesh(mesh):
                return run(*arguments)

        return call

    scalars = dict.fromkeys(("loss", "grad_norm", "learning_rate", "rejected"), replicated)
    return Program(
        graphdef=graphdef,
        initialize=compiled(initialize, full),
        train=compiled(train, (full, scalars), donate_argnums=0),
        evaluate=compiled(evaluate, replicated),
        abstract=jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, full),
        place=lambda batch: jax.tree.map(functools.partial(jax.make_array_from_process_local_data, by_batch), batch),
        parameters=sum(x.size for x in jax.tree.leaves(shapes.params)),
    )


def _nats(config: TrainConfig, model: CausalLM, batch: Batch) -> Array:
    return _nats_of(config, model, model.hidden(batch.inputs.astype(jnp.int32), batch.segment_ids), batch)


def _nats_of(config: TrainConfig, model: CausalLM, hidden: Array, batch: Batch) -> Array:
    """The weighted sum of nats from the last activations [b, t, d], with a part of the logits at a time."""
    parts = config.loss_parts or _fewest_parts(config, hidden.shape[:2], model.config.vocab_size)
    with jax.named_scope("head"):
        if parts == 1:
            return weighted_nats(model.logits(hidden), batch.targets, batch.weights)

        def cut(x: Array) -> Array:  # [parts, b, devices, ...]: of each device's time a part
            x = x.reshape(x.shape[0], config.mesh.sequence, parts, -1, *x.shape[2:])
            return jnp.moveaxis(x, 2, 0)

        hidden, targets, weights = jax.tree.map(cut, (hidden, batch.targets, batch.weights))
        return linear_cross_entropy(hidden, model.output_weight(hidden.dtype), targets, weights)


def _fewest_parts(config: TrainConfig, shape: tuple[int, ...], vocab: int) -> int:
    """The least number that divides each device's tokens of a row, and makes its logits no more than HELD bytes."""
    rows, time = shape
    each = time // config.mesh.sequence
    mesh = jax.sharding.get_abstract_mesh()
    held = 4 * rows * time * vocab / (1 if mesh.empty else mesh.size)
    return next(parts for parts in range(1, each + 1) if each % parts == 0 and (held <= parts * HELD or parts == each))


def _mean_gradient(config: TrainConfig, graphdef: Any, params: Any, batch: Batch) -> tuple[Array, Any]:
    """The mean loss a target token and its float32 gradient, over microbatches and pieces of time as config says."""
    count = jnp.float32(batch.targets.size) if batch.weights is None else jnp.maximum(jnp.sum(batch.weights), 1)
    low = jax.tree.map(lambda p: p.astype(config.gradient_dtype), params)

    def whole(batch: Batch) -> tuple[Array, Any]:
        return jax.value_and_grad(lambda p: _nats(config, nnx.merge(graphdef, p), batch) / count)(low)

    def by_pieces(batch: Batch) -> tuple[Array, Any]:
        def loss(params: Any, piece: Batch, cache: Any) -> tuple[Array, Any]:
            model = nnx.merge(graphdef, params)
            hidden, cache = model.hidden_after(piece.inputs.astype(jnp.int32), cache, piece.segment_ids)
            return _nats_of(config, model, hidden, piece) / count, cache

        def step(cache: Any, x: tuple[Batch, Array | None]) -> tuple[Any, tuple[Array, Any]]:
            piece, fresh = x
            if fresh is not None:  # [b]: another document begins here
                clear = lambda c: jnp.where(fresh.reshape(1, -1, *(1,) * (c.ndim - 2)), 0, c)
                cache = jax.tree.map(clear, cache)
            (value, cache), gradient = jax.value_and_grad(loss, has_aux=True)(low, piece, cache)
            return cache, (value, gradient)

        fresh = None if batch.segment_ids is None else _fresh(batch.segment_ids, config.pieces)
        cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0], config.pieces, -1), 1, 0), batch)
        cache = nnx.merge(graphdef, params).init_cache(batch.inputs.shape[0])
        return _summed(params, step, cache, (cut, fresh))

    of_rows = whole if config.pieces == 1 else by_pieces
    if config.accumulate == 1:
        loss, gradient = of_rows(batch)
    else:
        # Microbatch i has rows i, i + a, i + 2a, ...: each device keeps the rows that it has.
        cut = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, config.accumulate, x.shape[-1]), 1, 0), batch)
        loss, gradient = _summed(params, lambda _, batch: (None, of_rows(batch)), None, cut)
    return loss, jax.tree.map(lambda g: g.astype(jnp.float32), gradient)


def _summed(params: Any, step: Callable, carry: Any, xs: Any) -> tuple[Array, Any]:
    """The float32 sums over a scan of what step(carry, x) -> carry, (loss, gradient) gives."""

    def add(sums: tuple[Any, Any], x: Any) -> tuple[tuple[Any, Any], None]:
        carry, result = step(sums[0], x)
        return (carry, jax.tree.map(lambda s, r: s + r.astype(jnp.float32), sums[1], result)), None

    zeros = jnp.float32(0), jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    return jax.lax.scan(add, (carry, zeros), xs)[0][1]


def _fresh(segment_ids: Array, pieces: int) -> Array:
    """[pieces, b] bool: whether a piece's first token that is not padding begins another segment."""
    starts = segment_starts(segment_ids).reshape(segment_ids.shape[0], pieces, -1)
    first = jnp.argmax(segment_ids.reshape(starts.shape) >= 0, -1, keepdims=True)
    return jnp.take_along_axis(starts, first, -1)[..., 0].T


def _judge(spike: float | None, monitor: Monitor, loss: Array, norm: Array) -> tuple[Array, Monitor]:
    """Which of REASONS to reject a step for, and the monitor after it.

    A spike enters the mean as the highest norm that is none: where norms rise for good, steps soon count again.
    """
    limit = jnp.inf if spike is None else spike * monitor.norm
    spikes = (monitor.steps >= SPIKE_AFTER) & (norm > limit)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    rejected = jnp.where(~jnp.isfinite(loss), 1, jnp.where(~jnp.isfinite(norm), 2, jnp.where(spikes, 3, 0)))
    seen = jnp.where(spikes, limit, norm)
    mean = jnp.where(monitor.steps == 0, seen, monitor.norm + SPIKE_WEIGHT * (seen - monitor.norm))
    monitor = Monitor(jnp.where(finite, mean, monitor.norm), monitor.steps + finite)
    return rejected.astype(jnp.int32), monitor
