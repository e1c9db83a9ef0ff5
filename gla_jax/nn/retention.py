"""Layers whose decays do not depend on the input: retention, lightning attention, linear attention."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gla_jax.array_types import Array
from gla_jax.nn.mlp import silu
from gla_jax.nn.norm import RMSNorm
from gla_jax.nn.projected import FEATURE_MAPS, ProjectedConfig, ProjectedLayer
from gla_jax.nn.recurrent import Making, MixerConfig, RecurrentLayer, head_width
from gla_jax.nn.rope import rotate
from gla_jax.nn.sharding import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionConfig(ProjectedConfig):
    """The options of `Retention`."""

    num_heads: int = 8
    """Query heads."""
    expand_k: float = 1.0
    """Width of all keys together, against hidden_size."""
    expand_v: float = 2.0
    """Width of all values together, against hidden_size."""
    rope_theta: float | None = 10000.0
    """Base of the rotary embedding of queries and keys; None for no positions."""

    def _check(self) -> None:
        super()._check()
        self._require("rope_theta", self.rope_theta is None or self.rope_theta > 0, "positive or None")


class Retention(ProjectedLayer):
    """Multi-scale retention, the layer of RetNet (arXiv 2307.08621, equations 5 to 8).

        q, k, v = rope(x W_q), rope(x W_k), x W_v
        S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = k_dim^-0.5 q_t S_t,   gamma_h = 1 - 2^(-5 - h),  h = 0, 1, ...
        y = (swish(x W_r) * concat_heads(norm(o))) W_o

    In the op: q, k, v as they are, g [hk] = log gamma. rope is the rotation of `rotate`, without xPos's magnitudes, as
    in the authors' code and flash-linear-attention. Arguments, shapes and errors as in `GatedLinearAttention`; options
    are the fields of `RetentionConfig`.
    """

    config_type = RetentionConfig
    reads_positions = True

    def _make_gate(self, hidden_size: int, config: Any, making: Making) -> None:
        self.rope_theta = config.rope_theta
        if self.rope_theta is not None and self.head_k % 2:
            raise ValueError(f"expand_k: rotary embedding needs an even head width, got {self.head_k}")

    def decay(self, x: Array, layer_input: Any = None) -> Array:
        """log gamma [hk], for any x and layer_input."""
        return jnp.log1p(-(2.0 ** (-5.0 - jnp.arange(self.num_kv_heads, dtype=jnp.float32))))

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        arguments = super()._arguments(streams, x, position, layer_input)
        if self.rope_theta is not None:
            q, k = (rotate(arguments[name], position, self.rope_theta) for name in ("q", "k"))
            arguments |= {"q": q, "k": k}
        return arguments


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningAttentionConfig(MixerConfig):
    """The options of `LightningAttention`."""

    num_heads: int = 8
    """Heads."""
    head_size: int | None = None
    """Width of a head's queries, keys and values; None for hidden_size / num_heads."""
    layer_input: ClassVar[str | None] = "depth"

    def _check(self) -> None:
        self._at_least(1, "num_heads")
        self._require("head_size", self.head_size is None or self.head_size >= 1, "at least 1 or None")


class LightningAttention(RecurrentLayer):
    """Lightning attention (arXiv 2401.04658), as MiniMax-01 has it (arXiv 2501.08313, section 2.2).

        q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)
        S_t = exp(-s_h f) S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   s_h = 2^(-8 h / H),  h = 1, ..., H
        y = (sigmoid(x W_r) * norm(concat_heads(o))) W_o

    f = 1 - depth + 1e-5 falls with the layer's depth, from 0 for the first to 1 for the last, so that later layers
    forget less. In the op: q, k, v as they are, g [h] = -s f, scale 1. The norm is RMSNorm over all heads together.
    `layer_input` is depth, a float; 0 if None. Arguments, shapes and errors as in `GatedLinearAttention`; options are
    the fields of `LightningAttentionConfig`.
    """

    config_type = LightningAttentionConfig
    scale = 1.0

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        self.num_heads = config.num_heads
        self.head_size = config.head_size or head_width("num_heads", hidden_size, 1.0, config.num_heads)
        weights, width = making.weights, self.num_heads * self.head_size
        self.q_proj = linear(hidden_size, width, ("embed", "heads"), **weights)
        self.k_proj = linear(hidden_size, width, ("embed", "heads"), **weights)
        self.v_proj = linear(hidden_size, width, ("embed", "heads"), **weights)
        self.out_gate = linear(hidden_size, width, ("embed", "heads"), **weights)
        self.o_proj = linear(width, hidden_size, ("heads", "embed"), **weights)
        self.o_norm = RMSNorm(width, eps=making.norm_eps, **making.parts)

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.head_size, self.head_size

    def _streams(self, x: Array) -> dict[str, Array]:
        return {"q": self.q_proj(x), "k": self.k_proj(x), "v": self.v_proj(x)}

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        heads = {name: silu(y).reshape(*x.shape[:-1], self.num_heads, -1) for name, y in streams.items()}
        slopes = 2.0 ** (-8.0 * np.arange(1, self.num_heads + 1) / self.num_heads)
        depth = 0.0 if layer_input is None else layer_input
        return {**heads, "g": -jnp.asarray(slopes, jnp.float32) * (1 - depth + 1e-5)}

    def _output(self, o: Array, x: Array, streams: dict[str, Array], arguments: dict[str, Any]) -> Array:
        y = self.o_norm(o.reshape(*x.shape[:-1], -1))
        return self.o_proj(jax.nn.sigmoid(self.out_gate(x)) * y)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearAttentionConfig(ProjectedConfig):
    """The options of `LinearAttention`."""

    expand_k: float = 1.0
    """Width of all keys together, against hidden_size."""
    feature_map: str | None = "elu1"
    """Applied to queries and keys: relu, sqrelu, elu1, silu, gelu, sigmoid, product (learned), or None."""
    normalize: bool = False
    """Whether outputs are divided by the sum of their weights: meant for positive feature maps."""
    output_gate: bool = False
    """Whether swish(x W_r) multiplies the normalised heads."""
    output_norm: str = "rms"
    """Norm of each head's output: rms, layer or none."""

    feature_maps: ClassVar[tuple[str | None, ...]] = (None, *FEATURE_MAPS, "product")


class LinearAttention(ProjectedLayer):
    """Linear attention (arXiv 2006.16236, equations 18 to 20), with or without its normaliser.

        q, k, v = phi(x W_q), phi(x W_k), x W_v
        S_t = S_{t-1} + k_t^T v_t,   z_t = z_{t-1} + k_t^T
        o_t = k_dim^-0.5 q_t S_t,  or  q_t S_t / (q_t z_t + 1e-10 k_dim^0.5)  if normalize
        y = (swish(x W_r) * concat_heads(norm(o))) W_o

    In the op: no gate; the normaliser z is one more value channel, of ones, so that the state is [b, hk, k, v + 1].
    phi "product" has parameters, phi(x) = (x A + a) * (x B + b) in each head, one pair for queries and one for keys, as
    flash-linear-attention's elementwise_product. Arguments, shapes and errors as in
    `GatedLinearAttention`; options are the fields of `LinearAttentionConfig`.
    """

    config_type = LinearAttentionConfig

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        super()._make(hidden_size, config, making)
        self.normalize = config.normalize
        self.q_maps = self.k_maps = nnx.data(None)
        if config.feature_map == "product":
            size = self.head_k
            pair: dict[str, Any] = {"bias": True, **making.weights}
            self.q_maps = nnx.List([linear(size, size, (None, None), **pair) for _ in range(2)])
            self.k_maps = nnx.List([linear(size, size, (None, None), **pair) for _ in range(2)])

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_kv_heads, self.head_k, self.head_v + self.normalize

    def decay(self, x: Array, layer_input: Any = None) -> None:
        """None: nothing is forgotten, whatever x and layer_input are."""
        return None

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        arguments = super()._arguments(streams, x, position, layer_input)
        if self.q_maps is not None and self.k_maps is not None:
            for name, (a, b) in (("q", self.q_maps), ("k", self.k_maps)):
                arguments[name] = a(arguments[name]) * b(arguments[name])
        if self.normalize:
            ones = jnp.ones_like(arguments["v"][..., :1])
            arguments["v"] = jnp.concatenate([arguments["v"], ones], -1)
        return arguments

    def _output(self, o: Array, x: Array, streams: dict[str, Array], arguments: dict[str, Any]) -> Array:
        if self.normalize:
            wide = o.astype(jnp.float32)
            o = (wide[..., :-1] / (wide[..., -1:] + 1e-10)).astype(o.dtype)
        return super()._output(o, x, streams, arguments)
