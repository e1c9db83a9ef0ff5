"""The forward kernel: one block carries the state of one head and one slice of v over the whole sequence.

A tile is 64 tokens by 64 channels; a chunk is 64 tokens, k / 64 tiles. Three roles, each a warpgroup or two, work on
neighbouring tiles at the same time:

- the loader brings tiles of q, k and g and chunks of v into rings, and zeros past the end of the sequence;
- the gaters (gating.py, scalar_gating.py) turn q, k and g into q~, k~ and the factors of the state, tile by tile, and
  the scores A, chunk by chunk;
- the matmul warpgroups, 64 columns of v each, hold the state in registers and take each tile as soon as it is gated:
  o = scale * (q~ (read * S) + A v), S' = post * (keep * S + k~^T v). `post` is applied with the next chunk's factors.

The carried state is rounded to the inputs' dtype only as an operand of q~ S.
"""

import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas import gating
from gla_jax.pallas.gating import CHUNK
from gla_jax.pallas.scalar_gating import gate_tile_by_token, write_decayed_scores

_ROWS = plgpu.Layout.WGMMA.reduce(1)
_F32 = jnp.float32
_ACC = plgpu.ACC((CHUNK, CHUNK), _F32)


def scratch(config, dtype, gate_parts, has_starts=False):
    """Shared memory and barriers of one block, by name; gate_parts and has_starts as `forward_kernel`'s."""
    c, tile, _tile = config, (CHUNK, CHUNK), gating.tile_memory
    return marks_scratch(config, has_starts) | {
        # Slots of q, as many of k, and a tile of zeros.
        "qk": _tile((2 * c.qk_slots + 1, *tile), dtype),
        "g": _tile((c.g_slots, gate_parts, *tile), dtype)
        if gate_parts
        else plgpu.SMEM((c.g_slots, CHUNK), jnp.float32),
        "v": _tile((c.v_slots, c.matmul_groups, *tile), dtype),
        "scores": _tile((c.score_slots, c.block_gaters, *tile), dtype),
        "factors": plgpu.SMEM((3, c.qk_slots, CHUNK), jnp.float32),
        "triangle": _tile(tile, dtype),
        "spare": _tile((c.gaters, *tile), dtype),
        "rows": plgpu.SMEM((c.gaters, 3, CHUNK), jnp.float32),
        "number": plgpu.SMEM((c.gaters + c.matmul_groups, 8), jnp.int32),
        "copy": _tile((c.matmul_groups, 2, *tile), dtype),
        "prepared": plgpu.Barrier(num_arrivals=c.gaters),
        "qk_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=c.qk_slots),
        "g_loaded": plgpu.Barrier(num_arrivals=max(1, gate_parts), num_barriers=c.g_slots),
        "v_loaded": plgpu.Barrier(num_arrivals=c.matmul_groups, num_barriers=c.v_slots),
        "gated": plgpu.Barrier(num_barriers=c.qk_slots),
        "scored": plgpu.Barrier(num_arrivals=c.block_gaters, num_barriers=c.score_slots),
        "qk_free": plgpu.Barrier(num_arrivals=c.matmul_groups + 1, num_barriers=c.qk_slots),
        "g_free": plgpu.Barrier(num_arrivals=1 if gate_parts else c.block_gaters, num_barriers=c.g_slots),
        "v_free": plgpu.Barrier(num_arrivals=c.matmul_groups, num_barriers=c.v_slots),
        "scores_free": plgpu.Barrier(num_arrivals=c.matmul_groups, num_barriers=c.score_slots),
    }


def marks_scratch(config, has_starts):
    """What the gaters need besides where sequences can begin inside chunks."""
    if not has_starts:
        return {}
    return {
        "marks": plgpu.SMEM((config.score_slots, gating.MARKS, CHUNK), _F32),
        "marks_loaded": plgpu.Barrier(num_barriers=config.score_slots),
        "marks_free": plgpu.Barrier(num_arrivals=config.block_gaters, num_barriers=config.score_slots),
    }


def slot_of(n, slots, i=0, of=1, zero=None):
    """The ring's slot of the i-th of `of` tiles of chunk n."""
    if of == slots:
        return i if zero is None else zero + i
    return lax.rem(n * of + i, jnp.int32(slots))


def forward_kernel(
    *refs, config, chunks, group, scale, has_starts, has_initial, has_final, has_states, gate_parts, interpret
):
    """The body; refs are q, k, v, g, [marks], [initial state], o, [final state], [states, mild], then the scratch.

    g is [b, t, hk, gate_parts, k], whose parts sum up to the gate; or for gate_parts = 0 [b, hk, t], a gate a token in
    float32, already summed up inside each chunk. marks are `gating.mark_starts`'s, for gates a channel. Where sequences
    are cut in config.splits, each part is one of the batch, but states and mild are of whole ones.
    """
    q, k, v, g, *refs, s = refs
    refs = iter(refs)
    marks = next(refs) if has_starts else None
    initial = next(refs) if has_initial else None
    o = next(refs)
    final = next(refs) if has_final else None
    states, mild = refs if has_states else (None, None)
    warpgroup = lax.axis_index("role")
    batch, head, part = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part")
    kv_head = lax.div(head, jnp.int32(group))
    v_start = part * config.value_width
    first_gater = config.matmul_groups
    sequence, split = batch, 0
    if config.splits > 1:
        sequence, split = (f(batch, jnp.int32(config.splits)) for f in (lax.div, lax.rem))
    of_sequence = lambda n: split * chunks + n
    # Of the query heads of a group the first leaves the state that they share.
    first_of_group = True if group == 1 else lax.rem(head, jnp.int32(group)) == 0

    @pl.when(warpgroup < first_gater)
    def _matmul():
        plgpu.set_max_registers(config.matmul_registers, action=config.action(config.matmul_registers))
        columns = pl.ds(v_start + warpgroup * CHUNK, CHUNK)
        place = lambda i: pl.ds((i * (o.shape[3] // CHUNK) + part * first_gater + warpgroup) * CHUNK, CHUNK)
        carry_states(
            s,
            warpgroup,
            config,
            chunks,
            scale,
            interpret,
            initial=None if initial is None else initial.at[batch, kv_head, :, columns],
            final=None if final is None else final.at[batch, kv_head, :, columns],
            saved=None if states is None else lambda n, i: states.at[sequence, kv_head, of_sequence(n), place(i)],
            o=o.at[batch, :, head, columns],
            writes_states=first_of_group,
        )

    @pl.when((warpgroup >= first_gater) & (warpgroup < first_gater + config.gaters))
    def _gate():
        plgpu.set_max_registers(config.gate_registers, action=config.action(config.gate_registers))
        gater = warpgroup - first_gater

        def note(n, block, is_mild, mild: Any = mild):
            @pl.when(first_of_group & (part == 0))
            def _write():
                mild[sequence, kv_head, of_sequence(n), block] = jnp.where(is_mild, 1, 0).astype(jnp.int32)

        gate_chunks(s, gater, config, chunks, gate_parts == 0, interpret, note=None if mild is None else note)

    @pl.when(warpgroup == first_gater + config.gaters)
    def _load():
        plgpu.set_max_registers(config.load_registers, action=config.action(config.load_registers))
        load_tiles(s, config, chunks, gate_parts, q, k, v, g, marks, (batch, head, kv_head, v_start))


def load_tiles(s, config, chunks, gate_parts, q, k, v, g, marks, place):
    """The loader role."""
    batch, head, kv_head, v_start = place
    copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.ZEROS)

    def wait_free(name, slots, n, i=0, of=1):
        slot = slot_of(n, slots, i, of)

        @pl.when(n * of + i >= slots)
        def _wait():
            plgpu.barrier_wait(s[name].at[slot])

        return slot

    def chunk(n, _):
        tokens = pl.ds(n * CHUNK, CHUNK)
        if marks is not None:
            slot = wait_free("marks_free", config.score_slots, n)
            copy(marks.at[batch, n], s["marks"].at[slot], s["marks_loaded"].at[slot])
        for i in range(config.key_blocks):
            channels = pl.ds(i * CHUNK, CHUNK)
            if gate_parts:
                slot = wait_free("g_free", config.g_slots, n, i, config.key_blocks)
                for part in range(gate_parts):
                    source = g.at[batch, tokens, kv_head, part, channels]
                    copy(source, s["g"].at[slot, part], s["g_loaded"].at[slot])
            elif i == 0:
                slot = wait_free("g_free", config.g_slots, n)
                copy(g.at[batch, kv_head, tokens], s["g"].at[slot], s["g_loaded"].at[slot])
            slot = wait_free("qk_free", config.qk_slots, n, i, config.key_blocks)
            copy(q.at[batch, tokens, head, channels], s["qk"].at[slot], s["qk_loaded"].at[slot])
            copy(k.at[batch, tokens, kv_head, channels], s["qk"].at[config.qk_slots + slot], s["qk_loaded"].at[slot])
            if i == 0:
                slot = wait_free("v_free", config.v_slots, n)
                for j in range(config.matmul_groups):
                    columns = pl.ds(v_start + j * CHUNK, CHUNK)
                    copy(v.at[batch, tokens, kv_head, columns], s["v"].at[slot, j], s["v_loaded"].at[slot])

    lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, None)
    # Every completion of a barrier has to be seen.
    tiles = chunks * config.key_blocks
    ends = [("qk_free", tiles, config.qk_slots), ("g_free", tiles if gate_parts else chunks, config.g_slots)]
    if marks is not None:
        ends.append(("marks_free", chunks, config.score_slots))
    for name, count, slots in (*ends, ("v_free", chunks, config.v_slots)):
        for n in range(max(0, count - slots), count):
            plgpu.barrier_wait(s[name].at[n % slots])


def gate_chunks(s, gater, config, chunks, scalar_gate, interpret, at_end=None, note=None):
    """The gater role.

    at_end: None if each tile is taken as soon as it is gated. Otherwise nobody takes one before its chunk's scores are
      there, and this is called with each slot just before.
    note: called with a chunk's number, a block of 64 channels and whether the factor `read` is exp(B/2) there, or 1.
    """
    arrive = lambda name, slot: plgpu.barrier_arrive(s[name].at[slot]) if at_end is None else None
    zeros = jnp.int32(2 * config.qk_slots)
    number, rows = s["number"].at[config.matmul_groups + gater], s["rows"].at[gater]
    own = config.key_blocks // config.block_gaters
    share, turn = lax.rem(gater, jnp.int32(config.block_gaters)), lax.div(gater, jnp.int32(config.block_gaters))
    number[0] = jnp.int32(0)

    @pl.when(gater == 0)
    def _prepare():
        gating.write_triangle(s["triangle"])
        if not scalar_gate:
            s["qk"][zeros] = gating.nothing(s["qk"].dtype)

    plgpu.commit_smem()
    plgpu.barrier_arrive(s["prepared"])
    plgpu.barrier_wait(s["prepared"])

    def chunk(i, _):
        n = i * config.turns + turn
        score_slot = slot_of(n, config.score_slots)
        if scalar_gate:
            plgpu.barrier_wait(s["g_loaded"].at[slot_of(n, config.g_slots)])
        scores = s["scores"].at[score_slot, share]

        @pl.when(n >= config.score_slots)
        def _wait():
            plgpu.barrier_wait(s["scores_free"].at[score_slot])

        starts = None
        if "marks" in s:
            plgpu.barrier_wait(s["marks_loaded"].at[score_slot])
            starts = gating.Starts.read(s["marks"].at[score_slot])
        tools = gating.Tools(s["triangle"], scores, s["spare"].at[gater], rows, number)

        def tile(j, carry):
            a, before, before_k = carry
            block = share * own + j
            slot = slot_of(n, config.qk_slots, block, config.key_blocks)
            q, k, factors = s["qk"].at[slot], s["qk"].at[config.qk_slots + slot], s["factors"].at[:, slot]
            if scalar_gate:
                plgpu.barrier_wait(s["qk_loaded"].at[slot])
                b = s["g"].at[slot_of(n, config.g_slots)]
                products, is_mild = gate_tile_by_token(q, k, b, factors, config.mild)
                a += products
                if note is not None:
                    note(n, block, is_mild)
                arrive("gated", slot)
                arrive("qk_free", slot)
                return a, before, before_k
            g_slot = slot_of(n, config.g_slots, block, config.key_blocks)
            g = s["g"].at[g_slot]
            plgpu.barrier_wait(s["g_loaded"].at[g_slot])
            if own == 1:
                e, half = gating.centre(tools.triangle, g)
            else:
                e, half, a = gating.centre(tools.triangle, g, (a, s["qk"].at[before], s["qk"].at[before_k]), interpret)

                @pl.when(j > 0)
                def _free():
                    arrive("qk_free", before)

            ready = lambda: plgpu.barrier_wait(s["qk_loaded"].at[slot])
            done = lambda: plgpu.barrier_arrive(s["g_free"].at[g_slot])
            is_plain, is_mild, a = gating.gate_tile(
                q, k, g, e, half, a, factors, tools, config.mild, ready, done, starts, interpret
            )
            if note is not None:
                note(n, block, is_mild)
            arrive("gated", slot)
            # A tile whose scores are in `a` already meets zeros.
            return a, slot, jnp.where(is_plain, config.qk_slots + slot, zeros)

        alone = own == 1 and not scalar_gate
        carry = None if alone else gating.nothing(_F32), zeros, zeros
        carry = tile(jnp.int32(0), carry) if own == 1 else lax.fori_loop(jnp.int32(0), jnp.int32(own), tile, carry)
        a, before, before_k = carry
        if scalar_gate:
            g_slot = slot_of(n, config.g_slots)
            write_decayed_scores(scores, a, s["triangle"], s["g"].at[g_slot], rows.at[0])
            plgpu.barrier_arrive(s["g_free"].at[g_slot])
        else:
            last = lambda: gating.matmul(s["qk"].at[before], s["qk"].at[before_k].T)
            if alone:
                pl.when(before_k != zeros)(lambda: gating.write_scores(scores, last(), s["triangle"]))
            else:
                a += last()
            arrive("qk_free", before)
            gating.write_scores(scores, a, s["triangle"], starts)
            if starts is not None:
                plgpu.barrier_arrive(s["marks_free"].at[score_slot])
        if at_end is not None:
            for j in range(own):
                at_end(slot_of(n, config.qk_slots, share * own + j, config.key_blocks))
            plgpu.commit_smem()
        plgpu.barrier_arrive(s["scored"].at[score_slot])

    lax.fori_loop(jnp.int32(0), lax.div(chunks - turn + config.turns - 1, jnp.int32(config.turns)), chunk, None)
    for n in range(max(0, chunks - config.score_slots), chunks):

        @pl.when(turn == n % config.turns)
        def _drain(n=n):
            plgpu.barrier_wait(s["scores_free"].at[n % config.score_slots])


def carry_states(s, warpgroup, config, chunks, scale, interpret, *, initial, final, saved, o, writes_states):
    """The matmul role: runs the recurrence over the chunks for 64 columns of v.

    saved: by chunk and 64 channels, where what is read of the state that enters goes, read * S; or None.
    """
    blocks = config.key_blocks
    rows = lambda x: lax.broadcast_in_dim(x, (CHUNK, CHUNK), (0,))
    load_factor = lambda slot, j: plgpu.layout_cast(s["factors"][j, slot], _ROWS)

    def copy_at(n, i):
        # Two tiles in turns for the copies of the state, and o takes its turn after them.
        return s["copy"].at[warpgroup, lax.rem(n * (blocks + 1) + i, jnp.int32(2))]

    def wait_copy(i):
        if saved is not None:
            # If every turn is stored, the one before may still be read.
            plgpu.wait_smem_to_gmem(1 if writes_states is True else 0, wait_read_only=True)
        elif i == 1:
            # o alone is.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    s["number"][warpgroup, 0] = jnp.int32(0)
    plgpu.commit_smem()

    def store_state(copy, n, i):
        pl.when(writes_states)(lambda: plgpu.copy_smem_to_gmem(copy, saved(n, i)))

    def start(i):
        if initial is None:
            return gating.nothing(_F32)
        # From zeros, which vary over the axes of a mesh as what is added to them does.
        return gating.nothing(_F32) + plgpu.load(
            initial.at[pl.ds(i * CHUNK, CHUNK)], layout=plgpu.Layout.WGMMA, optimized=False
        )

    def chunk(n, carry):
        v_slot, score_slot = slot_of(n, config.v_slots), slot_of(n, config.score_slots)
        v = s["v"].at[v_slot, warpgroup]

        def products(o_acc):
            states, posts = (list(x) for x in carry)
            for i in range(blocks):
                zero = s["number"][warpgroup, 0]
                slot = slot_of(n, config.qk_slots, i, blocks, zero)
                plgpu.barrier_wait(s["gated"].at[slot])
                wait_copy(i)
                copy = copy_at(n, i)
                copy[...] = (states[i] * rows(posts[i] * load_factor(slot, 0))).astype(copy.dtype)
                kept = states[i] * rows(posts[i] * load_factor(slot, 1))
                posts[i] = load_factor(slot, 2)
                plgpu.commit_smem()
                if saved is not None:
                    store_state(copy, n, i)
                if i == 0:
                    plgpu.barrier_wait(s["v_loaded"].at[v_slot])

                def update(state, slot=slot, i=i):
                    # Places are made here: `run_state` cannot close over constant ones.
                    plgpu.wgmma(o_acc, s["qk"].at[slot], copy_at(n, i))
                    plgpu.wgmma(state, s["qk"].at[config.qk_slots + slot].T, v)
                    plgpu.wgmma_wait(0)

                if interpret:

                    def fresh(acc):
                        update(acc)
                        return acc[...]

                    states[i] = kept + pl.run_scoped(fresh, _ACC)
                else:
                    states[i] = pl.run_state(update)(plgpu.ACC.init(kept))
                plgpu.barrier_arrive(s["qk_free"].at[slot])
            plgpu.barrier_wait(s["scored"].at[score_slot])
            for i in range(config.block_gaters):
                plgpu.wgmma(o_acc, s["scores"].at[score_slot, i], v)
            return o_acc[...], tuple(states), tuple(posts)

        out, *carry = pl.run_scoped(products, _ACC)
        plgpu.barrier_arrive(s["scores_free"].at[score_slot])
        plgpu.barrier_arrive(s["v_free"].at[v_slot])
        o_tile = copy_at(n, blocks)
        wait_copy(blocks)
        o_tile[...] = (out * scale).astype(o_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(o_tile, o.at[pl.ds(n * CHUNK, CHUNK)])
        return tuple(carry)

    init = tuple(start(i) for i in range(blocks)), (gating.vector(1.0),) * blocks
    states, posts = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, init)
    if final is not None:

        @pl.when(writes_states)
        def _write():
            for i in range(blocks):
                final[pl.ds(i * CHUNK, CHUNK), :] = states[i] * rows(posts[i])

    plgpu.wait_smem_to_gmem(0)
