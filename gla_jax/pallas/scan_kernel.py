"""The second of two passes: the recurrence over chunks whose gates have been applied (gate_kernel.py).

With q~, k~, A and kappa of a chunk from the first pass,

    o = scale * (q~ S + A v)        S' = kappa S + k~^T v

One block carries the states of one head and 64 or 128 columns of v, transposed ([v, k]) and in registers, where a
rounded copy of them is at once the left operand of q~ S. A loader brings the chunks; each matmul warpgroup has 64
columns of v.
"""

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas import gating
from gla_jax.pallas.gating import CHUNK

_F32 = jnp.float32
_ACC = plgpu.ACC((CHUNK, CHUNK), _F32)


def scratch(c, dtype, reads, interpret):
    """Shared memory and barriers of one block, by name; reads as `scan_kernel`'s."""
    tile = lambda *shape: gating.tile_memory((*shape, CHUNK, CHUNK), dtype)
    memory = {
        "k": tile(c.slots, c.key_blocks),
        "kappa": plgpu.SMEM((c.slots, c.key_blocks, CHUNK), _F32),
        "v": tile(c.slots, c.matmul_groups),
        "zero": plgpu.SMEM((c.matmul_groups, 8), jnp.int32),
        "loaded": plgpu.Barrier(num_arrivals=(4 if reads else 2) + c.matmul_groups, num_barriers=c.slots),
        "free": plgpu.Barrier(num_arrivals=c.matmul_groups, num_barriers=c.slots),
        "v_free": plgpu.Barrier(num_arrivals=c.matmul_groups, num_barriers=c.slots),
    }
    if reads:
        memory |= {"q": tile(c.slots, c.key_blocks), "scores": tile(c.slots, c.shares)}
    if interpret:
        # The interpreter has no operands in registers.
        memory["copy"] = tile(c.matmul_groups)
    return memory


def scan_kernel(*refs, config, chunks, group, scale, reads, has_initial, has_final, interpret):
    """The body; refs are q~, k~, A, kappa, v, [initial states], [o], [final states], then the scratch.

    q~, k~: [b, h, n, k / 64, 64, 64] for n chunks; A: [b, h, n, shares, 64, 64]; kappa: [b, h, n, k / 64, 64] float32;
    v, o: [b, t, hk or h, v]; states: [b, hk, splits, v, k] float32. The sequence is split into `splits` of `chunks`
    each, every one with a state of its own before it and after it. Without `reads` there is no o, and q~ and A are not
    read.
    """
    refs, c = list(refs), config
    s = refs.pop()
    gated, v = dict(zip(("q", "k", "scores", "kappa"), refs, strict=False)), refs[4]
    del refs[:5]
    initial, o, final = (refs.pop(0) if there else None for there in (has_initial, reads, has_final))
    warpgroup = lax.axis_index("role")
    batch, head, part, split = (lax.axis_index(x) for x in ("batch", "head", "part", "split"))
    kv_head = lax.div(head, jnp.int32(group))
    v_start = part * c.value_width
    first = split * chunks

    @pl.when(warpgroup < c.matmul_groups)
    def _matmul():
        plgpu.set_max_registers(c.matmul_registers, action="increase")
        columns = pl.ds(v_start + warpgroup * CHUNK, CHUNK)
        _carry(
            s,
            warpgroup,
            c,
            first,
            chunks,
            scale,
            interpret,
            initial=None if initial is None else initial.at[batch, kv_head, split, columns],
            final=None if final is None else final.at[batch, kv_head, split, columns],
            o=None if o is None else o.at[batch, :, head, columns],
            writes_final=lax.rem(head, jnp.int32(group)) == 0,
        )

    @pl.when(warpgroup == c.matmul_groups)
    def _load():
        plgpu.set_max_registers(c.load_registers, action="decrease")
        columns = [pl.ds(v_start + j * CHUNK, CHUNK) for j in range(c.matmul_groups)]
        names = ("q", "k", "scores", "kappa") if reads else ("k", "kappa")
        sources = {name: gated[name].at[batch, head] for name in names}
        _load_chunks(s, c, first, chunks, sources, [v.at[batch, :, kv_head, x] for x in columns])


def _load_chunks(s, c, first, chunks, gated, values):
    """The loader role."""

    def load(n):
        slot = lax.rem(n, jnp.int32(c.slots))
        for name, source in gated.items():
            plgpu.copy_gmem_to_smem(source.at[first + n], s[name].at[slot], s["loaded"].at[slot])

    def load_v(n):
        slot, tokens = lax.rem(n, jnp.int32(c.slots)), pl.ds((first + n) * CHUNK, CHUNK)
        for j, source in enumerate(values):
            tile, loaded = s["v"].at[slot, j], s["loaded"].at[slot]
            plgpu.copy_gmem_to_smem(source.at[tokens], tile, loaded, oob_mode=plgpu.OOBFillMode.ZEROS)

    for n in range(min(c.slots, chunks)):
        load(jnp.int32(n))
        load_v(jnp.int32(n))

    def after(n, _):
        slot = lax.rem(n, jnp.int32(c.slots))
        plgpu.barrier_wait(s["free"].at[slot])
        pl.when(n + c.slots < chunks)(lambda: load(n + c.slots))
        plgpu.barrier_wait(s["v_free"].at[slot])
        pl.when(n + c.slots < chunks)(lambda: load_v(n + c.slots))

    lax.fori_loop(jnp.int32(0), jnp.int32(chunks), after, None)


def _carry(s, warpgroup, c, first, chunks, scale, interpret, *, initial, final, o, writes_final):
    """The matmul role."""
    s["zero"][warpgroup, 0] = jnp.int32(0)
    plgpu.commit_smem()

    def start(i):
        if initial is None:
            return gating.nothing(_F32)
        # From zeros, which vary over the axes of a mesh as what is added to them does.
        return gating.nothing(_F32) + plgpu.load(
            initial.at[:, pl.ds(i * CHUNK, CHUNK)], layout=plgpu.Layout.WGMMA, optimized=False
        )

    def v_free(n):
        if o is not None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(s["v_free"].at[lax.rem(n, jnp.int32(c.slots))])

    def read(slot, value, states):
        """o transposed, [v, 64]."""

        def products(acc):
            for i in range(c.key_blocks):
                state = states[i].astype(value.dtype)
                if interpret:
                    copy = s["copy"].at[warpgroup]
                    copy[...] = state
                    plgpu.commit_smem()
                    state = copy
                plgpu.wgmma(acc, state, s["q"].at[slot, i].T)
                plgpu.wgmma_wait(0)
            for i in range(c.shares):
                plgpu.wgmma(acc, value.T, s["scores"].at[slot, i].T)
            return acc[...]

        return (pl.run_scoped(products, _ACC) * scale).astype(value.dtype)

    def chunk(n, states):
        # A zero read from memory keeps addresses from being computed, and spilled, ahead of the loop.
        slot = lax.rem(n, jnp.int32(c.slots)) + s["zero"][warpgroup, 0]
        plgpu.barrier_wait(s["loaded"].at[slot])
        value = s["v"].at[slot, warpgroup]
        out = None if o is None else read(slot, value, states)
        if o is not None:
            pl.when(n > 0)(lambda: v_free(n - 1))
        new = []
        for i in range(c.key_blocks):
            kappa = plgpu.load(s["kappa"].at[slot, i], layout=plgpu.Layout.WGMMA.reduce(0))
            kept = states[i] * gating.along_columns(kappa)

            def update(state, i=i):
                plgpu.wgmma(state, s["v"].at[slot, warpgroup].T, s["k"].at[slot, i])
                plgpu.wgmma_wait(0)

            if interpret:

                def fresh(acc, update=update):
                    update(acc)
                    return acc[...]

                new.append(kept + pl.run_scoped(fresh, _ACC))
            else:
                new.append(pl.run_state(update)(plgpu.ACC.init(kept)))
        if out is not None:
            # It takes the place of v.
            value.T[...] = out
        # Loads may overwrite what was read before this barrier.
        plgpu.commit_smem()
        plgpu.barrier_arrive(s["free"].at[slot])
        if o is None:
            v_free(n)
        else:
            plgpu.copy_smem_to_gmem(value, o.at[pl.ds((first + n) * CHUNK, CHUNK)])
        return tuple(new)

    states = tuple(start(i) for i in range(c.key_blocks))
    states = lax.fori_loop(jnp.int32(0), jnp.int32(chunks), chunk, states)
    if o is not None:
        v_free(jnp.int32(chunks - 1))
    if final is not None:

        @pl.when(writes_final)
        def _write():
            for i in range(c.key_blocks):
                final[:, pl.ds(i * CHUNK, CHUNK)] = states[i]

    plgpu.wait_smem_to_gmem(0)
