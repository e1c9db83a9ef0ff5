"""Mamba: the selective scan, a baseline whose state is no sum of outer products, so not a case of the op."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.mamba2 import _inverse_softplus_of_time_steps
from gla_jax.nn.recurrent import Layer, Making, MixerConfig
from gla_jax.nn.sharding import linear, parameter
from gla_jax.segments import segment_starts


@dataclasses.dataclass(frozen=True, kw_only=True)
class MambaConfig(MixerConfig):
    """The options of `Mamba`."""

    state_size: int = 16
    """Numbers of state a channel (the paper's N)."""
    expand: int = 2
    """Inner width, against hidden_size."""
    conv_size: int = 4
    """Taps of the short convolution."""
    conv_bias: bool = True
    """Whether the short convolution has a bias."""
    projection_bias: bool = False
    """Whether the input and output projections have a bias."""
    time_step_rank: int | None = None
    """Rank of the projection to dt; None for hidden_size / 16, rounded up."""
    chunk: int = 64
    """Tokens that the scan holds all states of at once."""

    def _check(self) -> None:
        self._at_least(1, "state_size", "expand", "conv_size", "chunk")
        self._require("time_step_rank", self.time_step_rank is None or self.time_step_rank >= 1, "at least 1 or None")


class _Inputs(NamedTuple):
    """What the recurrence reads: u, dt [..., c] and B, C [..., n], float32."""

    u: Array
    dt: Array
    B: Array
    C: Array


class Mamba(Layer):
    """The Mamba layer (arXiv 2312.00752, algorithm 2 and section 3.4).

        u, z = split(x W_in),   u through a short convolution with silu
        dt, B, C = split(u W_x),   dt = softplus(dt W_dt + b)
        s_t = exp(-exp(A) dt_t) * s_{t-1} + dt_t u_t B_t^T,   y_t = s_t C_t + D u_t      (state [c, n], A [c, n])
        y = (y * silu(z)) W_out

    The decay differs in every number of the state, which is why this is no case of `gated_linear_attention`; the
    recurrence is an associative scan over `chunk` tokens at a time, and the backward computes each chunk again from the
    state before it, so that memory is linear in time. x and y are [b, t, d] in `dtype`; the scan is float32.

    Arguments and errors as in `GatedLinearAttention`, where `implementation` and `norm_eps` have no meaning here;
    options are the fields of `MambaConfig`.
    """

    config_type = MambaConfig

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        self.config = config
        self.width = config.expand * hidden_size
        self.rank = config.time_step_rank or -(-hidden_size // 16)
        common, weights, made = making.parts, making.weights, making.parameters
        bias = config.projection_bias
        self.in_proj = linear(hidden_size, 2 * self.width, ("embed", "mlp"), bias=bias, **weights)
        self.conv = ShortConvolution(self.width, config.conv_size, bias=config.conv_bias, axis="mlp", **common)
        self.x_proj = linear(self.width, self.rank + 2 * config.state_size, ("mlp", None), **weights)
        self.dt_proj = linear(self.rank, self.width, (None, "mlp"), init_std=self.rank**-0.5, **common)
        self.dt_bias = parameter(_inverse_softplus_of_time_steps, (self.width,), ("mlp",), **made)
        self.A_log = parameter(_log_of_1_to_n, (self.width, config.state_size), ("mlp", None), **made)
        self.D = parameter(nnx.initializers.ones, (self.width,), ("mlp",), **made)
        self.out_proj = linear(self.width, hidden_size, ("mlp", "embed"), bias=bias, **weights)

    def init_cache(self, batch_size: int) -> dict[str, Array]:
        """What batch_size sequences are before their first token: {"state": zeros [b, c, n], "conv": its inputs}."""
        state = jnp.zeros((batch_size, self.width, self.config.state_size), jnp.float32)
        return {"state": state, "conv": self.conv.init_cache(batch_size)}

    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Ids | None = None, layer_input: Any = None
    ) -> Float[Array, "b t d"]:
        """The layer over whole sequences x [b, t, d]; segment_ids [b, t] as in `gated_linear_attention`.

        layer_input is not read.
        """
        return self._mix(x, None, segment_ids)[0]

    def prefill(
        self, x: Float[Array, "b t d"], cache: dict[str, Array], segment_ids: Ids | None = None, layer_input: Any = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """The layer over x [b, t, d] after what the cache has seen; the rest as in `GatedLinearAttention.prefill`."""
        return self._mix(x, cache, segment_ids)

    def step(
        self, x: Float[Array, "b d"], cache: dict[str, Array], layer_input: Any = None
    ) -> tuple[Float[Array, "b d"], dict[str, Array]]:
        """The layer for one token x [b, d] after what the cache has seen, in constant time; layer_input is not read."""
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        u, conv = self.conv.step(u, cache["conv"])
        inputs = self._inputs(u)
        decay, write = _decay_and_write(self._decay_rates(), inputs)
        state = decay * cache["state"] + write
        y = jnp.einsum("bcn,bn->bc", state, inputs.C, precision=jax.lax.Precision.HIGHEST)
        return self._output(y, inputs, z), {"state": state, "conv": conv}

    def _mix(self, x: Array, cache: dict[str, Array] | None, segment_ids: Ids | None) -> tuple[Array, dict[str, Array]]:
        u, z = jnp.split(self.in_proj(x), 2, axis=-1)
        new: dict[str, Array] = {}
        if cache is None:
            u = self.conv(u, segment_ids)
            before = jnp.zeros_like(u[:, 0, :, None], jnp.float32)  # of u, to lie as it does on Explicit mesh axes
            before = jnp.broadcast_to(before, (*before.shape[:2], self.config.state_size))
        else:
            u, new["conv"] = self.conv.prefill(u, cache["conv"], segment_ids)
            before = cache["state"]
        inputs, starts = self._inputs(u), None
        if segment_ids is not None:
            ids = jnp.asarray(segment_ids)
            starts, valid = segment_starts(ids), (ids >= 0)[..., None]
            inputs = inputs._replace(dt=jnp.where(valid, inputs.dt, 0))  # decay 1, nothing written
        y, state = selective_scan(*inputs, self._decay_rates(), before, starts, chunk=self.config.chunk)
        return self._output(y, inputs, z), {"state": state, **new}

    def _inputs(self, u: Array) -> _Inputs:
        edges = (self.rank, self.rank + self.config.state_size)
        low, b, c = jnp.split(self.x_proj(u), edges, axis=-1)
        dt = jax.nn.softplus(self.dt_proj(low).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        return _Inputs(u.astype(jnp.float32), dt, b.astype(jnp.float32), c.astype(jnp.float32))

    def _decay_rates(self) -> Array:
        return -jnp.exp(self.A_log[...].astype(jnp.float32))

    def _output(self, y: Array, inputs: _Inputs, z: Array) -> Array:
        y = y + self.D[...].astype(jnp.float32) * inputs.u
        return self.out_proj((y * jax.nn.silu(z.astype(jnp.float32))).astype(z.dtype))


def selective_scan(
    u: Float[Array, "b t c"],
    dt: Float[Array, "b t c"],
    B: Float[Array, "b t n"],
    C: Float[Array, "b t n"],
    A: Float[Array, "c n"],
    state: Float[Array, "b c n"],
    starts: Array | None = None,
    *,
    chunk: int = 64,
) -> tuple[Float[Array, "b t c"], Float[Array, "b c n"]]:
    """s_t = exp(A dt_t) * s_{t-1} + dt_t u_t B_t^T and y_t = s_t C_t (arXiv 2312.00752, equation 2a and 2b).

    Args:
      u: [b, t, c] inputs, float32, as all arrays.
      dt: [b, t, c] time steps, at least 0.
      B: [b, t, n].
      C: [b, t, n].
      A: [c, n], at most 0.
      state: [b, c, n] before the first token.
      starts: [b, t] bool, tokens before which the state is set to zero; None for no token.
      chunk: tokens whose states are held at once; the backward computes them again, chunk by chunk.

    Returns:
      y [b, t, c] and the state [b, c, n] after the last token.
    """
    time = u.shape[1]
    rows = -(-time // chunk) * chunk
    inputs = _Inputs(u, dt, B, C)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, rows - time)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state: Array, xs: tuple[_Inputs, Array | None]) -> tuple[Array, Array]:
        inputs, starts = xs
        decay, write = _decay_and_write(A, inputs)
        if starts is not None:
            decay = jnp.where(starts[..., None, None], 0, decay)
        write = write.at[:, 0].add(decay[:, 0] * state)
        _, states = jax.lax.associative_scan(_then, (decay, write), axis=1)
        return states[:, -1], jnp.einsum("btcn,btn->btc", states, inputs.C, precision=jax.lax.Precision.HIGHEST)

    xs = jax.tree.map(chunks, (inputs, starts))
    state, y = jax.lax.scan(body, state, xs)
    return jnp.moveaxis(y, 0, 1).reshape(u.shape[0], rows, -1)[:, :time], state


def _decay_and_write(A: Array, inputs: _Inputs) -> tuple[Array, Array]:
    """exp(A dt) and dt u B^T, both [..., c, n]."""
    return jnp.exp(inputs.dt[..., None] * A), (inputs.dt * inputs.u)[..., None] * inputs.B[..., None, :]


def _then(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    return first[0] * second[0], second[0] * first[1] + second[1]


def _log_of_1_to_n(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=jnp.float32)), shape).astype(dtype)
