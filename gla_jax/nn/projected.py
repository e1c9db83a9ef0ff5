"""Layers with projections to queries, keys and values, a norm of each head's output, and an output gate."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax.array_types import Array
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.mlp import silu
from gla_jax.nn.norm import LayerNorm, RMSNorm, gated_norm
from gla_jax.nn.recurrent import Making, MixerConfig, RecurrentLayer, head_width
from gla_jax.nn.sharding import linear, side_by_side

FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sqrelu": lambda x: jnp.square(jax.nn.relu(x)),
    "elu1": lambda x: jax.nn.elu(x) + 1,
    "silu": silu,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
}
OUTPUT_NORMS = {"rms": RMSNorm, "layer": LayerNorm, "none": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProjectedConfig(MixerConfig):
    """What all layers with projected queries, keys and values have."""

    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Heads of keys, values, gates and states; None for as many as query heads."""
    expand_k: float = 0.5
    """Width of all keys together, against hidden_size."""
    expand_v: float = 1.0
    """Width of all values together, against hidden_size."""
    conv_size: int = 0
    """Taps of the short convolutions of queries, keys and values; 0 for none."""
    conv_bias: bool = False
    """Whether the short convolutions have a bias."""
    feature_map: str | None = None
    """Applied to queries and keys: relu, sqrelu, elu1, silu, gelu, sigmoid, or None."""
    output_gate: bool = True
    """Whether swish(x W_r) multiplies the normalised heads."""
    output_gate_bias: bool = False
    """Whether the output gate has a bias."""
    output_norm: str = "rms"
    """Norm of each head's output: rms, layer or none."""
    output_norm_affine: bool = True
    """Whether that norm has learned parameters."""

    feature_maps: ClassVar[tuple[str | None, ...]] = (None, *FEATURE_MAPS)
    """What feature_map may be."""

    def _check(self) -> None:
        self._at_least(1, "num_heads")
        self._positive("expand_k", "expand_v")
        self._require("conv_size", self.conv_size >= 0, "0 (none) or more")
        self._one_of("feature_map", self.feature_maps)
        self._one_of("output_norm", tuple(OUTPUT_NORMS))
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads: must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")


class ProjectedLayer(RecurrentLayer):
    """q, k, v = x W_q, x W_k, x W_v into the op, and y = (swish(x W_r) * concat_heads(norm(o))) W_o out of it.

    A kind of layer adds its gate: what that needs (`_make_gate`), and `decay`. To try a gate of your own, subclass a
    layer and define it anew.
    """

    convolutions = ("q_conv", "k_conv", "v_conv")

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        weights = making.weights
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
        self.head_k = head_width("expand_k", hidden_size, config.expand_k, config.num_heads)
        self.head_v = head_width("expand_v", hidden_size, config.expand_v, config.num_heads)
        self.feature_map = config.feature_map
        self.q_proj = linear(hidden_size, self.num_heads * self.head_k, ("embed", "heads"), **weights)
        self.k_proj = linear(hidden_size, self.num_kv_heads * self.head_k, ("embed", "kv_heads"), **weights)
        self.v_proj = linear(hidden_size, self.num_kv_heads * self.head_v, ("embed", "kv_heads"), **weights)
        self._make_gate(hidden_size, config, making)
        width = self.num_heads * self.head_v
        self.out_gate = nnx.data(None)
        if config.output_gate:
            self.out_gate = linear(hidden_size, width, ("embed", "heads"), bias=config.output_gate_bias, **weights)
        self.o_proj = linear(width, hidden_size, ("heads", "embed"), **weights)
        self.o_norm = nnx.data(None)
        norm_parts = {**making.parts, "dtype": jnp.float32}  # rounded once, after the gate
        if (norm := OUTPUT_NORMS[config.output_norm]) is not None:
            self.o_norm = norm(self.head_v, eps=making.norm_eps, affine=config.output_norm_affine, **norm_parts)
        self.q_conv = self.k_conv = self.v_conv = nnx.data(None)
        if config.conv_size:

            def conv(projection: nnx.Linear, axis: str) -> ShortConvolution:
                width = projection.out_features
                taps: dict[str, Any] = {"bias": config.conv_bias, "sequence_axis": self.sequence_axis, **making.parts}
                return ShortConvolution(width, config.conv_size, axis=axis, **taps)

            self.q_conv = conv(self.q_proj, "heads")
            self.k_conv, self.v_conv = conv(self.k_proj, "kv_heads"), conv(self.v_proj, "kv_heads")

    def _make_gate(self, hidden_size: int, config: Any, making: Making) -> None:
        pass

    def decay(self, x: Array, layer_input: Any) -> Array | None:
        """Log decays of x [..., d], at most 0: [..., hk, k], [..., hk] or [hk] in float32; None for no decay.

        Those of each channel are rounded to the keys' dtype. layer_input is as in a call of the layer.
        """
        raise NotImplementedError

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_kv_heads, self.head_k, self.head_v

    def _streams(self, x: Array, **beside: nnx.Linear) -> dict[str, Array]:
        """What the projections make of x, and what the layers `beside` them make of it."""
        layers: dict[str, Any] = {"q_conv": self.q_proj, "k_conv": self.k_proj, "v_conv": self.v_proj, **beside}
        streams = dict(zip(layers, side_by_side(list(layers.values()), x), strict=True))
        if self.out_gate is not None:
            # A product of its own: its gradient's kernel wants it, and writes it, in one piece.
            streams["out_gate"] = self.out_gate(x)
        return streams

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        q = streams["q_conv"].reshape(*x.shape[:-1], self.num_heads, self.head_k)
        k, v = (streams[n].reshape(*x.shape[:-1], self.num_kv_heads, -1) for n in ("k_conv", "v_conv"))
        if self.feature_map in FEATURE_MAPS:
            q, k = FEATURE_MAPS[self.feature_map](q), FEATURE_MAPS[self.feature_map](k)
        return {"q": q, "k": k, "v": v, "g": self._gates(streams, x, layer_input)}

    def _gates(self, streams: dict[str, Array], x: Array, layer_input: Any) -> Array | None:
        return self.decay(x, layer_input)

    def _output(self, o: Array, x: Array, streams: dict[str, Array], arguments: dict[str, Any]) -> Array:
        if self.out_gate is None:
            y = o if self.o_norm is None else self.o_norm(o).astype(o.dtype)
            return self.o_proj(y.reshape(*x.shape[:-1], -1))
        return self.o_proj(gated_norm(self.o_norm, o, streams["out_gate"]))
