"""What the layers on the op share: a cache, whole sequences, prefill, and one token at a time."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, cast, get_args

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.attention import Implementation, gated_linear_attention
from gla_jax.nn.checked import Checked, check_type
from gla_jax.nn.conv import ShortConvolution
from gla_jax.nn.rope import positions_after
from gla_jax.sequence_parallel import sequence_parallel
from gla_jax.step import Stacked, gated_linear_attention_step, step_in_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(Checked):
    """The options of one kind of layer that mixes over time; `build` makes the layer."""

    layer: ClassVar[type["Layer"]]
    """The class whose `config_type` this is."""
    layer_input: ClassVar[str | None] = None
    """What a model hands each of its layers, or None: "depth" or "lower_bound"."""

    def build(self, hidden_size: int, **common: Any) -> nnx.Module:
        """The layer for a model of width hidden_size; `common` are the arguments that all layers take."""
        return self.layer(hidden_size, **self.options(), **common)

    def options(self) -> dict[str, Any]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


class Making(NamedTuple):
    """What a layer makes its parts with, as they take it."""

    norm_eps: float
    init_std: float
    dtype: Any
    param_dtype: Any
    rngs: nnx.Rngs

    @property
    def parameters(self) -> dict[str, Any]:
        """For a parameter alone."""
        return {"param_dtype": self.param_dtype, "rngs": self.rngs}

    @property
    def parts(self) -> dict[str, Any]:
        """For a norm or a convolution."""
        return {"dtype": self.dtype, **self.parameters}

    @property
    def weights(self) -> dict[str, Any]:
        """For a projection."""
        return {"init_std": self.init_std, **self.parts}


class Layer(nnx.Module):
    """What mixes tokens over time. A kind of layer names its config and makes its parts (`_make`)."""

    config_type: ClassVar[type[MixerConfig]]
    """The options that the constructor takes beside its own arguments."""
    implementation: Any = None
    """Of the op: None for the best there is, or a name (see `gated_linear_attention`)."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "config_type" in vars(cls):  # of its own, not its parent's
            cls.config_type.layer = cls

    def __init__(
        self,
        hidden_size: int,
        *,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        implementation: Implementation | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        config = self.config_type(**options)
        self.implementation = check_common(hidden_size, norm_eps, init_std, implementation)
        self._make(hidden_size, config, Making(norm_eps, init_std, dtype, param_dtype, rngs))

    def _make(self, hidden_size: int, config: Any, making: Making) -> None:
        raise NotImplementedError


class RecurrentLayer(Layer):
    """A layer whose memory is the op's state [b, hk, k, v], float32, of a size that does not depend on the past.

    A kind of layer says which streams it projects x to (`_streams`; a stream with the name of a short convolution goes
    through it), which arguments of the op they make (`_arguments`), and what becomes of its output (`_output`).
    """

    convolutions: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold a short convolution, or None."""
    reads_positions: ClassVar[bool] = False
    """Whether `_arguments` needs each token's place in its document."""
    scale: float | None = None
    """What the op multiplies queries by; None for k^-0.5."""
    sequence_axis: str | None = None
    """Mesh axis over which whole sequences are sharded in time, or None."""

    def _state_shape(self) -> tuple[int, int, int]:
        """[hk, k, v] of the state."""
        raise NotImplementedError

    def _streams(self, x: Array) -> dict[str, Array]:
        raise NotImplementedError

    def _arguments(self, streams: dict[str, Array], x: Array, position: Any, layer_input: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _output(self, o: Array, x: Array, streams: dict[str, Array], arguments: dict[str, Any]) -> Array:
        raise NotImplementedError

    def init_cache(self, batch_size: int) -> dict[str, Array]:
        """What batch_size sequences are before their first token: zeros, the state [b, hk, k, v] and convolutions'."""
        cache = {"state": jnp.zeros((batch_size, *self._state_shape()), jnp.float32)}
        for name, conv in self._convolutions().items():
            cache[name] = conv.init_cache(batch_size)
        if self.reads_positions:
            cache["position"] = jnp.zeros((batch_size,), jnp.int32)
        return cache

    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Ids | None = None, layer_input: Any = None
    ) -> Float[Array, "b t d"]:
        """The layer over whole sequences x [b, t, d]; segment_ids [b, t] as in `gated_linear_attention`.

        layer_input is what a model hands its layers, if the config says so: a lower bound for HGRN-2, a layer's depth
        for lightning attention, None for the others.
        """
        return self._mix(x, None, segment_ids, layer_input)[0]

    def prefill(
        self, x: Float[Array, "b t d"], cache: dict[str, Array], segment_ids: Ids | None = None, layer_input: Any = None
    ) -> tuple[Float[Array, "b t d"], dict[str, Array]]:
        """The layer over x [b, t, d] after what the cache has seen; returns y and the cache after x.

        Negative segment_ids [b, t] (padding) leave the cache as it is. They may lie at the left of a row whose cache is
        still empty, and at the right of any. layer_input is as in a call.

        Raises:
          ValueError: sequence_axis is not None.
        """
        if self.sequence_axis is not None:
            raise ValueError(f"sequence_axis: must be None where there is a cache, got {self.sequence_axis!r}")
        return self._mix(x, cache, segment_ids, layer_input)

    def step(
        self, x: Float[Array, "b d"], cache: dict[str, Any], layer_input: Any = None
    ) -> tuple[Float[Array, "b d"], dict[str, Any]]:
        """The layer for one token x [b, d] after what the cache has seen; time and memory do not depend on how much.

        The cache's state may be `Stacked`, and then the new one is. layer_input is as in a call.
        """
        new: dict[str, Any] = {}
        streams = self._streams(x)
        for name, conv in self._convolutions().items():
            streams[name], new[name] = conv.step(streams[name], cache[name])
        position = cache.get("position")
        if position is not None:
            new["position"] = position + 1
        arguments = _with_rounded_gates(self._arguments(streams, x, position, layer_input))
        step: Any = step_in_stack if isinstance(cache["state"], Stacked) else gated_linear_attention_step
        o, new["state"] = step(**arguments, state=cache["state"], scale=self.scale)
        return self._output(o, x, streams, arguments), new

    def _mix(
        self, x: Array, cache: dict[str, Array] | None, segment_ids: Ids | None, layer_input: Any
    ) -> tuple[Array, dict[str, Array]]:
        new: dict[str, Array] = {}
        streams = self._streams(x)
        for name, conv in self._convolutions().items():
            if cache is None:
                streams[name] = conv(streams[name], segment_ids)
            else:
                streams[name], new[name] = conv.prefill(streams[name], cache[name], segment_ids)
        position = None
        if self.reads_positions:
            start = None if cache is None else cache["position"]
            position, new["position"] = positions_after(x.shape[:2], start, segment_ids)
        arguments = _with_rounded_gates(self._arguments(streams, x, position, layer_input))
        op = gated_linear_attention
        if self.sequence_axis is not None:
            op = functools.partial(sequence_parallel, axis=self.sequence_axis)
        o, state = op(
            **arguments,
            scale=self.scale,
            initial_state=None if cache is None else cache["state"],
            output_final_state=cache is not None,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        if state is not None:
            new["state"] = state
        return self._output(o, x, streams, arguments), new

    def _convolutions(self) -> dict[str, ShortConvolution]:
        found = {name: getattr(self, name) for name in self.convolutions}
        return {name: conv for name, conv in found.items() if conv is not None}


def _with_rounded_gates(arguments: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments, with gates in the keys' dtype if there are as many: in float32 they are most of its input."""
    g, k = arguments["g"], arguments["k"]
    return {**arguments, "g": g.astype(k.dtype) if g is not None and g.ndim == k.ndim else g}


def check_common(hidden_size: int, norm_eps: float, init_std: float, implementation: Any) -> Implementation | None:
    """The implementation, once a layer's arguments outside of its config have been checked."""
    check_type("hidden_size", "int", hidden_size)
    if hidden_size < 1:
        raise ValueError(f"hidden_size: must be at least 1, got {hidden_size}")
    for name, value in (("norm_eps", norm_eps), ("init_std", init_std)):
        check_type(name, "float", value)
        if value <= 0:
            raise ValueError(f"{name}: must be positive, got {value!r}")
    allowed = (None, *get_args(Implementation))
    if implementation not in allowed:
        raise ValueError(f"implementation: must be one of {', '.join(map(str, allowed))}, got {implementation!r}")
    return cast(Implementation | None, implementation)


def head_width(name: str, hidden_size: int, expand: float, num_heads: int) -> int:
    """hidden_size * expand / num_heads; a ValueError that names the argument if it is not a whole number."""
    width = hidden_size * expand
    if width < num_heads or width % num_heads:
        raise ValueError(
            f"{name}: hidden_size * {name} = {hidden_size} * {expand} must be a multiple of num_heads = {num_heads}"
        )
    return int(width) // num_heads
