"""The gating role of the forward kernel: q, k and g of one chunk become scaled operands, scores and three factors.

Notation of one chunk of 64 tokens and one channel: g_i <= 0 the log decay of token i, b_i = g_0 + ... + g_i, B = b_63.
For the state S that enters the chunk, with A the [64, 64] scores inside it,

    o = q~ (read * S) + A v        S' = post * (keep * S + k~^T v)

A mild chunk is centred on half its decay: with E_i = b_i - B/2, q~ = q exp(E), k~ = k exp(-E), A = tril(q~ k~^T) and
read = keep = post = exp(B/2). E is one product of g with a triangle of +-1/2, exact in bfloat16.

A chunk that hard resets of whole tokens alone keep from being mild is gated as if they were not there, and then cut: no
score across a reset, q~ = 0 after the first one, k~ = 0 before the last one, keep = 0.

Any other chunk takes factors that are at most 1, whatever the gates: q~ = q exp(b_i), k~ = k exp(B - b_j), read = 1,
keep = exp(B), post = 1, and A in six levels. At level m, a token i in the right half of a block of 2^(m+1) tokens meets
a token j in its left half through the middle of the block: A_ij = (q_i D(middle..i)) . (k_j D(j+1..middle-1)), where D
is a product of decays. Right halves need only q and left halves only k, so one tile X holds both and A's level is X X^T
under a mask. Every exponent is a sum of g over a range, a product of g with a matrix of zeros and ones: nothing is
subtracted, and -inf (held at -120, whose exponential is 0 in float32) is exact.

A warp reads and writes its own 16 rows of a tile; only wgmma reads all of a tile. So a tile is committed (a barrier
of the warpgroup) after it is written, and once more between the last wgmma that reads it and the next write.
"""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
LEVELS = 6
# exp of it is 0 in float32, so it stands for -inf, and sums of 64 of them stay finite.
FLOOR = -120.0
_LAST = pl.ds(CHUNK - 8, 8)


def _iotas():
    """Row and column numbers of a [64, 64] tile in the accumulators' layout."""
    shape = (CHUNK, CHUNK)
    return tuple(plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))


def matmul(pairs, m=CHUNK, n=CHUNK):
    """The sum of the products of pairs of tiles, [m, n] in float32."""

    def run(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((m, n), jnp.float32))


def load(ref):
    """A tile in the accumulators' layout, in float32."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def write_triangle(triangle):
    """The triangle of +-1/2 that centres a chunk's cumulative decay."""
    rows, columns = _iotas()
    triangle[...] = jnp.where(rows >= columns, 0.5, -0.5).astype(triangle.dtype)
    plgpu.commit_smem()


def lower(a):
    """The lower triangle of a [64, 64] tile, zeros above it whatever is there."""
    rows, columns = _iotas()
    return jnp.where(rows >= columns, a, 0.0)


def along_rows(x):
    """[64, 64] with x[i] all along row i."""
    return lax.broadcast_in_dim(x, (CHUNK, CHUNK), (0,))


def _centre(triangle, g):
    """E_i, and B/2 along the rows for each block of channels: of the first block E, of all of them B/2."""

    def run(e, *totals):
        for i, total in enumerate(totals):
            plgpu.wgmma(total, g.at[i].T, triangle.at[0, _LAST].T)
        plgpu.wgmma(e, triangle.at[0], g.at[0])
        return e[...], [jnp.min(total[...], axis=1) for total in totals]

    narrow = plgpu.ACC((CHUNK, 8), jnp.float32)
    return pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), jnp.float32), *[narrow] * g.shape[0])


def _reduce(reduction, x, row):
    """One number of a vector along the rows, through `row` of shared memory.

    A reduction across warps takes scratch that the compiler allots once for all warpgroups: two that gate at the same
    time would mix their numbers. Read along the columns, every warp has all of the vector.
    """
    row[...] = x
    plgpu.commit_smem()
    return reduction(plgpu.layout_cast(row[...], plgpu.Layout.WGMMA.reduce(0)))


def _least(halves, row):
    return _reduce(jnp.min, functools.reduce(jnp.minimum, halves), row)


def gate_chunk(q, k, g, scores, factors, triangle, rows, zero, mild):
    """Gates one chunk in place.

    Args:
      q, k, g: [blocks, 64 tokens, 64 channels] tiles; q and k become q~ and k~, g is overwritten.
      scores: [1, 64, 64] tile for A.
      factors: [3, blocks, 64] float32 for read, keep and post.
      triangle: [1, 64, 64] tile with the triangle of +-1/2, the same afterwards.
      rows: [3, 64] float32 scratch.
      zero: [1] int32 that holds 0, unknown to the compiler.
      mild: the largest |B| that the centred form takes.
    """
    e, halves = _centre(triangle, g)
    is_mild = _least(halves, rows.at[0]) >= -0.5 * mild

    @pl.when(is_mild)
    def _centred():
        for i, half in enumerate(halves):
            factor = jnp.exp(half)
            for j in range(3):
                factors[j, i] = factor
        a = _scale_and_score(q, k, g, triangle, e)
        scores[0] = lower(a).astype(scores.dtype)

    @pl.when(jnp.logical_not(is_mild))
    def _strong():
        _gate_with_resets(q, k, g, scores, factors, triangle, rows, zero, mild)

    plgpu.commit_smem()


def _scale_and_score(q, k, g, triangle, e):
    """q exp(E) and k exp(-E) in place, and their product; e is the first block's."""
    blocks = q.shape[0]
    for i in range(blocks):

        def run(following, i=i, e=e):
            if i + 1 < blocks:
                plgpu.wgmma(following, triangle.at[0], g.at[i + 1])
            scaled_q = (load(q.at[i]) * jnp.exp(e)).astype(q.dtype)
            scaled_k = (load(k.at[i]) * jnp.exp(-e)).astype(k.dtype)
            q[i] = scaled_q
            k[i] = scaled_k
            return following[...] if i + 1 < blocks else e

        e = pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), jnp.float32))
    plgpu.commit_smem()
    return matmul([(q.at[i], k.at[i].T) for i in range(blocks)])


def _gate_with_resets(q, k, g, scores, factors, triangle, rows, zero, mild):
    blocks = q.shape[0]
    z = zero[0]
    highest = jnp.max(load(g.at[z]), axis=1)
    for i in range(1, blocks):
        highest = jnp.maximum(highest, jnp.max(load(g.at[i + z]), axis=1))
    reset = jnp.where(highest <= FLOOR, 1.0, 0.0)
    # Has a barrier: every warp has read what it needs of g, and no wgmma reads it any more.
    resets = _reduce(jnp.sum, reset, rows.at[1])
    for i in range(blocks):
        g[i + z] = jnp.maximum(jnp.where(along_rows(reset) > 0, 0.0, load(g.at[i + z])), FLOOR).astype(g.dtype)
    scores[z] = along_rows(reset).astype(scores.dtype)
    plgpu.commit_smem()
    e, halves = _centre(triangle, g)
    is_mild = (_least(halves, rows.at[2]) >= -0.5 * mild) & (resets > 0)

    @pl.when(is_mild)
    def _cut():
        _gate_around_resets(q, k, g, scores, factors, triangle, zero, e, halves, resets)

    @pl.when(jnp.logical_not(is_mild))
    def _levels():
        for i in range(blocks):
            g[i + z] = jnp.where(along_rows(reset) > 0, FLOOR, load(g.at[i + z])).astype(g.dtype)
        plgpu.commit_smem()
        _gate_by_levels(q, k, g, scores, factors, triangle, zero)


def _gate_around_resets(q, k, g, scores, factors, triangle, zero, e, halves, resets):
    """Gates a chunk whose resets are rows of ones in `scores` and rows of zeros in g."""
    z = zero[0]
    # Row i: how many resets come up to token i, less half of all.
    count = jnp.max(matmul([(triangle.at[z], scores.at[z])], n=CHUNK), axis=1)
    a = _scale_and_score(q, k, g, triangle, e)
    same = along_rows(count) == matmul([(scores.at[z].T, triangle.at[z].T)])
    plgpu.commit_smem()
    z = zero[0]
    scores[z] = jnp.where(same, lower(a), 0.0).astype(scores.dtype)
    after_first = along_rows(jnp.where(count > 0.25 - 0.5 * resets, 0.0, 1.0))
    after_last = along_rows(jnp.where(count < 0.5 * resets - 0.25, 0.0, 1.0))
    nothing = plgpu.layout_cast(jnp.zeros((CHUNK,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    for i, half in enumerate(halves):
        q[i + z] = (load(q.at[i + z]) * after_first).astype(q.dtype)
        k[i + z] = (load(k.at[i + z]) * after_last).astype(k.dtype)
        factors[0, i + z] = jnp.exp(half)
        factors[1, i + z] = nothing
        factors[2, i + z] = jnp.exp(half)


def _gate_by_levels(q, k, g, scores, factors, triangle, zero):
    blocks = q.shape[0]
    rows, columns = _iotas()
    a = matmul([(q.at[i], k.at[i].T) for i in range(blocks)])
    a = jnp.where(rows == columns, a, 0.0)

    # Indices read from memory keep addresses from being computed, and spilled, ahead of the loop.
    def level(m, a):
        z = zero[0]
        rows, columns = _iotas()
        rows += z
        columns += z
        row_half, column_half = rows >> m, columns >> m
        right = (row_half & 1) == 1
        within = (row_half == column_half) & ((columns <= rows) == right)
        triangle[z] = jnp.where(within, 1.0, 0.0).astype(triangle.dtype)
        plgpu.commit_smem()
        for i in range(blocks):
            z = zero[0]
            decay = jnp.exp(matmul([(triangle.at[z], g.at[i + z])]))
            x = jnp.where(right, load(q.at[i + z]), load(k.at[i + z])) * decay
            if i:
                plgpu.commit_smem()
            scores[z] = x.astype(scores.dtype)
            plgpu.commit_smem()
            a += jnp.where(right & (row_half == column_half + 1), matmul([(scores.at[z], scores.at[z].T)]), 0.0)
        return a

    a = lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), level, a)
    z = zero[0]
    rows, columns = _iotas()
    rows += z
    triangle[z] = jnp.where(columns > rows, 1.0, 0.0).astype(triangle.dtype)
    plgpu.commit_smem()
    scores[z] = a.astype(scores.dtype)
    for i in range(blocks):
        z = zero[0]
        k[i + z] = (load(k.at[i + z]) * jnp.exp(matmul([(triangle.at[z], g.at[i + z])]))).astype(k.dtype)
    plgpu.commit_smem()
    z = zero[0]
    triangle[z] = jnp.where(columns <= rows, 1.0, 0.0).astype(triangle.dtype)
    plgpu.commit_smem()
    one = plgpu.layout_cast(jnp.ones((CHUNK,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    for i in range(blocks):
        z = zero[0]
        q[i + z] = (load(q.at[i + z]) * jnp.exp(matmul([(triangle.at[z], g.at[i + z])]))).astype(q.dtype)
        factors[0, i + z] = one
        factors[1, i + z] = jnp.exp(jnp.min(matmul([(g.at[i + z].T, triangle.at[z, _LAST].T)], n=8), axis=1))
        factors[2, i + z] = one
    plgpu.commit_smem()
    write_triangle(triangle.at[z])
