"""The backward's second kernel: one block walks back over the chunks with the cotangent of one head's state.

A warpgroup each 64 channels of k computes, and one more moves data. For each chunk, from the last to the first, with
the state S before it from backward_states.py, and the cotangent dS' of the one after it in registers:

- each computing warpgroup makes dq, dk and dg of its channels, and q~, k~, A and D = post dS' (backward_gates.py);
- after a barrier of them, each makes dv = k~ D + A^T do for its columns of v, where A's parts by channels add up, and
  dS = read (keep dS' + q~^T do) for its channels. (post, read, keep) is exp(B/2) thrice in a mild chunk, and
  (1, 1, exp(B)) in any other;
- after a second barrier dv goes over v, and the last warpgroup stores what was made and loads the next in its place.

dS is rounded to the inputs' dtype only as an operand of products.
"""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas.backward_config import VALUE_BLOCKS
from gla_jax.pallas.backward_gates import Tiles, exact_gradients, mild_gradients
from gla_jax.pallas.backward_states import ROWS, TILE, matmuls, parts, tile
from gla_jax.pallas.gating import CHUNK, along_rows, write_triangle


def scratch(config, dtype):
    """Shared memory and barriers of one block, by name."""
    blocks, tokens, values = config.key_blocks, config.token_stages, config.value_stages
    return {
        "q": tile((tokens, blocks, *TILE), dtype),
        "k": tile((tokens, blocks, *TILE), dtype),
        "g": tile((tokens, blocks, *TILE), dtype),
        "v": tile((values, VALUE_BLOCKS, *TILE), dtype),
        "do": tile((values, VALUE_BLOCKS, *TILE), dtype),
        "state": tile((values, blocks, VALUE_BLOCKS, *TILE), dtype),
        "d": tile((blocks, VALUE_BLOCKS, *TILE), dtype),
        "scores": tile((blocks, *TILE), dtype),
        "triangle": tile((blocks, *TILE), dtype),
        "decay": plgpu.SMEM((tokens, blocks, CHUNK), jnp.float32),
        "zero": plgpu.SMEM((blocks, 8), jnp.int32),
        "tokens_loaded": plgpu.Barrier(num_arrivals=4 * blocks, num_barriers=tokens),
        "values_loaded": plgpu.Barrier(num_arrivals=(2 + blocks) * VALUE_BLOCKS, num_barriers=values),
        "gated": plgpu.Barrier(num_arrivals=blocks),
        "multiplied": plgpu.Barrier(num_arrivals=blocks),
        "made": plgpu.Barrier(num_arrivals=blocks, num_barriers=tokens),
    }


def backward_kernel(*refs, config, chunks, value_parts, group, scale, has_final):
    """The body; refs are q, k, v, g, do, states, decay, [dfinal], dq, dk, dv, dg, dinitial, then the scratch.

    Everything is linear in the products over k and over v, so a block takes 64 or 128 channels and 128 columns. dq, dk
    and dg are [value_parts, b, t, h, k], dv is [key_parts, b, t, h, v] and dinitial [b, h, k, v]: who calls adds up
    parts, and query heads of a group.
    """
    q, k, v, g, do, states, decay, *final, dq, dk, dv, dg, dinitial, s = refs
    warpgroup = lax.axis_index("role")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    key_part, value_part, channels, columns = parts(config, value_parts)
    kv_head = lax.div(head, jnp.int32(group))
    blocks = config.key_blocks

    @pl.when(warpgroup < blocks)
    def _compute():
        plgpu.set_max_registers(config.compute_registers, action=config.action(config.compute_registers))
        _walk_back(
            s,
            warpgroup,
            config,
            chunks,
            scale,
            final=[final[0].at[batch, kv_head, channels(warpgroup), columns(i)] for i in range(VALUE_BLOCKS)]
            if has_final
            else None,
            # The query heads of a group share one state: its cotangent enters in the first.
            enters=jnp.where(lax.rem(head, jnp.int32(group)) == 0, 1.0, 0.0),
            initial=[dinitial.at[batch, head, channels(warpgroup), columns(i)] for i in range(VALUE_BLOCKS)],
        )

    @pl.when(warpgroup == blocks)
    def _move():
        plgpu.set_max_registers(config.load_registers, action=config.action(config.load_registers))
        tokens = lambda i: pl.ds((chunks - 1 - i) * CHUNK, CHUNK)
        copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.ZEROS)
        send = functools.partial(plgpu.copy_smem_to_gmem, commit_group=False)

        # What gradients are staged over waits until those are stored; the rest need not.
        def load_queries_and_keys(i):
            slot = lax.rem(i, jnp.int32(config.token_stages))
            loaded = s["tokens_loaded"].at[slot]
            for j in range(blocks):
                copy(q.at[batch, tokens(i), head, channels(j)], s["q"].at[slot, j], loaded)
                copy(k.at[batch, tokens(i), kv_head, channels(j)], s["k"].at[slot, j], loaded)
                copy(decay.at[batch, kv_head, chunks - 1 - i, channels(j)], s["decay"].at[slot, j], loaded)

        def load_gates(i):
            slot = lax.rem(i, jnp.int32(config.token_stages))
            for j in range(blocks):
                copy(g.at[batch, tokens(i), kv_head, channels(j)], s["g"].at[slot, j], s["tokens_loaded"].at[slot])

        def load_cotangents(i):
            slot = lax.rem(i, jnp.int32(config.value_stages))
            for j in range(VALUE_BLOCKS):
                copy(do.at[batch, tokens(i), head, columns(j)], s["do"].at[slot, j], s["values_loaded"].at[slot])

        def load_values_and_states(i):
            slot = lax.rem(i, jnp.int32(config.value_stages))
            loaded = s["values_loaded"].at[slot]
            for j in range(VALUE_BLOCKS):
                copy(v.at[batch, tokens(i), kv_head, columns(j)], s["v"].at[slot, j], loaded)
                for m in range(blocks):
                    state = states.at[batch, kv_head, chunks - 1 - i, channels(m), columns(j)]
                    copy(state, s["state"].at[slot, m, j], loaded)

        def store(i):
            slot, value_slot = lax.rem(i, jnp.int32(config.token_stages)), lax.rem(i, jnp.int32(config.value_stages))
            for j in range(blocks):
                send(s["state"].at[value_slot, j, 0], dq.at[value_part, batch, tokens(i), head, channels(j)])
                send(s["state"].at[value_slot, j, 1], dk.at[value_part, batch, tokens(i), head, channels(j)])
                send(s["g"].at[slot, j], dg.at[value_part, batch, tokens(i), head, channels(j)])
            for j in range(VALUE_BLOCKS):
                send(s["v"].at[value_slot, j], dv.at[key_part, batch, tokens(i), head, columns(j)])
            plgpu.commit_smem_to_gmem_group()

        for i in range(min(chunks, config.token_stages)):
            load_gates(jnp.int32(i))
            load_queries_and_keys(jnp.int32(i))
            if i < config.value_stages:
                load_cotangents(jnp.int32(i))
                load_values_and_states(jnp.int32(i))

        def chunk(i, _):
            plgpu.barrier_wait(s["made"].at[lax.rem(i, jnp.int32(config.token_stages))])
            store(i)
            value, token = i + config.value_stages, i + config.token_stages

            @pl.when(value < chunks)
            def _cotangents():
                load_cotangents(value)

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(value < chunks)
            def _values():
                load_values_and_states(value)

            @pl.when(token < chunks)
            def _tokens():
                load_gates(token)
                load_queries_and_keys(token)

        lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, None)
        plgpu.wait_smem_to_gmem(0)


def _walk_back(s, warpgroup, config, chunks, scale, *, final, enters, initial):
    """The computing role, for 64 channels of k and its share of the columns of v."""
    blocks = config.key_blocks
    share = VALUE_BLOCKS // blocks
    s["zero"][warpgroup, 0] = jnp.int32(0)
    write_triangle(s["triangle"].at[warpgroup])

    def start(i):
        if final is None:
            return plgpu.layout_cast(jnp.zeros(TILE, jnp.float32), plgpu.Layout.WGMMA)
        return plgpu.load(final[i], layout=plgpu.Layout.WGMMA, optimized=False) * enters

    def meet(barrier):
        plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def chunk(i, ds):
        slot, value_slot = lax.rem(i, jnp.int32(config.token_stages)), lax.rem(i, jnp.int32(config.value_stages))
        v, do = s["v"].at[value_slot], s["do"].at[value_slot]

        def make_tiles():
            # An index read from memory keeps addresses from being computed, and spilled, ahead of a loop.
            own = warpgroup + s["zero"][warpgroup, 0]
            return Tiles(
                q=s["q"].at[slot, own],
                k=s["k"].at[slot, own],
                g=s["g"].at[slot, own],
                state=s["state"].at[value_slot, own],
                d=s["d"].at[own],
                v=v,
                do=do,
                scores=s["scores"].at[own],
                triangle=s["triangle"].at[own],
                row=s["decay"].at[slot, own],
                zero=s["zero"].at[own],
            )

        tiles = make_tiles()
        zero = tiles.zero[0]
        wait_values = lambda: plgpu.barrier_wait(s["values_loaded"].at[value_slot])
        plgpu.barrier_wait(s["tokens_loaded"].at[slot])
        mild = jnp.where(s["decay"][slot, warpgroup, 0] > 0.5, 1.0, 0.0)
        total = plgpu.layout_cast(s["decay"][slot, warpgroup], ROWS)
        total += mild * (1.0 - 2.0 * total)
        post = jnp.exp(total * (0.5 * mild))

        @pl.when(mild > 0.5)
        def _mild():
            for j in range(VALUE_BLOCKS):
                tiles.d[j] = (ds[j] * along_rows(post)).astype(tiles.d.dtype)
            mild_gradients(tiles, ds, post, scale, wait_values)

        @pl.when(mild < 0.5)
        def _exact():
            exact_gradients(make_tiles, ds, total, scale, wait_values)

        meet(s["gated"])
        # The other half of a mild chunk's decay, or all of another's.
        keep = jnp.exp(total * (1.0 - 0.5 * mild))
        mine = [(warpgroup + zero) * share + j for j in range(share)]
        key_blocks = range(blocks)
        reads = [[(tiles.q.T, do.at[j])] for j in range(VALUE_BLOCKS)]
        writes = [
            [*((s["k"].at[slot, m], s["d"].at[m + zero, j]) for m in key_blocks)]
            + [(s["scores"].at[m + zero].T, do.at[j]) for m in key_blocks]
            for j in mine
        ]
        products = matmuls(*reads, *writes)
        updates, dvs = products[:VALUE_BLOCKS], products[VALUE_BLOCKS:]
        ds = tuple((ds[j] * along_rows(keep) + updates[j]) * along_rows(post) for j in range(VALUE_BLOCKS))
        meet(s["multiplied"])
        for j, dv in zip(mine, dvs, strict=True):
            v[j] = dv.astype(v.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["made"].at[slot])
        return ds

    init = tuple(start(i) for i in range(VALUE_BLOCKS))
    ds = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, init)
    for i in range(VALUE_BLOCKS):
        initial[i][...] = ds[i]
