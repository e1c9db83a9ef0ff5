"""The forward kernel: one block carries the state of one head and one slice of v over the whole sequence.

Three roles, each a warpgroup or two, work on neighbouring chunks of 64 tokens at the same time:

- the loader brings q, k, g and v of a chunk into a ring of stages, and zeros past the end of the sequence;
- the gaters (gating.py, scalar_gating.py) turn q, k and g into q~, k~, the scores A and the factors of the state;
- the matmul warpgroups, 64 columns of v each, hold the state in registers:
  o = scale * (q~ (read * S) + A v), S' = post * (keep * S + k~^T v). `post` is applied with the next chunk's factors.

The carried state is rounded to the inputs' dtype only as an operand of q~ S.
"""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas import gating
from gla_jax.pallas.gating import CHUNK
from gla_jax.pallas.scalar_gating import gate_chunk_by_token

_ROWS = plgpu.Layout.WGMMA.reduce(1)


def _tile(shape, dtype):
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _set_registers(config, registers):
    plgpu.set_max_registers(registers, action=config.action(registers))


def scratch(config, dtype, scalar_gate):
    """Shared memory and barriers of one block, by name."""
    blocks, stages = config.key_blocks, config.stages
    tile = (CHUNK, CHUNK)
    return {
        "q": _tile((stages, blocks, *tile), dtype),
        "k": _tile((stages, blocks, *tile), dtype),
        "g": plgpu.SMEM((stages, CHUNK), jnp.float32) if scalar_gate else _tile((stages, blocks, *tile), dtype),
        "v": _tile((stages, config.matmul_groups, *tile), dtype),
        "scores": _tile((stages, config.block_gaters, *tile), dtype),
        "factors": plgpu.SMEM((stages, 3, blocks, CHUNK), jnp.float32),
        "triangle": _tile((config.gaters, *tile), dtype),
        "rows": plgpu.SMEM((config.gaters, 3, CHUNK), jnp.float32),
        "zero": plgpu.SMEM((config.gaters, 8), jnp.int32),
        "state": _tile((config.matmul_groups, blocks, *tile), dtype),
        "o": _tile((config.matmul_groups, *tile), dtype),
        "loaded": plgpu.Barrier(num_arrivals=2 * blocks + (1 if scalar_gate else blocks), num_barriers=stages),
        "v_loaded": plgpu.Barrier(num_arrivals=config.matmul_groups, num_barriers=stages),
        "gated": plgpu.Barrier(num_arrivals=config.block_gaters, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=config.matmul_groups, num_barriers=stages),
    }


def forward_kernel(*refs, config, chunks, group, scale, has_initial, has_final, scalar_gate, interpret):
    """The body; refs are q, k, v, g, [initial state], o, [final state], then the scratch.

    g is [b, t, hk, k], or with `scalar_gate` [b, hk, t]: float32 and already summed up inside each chunk.
    """
    refs = list(refs)
    s = refs.pop()
    q, k, v, g = refs[:4]
    initial = refs[4] if has_initial else None
    final = refs[-1] if has_final else None
    o = refs[5 if has_initial else 4]
    warpgroup = lax.axis_index("role")
    batch, head, part = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part")
    kv_head = lax.div(head, jnp.int32(group))
    v_start = part * (config.matmul_groups * CHUNK)
    stage = lambda n: lax.rem(n, jnp.int32(config.stages))

    @pl.when(warpgroup < config.matmul_groups)
    def _matmul():
        _set_registers(config, config.matmul_registers)
        columns = pl.ds(v_start + warpgroup * CHUNK, CHUNK)
        carry_states(
            s,
            warpgroup,
            config,
            chunks,
            scale,
            interpret,
            initial=None if initial is None else initial.at[batch, kv_head, :, columns],
            final=None if final is None else final.at[batch, kv_head, :, columns],
            o=o.at[batch, :, head, columns],
            writes_final=lax.rem(head, jnp.int32(group)) == 0,
        )

    first_gater = config.matmul_groups

    @pl.when((warpgroup >= first_gater) & (warpgroup < first_gater + config.gaters))
    def _gate():
        _set_registers(config, config.gate_registers)
        gater = warpgroup - first_gater
        if not scalar_gate:
            s["zero"][gater, 0] = jnp.int32(0)
            gating.write_triangle(s["triangle"].at[gater])
        own = config.key_blocks // config.block_gaters
        share = lax.rem(gater, jnp.int32(config.block_gaters))
        turn = lax.div(gater, jnp.int32(config.block_gaters))
        turns = config.gaters // config.block_gaters
        mine = pl.ds(share * own, own)

        def chunk(i, _):
            n = i * turns + turn
            slot = stage(n)
            plgpu.barrier_wait(s["loaded"].at[slot])
            q, k = s["q"].at[slot, mine], s["k"].at[slot, mine]
            scores, factors = s["scores"].at[slot, pl.ds(share, 1)], s["factors"].at[slot, :, mine]
            if scalar_gate:
                gate_chunk_by_token(q, k, s["g"].at[slot], scores, factors, s["rows"].at[gater, 0])
            else:
                triangle, rows, zero = s["triangle"].at[pl.ds(gater, 1)], s["rows"].at[gater], s["zero"].at[gater]
                gating.gate_chunk(q, k, s["g"].at[slot, mine], scores, factors, triangle, rows, zero, config.mild)
            plgpu.barrier_arrive(s["gated"].at[slot])

        lax.fori_loop(jnp.int32(0), lax.div(chunks - turn + turns - 1, jnp.int32(turns)), chunk, None)

    @pl.when(warpgroup == first_gater + config.gaters)
    def _load():
        _set_registers(config, config.load_registers)

        def chunk(n, _):
            slot = stage(n)

            @pl.when(n >= config.stages)
            def _wait():
                plgpu.barrier_wait(s["free"].at[slot])

            tokens = pl.ds(n * CHUNK, CHUNK)
            copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.ZEROS)
            if scalar_gate:
                copy(g.at[batch, kv_head, tokens], s["g"].at[slot], s["loaded"].at[slot])
            for i in range(config.key_blocks):
                channels = pl.ds(i * CHUNK, CHUNK)
                if not scalar_gate:
                    copy(g.at[batch, tokens, kv_head, channels], s["g"].at[slot, i], s["loaded"].at[slot])
                copy(q.at[batch, tokens, head, channels], s["q"].at[slot, i], s["loaded"].at[slot])
                copy(k.at[batch, tokens, kv_head, channels], s["k"].at[slot, i], s["loaded"].at[slot])
            for i in range(config.matmul_groups):
                columns = pl.ds(v_start + i * CHUNK, CHUNK)
                copy(v.at[batch, tokens, kv_head, columns], s["v"].at[slot, i], s["v_loaded"].at[slot])

        lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, None)
        for n in range(max(0, chunks - config.stages), chunks):
            plgpu.barrier_wait(s["free"].at[n % config.stages])


def carry_states(s, warpgroup, config, chunks, scale, interpret, *, initial, final, o, writes_final):
    """The matmul role: runs the recurrence over the chunks for 64 columns of v."""
    blocks = config.key_blocks
    rows = lambda x: lax.broadcast_in_dim(x, (CHUNK, CHUNK), (0,))
    load_factor = lambda slot, j, i: plgpu.layout_cast(s["factors"][slot, j, i], _ROWS)
    o_tile, copies = s["o"].at[warpgroup], s["state"].at[warpgroup]

    def start(i):
        if initial is None:
            return plgpu.layout_cast(jnp.zeros((CHUNK, CHUNK), jnp.float32), plgpu.Layout.WGMMA)
        return plgpu.load(initial.at[pl.ds(i * CHUNK, CHUNK)], layout=plgpu.Layout.WGMMA, optimized=False)

    def chunk(n, carry):
        states, posts = carry
        slot = lax.rem(n, jnp.int32(config.stages))
        plgpu.barrier_wait(s["gated"].at[slot])
        for i in range(blocks):
            read = posts[i] * load_factor(slot, 0, i)
            copies[i] = (states[i] * rows(read)).astype(copies.dtype)
        plgpu.commit_smem()
        plgpu.barrier_wait(s["v_loaded"].at[slot])
        v = s["v"].at[slot, warpgroup]

        kept = tuple(states[i] * rows(posts[i] * load_factor(slot, 1, i)) for i in range(blocks))

        def send(out):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_tile[...] = (out * scale).astype(o_tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_tile, o.at[pl.ds(n * CHUNK, CHUNK)])

        def products(o_acc, updates):
            for i in range(blocks):
                plgpu.wgmma(o_acc, s["q"].at[slot, i], copies.at[i])
            for i in range(config.block_gaters):
                plgpu.wgmma(o_acc, s["scores"].at[slot, i], v)
            for i in range(blocks):
                plgpu.wgmma(updates[i], s["k"].at[slot, i].T, v)

        accumulator = plgpu.ACC((CHUNK, CHUNK), jnp.float32)
        if interpret:

            def fresh(o_acc, *updates):
                products(o_acc, updates)
                send(o_acc[...])
                return [u[...] for u in updates]

            states = pl.run_scoped(fresh, accumulator, *[accumulator] * blocks)
            states = tuple(x + y for x, y in zip(kept, states, strict=True))
        else:

            def carried(updates):
                def inner(o_acc):
                    products(o_acc, updates)
                    send(plgpu.wgmma_accumulator_load(o_acc, wait_n=blocks))
                    plgpu.wgmma_wait(0)

                pl.run_scoped(inner, accumulator)

            states = pl.run_state(carried)(tuple(plgpu.ACC.init(x) for x in kept))
        posts = tuple(load_factor(slot, 2, i) for i in range(blocks))
        plgpu.barrier_arrive(s["free"].at[slot])
        return states, posts

    one = plgpu.layout_cast(jnp.ones((CHUNK,), jnp.float32), _ROWS)
    init = tuple(start(i) for i in range(blocks)), (one,) * blocks
    states, posts = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, init)
    if final is not None:

        @pl.when(writes_final)
        def _write():
            for i in range(blocks):
                final[pl.ds(i * CHUNK, CHUNK), :] = states[i] * rows(posts[i])

    plgpu.wait_smem_to_gmem(0)
