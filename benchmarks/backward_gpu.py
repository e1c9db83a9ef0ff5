"""Checks and times the Mosaic GPU backward on one Hopper GPU. Each line is printed as it is known.

    python -m benchmarks.backward_gpu                  # values, the same bits, then times: about two minutes
    python -m benchmarks.backward_gpu check times

Values: RMS(error) / RMS(reference) of every gradient against autodiff of the recurrence in float64. Milliseconds are
medians of 5 repeats of 20 calls, of forward and backward, with and without the compiler's barriers in the backward.
"""

import argparse
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.op_gpu import inputs, milliseconds
from gla_jax.pallas import forward
from gla_jax.pallas.backward import Gradients, backward
from gla_jax.pallas.backward_config import choose_backward
from gla_jax.reference import recurrence

# (b, t, h, k, v) and the milliseconds to reach, forward and backward (issue 4).
BARS = {
    (8, 2048, 16, 128, 128): 0.58,
    (8, 2048, 4, 128, 256): 0.26,
    (2, 8192, 16, 64, 128): 0.45,
    (8, 2048, 4, 256, 512): 0.60,
}
CHECKED = [(2, 300, 2, 128, 128), (2, 300, 2, 64, 128), (1, 130, 2, 256, 256)]
KINDS = ("mild", "logsigmoid", "resets", "tenth", "all strong")


def cotangents(shape):
    b, t, h, k, v = shape
    first, second, third = jax.random.split(jax.random.key(1), 3)
    do = jax.random.normal(first, (b, t, h, v), jnp.bfloat16)
    return do, *(jax.random.normal(key, (b, h, k, v)) for key in (second, third))


def gradients(config, q, k, v, g, state, do, dfinal=None):
    return backward(q, k, v, g, 1.0, state, do, dfinal, config=config)


def outputs(q, k, v, g):
    return forward(q, k, v, g, 1.0)[0]


def without_barriers(shape):
    return dataclasses.replace(choose_backward(shape[3], jnp.dtype(jnp.bfloat16)), auto_barriers=False)


def check():
    for shape in CHECKED:
        for kind in KINDS:
            q, k, v, g = inputs(shape, kind)
            do, state, dfinal = cotangents(shape)
            with jax.enable_x64(True):
                wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, g, state)]
                _, pull = jax.vjp(lambda q, k, v, g, state: recurrence(q, k, v, g, state, 1.0), *wide)
                want = pull(tuple(jnp.asarray(np.asarray(x, np.float64)) for x in (do, dfinal)))
            for config in (choose_backward(shape[3], q.dtype), without_barriers(shape)):
                run = jax.jit(functools.partial(gradients, config))
                got = jax.device_get(run(q, k, v, g, state, do, dfinal))
                errors = []
                for x, y in zip(got, want, strict=True):
                    y = np.nan_to_num(np.asarray(y))
                    errors.append(np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2) / np.mean(y**2)))
                named = " ".join(f"{name} {error:.1e}" for name, error in zip(Gradients._fields, errors, strict=True))
                print(f"{shape} {kind}, compiler's barriers {config.auto_barriers}: {named}", flush=True)


def bits():
    shape = (2, 1000, 60, 128, 128)
    for kind in ("mild", "tenth"):
        q, k, v, g = inputs(shape, kind)
        do, state, dfinal = cotangents(shape)
        for config in (choose_backward(128, q.dtype), without_barriers(shape)):
            run = jax.jit(functools.partial(gradients, config))
            first = run(q, k, v, g, state, do, dfinal)
            same = jax.jit(lambda a, b: jnp.all(jnp.array([jnp.array_equal(x, y) for x, y in zip(a, b, strict=True)])))
            differ = sum(not bool(same(first, run(q, k, v, g, state, do, dfinal))) for _ in range(100))
            print(f"{kind}, compiler's barriers {config.auto_barriers}: {differ} of 100 runs differ", flush=True)


def times():
    for shape, bar in BARS.items():
        for kind in KINDS if shape == next(iter(BARS)) else KINDS[:1]:
            arguments, (do, *_) = inputs(shape, kind), cotangents(shape)
            for config in (choose_backward(shape[3], do.dtype), without_barriers(shape)):
                run = functools.partial(gradients, config)
                alone = milliseconds(run, *arguments, None, do, calls=20, repeats=5)
                both = lambda *x, run=run: (outputs(*x[:4]), run(*x))
                ms = milliseconds(both, *arguments, None, do, calls=20, repeats=5) if shape[3] <= 128 else float("nan")
                ours = f"backward {alone:.3f} ms, with the forward {ms:.3f} (to reach {bar})"
                print(f"{shape} {kind}, compiler's barriers {config.auto_barriers}: {ours}", flush=True)


GROUPS = {"check": check, "bits": bits, "times": times}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), choices=[*GROUPS, []])
    for name in parser.parse_args().groups:
        start = time.perf_counter()
        GROUPS[name]()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
