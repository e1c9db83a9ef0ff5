"""What one chunk gives to the gradients of q, k and g in 64 channels.

Notation of gating.py: b_i the decay summed up to token i of the chunk, B the chunk's; S the state before the chunk, dS'
the cotangent of the one after it, do the output's. In every form

    q~, k~    operands with decays in them, scale in q~          A = tril(q~ k~^T)    dA = tril(do v^T)
    dq~ = do S~^T + dA k~        dk~ = v D^T + dA^T q~            (S~ and D the state and dS', as scaled by the form)

**Mild**: centred, E_i = b_i - B/2, q~ = scale q exp(E), k~ = k exp(-E), S~ = exp(B/2) S, D = exp(B/2) dS'; so
dq = scale exp(E) dq~ and dk = exp(-E) dk~. A gate at token l decays what queries from l on take from keys before l:

    dg_l = rowsum(S~ D) + sum_{i >= l} z_i + sum_{j < l} w_j        w = k~ (v D^T)    z = q~ dq~ - k~ (dA^T q~)

The pairs inside the chunk that l does not part cancel in z, whose two terms are made of the same rounded operands; all
else only adds up. With the triangle L of ones the sums are L^T z and L w - w. z takes two tiles, the second for what
the first lost in rounding.

**Anything else** uses only sums of g as exponents and differentiates just those: for x = y exp(N g) with N of zeros and
ones, dy = dx exp(N g) and dg = N^T (x dx). Nothing is ever subtracted. Here x is q~ = scale q exp(b_i), k~ =
k exp(B - b_j), and on each of six levels the tile X of gating.py (scale in its queries), which made A's level X X^T;
its cotangent is (P + P^T) X, with P = dA where a query of a block's right half meets a key of its left half.

Where sequences begin inside a chunk (gating.Starts), the mild form has no pairs across in A and dA, and of the tokens'
rows those of do S~^T are left out from the first beginning on, those of v D^T before the last one; so are those of q~
and k~, for the products that follow. In the other form such a token's gate becomes a hard reset.

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
from gla_jax.pallas.gating import CHUNK, FLOOR, LEVELS, Starts, along_rows, load

LOG2_E = 1.4426950408889634


class Tiles(NamedTuple):
    """Shared memory of one warpgroup's 64 channels of a chunk: [64, 64] tiles unless said.

    q, k: in the inputs, out q~ and k~.
    g: in the gates, out dg.
    state: [2], in S~ [k, v], destroyed.
    d: [2], out D [k, v].
    v, do: [2], not written.
    scores: out A.
    lower: ones on and below the diagonal, the same afterwards.
    row: [64] float32 scratch.
    zero: 0, unknown to the compiler.
    marks: what `Starts` reads; None if no sequence can begin inside a chunk.
    """

    q: Any
    k: Any
    g: Any
    state: Any
    d: Any
    v: Any
    do: Any
    scores: Any
    lower: Any
    row: Any
    zero: Any
    marks: Any

    @property
    def starts(self):
        """Read anew each time: registers are short."""
        return None if self.marks is None else Starts.read(self.marks)


def along_columns(row):
    """[64, 64] with row[i] of shared memory all along column i."""
    return lax.broadcast_in_dim(plgpu.load(row, layout=COLUMNS), TILE, (1,))


def _numbers(t):
    rows, columns = numbers()
    return rows + t.zero, columns + t.zero


def _keep_lower(t, a):
    # Masks made of numbers would be computed, and spilled, ahead of the loop. A product would not do: inf * 0.
    a = jnp.where(load(t.lower) > 0.5, a, 0.0)
    return a if t.marks is None else t.starts.same(a)


def split_in_two(x, high, low):
    """x in two tiles, twice as exact as in one."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-(1 << 16))
    rounded = lax.bitcast_convert_type(bits, jnp.float32) if high.dtype == jnp.bfloat16 else None
    if rounded is None:
        rounded = x.astype(high.dtype).astype(jnp.float32)
    high[...] = rounded.astype(high.dtype)
    low[...] = (x - rounded).astype(low.dtype)


def _reads(t):
    return [(t.do.at[i], t.state.at[i].T) for i in range(VALUE_BLOCKS)]


def _writes(t):
    return [(t.v.at[i], t.d.at[i].T) for i in range(VALUE_BLOCKS)]


def _score_cotangents(t):
    return [(t.do.at[i], t.v.at[i].T) for i in range(VALUE_BLOCKS)]


def _crossing(t, ds, factor):
    """rowsum(S~ * dS') * factor, along the rows."""
    return sum(jnp.sum(load(t.state.at[i]) * ds[i], axis=1) for i in range(VALUE_BLOCKS)) * factor


def write_lower(lower):
    """Ones on and below the diagonal of a tile."""
    rows, columns = numbers()
    lower[...] = jnp.where(columns <= rows, 1.0, 0.0).astype(lower.dtype)
    plgpu.commit_smem()


def mild_gradients(t, ds, scale, wait_values, wait_cotangents, free_tokens):
    """The centred form, in place.

    Args:
      t: the Tiles; g is destroyed before dg is in it.
      ds: dS' in float32, two tiles [k, v].
      scale: factor of o.
      wait_values: waits for v and the state.
      wait_cotangents: waits for do, which comes last.
      free_tokens: waits until what the last chunk made is stored; meanwhile every warp has read the row.

    Returns:
      dq and dk, [64, 64] of the tiles' dtype, exp(B/2) along the rows, and once more, but 0 if a sequence begins in the
      chunk.
    """
    sums, total = _sums(t)
    half = 0.5 * total
    t.row[...] = half
    plgpu.commit_smem()
    e = (sums - along_columns(t.row)) * LOG2_E
    t.q[...] = (load(t.q) * (jnp.exp2(e) * scale)).astype(t.q.dtype)
    t.k[...] = (load(t.k) * jnp.exp2(-e)).astype(t.k.dtype)
    free_tokens()
    for i in range(VALUE_BLOCKS):
        t.d[i] = (ds[i] * along_rows(jnp.exp(half))).astype(t.d.dtype)
    wait_values()
    keep = jnp.exp(half) if t.marks is None else t.starts.keep(jnp.exp(half))
    t.row[...] = _crossing(t, ds, keep)
    wait_cotangents()
    t.scores[...] = _keep_lower(t, matmul(_score_cotangents(t))).astype(t.scores.dtype)
    plgpu.commit_smem()

    if t.marks is None:
        dq, inside = matmuls([*_reads(t), (t.scores, t.k)], [(t.scores.T, t.q)])
    else:
        dq = t.starts.before_first(matmul(_reads(t)))
        more, inside = matmuls([(t.scores, t.k)], [(t.scores.T, t.q)])
        dq += more
    z = load(t.q) * dq - load(t.k) * inside
    # Made again rather than held.
    zero = t.zero.astype(jnp.float32)
    dq = (dq * (jnp.exp2(e + zero) * scale)).astype(t.q.dtype)
    plgpu.commit_smem()
    split_in_two(z, t.g, t.scores)
    across = matmul(_writes(t))
    if t.marks is not None:
        across = t.starts.after_last(across)
    w = (load(t.k) * across).astype(t.q.dtype)
    t.state[0] = w
    dk = ((inside + across) * jnp.exp2(zero - e)).astype(t.k.dtype)
    plgpu.commit_smem()

    later = [(t.lower.T, t.g), (t.lower.T, t.scores)]
    dg, a = matmuls([*later, (t.lower, t.state.at[0])], [(t.q, t.k.T)])
    dg += along_columns(t.row) - w.astype(jnp.float32)
    plgpu.commit_smem()
    if t.marks is not None:
        dg = t.starts.reset(dg, 0.0)
        t.q[...] = t.starts.before_first(load(t.q)).astype(t.q.dtype)
        t.k[...] = t.starts.after_last(load(t.k)).astype(t.k.dtype)
    t.g[...] = dg.astype(t.g.dtype)
    t.scores[...] = _keep_lower(t, a).astype(t.scores.dtype)
    post = jnp.exp(half)
    return dq, dk, post, post if t.marks is None else t.starts.keep(post)


def write_mask(lower, keep):
    """Ones where `keep` says so."""
    lower[...] = jnp.where(keep, 1.0, 0.0).astype(lower.dtype)
    plgpu.commit_smem()


def _sums(t):
    """b [64, 64], and B along the rows."""

    def run(sums, total):
        plgpu.wgmma(total, t.g.T, t.lower.at[LAST].T)
        plgpu.wgmma(sums, t.lower, t.g)
        # No gate is positive: the least of the last sums is that of all tokens.
        return sums[...], jnp.min(total[...], axis=1)

    return pl.run_scoped(run, plgpu.ACC(TILE, jnp.float32), plgpu.ACC((CHUNK, 8), jnp.float32))


def _decay(t):
    return jnp.exp(matmul([(t.lower, t.g)]))


def exact_gradients(make_tiles, ds, scale, wait_values, wait_cotangents, free_tokens):
    """The form for every gate, in place.

    As `mild_gradients`, but make_tiles makes the Tiles, with addresses of its own, and of the last two results there is
    one, exp(B).
    """
    t = make_tiles()
    rows, columns = _numbers(t)
    g = jnp.maximum(load(t.g), FLOOR)
    t.g[...] = (g if t.marks is None else t.starts.reset(g)).astype(t.g.dtype)
    wait_values()
    wait_cotangents()
    free_tokens()
    for i in range(VALUE_BLOCKS):
        t.d[i] = ds[i].astype(t.d.dtype)
    write_mask(t.lower, columns <= rows)
    decay, total = _sums(t)
    keep = jnp.exp(total)
    crossing = _crossing(t, ds, keep)

    # Between chunks. D is a place for products from here on.
    product = t.d.at[0]
    dq = matmul(_reads(t)) * (jnp.exp(decay) * scale)
    dk = matmul(_writes(t))
    plgpu.commit_smem()
    product[...] = (load(t.q) * dq).astype(product.dtype)
    plgpu.commit_smem()
    dg = matmul([(t.lower.T, product)])
    plgpu.commit_smem()
    rows, columns = _numbers(t)
    write_mask(t.lower, columns > rows)
    dk = dk * _decay(t)
    product[...] = (load(t.k) * dk).astype(product.dtype)
    plgpu.commit_smem()
    dg += matmul([(t.lower.T, product)])

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
        write_mask(t.lower, (row_half == column_half) & ((columns <= rows) == right))
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
        dg += matmul([(t.lower.T, product)])
        plgpu.commit_smem()
        return dq, dk, dg

    dq, dk, dg = lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), level, (dq, dk, dg))
    t = make_tiles()
    t.scores[...] = load(t.state.at[1]).astype(t.scores.dtype)

    # What the other products of the chunk need: q~, k~ and D.
    t.d[0] = ds[0].astype(t.d.dtype)
    rows, columns = _numbers(t)
    write_mask(t.lower, columns <= rows)
    t.q[...] = (load(t.q) * (_decay(t) * scale)).astype(t.q.dtype)
    plgpu.commit_smem()
    rows, columns = _numbers(t)
    write_mask(t.lower, columns > rows)
    t.k[...] = (load(t.k) * _decay(t)).astype(t.k.dtype)
    t.row[...] = crossing
    plgpu.commit_smem()
    dg += along_columns(t.row)
    t.g[...] = jnp.where(load(t.g) <= FLOOR, 0.0, dg).astype(t.g.dtype)
    write_lower(t.lower)
    return dq.astype(t.q.dtype), dk.astype(t.k.dtype), keep
