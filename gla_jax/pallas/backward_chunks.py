"""The gradients of all chunks in parallel, for states that are too large for one block of backward_kernel.py.

backward_states.py has walked both ways: there are the states S before every chunk and the cotangents dS' of those after
it, scaled as backward_gates.py has them (S~ and D). What is left are sums over the columns of v, which a block goes
through in steps of 64, and products inside the chunk:

    dq~ = do S~^T + dA k~    dk~ = v D^T + dA^T q~    dv = k~ D + A^T do    dA = tril(do v^T)    rowsum(S~ D) for dg

A block takes some neighbouring chunks of one head. Two warpgroups, or one for k up to 64, compute, each for half of the
channels; one more loads. A chunk that is mild in all channels is gated first and gone through once. In any other, dq~,
dk~ and dA are summed up first, a tile at a time, and q and k kept; then come the levels, which leave k~ and A, and then
dv in one more go.
"""

import functools
from typing import Any

from jax import lax
from jax import numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.pallas.backward_gates import LOG2_E, along_columns, split_in_two, write_lower, write_mask
from gla_jax.pallas.backward_states import ROWS, TILE, matmul, matmuls, numbers, tile
from gla_jax.pallas.gating import CHUNK, FLOOR, LEVELS, Starts, along_rows, load, nothing, vector


def scratch(config, dtype, has_starts=False):
    """Shared memory and barriers of one block, by name."""
    c = config
    memory = {
        "q": tile((c.token_stages, c.key_blocks, *TILE), dtype),
        "k": tile((c.token_stages, c.key_blocks, *TILE), dtype),
        # Each place holds one step's states or their cotangents.
        "ring": tile((c.ring, c.key_blocks, *TILE), dtype),
        # v and do, one after the other.
        "values": tile((2 * c.value_stages, *TILE), dtype),
        # A's share of a warpgroup's channels; dv on its way out, and then dA.
        "scores": tile((c.groups, *TILE), dtype),
        "spare": tile((c.groups, *TILE), dtype),
        "decay": plgpu.SMEM((c.token_stages, c.key_blocks, CHUNK), jnp.float32),
        # And after a row a warpgroup the first of what `Starts` reads, given back with the last tile's tokens.
        "row": plgpu.SMEM((c.groups + c.token_stages * has_starts, CHUNK), jnp.float32),
        # By place and tile of a warpgroup.
        "tokens_loaded": plgpu.Barrier(num_arrivals=4 * c.groups, num_barriers=c.token_stages * c.tiles),
        "tokens_free": plgpu.Barrier(num_arrivals=c.groups, num_barriers=c.token_stages * c.tiles),
        "ring_loaded": plgpu.Barrier(num_arrivals=c.key_blocks, num_barriers=c.ring),
        "ring_free": plgpu.Barrier(num_arrivals=c.groups, num_barriers=c.ring),
        "values_loaded": plgpu.Barrier(num_arrivals=2, num_barriers=c.value_stages),
        "values_free": plgpu.Barrier(num_arrivals=c.groups, num_barriers=c.value_stages),
        "gated": plgpu.Barrier(num_arrivals=c.groups),
        "summed": plgpu.Barrier(num_arrivals=c.groups),
    }
    if has_starts:
        memory["marks_loaded"] = plgpu.Barrier(num_barriers=c.token_stages)
    if c.lends:
        return memory | {"gates_loaded": plgpu.Barrier(num_arrivals=c.key_blocks)}
    return memory | {
        "g": tile((c.token_stages, c.key_blocks, *TILE), dtype),
        "lower": tile((c.groups, *TILE), dtype),
    }


def _accumulate(values, make_pairs, interpret):
    """Each value and the sum of its pairs' products; make_pairs gives a list of pairs for each."""
    if interpret:
        # The interpreter cannot start an accumulator from a value.
        return tuple(x + y for x, y in zip(values, matmuls(*make_pairs()), strict=True))

    def run(accumulators):
        # Places are made in here: `run_state` cannot close over constant ones.
        for accumulator, pairs in zip(accumulators, make_pairs(), strict=True):
            for a, b in pairs:
                plgpu.wgmma(accumulator, a, b)
        plgpu.wgmma_wait(0)

    return tuple(pl.run_state(run)(tuple(plgpu.ACC.init(x) for x in values)))


def chunks_kernel(*refs, config, chunks, own, each, steps, group, scale, has_starts, interpret):
    """The body; refs are q, k, v, g, do, states, d, decay, mild, [marks], dq, dk, dv, dg, then the scratch.

    Args:
      chunks: of a sequence; own: of them, a block's; each: of them, those of a walk, if sequences were cut for these:
        states are [b * p, hk, each, k v / 64, 64], d as many for h heads, decay [b * p, hk, each, k].
      steps: v / 64.
      group: query heads of a key/value head. dk, dv and dg are those of each query head.
    """
    q, k, v, g, do, states, d, decay, mild, *marks, dq, dk, dv, dg, s = refs
    c, warpgroup = config, lax.axis_index("role")
    batch, head, first = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("part") * own
    kv_head = lax.div(head, jnp.int32(group))
    count = jnp.minimum(own, chunks - first)
    tokens = lambda i: pl.ds((first + i) * CHUNK, CHUNK)
    parts = -(-chunks // each)

    def walked(ref, head, i):
        n = first + i
        return ref.at[batch * parts + lax.div(n, jnp.int32(each)), head, lax.rem(n, jnp.int32(each))]

    def is_mild(i):
        n = first + i
        return mild[batch * parts + lax.div(n, jnp.int32(each)), kv_head, lax.rem(n, jnp.int32(each))]

    @pl.when(warpgroup < c.groups)
    def _compute():
        plgpu.set_max_registers(c.compute_registers, action=c.action(c.compute_registers))
        outputs = lambda i, m: {
            name: x.at[batch, tokens(i), head, pl.ds(m * CHUNK, CHUNK)] for name, x in (("q", dq), ("k", dk), ("g", dg))
        }
        columns = lambda i, j: dv.at[batch, tokens(i), head, pl.ds(j * CHUNK, CHUNK)]
        _compute_chunks(s, warpgroup, c, count, steps, scale, interpret, is_mild, outputs, columns)

    @pl.when(warpgroup == c.groups)
    def _load():
        plgpu.set_max_registers(c.load_registers, action=c.action(c.load_registers))
        copy = functools.partial(plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.ZEROS)
        key_blocks = [(m, pl.ds(m * CHUNK, CHUNK)) for m in range(c.key_blocks)]

        def free(name, n):
            plgpu.barrier_wait(s[name].at[n])
            return s[name.replace("free", "loaded")].at[n]

        def load_tokens(i, base):
            slot = lax.rem(i, jnp.int32(c.token_stages))
            for t in range(c.tiles):
                loaded = free("tokens_free", slot * c.tiles + t)
                for m, channels in key_blocks[t :: c.tiles]:
                    copy(g.at[batch, tokens(i), kv_head, channels], _gates(s, c, slot, base).at[m], loaded)
                    copy(q.at[batch, tokens(i), head, channels], s["q"].at[slot, m], loaded)
                    copy(k.at[batch, tokens(i), kv_head, channels], s["k"].at[slot, m], loaded)
                    copy(walked(decay, kv_head, i).at[channels], s["decay"].at[slot, m], loaded)
            for source in marks:
                copy(source.at[batch, first + i, 0], _marks(s, c, slot).at[0], s["marks_loaded"].at[slot])

        def load_step(i, j, base, ring, stages):
            """Of the chunk's step j, or of one that goes through v again."""
            step = lax.rem(j, jnp.int32(steps))
            column = pl.ds(step * CHUNK, CHUNK)

            def load_ring(ref, head, item):
                slot = _ring_place(c, base, item, ring)
                loaded = free("ring_free", slot)
                for m in range(c.key_blocks):
                    copy(
                        walked(ref, head, i).at[pl.ds((m * steps + step) * CHUNK, CHUNK)], s["ring"].at[slot, m], loaded
                    )

            load_ring(states, kv_head, 2 * j)
            stage = lax.rem(j, jnp.int32(stages))
            loaded = free("values_free", stage)
            copy(do.at[batch, tokens(i), head, column], s["values"].at[2 * stage + 1], loaded)
            copy(v.at[batch, tokens(i), kv_head, column], s["values"].at[2 * stage], loaded)
            load_ring(d, head, 2 * j + 1)

        if c.token_stages > 1:
            load_tokens(jnp.int32(0), jnp.int32(0))

        def chunk(i, base):
            mild = is_mild(i)

            def load_next():
                # The first step's are on their way while the last chunk's gradients of q, k and g are made.
                if c.token_stages == 1:
                    load_tokens(i, base)
                else:
                    pl.when(i + 1 < count)(lambda: load_tokens(i + 1, base))

            def go(goes, ring, stages):
                load_step(i, jnp.int32(0), base, ring, stages)
                load_next()
                lax.fori_loop(jnp.int32(1), goes * steps, lambda j, _: load_step(i, j, base, ring, stages), None)

            next_base = _next_base(c, base, steps, mild)

            @pl.when(mild > 0)
            def _mild():
                go(jnp.int32(1), c.ring, c.value_stages)
                if c.lends:
                    # g again, where the ring is free first, and no more of v: the triangle is there.
                    place = _ring_place(c, next_base, c.ring - 1, c.ring)
                    plgpu.barrier_wait(s["ring_free"].at[place])
                    for m, channels in key_blocks:
                        copy(g.at[batch, tokens(i), kv_head, channels], s["ring"].at[place, m], s["gates_loaded"])
                    plgpu.barrier_wait(s["values_free"].at[c.value_stages - 1])

            @pl.when(mild == 0)
            def _any():
                go(jnp.int32(c.tiles + 1), c.ring - c.lends, c.value_stages - c.lends)

            return next_base

        base = lax.fori_loop(jnp.int32(0), count, chunk, jnp.int32(0))
        # Every completion of a barrier has to be seen.
        for n in range(c.value_stages - c.lends):
            plgpu.barrier_wait(s["values_free"].at[n])
        for n in range(c.ring - c.lends):
            plgpu.barrier_wait(s["ring_free"].at[_ring_place(c, base, n, c.ring)])
        for n in range(c.token_stages * c.tiles):
            plgpu.barrier_wait(s["tokens_free"].at[n])


def _ring_place(c, base, item, ring):
    """Where an item of a chunk is, if its first is at `base` and it has the first `ring` of the places from there."""
    place = lax.rem(jnp.int32(item), jnp.int32(ring))
    return lax.rem(base + place, jnp.int32(c.ring)) if c.lends else place


def _next_base(c, base, steps, mild):
    """The base of the next chunk: what is lent, the last place from there, is what a mild chunk frees first."""
    return jnp.where(mild > 0, lax.rem(base + 2 * steps + 1, jnp.int32(c.ring)), base) if c.lends else base


def _gates(s, c, slot, base):
    """Where g is, [key_blocks, 64, 64], while no state is there."""
    return s["ring"].at[_ring_place(c, base, c.ring - 1, c.ring)] if c.lends else s["g"].at[slot]


def _marks(s, c, slot):
    """Where the first row of a chunk's `mark_starts` is, [1, 64]."""
    return s["row"].at[pl.ds(c.groups + slot, 1)]


def _compute_chunks(s, warpgroup, c, count, steps, scale, interpret, is_mild, outputs, columns):
    """The computing role; outputs(i, m) and columns(i, j) are where tiles of chunk i go."""
    tiles = c.tiles
    scores, spare, row = (s[name].at[warpgroup] for name in ("scores", "spare", "row"))
    # The triangle takes v's or do's last place when that is lent.
    lower = s["values"].at[2 * c.value_stages - 2 + warpgroup] if c.lends else s["lower"].at[warpgroup]

    def meet(name):
        plgpu.barrier_arrive(s[name])
        plgpu.barrier_wait(s[name])

    def zero_of(i):
        """0, of which the compiler does not know it: it keeps addresses from being computed, and spilled, ahead."""
        third = lax.rem(i, jnp.int32(3))
        return third * (third - 1) * (third - 2)

    def chunk(i, base):
        slot = lax.rem(i, jnp.int32(c.token_stages))

        def starts():
            """Read anew each time: registers are short."""
            return Starts.read(_marks(s, c, slot)) if "marks_loaded" in s else None

        def cut(name, x, *more):
            """x after that method of the chunk's `Starts`; x itself where no sequence can begin."""
            return x if starts() is None else getattr(starts(), name)(x, *more)

        if "marks_loaded" in s:
            plgpu.barrier_wait(s["marks_loaded"].at[slot])

        mild = is_mild(i)
        next_base = _next_base(c, base, steps, mild)

        def place(name, t, zero, base=base):
            at = warpgroup * tiles + t + zero
            return _gates(s, c, slot, base).at[at] if name == "g" else s[name].at[slot, at]

        class Step:
            """Where things are in one step over v; waits until they are there."""

            def __init__(self, j, ring, stages):
                self.zero = zero_of(j)
                self.state, self.d = (_ring_place(c, base, 2 * j + n, ring) + self.zero for n in range(2))
                self.stage = lax.rem(j, jnp.int32(stages)) + self.zero
                self.v, self.do = (s["values"].at[2 * self.stage + n] for n in range(2))

            def wait_state(self):
                plgpu.barrier_wait(s["ring_loaded"].at[self.state])
                plgpu.barrier_wait(s["values_loaded"].at[self.stage])

            def wait_d(self):
                plgpu.barrier_wait(s["ring_loaded"].at[self.d])

            def own(self, name, t):
                return s["ring"].at[getattr(self, name), warpgroup * tiles + t + self.zero]

            def free_state(self):
                plgpu.barrier_arrive(s["ring_free"].at[self.state])

            def free_values(self):
                plgpu.barrier_arrive(s["values_free"].at[self.stage])

            def free_d(self):
                plgpu.barrier_arrive(s["ring_free"].at[self.d])

        def sums(first, make_step, which, *, with_dv):
            """dq~, dk~ and the crossing sums of some tiles, and dA, over the columns of v.

            Without dv the last step's places are not given back.
            """

            def step(j, carry):
                dq, dk, da, crossing = carry
                at = make_step(first + j)
                at.wait_state()
                reads = lambda: [*([(at.do, at.own("state", t).T)] for t in which), [(at.do, at.v.T)]]
                *dq, da = _accumulate((*dq, da), reads, interpret)
                at.wait_d()
                rows = (jnp.sum(load(at.own("state", t)) * load(at.own("d", t)), axis=1) for t in which)
                crossing = tuple(x + y for x, y in zip(crossing, rows, strict=True))
                plgpu.commit_smem()
                # As soon as can be: what is loaded next in its place is waited for.
                pl.when((j >= 0) if with_dv else (j < steps - 1))(at.free_state)
                dk = _accumulate(dk, lambda: [[(at.v, at.own("d", t).T)] for t in which], interpret)
                plgpu.commit_smem()
                if with_dv:
                    write_dv(j, at)
                pl.when((j >= 0) if with_dv else (j < steps - 1))(at.free_values)
                # In the last one's place dk~ waits, or the levels have tiles.
                pl.when(j < steps - 1)(at.free_d)
                return tuple(dq), dk, da, crossing

            wide = (nothing(jnp.float32),) * len(which)
            init = wide, wide, nothing(jnp.float32), (vector(0.0),) * len(which)
            return lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, init)

        def write_dv(j, at):
            @pl.when(lax.rem(j, jnp.int32(c.groups)) == warpgroup)
            def _write():
                pairs = [(s["k"].at[slot, m + at.zero], s["ring"].at[at.d, m + at.zero]) for m in range(c.key_blocks)]
                pairs += [(s["scores"].at[m + at.zero].T, at.do) for m in range(c.groups)]
                dv: Any = None
                if starts() is None:
                    dv = matmul(pairs)
                else:
                    across = cut("after_last", matmul(pairs[: c.key_blocks]))
                    inside = lambda: [[(s["scores"].at[m + at.zero].T, at.do) for m in range(c.groups)]]
                    (dv,) = _accumulate((across,), inside, interpret)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                spare[...] = dv.astype(spare.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(spare, columns(i, j))

        def keep_lower(a):
            # Masks made of numbers would be computed, and spilled, ahead of the loop. A product would not do: inf * 0.
            return cut("same", jnp.where(load(lower) > 0.5, a, 0.0), row)

        def exponent(t, zero, base=base):
            """E of a mild tile, in powers of 2."""
            half = 0.5 * (1.0 - along_columns(s["decay"].at[slot, warpgroup * tiles + t + zero]))
            return (matmul([(lower, place("g", t, zero, base))]) - half) * LOG2_E

        def send(t, *names, base=base):
            for name in names:
                target = outputs(i, warpgroup * tiles + t)[name]
                plgpu.copy_smem_to_gmem(place(name, t, 0, base), target, commit_group=False)
            plgpu.commit_smem_to_gmem_group()

        def free_tokens(t):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(s["tokens_free"].at[slot * tiles + t])

        if c.lends:
            write_lower(lower)

        @pl.when(mild > 0)
        def _mild():
            zero = zero_of(i)
            for t in range(tiles):
                plgpu.barrier_wait(s["tokens_loaded"].at[slot * tiles + t])
                q, k, e = place("q", t, zero), place("k", t, zero), exponent(t, zero)
                q[...] = (load(q) * (jnp.exp2(e) * scale)).astype(q.dtype)
                k[...] = (load(k) * jnp.exp2(-e)).astype(k.dtype)
                plgpu.commit_smem()
            a = matmul([(place("q", t, zero), place("k", t, zero).T) for t in range(tiles)])
            scores[...] = keep_lower(a).astype(scores.dtype)
            plgpu.commit_smem()
            if c.lends:
                plgpu.barrier_arrive(s["ring_free"].at[_ring_place(c, base, c.ring - 1, c.ring)])
                plgpu.barrier_arrive(s["values_free"].at[c.value_stages - 1])
            meet("gated")
            make_step = lambda j: Step(j, c.ring, c.value_stages)
            dqs, dks, da, crossings = sums(jnp.int32(0), make_step, range(tiles), with_dv=True)
            dqs, dks = [cut("before_first", x) for x in dqs], [cut("after_last", x) for x in dks]
            last = make_step(jnp.int32(steps - 1))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            meet("summed")
            if c.lends:
                write_lower(lower)
            spare[...] = keep_lower(da).astype(spare.dtype)
            parked = [last.own("d", t) for t in range(tiles)]
            if tiles > 1:
                split_in_two(dks[1], *parked)
            plgpu.commit_smem()
            if tiles == 1:
                last.free_d()
            for t in range(tiles):
                zero = zero_of(i + t)
                q, k, g = (place(name, t, zero, next_base) for name in "qkg")
                pairs = lambda t=t, zero=zero: [
                    [(s["spare"].at[warpgroup], place("k", t, zero))],
                    [(s["spare"].at[warpgroup].T, place("q", t, zero))],
                ]
                dq, inside = _accumulate((dqs[t], nothing(jnp.float32)), pairs, interpret)
                if t > 0:
                    free_tokens(t - 1)
                across = dks[0] if t == 0 else load(parked[0]) + load(parked[1])
                w = (load(k) * across).astype(q.dtype)
                z = load(q) * dq - load(k) * inside
                dk = inside + across
                plgpu.commit_smem()
                if t > 0:
                    last.free_d()
                split_in_two(z, k, scores)
                q[...] = w
                row[...] = cut("keep", crossings[t])
                plgpu.commit_smem()
                if c.lends and t == 0:
                    plgpu.barrier_wait(s["gates_loaded"])
                # Only now, as registers are short.
                e = exponent(t, zero, next_base)
                dq = (dq * (jnp.exp2(e) * scale)).astype(q.dtype)
                dk = (dk * jnp.exp2(-e)).astype(k.dtype)

                dg = matmul([(lower.T, k), (lower.T, scores), (lower, q)]) - load(q) + along_columns(row)
                plgpu.commit_smem()
                g[...] = cut("reset", dg, 0.0).astype(g.dtype)
                q[...] = dq
                k[...] = dk
                plgpu.commit_smem()
                send(t, *"qkg", base=next_base)
            free_tokens(tiles - 1)

        @pl.when(mild == 0)
        def _any():
            for t in range(tiles):
                plgpu.barrier_wait(s["tokens_loaded"].at[slot * tiles + t])
            make_step = lambda j: Step(j, c.ring - c.lends, c.value_stages - c.lends)

            # A tile at a time, as registers are short, and then dv. Of the last step the tiles of this warpgroup's
            # channels are places for A and for products.
            def one(t, kept):
                (dq,), (dk,), da, (crossing,) = sums(t * steps, make_step, [t], with_dv=False)
                zero = zero_of(i + t)
                at = make_step((t + 1) * steps - 1)
                all_scores, product = at.own("state", t), at.own("d", t)
                spare[...] = da.astype(spare.dtype)
                all_scores[...] = kept
                rows, columns_ = numbers()
                diagonal = jnp.sum(jnp.where(rows == columns_, da, 0.0), axis=1)
                total = plgpu.layout_cast(s["decay"][slot, warpgroup * tiles + t + zero], ROWS)
                centred = jnp.where(s["decay"][slot, warpgroup * tiles + t + zero, 0] > 0.5, 1.0, 0.0)
                total += centred * (1.0 - 2.0 * total)
                crossing = cut("keep", crossing * jnp.exp(total * (1.0 - centred)))
                # What S~ and D of a mild tile have in them.
                row[...] = jnp.exp(-0.5 * centred * total)
                plgpu.commit_smem()
                tools = (*(place(name, t, zero) for name in "qkg"), product, lower, scores, spare, all_scores, row)
                if starts() is not None:
                    g = place("g", t, zero)
                    g[...] = cut("reset", load(g)).astype(g.dtype)
                dk = _by_levels(tools, i, scale, dq, dk, diagonal, crossing)
                kept = plgpu.layout_cast(all_scores[...], plgpu.Layout.WGMMA)
                # k~ is in its place until dv is made.
                product[...] = dk
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(product, outputs(i, warpgroup * tiles + t)["k"])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                at.free_state()
                at.free_values()
                at.free_d()
                return kept

            kept = lax.fori_loop(jnp.int32(0), jnp.int32(tiles), one, nothing(scores.dtype))
            scores[...] = kept
            plgpu.commit_smem()
            meet("gated")

            def step(j, _):
                at = make_step(tiles * steps + j)
                at.wait_state()
                at.wait_d()
                write_dv(j, at)
                plgpu.commit_smem()
                at.free_state()
                at.free_values()
                at.free_d()

            lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, None)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            meet("summed")

            for t in range(tiles):
                send(t, *"qg")
            for t in range(tiles):
                free_tokens(t)

        return next_base

    # What the loader waits for before it loads is free at first, but for what is lent.
    places = ("values_free", c.value_stages - c.lends), ("ring_free", c.ring - c.lends)
    for name, count_ in (*places, ("tokens_free", c.token_stages * tiles)):
        for n in range(count_):
            plgpu.barrier_arrive(s[name].at[n])
    if not c.lends:
        write_lower(lower)
    lax.fori_loop(jnp.int32(0), count, chunk, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def _by_levels(tools, i, scale, dq, dk, diagonal, crossing):
    """The form for every gate, of one tile: leaves dq in q, dg in g, k~ in k; adds to all_scores; returns dk.

    tools: tiles q, k, g, product, lower, scores (for parts of dA), spare (dA), all_scores, and a row [64] with what
      dq and dk, as they come, are to be multiplied with, and k~.
    diagonal: dA's.
    """
    q, k, g, product, lower, scores, spare, all_scores, row = tools
    decays = lambda: jnp.exp(matmul([(lower, g)]))

    def unknown_zero(i):
        third = lax.rem(i, jnp.int32(3))
        return third * (third - 1) * (third - 2)

    def iotas(i):
        zero = unknown_zero(i)
        rows, columns = numbers()
        return rows + zero, columns + zero

    rows, columns = iotas(i)
    g[...] = jnp.maximum(load(g), FLOOR).astype(g.dtype)
    write_mask(lower, columns <= rows)
    dq = dq * along_columns(row) * (decays() * scale)
    product[...] = (load(q) * dq).astype(product.dtype)
    plgpu.commit_smem()
    dg = matmul([(lower.T, product)])
    plgpu.commit_smem()
    write_mask(lower, columns > rows)
    dk = dk * along_columns(row) * decays()
    product[...] = (load(k) * dk).astype(product.dtype)
    plgpu.commit_smem()
    dg += matmul([(lower.T, product)])

    dq += along_rows(diagonal) * load(k) * scale
    dk += along_rows(diagonal) * load(q) * scale
    a = matmul([(q, k.T)])
    all_scores[...] = (load(all_scores) + jnp.where(rows == columns, a * scale, 0.0)).astype(all_scores.dtype)
    plgpu.commit_smem()

    def level(m, sums):
        dq, dk, dg = sums
        rows, columns = iotas(m)
        row_half, column_half = rows >> m, columns >> m
        right = (row_half & 1) == 1
        meets = right & (row_half == column_half + 1)
        scores[...] = jnp.where(meets, load(spare), 0.0).astype(scores.dtype)
        write_mask(lower, (row_half == column_half) & ((columns <= rows) == right))
        x = jnp.where(right, load(q) * scale, load(k)) * decays()
        product[...] = x.astype(product.dtype)
        plgpu.commit_smem()
        a = jnp.where(meets, matmul([(product, product.T)]), 0.0)
        all_scores[...] = (load(all_scores) + a).astype(all_scores.dtype)
        dx = matmul([(scores, product), (scores.T, product)])
        net = load(product) * dx
        # Made again rather than held: registers are short here.
        dx = dx * decays()
        dq += jnp.where(right, dx * scale, 0.0)
        dk += jnp.where(right, 0.0, dx)
        plgpu.commit_smem()
        product[...] = net.astype(product.dtype)
        plgpu.commit_smem()
        dg += matmul([(lower.T, product)])
        plgpu.commit_smem()
        return dq, dk, dg

    dq, dk, dg = lax.fori_loop(jnp.int32(0), jnp.int32(LEVELS), level, (dq, dk, dg))
    rows, columns = iotas(i)
    write_mask(lower, columns > rows)
    k[...] = (load(k) * decays() * along_columns(row)).astype(k.dtype)
    q[...] = dq.astype(q.dtype)
    plgpu.commit_smem()
    row[...] = crossing
    plgpu.commit_smem()
    g[...] = jnp.where(load(g) <= FLOOR, 0.0, dg + along_columns(row)).astype(g.dtype)
    write_lower(lower)
    return dk.astype(k.dtype)
