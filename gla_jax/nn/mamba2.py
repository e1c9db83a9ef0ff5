"""Mamba-2: the state-space dual as gated linear attention with a scalar gate a head."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gla_jax.array_types import Array
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.recurrent import Making, MixerConfig, RecurrentLayer
from gla_jax.nn.sharding import linear, parameter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """The options of `Mamba2`."""

    state_size: int = 128
    """Width k of the state's keys (the paper's N)."""
    head_size: int = 64
    """Width v of a head (the paper's P)."""
    expand: int = 2
    """Width of all heads together, against hidden_size."""
    num_groups: int = 1
    """Sets of B and C, each shared by as many heads; also the groups of the output norm."""
    conv_size: int = 4
    """Taps of the short convolution of x, B and C."""
    conv_bias: bool = True
    """Whether the short convolution has a bias."""
    projection_bias: bool = False
    """Whether the input and output projections have a bias."""
    time_step_min: float = 0.0
    """The least dt."""
    time_step_max: float | None = None
    """The largest dt, or None."""

    def _check(self) -> None:
        self._at_least(1, "state_size", "head_size", "expand", "num_groups", "conv_size")
        self._require("time_step_min", self.time_step_min >= 0, "at least 0")
        self._require(
            "time_step_max",
            self.time_step_max is None or self.time_step_max > self.time_step_min,
            f"above time_step_min = {self.time_step_min} or None",
        )


class Mamba2(RecurrentLayer):
    """The Mamba-2 layer (arXiv 2405.21060, equation 2 and section 7).

        z, (u, B, C), dt = split(x W_in),   (u, B, C) through one short convolution with silu
        dt = clip(softplus(dt + b), time_step_min, time_step_max)       (a number a head)
        S_t = exp(-exp(A) dt_t) S_{t-1} + B_t^T (dt_t u_t),   o_t = C_t S_t + D u_t      (a head)
        y = (norm(concat_heads(o) * silu(z))) W_out

    In the op: q = C, k = B, v = dt u, g = -exp(A) dt [b, t, h], scale 1; a group's B and C are repeated for its heads,
    the gate stays a scalar. State [b, h, state_size, head_size]. The norm is RMSNorm over each group's channels, as in
    the authors' code. Arguments, shapes and errors as in `GatedLinearAttention`; options are the fields of
    `Mamba2Config`.
    """

    config_type = Mamba2Config
    convolutions = ("conv",)
    scale = 1.0

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        self.config = config
        self.norm_eps, self.width = making.norm_eps, config.expand * hidden_size
        if self.width % config.head_size:
            raise ValueError(f"head_size: must divide expand * hidden_size = {self.width}, got {config.head_size}")
        self.num_heads = self.width // config.head_size
        if self.num_heads % config.num_groups:
            raise ValueError(f"num_groups: must divide the heads, {self.num_heads}, got {config.num_groups}")
        common, made = making.parts, making.parameters
        weights = {"bias": config.projection_bias, **making.weights}
        keys = config.num_groups * config.state_size
        self.in_proj = linear(hidden_size, 2 * self.width + 2 * keys + self.num_heads, ("embed", "heads"), **weights)
        self.conv = ShortConvolution(self.width + 2 * keys, config.conv_size, bias=config.conv_bias, **common)
        self.dt_bias = parameter(_inverse_softplus_of_time_steps, (self.num_heads,), (None,), **made)
        self.A_log = parameter(_log_uniform_1_to_16, (self.num_heads,), (None,), **made)
        self.D = parameter(nnx.initializers.ones, (self.num_heads,), (None,), **made)
        self.norm_scale = parameter(nnx.initializers.ones, (self.width,), (None,), **made)
        self.out_proj = linear(self.width, hidden_size, ("heads", "embed"), **weights)

    def _state_shape(self) -> tuple[int, int, int]:
        return self.num_heads, self.config.state_size, self.config.head_size

    def _streams(self, x: Array) -> dict[str, Array]:
        projected = self.in_proj(x)
        edges = (self.width, projected.shape[-1] - self.num_heads)
        z, conv, dt = jnp.split(projected, edges, axis=-1)
        return {"z": z, "conv": conv, "dt": dt}

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        config = self.config
        dt = jax.nn.softplus(streams["dt"].astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        dt = jnp.clip(dt, config.time_step_min, config.time_step_max)
        g = -jnp.exp(self.A_log[...].astype(jnp.float32)) * dt
        edges = (self.width, self.width + config.num_groups * config.state_size)
        u, b, c = jnp.split(streams["conv"], edges, axis=-1)
        u = streams["u"] = u.reshape(*x.shape[:-1], self.num_heads, config.head_size)

        def for_heads(y: Array) -> Array:
            y = y.reshape(*x.shape[:-1], config.num_groups, config.state_size)
            return jnp.repeat(y, self.num_heads // config.num_groups, axis=-2)

        return {
            "q": for_heads(c),
            "k": for_heads(b),
            "v": (dt[..., None] * u.astype(jnp.float32)).astype(u.dtype),
            "g": g,
        }

    def _output(self, o: Array, x: Array, streams: dict[str, Array], arguments: dict[str, Any]) -> Array:
        y = o.astype(jnp.float32) + self.D[...].astype(jnp.float32)[:, None] * streams["u"].astype(jnp.float32)
        y = y.reshape(*x.shape[:-1], -1) * jax.nn.silu(streams["z"].astype(jnp.float32))
        groups = y.reshape(*x.shape[:-1], self.config.num_groups, -1)
        groups = groups * jax.lax.rsqrt(jnp.mean(groups * groups, -1, keepdims=True) + self.norm_eps)
        y = groups.reshape(y.shape) * self.norm_scale[...].astype(jnp.float32)
        return self.out_proj(y.astype(o.dtype))


def _inverse_softplus_of_time_steps(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """softplus of these is log-uniform from 0.001 to 0.1, as both Mamba papers start."""
    dt = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(0.1)))
    return (dt + jnp.log(-jnp.expm1(-dt))).astype(dtype)


def _log_uniform_1_to_16(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0)).astype(dtype)
