"""gated_linear_attention with time sharded over a mesh axis: devices exchange decays and states, and never tokens.

Each device has a piece of every sequence. All that a piece needs of the pieces before it is the state that enters it:

    own      = (k * suffix)^T v                                     the state that the piece alone would leave
    entering = sum over pieces before of (decay in between) own     the exchange
    o        = op(q, k, v, g) + scale * (q * prefix) entering

with prefix and suffix the decays from the piece's start and to its end: sums of logarithms, so that nothing is divided
and -inf is a number like any other. The op does not read what is exchanged, so the two can run at the same time. The
backward is the mirror image: a state's cotangent is exchanged from the last piece to the first.

The GPU kernels cut a long sequence into parts themselves, and for that compute what each adds to the state before they
compute outputs, and in the backward likewise. There the exchange goes in between, and `entering` is the initial state.
"""

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType

from gla_jax import checks, pallas, segments
from gla_jax.array_types import Array, Gate, Ids, Key, Query, State, Value
from gla_jax.attention import Implementation, choose, gated_linear_attention
from gla_jax.chunked import arithmetic, rounded_einsum
from gla_jax.mesh import shard_by_arguments, vary_alike

Exchange = Literal["all_gather", "all_to_all"]

# More devices than this exchange by all_to_all: each then receives 2 states in all, and not one from every other.
FEW = 4


def sequence_parallel(
    q: Query,
    k: Key,
    v: Value,
    g: Gate | None = None,
    *,
    axis: str = "sequence",
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: Ids | None = None,
    reverse: bool = False,
    exchange: Exchange | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array | None]:
    """`gated_linear_attention` with time in equal pieces on the p devices of a mesh axis, the first piece on the first.

    (arXiv 2312.06635, equation 3; the states' exchange as in LASP-2, arXiv 2502.07563.) Exact for every gate, in the
    output and in every gradient. Devices send each other states [b, hk, k, v] and their decays, once forward and once
    backward, however long the sequence is. Under `jax.set_mesh`, on Auto and on Explicit axes, and inside `shard_map`
    over the axis, where all arrays but initial_state are the device's own piece.

    Args:
      q, k, v, g, scale, implementation: as in `gated_linear_attention`; t is a multiple of p.
      axis: the mesh axis.
      initial_state: [b, hk, k, v], the same on all devices of the axis; zeros if None.
      output_final_state: whether to return the state after the last token of the last piece, on all devices.
      segment_ids: [b, t] as in `gated_linear_attention`; a segment may begin and end in any piece.
      reverse: run from the last token of the last piece to the first of the first.
      exchange: "all_gather", in which each device receives p - 1 states, "all_to_all", in which it receives 2 and which
        sends twice, or None: all_gather for p up to 4.

    Returns:
      o [b, t, h, v] sharded as q, and the final state [b, hk, k, v] or None.

    Raises:
      ValueError: as `gated_linear_attention`, or the mesh has no such axis, or t is no multiple of its size.
    """
    q, k, v, g, initial_state, segment_ids = checks.as_jax(q, k, v, g, initial_state, segment_ids)
    options = checks.Options(None, scale, initial_state, output_final_state, segment_ids, None, reverse)
    checks.check_call(q, k, v, g, options)
    if exchange not in (None, *get_args(Exchange)):
        raise ValueError(f"exchange: must be None, {' or '.join(map(repr, get_args(Exchange)))}, got {exchange!r}")
    how = Pieces(axis, axis_size(axis), False, exchange)
    run = functools.partial(_piece, how)
    options = options.with_scale(q.shape[-1])
    if is_manual(axis):
        return shard_by_arguments(run, implementation, options, q, k, v, g)
    check_divides(how, "q, k and v", q.shape[1])
    return shard_by_arguments(run, implementation, options, q, k, v, g, time_axis=axis)


def tokens_before(x: Array, count: int, axis: str) -> Array:
    """Inside shard_map over `axis`: the `count` rows [b, count, ...] before this device's piece x [b, t, ...].

    They are the previous device's last ones, and zeros on the first device.

    Raises:
      ValueError: the pieces are shorter than `count`.
    """
    if count > x.shape[1]:
        raise ValueError(f"axis: a piece on {axis!r} must have at least {count} tokens, got {x.shape[1]}")
    size = axis_size(axis)
    return jax.lax.ppermute(x[:, x.shape[1] - count :], axis, [(i, i + 1) for i in range(size - 1)])


def axis_size(axis: str) -> int:
    """The devices of an axis of the mesh in use (`jax.set_mesh`, or that of the shard_map or pmap around).

    Raises:
      ValueError: there is no such axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axis not in mesh.shape:
        names = ", ".join(map(repr, mesh.shape)) or "none: call under jax.set_mesh(mesh)"
        raise ValueError(f"axis: must be an axis of the mesh in use, got {axis!r} and the mesh has {names}")
    return mesh.shape[axis]


def is_manual(axis: str) -> bool:
    """Whether the call is inside shard_map over the axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[axis] == AxisType.Manual


class Pieces(NamedTuple):
    """How time is cut: over which axis of how many devices, whether the last piece comes first, and the exchange."""

    axis: str
    size: int
    reverse: bool
    exchange: Exchange | None

    @property
    def reversed(self) -> "Pieces":
        """The same pieces from the other end."""
        return self._replace(reverse=not self.reverse)

    def number(self) -> Array:
        """This device's piece, 0 for the one that comes first."""
        index = jax.lax.axis_index(self.axis)
        return self.size - 1 - index if self.reverse else index

    def in_order(self, x: Array) -> Array:
        """What lies by device on the leading axis, by piece, and the other way round."""
        return jnp.flip(x, 0) if self.reverse else x


def check_divides(how: Pieces, name: str, time: int) -> None:
    """Raises a ValueError if time cannot be cut in equal pieces."""
    if time % how.size:
        raise ValueError(f"{name}: t must be a multiple of the {how.size} devices of axis {how.axis!r}, got {time}")


def _piece(how: Pieces, implementation, options, q, k, v, g):
    """The call on one device, inside shard_map: arrays are the device's piece, states are whole."""
    _, scale, state, output_final_state, ids, _, reverse = options
    how = how._replace(reverse=reverse)
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, k.shape[:3])
    if reverse:
        q, k, v, g, ids = jax.tree.map(lambda x: jnp.flip(x, 1), (q, k, v, g, ids))
    if ids is not None:
        q, k, v, g = segments.reset_and_mask(q, k, v, g, ids, _id_before(how, ids))
    first, last = how.number() == 0, how.number() == how.size - 1
    given = None if state is None else jnp.where(first, state, 0)
    name = choose(implementation, q, k, v, g, checks.Options(None, scale, None, False, None, None, False))
    # A float16 cotangent is scaled by its own piece's largest, which the kernels do not hand on.
    in_kernels = name == "mosaic_gpu" and q.dtype == jnp.bfloat16
    o, leaving = (_in_kernels if in_kernels else _around_the_op)(how, name, scale, *vary_alike((q, k, v, g, given)))
    if reverse:
        o = jnp.flip(o, 1)
    if not output_final_state:
        return o, None
    return o, jax.lax.psum(jnp.where(last, leaving, 0), how.axis)


def _around_the_op(how, name, scale, q, k, v, g, given):
    """o and the state that leaves the piece, with what the queries read of the state that enters added to the op's o.

    given: what enters the piece from outside of all pieces, [b, hk, k, v], zeros but for the first; or None.
    """
    # In float32, so that the three parts of the gate's gradient are rounded once.
    wide = checks.state_dtype(q.dtype)
    g = None if g is None else g.astype(wide)
    own, decay = _own_state(k, v, g)
    entering = _entering(how, decay, own, given)
    o, _ = gated_linear_attention(q, k, v, g, scale=scale, implementation=name)
    return (o.astype(wide) + _read(scale, q, g, entering)).astype(v.dtype), _decayed(decay, entering) + own


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_kernels(how, name, scale, q, k, v, g, given):
    """The same in GPU kernels."""
    return _forward_in_kernels(how, scale, q, k, v, g, given)[:2]


# Compiled once for all calls of the same shapes, as the op's own kernels.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward_in_kernels(how, scale, q, k, v, g, given):
    found = []
    turned = lambda state: None if state is None else jnp.swapaxes(state, 2, 3)

    def enter(decay, own):
        # A kernel's results vary over no axis of a shard_map, whatever its arguments do.
        decay, own, _ = vary_alike((decay, own, q))
        entering = _entering(how, decay, own, turned(given))
        # XLA would else turn the states of all parts that it is made of, each in a kernel.
        entering = with_layout_constraint(entering, Layout(major_to_minor=(0, 1, 2, 3)))
        found.extend(map(turned, (decay * entering + own, entering)))
        return entering

    o, _ = pallas.forward(q, k, v, g, scale, enter)
    return vary_alike((o, *found, q))[:3]


def _in_kernels_forward(how, name, scale, q, k, v, g, given):
    o, leaving, entering = _forward_in_kernels(how, scale, q, k, v, g, given)
    return (o, leaving), (q, k, v, g, entering, given is not None)


def _in_kernels_backward(how, name, scale, kept, cotangents):
    *arguments, has_given = kept
    *gradients, dgiven = _backward_in_kernels(how, scale, *arguments, *cotangents)
    return *gradients, dgiven if has_given else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward_in_kernels(how, scale, q, k, v, g, entering, do, dleaving):
    def enter(decay, own):
        decay, own, _ = vary_alike((decay, own, q))
        return _entering(how.reversed, decay, own, dleaving)

    return vary_alike((pallas.backward(q, k, v, g, scale, entering, do, enter), q))[0]


_in_kernels.defvjp(_in_kernels_forward, _in_kernels_backward)


def _entering(how, decay, own, given):
    """The state that enters each piece: what is given there, and what all pieces before make of theirs and add."""
    if given is None:
        return _exchange(how, decay, own)
    return given + _exchange(how, decay, own + _decayed(decay, given))


def _id_before(how: Pieces, ids: Array) -> Array:
    """[b]: the id of each row's last token before this piece that is not padding; negative if there is none."""
    last = ids.shape[1] - 1 - jnp.argmax(jnp.flip(ids >= 0, 1), 1)
    own = jnp.take_along_axis(ids, last[:, None], 1)[:, 0]
    every = how.in_order(jax.lax.all_gather(own, how.axis))
    piece = jnp.arange(how.size)[:, None]
    newest = jnp.max(jnp.where((every >= 0) & (piece < how.number()), piece, -1), 0)
    found = jnp.take_along_axis(every, jnp.maximum(newest, 0)[None], 0)[0]
    return jnp.where(newest >= 0, found, -1)


@jax.checkpoint
def _own_state(k, v, g):
    """The state [b, hk, k, v] that a piece leaves if none enters, and its decay [b, hk, k or 1, 1]."""
    if g is None:
        return _einsum("bthk,bthv->bhkv", k, v, v.dtype), None
    later = jnp.pad(g[:, 1:], ((0, 0), (0, 1)) + ((0, 0),) * (g.ndim - 2))
    suffix = jnp.exp(jax.lax.cumsum(later, 1, reverse=True))
    decay = jnp.exp(jnp.sum(g, 1))
    keys = k.astype(g.dtype) * (suffix if g.ndim == 4 else suffix[..., None])
    return _einsum("bthk,bthv->bhkv", keys, v, v.dtype), decay.reshape(*decay.shape[:2], -1, 1)


@functools.partial(jax.checkpoint, static_argnums=0)
def _read(scale, q, g, entering):
    """What the piece's queries [b, t, h, k] read of the state that entered it: [b, t, h, v]."""
    batch, time, heads, _ = q.shape
    queries = q.astype(entering.dtype).reshape(batch, time, entering.shape[1], -1, q.shape[-1]) * scale
    if g is not None:
        prefix = jnp.exp(jax.lax.cumsum(g, 1))
        queries = queries * (prefix[:, :, :, None] if g.ndim == 4 else prefix[..., None, None])
    o = _einsum("bthrk,bhkv->bthrv", queries, entering, q.dtype)
    return o.reshape(batch, time, heads, -1)


def _einsum(spec, x, y, dtype):
    if dtype == jnp.float64:
        return jnp.einsum(spec, x, y, precision=jax.lax.Precision.HIGHEST)
    return rounded_einsum(arithmetic(dtype), spec, x, y)


def _decayed(decay: Array | None, state: Array) -> Array:
    return state if decay is None else decay * state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchange(how: Pieces, decay: Array | None, own: Array) -> Array:
    """The state that enters each piece, from every piece's own and its decay.

    States are [b, hk, k, v] and decays [b, hk, k or 1, 1]; or with the last two axes the other way round.
    """
    if how.exchange == "all_gather" or (how.exchange is None and how.size <= FEW):
        return _by_all_gather(how, decay, own)
    return _by_all_to_all(how, decay, own)


def _exchange_forward(how, decay, own):
    entering = _exchange(how, decay, own)
    return entering, (decay, entering)


def _exchange_backward(how, residuals, cotangent):
    """With entering' = decay entering + own for the next piece, own's cotangent is that of all of entering'."""
    decay, entering = residuals
    down = _exchange(how.reversed, decay, cotangent)
    if decay is None:
        return None, down
    axes = tuple(i for i, n in enumerate(decay.shape) if n == 1 and entering.shape[i] != 1)
    return jnp.sum(entering * down, axes, keepdims=True), down


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _by_all_gather(how, decay, own):
    states, decays = (how.in_order(jax.lax.all_gather(x, how.axis)) if x is not None else None for x in (own, decay))
    number = how.number()

    def step(state, x):
        piece, own, decay = x
        return jnp.where(piece < number, _decayed(decay, state) + own, state), None

    xs = jnp.arange(how.size), states, decays
    return jax.lax.scan(step, jnp.zeros_like(own), xs, unroll=min(how.size, 8))[0]


def _by_all_to_all(how, decay, own):
    """Each device goes through all pieces for its share of the value columns."""
    axis = 3 if decay is None or decay.shape[3] == 1 else 2
    before, columns, after = own.shape[:axis], own.shape[axis], own.shape[axis + 1 :]
    share = -(-columns // how.size)
    pad = [(0, share * how.size - columns if i == axis else 0) for i in range(4)]
    own = jnp.pad(own, pad).reshape(*before, how.size, share, *after)
    pieces = how.in_order(jax.lax.all_to_all(own, how.axis, split_axis=axis, concat_axis=0))
    decays = None if decay is None else how.in_order(jax.lax.all_gather(decay, how.axis))

    def step(state, x):
        own, decay = x
        return _decayed(decay, state) + own, state

    _, entering = jax.lax.scan(step, jnp.zeros_like(pieces[0]), (pieces, decays), unroll=min(how.size, 8))
    entering = jax.lax.all_to_all(how.in_order(entering), how.axis, split_axis=0, concat_axis=axis)
    return jax.lax.slice_in_dim(entering.reshape(*before, -1, *after), 0, columns, axis=axis)
