"""The forward on Hopper: which calls it supports, and how arguments are brought to the kernel's shapes."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.array_types import Array, Gate, Key, Query, State, Value
from gla_jax.pallas.config import WIDTH, ForwardConfig, choose_forward
from gla_jax.pallas.forward_kernel import forward_kernel, scratch
from gla_jax.pallas.gating import CHUNK, FLOOR

LARGEST_KEY = 256
_DTYPES = (jnp.bfloat16, jnp.float16)


def why_unsupported(
    q: Query | jax.ShapeDtypeStruct,
    k: Key | jax.ShapeDtypeStruct,
    v: Value | jax.ShapeDtypeStruct,
    g: Gate | jax.ShapeDtypeStruct | None = None,
    *,
    own_states: bool = False,
    platform: str | None = None,
) -> str | None:
    """Says why `forward` does not take a call, or None if it does.

    Args:
      q, k, v, g: as `forward`'s; only shapes and dtypes are read.
      own_states: whether the call has sequences with a state each (cu_seqlens with states).
      platform: "hopper" stands for the default device's own compute capability, for tests without one.
    """
    if q.dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, and q is {q.dtype}"
    if q.shape[-1] > LARGEST_KEY:
        return f"it takes k up to {LARGEST_KEY}, and k is {q.shape[-1]}"
    if own_states:
        return "it keeps one state a batch row, and cu_seqlens with states asks for one a sequence"
    return why_no_hopper(platform)


def why_no_hopper(platform: str | None = None) -> str | None:
    """Says that the default device, or the platform given in its place, is no Hopper GPU; None if it is one."""
    if platform is None:
        default = jax.config.jax_default_device
        device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
        platform = "hopper" if getattr(device, "compute_capability", None) == "9.0" else device.platform
    return None if platform == "hopper" else f"it needs a Hopper GPU, and the device is {platform}"


def forward(
    q: Query,
    k: Key,
    v: Value,
    g: Gate | None,
    scale: float,
    initial_state: State | None = None,
    output_final_state: bool = False,
    *,
    config: ForwardConfig | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, State | None]:
    """The gated scan S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t in one Mosaic GPU kernel.

    Args:
      q: [b, t, h, k], bfloat16 or float16, k at most 256.
      k, v: [b, t, hk, k] and [b, t, hk, v] of q's dtype.
      g: log decay, [b, t, hk] or [b, t, hk, k], at most 0, of q's dtype or float32; -inf is a hard reset. None for no
        decay. A float32 gate a channel is given to the kernel as a sum of two of q's dtype.
      scale: factor of o.
      initial_state: [b, hk, k, v] float32 before the first token; zeros if None.
      output_final_state: whether to return the state after the last token.
      config: the tuning; the table's for these shapes if None.
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      o [b, t, h, v] of v's dtype, and the final state [b, hk, k, v] in float32 or None.
    """
    batch, time, heads, key_size = q.shape
    kv_heads, value_size = v.shape[2:]
    by_channel = g is not None and g.ndim == 4
    gate_parts = 0 if g is None or g.ndim == 3 else 1 if g.dtype == q.dtype else 2
    config = config or choose_forward(key_size, value_size, batch * heads, q.dtype, gate_parts == 2)

    padded_time = max(CHUNK, -(-time // 8) * 8)
    widths = config.key_blocks * WIDTH, -(-value_size // config.value_width) * config.value_width
    g = _pad(_parts(g, q.dtype), padded_time, widths[0], axes=(1, 4)) if by_channel else _sums_of_chunks(g, k)
    q, k = (_pad(x, padded_time, widths[0]) for x in (q, k))
    v = _pad(v, padded_time, widths[1])
    if initial_state is not None:
        initial_state = _pad(initial_state, widths[0], widths[1], axes=(2, 3))

    body = functools.partial(
        forward_kernel,
        config=config,
        chunks=pl.cdiv(time, CHUNK),
        group=heads // kv_heads,
        scale=scale,
        has_initial=initial_state is not None,
        has_final=output_final_state,
        gate_parts=gate_parts,
        interpret=interpret is not None,
    )
    out_type = [jax.ShapeDtypeStruct((batch, padded_time, heads, widths[1]), v.dtype)]
    if output_final_state:
        out_type.append(jax.ShapeDtypeStruct((batch, kv_heads, *widths), jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=(batch, heads, widths[1] // config.value_width),
        grid_names=("batch", "head", "part"),
        num_threads=config.threads,
        thread_name="role",
        scratch_types=[scratch(config, q.dtype, gate_parts)],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=not config.auto_barriers),
        interpret=interpret,
    )
    o, *state = kernel(q, k, v, g, *(() if initial_state is None else (initial_state,)))
    o = o[:, :time, :, :value_size]
    return o, state[0][:, :, :key_size, :value_size] if output_final_state else None


def _parts(g, dtype):
    """[b, t, hk, parts, k] of `dtype`: g itself, or two numbers that sum up to a float32 one."""
    if g.dtype == dtype:
        return g[:, :, :, None]
    # Far below FLOOR, and no infinity to subtract.
    g = jnp.maximum(g, -16384.0)
    info = jnp.finfo(dtype)
    high = jax.lax.reduce_precision(g, info.nexp, info.nmant)
    return jnp.stack([high.astype(dtype), (g - high).astype(dtype)], 3)


def _sums_of_chunks(g, k):
    """[b, hk, t]: a gate a token summed up inside each chunk, in float32; zeros for no gate."""
    batch, time, heads = k.shape[:3]
    chunks = -(-time // CHUNK)
    if g is None:
        return jnp.zeros((batch, heads, chunks * CHUNK), jnp.float32)
    g = jnp.maximum(jnp.moveaxis(g, 1, 2).astype(jnp.float32), FLOOR)
    g = jnp.pad(g, ((0, 0), (0, 0), (0, chunks * CHUNK - time)))
    return jnp.cumsum(g.reshape(batch, heads, chunks, CHUNK), axis=-1).reshape(batch, heads, chunks * CHUNK)


def _pad(x, first, second, axes=(1, 3)):
    pad = [(0, 0)] * x.ndim
    for axis, size in zip(axes, (first, second), strict=True):
        pad[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, pad) if any(high for _, high in pad) else x
