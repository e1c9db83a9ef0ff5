"""What the tests of the op share: random arguments, the op with its gradients, how far it may be from the oracle.

Compiling takes most of the time of these tests, and LLVM's optimizing most of that: `apply` leaves it out unless asked.
"""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gla_jax import gated_linear_attention

from .oracle import Result, oracle


class Arguments(NamedTuple):
    """The arrays of a call, and cotangents of its two results."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: Any  # or None, as the states
    initial_state: Any
    do: jax.Array
    dstate: Any
    bonus: Any = None


class Tolerance(NamedTuple):
    """Bounds on RMS(error) / RMS(oracle); with `vanishing`, on max|error of dg| / max|q * dq| in place of `gate`."""

    forward: float
    gradient: float
    gate: float
    vanishing: float | None = None


# For gates weaker than logsigmoid(randn), for those, and where strong ones are among them.
WEAK = {
    "float32": Tolerance(2e-6, 1e-5, 5e-5),
    "float16": Tolerance(1e-3, 2e-3, 2e-3),
    "bfloat16": Tolerance(5e-3, 8e-3, 8e-3),
}
MILD = {**WEAK, "bfloat16": Tolerance(5e-3, 8e-3, 1.5e-2)}
STRONG = {
    "float32": Tolerance(1e-4, 1e-4, 1e-4),
    "float16": Tolerance(4e-3, 5e-3, 5e-3),
    "bfloat16": Tolerance(5e-3, 8e-3, 8e-3),
}
# The worst measured, by dtype, kind of gates and quantity; conftest.py prints it with `pytest -v`.
MEASURED: dict[tuple[str, str, str], float] = collections.defaultdict(float)


def logsigmoid(x):
    return -np.logaddexp(0.0, -x)


def arguments(
    seed,
    b,
    t,
    h,
    k,
    v,
    *,
    hk=None,
    gate="vector",
    normalizer=1.0,
    g=None,
    dtype="float32",
    gate_dtype="float32",
    states=None,
    cotangents=1.0,
    size=1.0,
    bonus=False,
) -> Arguments:
    """Everything randn, k and v times `size`, cotangents times `cotangents`; gates logsigmoid(randn) / normalizer or g.

    gate: "none", "head" (a decay like RetNet's), "scalar" or "vector". states: how many; b if None, 0 for no states.
    """
    rng, hk = np.random.default_rng(seed), hk or h
    shapes = {"scalar": (b, t, hk), "vector": (b, t, hk, k)}
    if g is None and gate in shapes:
        g = logsigmoid(rng.standard_normal(shapes[gate])) / normalizer
    elif g is None and gate == "head":
        g = np.log1p(-(2.0 ** (-5 - np.arange(hk))))
    states = b if states is None else states

    def normal(*shape, scale=1.0, dtype=dtype):
        return jnp.asarray(scale * rng.standard_normal(shape), dtype)

    with np.errstate(over="ignore"):  # -1e37 is -inf in float16
        g = None if g is None else jnp.asarray(g, gate_dtype)
    return Arguments(
        q=normal(b, t, h, k),
        k=normal(b, t, hk, k, scale=size),
        v=normal(b, t, hk, v, scale=size),
        g=g,
        initial_state=normal(states, hk, k, v, scale=size**2, dtype="float32") if states else None,
        do=normal(b, t, h, v, scale=cotangents),
        dstate=normal(states, hk, k, v, scale=cotangents, dtype="float32") if states else None,
        bonus=normal(hk, k, dtype="float32") if bonus else None,
    )


def _apply(x: Arguments, segment_ids, cu_seqlens, *, scale, reverse, implementation):
    def call(q, k, v, g, initial_state, bonus):
        o, state = gated_linear_attention(
            q,
            k,
            v,
            g,
            bonus=bonus,
            scale=scale,
            initial_state=initial_state,
            output_final_state=x.dstate is not None,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
            reverse=reverse,
            implementation=implementation,
        )
        return o, state

    (o, state), pull = jax.vjp(call, x.q, x.k, x.v, x.g, x.initial_state, x.bonus)
    return o, state, *pull((x.do, x.dstate))


_STATIC = ("scale", "reverse", "implementation")
_OPTIMIZED = jax.jit(_apply, static_argnames=_STATIC)
_QUICK = jax.jit(_apply, static_argnames=_STATIC, compiler_options={"xla_backend_optimization_level": 0})


def apply(
    x: Arguments, *, segment_ids=None, cu_seqlens=None, scale=None, reverse=False, implementation="xla", optimized=False
) -> Result:
    """The op and its gradients for these arguments, compiled once a shape."""
    ids, cu = (None if a is None else jnp.asarray(a, jnp.int32) for a in (segment_ids, cu_seqlens))
    run = _OPTIMIZED if optimized else _QUICK
    return Result(*run(x, ids, cu, scale=scale, reverse=reverse, implementation=implementation))


def expected(x: Arguments, *, segment_ids=None, cu_seqlens=None, scale=None, reverse=False) -> Result:
    """The oracle for these arguments."""
    given = x._asdict()
    if x.dstate is None:
        sequences = x.q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        given["dstate"] = np.zeros((sequences, *x.k.shape[2:], x.v.shape[-1]))
    return oracle(**given, segment_ids=segment_ids, cu_seqlens=cu_seqlens, scale=scale, reverse=reverse)


def check(
    x: Arguments, tolerance: dict[str, Tolerance], *, label: str = "", implementation="xla", optimized=False, **options
) -> Result:
    """The op's results, after all of them have been held to the oracle's."""
    got = apply(x, implementation=implementation, optimized=optimized, **options)
    compare(x, got, expected(x, **options), tolerance, label=label)
    return got


def compare(x: Arguments, got: Result, want: Result, tolerance: dict[str, Tolerance], *, label: str = "") -> None:
    dtype = str(x.q.dtype)
    bounds = tolerance[dtype]
    kind = "weak" if tolerance is WEAK else "mild" if tolerance is MILD else "strong"
    failures = []
    for name, actual, reference in zip(Result._fields, got, want, strict=True):
        if actual is None:
            continue
        bound = {"o": bounds.forward, "state": bounds.forward, "g": bounds.gate}.get(name, bounds.gradient)
        given = {"o": x.v, "state": None, "initial_state": None}.get(name, getattr(x, name, None))
        assert actual.dtype == (jnp.float32 if given is None else given.dtype), name
        assert actual.shape == reference.shape, name
        error = np.asarray(actual, np.float64) - reference
        if name == "g" and bounds.vanishing is not None:
            ratio, bound = np.abs(error).max() / np.abs(np.asarray(x.q, np.float64) * want.q).max(), bounds.vanishing
        else:
            # No float16 is nearer to a number below its normal range than half of its smallest step.
            step = 2.0**-25 if actual.dtype == jnp.float16 else 0.0
            ratio = max(rms(error) - step, 0) / rms(reference) if rms(reference) else np.abs(error).max()
        quantity = {"o": "o", "state": "state"}.get(name, f"d{name}")
        MEASURED[dtype, kind, quantity] = max(MEASURED[dtype, kind, quantity], ratio)
        if not ratio <= bound:
            failures.append(f"{quantity}: {ratio:.2e} > {bound:.1e}")
    assert not failures, f"{label} {dtype}: " + ", ".join(failures)
    if x.g is not None:
        hard = np.isneginf(np.asarray(x.g, np.float64))
        assert not np.asarray(got.g, np.float64)[hard].any(), f"{label}: dg must be 0 where g is -inf"


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def relative(x, reference) -> float:
    """RMS(x - reference) / RMS(reference)."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    assert x.shape == reference.shape
    return rms(x - reference) / rms(reference) if reference.any() else np.abs(x).max()
