"""What one chunk gives to the gradients of q, k and g in 64 channels.

Notation of gating.py: b_i the decay summed up to token i of the chunk, B the chunk's; S the state before the chunk, dS'
the cotangent of the one after it, do the output's. In every form

    q~, k~    operands with decays in them, scale in q~          A = tril(q~ k~^T)    dA = tril(do v^T)
    dq~ = do S~^T + dA k~        dk~ = v D^T + dA^T q~            (S~ and D the state and dS', as scaled by the form)

**Mild**: centred, E_i = b_i - B/2, q~ = scale q exp(E), k~ = k exp(-E), S~ = exp(B/2) S, D = exp(B/2) dS'; so
dq = scale exp(E) dq~ and dk = exp(-E) dk~. A gate at token l decays what queries from l on take from keys before l:

    dg_l = rowsum(S~ D) + sum_{i >= l} z_i + sum_{j < l} w_j        w = k~ (v D^T)    z = q~ dq~ - k~ (dA^T q~)

The pairs inside the chunk that l does not part cancel in z, whose two terms are made of the same rounded operands; all
else only adds up. With the triangle M of +-1/2 that makes E, the sums are M^T (z - w) and half of all of z + w.

**Anything else** uses only sums of g as exponents and differentiates just those: for x = y exp(N g) with N of zeros and
ones, dy = dx exp(N g) and dg = N^T (x dx). Nothing is ever subtracted. Here x is q~ = scale q exp(b_i), k~ =
k exp(B - b_j), and on each of six levels the tile X of gating.py (scale in its queries), which made A's level X X^T;
its cotangent is (P + P^T) X, with P = dA where a query of a block's right half meets a key of its left half.

A warp reads and writes its own 16 rows of a tile; only wgmma reads all of a tile. So a tile is committed (a barrier
of the warpgroup) after it is written, and once more between the last wgmma that reads it and the next write.
"""

from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas.backward_config import VALUE_BLOCKS
from gla_jax.pallas.backward_states import COLUMNS, LAST, TILE, matmul, matmuls, numbers
from gla_jax.pallas.gating import CHUNK, FLOOR, LEVELS, along_rows, load, write_triangle


class Tiles(NamedTuple):
    """Shared memory of one warpgroup's 64 channels of a chunk: [64, 64] tiles unless said.

    q, k: in the inputs, out q~ and k~.
    g: in the gates, out dg.
    state: [2], in S~ [k, v], out dq and dk.
    d: [2], D [k, v].
    v, do: [2], not written.
    scores: out A.
    triangle: +-1/2, the same afterwards.
    row: [64] float32 scratch.
    zero: [1] int32 that holds 0, unknown to the compiler.
    """

    q: Any
    k: Any
    g: Any
    state: Any
    d: Any
    v: Any
    do: Any
    scores: Any
    triangle: Any
    row: Any
    zero: Any


def _along_columns(x, row):
    """[64, 64] with x[i], given along the rows, all along column i; through `row` of shared memory."""
    row[...] = x
    plgpu.commit_smem()
    return lax.broadcast_in_dim(plgpu.layout_cast(row[...], COLUMNS), TILE, (1,))


def _crossing(t, ds, factor):
    """rowsum(S~ * dS') * factor, along the rows."""
    total = jnp.sum(load(t.state.at[0]) * ds[0], axis=1)
    for i in range(1, VALUE_BLOCKS):
        total += jnp.sum(load(t.state.at[i]) * ds[i], axis=1)
    return total * factor


def _numbers(t):
    # An index read from memory keeps masks and addresses from being computed, and spilled, ahead of the loop.
    z = t.zero[0]
    rows, columns = numbers()
    return rows + z, columns + z


def _lower(t, a):
    rows, columns = _numbers(t)
    return jnp.where(rows >= columns, a, 0.0)


def _split(x, high, low):
    """x in two tiles, twice as exact as in one."""
    rounded = x.astype(high.dtype)
    high[...] = rounded
    low[...] = (x - rounded.astype(jnp.float32)).astype(low.dtype)


def _reads(t):
    return [(t.do.at[i], t.state.at[i].T) for i in range(VALUE_BLOCKS)]


def _writes(t):
    return [(t.v.at[i], t.d.at[i].T) for i in range(VALUE_BLOCKS)]


def _score_cotangents(t):
    return [(t.do.at[i], t.v.at[i].T) for i in range(VALUE_BLOCKS)]


def mild_gradients(t, ds, post, scale, wait_values):
    """The centred form, in place.

    Args:
      t: the Tiles; g is destroyed before dg is in it.
      ds: dS' in float32, two tiles [k, v].
      post: [64] along the rows, exp(B/2).
      scale: factor of o.
      wait_values: waits for v, do and the state.
    """
    e = matmul([(t.triangle, t.g)])
    t.q[...] = (load(t.q) * (jnp.exp(e) * scale)).astype(t.q.dtype)
    t.k[...] = (load(t.k) * jnp.exp(-e)).astype(t.k.dtype)
    wait_values()
    t.scores[...] = _lower(t, matmul(_score_cotangents(t))).astype(t.scores.dtype)
    crossing = _crossing(t, ds, post)
    plgpu.commit_smem()

    dq = matmul([*_reads(t), (t.scores, t.k)])
    z = load(t.q) * dq
    dq = (dq * (jnp.exp(e) * scale)).astype(t.state.dtype)
    inside, across = matmuls([(t.scores.T, t.q)], _writes(t))
    z -= load(t.k) * inside
    dk = ((inside + across) * jnp.exp(-e)).astype(t.state.dtype)
    w = load(t.k) * across
    plgpu.commit_smem()
    _split(z - w, t.g, t.state.at[0])
    _split(z + w, t.scores, t.state.at[1])
    plgpu.commit_smem()

    def sums(dg, half, a):
        for products in (t.g, t.state.at[0]):
            plgpu.wgmma(dg, t.triangle.T, products)
        for products in (t.scores, t.state.at[1]):
            plgpu.wgmma(half, products.T, t.triangle.at[LAST].T)
        plgpu.wgmma(a, t.q, t.k.T)
        # The triangle's last row is all 1/2.
        column = plgpu.broadcasted_iota(jnp.int32, (CHUNK, 8), 1, layout=plgpu.Layout.WGMMA) + t.zero[0]
        return dg[...], jnp.sum(jnp.where(column == 7, half[...], 0.0), axis=1), a[...]

    wide = plgpu.ACC(TILE, jnp.float32)
    dg, half, a = pl.run_scoped(sums, wide, plgpu.ACC((CHUNK, 8), jnp.float32), wide)
    dg += _along_columns(crossing + half, t.row)  # has a barrier
    t.g[...] = dg.astype(t.g.dtype)
    t.state[0] = dq
    t.state[1] = dk
    t.scores[...] = _lower(t, a).astype(t.scores.dtype)


def _write_mask(t, keep):
    t.triangle[...] = jnp.where(keep, 1.0, 0.0).astype(t.triangle.dtype)
    plgpu.commit_smem()


def _decay(t):
    return jnp.exp(matmul([(t.triangle, t.g)]))


def exact_gradients(make_tiles, ds, total, scale, wait_values):
    """The form for every gate, in place.

    As `mild_gradients`, but total is B, D is written here, and make_tiles makes the Tiles, with addresses of its own.
    """
    t = make_tiles()
    rows, columns = _numbers(t)
    t.g[...] = jnp.maximum(load(t.g), FLOOR).astype(t.g.dtype)
    wait_values()
    for i in range(VALUE_BLOCKS):
        t.d[i] = ds[i].astype(t.d.dtype)
    crossing = _crossing(t, ds, jnp.exp(total))
    _write_mask(t, columns <= rows)

    # Between chunks. D is a place for products from here on.
    product = t.d.at[0]
    decay = _decay(t)
    dq = matmul(_reads(t)) * (decay * scale)
    dk = matmul(_writes(t))
    plgpu.commit_smem()
    product[...] = (load(t.q) * dq).astype(product.dtype)
    plgpu.commit_smem()
    dg = matmul([(t.triangle.T, product)])
    plgpu.commit_smem()
    rows, columns = _numbers(t)
    _write_mask(t, columns > rows)
    dk = dk * _decay(t)
    product[...] = (load(t.k) * dk).astype(product.dtype)
    plgpu.commit_smem()
    dg += matmul([(t.triangle.T, product)])

    # Inside: dA on both sides of the diagonal in state[0], A in state[1].
    t = make_tiles()
    below = matmul(_score_cotangents(t))
    rows, columns = _numbers(t)
    t.state[0] = below.astype(t.state.dtype)
    diagonal = along_rows(jnp.sum(jnp.where(rows == columns, below, 0.0), axis=1))
    dq += diagonal * load(t.k) * scale
    dk += diagonal * load(t.q) * scale
    above = matmul([(t.v.at[i], t.do.at[i].T) for i in range(VALUE_BLOCKS)])
    t.state[0] = jnp.where(rows >= columns, load(t.state.at[0]), above).astype(t.state.dtype)
    a = matmul([(t.q, t.k.T)])
    t.state[1] = jnp.where(rows == columns, a * scale, 0.0).astype(t.state.dtype)
    plgpu.commit_smem()

    def level(m, sums):
        dq, dk, dg = sums
        t = make_tiles()
        product = t.d.at[0]
        rows, columns = _numbers(t)
        row_half, column_half = rows >> m, columns >> m
        right = (row_half & 1) == 1
        meets = (row_half >> 1 == column_half >> 1) & (row_half != column_half)
        d_scores = load(t.state.at[0])
        t.scores[...] = jnp.where(meets, d_scores, 0.0).astype(t.scores.dtype)
        _write_mask(t, (row_half == column_half) & ((columns <= rows) == right))
        x = jnp.where(right, load(t.q) * scale, load(t.k)) * _decay(t)
        product[...] = x.astype(product.dtype)
        plgpu.commit_smem()
        a = matmul([(product, product.T)])
        t.state[1] = jnp.where(meets & right, a, load(t.state.at[1])).astype(t.state.dtype)
        dx = matmul([(t.scores, product)])
        net = load(product) * dx
        # Made again rather than held: registers are short here.
        dx = dx * _decay(t)
        dq += jnp.where(right, dx * scale, 0.0)
        dk += jnp.where(right, 0.0, dx)
        plgpu.commit_smem()
        product[...] = net.astype(product.dtype)
        plgpu.commit_smem()
        dg += matmul([(t.triangle.T, product)])
        plgpu.commit_smem()
        return dq, dk, dg

    dq, dk, dg = lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), level, (dq, dk, dg))
    t = make_tiles()
    t.scores[...] = load(t.state.at[1]).astype(t.scores.dtype)
    t.state[0] = dq.astype(t.state.dtype)
    t.state[1] = dk.astype(t.state.dtype)

    # What the other products of the chunk need: q~, k~ and D.
    t.d[0] = ds[0].astype(t.d.dtype)
    rows, columns = _numbers(t)
    _write_mask(t, columns <= rows)
    t.q[...] = (load(t.q) * (_decay(t) * scale)).astype(t.q.dtype)
    plgpu.commit_smem()
    rows, columns = _numbers(t)
    _write_mask(t, columns > rows)
    t.k[...] = (load(t.k) * _decay(t)).astype(t.k.dtype)
    dg += _along_columns(crossing, t.row)  # has a barrier
    t.g[...] = jnp.where(load(t.g) <= FLOOR, 0.0, dg).astype(t.g.dtype)
    write_triangle(t.triangle)
