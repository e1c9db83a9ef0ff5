"""One token of the recurrence on Hopper, in place in a stack of layers' states: each number is read and written once.

A block of one warpgroup has some columns of one head's state, and walks down its rows: a thread's columns stay its own,
so that o needs no sum over threads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from gla_jax.array_types import Array, Float
from gla_jax.pallas.forward import why_no_hopper

THREADS = 128
# Rows whose loads are under way at once, and blocks that keep the GPU's 132 multiprocessors busy.
ROWS, FULL = 8, 264


def why_unsupported(q: Any, states: Any, *, platform: str | None = None) -> str | None:
    """Says why `step` does not take q [b, h, k] and states [n, b, hk, k, v], or None if it does."""
    rows, columns = states.shape[-2:]
    if states.dtype != jnp.float32:
        return f"it takes float32 states, and they are {states.dtype}"
    if rows % ROWS or columns % THREADS:
        return f"it takes k in multiples of {ROWS} and v of {THREADS}, and they are {rows} and {columns}"
    if q.shape[0] * states.shape[2] * (columns // THREADS) < FULL:
        return f"it takes b * hk * v / {THREADS} of at least {FULL}: fewer are too few blocks"
    return why_no_hopper(platform)


def step(
    q: Float[Array, "b h k"],
    k: Float[Array, "b hk k"],
    v: Float[Array, "b hk v"],
    decay: Float[Array, "b hk k"],
    states: Float[Array, "n b hk k v"],
    layer: Array,
    *,
    early: bool = False,
    interpret: plgpu.InterpretGPUParams | None = None,
) -> tuple[Float[Array, "b h v"], Float[Array, "n b hk k v"]]:
    """S' = Diag(decay) S + k^T v with S = states[layer], and o = q S', or q S if early; all arrays float32.

    Args:
      q, k, v, decay: of one token, decay in 0 to 1.
      states: [n, b, hk, k, v]; k a multiple of 8, v of 128. Their buffer becomes the result's.
      layer: int32, in 0 <= layer < n.
      early: whether o is of the state before the token.
      interpret: runs the kernel in Pallas' interpreter.

    Returns:
      o [b, h, v], and states with states[layer] = S'.
    """
    layers, batch, heads, rows, columns = states.shape
    flat, group = batch * heads, q.shape[1] // heads
    # The widest loads that leave enough blocks.
    width = next((w for w in (512, 256) if columns % w == 0 and flat * (columns // w) >= FULL), THREADS)
    kernel: Any = pl.kernel(
        functools.partial(_kernel, width=width, early=early),
        out_type=jax.ShapeDtypeStruct((flat, group, columns), jnp.float32),
        mesh=plgpu.Mesh(grid=(flat, columns // width), grid_names=("head", "part")),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
        name="gla_step",
    )
    stack = jax.new_ref(states.reshape(layers, flat, rows, columns))
    o = kernel(
        jnp.reshape(layer, (1,)).astype(jnp.int32),
        q.reshape(flat, group, rows),
        k.reshape(flat, rows),
        v.reshape(flat, columns),
        decay.reshape(flat, rows),
        stack,
    )
    return o.reshape(*q.shape[:2], columns), jax.freeze(stack).reshape(states.shape)


def _kernel(layer, q, k, v, decay, states, o, *, width, early):
    layer, head, part = layer[0], lax.axis_index("head"), lax.axis_index("part")
    columns = pl.ds(part * width, width)
    value = v[head, columns]
    group = q.shape[1]

    def some_rows(i, sums):
        numbers = [i * ROWS + j for j in range(ROWS)]
        old = [states[layer, head, row, columns] for row in numbers]
        fresh = [decay[head, row] * x + k[head, row] * value for row, x in zip(numbers, old, strict=True)]
        for row, x in zip(numbers, fresh, strict=True):
            states[layer, head, row, columns] = x
        for row, x in zip(numbers, old if early else fresh, strict=True):
            sums = tuple(total + q[head, r, row] * x for r, total in enumerate(sums))
        return sums

    zeros = tuple(jnp.zeros_like(value) for _ in range(group))
    for r, total in enumerate(lax.fori_loop(0, k.shape[1] // ROWS, some_rows, zeros)):
        o[head, r, columns] = total
