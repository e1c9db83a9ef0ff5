"""What gated_linear_attention and its step accept: a refusal names the argument, what was given and what is allowed."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


class Options(NamedTuple):
    """The keyword arguments of gated_linear_attention that all implementations read."""

    bonus: Any
    scale: float | None
    initial_state: Any
    output_final_state: bool
    segment_ids: Any
    cu_seqlens: Any
    reverse: bool

    def with_scale(self, key_dim: int) -> "Options":
        """These options with the scale as a Python number, its default put in."""
        return self._replace(scale=key_dim**-0.5 if self.scale is None else float(self.scale))


def as_jax(*arguments: Any) -> Any:
    """The arguments with numpy arrays made into JAX arrays, and all else as it is."""
    return tuple(jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arguments)


def state_dtype(dtype) -> jnp.dtype:
    """float64 for float64, float32 for all else."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def check_call(q, k, v, g, options: Options) -> None:
    """Raises a ValueError for arguments that gated_linear_attention cannot take."""
    for name, x, letters in (("q", q, "b, t, h, k"), ("k", k, "b, t, hk, k"), ("v", v, "b, t, hk, v")):
        _check_array(name, x, letters)
    _check_qkv(q, k, v)
    batch, time, heads, key_dim = k.shape
    if q.shape[1] != time or v.shape[1] != time:
        raise ValueError(f"q, k and v must have one length t, got {q.shape[1]}, {time} and {v.shape[1]}")
    kinds = {1: ("hk",), 3: ("b", "t", "hk"), 4: ("b", "t", "hk", "k")}
    _check_gate(g, {n: (", ".join(names), k.shape[:n] if n > 1 else (heads,)) for n, names in kinds.items()}, q.dtype)
    _check_bonus(options.bonus, (heads, key_dim), q.dtype)
    _check_scale(options.scale)

    ids, cu = options.segment_ids, options.cu_seqlens
    if ids is not None and cu is not None:
        raise ValueError("segment_ids and cu_seqlens are two ways to say the same; give one of them")
    if ids is not None:
        _check_integers("segment_ids", ids)
        if ids.shape != (batch, time):
            raise ValueError(f"segment_ids must be [b, t] = {(batch, time)}, got shape {ids.shape}")
    sequences, letter = batch, "b"
    if cu is not None:
        _check_integers("cu_seqlens", cu)
        if cu.ndim != 1 or cu.shape[0] < 2:
            raise ValueError(f"cu_seqlens must be [n + 1] with n >= 1, got shape {cu.shape}")
        if batch != 1:
            raise ValueError(
                f"cu_seqlens needs q, k and v with b = 1 (sequences lie one after another), got b = {batch}"
            )
        if _is_concrete(cu):
            values = np.asarray(cu)
            if values[0] != 0 or (values[1:] < values[:-1]).any() or values[-1] > time:
                raise ValueError(
                    f"cu_seqlens must be non-decreasing from 0 to at most t = {time}, got {_brief(values)}"
                )
        sequences, letter = cu.shape[0] - 1, "n"
    _check_state("initial_state", options.initial_state, letter, (sequences, heads, key_dim, v.shape[3]), q.dtype)


def check_step(q, k, v, g, state, bonus, scale) -> None:
    """Raises a ValueError for arguments that gated_linear_attention_step cannot take."""
    for name, x, letters in (("q", q, "b, h, k"), ("k", k, "b, hk, k"), ("v", v, "b, hk, v")):
        _check_array(name, x, letters)
    _check_qkv(q, k, v)
    batch, heads, key_dim = k.shape
    kinds = {1: ("hk", (heads,)), 2: ("b, hk", k.shape[:2]), 3: ("b, hk, k", k.shape)}
    _check_gate(g, kinds, q.dtype)
    _check_bonus(bonus, (heads, key_dim), q.dtype)
    _check_scale(scale)
    if state is None:
        raise ValueError("state must be [b, hk, k, v], got None; start from zeros")
    _check_state("state", state, "b", (batch, heads, key_dim, v.shape[2]), q.dtype)


def _check_array(name, x, letters: str) -> None:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array [{letters}], got {type(x).__name__}")
    if len(x.shape) != letters.count(",") + 1:
        raise ValueError(f"{name} must be [{letters}], got shape {x.shape}")
    if 0 in x.shape:
        raise ValueError(f"{name} must have no empty axis, got shape {x.shape}")
    if x.dtype not in _DTYPES:
        allowed = ", ".join(d.__name__ for d in _DTYPES)
        raise ValueError(f"{name} must be of {allowed}, got {x.dtype}")


def _check_qkv(q, k, v) -> None:
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have one batch size b, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same heads hk, got {k.shape[-2]} and {v.shape[-2]}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"q's heads must be a multiple of k's and v's, got {q.shape[-2]} and {k.shape[-2]}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same key dimension k, got {q.shape[-1]} and {k.shape[-1]}")


def _check_gate(g, kinds: dict[int, tuple[str, tuple[int, ...]]], dtype) -> None:
    """`kinds` maps each rank that is allowed to its letters and its shape."""
    if g is None:
        return
    allowed = ", ".join(f"[{letters}] = {shape}" for letters, shape in kinds.values())
    if not hasattr(g, "shape") or not hasattr(g, "dtype"):
        raise ValueError(f"g must be None or an array of {allowed}, got {type(g).__name__}")
    _, vector = kinds[max(kinds)]
    if g.shape == (*vector[:-1], 1) and vector[-1] != 1:
        raise ValueError(f"g must be one of {allowed}, got shape {g.shape}; a scalar gate has no last axis: g[..., 0]")
    if len(g.shape) not in kinds or g.shape != kinds[len(g.shape)][1]:
        raise ValueError(f"g must be None or one of {allowed}, got shape {g.shape}")
    if g.dtype not in (dtype, jnp.float32):
        raise ValueError(f"g must be of q's dtype {dtype} or float32, got {g.dtype}")
    if _is_concrete(g) and (most := float(np.max(np.asarray(g)))) > 0:
        raise ValueError(f"g is the logarithm of a decay and must be at most 0, got a maximum of {most:g}")


def _check_state(name, state, letter: str, shape: tuple[int, ...], dtype) -> None:
    if state is None:
        return
    if not hasattr(state, "shape") or state.shape != shape:
        given = f"shape {state.shape}" if hasattr(state, "shape") else type(state).__name__
        raise ValueError(f"{name} must be [{letter}, hk, k, v] = {shape}, got {given}")
    if state.dtype != state_dtype(dtype):
        raise ValueError(f"{name} must be {state_dtype(dtype)}, got {state.dtype}")


def _check_bonus(bonus, shape: tuple[int, int], dtype) -> None:
    if bonus is None:
        return
    if not hasattr(bonus, "shape") or not hasattr(bonus, "dtype") or bonus.shape != shape:
        given = f"shape {bonus.shape}" if hasattr(bonus, "shape") else type(bonus).__name__
        raise ValueError(f"bonus must be None or [hk, k] = {shape}, got {given}")
    if bonus.dtype not in (dtype, jnp.float32):
        raise ValueError(f"bonus must be of q's dtype {dtype} or float32, got {bonus.dtype}")


def _check_scale(scale) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.floating | np.integer):
        raise ValueError(f"scale must be a Python number or None, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def _check_integers(name, x) -> None:
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be an integer array, got {getattr(x, 'dtype', type(x).__name__)}")


def _is_concrete(x) -> bool:
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)


def _brief(values) -> str:
    text = [str(x) for x in values.tolist()]
    return f"[{', '.join(text if len(text) <= 8 else [*text[:4], '...', *text[-3:]])}]"
