"""Sharded calls: on Explicit mesh axes a call runs on each shard of batch and heads by itself, and of time if asked."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec


def runs_on_one_device(q) -> bool:
    """Whether a call on q, cut along Explicit axes, runs on one device a shard: what a GPU kernel needs."""
    mesh = jax.typeof(q).sharding.mesh if not isinstance(q, jax.ShapeDtypeStruct) else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return all(size == 1 for kind, size in sizes if kind == AxisType.Auto)


def vary_alike(arrays: Any) -> Any:
    """Inside shard_map, each array made to vary over all axes that any of them varies over; elsewhere as it is."""

    def varying(x):
        return jax.typeof(x).manual_axis_type.varying

    axes = frozenset().union(*map(varying, jax.tree.leaves(arrays)))

    def widen(x):
        missing = axes - varying(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(widen, arrays)


def shard_by_arguments(run, name, options, q, k, v, g, time_axis: str | None = None):
    """`run(name, options, q, k, v, g)`, under shard_map over the Explicit axes that q's batch and k's heads lie on.

    On Auto axes nothing is done: the partitioner cuts the plain form along batch and heads by itself. With `time_axis`,
    an axis of any kind, `run` has each shard of time by itself, too, and all of the states.

    Raises:
      ValueError: time, k or v is sharded on an Explicit axis, or q's heads are in more parts than hk has.
    """
    mesh = jax.typeof(q).sharding.mesh
    explicit = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    specs = {label: _spec(x, explicit) for label, x in (("q", q), ("k", k), ("v", v))}
    for label, (_, time, _, width) in specs.items():
        if _names(time) - {time_axis} or width is not None:
            raise ValueError(
                f"{label} may be sharded over batch and heads, and over time with sequence_parallel, "
                f"got {PartitionSpec(*specs[label])}"
            )
    batch, _, heads, _ = specs["k"]
    if batch is None and heads is None:
        batch, _, heads, _ = specs["q"]
    manual = _names(batch) | _names(heads) | _names(time_axis)
    if not manual:
        return run(name, options, q, k, v, g)
    parts = math.prod(mesh.shape[axis] for axis in _names(heads))
    if k.shape[2] % parts:
        raise ValueError(
            f"q's heads are sharded in {parts} parts, and k's and v's {k.shape[2]} cannot be; "
            "shard q's over fewer, or repeat k and v"
        )

    P = PartitionSpec
    tokens = P(batch, time_axis, heads, None)
    gate = None if g is None else {1: P(heads), 3: P(batch, time_axis, heads), 4: tokens}[g.ndim]
    states = P(None if options.cu_seqlens is not None else batch, heads, None, None)
    arrays = (q, k, v, g, options.bonus, options.initial_state, options.segment_ids, options.cu_seqlens)
    in_specs = (tokens, tokens, tokens, gate, P(heads, None), states, P(batch, time_axis), P(None))
    in_specs = tuple(None if x is None else spec for x, spec in zip(arrays, in_specs, strict=True))

    def local(q, k, v, g, bonus, state, ids, cu):
        given = {"bonus": bonus, "initial_state": state, "segment_ids": ids, "cu_seqlens": cu}
        return run(name, options._replace(**given), q, k, v, g)

    out_specs = (tokens, states if options.output_final_state else None)
    if manual & explicit:
        arrays = jax.tree.map(
            lambda x, spec: jax.reshard(x, P(*(_part(axes, explicit) for axes in spec))), arrays, in_specs
        )
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=manual)(*arrays)


def _spec(x, explicit: set[str]):
    """The axis (or axes) that each dimension of x is sharded over, Explicit ones alone."""
    return [_part(axes, explicit) for axes in jax.typeof(x).sharding.spec]


def _part(axes, explicit: set[str]):
    return axes if _names(axes) & explicit else None


def _names(axes) -> set[str]:
    return set() if axes is None else {axes} if isinstance(axes, str) else set(axes)
