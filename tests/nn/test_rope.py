import jax.numpy as jnp
import numpy as np

from gla_jax.nn.rope import positions_after, rotate


def test_positions_count_the_tokens_of_a_document():
    ids = jnp.array([[-1, -1, 4, 4, 7, 7, 7, -1], [0, 0, -1, 0, 1, 2, -1, 2]])
    position, after = positions_after((2, 8), jnp.array([5, 2]), ids)
    np.testing.assert_array_equal(position[0, 2:7], [5, 6, 0, 1, 2])
    np.testing.assert_array_equal(position[1, jnp.array([0, 1, 3, 4, 5, 7])], [2, 3, 4, 0, 0, 1])
    np.testing.assert_array_equal(after, [3, 2])
    position, after = positions_after((1, 3), None, None)
    np.testing.assert_array_equal(position, [[0, 1, 2]])
    np.testing.assert_array_equal(after, [3])
    _, after = positions_after((1, 3), jnp.array([6]), jnp.full((1, 3), -1))
    np.testing.assert_array_equal(after, [6])


def test_rotation_turns_pairs_and_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 6)) for _ in range(2))
    at = lambda x, p: np.asarray(rotate(jnp.asarray(x, jnp.float32), jnp.array([p]), 100.0), np.float64)
    turned = (q[..., :3] + 1j * q[..., 3:]) * np.exp(1j * 7 * 100.0 ** (-np.arange(3) / 3))
    np.testing.assert_allclose(at(q, 7), np.concatenate([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((at(q, 9) * at(k, 4)).sum(), (at(q, 25) * at(k, 20)).sum(), rtol=1e-4)
