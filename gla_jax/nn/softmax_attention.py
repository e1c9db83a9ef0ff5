"""Softmax attention with rotary positions and a cache of a fixed number of tokens."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.nn.recurrent import Layer, Making, MixerConfig
from gla_jax.nn.rope import positions_after, rotate
from gla_jax.nn.sharding import linear
from gla_jax.segments import segment_starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionConfig(MixerConfig):
    """The options of `SoftmaxAttention`."""

    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int | None = None
    """Heads of keys and values (grouped-query attention); None for as many as query heads."""
    head_size: int | None = None
    """Width of a head; None for hidden_size / num_heads."""
    window: int | None = None
    """Tokens that a token sees, itself and those before it (sliding-window attention); None for all."""
    cache_size: int = 2048
    """Tokens that decoding keeps, if window is None; more are refused where their number is known."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have a bias."""

    kernel: str | None = None
    """Of `jax.nn.dot_product_attention` over whole sequences: xla, cudnn (NVIDIA GPUs, half precision), None for JAX's
    choice. Packed sequences, prefill and steps take JAX's choice."""

    def _check(self) -> None:
        self._at_least(1, "num_heads", "cache_size")
        self._positive("rope_theta")
        self._one_of("kernel", (None, "xla", "cudnn"))
        for name in ("window", "head_size"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1 or None")
        if self.num_kv_heads is not None and (self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads):
            raise ValueError(f"num_kv_heads: must divide num_heads = {self.num_heads}, got {self.num_kv_heads}")

    @property
    def cache_limit(self) -> int | None:
        """The most tokens that decoding can see: cache_size, or None with a window, which needs no more than it has."""
        return self.cache_size if self.window is None else None


class SoftmaxAttention(Layer):
    """Causal softmax attention, as in Llama: the Transformer++ of arXiv 2312.06635, section 5.1.

        q, k, v = rope(x W_q), rope(x W_k), x W_v
        y = concat_heads(softmax(head_size^-0.5 q k^T, over the tokens in the window) v) W_o

    by `jax.nn.dot_product_attention`. The cache is a ring of the newest `window` (or cache_size) keys and values,
    {"k", "v": [b, w, hk, head_size], "position": [b]}. Without a window, `prefill` and `step` raise a ValueError for
    more than cache_size tokens, if their number is known: it is not in compiled code that is handed the position, nor
    with segment_ids. There a token sees the newest cache_size, itself among them, in whatever pieces they come.
    Arguments and errors as in `GatedLinearAttention`, where `implementation` and `norm_eps` have no meaning here;
    options are the fields of `SoftmaxAttentionConfig`.
    """

    config_type = SoftmaxAttentionConfig

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        self.config = config
        if config.head_size is None and hidden_size % config.num_heads:
            raise ValueError(f"num_heads: must divide hidden_size = {hidden_size}, got {config.num_heads}")
        self.head_size = config.head_size or hidden_size // config.num_heads
        if self.head_size % 2:
            raise ValueError(f"head_size: rotary embedding needs an even head width, got {self.head_size}")
        self.num_kv_heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
        width, kv_width = config.num_heads * self.head_size, self.num_kv_heads * self.head_size
        weights, bias = making.weights, config.qkv_bias
        self.q_proj = linear(hidden_size, width, ("embed", "heads"), bias=bias, **weights)
        self.k_proj = linear(hidden_size, kv_width, ("embed", "kv_heads"), bias=bias, **weights)
        self.v_proj = linear(hidden_size, kv_width, ("embed", "kv_heads"), bias=bias, **weights)
        self.o_proj = linear(width, hidden_size, ("heads", "embed"), **weights)
        self.dtype = making.dtype or making.param_dtype

    def init_cache(self, batch_size: int) -> dict[str, Array]:
        """The cache before the first token of batch_size sequences: zeros, and position 0."""
        shape = (batch_size, self.config.window or self.config.cache_size, self.num_kv_heads, self.head_size)
        zeros = jnp.zeros(shape, self.dtype)
        return {"k": zeros, "v": zeros, "position": jnp.zeros((batch_size,), jnp.int32)}

    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Ids | None = None, layer_input: Any = None
    ) -> Float[Array, "b t d"]:
        """The layer over whole sequences x [b, t, d]; segment_ids [b, t] as in `gated_linear_attention`.

        layer_input is not read.
        """
        position, _ = positions_after(x.shape[:2], None, segment_ids)
        q, k, v = self._heads(x, position)
        window = None if self.config.window is None else (self.config.window - 1, 0)
        if segment_ids is None:
            kernel = cast(Any, self.config.kernel)
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, implementation=kernel)
            return self._output(y, x.shape)
        documents = _documents(segment_ids)
        mask = (documents[:, :, None] == documents[:, None]) & (segment_ids >= 0)[:, None]
        mask &= _near(position[:, :, None], position[:, None], self.config.window)
        return self._output(jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]), x.shape)

    def prefill(
        self, x: Float[Array, "b t d"], cache: dict[str, Array], segment_ids: Ids | None = None, layer_input: Any = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """The layer over x [b, t, d] after what the cache has seen; the rest as in `GatedLinearAttention.prefill`."""
        if segment_ids is None:
            check_room("x", self.config.cache_limit, cache, x.shape[1])
        size, (batch, time, _) = cache["k"].shape[1], x.shape
        position, after = positions_after(x.shape[:2], cache["position"], segment_ids)
        q, k, v = self._heads(x, position)
        ids = jnp.zeros((batch, time), jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
        documents, valid = _documents(ids), ids >= 0
        # What the ring holds is the first document's, from the newest place back.
        places = _places(cache["position"], size)
        seen = jnp.broadcast_to((places >= 0)[:, None], (batch, time, size)) & (documents == 0)[..., None]
        own = (documents[:, :, None] == documents[:, None]) & valid[:, None]
        near = _near(position[:, :, None], jnp.concatenate([places, position], 1)[:, None], size)
        mask = jnp.concatenate([seen, own], 2) & near
        keys, values = (jnp.concatenate([cache[n].astype(y.dtype), y], 1) for n, y in (("k", k), ("v", v)))
        y = jax.nn.dot_product_attention(q, keys, values, mask=mask[:, None])
        # The last document's newest tokens go to their slots.
        kept = valid & (documents == documents[:, -1:]) & (position >= (after - size)[:, None])
        slots = jnp.where(kept, position % size, size)
        rows = jnp.arange(batch)[:, None]
        new = {n: cache[n].at[rows, slots].set(y.astype(cache[n].dtype), mode="drop") for n, y in (("k", k), ("v", v))}
        return self._output(y, x.shape), {**new, "position": after}

    def step(
        self, x: Float[Array, "b d"], cache: dict[str, Array], layer_input: Any = None
    ) -> tuple[Float[Array, "b d"], dict[str, Array]]:
        """The layer for one token x [b, d] after what the cache has seen, in the time and memory of a full cache.

        layer_input is not read.
        """
        check_room("x", self.config.cache_limit, cache, 1)
        size, position = cache["k"].shape[1], cache["position"]
        q, k, v = self._heads(x[:, None], position[:, None])
        rows = jnp.arange(x.shape[0])
        new = {
            n: cache[n].at[rows, position % size].set(y[:, 0].astype(cache[n].dtype)) for n, y in (("k", k), ("v", v))
        }
        mask = _places(position + 1, size) >= 0
        y = jax.nn.dot_product_attention(
            q, new["k"].astype(q.dtype), new["v"].astype(q.dtype), mask=mask[:, None, None]
        )
        return self._output(y, (x.shape[0], 1))[:, 0], {**new, "position": position + 1}

    def _heads(self, x: Array, position: Array) -> tuple[Array, Array, Array]:
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.head_size) for p in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(q, position, self.config.rope_theta), rotate(k, position, self.config.rope_theta), v

    def _output(self, y: Array, shape: tuple[int, ...]) -> Array:
        return self.o_proj(y.reshape(*shape[:2], -1))


def check_room(name: str, limit: int | None, cache: Any, new: int) -> None:
    """A ValueError if the cache's and `new` tokens are known to be more than `limit`; a traced position counts as 0."""
    if limit is None:
        return
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    positions = [x for path, x in leaves if path[-1] == jax.tree_util.DictKey("position")]
    known = (x for x in positions if not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True))
    seen = max((int(np.max(np.asarray(x))) for x in known), default=0)
    if seen + new > limit:
        raise ValueError(
            f"{name}: softmax attention without a window must have at most cache_size = {limit} tokens, "
            f"got {new} after {seen}"
        )


def _near(query: Array, key: Array, window: int | None) -> Array:
    near = key <= query
    return near if window is None else near & (query - key < window)


def _documents(segment_ids: Ids) -> Array:
    """[b, t]: the number of documents that began before each token; 0 for the one that a cache continues."""
    return jnp.cumsum(segment_starts(jnp.asarray(segment_ids)), 1)


def _places(position: Array, size: int) -> Array:
    """[b, size]: the place of the token in each slot of a ring that has seen `position` tokens; negative if none."""
    newest = position[:, None] - 1
    return newest - (newest - jnp.arange(size)) % size
