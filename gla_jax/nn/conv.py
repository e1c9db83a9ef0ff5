"""Depthwise causal convolution over time, a few taps long."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.nn.mlp import silu
from gla_jax.nn.sharding import parameter
from gla_jax.sequence_parallel import axis_size, is_manual, tokens_before


class ShortConvolution(nnx.Module):
    """A causal depthwise convolution, y_t = act(sum_{j < w} W[w-1-j] * x_{t-j} + b), one filter a channel.

    Tokens of another segment count as zero: x_{t-j} enters only if no change of segment id lies between t-j and t.
    It is computed as w shifted multiply-adds, which on CPUs takes a fraction of the time of a grouped convolution.

    Args:
      channels: number of channels c.
      size: number of taps w >= 1; W is [w, c], its last row multiplies the current token.
      bias: whether b [c] exists; it starts at 0. W starts uniform in +-1/sqrt(w).
      activation: whether act is silu (else the identity).
      axis: logical sharding name of the channels.
      sequence_axis: mesh axis over which a call's x is sharded in time, or None; each device then sends its last w - 1
        inputs to the next one. `prefill` and `step` are for None.
      dtype: computed in; None for the input's.
      param_dtype: of W and b.
      rngs: of W.

    Raises:
      ValueError: size is less than 1.
    """

    def __init__(
        self,
        channels: int,
        size: int = 4,
        *,
        bias: bool = False,
        activation: bool = True,
        axis: str | None = "heads",
        sequence_axis: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if size < 1:
            raise ValueError(f"size: a convolution needs at least one tap, got {size}")
        self.channels, self.size, self.activation, self.dtype = channels, size, activation, dtype
        self.sequence_axis = sequence_axis
        bound = size**-0.5

        def uniform(key: Array, shape: tuple[int, ...], param_dtype: Any) -> Array:
            return jax.random.uniform(key, shape, param_dtype, -bound, bound)

        self.kernel = parameter(uniform, (size, channels), (None, axis), param_dtype=param_dtype, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.bias = (
            parameter(zeros, (channels,), (axis,), param_dtype=param_dtype, rngs=rngs) if bias else nnx.data(None)
        )

    def init_cache(self, batch_size: int) -> Float[Array, "b w1 c"]:
        """The w - 1 inputs before the first token of batch_size sequences, [b, w-1, c]: zeros."""
        return jnp.zeros((batch_size, self.size - 1, self.channels), self._cache_dtype())

    def __call__(self, x: Float[Array, "b t c"], segment_ids: Ids | None = None) -> Float[Array, "b t c"]:
        """Convolve x [b, t, c] over time; segment_ids [b, t] as in `gated_linear_attention`."""
        if self.sequence_axis is not None and self.size > 1:
            return self._convolve_pieces(x, segment_ids, self.sequence_axis)
        return self._convolve(x, None, self._segments_after_past(segment_ids))

    def prefill(
        self, x: Float[Array, "b t c"], cache: Float[Array, "b w1 c"], segment_ids: Ids | None = None
    ) -> tuple[Float[Array, "b t c"], Float[Array, "b w1 c"]]:
        """Convolve x [b, t, c] after the inputs in the cache; returns y and the cache after each row's last token.

        Negative segment_ids [b, t] (padding) may lie at the left of a row whose cache is still empty, and at the right
        of any.
        """
        y = self._convolve(x, cache, self._segments_after_past(segment_ids))
        past = self.size - 1
        history = jnp.concatenate([cache.astype(x.dtype), x], 1)
        if segment_ids is None:
            return y, history[:, history.shape[1] - past :].astype(cache.dtype)
        # Position in history of each row's last token (one before its start if it has none), and its w - 1 inputs.
        t = jnp.arange(x.shape[1])
        last = past + jnp.max(jnp.where(segment_ids >= 0, t, -1), axis=1)
        index = last[:, None] + jnp.arange(1 - past, 1)
        segments = jnp.pad(_segments(segment_ids), ((0, 0), (past, 0)))
        own = jnp.take_along_axis(segments, index, 1) == jnp.take_along_axis(segments, last[:, None], 1)
        kept = jnp.take_along_axis(history, index[..., None], 1)
        return y, jnp.where(own[..., None], kept, 0).astype(cache.dtype)

    def step(
        self, x: Float[Array, "b c"], cache: Float[Array, "b w1 c"]
    ) -> tuple[Float[Array, "b c"], Float[Array, "b w1 c"]]:
        """One token x [b, c] after the inputs in the cache."""
        window = jnp.concatenate([cache.astype(x.dtype), x[:, None]], 1)
        taps, bias = self._weights()
        y = jnp.sum(window * taps.astype(self.dtype or x.dtype), 1)
        return self._finish(y, bias, x.dtype), window[:, 1:].astype(cache.dtype)

    def _cache_dtype(self) -> Any:
        return self.dtype or self.kernel.dtype

    def _weights(self) -> tuple[Array, Array | None]:
        return self.kernel[...], None if self.bias is None else self.bias[...]

    def _finish(self, y: Array, bias: Array | None, dtype: Any) -> Array:
        if bias is not None:
            y = y + bias.astype(y.dtype)
        return (silu(y) if self.activation else y).astype(self.dtype or dtype)

    def _segments_after_past(self, segment_ids: Ids | None) -> Array | None:
        return None if segment_ids is None else jnp.pad(_segments(segment_ids), ((0, 0), (self.size - 1, 0)))

    def _convolve_pieces(self, x: Array, segment_ids: Any, axis: str) -> Array:
        """The convolution of x and segment_ids sharded in time, each device after the inputs of the one before."""

        def piece(x: Array, ids: Any, weights: tuple[Array, Array | None]) -> Array:
            past = tokens_before(x, self.size - 1, axis)
            segments: Any = None
            if ids is not None:  # before the first device's all inputs are zero, and any id will do
                segments = _segments(jnp.concatenate([tokens_before(ids, self.size - 1, axis), ids], 1))
            return self._convolve(x, past, segments, weights)

        devices = axis_size(axis)
        if is_manual(axis):
            return piece(x, segment_ids, self._weights())
        if x.shape[1] % devices:
            raise ValueError(f"x: t must be a multiple of the {devices} devices of axis {axis!r}, got {x.shape[1]}")
        time = PartitionSpec(None, axis)
        sharded = jax.shard_map(piece, in_specs=(time, time, PartitionSpec()), out_specs=time, axis_names={axis})
        return sharded(x, segment_ids, self._weights())

    def _convolve(
        self, x: Array, past: Array | None, segments: Array | None, weights: tuple[Array, Array | None] | None = None
    ) -> Array:
        """x after its past [b, w-1, c], None for zeros; `segments` numbers the segments of both."""
        taps, bias = weights or self._weights()
        taps, length = taps.astype(self.dtype or x.dtype), x.shape[1]
        if past is None:  # not zeros beside x: on Explicit mesh axes they would have to lie as x does
            history = jnp.pad(x, ((0, 0), (self.size - 1, 0), (0, 0)))
        else:
            history = jnp.concatenate([past.astype(x.dtype), x], 1)
        y = x * taps[-1]
        for j in range(1, self.size):
            start = self.size - 1 - j
            shifted = history[:, start : start + length]
            if segments is not None:
                same = segments[:, start : start + length] == segments[:, self.size - 1 :]
                shifted = jnp.where(same[..., None], shifted, 0)
            y = y + shifted * taps[-1 - j]
        return self._finish(y, bias, x.dtype)


class TokenShift(ShortConvolution):
    """The token before, y_t = x_{t-1}, and zeros at the start of a document: a convolution without parameters.

    Args:
      channels: number of channels c.
      dtype: of the cache; None for float32.
    """

    def __init__(self, channels: int, *, dtype: Any = None):
        self.channels, self.size, self.activation, self.dtype = channels, 2, False, dtype
        self.sequence_axis = None
        self.bias = nnx.data(None)

    def _cache_dtype(self) -> Any:
        return self.dtype or jnp.float32

    def _weights(self) -> tuple[Array, Array | None]:
        return jnp.asarray([[1.0], [0.0]]), None


def _segments(segment_ids: Ids) -> Ids:
    """Number the runs of equal ids in each row; the first run that is not padding gets 0, where a cache continues."""
    change = segment_ids[:, 1:] != segment_ids[:, :-1]
    runs = jnp.pad(jnp.cumsum(change, 1), ((0, 0), (1, 0)))
    first = jnp.min(jnp.where(segment_ids >= 0, runs, runs.shape[1]), axis=1, keepdims=True)
    return runs - first
