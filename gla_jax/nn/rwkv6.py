"""RWKV-6 (Finch): time mixing and channel mixing, both with a shift by one token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.nn.conv import TokenShift
from gla_jax.nn.mlp import gated
from gla_jax.nn.recurrent import Making, MixerConfig, RecurrentLayer, head_width
from gla_jax.nn.sharding import linear, parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class RWKV6Config(MixerConfig):
    """The options of `RWKV6`."""

    num_heads: int = 4
    """Heads."""
    expand_k: float = 0.5
    """Width of all keys together, against hidden_size."""
    expand_v: float = 1.0
    """Width of all values together, against hidden_size."""
    shift_low_rank: int = 32
    """Rank of the part of the token shift that depends on the input."""
    gate_low_rank: int = 64
    """Rank of the part of the decay that depends on the input."""

    def _check(self) -> None:
        self._at_least(1, "num_heads", "shift_low_rank", "gate_low_rank")
        self._positive("expand_k", "expand_v")


class RWKV6(RecurrentLayer):
    """Time mixing of RWKV-6 (arXiv 2404.05892, section 4.2).

        d_t = x_{t-1} - x_t                                             (x before the first token is 0)
        m = tanh((x + d * mu_x) A) B + mu      (five d-vectors m_r, m_w, m_k, m_v, m_g)
        r, k, v, z = (x + d * m_r) W_r, (x + d * m_k) W_k, (x + d * m_v) W_v, (x + d * m_g) W_z
        g = -exp(tanh((x + d * m_w) C) D + w_0)
        S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t,   o_t = r_t (S_{t-1} + Diag(u) k_t^T v_t)      (a head)
        y = (silu(z) * groupnorm(concat_heads(o))) W_o

    In the op: q = r, g [b, t, h, k], bonus = u [h, k], scale 1. The group norm has one group a head. Arguments, shapes
    and errors as in `GatedLinearAttention`; options are the fields of `RWKV6Config`.
    """

    config_type = RWKV6Config
    convolutions = ("shift",)
    scale = 1.0

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        self.num_heads, self.norm_eps = config.num_heads, making.norm_eps
        self.head_k = head_width("expand_k", hidden_size, config.expand_k, config.num_heads)
        self.head_v = head_width("expand_v", hidden_size, config.expand_v, config.num_heads)
        keys, values = self.num_heads * self.head_k, self.num_heads * self.head_v
        made, weights = making.parameters, making.weights
        zeros, ones = nnx.initializers.zeros, nnx.initializers.ones
        rank = config.shift_low_rank
        self.shift = TokenShift(hidden_size, dtype=making.dtype)
        self.mu_x = parameter(zeros, (hidden_size,), (None,), **made)
        self.mu = parameter(zeros, (5, hidden_size), (None, None), **made)
        self.shift_down = linear(hidden_size, 5 * rank, ("embed", None), **weights)
        self.shift_up = parameter(
            nnx.initializers.normal(making.init_std), (5, rank, hidden_size), (None, None, "embed"), **made
        )
        self.r_proj = linear(hidden_size, keys, ("embed", "heads"), **weights)
        self.k_proj = linear(hidden_size, keys, ("embed", "heads"), **weights)
        self.v_proj = linear(hidden_size, values, ("embed", "heads"), **weights)
        self.out_gate = linear(hidden_size, values, ("embed", "heads"), **weights)
        self.gate_down = linear(hidden_size, config.gate_low_rank, ("embed", None), **weights)
        self.gate_up = linear(config.gate_low_rank, keys, (None, "heads"), bias=True, **weights)
        self.bonus = parameter(zeros, (self.num_heads, self.head_k), ("heads", None), **made)
        self.norm_scale = parameter(ones, (values,), (None,), **made)
        self.norm_bias = parameter(zeros, (values,), (None,), **made)
        self.o_proj = linear(values, hidden_size, ("heads", "embed"), **weights)

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_k, self.head_v

    def _streams(self, x: Array) -> dict[str, Array]:
        return {"shift": x}

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        delta = streams["shift"] - x
        low = jnp.tanh(self.shift_down(x + delta * self.mu_x[...].astype(x.dtype)))
        low = low.reshape(*x.shape[:-1], 5, -1)
        mixed = jnp.einsum("...nr,nrd->...nd", low, self.shift_up[...].astype(low.dtype))
        mixed = x[..., None, :] + delta[..., None, :] * (mixed + self.mu[...].astype(low.dtype))
        r, w, k, v, z = (mixed[..., i, :] for i in range(5))
        streams["z"] = self.out_gate(z)
        low = jnp.tanh(self.gate_down(w))
        assert self.gate_up.bias is not None
        up, bias = self.gate_up.kernel[...].astype(low.dtype), self.gate_up.bias[...].astype(jnp.float32)
        g = -jnp.exp(jnp.dot(low, up, preferred_element_type=jnp.float32) + bias)
        heads = {"q": self.r_proj(r), "k": self.k_proj(k), "v": self.v_proj(v), "g": g}
        heads = {name: y.reshape(*x.shape[:-1], self.num_heads, -1) for name, y in heads.items()}
        return {**heads, "bonus": self.bonus[...].astype(jnp.float32)}

    def _output(self, o: Array, x: Array, streams: dict[str, Array], arguments: dict[str, Any]) -> Array:
        y = o.astype(jnp.float32)
        y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.norm_eps)
        y = y.reshape(*x.shape[:-1], -1) * self.norm_scale[...].astype(jnp.float32)
        y = (y + self.norm_bias[...].astype(jnp.float32)).astype(o.dtype)
        return self.o_proj(gated(y, streams["z"]))


class ChannelMix(nnx.Module):
    """The feed-forward half of an RWKV-6 block (arXiv 2404.05892).

        y = sigmoid((x + d * mu_r) W_r) * (relu((x + d * mu_k) W_k)^2 W_v),   d_t = x_{t-1} - x_t

    Args:
      hidden_size: width d of input and output.
      intermediate_size: width between.
      init_std: standard deviation of the initial weights.
      dtype: computed in; None follows input and parameters.
      param_dtype: of the weights.
      rngs: of the initial weights.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        init_std: float = 0.02,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        made = {"param_dtype": param_dtype, "rngs": rngs}
        weights = {"init_std": init_std, "dtype": dtype, **made}
        self.shift = TokenShift(hidden_size, dtype=dtype)
        self.mu_k = parameter(nnx.initializers.zeros, (hidden_size,), (None,), **made)
        self.mu_r = parameter(nnx.initializers.zeros, (hidden_size,), (None,), **made)
        self.up_proj = linear(hidden_size, intermediate_size, ("embed", "mlp"), **weights)
        self.down_proj = linear(intermediate_size, hidden_size, ("mlp", "embed"), **weights)
        self.r_proj = linear(hidden_size, hidden_size, ("embed", None), **weights)

    def init_cache(self, batch_size: int) -> Float[Array, "b 1 d"]:
        """The token before the first of batch_size sequences: zeros [b, 1, d]."""
        return self.shift.init_cache(batch_size)

    def __call__(self, x: Float[Array, "b t d"], segment_ids: Ids | None = None) -> Float[Array, "b t d"]:
        """Apply to whole sequences x [b, t, d]; segment_ids [b, t] as in `gated_linear_attention`."""
        return self._mix(x, self.shift(x, segment_ids))

    def prefill(
        self, x: Float[Array, "b t d"], cache: Float[Array, "b 1 d"], segment_ids: Ids | None = None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b 1 d"]]:
        """Apply to x [b, t, d] after the token in the cache; segment_ids as in `ShortConvolution.prefill`."""
        before, cache = self.shift.prefill(x, cache, segment_ids)
        return self._mix(x, before), cache

    def step(
        self, x: Float[Array, "b d"], cache: Float[Array, "b 1 d"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b 1 d"]]:
        """Apply to one token x [b, d] after the one in the cache."""
        before, cache = self.shift.step(x, cache)
        return self._mix(x, before), cache

    def _mix(self, x: Array, before: Array) -> Array:
        delta = before - x
        hidden = jnp.square(jax.nn.relu(self.up_proj(x + delta * self.mu_k[...].astype(x.dtype))))
        gate = jax.nn.sigmoid(self.r_proj(x + delta * self.mu_r[...].astype(x.dtype)))
        return gate * self.down_proj(hidden)
