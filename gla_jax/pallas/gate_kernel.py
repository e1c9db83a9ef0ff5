"""The first of two passes: applies the gates of all chunks, in parallel, for scan_kernel.py.

One block goes through some chunks of one head. Its gaters, which share the channels of a chunk, work as in
the kernel of one pass (forward_kernel.py), but instead of giving tiles to matmul warpgroups they write q~, k~, a share
of A each, and kappa, the chunk's decay. One more warpgroup loads and stores.
"""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas import gating
from gla_jax.pallas.forward_kernel import gate_chunks, marks_scratch, slot_of
from gla_jax.pallas.gating import CHUNK

_F32 = jnp.float32


def scratch(config, dtype, gate_parts, has_starts=False):
    """Shared memory and barriers of one block, by name; gate_parts and has_starts as `forward_kernel`'s."""
    c = config
    tile = lambda *shape: gating.tile_memory((*shape, CHUNK, CHUNK), dtype)
    return marks_scratch(config, has_starts) | {
        # Slots of q, as many of k, and a tile of zeros.
        "qk": tile(2 * c.qk_slots + 1),
        "g": tile(c.g_slots, gate_parts) if gate_parts else plgpu.SMEM((c.g_slots, CHUNK), _F32),
        "scores": tile(c.score_slots, c.block_gaters),
        "factors": plgpu.SMEM((3, c.qk_slots, CHUNK), _F32),
        "triangle": tile(),
        "spare": tile(c.gaters),
        "rows": plgpu.SMEM((c.gaters, 3, CHUNK), _F32),
        "number": plgpu.SMEM((c.gaters, 8), jnp.int32),
        "prepared": plgpu.Barrier(num_arrivals=c.gaters),
        "qk_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=c.qk_slots),
        "g_loaded": plgpu.Barrier(num_arrivals=max(1, gate_parts), num_barriers=c.g_slots),
        "scored": plgpu.Barrier(num_arrivals=c.block_gaters, num_barriers=c.score_slots),
        "g_free": plgpu.Barrier(num_arrivals=1 if gate_parts else c.block_gaters, num_barriers=c.g_slots),
        "scores_free": plgpu.Barrier(num_barriers=c.score_slots),
    }


def gate_kernel(q, k, g, *refs, config, chunks, parts, group, gate_parts, interpret):
    """The body; refs are [marks], then `scan_kernel`'s operands, then the scratch, arguments as `forward_kernel`'s.

    chunks: those of one block.
    parts: blocks of one head. They go from the last chunks to the first, all at once: what the second pass reads first
      was written last, and is still in L2.
    """
    *marks, q_out, k_out, scores_out, kappa_out, s = refs
    c = config
    warpgroup = lax.axis_index("role")
    batch, head, part = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part")
    place = lambda n: (chunks - 1 - n) * parts + part

    @pl.when(warpgroup < c.gaters)
    def _gate():
        plgpu.set_max_registers(c.gate_registers, action=c.action(c.gate_registers))

        def at_end(slot):
            gating.apply_factors(s["qk"].at[slot], s["qk"].at[c.qk_slots + slot], s["factors"].at[:, slot])

        gate_chunks(s, warpgroup, c, chunks, gate_parts == 0, interpret, at_end)

    @pl.when(warpgroup == c.gaters)
    def _move():
        plgpu.set_max_registers(c.load_registers, action=c.action(c.load_registers))
        kv_head = lax.div(head, jnp.int32(group))
        sources = q.at[batch, :, head], k.at[batch, :, kv_head]
        gates = g.at[batch, :, kv_head] if gate_parts else g.at[batch, kv_head]
        outputs = tuple(x.at[batch, head] for x in (q_out, k_out, scores_out, kappa_out))
        _move_chunks(s, c, place, chunks, gate_parts, sources, gates, [x.at[batch] for x in marks], outputs)


def _move_chunks(s, c, place, chunks, gate_parts, sources, gates, marks, outputs):
    """Loads tiles, and stores them when they are gated; the n-th chunk of the block is number place(n) of the head."""
    copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.ZEROS)
    blocks = c.key_blocks
    tokens = lambda n: pl.ds(place(n) * CHUNK, CHUNK)

    def load_qk(n):
        for i in range(blocks):
            slot = slot_of(n, c.qk_slots, i, blocks)
            for j, source in enumerate(sources):
                tile = s["qk"].at[j * c.qk_slots + slot]
                copy(source.at[tokens(n), pl.ds(i * CHUNK, CHUNK)], tile, s["qk_loaded"].at[slot])

    gate_tiles = blocks if gate_parts else 1

    def load_g(n):
        for i in range(gate_tiles):
            slot = slot_of(n, c.g_slots, i, gate_tiles)
            for part in range(gate_parts):
                source = gates.at[tokens(n), part, pl.ds(i * CHUNK, CHUNK)]
                copy(source, s["g"].at[slot, part], s["g_loaded"].at[slot])
            if not gate_parts:
                copy(gates.at[tokens(n)], s["g"].at[slot], s["g_loaded"].at[slot])

    def load_marks(n):
        for source in marks:
            slot = slot_of(n, c.score_slots)
            copy(source.at[place(n)], s["marks"].at[slot], s["marks_loaded"].at[slot])

    def wait_g_free(n):
        for i in range(gate_tiles):
            plgpu.barrier_wait(s["g_free"].at[slot_of(n, c.g_slots, i, gate_tiles)])

    ahead, g_ahead = c.qk_slots // blocks, c.g_slots // gate_tiles
    for n in range(min(c.score_slots, chunks)):
        load_marks(jnp.int32(n))
    for n in range(min(g_ahead, chunks)):
        load_g(jnp.int32(n))
    for n in range(min(ahead, chunks)):
        load_qk(jnp.int32(n))

    def chunk(n, _):
        # Every completion of a barrier has to be seen.
        wait_g_free(n)
        pl.when(n + g_ahead < chunks)(lambda: load_g(n + g_ahead))
        score_slot = slot_of(n, c.score_slots)
        for _ in marks:
            plgpu.barrier_wait(s["marks_free"].at[score_slot])
            pl.when(n + c.score_slots < chunks)(lambda: load_marks(n + c.score_slots))
        plgpu.barrier_wait(s["scored"].at[score_slot])
        first = lax.rem(n, jnp.int32(ahead)) * blocks
        slots, k_slots = pl.ds(first, blocks), pl.ds(c.qk_slots + first, blocks)
        results = s["qk"].at[slots], s["qk"].at[k_slots], s["scores"].at[score_slot], s["factors"].at[0, slots]
        for result, out in zip(results, outputs, strict=True):
            plgpu.copy_smem_to_gmem(result, out.at[place(n)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s["scores_free"].at[score_slot])
        pl.when(n + ahead < chunks)(lambda: load_qk(n + ahead))

    lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, None)
    plgpu.wait_smem_to_gmem(0)
