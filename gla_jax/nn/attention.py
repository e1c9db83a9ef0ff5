"""The gated linear attention layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.attention import Implementation, gated_linear_attention
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.norm import LayerNorm, RMSNorm
from gla_jax.nn.sharding import linear
from gla_jax.sequence_parallel import sequence_parallel
from gla_jax.step import gated_linear_attention_step

__all__ = ["FEATURE_MAPS", "GatedLinearAttention"]

FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "sqrelu": lambda x: jnp.square(jax.nn.relu(x)),
    "elu1": lambda x: jax.nn.elu(x) + 1,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "sigmoid": jax.nn.sigmoid,
}
OUTPUT_NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class GatedLinearAttention(nnx.Module):
    r"""Multi-head gated linear attention (arXiv 2312.06635, sections 4.1 and 4.4, equation 3).

        q, k, v = x W_q, x W_k, x W_v          (each through a short convolution with silu, if conv_size > 0)
        g = max(logsigmoid(x W_1 W_2 + b) / gate_normalizer, gate_clamp)
        S_t = Diag(exp g_t) S_{t-1} + k_t^T v_t,   o_t = k_dim^-0.5 q_t S_t      (a head)
        y = (swish(x W_r) * concat_heads(norm(o))) W_o

    x and y are [b, t, d] in `dtype`; the gates g and the state [b, hk, k, v] are always float32.

    Args:
      hidden_size: d, at least 1.
      num_heads: query heads h.
      num_kv_heads: heads hk of keys, values, gates, states, dividing h; None for h. Query head i reads i // (h / hk).
      expand_k: h * k / d, the width of all query heads together against the model's.
      expand_v: h * v / d, the same for the values.
      gate_low_rank: rank of the gate's projection W_1 W_2.
      gate_normalizer: divides the log decay, > 0: 16 makes it forget slowly at first.
      gate_clamp: the least log decay a token may have, < 0, or None. Results never need it, as the op is exact for any
        gate, and "xla" takes the same time for all of them. It is for kernels that are faster where channels decay by
        at most e^-96 over 16 tokens, which a clamp of -5 guarantees. A channel at -5 forgets all but 0.7 % at a single
        token, so a model hardly feels it.
      conv_size: taps of the short convolutions of q, k and v; 0 for none.
      conv_bias: whether these have a bias.
      feature_map: applied to q and k after the convolution: one of `FEATURE_MAPS`, or None.
      output_gate: whether swish(x W_r) multiplies the normalised heads.
      output_gate_bias: whether W_r has a bias (the paper's first release has).
      output_norm: "rms" or "layer": the norm of each head's output over v.
      output_norm_affine: whether that norm has learned parameters (one set for all heads).
      norm_eps: its epsilon.
      init_std: standard deviation of the initial projections; biases start at 0.
      implementation: of the op, as in `gated_linear_attention`.
      sequence_axis: the mesh axis over which whole sequences are sharded in time, or None. Calls then go through
        `sequence_parallel`, under `jax.set_mesh` or inside shard_map; `prefill` and `step` are for None.
      dtype: computed in; None follows input and parameters.
      param_dtype: of the parameters.

    Raises:
      ValueError: if heads do not divide the widths, or a name is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_low_rank: int = 16,
        gate_normalizer: float = 16.0,
        gate_clamp: float | None = None,
        conv_size: int = 0,
        conv_bias: bool = False,
        feature_map: str | None = None,
        output_gate: bool = True,
        output_gate_bias: bool = False,
        output_norm: str = "rms",
        output_norm_affine: bool = True,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        implementation: Implementation | None = None,
        sequence_axis: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_k, self.head_v = head_sizes(hidden_size, num_heads, num_kv_heads, expand_k, expand_v)
        if feature_map is not None and feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map: one of {sorted(FEATURE_MAPS)} or None, got {feature_map!r}")
        if output_norm not in OUTPUT_NORMS:
            raise ValueError(f"output_norm: one of {sorted(OUTPUT_NORMS)}, got {output_norm!r}")
        self.gate_normalizer, self.gate_clamp = gate_normalizer, gate_clamp
        self.feature_map, self.implementation, self.dtype = feature_map, implementation, dtype
        self.sequence_axis = sequence_axis

        q_width, k_width = num_heads * self.head_k, self.num_kv_heads * self.head_k
        v_width, o_width = self.num_kv_heads * self.head_v, num_heads * self.head_v
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        weights = {"init_std": init_std, **common}
        self.q_proj = linear(hidden_size, q_width, ("embed", "heads"), **weights)
        self.k_proj = linear(hidden_size, k_width, ("embed", "kv_heads"), **weights)
        self.v_proj = linear(hidden_size, v_width, ("embed", "kv_heads"), **weights)
        self.gate_down = linear(hidden_size, gate_low_rank, ("embed", None), **weights)
        self.gate_up = linear(gate_low_rank, k_width, (None, "kv_heads"), bias=True, **weights)
        self.out_gate = nnx.data(None)
        if output_gate:
            self.out_gate = linear(hidden_size, o_width, ("embed", "heads"), bias=output_gate_bias, **weights)
        self.o_proj = linear(o_width, hidden_size, ("heads", "embed"), **weights)
        norm = OUTPUT_NORMS[output_norm]
        self.o_norm = norm(self.head_v, eps=norm_eps, affine=output_norm_affine, **common)
        self.q_conv = self.k_conv = self.v_conv = nnx.data(None)
        if conv_size:
            taps = {"bias": conv_bias, "sequence_axis": sequence_axis, **common}
            self.q_conv = ShortConvolution(q_width, conv_size, axis="heads", **taps)
            self.k_conv = ShortConvolution(k_width, conv_size, axis="kv_heads", **taps)
            self.v_conv = ShortConvolution(v_width, conv_size, axis="kv_heads", **taps)

    def init_cache(self, batch_size: int) -> dict[str, Array]:
        """What a sequence is before its first token: {"state": zeros [b, hk, k, v], and the convolutions' inputs}."""
        cache = {"state": jnp.zeros((batch_size, self.num_kv_heads, self.head_k, self.head_v), jnp.float32)}
        for name, conv in self._convolutions().items():
            cache[name] = conv.init_cache(batch_size)
        return cache

    def __call__(self, x: Float[Array, "b t d"], segment_ids: Ids | None = None) -> Float[Array, "b t d"]:
        """The layer over whole sequences x [b, t, d]; segment_ids [b, t] as in `gated_linear_attention`."""
        return self._mix(x, None, segment_ids)[0]

    def prefill(
        self, x: Float[Array, "b t d"], cache: dict[str, Array], segment_ids: Ids | None = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """The layer over x [b, t, d] after what the cache has seen; returns y and the cache after x.

        Negative segment ids (padding) leave the cache as it is. They may lie at the left of a row whose cache is still
        empty, and at the right of any.
        """
        if self.sequence_axis is not None:
            raise ValueError(f"sequence_axis: must be None where there is a cache, got {self.sequence_axis!r}")
        return self._mix(x, cache, segment_ids)

    def step(self, x: Float[Array, "b d"], cache: dict[str, Array]) -> tuple[Float[Array, "b d"], dict[str, Array]]:
        """The layer for one token x [b, d] after what the cache has seen; time and memory do not depend on how much."""
        new: dict[str, Array] = {}
        projections = {"q_conv": self.q_proj(x), "k_conv": self.k_proj(x), "v_conv": self.v_proj(x)}
        for name, conv in self._convolutions().items():
            projections[name], new[name] = conv.step(projections[name], cache[name])
        q, k, v = (projections[name] for name in ("q_conv", "k_conv", "v_conv"))
        q, k, v, g = self._heads(q, k, v, self._gate(x))
        o, new["state"] = gated_linear_attention_step(q, k, v, g, cache["state"])
        return self._output(o, x), new

    def _mix(self, x: Array, cache: dict[str, Array] | None, segment_ids: Ids | None) -> tuple[Array, dict[str, Array]]:
        new: dict[str, Array] = {}
        projections = {"q_conv": self.q_proj(x), "k_conv": self.k_proj(x), "v_conv": self.v_proj(x)}
        for name, conv in self._convolutions().items():
            if cache is None:
                projections[name] = conv(projections[name], segment_ids)
            else:
                projections[name], new[name] = conv.prefill(projections[name], cache[name], segment_ids)
        q, k, v = (projections[name] for name in ("q_conv", "k_conv", "v_conv"))
        q, k, v, g = self._heads(q, k, v, self._gate(x))
        op = gated_linear_attention
        if self.sequence_axis is not None:
            op = functools.partial(sequence_parallel, axis=self.sequence_axis)
        o, state = op(
            q,
            k,
            v,
            g,
            initial_state=None if cache is None else cache["state"],
            output_final_state=cache is not None,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        if state is not None:
            new["state"] = state
        return self._output(o, x), new

    def _convolutions(self) -> dict[str, ShortConvolution]:
        convolutions = {"q_conv": self.q_conv, "k_conv": self.k_conv, "v_conv": self.v_conv}
        return {name: conv for name, conv in convolutions.items() if conv is not None}

    def _gate(self, x: Array) -> Array:
        """Log decays [..., hk * k], float32 whatever the inputs: the decays of many tokens are added up."""
        low = self.gate_down(x)
        assert self.gate_up.bias is not None
        up, bias = self.gate_up.kernel[...].astype(low.dtype), self.gate_up.bias[...].astype(jnp.float32)
        g = jax.nn.log_sigmoid(jnp.dot(low, up, preferred_element_type=jnp.float32) + bias) / self.gate_normalizer
        return g if self.gate_clamp is None else jnp.maximum(g, self.gate_clamp)

    def _heads(self, q: Array, k: Array, v: Array, g: Array) -> tuple[Array, Array, Array, Array]:
        q = q.reshape(*q.shape[:-1], self.num_heads, self.head_k)
        k, v, g = (x.reshape(*x.shape[:-1], self.num_kv_heads, -1) for x in (k, v, g))
        if self.feature_map is not None:
            q, k = FEATURE_MAPS[self.feature_map](q), FEATURE_MAPS[self.feature_map](k)
        return q, k, v, g

    def _output(self, o: Array, x: Array) -> Array:
        y = self.o_norm(o).reshape(*x.shape[:-1], -1)
        return self.o_proj(y if self.out_gate is None else y * jax.nn.silu(self.out_gate(x)))


def head_sizes(
    hidden_size: int, num_heads: int, num_kv_heads: int | None, expand_k: float, expand_v: float
) -> tuple[int, int]:
    """The widths k and v of one head; a ValueError that names the argument if they are not whole numbers."""
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise ValueError(f"num_kv_heads: must divide num_heads = {num_heads}, got {num_kv_heads}")
    sizes = []
    for name, expand in (("expand_k", expand_k), ("expand_v", expand_v)):
        width = hidden_size * expand
        if width < num_heads or width % num_heads:
            raise ValueError(
                f"{name}: hidden_size * {name} = {hidden_size} * {expand} must be a multiple of num_heads = {num_heads}"
            )
        sizes.append(int(width) // num_heads)
    return sizes[0], sizes[1]
