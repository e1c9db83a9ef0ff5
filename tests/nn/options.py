"""What the tests of gla_jax.nn share: a small config, the options that change the mathematics, random tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.nn import CausalLM, GLAConfig
from gla_jax.nn.config import ModelConfig

# The op token by token, which compiles soonest; the tests that are about the default one ask for it.
SMALL = GLAConfig(
    vocab_size=37,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    gate_low_rank=4,
    mlp_size=48,
    init_std=0.2,
    norm_eps=1e-5,
    implementation="reference",
)

OPTIONS = {
    "plain": SMALL,
    "grouped": SMALL.replace(num_kv_heads=2),
    "one kv head": SMALL.replace(num_kv_heads=1, conv_size=3, conv_bias=True),
    "conv": SMALL.replace(conv_size=4),
    "one tap": SMALL.replace(conv_size=1),
    "no output gate": SMALL.replace(output_gate=False),
    "first release": SMALL.replace(output_gate_bias=True, output_norm="layer", output_norm_affine=False),
    "layer norm": SMALL.replace(output_norm="layer", tie_embeddings=True),
    "feature map": SMALL.replace(feature_map="elu1", conv_size=2),
    "strong gates": SMALL.replace(gate_normalizer=0.02, gate_clamp=-20.0),
    "wide": SMALL.replace(expand_k=1.25, expand_v=2.0),
    "full remat, unrolled": SMALL.replace(remat="full", layer_unroll=2, conv_size=4),
}


def build(config: ModelConfig, seed: int = 0) -> CausalLM:
    """A model with random numbers in every parameter, made without compiling anything."""
    model = nnx.eval_shape(lambda: CausalLM(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(seed)
    ones, others = ("scale", "norm_scale", "D"), ("bias", "norm_bias", "dt_bias", "A_log", "bonus", "lower_bounds")
    spread = {**dict.fromkeys(ones, (1, 0.3)), **dict.fromkeys(others, (0, 0.3))}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        center, std = spread.get(path[-1], (0, config.init_std))
        param.set_value(jnp.asarray(random.normal(center, std, param.shape), param.dtype))
    return model


def with_small_weights(model: CausalLM) -> CausalLM:
    """The model with the weights of its projections divided by 8, which is exact."""
    graphdef, state = nnx.split(model)
    flat = {
        path: param.replace(param.get_value() / 8)
        if path[-1] == "kernel" and not str(path[-2]).endswith("conv")
        else param
        for path, param in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, nnx.from_flat_state(flat.items()))


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, SMALL.vocab_size)


# Compiling takes most of the time of these tests, and LLVM's optimizing most of that.
quick = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@quick
def _forward(graphdef, params, *arguments):
    return nnx.merge(graphdef, params)(*arguments)


@quick
def _prefill(graphdef, params, *arguments):
    return nnx.merge(graphdef, params).prefill(*arguments)


@quick
def _step(graphdef, params, *arguments):
    return nnx.merge(graphdef, params).step(*arguments)


def forward(model, inputs, segment_ids=None):
    return _forward(*nnx.split(model), inputs, segment_ids)


def prefill(model, inputs, cache, segment_ids=None):
    return _prefill(*nnx.split(model), inputs, cache, segment_ids)


def step(model, token, cache):
    return _step(*nnx.split(model), token, cache)


def lengths_as_ids(lengths, width: int, side: str) -> jax.Array:
    """Segment ids of rows with `lengths` tokens at the given side and padding at the other."""
    position = jnp.arange(width)[None]
    lengths = jnp.asarray(lengths)[:, None]
    return jnp.where(position >= width - lengths if side == "right" else position < lengths, 0, -1)
