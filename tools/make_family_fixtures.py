"""Make tests/data/family: small random models of the peers, their checkpoints as they save them, and their logits.

Needs PyTorch, transformers, triton and flash-linear-attention (a CPU is enough: Triton's interpreter runs its kernels),
none of which the library or its tests need:

    pip install torch transformers triton einops safetensors && pip install --no-deps flash-linear-attention fla-core
    python tools/make_family_fixtures.py tests/data/family

    python tools/make_family_fixtures.py --check FOLDER    # FOLDER/*: their classes load it, and give expected.npz

GLA_OFFICIAL=checkout of github.com/berlino/gated_linear_attention adds the paper's first release, whose kernels are
replaced by the recurrence as flash-linear-attention of that time defined it (scale k^-0.5 besides the layer's own).

A folder a model: config.json and *.safetensors as the peer writes them (bfloat16), and expected.npz with tokens [b, t]
and the float32 logits [b, t, vocab] of the same weights; for a layer alone (simple_gla, lightning) all in expected.npz.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import json
import pathlib
import sys
import warnings
from typing import Any

import fla.layers.simple_gla
import fla.models
import numpy as np
import torch
import transformers
from transformers.models.minimax import modeling_minimax
from triton.runtime import autotuner

warnings.simplefilter("ignore")
# There is nothing to time without a GPU; the first configuration is as right as any.
autotuner.Autotuner.do_bench = property(lambda self: lambda *a, **k: 0.0)
autotuner.Autotuner._bench = lambda self, *a, config, **k: [0.0] * 3

SIZES: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2}
FLA: dict[str, Any] = {**SIZES, "intermediate_size": 40, "fuse_norm": False, "fuse_cross_entropy": False}
HF: dict[str, Any] = {**SIZES, "intermediate_size": 40, "num_attention_heads": 4}


def models() -> dict[str, Any]:
    """The models by name."""
    m, t = fla.models, transformers
    gla = {**FLA, "fuse_swiglu": False, "num_heads": 2}
    mamba = {**SIZES, "state_size": 4, "conv_kernel": 4}
    return {
        "gla": m.GLAForCausalLM(m.GLAConfig(**gla)),
        "gla_conv": m.GLAForCausalLM(
            m.GLAConfig(**gla, use_short_conv=True, conv_size=3, num_kv_heads=1, clamp_min=-0.05, feature_map="relu")
        ),
        "gla_tied": m.GLAForCausalLM(m.GLAConfig(**gla, tie_word_embeddings=True, use_output_gate=False)),
        "retnet": m.RetNetForCausalLM(m.RetNetConfig(**gla)),
        "hgrn2": m.HGRN2ForCausalLM(m.HGRN2Config(**{**gla, "num_heads": None}, expand_ratio=8)),
        "linear_attn": m.LinearAttentionForCausalLM(m.LinearAttentionConfig(**gla)),
        "linear_attn_normalised": m.LinearAttentionForCausalLM(
            m.LinearAttentionConfig(**gla, feature_map="elu", norm_feature_map=True, num_kv_heads=1)
        ),
        "rwkv6": m.RWKV6ForCausalLM(m.RWKV6Config(**FLA, num_heads=2, proj_low_rank_dim=4, gate_low_rank_dim=6)),
        "mamba2": m.Mamba2ForCausalLM(
            m.Mamba2Config(**SIZES, state_size=8, head_dim=16, num_heads=4, chunk_size=16, fuse_cross_entropy=False)
        ),
        "hf_mamba2": t.Mamba2ForCausalLM(
            t.Mamba2Config(**SIZES, state_size=8, head_dim=16, num_heads=4, n_groups=1, chunk_size=16)
        ),
        "hf_mamba": t.MambaForCausalLM(t.MambaConfig(**mamba, time_step_rank=3)),
        "hf_llama": t.LlamaForCausalLM(t.LlamaConfig(**HF, num_key_value_heads=2)),
        "hf_mistral": t.MistralForCausalLM(t.MistralConfig(**HF, num_key_value_heads=2, sliding_window=7)),
    }


@torch.no_grad()
def randomise(module: torch.nn.Module) -> None:
    """Random numbers in every parameter, of sizes that make each matter, exact in bfloat16."""
    for name, param in module.named_parameters():
        centre = 1.0 if name.endswith("D") or ("norm" in name and name.endswith("weight")) else 0.0
        std = 0.3 if param.ndim == 1 or name.endswith(("lower_bounds", "A_log", "bonus")) else 0.2
        values = centre + std * torch.randn(param.shape)
        param.copy_(values.to(torch.bfloat16).to(param.dtype))


@torch.no_grad()
def save_model(folder: pathlib.Path, name: str, model: Any) -> None:
    """A checkpoint and its logits."""
    randomise(model)
    model = model.float().eval()
    tokens = torch.randint(
        0, SIZES["vocab_size"], (2, 33)
    )  # past 64 tokens fla takes kernels that the interpreter cannot run
    logits = model(tokens).logits  # past 64 tokens fla takes kernels that the interpreter cannot run
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB" if name == "gla" else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy(), logits=logits.numpy())
    print(name, tuple(logits.shape), f"std {logits.std():.3f}")


@torch.no_grad()
def save_layers(folder: pathlib.Path) -> None:
    """Layers that are no model of their own there."""
    x = torch.randn(2, 33, 32)
    simple = fla.layers.simple_gla.SimpleGatedLinearAttention(hidden_size=32, num_heads=2, fuse_norm=False, layer_idx=0)
    config = transformers.MiniMaxConfig(**HF, head_dim=8, num_key_value_heads=2, block_size=8)
    lightning = modeling_minimax.MiniMaxLightningAttention(config, layer_idx=1)
    for name, layer in (("simple_gla", simple), ("lightning", lightning)):
        randomise(layer)
        layer = layer.float().eval()
        more = {} if name == "simple_gla" else {"position_embeddings": None, "attention_mask": None}
        y = layer(x, **more)[0]
        (folder / name).mkdir(exist_ok=True)
        arrays = {f"param.{key}": value.float().numpy() for key, value in layer.named_parameters()}
        np.savez_compressed(folder / name / "expected.npz", x=x.numpy(), y=y.numpy(), **arrays)
        print(name, tuple(y.shape), f"std {y.std():.3f}")


def official() -> Any:
    """The paper's first release, with its own code for all but the kernel."""
    sys.path.insert(0, os.environ["GLA_OFFICIAL"])
    import fla.ops.gla

    for name in ("fused_chunk_gla", "chunk_gla", "fused_recurrent_gla"):
        setattr(fla.ops.gla, name, getattr(fla.ops.gla, name, None))
    import gla
    import gla_model

    def recurrent(q: Any, k: Any, v: Any, g: Any) -> Any:
        state, out = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3]), []
        for t in range(q.shape[2]):
            state = g[:, :, t].exp()[..., None] * state + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, None] * q.shape[3] ** -0.5 @ state)[:, :, 0])
        return torch.stack(out, 2)

    gla.fused_recurrent_gla = recurrent
    # What transformers asks of a model class has grown since.
    gla_model.GLAForCausalLM.all_tied_weights_keys = {}
    config = gla_model.GLAConfig(d_model=32, n_head=2, n_layer=2, vocab_size=SIZES["vocab_size"])
    return gla_model.GLAForCausalLM(config)


@torch.no_grad()
def check(folder: pathlib.Path) -> None:
    """That their classes load what lies in each folder, and give the logits beside it."""
    for path in sorted(p.parent for p in folder.glob("*/expected.npz")):
        if not (path / "config.json").exists() or "official" in path.name:
            continue
        # Some model types have a class on both sides.
        name = json.loads((path / "config.json").read_text())["architectures"][0]
        kind = getattr(transformers if path.name.startswith("hf_") else fla.models, name)
        model, report = kind.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        want = np.load(path / "expected.npz")
        got = model.eval()(torch.from_numpy(want["tokens"])).logits.numpy()
        wrong = {key: value for key, value in report.items() if value}
        ratio = np.sqrt(np.mean((got - want["logits"]) ** 2) / np.mean(want["logits"] ** 2))
        print(f"{path.name:24s} max {np.abs(got - want['logits']).max():.1e}, rms ratio {ratio:.1e}", wrong or "")


def main(folder: pathlib.Path) -> None:
    """All of them, or those named."""
    chosen = sys.argv[2:]
    made = models() | ({"gla_official": official()} if "GLA_OFFICIAL" in os.environ else {})
    for name, model in made.items():
        if not chosen or name in chosen:
            torch.manual_seed(len(name) + 7)
            save_model(folder / name, name, model)
    if not chosen or "layers" in chosen:
        torch.manual_seed(0)
        save_layers(folder)


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        check(pathlib.Path(sys.argv[2]))
    else:
        main(pathlib.Path(sys.argv[1]))
