"""Sharded calls: a call runs on each shard of batch and heads by itself, and of time if asked.

JAX's partitioner cuts the plain form on Auto mesh axes by itself. It does not see into a kernel, which is told how.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def runs_on_one_device(q) -> bool:
    """Whether a call on q, cut along Explicit axes, runs on one device a shard: what a GPU kernel needs."""
    mesh = jax.typeof(q).sharding.mesh if not isinstance(q, jax.ShapeDtypeStruct) else jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return all(size == 1 for kind, size in sizes if kind == AxisType.Auto)


def mixes_axes(q) -> bool:
    """Whether q's mesh has Auto axes beside others: JAX's partitioner cannot be told how to cut a kernel there."""
    if isinstance(q, jax.ShapeDtypeStruct) or runs_on_one_device(q):
        return False
    mesh = jax.typeof(q).sharding.mesh
    return any(size > 1 for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if kind != AxisType.Auto)


def devices_of(x) -> int:
    """How many devices at most share x: those of its mesh, or all, where the mesh is not known."""
    if runs_on_one_device(x):
        return 1
    return jax.typeof(x).sharding.mesh.size or jax.device_count()


def is_cut_explicitly(x) -> bool:
    """Whether x's mesh has Explicit axes of several devices, outside of shard_map."""
    mesh = jax.typeof(x).sharding.mesh
    return any(
        size > 1 for kind, size in zip(mesh.axis_types, mesh.axis_sizes, strict=True) if kind == AxisType.Explicit
    )


def cut_along(
    run: Callable[..., tuple],
    arrays: Sequence[Any],
    inputs: Sequence[str],
    outputs: Sequence[str],
    letters: str,
    multiples: Mapping[str, tuple[str, int]],
) -> tuple:
    """run(*arrays), on each device's share of some dimensions where mesh axes are Auto.

    Args:
      run: takes arrays and returns a tuple of them, for any size of the dimensions that are cut.
      inputs, outputs: the dimensions of each, a letter each; the first is b, the batch.
      letters: those that are cut. No others are, but for
      multiples: those that are cut as one of `letters` is, which they are a multiple of; both by name.
    """
    same = {name: base for name, (base, times) in multiples.items() if times == 1}
    rename = lambda names: "".join(same.get(name, name) for name in names)
    inputs, outputs = [rename(names) for names in inputs], [rename(names) for names in outputs]
    dimensions = (*inputs, *outputs)
    base = {name: (name, 1) for name in letters} | {name: x for name, x in multiples.items() if name not in same}

    def lie(mesh, given, results):
        """Where arrays lie: cut as the first of them already is, where that divides them all."""
        axes: dict[str, Any] = {}
        for x, names in zip((*given, *results), dimensions, strict=True):
            if not isinstance(x.sharding, NamedSharding):
                raise ValueError(
                    "mesh: to cut a GPU kernel, put an argument of the jitted function on the mesh's devices"
                )
            for name, size, axis in zip(names, x.shape, x.sharding.spec, strict=False):
                if name not in base:
                    continue
                name, times = base[name]
                taken = set().union(*map(_names, axes.values()))
                parts = math.prod(mesh.shape[one] for one in _names(axis))
                if axis is not None and size // times % parts == 0 and not taken & _names(axis):
                    axes.setdefault(name, axis)
        spec = lambda names: PartitionSpec(*(axes.get(base[name][0]) if name in base else None for name in names))
        found = tuple(NamedSharding(mesh, spec(names)) for names in dimensions)
        return mesh, run, found[len(inputs) :], found[: len(inputs)]

    times = {name: count for name, (_, count) in base.items() if count > 1}
    whole = [name for name in dict.fromkeys("".join(dimensions)) if name not in letters]
    factors = lambda name: f"({base[name][0]} {name})" if name in times else name
    spaced = [" ".join(map(factors, names)) for names in dimensions]
    rule = f"{', '.join(spaced[: len(inputs)])} -> {', '.join(spaced[len(inputs) :])}"
    cut = custom_partitioning(run)
    cut.def_partition(partition=lie, sharding_rule=rule, need_replication_factors=tuple(whole), **times)

    @jax.custom_batching.custom_vmap
    def call(*arrays):
        return cut(*arrays)

    @call.def_vmap
    def _(size, mapped, *arrays):
        # One more axis is more rows of the batch, which is each array's first.
        spread = (x if m else jnp.broadcast_to(x, (size, *x.shape)) for x, m in zip(arrays, mapped, strict=True))
        results = call(*(x.reshape(-1, *x.shape[2:]) for x in spread))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True,) * len(results)

    return call(*arrays)


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
