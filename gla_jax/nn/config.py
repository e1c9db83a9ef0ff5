"""The language model's configuration."""

import dataclasses
from typing import Any, get_args

from gla_jax.attention import Implementation
from gla_jax.nn.attention import GatedLinearAttentionConfig, SimpleGatedLinearAttentionConfig
from gla_jax.nn.checked import Checked, check_type
from gla_jax.nn.hgrn2 import HGRN2Config
from gla_jax.nn.mamba import MambaConfig
from gla_jax.nn.mamba2 import Mamba2Config
from gla_jax.nn.mlp import mlp_width
from gla_jax.nn.norm import LayerNorm, RMSNorm
from gla_jax.nn.recurrent import MixerConfig, head_width
from gla_jax.nn.retention import LightningAttentionConfig, LinearAttentionConfig, RetentionConfig
from gla_jax.nn.rwkv6 import RWKV6Config
from gla_jax.nn.softmax_attention import SoftmaxAttentionConfig

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "dots", "full")
NORMS = {"rms": RMSNorm, "layer": LayerNorm}
MLPS = ("swiglu", "channel_mix", "none")
# The layers by the names that runs and flags have for them.
MIXERS: dict[str, type[MixerConfig]] = {
    "gla": GatedLinearAttentionConfig,
    "simple_gla": SimpleGatedLinearAttentionConfig,
    "retnet": RetentionConfig,
    "lightning": LightningAttentionConfig,
    "linear": LinearAttentionConfig,
    "hgrn2": HGRN2Config,
    "rwkv6": RWKV6Config,
    "mamba2": Mamba2Config,
    "mamba": MambaConfig,
    "attention": SoftmaxAttentionConfig,
}
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 128,
    "num_layers": 4,
    "mlp_size": 384,
    "tie_embeddings": True,
    "init_std": 0.05,
    "layer_unroll": 4,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """What every language model has, whatever mixes its tokens over time."""

    vocab_size: int = 32000
    """Number of tokens."""
    hidden_size: int = 2048
    """Width of the residual stream."""
    num_layers: int = 24
    """Number of blocks."""
    mlp_ratio: float = 4.0
    """MLP width: two thirds of this times hidden_size, rounded up to a multiple of 256."""
    mlp_size: int | None = None
    """MLP width, if given outright."""
    norm_eps: float = 1e-6
    """Epsilon of every norm."""
    tie_embeddings: bool = False
    """Whether the output layer is the transposed embedding."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    dtype: str = "float32"
    """What is computed in: float32, bfloat16 or float16. States, norms, logits, a head's gates are float32 anyway."""
    param_dtype: str = "float32"
    """What parameters are stored in."""
    remat: str = "none"
    """What the backward pass recomputes: none, dots (all but matrix products), full (each block from its input)."""
    layer_unroll: int = 1
    """Blocks written out in a turn of the loop over layers: more run faster, as a loop copies what the backward needs
    of each, and compile longer."""
    implementation: str | None = None
    """Of the op: None for the best there is, or a name (see gated_linear_attention)."""
    sequence_axis: str | None = None
    """Mesh axis that time is sharded over in whole sequences (see sequence_parallel), or None."""

    def _check(self) -> None:
        self._at_least(1, "vocab_size", "hidden_size", "num_layers", "layer_unroll")
        self._positive("mlp_ratio", "norm_eps", "init_std")
        self._require("mlp_size", self.mlp_size is None or self.mlp_size >= 1, "at least 1 or None")
        for name, allowed in (("dtype", DTYPES), ("param_dtype", DTYPES), ("remat", REMAT_POLICIES)):
            self._one_of(name, allowed)
        self._one_of("implementation", (None, *get_args(Implementation)))
        if self.sequence_axis is not None and {type(mixer) for mixer in self.mixers} != {GatedLinearAttentionConfig}:
            raise ValueError(
                f"sequence_axis: must be None but for gated linear attention in all layers, got {self.sequence_axis!r}"
            )

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """Layer i mixes over time as mixers[i % len(mixers)] says."""
        raise NotImplementedError

    @property
    def cache_limit(self) -> int | None:
        """The most tokens that decoding can see: the least of its mixers' cache_limit, or None."""
        attending = (mixer for mixer in self.mixers if isinstance(mixer, SoftmaxAttentionConfig))
        return min((mixer.cache_limit for mixer in attending if mixer.cache_limit is not None), default=None)

    @property
    def norm(self) -> str:
        """Norm of the residual stream: rms or layer."""
        return "rms"

    @property
    def embed_norm(self) -> bool:
        """Whether the embedding is normalised before the first block."""
        return False

    @property
    def mlp(self) -> str:
        """What a block has after its mixer: swiglu, channel_mix or none."""
        return "swiglu"

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_size is None and self.mlp == "channel_mix":
            return -(-int(self.hidden_size * 3.5) // 32) * 32  # RWKV-6's
        return mlp_width(self.hidden_size, self.mlp_ratio) if self.mlp_size is None else self.mlp_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLMConfig(ModelConfig):
    """A language model of any of the layers, or of a pattern of them.

    `mixer` is the config of one kind of layer, or a tuple of configs that repeats over the layers: three
    `GatedLinearAttentionConfig`s and a `SoftmaxAttentionConfig(window=1024)` make every fourth layer attend. A pattern
    must repeat a whole number of times; one as long as the model gives every layer its own.
    """

    mixer: MixerConfig | tuple[MixerConfig, ...]
    """What mixes tokens over time."""
    norm: str = "rms"
    """Norm of the residual stream: rms or layer."""
    embed_norm: bool = False
    """Whether the embedding is normalised before the first block."""
    mlp: str = "swiglu"
    """What a block has after its mixer: swiglu, channel_mix (RWKV-6) or none (Mamba)."""

    def _check(self) -> None:
        super()._check()
        self._one_of("norm", tuple(NORMS))
        self._one_of("mlp", MLPS)
        check_type("embed_norm", "bool", self.embed_norm)
        if not self.mixers or not all(isinstance(mixer, MixerConfig) for mixer in self.mixers):
            raise ValueError(f"mixer: must be a layer's config, or a tuple of them, got {self.mixer!r}")
        if self.num_layers % len(self.mixers):
            raise ValueError(
                f"mixer: a pattern of {len(self.mixers)} layers must divide num_layers = {self.num_layers}"
            )

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """The pattern, of one config if there is one kind of layer."""
        return self.mixer if isinstance(self.mixer, tuple) else (self.mixer,)

    @classmethod
    def tiny(cls, mixer: str) -> "CausalLMConfig":
        """`GLAConfig.tiny` with another layer; the rest of a block as that layer's paper has it.

        mixer is gla, simple_gla, retnet, lightning, linear, hgrn2, rwkv6, mamba2, mamba or attention.

        Raises:
          ValueError: mixer is none of these.
        """
        if mixer not in MIXERS:
            raise ValueError(f"mixer: must be one of {', '.join(MIXERS)}, got {mixer!r}")
        kind, rest = MIXERS[mixer], dict(TINY)
        options = {"num_heads": 2} if "num_heads" in kind.__dataclass_fields__ else {}
        if mixer == "hgrn2":
            options = {"expand_ratio": 64}
        if mixer == "rwkv6":
            rest |= {"mlp": "channel_mix", "norm": "layer", "embed_norm": True}
        if mixer in ("mamba", "mamba2"):
            rest |= {"mlp": "none"}
        return cls(mixer=kind(**options), **rest)

    @classmethod
    def transformer_340m(cls) -> "CausalLMConfig":
        """The paper's small Transformer++: 341.1 M parameters (tied embeddings)."""
        mixer = SoftmaxAttentionConfig(num_heads=16)
        return cls(mixer=mixer, hidden_size=1024, num_layers=24, tie_embeddings=True)

    @classmethod
    def transformer_1_3b(cls) -> "CausalLMConfig":
        """The paper's large Transformer++: 1.364 B parameters."""
        return cls(mixer=SoftmaxAttentionConfig(num_heads=32), hidden_size=2048, num_layers=24)

    @classmethod
    def retnet_340m(cls) -> "CausalLMConfig":
        """The paper's small RetNet, with a SwiGLU MLP: 347.4 M parameters (tied embeddings)."""
        return cls(
            mixer=RetentionConfig(num_heads=4), hidden_size=1024, num_layers=24, mlp_ratio=2.0, tie_embeddings=True
        )

    @classmethod
    def retnet_1_3b(cls) -> "CausalLMConfig":
        """The paper's large RetNet, with a SwiGLU MLP: 1.352 B parameters."""
        return cls(mixer=RetentionConfig(num_heads=8), hidden_size=2048, num_layers=24, mlp_ratio=2.0)

    @classmethod
    def mamba_340m(cls) -> "CausalLMConfig":
        """The paper's small Mamba, the authors' 370m: 352.8 M parameters with its 32000 tokens (tied embeddings)."""
        return cls(mixer=MambaConfig(), hidden_size=1024, num_layers=48, mlp="none", norm_eps=1e-5, tie_embeddings=True)

    @classmethod
    def mamba_1_3b(cls) -> "CausalLMConfig":
        """The paper's large Mamba, the authors' 1.4b: 1.335 B parameters with its 32000 tokens (tied embeddings)."""
        return cls(mixer=MambaConfig(), hidden_size=2048, num_layers=48, mlp="none", norm_eps=1e-5, tie_embeddings=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLAConfig(GatedLinearAttentionConfig, ModelConfig):
    """A GLA language model (arXiv 2312.06635, section 4.4), in numbers, names and nothing else.

    Fields are plain, so that a config survives JSON (`dataclasses.asdict`, `GLAConfig(**fields)`) and makes flags.
    Every field is checked when the config is built: a ValueError names the field, what is allowed, and what it got.
    """

    def _check(self) -> None:
        ModelConfig._check(self)
        GatedLinearAttentionConfig._check(self)
        for name in ("expand_k", "expand_v"):
            head_width(name, self.hidden_size, getattr(self, name), self.num_heads)

    @property
    def mixers(self) -> tuple[MixerConfig, ...]:
        """One kind of layer."""
        names = (field.name for field in dataclasses.fields(GatedLinearAttentionConfig))
        return (GatedLinearAttentionConfig(**{name: getattr(self, name) for name in names}),)

    @classmethod
    def tiny(cls) -> "GLAConfig":
        """0.9 M parameters over bytes, with short convolutions: trains on a CPU in minutes."""
        return cls(num_heads=2, conv_size=4, **TINY)

    @classmethod
    def gla_340m(cls) -> "GLAConfig":
        """The paper's small model: 341.7 M parameters (tied embeddings)."""
        return cls(hidden_size=1024, num_layers=24, num_heads=4, tie_embeddings=True)

    @classmethod
    def gla_1_3b(cls) -> "GLAConfig":
        """The paper's large model, 1.366 B parameters, laid out as the checkpoint fla-hub/gla-1.3B-100B."""
        return cls(hidden_size=2048, num_layers=24, num_heads=4)

    @classmethod
    def gla_2_7b(cls) -> "GLAConfig":
        """2.704 B parameters, laid out as the checkpoint fla-hub/gla-2.7B-100B."""
        return cls(hidden_size=2560, num_layers=32, num_heads=5)
