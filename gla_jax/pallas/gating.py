"""The gating role of the forward kernel: q, k and g of one chunk become scaled operands, scores and three factors.

Notation of one chunk of 64 tokens and one channel: g_i <= 0 the log decay of token i, b_i = g_0 + ... + g_i, B = b_63.
For the state S that enters the chunk, with A the [64, 64] scores inside it,

    o = q~ (read * S) + A v        S' = post * (keep * S + k~^T v)

A mild chunk is centred on half its decay: with E_i = b_i - B/2, q~ = q exp(E), k~ = k exp(-E), A = tril(q~ k~^T) and
read = keep = post = exp(B/2). E is one product of g with a triangle of +-1/2, exact in bfloat16.

Any other chunk takes factors that are at most 1, whatever the gates: q~ = q exp(b_i), k~ = k exp(B - b_j), read = 1,
keep = exp(B), post = 1, and A in six levels. At level m, a token i in the right half of a block of 2^(m+1) tokens meets
a token j in its left half through the middle of the block: A_ij = (q_i D(middle..i)) . (k_j D(j+1..middle-1)), where D
is a product of decays. Right halves need only q and left halves only k, so one tile X holds both and A's level is X X^T
under a mask. Every exponent is a sum of g over a range, a product of g with a matrix of zeros and ones: nothing is
subtracted, and -inf (held at -120, whose exponential is 0 in float32) is exact.
"""

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


def _matmul(pairs, m=CHUNK, n=CHUNK):
    def run(acc):
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((m, n), jnp.float32))


def _load(ref):
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def _total(matrix, g):
    """The last row of matrix @ g, [64 channels] along the rows: the least of its last eight, as sums of g decrease."""
    return jnp.min(_matmul([(g.T, matrix.at[_LAST].T)], n=8), axis=1)


def write_triangle(triangle):
    """The triangle of +-1/2 that centres a chunk's cumulative decay."""
    rows, columns = _iotas()
    triangle[...] = jnp.where(rows >= columns, 0.5, -0.5).astype(triangle.dtype)
    plgpu.commit_smem()


def gate_chunk(q, k, g, scores, factors, triangle, flag, zero, mild):
    """Gates one chunk in place.

    Args:
      q, k, g: [blocks, 64 tokens, 64 channels] tiles; q and k become q~ and k~, g is overwritten.
      scores: [1, 64, 64] tile for A.
      factors: [3, blocks, 64] float32 for read, keep and post.
      triangle: [1, 64, 64] tile with the triangle of +-1/2, the same afterwards.
      flag: [1] float32 scratch.
      zero: [1] int32 that holds 0, unknown to the compiler.
      mild: the largest |B| that the centred form takes.
    """
    blocks = q.shape[0]
    least = None
    halves = []
    for i in range(blocks):
        half = _total(triangle.at[0], g.at[i])
        halves.append(half)
        low = jnp.min(half)
        least = low if least is None else jnp.minimum(least, low)
    flag[0] = least
    is_mild = flag[0] >= -0.5 * mild

    @pl.when(is_mild)
    def _centred():
        for i in range(blocks):
            e = _matmul([(triangle.at[0], g.at[i])])
            factor = jnp.exp(halves[i])
            for j in range(3):
                factors[j, i] = factor
            q[i] = (_load(q.at[i]) * jnp.exp(e)).astype(q.dtype)
            k[i] = (_load(k.at[i]) * jnp.exp(-e)).astype(k.dtype)
        plgpu.commit_smem()
        a = _matmul([(q.at[i], k.at[i].T) for i in range(blocks)])
        rows, columns = _iotas()
        scores[0] = jnp.where(rows >= columns, a, 0.0).astype(scores.dtype)

    @pl.when(jnp.logical_not(is_mild))
    def _levels():
        _gate_by_levels(q, k, g, scores, factors, triangle, zero)

    plgpu.commit_smem()


def _gate_by_levels(q, k, g, scores, factors, triangle, zero):
    blocks = q.shape[0]
    # Indices read from memory keep addresses from being computed, and spilled, ahead of the loop over levels.
    for i in range(blocks):
        g[i] = jnp.maximum(_load(g.at[i]), FLOOR).astype(g.dtype)
    plgpu.commit_smem()
    rows, columns = _iotas()
    a = _matmul([(q.at[i], k.at[i].T) for i in range(blocks)])
    a = jnp.where(rows == columns, a, 0.0)

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
            decay = jnp.exp(_matmul([(triangle.at[z], g.at[i + z])]))
            x = jnp.where(right, _load(q.at[i + z]), _load(k.at[i + z])) * decay
            scores[z] = x.astype(scores.dtype)
            plgpu.commit_smem()
            a += jnp.where(right & (row_half == column_half + 1), _matmul([(scores.at[z], scores.at[z].T)]), 0.0)
        return a

    a = lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), level, a)
    z = zero[0]
    scores[z] = a.astype(scores.dtype)
    rows, columns = _iotas()
    rows += z
    triangle[z] = jnp.where(columns > rows, 1.0, 0.0).astype(triangle.dtype)
    plgpu.commit_smem()
    for i in range(blocks):
        z = zero[0]
        k[i + z] = (_load(k.at[i + z]) * jnp.exp(_matmul([(triangle.at[z], g.at[i + z])]))).astype(k.dtype)
    z = zero[0]
    triangle[z] = jnp.where(columns <= rows, 1.0, 0.0).astype(triangle.dtype)
    plgpu.commit_smem()
    one = plgpu.layout_cast(jnp.ones((CHUNK,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    for i in range(blocks):
        z = zero[0]
        q[i + z] = (_load(q.at[i + z]) * jnp.exp(_matmul([(triangle.at[z], g.at[i + z])]))).astype(q.dtype)
        factors[0, i + z] = one
        factors[1, i + z] = jnp.exp(_total(triangle.at[z], g.at[i + z]))
        factors[2, i + z] = one
    write_triangle(triangle.at[z])
