"""The language model's configuration."""

import dataclasses
from typing import Any, get_args

from gla_jax.attention import Implementation
from gla_jax.nn.attention import FEATURE_MAPS, OUTPUT_NORMS, head_sizes
from gla_jax.nn.mlp import mlp_width

__all__ = ["DTYPES", "REMAT_POLICIES", "GLAConfig"]

DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class GLAConfig:
    """A GLA language model (arXiv 2312.06635, section 4.4), in numbers, names and nothing else.

    Fields are plain, so that a config survives JSON (`dataclasses.asdict`, `GLAConfig(**fields)`) and makes flags.
    Every field is checked when the config is built: a ValueError names the field, what is allowed, and what it got.
    """

    vocab_size: int = 32000
    """Number of tokens."""
    hidden_size: int = 2048
    """Width of the residual stream."""
    num_layers: int = 24
    """Number of blocks."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Heads of keys, values, gates and states; None for as many as query heads."""
    expand_k: float = 0.5
    """Width of all keys together, against hidden_size."""
    expand_v: float = 1.0
    """Width of all values together, against hidden_size."""
    gate_low_rank: int = 16
    """Rank of the gate's projection."""
    gate_normalizer: float = 16.0
    """Divides the log decay."""
    gate_clamp: float | None = None
    """Least log decay of a token, or None; see `GatedLinearAttention` on when it makes a difference in speed."""
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
    """Norm of each head's output: rms or layer."""
    output_norm_affine: bool = True
    """Whether that norm has learned parameters."""
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
    """What is computed in: float32, bfloat16 or float16. Gates, states, norms and logits are float32 in any case."""
    param_dtype: str = "float32"
    """What parameters are stored in."""
    remat: str = "none"
    """What the backward pass recomputes: none, dots (all but matrix products), full (each block from its input)."""
    layer_unroll: int = 1
    """Blocks written out in a turn of the loop over layers: more run faster on a CPU, and compile longer."""
    implementation: str | None = None
    """Of the op: None for the best there is, or a name (see gated_linear_attention)."""
    sequence_axis: str | None = None
    """Mesh axis that time is sharded over in whole sequences (see sequence_parallel), or None."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            declared = field.type.__name__ if isinstance(field.type, type) else str(field.type)
            check_type(field.name, declared, getattr(self, field.name))
        at_least_one = ("vocab_size", "hidden_size", "num_layers", "num_heads", "gate_low_rank", "layer_unroll")
        for name in at_least_one:
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("expand_k", "expand_v", "gate_normalizer", "mlp_ratio", "norm_eps", "init_std"):
            self._require(name, getattr(self, name) > 0, "positive")
        self._require("gate_clamp", self.gate_clamp is None or self.gate_clamp < 0, "negative or None")
        self._require("conv_size", self.conv_size >= 0, "0 (none) or more")
        self._require("mlp_size", self.mlp_size is None or self.mlp_size >= 1, "at least 1 or None")
        choices = {
            "feature_map": (None, *FEATURE_MAPS),
            "output_norm": tuple(OUTPUT_NORMS),
            "dtype": DTYPES,
            "param_dtype": DTYPES,
            "remat": REMAT_POLICIES,
            "implementation": (None, *get_args(Implementation)),
        }
        for name, allowed in choices.items():
            self._require(name, getattr(self, name) in allowed, f"one of {', '.join(map(str, allowed))}")
        head_sizes(self.hidden_size, self.num_heads, self.num_kv_heads, self.expand_k, self.expand_v)

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}: must be {allowed}, got {getattr(self, name)!r}")

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLP."""
        return mlp_width(self.hidden_size, self.mlp_ratio) if self.mlp_size is None else self.mlp_size

    def replace(self, **changes: Any) -> "GLAConfig":
        """The same config with some fields changed, checked anew."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def tiny(cls) -> "GLAConfig":
        """0.9 M parameters over bytes, with short convolutions: trains on a CPU in minutes."""
        return cls(
            vocab_size=256,
            hidden_size=128,
            num_layers=4,
            num_heads=2,
            mlp_size=384,
            conv_size=4,
            tie_embeddings=True,
            init_std=0.05,
            layer_unroll=4,
        )

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


def check_type(name: str, declared: str, value: Any) -> None:
    """A ValueError if `value` is not of the `declared` type: int, float, bool or str, perhaps with " | None"."""
    base, *optional = declared.split(" | ")
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    fits = isinstance(value, kinds[base]) and (base == "bool" or not isinstance(value, bool))
    if not (fits or (optional and value is None)):
        raise ValueError(f"{name}: must be {declared}, got {value!r}")
