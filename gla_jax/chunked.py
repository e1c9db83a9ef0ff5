"""Gated linear attention in chunks, in plain JAX: matmuls on every backend, exact for every gate.

Inside a chunk, a matmul needs the decay from token j to token i as (something of i) times (something of j). The usual
quotient of cumulative decays b_i / b_j over- or underflows when gates are strong. Here the chunk is halved again and again
instead: for i in the right half of a block and j in its left half, the decay is

    (product from the middle up to i) * (product from j + 1 up to the middle),

two factors that are both at most 1. A block's scores are its two halves' scores on the diagonal and one matmul below it;
log2(chunk) levels make the chunk's. Only products of decays occur, never a quotient or a difference of logarithms, so that
nothing overflows or cancels and a decay of exactly 0 (a hard reset) is a factor like any other.

Across chunks S' = Diag(total) S + (k * suffix)^T v, and a chunk reads (q * prefix) S. A scan works on one group of chunks at
a time; the backward keeps the state at each group's start and differentiates the group from there.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gla_jax.array_types import Array
from gla_jax.segments import Entries

CHUNK = 64


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

    A group has enough chunks to fill the device and no more: on a CPU its arrays stay in the cache, elsewhere few steps of
    the scan keep the launches few.
    """
    chunk = chunk or min(CHUNK, 1 << (time - 1).bit_length())
    chunks = -(-time // chunk)
    fill = 16 if jax.default_backend() == "cpu" else 256
    groups = -(-chunks // max(1, fill // (batch * heads)))
    return Plan(chunk, -(-chunks // groups))


class Arithmetic(NamedTuple):
    """What matmul operands are rounded to, and how exact a product is."""

    dtype: jnp.dtype
    precision: jax.lax.Precision | None


def arithmetic(dtype: jnp.dtype) -> Arithmetic:
    """bfloat16 multiplies as it is; float16 as float32 with at least its own bits, for its range; float32 is exact."""
    if dtype == jnp.bfloat16:
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
    if entries is not None:
        more = (0, rows // cut.chunk - entries.sequence.size)
        sequence = jnp.pad(entries.sequence, more, constant_values=entries.initial.shape[0])
        entries = Entries(entries.initial, sequence, jnp.pad(entries.first, more), jnp.pad(entries.last, more))
    o, state = _chunked(scale, cut, q, k, v, g, state, entries)
    return o[:, :time], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked(scale, cut, q, k, v, g, state, entries):
    return _forward(scale, cut, q, k, v, g, state, entries)[0]


def _forward(scale, cut, q, k, v, g, state, entries):
    def body(carry, x):
        s, finals = carry
        tokens, blocks = x
        entering = None if blocks is None else entries.initial[blocks.sequence]
        after, o, ends = _group(scale, cut, arithmetic(q.dtype), blocks, s, tokens, entering)
        if blocks is not None:
            finals = finals.at[jnp.where(blocks.last, blocks.sequence, finals.shape[0])].set(ends, mode="drop")
        return (after, finals), (s, o)

    finals = None if entries is None else entries.initial
    xs = _to_groups((q, k, v, g), cut), _blocks(entries, cut)
    (state, finals), (starts, o) = jax.lax.scan(body, (state, finals), xs)
    return (_from_groups(o), state if entries is None else finals), (q, k, v, g, starts, entries)


def _backward(scale, cut, residuals, cotangents):
    q, k, v, g, starts, entries = residuals
    do, dstate = cotangents

    def body(carry, x):
        ds, dinitial = carry
        s, tokens, do, blocks = x
        entering = dends = None
        if blocks is not None:
            entering = entries.initial[blocks.sequence]
            dends = jnp.where(blocks.last[:, None, None, None], dstate[blocks.sequence], 0)
        _, pull = jax.vjp(functools.partial(_group, scale, cut, arithmetic(q.dtype), blocks), s, tokens, entering)
        ds, dtokens, dentering = pull((ds, do, dends))
        if blocks is not None:
            firsts = jnp.where(blocks.first, blocks.sequence, dinitial.shape[0])
            dinitial = dinitial.at[firsts].set(dentering, mode="drop")
        return (ds, dinitial), dtokens

    # A sequence without tokens hands its state through, so its cotangent stays as it came.
    ds, dinitial = (dstate, None) if entries is None else (jnp.zeros_like(starts[0]), dstate)
    xs = starts, _to_groups((q, k, v, g), cut), _to_groups(do, cut), _blocks(entries, cut)
    (ds, dinitial), dtokens = jax.lax.scan(body, (ds, dinitial), xs, reverse=True)
    dentries = None if entries is None else Entries(dinitial, None, None, None)
    return *_from_groups(dtokens), ds, dentries


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


def _blocks(entries: Entries | None, cut: Plan) -> Entries | None:
    """The entries' [chunks] arrays as [groups, group], without the states."""
    if entries is None:
        return None
    return Entries(None, *(x.reshape(-1, cut.group) for x in entries[1:]))


def _group(scale, cut, how, blocks, state, tokens, entering):
    """One group of chunks from the state before it: the state after it, o, and with `blocks` the state after each chunk."""
    q, k, v, g = tokens
    batch, rows, heads, _ = q.shape
    dot = functools.partial(_dot, how)

    def chunks(x):  # [b, n * c, h, d] -> [b, h, n, c, d]
        return x.reshape(batch, cut.group, cut.chunk, x.shape[2], -1).transpose(0, 3, 1, 2, 4)

    k, v = chunks(k).astype(jnp.float32), chunks(v)
    q = chunks(q).astype(jnp.float32) * scale
    q = q.reshape(batch, k.shape[1], -1, *q.shape[2:]).swapaxes(2, 3)  # [b, hk, n, r, c, k], r = h / hk
    if g is None:
        scores = jnp.tril(dot("bhnrik,bhnjk->bhnrij", q, k))
        reads, writes, total = q, k, None
    else:
        decay = jnp.exp(chunks(g).astype(jnp.float32))  # [b, hk, n, c, k or 1]
        levels, prefix, suffix, total = _products(decay)
        if g.ndim == 4:
            scores = _scores(dot, q, k, levels)
        else:
            scores = dot("bhnrik,bhnjk->bhnrij", q, k) * _scalar_decays(levels)[:, :, :, None]
        reads, writes, total = q * prefix[:, :, :, None], k * suffix, total[..., 0, :, None]

    update = dot("bhnck,bhncv->bhnkv", writes, v)
    before, after = [], []
    for n in range(cut.group):
        if blocks is not None:
            state = jnp.where(blocks.first[n], entering[n], state)
        before.append(state)
        state = update[:, :, n] + (state if total is None else total[:, :, n] * state)
        after.append(state)
    o = dot("bhnrij,bhnjv->bhnriv", scores, v) + dot("bhnrck,bhnkv->bhnrcv", reads, jnp.stack(before, 2))
    o = o.transpose(0, 2, 4, 1, 3, 5).reshape(batch, rows, heads, -1)
    return state, o.astype(v.dtype), None if blocks is None else jnp.concatenate(after)


def _products(decay: Array):
    """Products of decays over blocks of 1, 2, 4, ... tokens of a chunk [..., c, d].

    Returns levels, prefix, suffix, total. levels[l] = (right, left), each [..., c / 2m, m, d] with m = 2**l: in every block of
    2m tokens, the products from its middle up to each token of the right half, and from after each token of the left half up
    to the middle. prefix and suffix [..., c, d] are those products from the chunk's start and to its end, and total
    [..., 1, d] that of the whole chunk.
    """
    prefix = total = decay[..., None, :]
    suffix = jnp.ones_like(prefix)
    levels = []
    while prefix.shape[-3] > 1:
        (before, right), (left, after) = _halves(prefix), _halves(suffix)
        first, second = _halves(total)
        levels.append((right, left))
        prefix = jnp.concatenate([before, first * right], -2)
        suffix = jnp.concatenate([left * second, after], -2)
        total = first * second
    return levels, prefix[..., 0, :, :], suffix[..., 0, :, :], total[..., 0, :, :]


def _halves(x: Array) -> tuple[Array, Array]:
    """[..., 2n, m, d] -> the even and the odd blocks, each [..., n, m, d]."""
    x = x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:])
    return x[..., 0, :, :], x[..., 1, :, :]


def _below_diagonal(blocks: Array, low: Array) -> Array:
    """[..., 2n, m, m] and [..., n, m, m] -> [..., n, 2m, 2m]: each pair of blocks on the diagonal, `low` under it."""
    first, second = _halves(blocks)
    top = jnp.concatenate([first, jnp.zeros_like(low)], -1)
    return jnp.concatenate([top, jnp.concatenate([low, second], -1)], -2)


def _scores(dot, q: Array, k: Array, levels) -> Array:
    """Lower-triangular [b, hk, n, r, c, c]: sum over k of q_i k_j and the decays from j to i."""
    scores = jnp.sum(q * k[:, :, :, None], -1)[..., None, None]
    for right, left in levels:
        m = right.shape[-2]
        _, q_right = _halves(q.reshape(*q.shape[:-2], -1, m, q.shape[-1]))
        k_left, _ = _halves(k.reshape(*k.shape[:-2], -1, m, k.shape[-1]))
        low = dot("bhnrsik,bhnsjk->bhnrsij", q_right * right[:, :, :, None], k_left * left)
        scores = _below_diagonal(scores, low)
    return scores[..., 0, :, :]


def _scalar_decays(levels) -> Array:
    """Lower-triangular [b, hk, n, c, c]: the products of scalar decays from j to i."""
    right, _ = levels[0]
    decays = jnp.ones((*right.shape[:-3], 2 * right.shape[-3], 1, 1), right.dtype)
    for right, left in levels:
        decays = _below_diagonal(decays, right * left.swapaxes(-1, -2))
    return decays[..., 0, :, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(how: Arithmetic, spec: str, x: Array, y: Array) -> Array:
    """einsum to float32 of operands rounded as `how` says; its transposes round theirs likewise."""
    def multiply(x, y):
        return jnp.einsum(spec, x, y, precision=how.precision, preferred_element_type=jnp.float32)

    def multiply_wide(x, y):  # XLA's CPU backend lacks some products of bfloat16
        return multiply(x.astype(jnp.float32), y.astype(jnp.float32))

    return jax.lax.platform_dependent(x.astype(how.dtype), y.astype(how.dtype), cpu=multiply_wide, default=multiply)


def _dot_forward(how, spec, x, y):
    return _dot(how, spec, x, y), (x, y)


def _dot_backward(how, spec, operands, ct):
    x, y = operands
    inputs, out = spec.split("->")
    a, b = inputs.split(",")
    return _dot(how, f"{out},{b}->{a}", ct, y).astype(x.dtype), _dot(how, f"{out},{a}->{b}", ct, x).astype(y.dtype)


_dot.defvjp(_dot_forward, _dot_backward)
