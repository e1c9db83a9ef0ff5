"""The gating role for one decay a token: as gating.py, but exact for every gate without tiers, and without large tiles.

With b_i the cumulative log decay inside the chunk (held above -120 a token) and B the chunk's,

    A = tril(q k^T exp(b_i - b_j))    q~ = q exp(b_i - r)    k~ = k exp(B - b_j)
    read = exp(r)    keep = exp(B)    post = 1

with r = B/2 where a channel's gate would be mild (gating.py), so that what is read of the state is the same, or 0.

A difference of two b is exact to 5e-4 even after 64 hard resets, and float32 gates stay float32.
"""

from jax import lax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas.gating import CHUNK, along_rows, load, lower, matmul, vector

_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def write_decayed_scores(scores, a, triangle, b, row):
    """Writes A of a chunk.

    Args:
      scores: [64, 64] tile.
      a: [64, 64] float32, q k^T.
      triangle: [64, 64] tile with the triangle of +-1/2.
      b: [64] float32 in shared memory, the cumulative log decay.
      row: [64] float32 scratch. Of two loads of b the compiler would make one, for which there is no layout.
    """
    down = plgpu.load(b, layout=_ROWS)
    row[...] = down
    plgpu.commit_smem()
    across = plgpu.load(row, layout=_COLUMNS)
    decay = jnp.exp(jnp.minimum(along_rows(down) - lax.broadcast_in_dim(across, (CHUNK, CHUNK), (1,)), 0.0))
    scores[...] = lower((a * decay).astype(scores.dtype), triangle)
    plgpu.commit_smem()


def gate_tile_by_token(q, k, b, factors, mild):
    """Gates one tile in place: q and k become q~ and k~.

    Args:
      q, k: [64 tokens, 64 channels] tiles.
      b: [64] float32 in shared memory, the cumulative log decay.
      factors: [3, 64] float32 for read, keep and post.
      mild: the largest -B of which read takes a half.

    Returns:
      q k^T, and whether read is exp(B/2).
    """
    a = matmul(q, k.T)
    down = plgpu.load(b, layout=_ROWS)
    # b decreases, so the chunk's is the last.
    is_mild = b[CHUNK - 1] >= -mild
    total = vector(1.0) * b[CHUNK - 1]
    half = total * jnp.where(is_mild, 0.5, 0.0)
    for_q, for_k = along_rows(jnp.exp(down - half)), along_rows(jnp.exp(total - down))
    factors[0] = jnp.exp(half)
    factors[1] = jnp.exp(total)
    factors[2] = vector(1.0)
    # All warps are done with the product before its operands change.
    plgpu.commit_smem()
    q[...] = (load(q) * for_q).astype(q.dtype)
    k[...] = (load(k) * for_k).astype(k.dtype)
    plgpu.commit_smem()
    return a, is_mild
