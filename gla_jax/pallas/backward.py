"""The backward on Hopper: what is kept and recomputed, and how arguments are brought to the kernels' shapes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.array_types import Array, Float, Gate, Key, Query, Starts, State, Value
from gla_jax.pallas import backward_chunks, backward_kernel, backward_states
from gla_jax.pallas.backward_config import VALUE_BLOCKS, BackwardConfig, choose_backward, choose_time_parts
from gla_jax.pallas.backward_states import Walk, through_parts
from gla_jax.pallas.config import WIDTH
from gla_jax.pallas.forward import States, reset_at_starts
from gla_jax.pallas.gating import CHUNK, mark_starts


class Gradients(NamedTuple):
    """Cotangents of the arguments of `gla_jax.pallas.forward`, of their shapes and dtypes; None for one not given."""

    q: Array
    k: Array
    v: Array
    g: Array | None
    initial_state: Array | None


def backward(
    q: Query,
    k: Key,
    v: Value,
    g: Gate | None,
    scale: float,
    initial_state: State | None,
    do: Float[Array, "b t h v"],
    dfinal: State | Callable[[Array, Array], Array] | None = None,
    *,
    starts: Starts | None = None,
    saved: States | None = None,
    config: BackwardConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Gradients:
    """Gradients of S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t in two Mosaic GPU kernels.

    From the forward its arguments are kept, and the states if it left them. With dS_t the cotangent of S_t,

        dS_t = Diag(exp g_{t+1}) dS_{t+1} + scale q_t^T do_t        dq_t = scale do_t S_t^T
        dk_t = v_t dS_t^T        dv_t = k_t dS_t        dg_t = exp(g_t) rowsum(S_{t-1} dS_t)

    (arXiv 2312.06635, section 4, has them in chunks but for dg, which it takes from differences of q dq and k dk that
    cancel; backward_gates.py has what is done here.) Without `saved` a first kernel walks forward and writes the state
    before each chunk of 64 tokens, 2 k v / 64 bytes a token that are free afterwards; another walks back. Exact for
    every gate: it is known how each 64 channels of a chunk decay, and the form is taken that fits. The same bits from
    run to run.

    Args:
      q: [b, t, h, k], bfloat16 or float16, any k.
      k, v: [b, t, hk, k] and [b, t, hk, v] of q's dtype.
      g: log decay, [b, t, hk] or [b, t, hk, k], at most 0; -inf is a hard reset, and its gradient 0. None for no decay.
        Float32 is rounded to q's dtype: with decays off by G 2^-9, of exp(-G) no more than 2^-9 / e is lost.
      scale: factor of o.
      initial_state: [b, hk, k, v] float32 before the first token; zeros if None.
      do: cotangent of o, [b, t, h, v].
      dfinal: cotangent of the final state, [b, hk, k, v] float32; zeros if None. Or, but for float16, a function that
        makes it of what these tokens do to a state's cotangent on its way to the first of them, dS -> decay dS + own,
        with decay [b, hk, k, 1] and own [b, hk, k, v] in float32.
      starts: as `forward`'s.
      saved: the forward's States of the same arguments; for k and v up to 128, and not for float16.
      config: the tuning; the table's for these shapes if None.
      interpret: runs the kernels in Pallas' interpreter.

    Raises:
      ValueError: config is a tuning for narrower k and v.
    """
    batch, time, heads, key_size = q.shape
    kv_heads, value_size = v.shape[2:]
    group, dtype = heads // kv_heads, q.dtype
    had_gate = g is not None
    g, starts = reset_at_starts(g, starts, k)
    config = config or choose_backward(key_size, value_size, dtype)
    key_width, value_width = config.key_blocks * WIDTH, VALUE_BLOCKS * WIDTH
    key_parts, value_parts = pl.cdiv(key_size, key_width), pl.cdiv(value_size, value_width)
    keys, values, blocks = key_parts * key_width, value_parts * value_width, key_parts * value_parts
    if config.in_chunks is None and blocks > 1:
        raise ValueError(f"config.in_chunks=None takes k and v up to 128, not {key_size} and {value_size}")
    if saved is not None and (config.in_chunks is not None or dtype == jnp.float16):
        raise ValueError(f"saved must be None for k or v above 128 and for float16, got k {key_size}, v {value_size}")
    chunks, rows = pl.cdiv(time, CHUNK), max(CHUNK, -(-time // 8) * 8)
    parts = config.time_parts or choose_time_parts(batch * heads * blocks, chunks)
    if config.in_chunks is not None and config.time_parts is None and parts < 4:
        # Both walks go at the same time: then to walk more blocks twice takes no less.
        parts = 1
    if parts > 1:
        chunks = pl.cdiv(chunks, parts)
        rows = parts * chunks * CHUNK
    entering = first_decay = None
    if dtype == jnp.float16 and g is not None and initial_state is not None:
        # float16 ends at 6e-8, and the first decay scales all of the initial state's gradient: it is applied here.
        first_decay = jnp.exp(g[:, 0].astype(jnp.float32)).reshape(batch, kv_heads, -1, 1)
        entering, initial_state = initial_state, first_decay * initial_state
        g = jnp.asarray(g).at[:, 0].set(0.0)
    factor = unit = None
    if dtype == jnp.float16:
        # It would lose cotangents of a mean over many tokens, and what small values add to the gate's gradient.
        factor = _magnitude(do, dfinal)
        do = do.astype(jnp.float32) / factor
        dfinal = None if dfinal is None else cast(Array, dfinal) / factor
        unit = _magnitude(v)
        if initial_state is not None:
            unit = jnp.maximum(unit, _magnitude(initial_state) / 1024)
        unit = jnp.minimum(unit, 1.0)
        v = v.astype(jnp.float32) / unit
        initial_state = None if initial_state is None else initial_state / unit
    gates = jnp.zeros(k.shape, dtype) if g is None else g
    if gates.ndim == 3:
        gates = jnp.broadcast_to(gates[..., None], k.shape)

    tokens = lambda x, size: _pad(x.astype(dtype), (batch, rows, x.shape[2], size))
    cut = lambda x: x.reshape(batch * parts, rows // parts, *x.shape[2:])
    merged = lambda x: x.reshape(-1, *x.shape[2:])

    has_starts = starts is not None
    of_all = of_parts = None
    if has_starts:
        of_all = mark_starts(starts, parts * chunks)
        of_parts = of_all.reshape(batch * parts, chunks, *of_all.shape[2:])

    def call(kernel, grid, scratch, out_type, config=config, **options):
        return plgpu.kernel(
            functools.partial(kernel, config=config, has_starts=has_starts, **options),
            out_type=out_type,
            grid=grid,
            grid_names=("batch", "head", "part"),
            num_threads=config.threads,
            thread_name="role",
            scratch_types=[scratch(config, dtype, has_starts)],
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
            ),
            interpret=interpret,
        )

    walk = functools.partial(backward_states.walk, config, interpret)
    whole = {"q": tokens(q, keys), "k": tokens(k, keys), "v": tokens(v, values), "g": tokens(gates, keys)}
    whole["do"] = tokens(do, values)
    q_, k_, v_, g_, do_ = (cut(x) for x in whole.values())
    share = lambda x, axis: x if group == 1 else _sum_groups(x, axis, group)
    forwards, backwards = Walk(kv_heads), Walk(heads, reverse=True, group=group)
    # Of two parts the first kernel takes both, one after the other: that is faster than a walk for what lies between.
    splits = 2 if parts == 2 and config.in_chunks is None else 1
    if saved is not None:
        splits = parts
    forth: Any = None
    back: Any = None
    if parts > splits:
        totals = (forwards, k_, v_, g_, None), (backwards, q_, do_, g_, None)
        *forth, added, decay = walk(*((kind._replace(totals=True), *rest) for kind, *rest in totals), marks=of_parts)
        back = added, decay
    elif parts > 1 or callable(dfinal):
        back = walk((backwards._replace(totals=True), q_, do_, g_, None), marks=of_parts)
    if callable(dfinal):
        _, added = through_parts(None, back, parts, scale)
        decay = jnp.exp(jnp.sum(back[1].reshape(batch, parts, heads, keys), axis=1))
        dfinal = dfinal(decay[:, ::group, :key_size, None], share(added, 1)[:, :, :key_size, :value_size])
    if group > 1 and dfinal is not None:
        # The query heads of a group share one state: its cotangent enters in the first.
        dfinal = jnp.zeros((batch, heads, key_size, value_size), jnp.float32).at[:, ::group].set(dfinal)
    initial, final = (None if x is None else _pad(x, (*x.shape[:2], keys, values)) for x in (initial_state, dfinal))
    if parts > 1:
        final = merged(through_parts(final, back, parts, scale)[0])
    if parts > splits:
        initial = merged(through_parts(initial, forth, parts)[0])
    if config.in_chunks is not None:
        last = backwards._replace(scale=scale, has_decay=False, has_last=True)
        both = (forwards, k_, v_, g_, initial), (last, q_, do_, g_, final)
        states, decay, d, dinitial = walk(*both, marks=of_parts)
        mild = jnp.all(decay[..., ::WIDTH] > 0.5, axis=-1).astype(jnp.int32)
        all_chunks = parts * chunks
        own = pl.cdiv(all_chunks * batch * heads, config.in_chunks.blocks)
        out = lambda size: jax.ShapeDtypeStruct((batch, rows, heads, size), dtype)
        make = call(
            backward_chunks.chunks_kernel,
            (batch, heads, pl.cdiv(all_chunks, own)),
            backward_chunks.scratch,
            (out(keys), out(keys), out(values), out(keys)),
            config=config.in_chunks,
            chunks=all_chunks,
            own=own,
            each=chunks,
            steps=values // WIDTH,
            interpret=interpret is not None,
            group=group,
            scale=scale,
        )
        arrays = [whole[name] for name in ("q", "k", "v", "g", "do")] + [states, d, decay, mild]
        dq, dk, dv, dg = make(*arrays, *(() if of_all is None else (of_all,)))
    else:
        if saved is not None:
            # Chunks past the end are read, too.
            past = [(0, parts * chunks - saved.mild.shape[2] if i == 2 else 0) for i in range(5)]
            states = jnp.pad(saved.states, past) if past[2][1] else saved.states
            mild = jnp.pad(saved.mild, past[:4], constant_values=1)
        else:
            of_walk = (whole["k"], whole["v"], whole["g"]) if splits == 2 else (k_, v_, g_)
            states, decay = walk((forwards, *of_walk, initial), marks=of_all if splits == 2 else of_parts)
            # A channel stands for the 64 of its block.
            mild = (decay[..., ::WIDTH] > 0.5).astype(jnp.int32)
        all_mild = jnp.min(mild.reshape(*mild.shape[:2], splits, -1, config.key_blocks), axis=3)
        out = lambda size: jax.ShapeDtypeStruct((batch * parts, rows // parts, heads, size), dtype)
        of_state = jax.ShapeDtypeStruct((batch * parts, heads, keys, values), jnp.float32)
        options = {"chunks": chunks, "splits": splits, "group": group, "scale": scale, "has_final": final is not None}
        make = call(
            backward_kernel.backward_kernel,
            (batch * parts, heads, 1),
            backward_kernel.scratch,
            (out(keys), out(keys), out(values), out(keys), of_state),
            **options,
        )
        optional = [x for x in (of_parts, final) if x is not None]
        *of_tokens, dinitial = make(q_, k_, v_, g_, do_, states, mild, all_mild, *optional)
        dq, dk, dv, dg = (x.reshape(batch, rows, *x.shape[2:]) for x in of_tokens)

    dinitial = dinitial[::parts]

    def undo(x, to, *units):
        for one in (factor, *units):
            x = x if one is None else x.astype(jnp.float32) * one
        return x.astype(to)

    dg = share(dg, 2)[:, :time, :, :key_size]
    if g is not None and g.ndim == 3:
        dg = jnp.sum(dg, axis=-1, dtype=jnp.float32)
    dinitial = undo(share(dinitial, 1)[:, :, :key_size, :value_size], jnp.float32)
    dg = undo(dg, dg.dtype if g is None else g.dtype, unit)
    if entering is not None:
        dinitial *= first_decay
        first = jnp.sum(entering * dinitial, axis=-1 if dg.ndim == 4 else (-2, -1))
        dg = dg.at[:, 0].set(first.astype(dg.dtype))
    return Gradients(
        undo(dq[:, :time, :, :key_size], q.dtype, unit),
        undo(share(dk, 2)[:, :time, :, :key_size], k.dtype, unit),
        undo(share(dv, 2)[:, :time, :, :value_size], dtype),
        dg if had_gate else None,
        None if initial_state is None else dinitial,
    )


def _magnitude(x, y=None):
    """A power of two near the largest number."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)))
    if y is not None:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(y)))
    return jnp.exp2(jnp.floor(jnp.log2(jnp.where(largest > 0, largest, 1.0))))


def _pad(x, shape):
    pad = [(0, size - had) for size, had in zip(shape, x.shape, strict=True)]
    return jnp.pad(x, pad) if any(high for _, high in pad) else x


def _sum_groups(x, axis, group):
    """[..., heads, ...] summed over each `group` heads in a row."""
    shape = (*x.shape[:axis], x.shape[axis] // group, group, *x.shape[axis + 1 :])
    return jnp.sum(x.reshape(shape), axis=axis + 1, dtype=jnp.float32)
