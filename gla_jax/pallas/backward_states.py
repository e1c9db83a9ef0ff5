"""The backward's first kernel: the state before every chunk, and the chunk's decay.

One block carries 64 or 128 channels of k by 128 columns of v of one head's state over the sequence, a warpgroup each 64
channels:

    S_{n+1} = exp(B) S_n + (k exp(B - b_j))^T v

with b_j the decay summed up to token j of the chunk, and B the chunk's. B - b_j is the sum of the gates after j, a
product of g with a triangle of ones: every factor is at most 1, so this form is exact for every gate (held at -120,
whose exponential is 0 in float32).

What leaves is what backward_kernel.py multiplies with, in the inputs' dtype: exp(B/2) S_n if these 64 channels of the
chunk are mild (no B under -mild), S_n if not. And a float32 a channel that says which, and B: 1 - B, at least 1, of
mild ones, and B, at most 0, of others.

The same walk gives what a part of a sequence adds to the state, if a long sequence is cut: S after the last chunk and
the sum of all B. Backwards in time, with q for k and do for v,

    dS_n = exp(B) dS_{n+1} + (q exp(b_i))^T do

is what it adds to the cotangent of the state. Walked so without totals, it gives the cotangent of the state after every
chunk, scaled like the states.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas.backward_config import VALUE_BLOCKS
from gla_jax.pallas.gating import CHUNK, FLOOR, MARKS, Starts, along_rows, load, nothing, vector, write_triangle

TILE = (CHUNK, CHUNK)
ROWS, COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
LAST = pl.ds(CHUNK - 8, 8)


def tile(shape, dtype):
    """Shared memory for tiles that TMA and wgmma take."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def numbers():
    """Row and column numbers of a [64, 64] tile in the accumulators' layout."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, TILE, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1))


def matmul(pairs):
    """The sum of the products of pairs of tiles, in float32."""
    return matmuls(pairs)[0]


def matmuls(*sums):
    """`matmul` for several sums at once, which wait for each other's end only."""

    def run(*accumulators):
        for accumulator, pairs in zip(accumulators, sums, strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(run, *[plgpu.ACC(TILE, jnp.float32)] * len(sums))


def scratch(config, dtype, has_starts=False, by_token=False):
    """Shared memory and barriers of one block, by name."""
    blocks, stages = config.key_blocks, config.state_stages
    arrivals = blocks + VALUE_BLOCKS + (1 if by_token else blocks) + has_starts
    marks = {"marks": plgpu.SMEM((stages, MARKS, CHUNK), jnp.float32)} if has_starts else {}
    return marks | {
        "k": tile((stages, blocks, *TILE), dtype),
        "g": plgpu.SMEM((stages, CHUNK), jnp.float32) if by_token else tile((stages, blocks, *TILE), dtype),
        "v": tile((stages, VALUE_BLOCKS, *TILE), dtype),
        "state": tile((blocks, VALUE_BLOCKS, *TILE), dtype),
        "centre": tile((blocks, *TILE), dtype),
        "after": tile((blocks, *TILE), dtype),
        "decay": plgpu.SMEM((blocks, CHUNK), jnp.float32),
        "row": plgpu.SMEM((blocks, CHUNK), jnp.float32),
        "loaded": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=blocks, num_barriers=stages),
    }


class Walk(NamedTuple):
    """What one walk takes and leaves, all else being the same as in the other walks of a launch.

    Attributes:
      heads: of k and v.
      reverse: backwards in time, with q and do as k and v.
      group: heads of k and v that share one of g.
      scale: a factor of k.
      totals: leaves the last state and the sum of all B, in float32, in place of the states and each chunk's decay.
      has_initial: starts from a state that is given, not from zeros.
      has_last: leaves the last state in float32, besides.
      has_decay: leaves the decay.
      of, first: sequences go by `of` in a row, of which the `first` alone are walked; all where both are 1.
    """

    heads: int
    reverse: bool = False
    group: int = 1
    scale: float = 1.0
    totals: bool = False
    has_initial: bool = False
    has_last: bool = False
    has_decay: bool = True
    of: int = 1
    first: int = 1


def walk(config, interpret, *walks, marks=None):
    """The outputs of all walks, in one launch.

    Args:
      config: a BackwardConfig.
      interpret: runs the kernel in Pallas' interpreter.
      walks: (Walk, k, v, g, initial state or None) of sequences of the same length and sizes, which are padded ones.
        For walks forwards g may be [b, hk, t] float32, a gate a token, summed up inside each chunk.
      marks: `gating.mark_starts`'s, if sequences can begin inside chunks.

    Returns:
      of each walk, one after the other, what `states_kernel` leaves.
    """
    kind, k, v, *_ = walks[0]
    (sequences, length, _, keys), values, dtype = k.shape, v.shape[-1], k.dtype
    sequences = sequences // kind.of * kind.first
    n, value_parts = pl.cdiv(length, CHUNK), values // (VALUE_BLOCKS * CHUNK)
    blocks = keys // (config.key_blocks * CHUNK) * value_parts
    out_type, inputs = [], []
    for kind, k, v, g, initial in walks:
        shape, of_states = ((), jnp.float32) if kind.totals else ((n,), dtype)
        sizes = (keys, values) if kind.totals else (keys * values // CHUNK, CHUNK)
        out_type.append(jax.ShapeDtypeStruct((sequences, kind.heads, *shape, *sizes), of_states))
        if kind.has_decay:
            out_type.append(jax.ShapeDtypeStruct((sequences, kind.heads, *shape, keys), jnp.float32))
        if kind.has_last:
            out_type.append(jax.ShapeDtypeStruct((sequences, kind.heads, keys, values), jnp.float32))
        inputs += [k, v, g] if initial is None else [k, v, g, initial]
    kinds = [kind._replace(has_initial=initial is not None) for kind, *_, initial in walks]
    options = {"chunks": n, "blocks": blocks, "value_parts": value_parts, "walks": kinds}
    has_starts = marks is not None
    by_token = inputs[2].ndim == 3
    options["by_token"] = by_token
    run = plgpu.kernel(
        functools.partial(states_kernel, config=config, has_starts=has_starts, **options),
        out_type=tuple(out_type),
        grid=(sequences, max(kind.heads for kind in kinds), blocks * len(kinds)),
        grid_names=("batch", "head", "part"),
        num_threads=config.threads,
        thread_name="role",
        scratch_types=[scratch(config, dtype, has_starts, by_token)],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return run(*inputs, *(() if marks is None else (marks,)))


def through_parts(end, walked, parts, scale=None):
    """The states that enter each part of a sequence and the one after the last part; with scale, their cotangents.

    Args:
      end: [b, h, k, v] at the sequence's end where the walk starts; zeros if None.
      walked: [b * parts, h, k, v], what each part adds, but for scale, and [b * parts, h, k], the sum of its gates.
      parts: how many a sequence has.
      scale: factor of what is added, for a walk backwards: from the last part's end to before the first.

    Returns:
      [b, parts, h, k, v] and [b, h, k, v].
    """
    added, decay = (x.reshape(-1, parts, *x.shape[1:]) for x in walked)
    state, found = jnp.zeros_like(added[:, 0]) if end is None else end, []
    for i in range(parts) if scale is None else reversed(range(parts)):
        found.append(state)
        state = jnp.exp(decay[:, i, ..., None]) * state + (1.0 if scale is None else scale) * added[:, i]
    return jnp.stack(found if scale is None else found[::-1], 1), state


def states_kernel(*refs, config, has_starts, by_token, chunks, blocks, value_parts, walks):
    """The body; refs are k, v, g, [initial] of every walk, [marks], then states, [decay], [last] of each, the scratch.

    states is [b, h, n, k v / 64, 64] (forward.States) and decay [b, h, n, k]; with totals, [b, h, k, v] and [b, h, k]
    in float32. last is the last state [b, h, k, v] in float32. The grid's last axis has `blocks` of each walk, and its
    second the most heads.
    """
    *refs, s = refs
    refs, inputs = iter(refs), []
    for walk in walks:
        inputs.append([next(refs) if given else None for given in (True, True, True, walk.has_initial)])
    marks = next(refs) if has_starts else None
    part, head = lax.axis_index("part"), lax.axis_index("head")
    for i, walk in enumerate(walks):
        outputs = [next(refs) if wanted else None for wanted in (True, walk.has_decay, walk.has_last)]
        run = functools.partial(
            _walk,
            *(s, config, chunks, value_parts, walk, by_token, lax.rem(part, jnp.int32(blocks)), marks),
            *inputs[i],
            *outputs,
        )
        if len(walks) == 1:
            run()
        else:
            pl.when((lax.div(part, jnp.int32(blocks)) == i) & (head < walk.heads))(run)


def _walk(s, config, chunks, value_parts, walk, by_token, part, marks, k, v, g, initial, states, decay, last):
    warpgroup = lax.axis_index("role")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    source = lax.div(batch, jnp.int32(walk.first)) * walk.of + lax.rem(batch, jnp.int32(walk.first))
    key_part, value_part = lax.div(part, jnp.int32(value_parts)), lax.rem(part, jnp.int32(value_parts))
    channels = lambda i: pl.ds((key_part * config.key_blocks + i) * CHUNK, CHUNK)
    columns = lambda i: pl.ds((value_part * VALUE_BLOCKS + i) * CHUNK, CHUNK)

    @pl.when(warpgroup < config.key_blocks)
    def _compute():
        mine = channels(warpgroup)
        of_chunk = lambda x, n: x.at[batch, head] if walk.totals else x.at[batch, head, n]
        row = (key_part * config.key_blocks + warpgroup) * value_parts + value_part

        def place(n, i):
            if walk.totals:
                return of_chunk(states, n).at[mine, columns(i)]
            return of_chunk(states, n).at[pl.ds((row * VALUE_BLOCKS + i) * CHUNK, CHUNK)]

        def of_head(x, sequence=batch):
            return None if x is None else [x.at[sequence, head, mine, columns(i)] for i in range(VALUE_BLOCKS)]

        _carry_states(
            s,
            warpgroup,
            config,
            chunks,
            walk,
            by_token,
            initial=of_head(initial, source),
            states=place,
            decay=None if decay is None else lambda n: of_chunk(decay, n).at[mine],
            last=of_head(last),
            first_of_values=value_part == 0,
        )

    @pl.when(warpgroup == config.key_blocks)
    def _load():
        def chunk(n, _):
            slot = lax.rem(n, jnp.int32(config.state_stages))

            @pl.when(n >= config.state_stages)
            def _wait():
                plgpu.barrier_wait(s["free"].at[slot])

            place = chunks - 1 - n if walk.reverse else n
            tokens = pl.ds(place * CHUNK, CHUNK)
            copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.ZEROS)
            if marks is not None:
                copy(marks.at[source, place], s["marks"].at[slot], s["loaded"].at[slot])
            kv_head = lax.div(head, jnp.int32(walk.group))
            if by_token:
                copy(g.at[source, kv_head, tokens], s["g"].at[slot], s["loaded"].at[slot])
            for i in range(config.key_blocks):
                if not by_token:
                    copy(g.at[source, tokens, kv_head, channels(i)], s["g"].at[slot, i], s["loaded"].at[slot])
                copy(k.at[source, tokens, head, channels(i)], s["k"].at[slot, i], s["loaded"].at[slot])
            for i in range(VALUE_BLOCKS):
                copy(v.at[source, tokens, head, columns(i)], s["v"].at[slot, i], s["loaded"].at[slot])

        lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, None)
        for n in range(max(0, chunks - config.state_stages), chunks):
            plgpu.barrier_wait(s["free"].at[n % config.state_stages])


def _carry_states(s, warpgroup, config, chunks, walk, by_token, *, initial, states, decay, last, first_of_values):
    centre, after, row = s["centre"].at[warpgroup], s["after"].at[warpgroup], s["row"].at[warpgroup]
    copies, decays = s["state"].at[warpgroup], s["decay"].at[warpgroup]
    rows, columns = numbers()
    after[...] = jnp.where(columns <= rows if walk.reverse else columns > rows, 1.0, 0.0).astype(after.dtype)
    write_triangle(centre)

    def start(i):
        if initial is None:
            return nothing(jnp.float32)
        # The sum varies over no axis of a shard_map, as what the loop makes of it; what is loaded may.
        return nothing(jnp.float32) + plgpu.load(initial[i], layout=plgpu.Layout.WGMMA, optimized=False)

    def decays_of(slot):
        """The logarithms of what k is multiplied with, as they are summed up in the chunk, and B along the rows."""
        if by_token:
            b = s["g"].at[slot]
            total = vector(1.0) * b[CHUNK - 1]
            return along_rows(total - plgpu.load(b, layout=ROWS)), total
        g = s["g"].at[slot, warpgroup]
        g[...] = jnp.maximum(load(g), FLOOR).astype(g.dtype)
        plgpu.commit_smem()
        return products(g)

    def products(g):
        def run(sums, total):
            plgpu.wgmma(sums, after, g)
            plgpu.wgmma(total, g.T, centre.at[LAST].T)
            # The last row of the triangle is all 1/2, and no gate is positive: the least is B/2.
            return sums[...], 2.0 * jnp.min(total[...], axis=1)

        return pl.run_scoped(run, plgpu.ACC(TILE, jnp.float32), plgpu.ACC((CHUNK, 8), jnp.float32))

    def chunk(n, carry):
        carry, sum_of_totals = carry
        slot = lax.rem(n, jnp.int32(config.state_stages))
        plgpu.barrier_wait(s["loaded"].at[slot])
        k = s["k"].at[slot, warpgroup]
        sums, total = decays_of(slot)
        decayed = load(k) * (jnp.exp(sums) if walk.scale == 1.0 else jnp.exp(sums) * walk.scale)
        starts = Starts.read(s["marks"].at[slot]) if "marks" in s else None
        if starts is not None:
            decayed = (starts.before_first if walk.reverse else starts.after_last)(decayed)
        k[...] = decayed.astype(k.dtype)
        # B, of a chunk in which a sequence begins as that of one with resets.
        through = total if starts is None else total + jnp.where(starts.last > 0.0, 2.0 * FLOOR, 0.0)
        keep = along_rows(jnp.exp(through))
        if walk.totals:
            plgpu.commit_smem()
            return update(slot, k, carry, keep), sum_of_totals + through
        row[...] = total
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        # Along the columns every warp has the whole row: no reduction across warps.
        least = jnp.min(plgpu.layout_cast(row[...], COLUMNS))
        mild = jnp.where(least >= -config.mild, 1.0, 0.0)
        read = along_rows(jnp.exp(total * (0.5 * mild)))
        for i in range(VALUE_BLOCKS):
            copies[i] = (carry[i] * read).astype(copies.dtype)
        decays[...] = through + mild * (1.0 - total - through)
        plgpu.commit_smem()
        place = chunks - 1 - n if walk.reverse else n
        for i in range(VALUE_BLOCKS):
            plgpu.copy_smem_to_gmem(copies.at[i], states(place, i), commit_group=False)

        if decay is not None:

            @pl.when(first_of_values)
            def _write():
                plgpu.copy_smem_to_gmem(decays, decay(place), commit_group=False)

        plgpu.commit_smem_to_gmem_group()
        return update(slot, k, carry, keep), sum_of_totals

    def update(slot, k, carry, keep):
        updates = matmuls(*([(k.T, s["v"].at[slot, i])] for i in range(VALUE_BLOCKS)))
        carry = tuple(carry[i] * keep + updates[i] for i in range(VALUE_BLOCKS))
        plgpu.barrier_arrive(s["free"].at[slot])
        return carry

    init = tuple(start(i) for i in range(VALUE_BLOCKS)), vector(0.0)
    final, sum_of_totals = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, init)
    for i in range(VALUE_BLOCKS if last is not None else 0):
        last[i][...] = final[i]
    if walk.totals:
        for i in range(VALUE_BLOCKS):
            states(0, i)[...] = final[i]
        decays[...] = sum_of_totals
        plgpu.commit_smem()

        @pl.when(first_of_values)
        def _write_total():
            plgpu.copy_smem_to_gmem(decays, decay(0))

    plgpu.wait_smem_to_gmem(0)
