"""The gating role for one decay a token: as gating.py, but exact for every gate without tiers, and without large tiles.

With b_i the cumulative log decay inside the chunk (held above -120 a token) and B the chunk's,

    A = tril(q k^T exp(b_i - b_j))    q~ = q exp(b_i)    k~ = k exp(B - b_j)    read = post = 1    keep = exp(B)

A difference of two b is exact to 5e-4 even after 64 hard resets, and float32 gates stay float32.
"""

from jax import lax
from jax import numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas.gating import CHUNK, along_rows, load, lower, matmul

_TILE = (CHUNK, CHUNK)


def gate_chunk_by_token(q, k, b, scores, factors, row):
    """Gates one chunk in place.

    Args:
      q, k: [blocks, 64 tokens, 64 channels] tiles; become q~ and k~.
      b: [64] float32, the cumulative log decay.
      scores: [1, 64, 64] tile for A.
      factors: [3, blocks, 64] float32 for read, keep and post.
      row: [64] float32 scratch.
    """
    blocks = q.shape[0]
    down = plgpu.load(b, layout=plgpu.Layout.WGMMA.reduce(1))
    # Through a row of its own: of two loads of b the compiler would make one, for which there is no layout.
    row[...] = down
    plgpu.commit_smem()
    across = plgpu.load(row, layout=plgpu.Layout.WGMMA.reduce(0))
    # b decreases, so its least is the last. Along the columns every warp has all of it: no reduction across warps.
    one = plgpu.layout_cast(jnp.ones((CHUNK,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    total = one * jnp.min(across)
    a = matmul([(q.at[i], k.at[i].T) for i in range(blocks)])
    decay = jnp.exp(jnp.minimum(along_rows(down) - lax.broadcast_in_dim(across, _TILE, (1,)), 0.0))
    scores[0] = lower(a * decay).astype(scores.dtype)
    # All warps are done with the product before its operands change.
    plgpu.commit_smem()
    for_q, for_k = along_rows(jnp.exp(down)), along_rows(jnp.exp(total - down))
    for i in range(blocks):
        q[i] = (load(q.at[i]) * for_q).astype(q.dtype)
        k[i] = (load(k.at[i]) * for_k).astype(k.dtype)
        factors[0, i] = one
        factors[1, i] = jnp.exp(total)
        factors[2, i] = one
    plgpu.commit_smem()
