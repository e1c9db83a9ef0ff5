"""What the tests of gla_jax.nn share: a small config, the options that change the mathematics, random tokens."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.nn import GLAConfig, GLAForCausalLM

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


def build(config: GLAConfig, seed: int = 0) -> GLAForCausalLM:
    """A model with random numbers in every parameter, made without compiling anything."""
    model = nnx.eval_shape(lambda: GLAForCausalLM(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(seed)
    for path, param in nnx.to_flat_state(nnx.state(model)):
        center, std = {"scale": (1, 0.3), "bias": (0, 0.3)}.get(path[-1], (0, config.init_std))
        param.set_value(jnp.asarray(random.normal(center, std, param.shape), param.dtype))
    return model


def tokens(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), shape, 0, SMALL.vocab_size)


@nnx.jit
def forward(model, inputs, segment_ids=None):
    return model(inputs, segment_ids)


@nnx.jit
def prefill(model, inputs, cache, segment_ids=None):
    return model.prefill(inputs, cache, segment_ids)


@nnx.jit
def step(model, token, cache):
    return model.step(token, cache)


def lengths_as_ids(lengths, width: int, side: str) -> jax.Array:
    """Segment ids of rows with `lengths` tokens at the given side and padding at the other."""
    position = jnp.arange(width)[None]
    lengths = jnp.asarray(lengths)[:, None]
    return jnp.where(position >= width - lengths if side == "right" else position < lengths, 0, -1)
