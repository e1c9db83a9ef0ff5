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

A warp reads and writes its own 16 rows of a tile; only wgmma reads all of one, as its right operand. So a tile is
committed (a barrier of the warpgroup) after it is written, and once more between the last wgmma that reads it and the
next write.
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
    """A gater's shared memory, its own but for the triangle.

    Attributes:
      triangle: [64, 64] tile with the triangle of +-1/2.
      scratch: [64, 64] tile, free until the chunk's scores are written.
      spare: [64, 64] tile.
      rows: [3, 64] float32.
      number: [8] int32, a zero that the compiler does not know.
    """

    triangle: Any
    scratch: Any
    spare: Any
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


def lower(a, triangle):
    """The lower triangle of a 16-bit tile, zeros above it whatever is there; from signs of the triangle of +-1/2."""
    signs = lax.bitcast_convert_type(plgpu.layout_cast(triangle[...], plgpu.Layout.WGMMA), jnp.int16)
    # -1 where negative, else 0: a minimum and a maximum take two numbers at a time, and a shift does not.
    upper = jnp.maximum(jnp.minimum(signs, jnp.int16(0)), jnp.int16(-1))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a, jnp.int16) & ~upper, a.dtype)


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


def gate_tile(q, k, g, e, half, a, factors, tools, mild, wait_for_qk, done_with_g, starts=None, interpret=False):
    """Gates one tile in place.

    Args:
      q, k: [64 tokens, 64 channels] tiles; become q~ and k~.
      g: [parts, 64, 64], tiles that sum up to g; overwritten.
      e, half: `centre`'s.
      a: [64, 64] float32, the sum of the scores of the chunk's tiles so far, to be masked; None for one tile a chunk.
      factors: [3, 64] float32 for read, keep and post.
      tools: the gater's own.
      mild: the largest |B| that the centred form takes.
      wait_for_qk: called before q and k are read.
      done_with_g: called when g is no longer needed.
      starts: the chunk's `Starts`, if sequences can begin inside.
      interpret: for the interpreter, which takes no wgmma's left operand in registers.

    Returns:
      Whether q~ k~^T are the tile's scores. If not, as the tile is not mild, or is cut, `a` has them already, or
      `tools.scratch` where it is None.
      Whether the tile is mild.
      `a`.
    """
    is_mild = _least(e, tools.rows.at[0]) >= -0.5 * mild
    wait_for_qk()

    def summed(add, *a):
        if a:
            return (add(*a),)
        tools.scratch[...] = lower(add(nothing(jnp.float32)).astype(q.dtype), tools.triangle)
        return ()

    def centred(*a):
        done_with_g()
        factor = jnp.exp(half)
        factors[0] = factor if starts is None else factor * (1.0 - starts.first)
        factors[1] = factor if starts is None else starts.keep(factor)
        factors[2] = factor
        _scale(q, k, e)
        plgpu.commit_smem()
        return a if starts is None else lax.cond(starts.parts_tokens, cut, lambda *a: a, *a)

    def cut(*a):
        assert starts is not None
        a = summed(lambda a: a + matmul(q, k.T), *a)
        plgpu.commit_smem()
        q[...] = starts.before_first(load(q)).astype(q.dtype)
        k[...] = starts.after_last(load(k)).astype(k.dtype)
        plgpu.commit_smem()
        return a

    def strong(*a):
        gate = _load_gate(g) if starts is None else starts.reset(_load_gate(g))
        resets = _Resets.take_out(gate, g, tools)
        e, half, is_mild = lax.cond(
            resets.last >= 0.0,
            lambda: resets.centre(g, tools, mild),
            lambda: (nothing(jnp.float32), vector(0.0), jnp.bool_(False)),
        )

        def around_resets(*a):
            done_with_g()
            return summed(lambda a: resets.gate_around(q, k, factors, tools, e, half, a), *a)

        def by_levels(*a):
            pl.when(resets.last >= 0.0)(lambda: resets.put_back(g))
            a = summed(lambda a: _gate_by_levels(q, k, g, factors, tools, a, interpret), *a)
            done_with_g()
            return a

        return lax.cond(is_mild, around_resets, by_levels, *a)

    a = lax.cond(is_mild, centred, strong, *(() if a is None else (a,)))
    is_plain = is_mild if starts is None else is_mild & jnp.logical_not(starts.parts_tokens)
    return is_plain, is_mild, a[0] if a else None


def _scale(q, k, e):
    exponent = e * 1.4426950408889634
    q[...] = (load(q) * jnp.exp2(exponent)).astype(q.dtype)
    k[...] = (load(k) * jnp.exp2(-exponent)).astype(k.dtype)


def write_scores(scores, a, triangle, starts=None):
    """Writes a chunk's scores.

    Args:
      scores: [64, 64] tile.
      a: [64, 64] float32, the sum of the tiles' scores, to be masked; None if it is there already.
      triangle: [64, 64] tile with the triangle of +-1/2.
      starts: the chunk's `Starts`; None if no sequence can begin inside.
    """
    if a is not None:
        scores[...] = lower(a.astype(scores.dtype), triangle)

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


def _products(*sums):
    """Sums of products of pairs of tiles, in float32, all at the same time."""

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    shapes = ((a.shape[0], b.shape[1]) for (a, b), *_ in sums)
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def _numbers(tools):
    """Row numbers [64] and column numbers [64, 64], which the compiler cannot make, and spill, ahead of a branch."""
    rows = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=_ROWS)
    return rows + tools.number[0], _iotas()[1] + tools.number[0]


def _between(columns, start, count):
    """Where column numbers [64, 64] are one of `count` [64] from `start` [64] on, by row. By one comparison."""
    return (columns - along_rows(start)).astype(jnp.uint32) < along_rows(count.astype(jnp.uint32))


class _Resets(NamedTuple):
    """The hard resets of whole tokens in a tile that is not mild.

    Attributes:
      is_reset: [64] along the rows, above 0 for such tokens.
      since: [64] along the rows, the last of them up to token i, or -1.
      last: the last of them in the chunk, or -1.
    """

    is_reset: Any
    since: Any
    last: Any

    @classmethod
    def take_out(cls, gate, g, tools):
        """Of [64, 64] gates, which are written to g without them."""
        is_reset = jnp.where(jnp.max(gate, axis=1) <= FLOOR, 1.0, 0.0)
        rows, columns = _numbers(tools)
        tools.rows[1] = jnp.where(is_reset > 0.0, rows.astype(jnp.float32), -1.0)
        # Every warp has read what it needs of g, and no wgmma reads it any more.
        plgpu.commit_smem()
        across = along_columns(plgpu.load(tools.rows.at[1], layout=_COLUMNS))
        since = jnp.max(jnp.where(columns <= along_rows(rows), across, -1.0), axis=1)
        tools.rows[2] = since
        _store_gate(g, jnp.maximum(jnp.where(along_rows(is_reset) > 0.0, 0.0, gate), FLOOR))
        plgpu.commit_smem()
        return cls(is_reset, since, tools.rows[2, CHUNK - 1])

    def put_back(self, g):
        """Writes them to g again."""
        _store_gate(g, jnp.where(along_rows(self.is_reset) > 0.0, FLOOR, _load_gate(g)))
        plgpu.commit_smem()

    def centre(self, g, tools, mild):
        """`centre`'s without them, and whether the tile is mild so. Leaves exp(B/2) in a row."""
        e, half = centre(tools.triangle, g)
        tools.rows[0] = jnp.exp(half)
        return e, half, _least(e, tools.rows.at[1]) >= -0.5 * mild

    def gate_around(self, q, k, factors, tools, e, half, a):
        """Gates a tile that is mild but for them; returns a and its scores."""
        exponent = e * 1.4426950408889634
        rows, columns = _numbers(tools)
        read = along_columns(plgpu.load(tools.rows.at[0], layout=_COLUMNS))
        # The scores are of tiles that are not cut.
        scaled = load(q) * jnp.exp2(exponent)
        tools.scratch[...] = scaled.astype(q.dtype)
        q[...] = jnp.where(along_rows(self.since) < 0.0, scaled * read, 0.0).astype(q.dtype)
        scaled = (load(k) * jnp.exp2(-exponent)).astype(k.dtype)
        tools.spare[...] = scaled
        k[...] = jnp.where(along_rows(rows.astype(jnp.float32)) >= self.last, scaled, 0.0).astype(k.dtype)
        factors[0] = vector(1.0)
        factors[1] = vector(0.0)
        factors[2] = jnp.exp(half)
        plgpu.commit_smem()
        scores = matmul(tools.scratch, tools.spare.T)
        since = self.since.astype(jnp.int32)
        return jnp.where(_between(columns, since, rows - since + 1), a + scores, a)


def _gate_by_levels(q, k, g, factors, tools, a, interpret):
    """Gates any tile; returns a and its scores."""
    parts = [g.at[i] for i in range(g.shape[0])]

    def products(keep, *pairs):
        """Of pairs of tiles, and the sums of g over the tokens that `keep` [64, 64] says."""
        matrix = jnp.where(keep, 1.0, 0.0).astype(g.dtype)
        if interpret:
            sums = sum(jnp.dot(matrix, part[...], preferred_element_type=jnp.float32) for part in parts)
            return [*(matmul(*pair) for pair in pairs), sums]
        return _products(*([pair] for pair in pairs), [(matrix, part) for part in parts])

    def halves(m):
        """Of each row: its number, that of its half block of 2^m tokens, and whether that is a right half, 0 or 1."""
        rows, columns = _numbers(tools)
        return rows, rows >> m, (rows >> m) & 1, columns

    def in_level(m):
        rows, half, _, columns = halves(m)
        middle, after = (half | 1) << m, rows + 1
        return _between(columns, jnp.minimum(middle, after), jnp.abs(middle - after))

    bits = lambda x: lax.bitcast_convert_type(plgpu.layout_cast(x[...], plgpu.Layout.WGMMA), jnp.uint16)

    def write_operand(x, m, exponents):
        all_if_right = along_rows(-halves(m)[2]).astype(jnp.uint16)
        q_or_k = lax.bitcast_convert_type(bits(k) ^ ((bits(q) ^ bits(k)) & all_if_right), q.dtype)
        x[...] = (q_or_k.astype(jnp.float32) * jnp.exp(exponents)).astype(x.dtype)
        plgpu.commit_smem()

    def level(m, a, x, next_x):
        # The next level's sums wait for wgmma together with this one's scores, and two tiles take turns.
        scores, exponents = products(in_level(m + 1), (x, x.T))
        _, half, right, columns = halves(m)
        a = jnp.where(_between(columns, (half - 1) << m, right << m), a + scores, a)
        write_operand(next_x, m + 1, exponents)
        return a

    def two_levels(i, a):
        a = level(2 * i, a, tools.scratch, tools.spare)
        return level(2 * i + 1, a, tools.spare, tools.scratch)

    diagonal, exponents = products(in_level(jnp.int32(0)), (q, k.T))
    rows, columns = _numbers(tools)
    a = jnp.where(columns == along_rows(rows), a + diagonal, a)
    write_operand(tools.scratch, jnp.int32(0), exponents)
    a = lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS // 2), two_levels, a)

    # One level more, whose left half is the chunk, has left k~.
    rows, columns = _numbers(tools)
    (exponents,) = products(columns <= along_rows(rows))
    # The triangle's last row is all 1/2, and no gate is positive: the least is B/2.
    (total,) = _products([(part.T, tools.triangle.at[_LAST].T) for part in parts])
    q[...] = (load(q) * jnp.exp(exponents)).astype(q.dtype)
    k[...] = tools.scratch[...]
    factors[0] = vector(1.0)
    factors[1] = jnp.exp(2.0 * jnp.min(total, axis=1))
    factors[2] = vector(1.0)
    plgpu.commit_smem()
    return a
