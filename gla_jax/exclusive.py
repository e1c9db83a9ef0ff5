"""Reading the state before a token is written to it, with a bonus for the token itself (RWKV-6).

    o_t = scale * q_t (S_{t-1} + Diag(u) k_t^T v_t)

An implementation reads after the write. So it is given each token's query one place early, and what it reads there,
q_t S_{t-1}, moves one place on. A token that starts a sequence reads the state that enters it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gla_jax import segments
from gla_jax.array_types import Array


class Reads(NamedTuple):
    """[b, t] bool each: tokens that read the state their predecessor left, and tokens of some sequence."""

    previous: Array
    inside: Array


def reads(shape: tuple[int, int], segment_ids: Array | None, cu_seqlens: Array | None) -> Reads:
    """Who reads what, before segments are masked; with cu_seqlens each sequence has a state of its own."""
    if cu_seqlens is not None:
        ids = segments.sequence_ids(cu_seqlens, shape[1])
        inside = ids >= 0
        starts = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        return Reads(inside & ~starts, inside)
    everywhere = jnp.ones(shape, bool)
    previous = everywhere.at[:, 0].set(False)
    return Reads(previous if segment_ids is None else previous & ~segments.segment_starts(segment_ids), everywhere)


def early(q: Array, who: Reads) -> Array:
    """Each token's query where its predecessor stands."""
    moved = jnp.where(who.previous[..., None, None], q, 0)[:, 1:]
    return jnp.pad(moved, ((0, 0), (0, 1), (0, 0), (0, 0)))


def finish(
    o: Array, who: Reads, q: Array, k: Array, v: Array, bonus: Array, state: Array, scale: float, cu: Array | None
) -> Array:
    """The outputs [b, t, h, v], from o of the early queries and the states that enter, [b or n, hk, k, v]."""
    dtype = state.dtype
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]).astype(dtype)

    def read(q: Array, state: Array) -> Array:
        o = jnp.einsum("nhrk,nhkv->nhrv", q, state, precision=jax.lax.Precision.HIGHEST)
        return scale * o.reshape(o.shape[0], -1, o.shape[-1])

    own = scale * jnp.einsum(
        "bthrk,bthk->bthr", grouped, bonus.astype(dtype) * k.astype(dtype), precision=jax.lax.Precision.HIGHEST
    )
    own = (own[..., None] * v.astype(dtype)[..., None, :]).reshape(o.shape)
    out = jnp.pad(o[:, :-1].astype(dtype), ((0, 0), (1, 0), (0, 0), (0, 0))) + own
    if cu is None:
        out = out.at[:, 0].add(read(grouped[:, 0], state))
    else:
        first = jnp.where(cu[:-1] < cu[1:], cu[:-1], q.shape[1])
        queries = jnp.take(grouped[0], first, axis=0, mode="fill", fill_value=0)
        out = jnp.where(who.inside[..., None, None], out, 0).at[0, first].add(read(queries, state), mode="drop")
    return out.astype(v.dtype)
