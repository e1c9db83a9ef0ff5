"""The gradients of RMSNorm on Hopper, beside a residual stream or before an output gate: each number is read once.

XLA makes one kernel of the norm itself, but two or three of its gradients: they need a sum over each row first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.array_types import Array, Float
from gla_jax.pallas.forward import why_no_hopper

WARPS, LANES = 4, 32
# Numbers of each array that a thread has under way at once; blocks that fill the GPU (two a multiprocessor); the rows
# of a block, of which the most that leave as many are taken; fewer rows than FEW are left to XLA.
NUMBERS, FULL, EACH, FEW = 32, 248, (256, 128, 64, 32, 16, 8), 2048


def why_unsupported(x: Any, *, platform: str | None = None) -> str | None:
    """Says why `norm_gradients` does not take x [b, t, h, d], or None if it does."""
    batch, time, heads, width = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, and x is {x.dtype}"
    if time % EACH[-1] or batch * time < FEW:
        return (
            f"it takes t in multiples of {EACH[-1]} and b * t of at least {FEW}, and they are {time} and {batch * time}"
        )
    if width % 256 or heads * width > NUMBERS * WARPS * LANES:
        limit = NUMBERS * WARPS * LANES
        return f"it takes d in multiples of 256 and h * d of at most {limit}, and they are {width} and {heads * width}"
    return why_no_hopper(platform)


def rows_of_a_block(batch: int, time: int, devices: int = 1) -> int:
    """The rows that each block of `norm_gradients` takes, a divisor of time, so that blocks fill each of the devices.

    Where it can be, each device's share of time, if that is what they cut, is a number of blocks.
    """
    fits = [each for each in EACH if time % (each * devices) == 0] or [each for each in EACH if time % each == 0]
    return next((each for each in fits if batch * time >= FULL * devices * each), fits[-1])


def norm_gradients(
    x: Float[Array, "b t h d"],
    dy: Float[Array, "b t h d"],
    beside: Float[Array, "b t h d"],
    scale: Float[Array, "b d"],
    eps: float,
    each: int,
    *,
    gated: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Array, ...]:
    """Gradients of y = norm(x), norm(x) = x / sqrt(mean(x^2) + eps) * scale over d, or of y = swish(beside) norm(x).

    Args:
      x: as `why_unsupported` takes it.
      dy: y's cotangent, of x's dtype, as all that follows but scale.
      beside: another cotangent of x, to be added to that through y; or, if gated, the gate.
      scale: float32, the same for each of the batch.
      each: rows of t for each block, a divisor of t and a multiple of 8.
      gated: which of the two.
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      x's cotangent, the gate's if gated, and scale's, float32, in parts [b, t / each, h, d] that are to be summed.
    """
    batch, time, heads, width = x.shape
    # A tile's rows, a power of two; for one row alone layout inference finds no layout.
    step = max(2, min(each, 1 << (NUMBERS * WARPS * LANES // (heads * width)).bit_length() - 1))
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    parts = jax.ShapeDtypeStruct((batch, time // each, heads, width), jnp.float32)
    kernel: Any = plgpu.kernel(
        functools.partial(_kernel, each=each, step=step, eps=eps, gated=gated),
        out_type=(like, like, parts) if gated else (like, parts),
        grid=(batch, time // each),
        grid_names=("batch", "block"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        kernel_name="rms_norm_gradients",
    )
    return kernel(x, dy, beside, scale)


def _layout(heads: int, width: int) -> Any:
    """Of [rows, heads, width]: neighbouring lanes have neighbouring columns; warps have a head each, or share one."""
    apart = heads % WARPS == 0
    vector = next(n for n in (8, 4, 2) if width % ((1 if apart else WARPS) * LANES * n) == 0)
    tiles = ((1, WARPS, LANES * vector),) if apart else ((1, 1, WARPS * LANES * vector), (LANES * vector,))
    tiling = mgpu.fragmented_array.Tiling((*tiles, (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _kernel(x, dy, beside, scale, *outputs, each, step, eps, gated):
    """One block, a warpgroup: the next tile's loads are under way while a tile is worked on."""
    batch, block = lax.axis_index("batch"), lax.axis_index("block")
    heads, width = x.shape[2:]
    shape, layout = (step, heads, width), _layout(heads, width)
    rows = lambda i: pl.ds(block * each + i * step, step)
    weight = plgpu.load(scale.at[batch], layout=layout.reduce((0, 1)), optimized=False)
    of_rows = lambda sums: lax.broadcast_in_dim(sums, shape, [0, 1])
    of_columns = lambda row: lax.broadcast_in_dim(row, shape, [2])

    def read(i):
        refs = (ref.at[batch, rows(i)] for ref in (x, dy, beside))
        return tuple(plgpu.load(ref, layout=layout, optimized=False) for ref in refs)

    def tile(i, carry):
        total, here = carry
        ahead = read(lax.min(i + 1, jnp.int32(each // step - 1)))
        x_hat, w, other = (y.astype(jnp.float32) for y in here)
        inverse = lax.rsqrt(jnp.sum(x_hat * x_hat, axis=2) * (1 / width) + eps)
        x_hat = x_hat * of_rows(inverse)
        if gated:
            sigmoid = 1 / (1 + jnp.exp(-other))
            dgate = w * x_hat * of_columns(weight) * sigmoid * (1 + other * (1 - sigmoid))
            outputs[1][batch, rows(i)] = dgate.astype(x.dtype)
            w = w * other * sigmoid
        total = total + jnp.sum(w * x_hat, axis=0)
        w = w * of_columns(weight)
        mean = jnp.sum(w * x_hat, axis=2) * (1 / width)
        dx = (w - x_hat * of_rows(mean)) * of_rows(inverse)
        outputs[0][batch, rows(i)] = (dx if gated else dx + other).astype(x.dtype)
        return total, ahead

    zeros = plgpu.layout_cast(jnp.zeros((heads, width), jnp.float32), layout.reduce(0))
    total, _ = lax.fori_loop(jnp.int32(0), jnp.int32(each // step), tile, (zeros, read(jnp.int32(0))))
    _store_wide(outputs[-1].at[batch, block], total)


def _store_wide(ref, total):
    """Stores 32 bytes of a thread at once, which jax 0.12 refuses unless told so; 0.11 cannot be told, and does not."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, total, optimized=False)
    else:
        ref[...] = total
