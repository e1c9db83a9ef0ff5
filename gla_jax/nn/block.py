"""One layer of the model: mixing over time, then the MLP."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from gla_jax.array_types import Array, Ids
from gla_jax.nn.config import NORMS, ModelConfig
from gla_jax.nn.mlp import SwiGLU
from gla_jax.nn.norm import fork
from gla_jax.nn.recurrent import MixerConfig
from gla_jax.nn.rwkv6 import ChannelMix


class Block(nnx.Module):
    """A pre-norm block, Y = X + mixer(norm(X)), then Y + MLP(norm(Y)); without an MLP, Y alone.

    arXiv 2312.06635, section 4.4, where the second line prints "+ X"; the authors' code adds Y, and so do we.
    The block asks of its mixer only `__call__`, `init_cache`, `prefill` and `step`.

    Args:
      config: shapes, options and dtypes.
      mixer: the layer's own, one of config.mixers; None for the first.
      rngs: of the initial parameters.
    """

    def __init__(self, config: ModelConfig, mixer: MixerConfig | None = None, *, rngs: nnx.Rngs):
        dtype, param_dtype = jnp.dtype(config.dtype), jnp.dtype(config.param_dtype)
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        norm = NORMS[config.norm]
        self.mixer_norm = norm(config.hidden_size, eps=config.norm_eps, **common)
        mixing: dict[str, Any] = {
            "norm_eps": config.norm_eps,
            "init_std": config.init_std,
            "implementation": config.implementation,
        }
        if config.sequence_axis is not None:
            mixing["sequence_axis"] = config.sequence_axis
        self.mixer: Any = (mixer or config.mixers[0]).build(config.hidden_size, **mixing, **common)
        self.mlp: Any = nnx.data(None)
        if config.mlp == "none":
            return
        self.mlp_norm = norm(config.hidden_size, eps=config.norm_eps, **common)
        mlp = SwiGLU if config.mlp == "swiglu" else ChannelMix
        self.mlp = mlp(config.hidden_size, config.mlp_width, init_std=config.init_std, **common)

    def init_cache(self, batch_size: int) -> Any:
        """The cache before the first token of batch_size sequences: the mixer's, a dictionary, and a ChannelMix's."""
        cache = self.mixer.init_cache(batch_size)
        return {**cache, "mlp": self.mlp.init_cache(batch_size)} if isinstance(self.mlp, ChannelMix) else cache

    def __call__(
        self, x: Float[Array, "b t d"], segment_ids: Ids | None = None, layer_input: Any = None
    ) -> Float[Array, "b t d"]:
        """The block over whole sequences x [b, t, d]; segment_ids [b, t] and layer_input as its mixer takes them."""
        with jax.named_scope("mixer"):
            x, z = fork(self.mixer_norm, x)
            y = x + self.mixer(z, segment_ids, layer_input)
        if isinstance(self.mlp, ChannelMix):
            return y + self.mlp(self.mlp_norm(y), segment_ids)
        with jax.named_scope("mlp"):
            return self._feed_forward(y)

    def prefill(
        self, x: Float[Array, "b t d"], cache: Any, segment_ids: Ids | None = None, layer_input: Any = None
    ) -> tuple[Float[Array, "b t d"], Any]:
        """The block over x [b, t, d] after what the cache has seen, and the cache after x.

        segment_ids [b, t] and layer_input are as its mixer takes them.
        """
        y, new = self.mixer.prefill(self.mixer_norm(x), cache, segment_ids, layer_input)
        y = x + y
        if isinstance(self.mlp, ChannelMix):
            z, new["mlp"] = self.mlp.prefill(self.mlp_norm(y), cache["mlp"], segment_ids)
            return y + z, new
        return self._feed_forward(y), new

    def step(self, x: Float[Array, "b d"], cache: Any, layer_input: Any = None) -> tuple[Float[Array, "b d"], Any]:
        """The block for one token x [b, d], and the cache after it; layer_input as its mixer takes it."""
        y, new = self.mixer.step(self.mixer_norm(x), cache, layer_input)
        y = x + y
        if isinstance(self.mlp, ChannelMix):
            z, new["mlp"] = self.mlp.step(self.mlp_norm(y), cache["mlp"])
            return y + z, new
        return self._feed_forward(y), new

    def _feed_forward(self, y: Array) -> Array:
        if self.mlp is None:
            return y
        y, z = fork(self.mlp_norm, y)
        return y + self.mlp(z)
