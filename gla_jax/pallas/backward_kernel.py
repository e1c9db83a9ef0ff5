"""The backward's second kernel: one block walks back over the chunks with the cotangent of one head's state.

A warpgroup each 64 channels of k computes, and one more loads data. For each chunk, from the last to the first, with
the state S before it from the forward or backward_states.py, and the cotangent dS' of the one after it in registers:

- each computing warpgroup makes dq, dk and dg of its channels, and q~, k~, A and D = post dS' (backward_gates.py);
- after a barrier of them, each makes dv = k~ D + A^T do for its columns of v, where A's parts by channels add up, and
  dS = read (keep dS' + q~^T do) for its channels. (post, read, keep) is exp(B/2) thrice in a mild chunk, and
  (1, 1, exp(B)) in any other;
- after a second barrier dq goes over q~, dk over k~, dv over D, and all of them out; dg, over g, went before the first.

dS is rounded to the inputs' dtype only as an operand of products. Channels that are mild in every chunk take a loop of
their own: registers go round in it, and the code for other gates is not in its way.
"""

import functools

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas.backward_config import VALUE_BLOCKS
from gla_jax.pallas.backward_gates import Tiles, exact_gradients, mild_gradients, write_lower
from gla_jax.pallas.backward_states import TILE, matmuls, tile
from gla_jax.pallas.gating import CHUNK, MARKS, along_rows, nothing, vector


def scratch(config, dtype, has_starts=False):
    """Shared memory and barriers of one block, by name."""
    blocks, tokens, values = config.key_blocks, config.token_stages, config.value_stages
    marks = {"marks": plgpu.SMEM((tokens, MARKS, CHUNK), jnp.float32)} if has_starts else {}
    return marks | {
        "q": tile((tokens, blocks, *TILE), dtype),
        "k": tile((tokens, blocks, *TILE), dtype),
        "g": tile((tokens, blocks, *TILE), dtype),
        "v": tile((values, VALUE_BLOCKS, *TILE), dtype),
        "do": tile((values, VALUE_BLOCKS, *TILE), dtype),
        "state": tile((values, blocks, VALUE_BLOCKS, *TILE), dtype),
        "d": tile((blocks, VALUE_BLOCKS, *TILE), dtype),
        "scores": tile((blocks, *TILE), dtype),
        "lower": tile((blocks, *TILE), dtype),
        "row": plgpu.SMEM((blocks, CHUNK), jnp.float32),
        "tokens_loaded": plgpu.Barrier(num_arrivals=3 * blocks + has_starts, num_barriers=tokens),
        "values_loaded": plgpu.Barrier(num_arrivals=(1 + blocks) * VALUE_BLOCKS, num_barriers=values),
        "cotangents_loaded": plgpu.Barrier(num_arrivals=VALUE_BLOCKS, num_barriers=values),
        "gated": plgpu.Barrier(num_arrivals=blocks),
        "multiplied": plgpu.Barrier(num_arrivals=blocks),
        "tokens_free": plgpu.Barrier(num_arrivals=blocks, num_barriers=tokens),
        "values_free": plgpu.Barrier(num_arrivals=blocks, num_barriers=values),
        "cotangents_free": plgpu.Barrier(num_arrivals=blocks, num_barriers=values),
    }


def backward_kernel(*refs, config, chunks, splits, group, scale, has_starts, has_final):
    """The body; refs are q, k, v, g, do, states, mild, all_mild, [marks], [dfinal], then outputs, then the scratch.

    A block takes all of one head's 64 or 128 channels and 128 columns. Outputs are dq, dk, dv, dg and dinitial: dq, dk
    and dg are [b, t, h, k], dv [b, t, h, v], and dfinal and dinitial [b, h, k, v], and who calls adds up query heads of
    a group. states and mild (forward.States) are of whole sequences if these are cut in `splits`: [b / splits, hk,
    splits * chunks, ...]. all_mild is [b / splits, hk, splits, k / 64] int32, 1 for channels that are mild in every
    chunk, and marks `gating.mark_starts`'s.
    """
    q, k, v, g, do, states, mild, all_mild, *given, dq, dk, dv, dg, dinitial, s = refs
    marks, final = given[:has_starts], given[has_starts:]
    warpgroup = lax.axis_index("role")
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    channels = columns = lambda i: pl.ds(i * CHUNK, CHUNK)
    kv_head = lax.div(head, jnp.int32(group))
    blocks = config.key_blocks
    tokens = lambda i: pl.ds((chunks - 1 - i) * CHUNK, CHUNK)
    sequence, split = lax.div(batch, jnp.int32(splits)), lax.rem(batch, jnp.int32(splits))
    before = lambda ref, i: ref.at[sequence, kv_head, split * chunks + chunks - 1 - i]

    def walk(m, *, every):
        own = channels(m)
        state = lambda ref, i: ref.at[batch, head, own, columns(i)]
        _walk_back(
            s,
            m,
            config,
            chunks,
            scale,
            None if every else lambda i: before(mild, i)[m],
            final=[state(final[0], i) for i in range(VALUE_BLOCKS)] if has_final else None,
            initial=[state(dinitial, i) for i in range(VALUE_BLOCKS)],
            by_channel=lambda i: [x.at[batch, tokens(i), head, own] for x in (dq, dk, dg)],
            by_column=lambda i, j: dv.at[batch, tokens(i), head, columns(j)],
        )

    @pl.when(warpgroup < blocks)
    def _compute():
        plgpu.set_max_registers(config.compute_registers, action=config.action(config.compute_registers))
        every = all_mild[sequence, kv_head, split, warpgroup]
        for m in range(blocks):
            pl.when((every > 0) & (warpgroup == m))(functools.partial(walk, m, every=True))
        pl.when(every == 0)(functools.partial(walk, warpgroup, every=False))

    @pl.when(warpgroup == blocks)
    def _load():
        plgpu.set_max_registers(config.load_registers, action=config.action(config.load_registers))
        copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.ZEROS)

        def load_tokens(i):
            slot = lax.rem(i, jnp.int32(config.token_stages))
            loaded = s["tokens_loaded"].at[slot]
            for source in marks:
                copy(source.at[batch, chunks - 1 - i], s["marks"].at[slot], loaded)
            for j in range(blocks):
                copy(g.at[batch, tokens(i), kv_head, channels(j)], s["g"].at[slot, j], loaded)
                copy(q.at[batch, tokens(i), head, channels(j)], s["q"].at[slot, j], loaded)
                copy(k.at[batch, tokens(i), kv_head, channels(j)], s["k"].at[slot, j], loaded)

        def load_values(i):
            slot = lax.rem(i, jnp.int32(config.value_stages))
            loaded = s["values_loaded"].at[slot]
            for j in range(VALUE_BLOCKS):
                copy(v.at[batch, tokens(i), kv_head, columns(j)], s["v"].at[slot, j], loaded)
                for m in range(blocks):
                    copy(before(states, i).at[channels(m * VALUE_BLOCKS + j)], s["state"].at[slot, m, j], loaded)

        def load_cotangents(i):
            slot = lax.rem(i, jnp.int32(config.value_stages))
            for j in range(VALUE_BLOCKS):
                copy(do.at[batch, tokens(i), head, columns(j)], s["do"].at[slot, j], s["cotangents_loaded"].at[slot])

        # In the order in which places become free.
        loads = (
            ("values_free", config.value_stages, load_values),
            ("cotangents_free", config.value_stages, load_cotangents),
            ("tokens_free", config.token_stages, load_tokens),
        )
        for _, stages, fetch in reversed(loads):
            for i in range(min(chunks, stages)):
                fetch(jnp.int32(i))

        def chunk(i, _):
            for name, stages, fetch in loads:
                plgpu.barrier_wait(s[name].at[lax.rem(i, jnp.int32(stages))])
                pl.when(i + stages < chunks)(functools.partial(fetch, i + stages))

        lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, None)


def _walk_back(s, warpgroup, config, chunks, scale, mild, *, final, initial, by_channel, by_column):
    """The computing role, for 64 channels of k and its share of the columns of v.

    mild: gives a chunk's mark, 1 for mild; None if all are.
    """
    blocks = config.key_blocks
    share = VALUE_BLOCKS // blocks
    write_lower(s["lower"].at[warpgroup])

    def start(i):
        if final is None:
            return nothing(jnp.float32)
        # The sum varies over no axis of a shard_map, as what the loop makes of it; what is loaded may.
        return nothing(jnp.float32) + plgpu.load(final[i], layout=plgpu.Layout.WGMMA, optimized=False)

    def meet(barrier):
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def chunk(i, ds):
        slot = lax.rem(i, jnp.int32(config.token_stages))

        def places():
            # 0, of which the compiler does not know it: it keeps addresses and masks from being computed, and spilled,
            # ahead of the loop.
            third = lax.rem(i, jnp.int32(3))
            zero = third * (third - 1) * (third - 2)
            return zero, zero + (lax.rem(i, jnp.int32(config.value_stages)) if config.value_stages > 1 else 0)

        def make_tiles():
            zero, value_slot = places()
            own = warpgroup + zero
            return Tiles(
                q=s["q"].at[slot, own],
                k=s["k"].at[slot, own],
                g=s["g"].at[slot, own],
                state=s["state"].at[value_slot, own],
                d=s["d"].at[own],
                v=s["v"].at[value_slot],
                do=s["do"].at[value_slot],
                scores=s["scores"].at[own],
                lower=s["lower"].at[own],
                row=s["row"].at[own],
                zero=zero,
                marks=s["marks"].at[slot] if "marks" in s else None,
            )

        def wait_values():
            plgpu.barrier_wait(s["values_loaded"].at[places()[1]])

        def wait_cotangents():
            plgpu.barrier_wait(s["cotangents_loaded"].at[places()[1]])

        def free_tokens():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(i > 0)
            def _free():
                plgpu.barrier_arrive(s["tokens_free"].at[lax.rem(i - 1, jnp.int32(config.token_stages))])

        plgpu.barrier_wait(s["tokens_loaded"].at[slot])
        if mild is None:
            dq, dk, post, keep = mild_gradients(make_tiles(), ds, scale, wait_values, wait_cotangents, free_tokens)
        else:

            def exact():
                dq, dk, keep = exact_gradients(make_tiles, ds, scale, wait_values, wait_cotangents, free_tokens)
                return dq, dk, keep, vector(1.0)

            def centred():
                dq, dk, post, keep = mild_gradients(make_tiles(), ds, scale, wait_values, wait_cotangents, free_tokens)
                return dq, dk, keep, post

            dq, dk, keep, post = lax.cond(mild(i) > 0, centred, exact)

        plgpu.commit_smem()
        # dv goes over D, so that v and the state are done with.
        plgpu.barrier_arrive(s["values_free"].at[places()[1]])
        t = make_tiles()
        *by_product, by_gate = by_channel(i)
        plgpu.copy_smem_to_gmem(t.g, by_gate)
        meet(s["gated"])
        t = make_tiles()
        mine = [(warpgroup + t.zero) * share + j for j in range(share)]
        reads = [[(t.q.T, t.do.at[j])] for j in range(VALUE_BLOCKS)]
        writes = [
            [*((s["k"].at[slot, m], s["d"].at[m + t.zero, j]) for m in range(blocks))]
            + [(s["scores"].at[m + t.zero].T, t.do.at[j]) for m in range(blocks)]
            for j in mine
        ]
        products = matmuls(*reads, *writes)
        updates, dvs = products[:VALUE_BLOCKS], products[VALUE_BLOCKS:]
        ds = tuple((ds[j] * along_rows(keep) + updates[j]) * along_rows(post) for j in range(VALUE_BLOCKS))
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["cotangents_free"].at[places()[1]])
        meet(s["multiplied"])
        t.q[...] = dq
        t.k[...] = dk
        for j in range(share):
            t.d[j] = dvs[j].astype(t.d.dtype)
        plgpu.commit_smem()
        for source, target in zip((t.q, t.k), by_product, strict=True):
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)
        for j in range(share):
            plgpu.copy_smem_to_gmem(t.d.at[j], by_column(i, warpgroup * share + j), commit_group=False)
        plgpu.commit_smem_to_gmem_group()
        return ds

    ds = tuple(start(i) for i in range(VALUE_BLOCKS))
    ds = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, ds)
    plgpu.wait_smem_to_gmem(0)
    plgpu.barrier_arrive(s["tokens_free"].at[(chunks - 1) % config.token_stages])
    for i in range(VALUE_BLOCKS):
        initial[i][...] = ds[i]
