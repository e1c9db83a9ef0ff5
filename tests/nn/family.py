"""One small model of every kind of layer, and the options of each that change its mathematics."""

from typing import Any

from gla_jax.nn import (
    CausalLMConfig,
    GatedLinearAttentionConfig,
    HGRN2Config,
    LightningAttentionConfig,
    LinearAttentionConfig,
    Mamba2Config,
    MambaConfig,
    RetentionConfig,
    RWKV6Config,
    SimpleGatedLinearAttentionConfig,
    SoftmaxAttentionConfig,
)

GLA = GatedLinearAttentionConfig(num_heads=2, gate_low_rank=4, conv_size=3)
WINDOW = SoftmaxAttentionConfig(num_heads=4, num_kv_heads=2, window=5)

MIXERS = {
    "gla": GLA,
    "simple gla": SimpleGatedLinearAttentionConfig(num_heads=4, num_kv_heads=2, gate_normalizer=1.0),
    "linear": LinearAttentionConfig(num_heads=2),
    "linear, normalised": LinearAttentionConfig(num_heads=2, num_kv_heads=1, normalize=True, output_norm="none"),
    "linear, learned map": LinearAttentionConfig(num_heads=2, feature_map="product", output_gate=True),
    "retention": RetentionConfig(num_heads=2),
    "retention, no positions": RetentionConfig(num_heads=2, rope_theta=None, conv_size=2),
    "lightning": LightningAttentionConfig(num_heads=4),
    "hgrn2": HGRN2Config(expand_ratio=8),
    "hgrn2, convolved": HGRN2Config(expand_ratio=16, conv_size=3, conv_bias=True),
    "rwkv6": RWKV6Config(num_heads=2, shift_low_rank=4, gate_low_rank=5),
    "mamba2": Mamba2Config(state_size=8, head_size=16),
    "mamba2, groups": Mamba2Config(state_size=4, head_size=8, num_groups=4, time_step_min=0.01, time_step_max=0.5),
    "mamba": MambaConfig(state_size=4, chunk=8),
    "softmax": SoftmaxAttentionConfig(num_heads=4, num_kv_heads=2, cache_size=40),
    "window": WINDOW,
    "hybrid": (GLA, WINDOW, HGRN2Config(expand_ratio=16), Mamba2Config(state_size=4, head_size=16)),
    "hybrid, two": (MambaConfig(state_size=4, chunk=8), SoftmaxAttentionConfig(num_heads=2, cache_size=40)),
}


def model_of(name: str, **changes) -> CausalLMConfig:
    """The test's model with this mixer, as its paper has the rest of it."""
    rest: dict[str, Any] = {"num_layers": 4 if name.startswith("hybrid") else 2}
    if name == "rwkv6":
        rest |= {"norm": "layer", "embed_norm": True, "mlp": "channel_mix"}
    elif name.startswith("mamba"):
        rest |= {"mlp": "none"}
    return CausalLMConfig(
        mixer=MIXERS[name],
        vocab_size=37,
        hidden_size=32,
        mlp_size=48,
        init_std=0.2,
        norm_eps=1e-5,
        implementation="reference",
        **{**rest, **changes},
    )


CONFIGS = {name: model_of(name) for name in MIXERS}
