"""Gated linear attention in chunks, in plain JAX: matmuls on every backend, exact for every gate.

Inside a chunk, a matmul needs the decay from token j to token i as (something of i) times (something of j). The usual
quotient of cumulative decays b_i / b_j over- or underflows when gates are strong. Here the chunk is halved again and
again instead: for i in the right half of a block and j in its left half, the decay is

    (decay from the middle up to i) * (decay from j + 1 up to the middle),

two factors that are both at most 1. A block's scores are its two halves' scores on the diagonal and one matmul below
it; log2(chunk) levels make the chunk's. Logarithms of decays are only ever added, never subtracted, so that nothing
overflows or cancels, and -inf (a hard reset) is a number like any other.

Across chunks S' = Diag(total) S + (k * suffix)^T v, and a chunk reads (q * prefix) S. A scan works on one group of
chunks at a time; the backward keeps the state at each group's start and computes the group again from there.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gla_jax.array_types import Array
from gla_jax.segments import Blocks, Entries


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up.

    chunk: tokens in a chunk, a power of two: each chunk costs one read and one write of the state.
    group: chunks that are worked on at once; the backward keeps one state a group.
    """

    chunk: int
    group: int


def plan(batch: int, time: int, heads: int, chunk: int | None = None) -> Plan:
    """The plan for `time` tokens of `batch` sequences with `heads` key/value heads, by chunks of `chunk` if given.

    On a CPU a group's arrays stay in its cache; elsewhere larger groups mean fewer and larger kernels.
    """
    longest, fill = (64, 16) if jax.default_backend() == "cpu" else (128, 512)
    chunk = chunk or min(longest, 1 << (time - 1).bit_length())
    chunks = -(-time // chunk)
    groups = -(-chunks // max(1, fill // (batch * heads)))
    return Plan(chunk, -(-chunks // groups))


class Arithmetic(NamedTuple):
    """What matmul operands are rounded to, and how exact a product is."""

    dtype: jnp.dtype
    precision: jax.lax.Precision | None


def arithmetic(dtype: jnp.dtype) -> Arithmetic:
    """bfloat16 multiplies as it is; float16 as float32 with at least its own bits, for its range; float32 is exact.

    A CPU multiplies bfloat16 as float32, so that there the operands inside the op stay float32 as well: no slower, and
    two blocks of a language model are 1.1e-2 from their logits in float32 in place of 1.2e-2.
    """
    if dtype == jnp.bfloat16 and jax.default_backend() != "cpu":
        return Arithmetic(jnp.dtype(jnp.bfloat16), None)
    return Arithmetic(
        jnp.dtype(jnp.float32), jax.lax.Precision.HIGH if dtype == jnp.float16 else jax.lax.Precision.HIGHEST
    )


def chunked(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    state: Array,
    scale: float,
    cut: Plan,
    entries: Entries | None = None,
) -> tuple[Array, Array]:
    """`reference.recurrence`, chunkwise: the same arguments and results, but `entries` has a chunk a block."""
    time = q.shape[1]
    chunks = -(-time // cut.chunk)
    groups = -(-chunks // cut.group)
    rows = groups * cut.group * cut.chunk
    if rows > time:
        q, k, v, g = jax.tree.map(
            lambda x: jnp.pad(x, ((0, 0), (0, rows - time)) + ((0, 0),) * (x.ndim - 2)), (q, k, v, g)
        )
    initial = blocks = None
    if entries is not None:
        initial, (sequence, *ends) = entries
        more = (0, rows // cut.chunk - sequence.size)
        sequence = jnp.pad(sequence, more, constant_values=initial.shape[0])
        blocks = Blocks(sequence, *(jnp.pad(x, more) for x in ends))
        blocks = Blocks(*(x.reshape(-1, cut.group) for x in blocks))
    o, state = _chunked(scale, cut, q, k, v, g, state, initial, blocks)
    return o[:, :time], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(scale, cut, q, k, v, g, state, initial, blocks):
    return _forward(scale, cut, q, k, v, g, state, initial, blocks)[0]


def _forward(scale, cut, q, k, v, g, state, initial, blocks):
    how = arithmetic(q.dtype)

    def body(carry, x):
        s, finals = carry
        (q, k, v, g), block = x
        scores, reads, writes, total = _chunks_alone(scale, cut, how, q, k, g)
        after, (before, ends) = _states(how, cut, writes, v, total, s, initial, block)
        o = rounded_einsum(how, "nbhric,nbhcv->nbhriv", scores, _to_chunks(v, cut))
        o = o + rounded_einsum(how, "nbhrck,nbhkv->nbhrcv", reads, before)
        if block is not None:
            finals = finals.at[jnp.where(block.last, block.sequence, finals.shape[0])].set(ends, mode="drop")
        return (after, finals), (s, _from_chunks(o.astype(v.dtype)))

    xs = _to_groups((q, k, v, g), cut), blocks
    (state, finals), (starts, o) = jax.lax.scan(body, (state, initial), xs)
    return (_from_groups(o), state if blocks is None else finals), (q, k, v, g, starts, initial, blocks)


def _backward(scale, cut, residuals, cotangents):
    q, k, v, g, starts, initial, blocks = residuals
    do, dstate = cotangents
    how = arithmetic(q.dtype)
    dot = functools.partial(rounded_einsum, how)

    def body(carry, x):
        ds, dinitial = carry
        s, (q, k, v, g), do, block = x
        run = functools.partial(_chunks_alone, scale, cut, how, pull=True)
        (scores, reads, writes, total), pull = jax.vjp(run, q, k, g)
        _, (before, _) = _states(how, cut, writes, v, total, s, initial, block)

        do, v_ = _to_chunks(do, cut, k.shape[2]), _to_chunks(v, cut)
        dscores = dot("nbhriv,nbhcv->nbhric", do, v_)
        dreads = dot("nbhrcv,nbhkv->nbhrck", do, before)
        dbefore = dot("nbhrck,nbhrcv->nbhkv", reads, do)

        def step(ds, x):  # a chunk's share of the states' cotangents, from the cotangent of the state after it
            dbefore, before, total, chunk = x
            if chunk is not None:
                ds = ds + jnp.where(chunk.last, dstate[chunk.sequence], 0)
            dafter = ds.astype(how.dtype)
            dtotal = None
            if total is not None:
                dtotal = jnp.exp(total) * jnp.sum(before * ds, -1 if g.ndim == 4 else (-2, -1), keepdims=True)
            ds = _decay_and_add(total, ds, dbefore)
            dentering = None
            if chunk is not None:
                dentering = jnp.where(chunk.first, ds[0], 0)
                ds = jnp.where(chunk.first, 0, ds)
            return ds, (dafter, dtotal, dentering)

        ds, (dafter, dtotal, dentering) = jax.lax.scan(step, ds, (dbefore, before, total, block), reverse=True)
        dwrites = dot("nbhcv,nbhkv->nbhck", v_, dafter)
        dv = dot("nbhric,nbhriv->nbhcv", scores, do) + dot("nbhck,nbhkv->nbhcv", writes, dafter)
        dq, dk, dg = pull((dscores.astype(how.dtype), dreads.astype(how.dtype), dwrites.astype(how.dtype), dtotal))
        if block is not None:
            firsts = jnp.where(block.first, block.sequence, dinitial.shape[0])
            dinitial = dinitial.at[firsts].set(dentering, mode="drop")
        return (ds, dinitial), (dq, dk, _from_chunks(dv.astype(v.dtype)), dg)

    # A sequence without tokens hands its state through, so its cotangent stays as it came.
    ds, dinitial = (dstate, None) if blocks is None else (jnp.zeros_like(starts[0]), dstate)
    xs = starts, _to_groups((q, k, v, g), cut), _to_groups(do, cut), blocks
    (ds, dinitial), dtokens = jax.lax.scan(body, (ds, dinitial), xs, reverse=True)
    return *_from_groups(dtokens), ds, dinitial, None


_chunked.defvjp(_forward, _backward)


def _to_groups(tree, cut: Plan):
    """[b, t, ...] to [groups, b, group * chunk, ...]."""

    def split(x):
        return jnp.moveaxis(x.reshape(x.shape[0], -1, cut.group * cut.chunk, *x.shape[2:]), 1, 0)

    return jax.tree.map(split, tree)


def _from_groups(tree):
    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    return jax.tree.map(join, tree)


def _to_chunks(x: Array, cut: Plan, heads: int | None = None) -> Array:
    """[b, n * c, h, d] to [n, b, h, c, d], or to [n, b, hk, r, c, d] with the h heads as r for each of `heads` = hk."""
    x = x.reshape(x.shape[0], cut.group, cut.chunk, x.shape[2], -1).transpose(1, 0, 3, 2, 4)
    return x if heads is None else x.reshape(*x.shape[:2], heads, -1, *x.shape[3:])


def _from_chunks(x: Array) -> Array:
    """The inverse of `_to_chunks`."""
    x = x.reshape(*x.shape[:2], -1, *x.shape[-2:]).transpose(1, 0, 3, 2, 4)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _states(how, cut, writes, v, total, state, initial, block):
    """The state after a group, those before its chunks [n, b, hk, k, v], and with `block` those after [n, hk, k, v]."""

    def step(s, x):
        update, total, chunk = x
        if chunk is not None:
            s = jnp.where(chunk.first, initial[chunk.sequence], s)
        after = _decay_and_add(total, s, update)
        return after, (s.astype(how.dtype), None if chunk is None else after[0])

    update = rounded_einsum(how, "nbhck,nbhcv->nbhkv", writes, _to_chunks(v, cut))
    return jax.lax.scan(step, state, (update, total, block))


def _decay_and_add(total, state, update):
    """exp(total) * state + update; a decay near 1 is rounded as its distance from 1, as thousands of chunks need it."""
    if total is None:
        return state + update
    near = total > -1
    return jnp.where(near, state, 0) + (jnp.where(near, jnp.expm1(total), jnp.exp(total)) * state + update)


def _chunks_alone(scale, cut, how, q, k, g, pull=False):
    """What a group's chunks have of q, k and g, each by itself; with `pull` to be differentiated by rules of its own.

    Returns scores [n, b, hk, r, c, c], with the decays from j to i in them; reads [n, b, hk, r, c, k], queries decayed
    from the chunk's start; writes [n, b, hk, c, k], keys decayed to its end; total [n, b, hk, k or 1, 1], its g's sum.
    """
    q = _to_chunks(q, cut, k.shape[2]).astype(jnp.float32) * scale
    k = _to_chunks(k, cut).astype(jnp.float32)
    if g is None:
        scores, reads, writes, total = jnp.tril(rounded_einsum(how, "nbhrik,nbhjk->nbhrij", q, k)), q, k, None
    elif g.ndim == 3:
        levels, prefix, suffix, total = _decays(_to_chunks(g, cut).astype(jnp.float32))
        scores = (
            rounded_einsum(how, "nbhrik,nbhjk->nbhrij", q, k) * _scalar_decays(levels, cut.chunk, total)[:, :, :, None]
        )
        reads, writes, total = q * prefix[:, :, :, None], k * suffix, total.swapaxes(-1, -2)
    else:
        # In a scan differentiated twice, JAX 0.11 takes constants of a custom_vjp's function for its arguments. So that
        # stands only where it is differentiated at once, and what it was made of is what a second derivative sees.
        g = _to_chunks(g, cut).astype(jnp.float32)
        return _vector_decays(how, q, k, g) if pull else _vector_forward(how, q, k, g)[0]
    return *(x.astype(how.dtype) for x in (scores, reads, writes)), total


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vector_decays(how, q, k, g):
    """`_chunks_alone` for a gate with a value a channel, g [n, b, hk, c, k]."""
    return _vector_forward(how, q, k, g)[0]


def _vector_forward(how, q, k, g):
    levels, prefix, suffix, total = _decays(g)
    scores = jnp.sum(q * k[:, :, :, None], -1)[..., None, None]
    halves = []
    for right, left in levels:
        queries = _halves(_blocks_of(q, right.shape[-2]))[1] * right[:, :, :, None]
        keys = _halves(_blocks_of(k, left.shape[-2]))[0] * left
        halves.append(_keep((queries.astype(how.dtype), keys.astype(how.dtype))))
        scores = _below_diagonal(scores, rounded_einsum(how, "nbhrsik,nbhsjk->nbhrsij", *halves[-1]))
    reads, writes = (q * prefix[:, :, :, None]).astype(how.dtype), (k * suffix).astype(how.dtype)
    scores = scores[..., 0, :, :].astype(how.dtype)
    out = scores, reads, writes, total.swapaxes(-1, -2)
    levels = [_keep((right.astype(how.dtype), left.astype(how.dtype))) for right, left in levels]
    return out, (q, k, g, levels, prefix, suffix, halves, out)


def _vector_backward(how, residuals, cotangents):
    """The gate's gradient by products of operands and their cotangents, summed over time.

    A pair i > j of the chunk holds the gates from j + 1 to i. So dg_l is the sum over i >= l of what token i has as a
    query less the sum over j >= l of what token j has as a key. Pairs with both after l cancel, to float32's rounding
    only, since the same rounded operands made both sums. What crosses the chunk's ends is summed without cancelling:
    reads over i >= l, writes over j < l.
    """
    q, k, g, levels, prefix, suffix, halves, (_, reads, writes, _) = residuals
    dscores, dreads, dwrites, dtotal = (x.astype(jnp.float32) for x in cotangents)
    diagonal = jnp.diagonal(dscores, axis1=-2, axis2=-1)[..., None]
    dq = dreads * prefix[:, :, :, None] + diagonal * k[:, :, :, None]
    dk = dwrites * suffix + jnp.sum(diagonal * q, 3)
    written = dwrites * writes
    net = jnp.sum(dreads * reads, 3)
    for (right, left), (queries, keys) in zip(levels, halves, strict=True):
        m = right.shape[-2]
        blocks = dscores.reshape(*dscores.shape[:-2], -1, 2, m, dscores.shape[-1] // (2 * m), 2, m)
        low = jnp.moveaxis(jnp.diagonal(blocks[..., 1, :, :, 0, :], axis1=-4, axis2=-2), -1, -3)
        dqueries = rounded_einsum(how, "nbhrsij,nbhsjk->nbhrsik", low, keys)
        dkeys = rounded_einsum(how, "nbhrsij,nbhrsik->nbhsjk", low, queries)
        dq = dq + _in_right_halves(dqueries * right[:, :, :, None])
        dk = dk + _in_left_halves(dkeys * left)
        net = net + _in_right_halves(jnp.sum(dqueries * queries, 3)) - _in_left_halves(dkeys * keys)
    dq, dk, net, written = _keep((dq, dk, net, written))
    later = jnp.triu(jnp.ones((g.shape[-2],) * 2, net.dtype))
    sums, tokens = jnp.concatenate([later, 1 - later], -1), jnp.concatenate([net, written], -2)
    dg = jnp.einsum("ij,nbhjk->nbhik", sums, tokens, precision=jax.lax.Precision.HIGHEST) + dtotal.swapaxes(-1, -2)
    return dq, dk, jnp.where(g == -jnp.inf, 0, dg)


_vector_decays.defvjp(_vector_forward, _vector_backward)


def _decays(g: Array):
    """Decays over blocks of 1, 2, 4, ... tokens of a chunk, from log decays g [..., c, d].

    Returns levels, prefix, suffix, total. levels[l] = (right, left), each [..., c / 2m, m, d] with m = 2**l: in every
    block of 2m tokens, the decays from its middle up to each token of the right half, and from after each token of the
    left half up to the middle. prefix and suffix [..., c, d] are the decays from the chunk's start and to its end, and
    total [..., 1, d] is the sum of the chunk's g.
    """
    prefix = total = _blocks_of(g, 1)
    suffix = jnp.zeros_like(prefix)
    levels = []
    while prefix.shape[-3] > 1:
        (before, right), (left, after) = _halves(prefix), _halves(suffix)
        first, second = _halves(total)
        levels.append((jnp.exp(right), jnp.exp(left)))
        prefix = jnp.concatenate([before, first + right], -2)
        suffix = jnp.concatenate([left + second, after], -2)
        total = first + second
    return levels, jnp.exp(prefix[..., 0, :, :]), jnp.exp(suffix[..., 0, :, :]), total[..., 0, :, :]


def _keep(tree):
    """The arrays as they are, in memory: XLA would make them again, and unrounded, in each place that reads them."""
    return jax.lax.optimization_barrier(tree)


def _blocks_of(x: Array, m: int) -> Array:
    """[..., c, d] -> [..., c / m, m, d]."""
    return x.reshape(*x.shape[:-2], -1, m, x.shape[-1])


def _halves(x: Array) -> tuple[Array, Array]:
    """[..., 2n, m, d] -> the even and the odd blocks, each [..., n, m, d]."""
    x = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _in_left_halves(x: Array) -> Array:
    """[..., n, m, d] -> [..., 2 n m, d] with x in the even blocks of m and zeros in the odd ones."""
    return jnp.concatenate([x, jnp.zeros_like(x)], -2).reshape(*x.shape[:-3], -1, x.shape[-1])


def _in_right_halves(x: Array) -> Array:
    """[..., n, m, d] -> [..., 2 n m, d] with x in the odd blocks of m and zeros in the even ones."""
    return jnp.concatenate([jnp.zeros_like(x), x], -2).reshape(*x.shape[:-3], -1, x.shape[-1])


def _below_diagonal(blocks: Array, low: Array) -> Array:
    """[..., 2n, m, m] and [..., n, m, m] -> [..., n, 2m, 2m]: each pair of blocks on the diagonal, `low` under it."""
    first, second = _halves(blocks)
    top = jnp.concatenate([first, jnp.zeros_like(low)], -1)
    return jnp.concatenate([top, jnp.concatenate([low, second], -1)], -2)


def _scalar_decays(levels, chunk: int, total: Array) -> Array:
    """Lower-triangular [n, b, hk, c, c]: the scalar decays from j to i."""
    decays = jnp.ones((*total.shape[:-2], chunk, 1, 1), total.dtype)
    for right, left in levels:
        decays = _below_diagonal(decays, right * left.swapaxes(-1, -2))
    return decays[..., 0, :, :]


def rounded_einsum(how: Arithmetic, spec: str, x: Array, y: Array) -> Array:
    """einsum to float32 of operands rounded as `how` says; its transposes round theirs likewise."""
    narrow = functools.partial(_einsum, how, how.dtype, spec)
    if how.dtype == jnp.float32:
        return narrow(x, y)
    # XLA's CPU backend lacks some products of bfloat16. The choice is made around the custom_vjp: inside it JAX 0.11
    # mistakes the platform's number for an operand when it is differentiated twice in a scan.
    return jax.lax.platform_dependent(x, y, cpu=functools.partial(_einsum, how, jnp.float32, spec), default=narrow)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _einsum(how, multiplied, spec, x, y):
    x, y = (operand.astype(how.dtype).astype(multiplied) for operand in (x, y))
    return jnp.einsum(spec, x, y, precision=how.precision, preferred_element_type=jnp.float32)


def _einsum_forward(how, multiplied, spec, x, y):
    return _einsum(how, multiplied, spec, x, y), (x, y)


def _einsum_backward(how, multiplied, spec, operands, ct):
    x, y = operands
    inputs, out = spec.split("->")
    a, b = inputs.split(",")
    transposed = functools.partial(_einsum, how, multiplied)
    return (
        transposed(f"{out},{b}->{a}", ct, y).astype(x.dtype),
        transposed(f"{out},{a}->{b}", ct, x).astype(y.dtype),
    )


_einsum.defvjp(_einsum_forward, _einsum_backward)
