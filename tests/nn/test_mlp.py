import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.nn import SwiGLU
from gla_jax.nn.mlp import mlp_width


def test_is_its_equation():
    mlp = SwiGLU(8, 12, init_std=0.5, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    gate, up, down = (np.asarray(p.kernel[...], np.float64) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    hidden = x @ gate
    expected = (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("d", "width"), [(1024, 2816), (2048, 5632), (2560, 6912), (128, 512), (96, 256)])
def test_default_width_is_that_of_published_models(d, width):
    assert mlp_width(d) == width
    shapes = jax.eval_shape(lambda: nnx.state(SwiGLU(d, rngs=nnx.Rngs(0))))
    assert shapes["down_proj"]["kernel"].shape == (width, d)


def test_dtypes():
    mlp = SwiGLU(8, 12, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert mlp.gate_proj.kernel.dtype == jnp.float32
    assert mlp(jnp.ones((2, 8))).dtype == jnp.bfloat16
