import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.nn import Block

from .options import SMALL


def test_adds_the_mlp_to_the_mixer_s_sum():
    block = Block(SMALL, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    y = x + block.mixer(block.mixer_norm(x))
    np.testing.assert_allclose(block(x), y + block.mlp(block.mlp_norm(y)), rtol=1e-5, atol=1e-6)


def test_in_parts_is_the_same():
    block = Block(SMALL.replace(conv_size=4, num_kv_heads=2), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 32))
    y, cache = block.prefill(x[:, :5], block.init_cache(2))
    parts = [y]
    for t in range(5, 9):
        y, cache = block.step(x[:, t], cache)
        parts.append(y[:, None])
    np.testing.assert_allclose(jnp.concatenate(parts, 1), block(x), rtol=1e-4, atol=1e-5)


def test_dtypes_reach_every_part():
    config = SMALL.replace(dtype="bfloat16", param_dtype="float16", conv_size=2)
    block = nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(block))} == {jnp.dtype("float16")}
    x = jax.ShapeDtypeStruct((1, 4, 32), jnp.bfloat16)
    assert nnx.eval_shape(lambda block, x: block(x), block, x).dtype == jnp.bfloat16
    step = nnx.eval_shape(lambda block, x: block.step(x[:, 0], block.init_cache(1))[0], block, x)
    assert step.dtype == jnp.bfloat16
