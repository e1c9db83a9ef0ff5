"""Decoding on one GPU: tokens per second, time at a distance, and the step against its traffic.

    python benchmarks/decode.py --out benchmarks/results/decode-h100.json    # GLA-1.3B, a minute
    python benchmarks/decode.py --tiny                                       # anywhere: a small model, as a trial

Weights are random, bfloat16 but for the gates' float32 arithmetic. `tokens_per_s` is of `generate` as it is called,
from a prompt's state, the call's own overhead with it; `ms_per_token` is the slope between two lengths. The step is
timed layer by layer in a stack of all layers' states, as `CausalLM.step` has them, and as the op alone with its state
donated; both beside the time that reading and writing the states takes at the rate of a plain copy measured here.
"""

import argparse
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax import gated_linear_attention_step
from gla_jax.nn import GLAConfig, GLAForCausalLM, generate, read_prompt
from gla_jax.nn.prompt import PromptState
from gla_jax.records import begin
from gla_jax.step import Stacked, step_in_stack

BARS = {"tokens_per_s at batch 1": 450, "step over read and write at batch 128": 1.5}
DISTANCES = (100, 100_000)


def seconds_in_place(f, x, calls):
    """Seconds a call of x = f(x), whose argument is donated, in a row of calls; the fastest of five rows."""
    x = f(f(x))
    times = []
    for _ in range(5):
        jax.block_until_ready(x)
        start = time.perf_counter()
        for _ in range(calls):
            x = f(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / calls)
    return min(times)


def random_like(tree, seed, size):
    """Normal numbers of a tree's shapes and dtypes, made on the device."""

    @jax.jit
    def make(key):
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            [size * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        )

    return make(jax.random.key(seed))


def random_model(config):
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: GLAForCausalLM(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, random_like(shapes, 0, config.init_std))


def random_state(model, batch):
    cache = jax.eval_shape(lambda: model.init_cache(batch))
    logits = jax.ShapeDtypeStruct((batch, model.config.vocab_size), jnp.float32)
    return PromptState(*random_like((logits, cache), 1, 0.1))


def decode(model, states, new):
    """Of each state the fastest of three calls, taken in turns."""
    batch = states[0].logits.shape[0]
    seconds = {}
    for length in (new // 2, new):
        runs = [functools.partial(generate, model, state, length) for state in states]
        jax.block_until_ready([run() for run in runs])  # compiles
        seconds[length] = [
            min(times) for times in zip(*[[seconds_of(run) for run in runs] for _ in range(3)], strict=True)
        ]
    return [
        {
            "batch": batch,
            "new_tokens": new,
            "tokens_per_s": batch * new / whole,
            "ms_per_token": 1e3 * (whole - half) / (new - new // 2),
        }
        for half, whole in zip(*seconds.values(), strict=True)
    ]


def seconds_of(f):
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def at_distances(model, new, distances):
    read = functools.partial(jax.random.randint, jax.random.key(3), minval=0, maxval=model.config.vocab_size)
    states = [jax.block_until_ready(read_prompt(model, read(shape=(1, distance)))) for distance in distances]
    rows = decode(model, states, new)
    return [{"position": distance, **row} for distance, row in zip(distances, rows, strict=True)]


def steps(config, batch, calls):
    mixer, layers = config.mixers[0], config.num_layers
    heads, key, value = (
        mixer.num_heads,
        *(int(config.hidden_size * expand) // mixer.num_heads for expand in (mixer.expand_k, mixer.expand_v)),
    )
    token = lambda n: jax.ShapeDtypeStruct((batch, heads, n), jnp.bfloat16)
    q, k, v = random_like((token(key), token(key), token(value)), 2, 1.0)
    g = -jnp.abs(random_like(jax.ShapeDtypeStruct(k.shape, jnp.float32), 3, 0.1))
    one = jax.ShapeDtypeStruct((batch, heads, key, value), jnp.float32)
    stack = jax.ShapeDtypeStruct((layers, *one.shape), one.dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def alone(carry):
        _, state = carry
        return gated_linear_attention_step(q, k, v, g, state)

    @functools.partial(jax.jit, donate_argnums=0)
    def stacked(carry):
        def layer(carry, i):
            o, states = carry
            more, state = step_in_stack(q, k, v, g, Stacked(states, i))
            return (o + more, state.states), None

        return jax.lax.scan(layer, carry, jnp.arange(layers))[0]

    scale = jax.jit(lambda x: x * 0.999, donate_argnums=0)
    traffic = 2 * one.size * one.dtype.itemsize
    copy = traffic * layers / seconds_in_place(scale, random_like(stack, 4, 1.0), calls)
    rows = {"batch": batch, "state_bytes_a_layer": traffic // 2, "copy_bytes_per_s": copy}
    for name, f, x, count in (
        ("op", alone, (jnp.zeros_like(v), random_like(one, 4, 1.0)), 1),
        ("in the stack", stacked, (jnp.zeros_like(v), random_like(stack, 4, 1.0)), layers),
    ):
        seconds = seconds_in_place(f, x, calls * layers // count) / count
        rows[name] = {"ms_a_layer": 1e3 * seconds, "over_read_and_write": seconds * copy / traffic}
    return rows


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    bfloat16 = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    config, new, calls = GLAConfig.gla_1_3b().replace(**bfloat16), 256, 5
    batch, distances = 128, DISTANCES
    if options.tiny:
        config, new, calls = (
            GLAConfig.tiny().replace(implementation="xla", num_layers=2, layer_unroll=1, **bfloat16),
            8,
            2,
        )
        batch, distances = 4, (20, 100)
    result = {
        **begin("decode", ["python", "benchmarks/decode.py", *arguments], packages=["flax"]),
        "parameters": sum(x.size for x in jax.tree.leaves(nnx.eval_shape(lambda: nnx.state(random_model(config))))),
        "bars": BARS,
    }

    def report(name, value):
        result[name] = value
        print(name, json.dumps(value), flush=True)

    model = random_model(config)
    report("batch 1", decode(model, [random_state(model, 1)], new)[0])
    report("positions", at_distances(model, new, distances))
    report("many rows", decode(model, [random_state(model, batch)], new // 4)[0])
    del model
    report("step", steps(config, batch, calls))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
