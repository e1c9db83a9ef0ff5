"""gated_linear_attention: checks the arguments, brings every gate kind to one form, and picks an implementation."""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax import checks, exclusive, pallas, segments
from gla_jax.array_types import Array, Bonus, Gate, Ids, Int, Key, Query, State, Value
from gla_jax.chunked import chunked, plan
from gla_jax.mesh import cut_along, devices_of, mixes_axes, runs_on_one_device, shard_by_arguments, vary_alike
from gla_jax.reference import recurrence

Implementation = Literal["mosaic_gpu", "xla", "reference"]


def gated_linear_attention(
    q: Query,
    k: Key,
    v: Value,
    g: Gate | None = None,
    *,
    bonus: Bonus | None = None,
    scale: float | None = None,
    initial_state: State | None = None,
    output_final_state: bool = False,
    segment_ids: Ids | None = None,
    cu_seqlens: Int[Array | np.ndarray, "n1"] | None = None,
    reverse: bool = False,
    implementation: Implementation | Sequence[Implementation] | None = None,
) -> tuple[Array, Array | None]:
    """Gated linear attention: a linear recurrence whose matrix state decays by a gate of the input.

        S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    or, with a bonus u, o_t = scale * q_t (S_{t-1} + Diag(u) k_t^T v_t): the state is read before the token is written,
    and the token reads itself through u alone (RWKV-6, arXiv 2404.05892, section 4.2).

    (arXiv 2312.06635, equation 3.) Every gate is exact, in the output and in every gradient: logarithms of decays are
    only ever added, so that no strength of gate over- or underflows, and g = -inf is a hard reset. Reverse-mode
    derivatives of any order work; forward mode (`jax.jvp`, and `jax.hessian`, in whose place there is
    jax.jacrev(jax.grad(f))) works for "reference", and raises a TypeError for the others.

    Args:
      q: [b, t, h, k] queries; float32, bfloat16, float16, or float64 for "reference". h is a multiple of hk, and query
        head i reads key/value head i // (h / hk).
      k: [b, t, hk, k] keys, of q's dtype.
      v: [b, t, hk, v] values, of q's dtype.
      g: natural logarithm of the decay, at most 0, of q's dtype or float32. Its shape says its kind: None (no decay),
        [hk] (a constant a head), [b, t, hk] (a scalar a token), [b, t, hk, k] (a vector a token).
      bonus: u [hk, k], of q's dtype or float32; None for the first form.
      scale: factor of the output; k**-0.5 if None.
      initial_state: [b, hk, k, v], or [n, hk, k, v] with cu_seqlens; float32 (float64 for float64). Zeros if None.
      output_final_state: whether to return the state after the last token.
      segment_ids: [b, t] int. The state starts from zero wherever the id changes; initial_state enters the first
        segment of a row and the last one's state leaves it. A token with a negative id is padding: its output is 0, it
        leaves state and gradients alone, and it ends no segment.
      cu_seqlens: [n + 1] int, non-decreasing from 0 to at most t: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1]
        of the only batch row (b = 1). Each has its own initial and final state. Rows past the last give 0.
      reverse: run from the last token to the first, in each sequence: initial_state enters at the right end and the
        final state leaves at the left.
      implementation: "mosaic_gpu" (kernels for Hopper GPUs, forward and backward), "xla"
        (chunkwise, every backend) or "reference" (token by token); a sequence of names takes the first that supports
        the call, None the best. `which_implementation` says which that is.

    Returns:
      o [b, t, h, v] of v's dtype, and the final state [b or n, hk, k, v] (float32, or float64 for float64) or None.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value, or the named implementation does not support the call.
    """
    q, k, v, g, bonus, initial_state = checks.as_jax(q, k, v, g, bonus, initial_state)
    segment_ids, cu_seqlens = checks.as_jax(segment_ids, cu_seqlens)
    options = checks.Options(bonus, scale, initial_state, output_final_state, segment_ids, cu_seqlens, reverse)
    checks.check_call(q, k, v, g, options)
    name = choose(implementation, q, k, v, g, options)
    return shard_by_arguments(_run, name, options.with_scale(q.shape[-1]), q, k, v, g)


class Choice(NamedTuple):
    """What `which_implementation` answers.

    name: the implementation that a call takes with implementation=None.
    refused: why each implementation that would be preferred, or that is left, does not support the call.
    """

    name: str
    refused: dict[str, str]


def which_implementation(
    q: Query | jax.ShapeDtypeStruct,
    k: Key | jax.ShapeDtypeStruct,
    v: Value | jax.ShapeDtypeStruct,
    g: Gate | jax.ShapeDtypeStruct | None = None,
    *,
    bonus: Bonus | jax.ShapeDtypeStruct | None = None,
    scale: float | None = None,
    initial_state: State | jax.ShapeDtypeStruct | None = None,
    output_final_state: bool = False,
    segment_ids: Ids | jax.ShapeDtypeStruct | None = None,
    cu_seqlens: Int[Array | np.ndarray, "n1"] | jax.ShapeDtypeStruct | None = None,
    reverse: bool = False,
) -> Choice:
    """Says which implementation `gated_linear_attention` takes for these arguments, and why not the others.

    The arguments are those of `gated_linear_attention`, with `jax.ShapeDtypeStruct`s in place of arrays if need be;
    nothing is computed.

    Raises:
      ValueError: as the op itself.
    """
    q, k, v, g, bonus, initial_state = checks.as_jax(q, k, v, g, bonus, initial_state)
    segment_ids, cu_seqlens = checks.as_jax(segment_ids, cu_seqlens)
    options = checks.Options(bonus, scale, initial_state, output_final_state, segment_ids, cu_seqlens, reverse)
    checks.check_call(q, k, v, g, options)
    reasons = {name: why(q, k, v, g, options) for name, (why, _) in _IMPLEMENTATIONS.items()}
    refused = {name: reason for name, reason in reasons.items() if reason is not None}
    return Choice(next(name for name in reasons if name not in refused), refused)


def choose(wanted, q, k, v, g, options: checks.Options) -> str:
    """The name of the implementation that a call takes; a ValueError if none of those wanted supports it."""
    if wanted is None:
        wanted = tuple(_IMPLEMENTATIONS)
    names = (wanted,) if isinstance(wanted, str) or not isinstance(wanted, Sequence) else tuple(wanted)
    unknown = [name for name in names if not isinstance(name, str) or name not in _IMPLEMENTATIONS]
    if unknown or not names:
        allowed = ", ".join(map(repr, _IMPLEMENTATIONS))
        raise ValueError(f"implementation must be None, of {allowed}, or a sequence of these, got {wanted!r}")
    refusals = []
    for name in names:
        why, _ = _IMPLEMENTATIONS[name]
        reason = why(q, k, v, g, options)
        if reason is None:
            return name
        refusals.append(f"{name!r}: {reason}")
    raise ValueError("implementation: none of those named supports this call; " + "; ".join(refusals))


def _run(name, options, q, k, v, g):
    """The call with gates, segments and direction brought to the form that implementations read."""
    bonus, scale, state, output_final_state, ids, cu, reverse = options
    cu = None if cu is None else cu.astype(jnp.int32)
    if g is not None and g.ndim == 1:
        g = jnp.broadcast_to(g, k.shape[:3])
    if reverse:
        q, k, v, g, ids = jax.tree.map(lambda x: jnp.flip(x, 1), (q, k, v, g, ids))
        if cu is not None:
            cu, state = q.shape[1] - jnp.flip(cu), None if state is None else jnp.flip(state, 0)

    stateful = state is not None or output_final_state
    if cu is not None and not stateful:
        cu, ids = None, segments.sequence_ids(cu, q.shape[1])
    who = exclusive.reads(k.shape[:2], ids, cu)
    _, run = _IMPLEMENTATIONS[name]
    if ids is not None and name == "mosaic_gpu":
        q, k, v, g = segments.mask_padding(q, k, v, g, ids)
        run = functools.partial(run, starts=segments.segment_starts(ids))
    elif ids is not None:
        q, k, v, g = segments.reset_and_mask(q, k, v, g, ids)
    if state is None and (name != "mosaic_gpu" or bonus is not None):
        sequences = q.shape[0] if cu is None else cu.shape[0] - 1
        state = jnp.zeros((sequences, *k.shape[2:], v.shape[-1]), checks.state_dtype(q.dtype))
    q, k, v, g, bonus, state = vary_alike((q, k, v, g, bonus, state))
    if bonus is None:
        o, state = run(q, k, v, g, state, scale, cu, output_final_state)
    else:
        entering = state
        o, state = run(exclusive.early(q, who), k, v, g, state, scale, cu, output_final_state)
        o = exclusive.finish(o, who, q, k, v, bonus, entering, scale, cu)
    if reverse:
        o = jnp.flip(o, 1)
        state = state if cu is None else jnp.flip(state, 0)
    return o, state if output_final_state else None


def _why_not_mosaic_gpu(q, k, v, g, options) -> str | None:
    if mixes_axes(q):
        return "on a mesh with Auto axes beside others it cannot be cut: make all axes Auto, or all Explicit"
    stateful = options.initial_state is not None or options.output_final_state
    return pallas.why_unsupported(q, k, v, g, own_states=options.cu_seqlens is not None and stateful)


def _mosaic_gpu(q, k, v, g, state, scale, cu, output_final_state, starts=None):
    return _kernel_forward(scale, output_final_state, q, k, v, g, state, starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _kernel_forward(scale, output_final_state, q, k, v, g, state, starts):
    o, state, _ = _forward_kernels(q, k, v, g, scale, state, starts, output_final_state, False)
    # A kernel's results vary over no axis of a shard_map, whatever its arguments do.
    return vary_alike(((o, state), q))[0]


def _kernel_forward_fwd(scale, output_final_state, *arguments):
    q, k, v, g, state, starts = arguments
    # On Auto axes a device may have as little as this share of batch and heads.
    save = pallas.saves_states(q, k, v, g, devices_of(q))
    found = _forward_kernels(q, k, v, g, scale, state, starts, output_final_state, save)
    o, state, saved = vary_alike((found, q))[0]
    return (o, state), (arguments, saved)


def _kernel_forward_bwd(scale, output_final_state, kept, cotangents):
    (q, k, v, g, state, starts), saved = kept
    return *vary_alike((_backward_kernels(q, k, v, g, scale, state, starts, *cotangents, saved), q))[0], None


# Compiled once for all calls of the same shapes, jitted or not.
@functools.partial(jax.jit, static_argnums=(4, 7, 8))
def _forward_kernels(q, k, v, g, scale, state, starts, output_final_state, output_states):
    """o, the final state or None, and what the backward reads of all states, or None."""
    names = ["o", *(["state"] if output_final_state else []), *(["states", "mild"] if output_states else [])]

    def run(q, k, v, g, state, starts):
        call = pallas.forward_and_states if output_states else pallas.forward
        return tuple(jax.tree.leaves(call(q, k, v, g, scale, state, output_final_state, starts=starts)))

    found = _on_each_device(run, {"q": q, "k": k, "v": v, "g": g, "state": state, "starts": starts}, names)
    found = dict(zip(names, found, strict=True))
    states = pallas.States(found["states"], found["mild"]) if output_states else None
    return found["o"], found.get("state"), states


@functools.partial(jax.jit, static_argnums=4)
def _backward_kernels(q, k, v, g, scale, state, starts, do, dfinal, saved):
    arguments = {"q": q, "k": k, "v": v, "g": g, "state": state}
    names = [name for name, x in arguments.items() if x is not None]
    states, mild = (None, None) if saved is None else saved

    def run(q, k, v, g, state, starts, do, dfinal, states, mild):
        saved = None if states is None else pallas.States(states, mild)
        found = pallas.backward(q, k, v, g, scale, state, do, dfinal, starts=starts, saved=saved)
        return tuple(x for x in found if x is not None)

    more = {"starts": starts, "o": do, "dfinal": dfinal, "states": states, "mild": mild}
    found = _on_each_device(run, arguments | more, names)
    given = dict(zip(names, found, strict=True))
    return tuple(given.get(name) for name in arguments)


def _on_each_device(run, arguments, outputs):
    """run(*arguments), by the partitioner's cuts on Auto axes of several devices, which cannot see into a kernel."""
    q, k, g = arguments["q"], arguments["k"], arguments["g"]
    if runs_on_one_device(q):
        return run(*arguments.values())
    dimensions = {"q": "btpk", "k": "bthk", "v": "bthv", "o": "btpv", "state": "bhkv", "dfinal": "bhkv"}
    dimensions["starts"] = "bt"
    # n chunks, and tiles of k and v.
    dimensions |= {"states": "bhnij", "mild": "bhnl"}
    dimensions["g"] = "bth" if g is not None and g.ndim == 3 else "bthk"
    arrays = {name: x for name, x in arguments.items() if x is not None}
    some = lambda *given: run(*{**arguments, **dict(zip(arrays, given, strict=True))}.values())
    inputs, outputs = ([dimensions[name] for name in names] for names in (arrays, outputs))
    group = q.shape[2] // k.shape[2]
    return cut_along(some, list(arrays.values()), inputs, outputs, "bh", {"p": ("h", group)})


_kernel_forward.defvjp(_kernel_forward_fwd, _kernel_forward_bwd)


def _why_not_xla(q, k, v, g, options) -> str | None:
    if q.dtype == jnp.float64:
        return "it computes in float32 at most, and q is float64"
    return None


def _xla(q, k, v, g, state, scale, cu, output_final_state):
    time, heads = k.shape[1:3]
    if cu is None:
        return chunked(q, k, v, g, state, scale, plan(q.shape[0], time, heads))
    chunk = plan(1, time, heads).chunk
    layout = segments.align(cu, time, chunk, state)
    q, k, v, g = jax.tree.map(layout.spread, (q, k, v, g))
    start = jnp.zeros_like(state, shape=(1, *state.shape[1:]))
    o, state = chunked(q, k, v, g, start, scale, plan(1, q.shape[1], heads, chunk), layout.entries)
    return layout.collect(o), state


def _why_not_reference(q, k, v, g, options) -> str | None:
    return None


def _reference(q, k, v, g, state, scale, cu, output_final_state):
    if cu is None:
        return recurrence(q, k, v, g, state, scale)
    inside = segments.sequence_ids(cu, q.shape[1]) >= 0
    q, k, v = (jnp.where(inside[..., None, None], x, 0) for x in (q, k, v))
    start = jnp.zeros_like(state, shape=(1, *state.shape[1:]))
    return recurrence(q, k, v, g, start, scale, segments.token_entries(cu, q.shape[1], state))


# In order of preference: why it does not support a call, and the call itself.
_IMPLEMENTATIONS = {
    "mosaic_gpu": (_why_not_mosaic_gpu, _mosaic_gpu),
    "xla": (_why_not_xla, _xla),
    "reference": (_why_not_reference, _reference),
}
