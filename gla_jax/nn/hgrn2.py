"""HGRN2: keys are one minus the forget gate."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax.array_types import Array
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.mlp import silu
from gla_jax.nn.norm import RMSNorm
from gla_jax.nn.recurrent import Making, MixerConfig, RecurrentLayer, head_width
from gla_jax.nn.sharding import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class HGRN2Config(MixerConfig):
    """The options of `HGRN2`."""

    expand_ratio: int = 128
    """Width k of a head's gates, keys and queries; there are hidden_size / expand_ratio heads."""
    conv_size: int = 0
    """Taps of the short convolutions of queries, gates and values; 0 for none."""
    conv_bias: bool = False
    """Whether the short convolutions have a bias."""
    output_norm_eps: float = 1e-5
    """Epsilon of the output norm: flash-linear-attention's own, whatever norm_eps its models have elsewhere."""
    layer_input: ClassVar[str | None] = "lower_bound"

    def _check(self) -> None:
        self._at_least(1, "expand_ratio")
        self._positive("output_norm_eps")
        self._require("conv_size", self.conv_size >= 0, "0 (none) or more")


class HGRN2(RecurrentLayer):
    """Gated linear RNN with state expansion (arXiv 2404.07904).

        q, f, v = silu(x W_q), beta + (1 - beta) sigmoid(x W_f), x W_v      (short convolutions before, if conv_size)
        S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T v_t,   o_t = k_dim^-0.5 q_t S_t      (a head)
        y = norm(concat_heads(o)) W_o

    In the op: k = 1 - f and g = log f [b, t, h, k], both computed in float32 from log f. The norm is RMSNorm over all
    heads together. `layer_input` is the layer's lower bound beta [d], at least 0 and below 1; None for 0. A model
    learns the bounds of all layers, which rise from 0: the cumulative sum over layers of a softmax over layers, without
    the first. Arguments, shapes and errors as in `GatedLinearAttention`, but norm_eps,
    which has no meaning here; options are the fields of `HGRN2Config`.
    """

    convolutions = ("q_conv", "f_conv", "v_conv")

    config_type = HGRN2Config

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        if hidden_size % config.expand_ratio:
            raise ValueError(f"expand_ratio: must divide hidden_size = {hidden_size}, got {config.expand_ratio}")
        self.num_heads, self.head_k = hidden_size // config.expand_ratio, config.expand_ratio
        self.head_v = head_width("expand_ratio", hidden_size, 1.0, self.num_heads)
        common, weights = making.parts, making.weights
        self.q_proj = linear(hidden_size, hidden_size, ("embed", "heads"), **weights)
        self.f_proj = linear(hidden_size, hidden_size, ("embed", "heads"), **weights)
        self.v_proj = linear(hidden_size, hidden_size, ("embed", "heads"), **weights)
        self.o_proj = linear(hidden_size, hidden_size, ("heads", "embed"), **weights)
        self.o_norm = RMSNorm(hidden_size, eps=config.output_norm_eps, **common)
        self.q_conv = self.f_conv = self.v_conv = nnx.data(None)
        if config.conv_size:
            conv: dict[str, Any] = {"bias": config.conv_bias, "activation": False, **common}
            self.q_conv = ShortConvolution(hidden_size, config.conv_size, **conv)
            self.f_conv = ShortConvolution(hidden_size, config.conv_size, **conv)
            self.v_conv = ShortConvolution(hidden_size, config.conv_size, **conv)

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_k, self.head_v

    def _streams(self, x: Array) -> dict[str, Array]:
        return {"q_conv": self.q_proj(x), "f_conv": self.f_proj(x), "v_conv": self.v_proj(x)}

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        g = jax.nn.log_sigmoid(streams["f_conv"].astype(jnp.float32))
        if layer_input is not None:
            some = layer_input > 0  # a bound of exactly 0, the first layer's, has no logarithm
            bound = jnp.where(some, layer_input, 0.5)
            g = jnp.where(some, jnp.logaddexp(jnp.log(bound), jnp.log1p(-bound) + g), g)
        k = -jnp.expm1(g)
        q, k, v, g = (
            y.reshape(*x.shape[:-1], self.num_heads, -1)
            for y in (silu(streams["q_conv"]), k.astype(x.dtype), streams["v_conv"], g)
        )
        return {"q": q, "k": k.astype(q.dtype), "v": v, "g": g}

    def _output(self, o: Array, x: Array, streams: dict[str, Array], arguments: dict[str, Any]) -> Array:
        return self.o_proj(self.o_norm(o.reshape(*x.shape[:-1], -1)))
