"""The recurrence in float64, token by token, with gradients by autodiff: what gla_jax is held to. It calls none of it.

    S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

or, with a bonus u, o_t = scale * q_t (S_{t-1} + Diag(u) k_t^T v_t). Every head of every row runs by itself: k, v and g
are repeated for grouped queries. Where a state enters, where one leaves and which tokens count is told token by token,
by a plain loop over segment_ids or cu_seqlens.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Result(NamedTuple):
    """o, the final state, and the gradients of <o, do> + <state, dstate>; None where there is no such argument."""

    o: Any
    state: Any
    q: Any
    k: Any
    v: Any
    g: Any
    initial_state: Any
    bonus: Any = None


class Tokens(NamedTuple):
    """[b, t] each: the state that enters before a token (-1 for none), that leaves after it, and whether it counts."""

    enter: np.ndarray
    leave: np.ndarray
    counts: np.ndarray


def layout(batch: int, time: int, segment_ids: Any, cu_seqlens: Any) -> tuple[Tokens, int]:
    """The tokens' roles and the number of states a row; the number after the last one is a state of zeros."""
    enter, leave = np.full((batch, time), -1, np.int64), np.full((batch, time), -1, np.int64)
    counts = np.ones((batch, time), bool)
    if cu_seqlens is not None:
        cu = [int(x) for x in cu_seqlens]
        counts[:] = False
        for i, (begin, end) in enumerate(itertools.pairwise(cu)):
            if begin < end:
                enter[0, begin], leave[0, end - 1] = i, i
                counts[0, begin:end] = True
        return Tokens(enter, leave, counts), len(cu) - 1
    for row in range(batch):
        before, last = None, None
        for i in range(time):
            own = int(segment_ids[row, i])
            if own < 0:
                counts[row, i] = False
                continue
            if own != before:
                enter[row, i] = 0 if before is None else 1
            before, last = own, i
        if last is not None:
            leave[row, last] = 0
    return Tokens(enter, leave, counts), 1


def oracle(
    q,
    k,
    v,
    g=None,
    *,
    do,
    dstate,
    scale=None,
    initial_state=None,
    segment_ids=None,
    cu_seqlens=None,
    reverse=False,
    bonus=None,
) -> Result:
    """What gated_linear_attention should give, and its gradients, for cotangents do and dstate."""
    wide: list[Any] = [
        None if x is None else np.asarray(x, np.float64) for x in (q, k, v, g, initial_state, do, dstate, bonus)
    ]
    q, k, v, g, initial_state, do, dstate, bonus = wide
    batch, time, heads, key_dim = q.shape
    scale = key_dim**-0.5 if scale is None else scale
    rows_first = cu_seqlens is None
    tokens, states = None, 1  # one run a row
    if segment_ids is not None or cu_seqlens is not None:
        tokens, states = layout(batch, time, *(_flip(x, reverse, time) for x in (segment_ids, cu_seqlens)))
    shape = (batch if rows_first else states, k.shape[2], key_dim, v.shape[-1])
    start = np.zeros(shape) if initial_state is None else initial_state
    start, dstate = (_states_in(x, rows_first, reverse) for x in (start, dstate))
    q, k, v, do = (_time_in(x, reverse) for x in (q, k, v, do))
    g = g if g is None or g.ndim == 1 else _time_in(g, reverse)

    lanes = batch * heads
    together = max(n for n in range(1, lanes + 1) if lanes % n == 0 and (n == 1 or n * key_dim * v.shape[-1] <= 2**15))
    # Short runs take longer to compile than to run.
    run = _QUICK if q.size * v.shape[-1] < 2**24 else _OPTIMIZED
    with jax.enable_x64(True):
        o, state, grads = run(q, k, v, g, start, bonus, scale, tokens, do, dstate, together)
    dq, dk, dv, dg, dstart, dbonus = (None if x is None else np.asarray(x) for x in grads)
    o, dq, dk, dv = (_time_in(np.asarray(x), reverse) for x in (o, dq, dk, dv))
    dg = dg if dg is None or dg.ndim == 1 else _time_in(dg, reverse)
    state, dstart = (_states_out(np.asarray(x), rows_first, reverse) for x in (state, dstart))
    return Result(o, state, dq, dk, dv, dg, None if initial_state is None else dstart, dbonus)


def _time_in(x, reverse: bool):
    return np.flip(x, 1) if reverse else x


def _flip(x, reverse: bool, time: int):
    if x is None or not reverse:
        return x
    x = np.asarray(x)
    return np.flip(x, 1) if x.ndim == 2 else [time - int(end) for end in reversed(x)]


def _states_in(x, rows_first: bool, reverse: bool):
    """[b, hk, k, v] or [n, hk, k, v] to [rows, states, hk, k, v]."""
    return x[:, None] if rows_first else (np.flip(x, 0) if reverse else x)[None]


def _states_out(x, rows_first: bool, reverse: bool):
    return x[:, 0] if rows_first else (np.flip(x[0], 0) if reverse else x[0])


def _run(q, k, v, g, start, bonus, scale, tokens, do, dstate, together):
    def f(q, k, v, g, start, bonus):
        return _forward(q, k, v, g, start, bonus, scale, tokens, together)

    (o, state), pull = jax.vjp(f, q, k, v, g, start, bonus)
    return o, state, pull((do, dstate))


_OPTIMIZED = jax.jit(_run, static_argnames="together")
_QUICK = jax.jit(_run, static_argnames="together", compiler_options={"xla_backend_optimization_level": 0})


def _forward(q, k, v, g, start, bonus, scale, tokens, together):
    batch, time, heads, _ = q.shape
    group = heads // k.shape[2]
    decay = jnp.ones((batch, time, k.shape[2], 1)) if g is None else jnp.exp(g)
    if decay.ndim == 1:
        decay = jnp.broadcast_to(decay, k.shape[:3])
    if decay.ndim == 3:
        decay = decay[..., None]
    repeated = (jnp.repeat(x, group, axis=2) for x in (k, v, decay))
    by_lane = [_fold(jnp.moveaxis(x, 2, 1), together) for x in (q, *repeated)]
    tables = _fold(jnp.repeat(jnp.moveaxis(start, 2, 1), group, axis=1), together)  # [lane, states, k, v]
    roles = jax.tree.map(lambda x: _fold(jnp.repeat(jnp.asarray(x)[:, None], heads, 1), together), tokens)

    bonuses = None
    if bonus is not None:
        bonuses = _fold(jnp.broadcast_to(jnp.repeat(bonus, group, axis=0), (batch, heads, bonus.shape[1])), together)
    xs = by_lane, tables, roles, bonuses
    o, state = jax.lax.map(lambda x: jax.vmap(functools.partial(_lane, scale))(*x), xs)
    o = jnp.moveaxis(o.reshape(batch, heads, *o.shape[2:]), 1, 2)
    # A group's heads have one state.
    state = jnp.moveaxis(state.reshape(batch, heads, *state.shape[2:])[:, ::group], 1, 2)
    return o, state


def _fold(x, together):
    """[b, h, ...] to [b * h / together, together, ...]."""
    return x.reshape(-1, together, *x.shape[2:])


def _lane(scale, tokens, table, roles, bonus):
    """One head of one row: q, k [t, k], v [t, v], decay [t, k or 1]; table [states, k, v]; no roles for one run."""
    time, states = tokens[0].shape[0], table.shape[0]
    block = max(n for n in range(1, math.isqrt(time) + 1) if time % n == 0)

    def update(s, q, k, v, decay):
        if bonus is not None:
            own = k[:, None] * v[None, :]
            return decay[:, None] * s + own, scale * (q @ (s + bonus[:, None] * own))
        s = decay[:, None] * s + k[:, None] * v[None, :]
        return s, scale * (q @ s)

    def of_one_run(s, x):
        return update(s, *x[0])

    def of_many(carry, x):
        before, finals = carry
        token, (enter, leave, counts) = x
        s, o = update(jnp.where(enter >= 0, entering[enter], before), *token)
        s = jnp.where(counts, s, before)
        leaves = (jnp.arange(states) == leave)[:, None, None]
        return (s, jnp.where(leaves, s, finals)), jnp.where(counts, o, 0.0)

    def of_block(carry, xs):
        return jax.lax.scan(of_one_run if roles is None else of_many, carry, xs)

    xs = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (tokens, roles))
    entering = jnp.concatenate([table, jnp.zeros_like(table[:1])])
    start: Any = table[0] if roles is None else (jnp.zeros_like(table[0]), table)
    end, o = jax.lax.scan(jax.checkpoint(of_block), start, xs)
    _, finals = (None, end[None]) if roles is None else end
    return o.reshape(time, -1), finals
