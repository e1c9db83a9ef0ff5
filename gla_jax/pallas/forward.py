"""The forward on Hopper: which calls it supports, and how arguments are brought to the kernel's shapes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.array_types import Array, Gate, Key, Query, Starts, State, Value
from gla_jax.pallas import backward_states, gate_kernel, scan_kernel
from gla_jax.pallas.backward_config import VALUE_BLOCKS, choose_backward
from gla_jax.pallas.config import WIDTH, ForwardConfig, ScanConfig, choose_forward
from gla_jax.pallas.forward_kernel import forward_kernel, scratch
from gla_jax.pallas.gating import CHUNK, FLOOR, mark_starts

LARGEST_KEY = 256
_DTYPES = (jnp.bfloat16, jnp.float16)


class States(NamedTuple):
    """What the forward leaves for `gla_jax.pallas.backward`, for chunks of 64 tokens, n in number.

    states is [b, hk, n, k v / 64, 64] of q's dtype, k and v padded: tiles of 64 x 64 in one column, those of the same
    channels next to each other. They hold exp(B/2) S, S the state before the chunk and B its decay, where 64 channels
    are mild (no B under -96), and S where not.

    mild is [b, hk, n, k / 64] int32, 1 where they are.
    """

    states: Array
    mild: Array


def saves_states(
    q: Query | jax.ShapeDtypeStruct,
    k: Key | jax.ShapeDtypeStruct,
    v: Value | jax.ShapeDtypeStruct,
    g: Gate | jax.ShapeDtypeStruct | None,
    devices: int = 1,
) -> bool:
    """Whether `forward` can leave the states that the backward reads, in at most 40 % of the bytes of q, k, v, g and o.

    It does in one pass, for v from 65 to 128. Gates in float32 are rounded in the backward, and its states are of the
    rounded ones.

    Args:
      q, k, v, g: as `forward`'s; only shapes and dtypes are read.
      devices: how many at most share batch and heads.
    """
    batch, time, heads, key_size = q.shape
    kv_heads, value_size = v.shape[2:]
    if q.dtype != jnp.bfloat16 or (g is not None and g.dtype != q.dtype) or not WIDTH < value_size <= 2 * WIDTH:
        return False
    some = [batch * heads // n for n in range(1, devices + 1) if devices % n == 0 and batch * heads % n == 0]
    options = {"may_split": _may_split(time, g, q.dtype)}
    choices = (choose_forward(key_size, value_size, n, pl.cdiv(time, CHUNK), q.dtype, **options) for n in some)
    if not all(isinstance(config, ForwardConfig) for config in choices):
        return False
    width = WIDTH if key_size <= WIDTH else 2 * WIDTH
    # Numbers a token.
    gates = 0 if g is None else kv_heads if g.ndim == 3 else kv_heads * key_size
    own = (heads + kv_heads) * (key_size + value_size) + gates
    return 5 * kv_heads * width * 2 * WIDTH // CHUNK <= 2 * own


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
    initial_state: State | Callable[[Array, Array], Array] | None = None,
    output_final_state: bool = False,
    *,
    starts: Starts | None = None,
    config: ForwardConfig | tuple[ForwardConfig, ScanConfig] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, State | None]:
    """The gated scan S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t in Mosaic GPU kernels.

    Args:
      q: [b, t, h, k], bfloat16 or float16, k at most 256.
      k, v: [b, t, hk, k] and [b, t, hk, v] of q's dtype.
      g: log decay, [b, t, hk] or [b, t, hk, k], at most 0, of q's dtype or float32; -inf is a hard reset. None for no
        decay. A float32 gate a channel is given to the kernel as a sum of two of q's dtype.
      scale: factor of o.
      initial_state: [b, hk, k, v] float32 before the first token; zeros if None. Or a function that makes it of what
        these tokens do to a state, S -> decay S + own, all three transposed as the second pass has them: float32 decay
        [b, hk, 1, k], own [b, hk, v, k] and result [b, hk, v, k].
      output_final_state: whether to return the state after the last token.
      starts: [b, t] bool, tokens before which the state is reset, as g = -inf there does. A chunk that is mild but for
        these is nearly as fast as one without.
      config: the tuning, of two passes for a function; the table's for these shapes if None.
      interpret: runs the kernels in Pallas' interpreter.

    Returns:
      o [b, t, h, v] of v's dtype, and the final state [b, hk, k, v] in float32 or None.
    """
    return _forward(q, k, v, g, scale, initial_state, output_final_state, False, starts, config, interpret)[:2]


def forward_and_states(
    q: Query,
    k: Key,
    v: Value,
    g: Gate | None,
    scale: float,
    initial_state: State | None = None,
    output_final_state: bool = False,
    *,
    starts: Starts | None = None,
    config: ForwardConfig | tuple[ForwardConfig, ScanConfig] | None = None,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, State | None, States]:
    """`forward`'s two results and the states before all chunks, for `backward`; where `saves_states` says so.

    Args:
      q, k, v, g, scale, initial_state, output_final_state, starts, config, interpret: as `forward`'s.

    Raises:
      ValueError: the tuning is of two passes, which keep no states.
    """
    o, state, states = _forward(q, k, v, g, scale, initial_state, output_final_state, True, starts, config, interpret)
    assert states is not None
    return o, state, states


def reset_at_starts(g, starts, k):
    """g and starts as the kernels take them: of gates a token (and none) the starts go into g, [b, t, hk] float32."""
    if starts is None or (g is not None and g.ndim == 4):
        return g, starts
    g = jnp.zeros(k.shape[:3], jnp.float32) if g is None else g
    return jnp.where(starts[..., None], -jnp.inf, g), None


def _forward(q, k, v, g, scale, initial_state, output_final_state, output_states, starts, config, interpret):
    batch, time, heads, key_size = q.shape
    g, starts = reset_at_starts(g, starts, k)
    value_size = v.shape[-1]
    gate_parts = 0 if g is None or g.ndim == 3 else 1 if g.dtype == q.dtype else 2
    chunks = pl.cdiv(time, CHUNK)
    if config is None:
        options = {"wide_gate": gate_parts == 2, "two_passes": callable(initial_state)}
        options |= {"may_split": _may_split(time, g, q.dtype), "one_pass": output_states}
        config = choose_forward(key_size, value_size, batch * heads, chunks, q.dtype, **options)
    one_pass = isinstance(config, ForwardConfig)
    scan = config if one_pass else config[1]

    padded_time = max(CHUNK, -(-time // 8) * 8)
    widths = scan.key_blocks * WIDTH, -(-value_size // scan.value_width) * scan.value_width
    g = _pad(_parts(g, q.dtype), padded_time, widths[0], axes=(1, 4)) if gate_parts else _sums_of_chunks(g, k)
    q, k = (_pad(x, padded_time, widths[0]) for x in (q, k))
    v = _pad(v, padded_time, widths[1])
    if callable(initial_state):
        enter = initial_state

        def initial_state(decay, own):
            state = enter(decay[..., :key_size], own[:, :, :value_size, :key_size])
            return _pad(state, widths[1], widths[0], axes=(2, 3))

    elif initial_state is not None:
        initial_state = _pad(initial_state, widths[0], widths[1], axes=(2, 3))
    if output_states and not one_pass:
        raise ValueError("config must be of one pass where states are returned, got one of two")
    run = functools.partial(_one_pass, output_states=output_states) if one_pass else _two_passes
    if one_pass and scan.splits > 1:
        if padded_time % (scan.splits * CHUNK) or gate_parts == 2:
            raise ValueError(
                f"config.splits={scan.splits} takes times that are multiples of {scan.splits * CHUNK}, and no gates of "
                f"float32 a channel; got {time} and gates of {gate_parts} parts"
            )
        initial_state = _entering_states(k, v, g, starts, initial_state, scan.splits, interpret)
    options = {"config": config, "chunks": chunks, "gate_parts": gate_parts, "interpret": interpret}
    o, state, states = run(q, k, v, g, starts, scale, initial_state, output_final_state, **options)
    return o[:, :time, :, :value_size], None if state is None else state[:, :, :key_size, :value_size], states


def _kernel(body, threads, scratch, out_type, grid, config, interpret, **options):
    return plgpu.kernel(
        functools.partial(body, config=config, interpret=interpret is not None, **options),
        out_type=tuple(out_type),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=threads,
        thread_name="role",
        scratch_types=[scratch],
        # No reduction in these kernels crosses warps, so none needs scratch.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )


def _one_pass(
    q,
    k,
    v,
    g,
    starts,
    scale,
    initial_state,
    output_final_state,
    *,
    output_states,
    config,
    chunks,
    gate_parts,
    interpret,
):
    batch, time, heads, key_size = q.shape
    kv_heads, value_size = v.shape[2:]
    marks = () if starts is None else (mark_starts(starts, chunks),)
    if config.splits > 1:
        cut = lambda x: x.reshape(batch * config.splits, -1, *x.shape[2:])
        q, k, v, *marks = (cut(x) for x in (q, k, v, *marks))
        g = cut(g) if gate_parts else jnp.moveaxis(cut(jnp.moveaxis(g, 1, 2)), 1, 2)
    parts, of_part = q.shape[:2]
    out_type = [jax.ShapeDtypeStruct((parts, of_part, heads, value_size), v.dtype)]
    if output_final_state:
        out_type.append(jax.ShapeDtypeStruct((parts, kv_heads, key_size, value_size), jnp.float32))
    if output_states:
        tiles = key_size * value_size // WIDTH, WIDTH
        out_type.append(jax.ShapeDtypeStruct((batch, kv_heads, chunks, *tiles), q.dtype))
        out_type.append(jax.ShapeDtypeStruct((batch, kv_heads, chunks, config.key_blocks), jnp.int32))
    kernel = _kernel(
        forward_kernel,
        config.threads,
        scratch(config, q.dtype, gate_parts, starts is not None),
        out_type,
        {"batch": parts, "head": heads, "part": value_size // config.value_width},
        config,
        interpret,
        chunks=chunks // config.splits,
        group=heads // kv_heads,
        scale=scale,
        has_starts=starts is not None,
        has_initial=initial_state is not None,
        has_final=output_final_state,
        has_states=output_states,
        gate_parts=gate_parts,
    )
    o, *found = kernel(q, k, v, g, *marks, *(() if initial_state is None else (initial_state,)))
    final = found.pop(0)[config.splits - 1 :: config.splits] if output_final_state else None
    return o.reshape(batch, time, heads, value_size), final, States(*found) if output_states else None


def _may_split(time, g, dtype):
    """Whether one pass can cut a sequence: in whole chunks, and with gates that the walk ahead reads as they are."""
    return time % CHUNK == 0 and (g is None or g.ndim == 3 or g.dtype == dtype)


def _entering_states(k, v, g, starts, initial_state, splits, interpret):
    """The states [b * splits, hk, k, v] that enter each part of a sequence, from what all but the last add to them.

    k, v and g are as the kernel of one pass takes them, starts as given to `forward`.
    """
    batch, time, kv_heads, key_size = k.shape
    value_size = v.shape[-1]
    config = choose_backward(key_size, value_size, k.dtype)
    width = -(-value_size // (VALUE_BLOCKS * WIDTH)) * VALUE_BLOCKS * WIDTH
    v = _pad(v, time, width)
    # Each part is walked in several, where there is room for them, and what they add is added up.
    blocks = batch * kv_heads * (splits - 1) * (width // (VALUE_BLOCKS * WIDTH))
    several = next(n for n in (8, 4, 2, 1) if n == 1 or (n * blocks <= 132 and time // CHUNK % (n * splits) == 0))
    kind = backward_states.Walk(kv_heads, totals=True, of=splits * several, first=(splits - 1) * several)
    cut = lambda x: x.reshape(batch * splits * several, -1, *x.shape[2:])
    g = jnp.moveaxis(cut(jnp.moveaxis(g, 1, 2)), 1, 2) if g.ndim == 3 else cut(g[:, :, :, 0])
    marks = None if starts is None else cut(mark_starts(starts, time // CHUNK))
    walked = backward_states.walk(config, interpret, (kind, cut(k), cut(v), g, None), marks=marks)
    initial = None if initial_state is None else _pad(initial_state, key_size, width, axes=(2, 3))
    before, after = backward_states.through_parts(initial, walked, (splits - 1) * several)
    states = jnp.concatenate([before[:, ::several], after[:, None]], 1)
    return states.reshape(batch * splits, kv_heads, key_size, width)[..., :value_size]


def _two_passes(q, k, v, g, starts, scale, initial_state, output_final_state, *, config, chunks, gate_parts, interpret):
    gate, scan = config
    batch, time, heads, key_size = q.shape
    kv_heads, value_size = v.shape[2:]
    each = pl.cdiv(chunks, scan.splits)
    splits = pl.cdiv(chunks, each)
    # The first pass goes through `own` chunks a block, and as many blocks as there are multiprocessors, or a few less.
    parts = min(chunks, max(1, 128 // (batch * heads)))
    own = pl.cdiv(chunks, parts)
    parts = pl.cdiv(splits * each, own)
    shape = lambda dtype, *last: jax.ShapeDtypeStruct((batch, heads, parts * own, *last), dtype)
    tiles = shape(q.dtype, scan.key_blocks, CHUNK, CHUNK)
    scores = shape(q.dtype, scan.shares, CHUNK, CHUNK)
    kernel = _kernel(
        gate_kernel.gate_kernel,
        gate.threads,
        gate_kernel.scratch(gate, q.dtype, gate_parts, starts is not None),
        (tiles, tiles, scores, shape(jnp.float32, scan.key_blocks, CHUNK)),
        {"batch": batch, "head": heads, "part": parts},
        gate,
        interpret,
        chunks=own,
        parts=parts,
        group=heads // kv_heads,
        gate_parts=gate_parts,
    )
    gated = kernel(q, k, g, *(() if starts is None else (mark_starts(starts, parts * own),)))

    def run(reads, initial, has_final):
        out_type = [jax.ShapeDtypeStruct((batch, time, heads, value_size), v.dtype)] if reads else []
        if has_final:
            out_type.append(jax.ShapeDtypeStruct((batch, kv_heads, splits, value_size, key_size), jnp.float32))
        kernel = _kernel(
            scan_kernel.scan_kernel,
            scan.threads,
            scan_kernel.scratch(scan, q.dtype, reads, interpret is not None),
            out_type,
            {"batch": batch, "head": heads, "part": value_size // scan.value_width, "split": splits},
            scan,
            interpret,
            chunks=each,
            group=heads // kv_heads,
            scale=scale,
            reads=reads,
            has_initial=initial is not None,
            has_final=has_final,
        )
        return kernel(*gated, v, *(() if initial is None else (initial,)))

    # States are transposed in this kernel, [v, k], one a split.
    turned = lambda state: jnp.swapaxes(state, 2, 3)
    added: Any = None
    decay: Any = None
    if splits > 1 or callable(initial_state):
        (added,) = run(False, None, True)
        decay = gated[3][:, :: heads // kv_heads, : splits * each].reshape(batch, kv_heads, splits, each, 1, key_size)
        decay = jnp.prod(decay, axis=3)
    initial = None
    if callable(initial_state):
        own = _states_between(added, decay, None)[-1]
        initial = initial_state(jnp.prod(decay, axis=2), own[:, :, 0])[:, :, None]
    elif initial_state is not None:
        initial = turned(initial_state)[:, :, None]
    if splits > 1:
        initial = jnp.concatenate(_states_between(added, decay, initial)[:-1], axis=2)
    o, *final = run(True, initial, output_final_state)
    return o, turned(final[0][:, :, -1]) if output_final_state else None, None


def _states_between(added, decay, initial):
    """The states [b, hk, 1, v, k] before each split of a sequence and after the last.

    Args:
      added: [b, hk, splits, v, k], what each split adds to the state after it.
      decay: [b, hk, splits, 1, k].
      initial: [b, hk, 1, v, k] before the first, or None.
    """
    states = [jnp.zeros_like(added[:, :, :1]) if initial is None else initial]
    for i in range(added.shape[2]):
        states.append(decay[:, :, i : i + 1] * states[-1] + added[:, :, i : i + 1])
    return states


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
