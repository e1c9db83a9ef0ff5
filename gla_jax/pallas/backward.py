"""The backward on Hopper: what is kept and recomputed, and how arguments are brought to the kernels' shapes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.array_types import Array, Float, Gate, Key, Query, State, Value
from gla_jax.pallas import backward_kernel, backward_states
from gla_jax.pallas.backward_config import VALUE_BLOCKS, BackwardConfig, choose_backward
from gla_jax.pallas.config import WIDTH
from gla_jax.pallas.gating import CHUNK


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
    dfinal: State | None = None,
    *,
    config: BackwardConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> Gradients:
    """Gradients of S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t in two Mosaic GPU kernels.

    Nothing is kept from the forward but its arguments. With dS_t the cotangent of S_t,

        dS_t = Diag(exp g_{t+1}) dS_{t+1} + scale q_t^T do_t        dq_t = scale do_t S_t^T
        dk_t = v_t dS_t^T        dv_t = k_t dS_t        dg_t = exp(g_t) rowsum(S_{t-1} dS_t)

    (arXiv 2312.06635, section 4, has them in chunks but for dg, which it takes from differences of q dq and k dk that
    cancel; backward_gates.py has what is done here.) The first kernel walks forward and writes the state before each
    chunk of 64 tokens, 2 k v / 64 bytes a token that are free afterwards; the second walks back. Exact for every gate:
    the first checks how each 64 channels of a chunk decay, and the second takes the form that fits. The same bits
    from run to run.

    Args:
      q: [b, t, h, k], bfloat16 or float16, any k.
      k, v: [b, t, hk, k] and [b, t, hk, v] of q's dtype.
      g: log decay, [b, t, hk] or [b, t, hk, k], at most 0; -inf is a hard reset, and its gradient 0. None for no decay.
        Float32 is rounded to q's dtype: with decays off by G 2^-9, of exp(-G) no more than 2^-9 / e is lost.
      scale: factor of o.
      initial_state: [b, hk, k, v] float32 before the first token; zeros if None.
      do: cotangent of o, [b, t, h, v].
      dfinal: cotangent of the final state, [b, hk, k, v] float32; zeros if None.
      config: the tuning; the table's for these shapes if None.
      interpret: runs the kernels in Pallas' interpreter.
    """
    batch, time, heads, key_size = q.shape
    kv_heads, value_size = v.shape[2:]
    group, dtype = heads // kv_heads, q.dtype
    config = config or choose_backward(key_size, dtype)
    chunks = pl.cdiv(time, CHUNK)
    rows = max(CHUNK, -(-time // 8) * 8)
    key_width, value_width = config.key_blocks * WIDTH, VALUE_BLOCKS * WIDTH
    key_parts, value_parts = pl.cdiv(key_size, key_width), pl.cdiv(value_size, value_width)
    keys, values = key_parts * key_width, value_parts * value_width
    factor = _magnitude(do, dfinal) if dtype == jnp.float16 else None
    if factor is not None:
        do = do.astype(jnp.float32) / factor
        dfinal = None if dfinal is None else dfinal / factor

    gates = jnp.zeros(k.shape, dtype) if g is None else g
    if gates.ndim == 3:
        gates = jnp.broadcast_to(gates[..., None], k.shape)
    tokens = lambda x, size: _pad(x.astype(dtype), (batch, rows, x.shape[2], size))
    state = lambda x: () if x is None else (_pad(x, (batch, kv_heads, keys, values)),)
    padded = tokens(q, keys), tokens(k, keys), tokens(v, values), tokens(gates, keys)
    call = functools.partial(
        plgpu.kernel,
        grid_names=("batch", "head", "part"),
        num_threads=config.threads,
        thread_name="role",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=not config.auto_barriers, reduction_scratch_bytes=0
        ),
        interpret=interpret,
    )
    make_states = call(
        functools.partial(
            backward_states.states_kernel,
            config=config,
            chunks=chunks,
            value_parts=value_parts,
            has_initial=initial_state is not None,
        ),
        out_type=(
            jax.ShapeDtypeStruct((batch, kv_heads, chunks, keys, values), dtype),
            jax.ShapeDtypeStruct((batch, kv_heads, chunks, keys), jnp.float32),
        ),
        grid=(batch, kv_heads, key_parts * value_parts),
        scratch_types=[backward_states.scratch(config, dtype)],
    )
    states, decay = make_states(*padded[1:], *state(initial_state))
    of_keys = jax.ShapeDtypeStruct((value_parts, batch, rows, heads, keys), dtype)
    make_gradients = call(
        functools.partial(
            backward_kernel.backward_kernel,
            config=config,
            chunks=chunks,
            value_parts=value_parts,
            group=group,
            scale=scale,
            has_final=dfinal is not None,
        ),
        out_type=(
            of_keys,
            of_keys,
            jax.ShapeDtypeStruct((key_parts, batch, rows, heads, values), dtype),
            of_keys,
            jax.ShapeDtypeStruct((batch, heads, keys, values), jnp.float32),
        ),
        grid=(batch, heads, key_parts * value_parts),
        scratch_types=[backward_kernel.scratch(config, dtype)],
    )
    dq, dk, dv, dg, dinitial = make_gradients(*padded, tokens(do, values), states, decay, *state(dfinal))

    add = lambda x: x[0] if x.shape[0] == 1 else jnp.sum(x, axis=0, dtype=jnp.float32)
    share = lambda x, axis: x if group == 1 else _sum_groups(x, axis, group)
    undo = lambda x, to: (x if factor is None else x.astype(jnp.float32) * factor).astype(to)
    dg = None if g is None else share(add(dg), 2)[:, :time, :, :key_size]
    if g is not None and g.ndim == 3:
        dg = jnp.sum(dg, axis=-1, dtype=jnp.float32)
    return Gradients(
        undo(add(dq)[:, :time, :, :key_size], q.dtype),
        undo(share(add(dk), 2)[:, :time, :, :key_size], k.dtype),
        undo(share(add(dv), 2)[:, :time, :, :value_size], v.dtype),
        None if dg is None else undo(dg, g.dtype),
        None if initial_state is None else undo(share(dinitial, 1)[:, :, :key_size, :value_size], jnp.float32),
    )


def _magnitude(do, dfinal):
    """A power of two near the largest cotangent: float16 would lose those of a mean over many tokens."""
    largest = jnp.max(jnp.abs(do.astype(jnp.float32)))
    if dfinal is not None:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(dfinal)))
    return jnp.exp2(jnp.floor(jnp.log2(jnp.where(largest > 0, largest, 1.0))))


def _pad(x, shape):
    pad = [(0, size - had) for size, had in zip(shape, x.shape, strict=True)]
    return jnp.pad(x, pad) if any(high for _, high in pad) else x


def _sum_groups(x, axis, group):
    """[..., heads, ...] summed over each `group` heads in a row."""
    shape = (*x.shape[:axis], x.shape[axis] // group, group, *x.shape[axis + 1 :])
    return jnp.sum(x.reshape(shape), axis=axis + 1, dtype=jnp.float32)
