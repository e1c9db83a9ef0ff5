"""Arguments of every gate strength, the recurrence in float64, and an H100 to lower for without one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh

GATES = ("mild", "strong", "mixed", "resets", "one channel", "late")
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def gates(rng, kind, shape):
    mild = -np.logaddexp(0.0, -rng.standard_normal(shape)) / 16
    if kind == "strong":
        return mild * 48
    if kind == "mixed":
        values = [-1e-4, -5.0, -50.0, -1e4, -1e37, -np.inf, -0.1]
        return rng.choice(values, shape, p=[0.5, 0.1, 0.02, 0.01, 0.01, 0.01, 0.35])
    if kind == "resets":
        return np.where(rng.random((*shape[:3], *[1] * (len(shape) - 3))) < 0.03, -np.inf, mild)
    if kind == "one channel":
        mild[..., 5::7, -1] = -1e4
    if kind == "late":
        mild[:, shape[1] // 2 :] *= 100
    return mild


def arguments(kind, b, t, h, k, v, *, hk=None, dtype="bfloat16", gate_dtype=None, seed=0):
    """q, k, v, g and an initial state."""
    rng, hk = np.random.default_rng(seed), hk or h
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    q, key, value = normal(b, t, h, k), normal(b, t, hk, k), normal(b, t, hk, v)
    g = jnp.asarray(gates(rng, kind, (b, t, hk, k)).astype("float32")).astype(gate_dtype or dtype)
    return q, key, value, g, jnp.asarray(rng.standard_normal((b, hk, k, v)), "float32")


def recurrence(q, k, v, g, scale, state):
    """o and the final state in float64, token by token."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    decay = np.ones(k.shape[:3]) if g is None else np.exp(np.asarray(g, np.float64))
    decay = np.broadcast_to(decay.reshape(*decay.shape, *[1] * (4 - decay.ndim)), k.shape)
    o, final = np.zeros((*q.shape[:3], v.shape[3])), np.array(state, np.float64)
    group = q.shape[2] // k.shape[2]
    # Head by head, so that a state stays in the processor's cache.
    for b, j in np.ndindex(*final.shape[:2]):
        state, heads = final[b, j], slice(j * group, (j + 1) * group)
        for i in range(q.shape[1]):
            state *= decay[b, i, j, :, None]
            state += np.outer(k[b, i, j], v[b, i, j])
            o[b, i, heads] = scale * q[b, i, heads] @ state
    return o, final


def relative(x, reference):
    """RMS(x - reference) / RMS(reference)."""
    error = np.asarray(x, np.float64) - reference
    return np.sqrt(np.mean(error**2) / np.mean(reference**2))


def lower_for_h100(f, *args):
    """Lowers a function of arrays or ShapeDtypeStructs for an H100 that need not be there."""
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))


def recurrence_gradients(q, k, v, g, scale, state, do, dfinal):
    """Cotangents of q, k, v, g and the initial state in float64, token by token."""
    q, k, v, g, state, do, ds = (np.asarray(x, np.float64) for x in (q, k, v, g, state, do, dfinal))
    decay, group = np.exp(g), q.shape[2] // k.shape[2]
    states = [state]
    for i in range(q.shape[1]):
        states.append(decay[:, i, :, :, None] * states[-1] + k[:, i, :, :, None] * v[:, i, :, None, :])
    dq, dk, dv, dg = (np.zeros_like(x) for x in (q, k, v, g))
    for i in reversed(range(q.shape[1])):
        dq[:, i] = scale * np.einsum("bhv,bhkv->bhk", do[:, i], np.repeat(states[i + 1], group, 1))
        reads = scale * np.einsum("bhk,bhv->bhkv", q[:, i], do[:, i])
        ds = ds + reads.reshape(*k.shape[:1], k.shape[2], group, *reads.shape[2:]).sum(2)
        dk[:, i], dv[:, i] = np.einsum("bhkv,bhv->bhk", ds, v[:, i]), np.einsum("bhkv,bhk->bhv", ds, k[:, i])
        dg[:, i] = decay[:, i] * (states[i] * ds).sum(-1)
        ds = decay[:, i, :, :, None] * ds
    return dq, dk, dv, dg, ds


def interpreted(f, *args, **kwargs):
    """Runs f in the interpreter, with its race detector, which must find nothing."""
    out = jax.block_until_ready(f(*args, **kwargs, interpret=plgpu.InterpretGPUParams(detect_races=True)))
    assert not get_races().races_found
    return out


@jax.jit
def same_bits(first, second):
    """Whether two results agree in every bit. Compared where they lie: fetching them takes longer than the kernels."""
    bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32 if x.dtype == jnp.float32 else jnp.uint16)
    return jnp.all(jnp.array([jnp.all(bits(x) == bits(y)) for x, y in zip(first, second, strict=True)]))
