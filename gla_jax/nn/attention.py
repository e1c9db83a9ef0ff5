"""The gated linear attention layer, and its sibling with a scalar gate a head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax.array_types import Array
from gla_jax.mesh import vary_alike
from gla_jax.nn.projected import ProjectedConfig, ProjectedLayer
from gla_jax.nn.recurrent import Making
from gla_jax.nn.sharding import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig(ProjectedConfig):
    """The options of `GatedLinearAttention`."""

    gate_low_rank: int = 16
    """Rank of the gate's projection."""
    gate_normalizer: float = 16.0
    """Divides the log decay."""
    gate_clamp: float | None = None
    """Least log decay of a token, or None; see `GatedLinearAttention` on when it makes a difference in speed."""

    def _check(self) -> None:
        super()._check()
        self._at_least(1, "gate_low_rank")
        self._positive("gate_normalizer")
        self._require("gate_clamp", self.gate_clamp is None or self.gate_clamp < 0, "negative or None")


class GatedLinearAttention(ProjectedLayer):
    r"""Multi-head gated linear attention (arXiv 2312.06635, sections 4.1 and 4.4, equation 3).

        q, k, v = x W_q, x W_k, x W_v          (each through a short convolution with silu, if conv_size > 0)
        g = max(logsigmoid(x W_1 W_2 + b) / gate_normalizer, gate_clamp)
        S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t,   o_t = k_dim^-0.5 q_t S_t      (a head)
        y = (swish(x W_r) * concat_heads(norm(o))) W_o

    x, y and the gates g, which are rounded last, are in `dtype`; the state [b, hk, k, v] is always float32.

    Args:
      hidden_size: d, at least 1.
      norm_eps: epsilon of the norm of each head's output.
      init_std: standard deviation of the initial projections; biases start at 0.
      implementation: of the op, as in `gated_linear_attention`.
      sequence_axis: the mesh axis over which whole sequences are sharded in time, or None. Calls then go through
        `sequence_parallel`, under `jax.set_mesh` or inside shard_map; `prefill` and `step` are for None.
      dtype: computed in; None follows input and parameters.
      param_dtype: of the parameters.
      rngs: of the initial parameters.
      common: the arguments above, and the fields of `GatedLinearAttentionConfig`. With h query heads,
        k = expand_k * d / h and v likewise; query head i reads key/value head i // (h / hk). gate_clamp is never needed
        for results, as the op is exact for any gate, and "xla" takes the same time for all of them. It is for kernels
        that are faster where channels decay by at most e^-96 over 16 tokens, which a clamp of -5 guarantees. A channel
        at -5 forgets all but 0.7 % at a single token, so a model hardly feels it.

    Raises:
      ValueError: naming an argument out of its range, or if heads do not divide the widths.
    """

    config_type = GatedLinearAttentionConfig

    def __init__(self, hidden_size: int, *, sequence_axis: str | None = None, rngs: nnx.Rngs, **common: Any):
        self.sequence_axis = sequence_axis
        super().__init__(hidden_size, rngs=rngs, **common)

    def _make_gate(self, hidden_size: int, config: Any, making: Making) -> None:
        self.gate_normalizer, self.gate_clamp = config.gate_normalizer, config.gate_clamp
        rank, width = config.gate_low_rank, self.num_kv_heads * self.head_k
        self.gate_down = linear(hidden_size, rank, ("embed", None), **making.weights)
        self.gate_up = linear(rank, width, (None, "kv_heads"), bias=True, **making.weights)

    def decay(self, x: Array, layer_input: Any = None) -> Array:
        """Log decays [..., hk, k] of x [..., d]; layer_input is not read.

        They are computed in float32 and rounded once, which costs exp(G) at most 2^-9 G exp(G).
        """
        return self._decay_from(self.gate_down(x))

    def _streams(self, x: Array, **beside: nnx.Linear) -> dict[str, Array]:
        # Another kind of decay may have no use for this.
        own = type(self).decay is GatedLinearAttention.decay
        return super()._streams(x, **({"low": self.gate_down} if own else {}), **beside)

    def _gates(self, streams: dict[str, Array], x: Array, layer_input: Any) -> Array:
        return self._decay_from(streams["low"]) if "low" in streams else self.decay(x, layer_input)

    def _decay_from(self, low: Array) -> Array:
        assert self.gate_up.bias is not None
        up, bias = self.gate_up.kernel[...].astype(low.dtype), self.gate_up.bias[...].astype(jnp.float32)
        g = _log_decay(self.gate_normalizer, *vary_alike((low, up, bias)))
        g = g if self.gate_clamp is None else jnp.maximum(g, self.gate_clamp)
        return g.reshape(*low.shape[:-1], self.num_kv_heads, self.head_k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _log_decay(normalizer: float, low: Array, up: Array, bias: Array) -> Array:
    """logsigmoid(low up + bias) / normalizer, computed in float32, in low's dtype as are its gradients' products.

    In float32 these products alone were 4 % of a step of the 340m preset on an H100.
    """
    wide = jax.nn.log_sigmoid(jnp.dot(low, up, preferred_element_type=jnp.float32) + bias) / normalizer
    return wide.astype(low.dtype)


def _log_decay_forward(normalizer: float, low: Array, up: Array, bias: Array) -> tuple[Array, tuple[Array, ...]]:
    g = _log_decay(normalizer, low, up, bias)
    return g, (low, up, g)


def _log_decay_backward(normalizer: float, kept: tuple[Array, ...], dg: Array) -> tuple[Array, Array, Array]:
    low, up, g = kept
    # Without this XLA computes the derivative in the forward, and keeps it in float32.
    g, dg = jax.lax.optimization_barrier((g, dg))
    # The derivative of logsigmoid(x) is 1 - sigmoid(x), and sigmoid(x) is exp(normalizer g): nothing but g is kept.
    dx = dg.astype(jnp.float32) * (jnp.expm1(normalizer * g.astype(jnp.float32)) / -normalizer)
    rows = tuple(range(dx.ndim - 1))
    rounded = dx.astype(low.dtype)
    return rounded @ up.T, jnp.tensordot(low, rounded, (rows, rows)), jnp.sum(dx, rows)


_log_decay.defvjp(_log_decay_forward, _log_decay_backward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimpleGatedLinearAttentionConfig(ProjectedConfig):
    """The options of `SimpleGatedLinearAttention`."""

    expand_k: float = 1.0
    """Width of all keys together, against hidden_size."""
    conv_size: int = 4
    """Taps of the short convolutions of queries, keys and values; 0 for none."""
    gate_normalizer: float = 16.0
    """Divides the log decay."""

    def _check(self) -> None:
        super()._check()
        self._positive("gate_normalizer")


class SimpleGatedLinearAttention(ProjectedLayer):
    """Simple GLA, or Gated RetNet: one decay a head and token (arXiv 2312.06635, table 1; arXiv 2405.05254).

        q, k, v = x W_q, x W_k, x W_v          (each through a short convolution with silu, if conv_size > 0)
        g = logsigmoid(x W_g + b) / gate_normalizer      (a number a head)
        S_t = exp(g_t) S_{t-1} + k_t^T v_t,   o_t = k_dim^-0.5 q_t S_t
        y = (swish(x W_r) * concat_heads(norm(o))) W_o

    In the op: q, k, v as they are, g [b, t, hk]. Arguments, shapes and errors as in `GatedLinearAttention`; options are
    the fields of `SimpleGatedLinearAttentionConfig`.
    """

    config_type = SimpleGatedLinearAttentionConfig

    def _make_gate(self, hidden_size: int, config: Any, making: Making) -> None:
        self.gate_normalizer = config.gate_normalizer
        self.gate = linear(hidden_size, self.num_kv_heads, ("embed", "kv_heads"), bias=True, **making.weights)

    def decay(self, x: Array, layer_input: Any = None) -> Array:
        """Log decays [..., hk] of x [..., d], float32; layer_input is not read."""
        return jax.nn.log_sigmoid(self.gate(x).astype(jnp.float32)) / self.gate_normalizer
