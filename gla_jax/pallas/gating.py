"""The gating role of the forward kernel: q, k and g of a tile become scaled operands, scores and three factors.

Notation of one chunk of 64 tokens and one channel: g_i <= 0 the log decay of token i, b_i = g_0 + ... + g_i, B = b_63.
For the state S that enters the chunk, with A the [64, 64] scores inside it,

    o = q~ (read * S) + A v        S' = post * (keep * S + k~^T v)

A tile is 64 channels of a chunk; A is the sum of its tiles' scores. Each tile is judged by itself.

A mild tile is centred on half its decay: with E_i = b_i - B/2, q~ = q exp(E), k~ = k exp(-E), A = tril(q~ k~^T) and
read = keep = post = exp(B/2). E is one product of g with a triangle of +-1/2, exact in bfloat16. Its last row is B/2.

A tile that hard resets of whole tokens alone keep from being mild is gated as if they were not there, and then cut: no
score across a reset, q~ = 0 after the first one, k~ = 0 before the last one, keep = 0. There q~ takes exp(B/2), and
read = 1: in a tile that is not mild the state is read as it is, which the backward relies on.

Where sequences begin inside a chunk (`Starts`), a mild tile is cut the same way, with less work: all of a chunk's tiles
are cut at the same tokens, so A is masked once, and nothing is looked for in g; where one begins at the first token and
no other, read = keep = 0 is all. In any other tile those tokens' gates become hard resets.

Any other tile takes factors that are at most 1, whatever the gates: q~ = q exp(b_i), k~ = k exp(B - b_j), read = 1,
keep = exp(B), post = 1, and A in six levels. At level m, a token i in the right half of a block of 2^(m+1) tokens meets
a token j in its left half through the middle of the block: A_ij = (q_i D(middle..i)) . (k_j D(j+1..middle-1)), where D
is a product of decays. Right halves need only q and left halves only k, so one tile X holds both and A's level is X X^T
under a mask. Every exponent is a sum of g over a range, a product of g with a matrix of zeros and ones: nothing is
subtracted, and -inf (held at -120, whose exponential is 0 in float32) is exact.

A warp reads and writes its own 16 rows of a tile; only wgmma reads all of a tile. So a tile is committed (a barrier
of the warpgroup) after it is written, and once more between the last wgmma that reads it and the next write.
"""

from typing import Any, NamedTuple

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64
LEVELS = 6
# exp of it is 0 in float32, so it stands for -inf, and sums of 64 of them stay finite.
FLOOR = -120.0
_LAST = pl.ds(CHUNK - 8, 8)
_ROWS = plgpu.Layout.WGMMA.reduce(1)
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Tools(NamedTuple):
    """A gater's own shared memory.

    Attributes:
      triangle: [64, 64] tile with the triangle of +-1/2.
      scratch: [64, 64] tile, free until the chunk's scores are written.
      strong: [64, 64] tile, the scores of the chunk's tiles that are not mild.
      rows: [3, 64] float32.
      number: [8] int32: a zero that the compiler does not know, and whether `strong` holds something.
    """

    triangle: Any
    scratch: Any
    strong: Any
    rows: Any
    number: Any


class Starts(NamedTuple):
    """Where sequences begin in a chunk.

    Attributes:
      count: [64] along the rows, how many begin up to token i.
      is_start: [64] along the rows, above 0 where one does.
      first, last: the count at the chunk's first token, 0 or 1, and at its last.
      marks: `mark_starts`'s of the chunk, in shared memory.
    """

    count: Any
    is_start: Any
    first: Any
    last: Any
    marks: Any

    @classmethod
    def read(cls, marks):
        """Of a chunk's marks."""
        whole = lambda x: x.astype(jnp.int32).astype(jnp.float32)
        both = plgpu.load(marks.at[0], layout=_ROWS)
        return cls(whole(both), both - whole(both), whole(marks[0, 0]), whole(marks[0, CHUNK - 1]), marks)

    @property
    def parts_tokens(self):
        """Whether tokens of the chunk are of different sequences."""
        return self.last > self.first

    def before_first(self, x):
        """x, with zeros in the rows of tokens that see nothing of what enters the chunk."""
        return jnp.where(along_rows(self.count) > 0.0, 0.0, x)

    def after_last(self, x):
        """x, with zeros in the rows of tokens that nothing after the chunk sees."""
        return jnp.where(along_rows(self.count) < self.last, 0.0, x)

    def same(self, x, row=None):
        """x [64, 64] where both tokens are of one sequence, else 0; with a scratch row it reads one of marks alone."""
        if row is not None:
            row[...] = self.count
            plgpu.commit_smem()
        across = plgpu.load(self.marks.at[1] if row is None else row, layout=_COLUMNS)
        return jnp.where(along_rows(self.count) == along_columns(across), x, 0.0)

    def keep(self, x):
        """x if no sequence begins, else 0."""
        return x * jnp.where(self.last > 0.0, 0.0, 1.0)

    def reset(self, g, value=FLOOR):
        """g with another value in the rows of tokens that begin a sequence."""
        return jnp.where(along_rows(self.is_start) > 0.0, value, g)


MARKS = 2


def mark_starts(starts, chunks):
    """What `Starts` reads, [b, chunks, 2, 64] float32, of starts [b, t] bool.

    The count is there twice, as a row read in two layouts would have to be stored in between; the first has half of one
    more where a sequence begins.
    """
    batch, time = starts.shape
    starts = jnp.pad(starts, ((0, 0), (0, chunks * CHUNK - time))).reshape(batch, chunks, CHUNK).astype(jnp.float32)
    counts = jnp.cumsum(starts, axis=-1)
    return jnp.stack([counts + 0.5 * starts, counts], axis=2)


def tile_memory(shape, dtype):
    """Shared memory for [..., 64, 64] tiles, as wgmma and TMA take them."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _iotas():
    """Row and column numbers of a [64, 64] tile in the accumulators' layout."""
    shape = (CHUNK, CHUNK)
    return tuple(plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))


def matmul(a, b):
    """The product of two tiles in float32."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), jnp.float32))


def load(ref):
    """A tile in the accumulators' layout, in float32."""
    return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA).astype(jnp.float32)


def write_triangle(triangle):
    """The triangle of +-1/2 that centres a chunk's cumulative decay."""
    rows, columns = _iotas()
    triangle[...] = jnp.where(rows >= columns, 0.5, -0.5).astype(triangle.dtype)
    plgpu.commit_smem()


def lower_mask(triangle):
    """All bits of a [64, 64] tile's lower triangle, as 16-bit integers, from the triangle of +-1/2.

    By way of float32: of masks that it sees through, the compiler makes a comparison and a selection an element.
    """
    return (-0.5 - load(triangle)).astype(jnp.int32).astype(jnp.uint16)


def lower(a, mask):
    """The lower triangle of a 16-bit tile, zeros above it whatever is there."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a, jnp.uint16) & mask, a.dtype)


def along_rows(x):
    """[64, 64] with x[i] all along row i."""
    return lax.broadcast_in_dim(x, (CHUNK, CHUNK), (0,))


def along_columns(x):
    """[64, 64] with x[j] all along column j."""
    return lax.broadcast_in_dim(x, (CHUNK, CHUNK), (1,))


def vector(value):
    """[64] of one value, along the rows of an accumulator."""
    return plgpu.layout_cast(jnp.full((CHUNK,), value, jnp.float32), _ROWS)


def nothing(dtype):
    """A [64, 64] tile of zeros in the accumulators' layout."""
    return plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), dtype), plgpu.Layout.WGMMA)


def centre(triangle, g, before=None, interpret=False):
    """E, and B/2 along the rows.

    Args:
      triangle: [64, 64] tile.
      g: [parts, 64, 64], tiles that sum up to g.
      before: scores so far and two more tiles x and y; x y^T is added to the scores, while E is computed, and they are
        returned too.
      interpret: for the interpreter, which cannot start an accumulator from a value.
    """

    def products(e, total):
        for i in range(g.shape[0]):
            plgpu.wgmma(total, g.at[i].T, triangle.at[_LAST].T)
        for i in range(g.shape[0]):
            plgpu.wgmma(e, triangle, g.at[i])

    wide, narrow = (CHUNK, CHUNK), (CHUNK, 8)
    if before is None or interpret:

        def run(e, total):
            products(e, total)
            return e[...], jnp.min(total[...], axis=1)

        e, half = pl.run_scoped(run, plgpu.ACC(wide, jnp.float32), plgpu.ACC(narrow, jnp.float32))
        scores = () if before is None else (before[0] + matmul(before[1], before[2].T),)
    else:
        scores, x, y = before

        def all_products(refs):
            scores, e, total = refs
            products(e, total)
            plgpu.wgmma(scores, x, y.T)
            plgpu.wgmma_wait(0)

        zeros = (plgpu.layout_cast(jnp.zeros(s, jnp.float32), plgpu.Layout.WGMMA) for s in (wide, narrow))
        scores, e, total = pl.run_state(all_products)(tuple(plgpu.ACC.init(x) for x in (scores, *zeros)))
        scores, half = (scores,), jnp.min(jnp.asarray(total), axis=1)
    return e, half, *scores


def _least(e, row):
    """The least B/2 of a tile's channels, from the last row of E. Has a barrier of the warpgroup.

    A reduction across warps would take scratch that the compiler allots once for all warpgroups: two that gate at the
    same time would mix their numbers.
    """
    row[...] = jnp.min(e, axis=1)
    plgpu.commit_smem()
    return row[CHUNK - 1]


def gate_tile(q, k, g, e, half, a, factors, tools, mild, wait_for_qk, done_with_g, starts=None):
    """Gates one tile in place.

    Args:
      q, k: [64 tokens, 64 channels] tiles; become q~ and k~.
      g: [parts, 64, 64], tiles that sum up to g; overwritten.
      e, half: `centre`'s.
      a: [64, 64] float32, the sum of the scores of the chunk's tiles so far, to be masked; None if there are none.
      factors: [3, 64] float32 for read, keep and post.
      tools: the gater's own.
      mild: the largest |B| that the centred form takes.
      wait_for_qk: called before q and k are read.
      done_with_g: called when g is no longer needed.
      starts: the chunk's `Starts`, if sequences can begin inside; a is then given.

    Returns:
      Whether the tile is mild; otherwise its scores are in `tools.strong`.
      `a`, or zeros where it has been moved to `tools.strong`. Of a mild tile whose tokens are of several sequences it
      has the scores already: q~ and k~ are cut.
    """
    is_mild = _least(e, tools.rows.at[0]) >= -0.5 * mild
    wait_for_qk()

    def centred(*a):
        done_with_g()
        factor = jnp.exp(half)
        factors[0] = factor if starts is None else factor * (1.0 - starts.first)
        factors[1] = factor if starts is None else starts.keep(factor)
        factors[2] = factor
        _scale(q, k, e)
        plgpu.commit_smem()
        return a if starts is None else lax.cond(starts.parts_tokens, cut, lambda *a: a, *a)

    def cut(a):
        assert starts is not None
        a += matmul(q, k.T)
        plgpu.commit_smem()
        q[...] = starts.before_first(load(q)).astype(q.dtype)
        k[...] = starts.after_last(load(k)).astype(k.dtype)
        plgpu.commit_smem()
        return (a,)

    def strong(*a):
        for x in a:
            _add_strong(jnp.where(_in_lower(), x, 0.0), tools)
        if starts is not None:
            _store_gate(g, starts.reset(_load_gate(g)))
        _gate_with_resets(q, k, g, factors, tools, mild, bool(a))
        done_with_g()
        # Between barriers: all warps have read what it was.
        tools.number[1] = jnp.int32(1)
        plgpu.commit_smem()
        return tuple(nothing(x.dtype) for x in a)

    moved = lax.cond(is_mild, centred, strong, *(() if a is None else (a,)))
    return is_mild, moved[0] if moved else None


def _in_lower():
    rows, columns = _iotas()
    return rows >= columns


def _scale(q, k, e):
    exponent = e * 1.4426950408889634
    q[...] = (load(q) * jnp.exp2(exponent)).astype(q.dtype)
    k[...] = (load(k) * jnp.exp2(-exponent)).astype(k.dtype)


def _add_strong(a, tools, full=False):
    """Adds scores to those in `tools.strong`, which holds some if `full` or as tools.number[1] says."""
    before = load(tools.strong)
    if not full:
        rows, _ = _iotas()
        before = jnp.where(rows < CHUNK * tools.number[1], before, 0.0)
    tools.strong[...] = (before + a).astype(tools.strong.dtype)


def write_scores(scores, a, mask, tools, starts=None):
    """Writes a chunk's scores.

    Args:
      scores: [64, 64] tile.
      a: [64, 64] float32, the sum of the mild tiles' scores, to be masked.
      mask: `lower_mask()`.
      tools: the gater's own, with the sum of the strong tiles' scores.
      starts: the chunk's `Starts`; None if no sequence can begin inside.
    """
    scores[...] = lower(a.astype(scores.dtype), mask)

    @pl.when(tools.number[1] > 0)
    def _add():
        scores[...] = (load(scores) + load(tools.strong)).astype(scores.dtype)

    if starts is not None:

        @pl.when(starts.parts_tokens)
        def _cut():
            scores[...] = starts.same(load(scores)).astype(scores.dtype)

    plgpu.commit_smem()


def apply_factors(q, k, factors):
    """Makes a gated tile's three factors one, kappa, in place of the first: o = q~ S + A v, S' = kappa S + k~^T v."""
    read, keep, post = (plgpu.load(factors.at[i], layout=_COLUMNS) for i in range(3))
    q[...] = (load(q) * along_columns(read)).astype(q.dtype)
    k[...] = (load(k) * along_columns(post)).astype(k.dtype)
    # All warps have read the first.
    plgpu.commit_smem()
    factors[0] = keep * post


def _load_gate(g):
    return sum(load(g.at[i]) for i in range(g.shape[0]))


def _store_gate(g, value):
    for i in range(g.shape[0]):
        part = value.astype(g.dtype)
        g[i] = part
        value -= part.astype(jnp.float32)


def _sums(matrix, g):
    """The product of a matrix and g."""

    def run(acc):
        for i in range(g.shape[0]):
            plgpu.wgmma(acc, matrix, g.at[i])
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((CHUNK, CHUNK), jnp.float32))


def _totals(matrix, g):
    """The sums of g that the matrix's last row takes, along the rows, eight times over."""

    def run(acc):
        for i in range(g.shape[0]):
            plgpu.wgmma(acc, g.at[i].T, matrix.at[_LAST].T)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC((CHUNK, 8), jnp.float32))


def _gate_with_resets(q, k, g, factors, tools, mild, full):
    reset = jnp.where(jnp.max(_load_gate(g), axis=1) <= FLOOR, 1.0, 0.0)
    row = tools.rows.at[1]
    row[...] = reset
    # Every warp has read what it needs of g, and no wgmma reads it any more.
    plgpu.commit_smem()
    resets = jnp.sum(plgpu.load(row, layout=_COLUMNS))
    _store_gate(g, jnp.maximum(jnp.where(along_rows(reset) > 0, 0.0, _load_gate(g)), FLOOR))
    tools.scratch[...] = along_rows(reset).astype(tools.scratch.dtype)
    plgpu.commit_smem()
    e, half = centre(tools.triangle, g)
    is_mild = (_least(e, tools.rows.at[2]) >= -0.5 * mild) & (resets > 0)

    @pl.when(is_mild)
    def _cut():
        _gate_around_resets(q, k, g.at[0], factors, tools, e, half, resets, full)

    @pl.when(jnp.logical_not(is_mild))
    def _levels():
        _store_gate(g, jnp.where(along_rows(reset) > 0, FLOOR, _load_gate(g)))
        plgpu.commit_smem()
        _gate_by_levels(q, k, g, factors, tools, full)


def _gate_around_resets(q, k, spare, factors, tools, e, half, resets, full):
    """Gates a tile whose resets are rows of ones in `tools.scratch`; `spare` is a tile that nothing reads."""
    # Row i: how many resets come up to token i, less half of all.
    count = jnp.max(matmul(tools.triangle, tools.scratch), axis=1)
    _scale(q, k, e)
    tools.rows[0] = jnp.exp(half)
    plgpu.commit_smem()
    spare[...] = matmul(q, k.T).astype(spare.dtype)
    same = along_rows(count) == matmul(tools.scratch.T, tools.triangle.T)
    plgpu.commit_smem()
    _add_strong(jnp.where(same & _in_lower(), load(spare), 0.0), tools, full)
    before_first = along_rows(jnp.where(count > 0.25 - 0.5 * resets, 0.0, 1.0))
    after_last = along_rows(jnp.where(count < 0.5 * resets - 0.25, 0.0, 1.0))
    read = plgpu.load(tools.rows.at[0], layout=_COLUMNS)
    q[...] = (load(q) * before_first * along_columns(read)).astype(q.dtype)
    k[...] = (load(k) * after_last).astype(k.dtype)
    factors[0] = vector(1.0)
    factors[1] = vector(0.0)
    factors[2] = jnp.exp(half)
    plgpu.commit_smem()


def _gate_by_levels(q, k, g, factors, tools, full):
    triangle, scratch, strong = tools.triangle, tools.scratch, tools.strong
    rows, columns = _iotas()
    _add_strong(jnp.where(rows == columns, matmul(q, k.T), 0.0), tools, full)

    # Numbers read from memory keep addresses and masks from being computed, and spilled, ahead of the loop.
    def level(m, _):
        zero = tools.number[0]
        rows, columns = _iotas()
        rows += zero
        columns += zero
        row_half, column_half = rows >> m, columns >> m
        right = (row_half & 1) == 1
        within = (row_half == column_half) & ((columns <= rows) == right)
        triangle[...] = jnp.where(within, 1.0, 0.0).astype(triangle.dtype)
        plgpu.commit_smem()
        decay = jnp.exp(_sums(triangle, g))
        scratch[...] = (jnp.where(right, load(q), load(k)) * decay).astype(scratch.dtype)
        plgpu.commit_smem()
        a = jnp.where(right & (row_half == column_half + 1), matmul(scratch, scratch.T), 0.0)
        strong[...] = (load(strong) + a).astype(strong.dtype)

    lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), level, None)
    plgpu.commit_smem()
    rows, columns = _iotas()
    rows += tools.number[0]
    triangle[...] = jnp.where(columns > rows, 1.0, 0.0).astype(triangle.dtype)
    plgpu.commit_smem()
    k[...] = (load(k) * jnp.exp(_sums(triangle, g))).astype(k.dtype)
    plgpu.commit_smem()
    triangle[...] = jnp.where(columns <= rows, 1.0, 0.0).astype(triangle.dtype)
    plgpu.commit_smem()
    q[...] = (load(q) * jnp.exp(_sums(triangle, g))).astype(q.dtype)
    factors[0] = vector(1.0)
    factors[1] = jnp.exp(jnp.min(_totals(triangle, g), axis=1))
    factors[2] = vector(1.0)
    plgpu.commit_smem()
    write_triangle(triangle)
