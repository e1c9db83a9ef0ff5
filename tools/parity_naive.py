"""Compares logits with flash-linear-attention's models on a CPU, their ops by its own naive functions.

    python tools/parity_naive.py FOLDER --theirs OTHER_PYTHON --out benchmarks/results/parity-naive-cpu.json
    PYTHONPATH=. python tools/parity_naive.py FOLDER --theirs OTHER_PYTHON --fixtures tests/data/family

Models of 1, 2 and 4 blocks and of several seeds, of the sizes that tools/parity_gpu.py has on a GPU and of their own
default configs at the same width; made as there, every weight exact in bfloat16. OTHER_PYTHON has what that tool needs.
Two have one rounding less: cosines and sines, which theirs rounds to bfloat16 before it rotates, in float32; the log
decay rounded once, where theirs rounds the product, logsigmoid and the quotient.
Their ops are naive_recurrent_gla (GLA, HGRN2), naive_retention, naive_recurrent_linear_attn and naive_recurrent_rwkv6,
which compute in float32 and round their result; Mamba-2 takes its own torch_forward without mamba_ssm, softmax
attention is PyTorch's. What is beside an op, their norms, rotations, gates and convolutions, runs in Triton's
interpreter, rounding as a GPU does; the token shift, a difference in bfloat16, which that has not, by token_shift_ref.
Ours is what a user gets on a CPU, where XLA leaves some roundings out, and once with all of them. Every number is
RMS(x - y) / RMS(y) over logits.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
from parity_gpu import (  # pyrefly: ignore[missing-import]
    BARS,
    THEIR_VERSIONS,
    VERSIONS,
    families,
    place,
    ratio,
    round_to_nearest,
    save,
    take_first_configuration,
    their_class,
    tokens,
)

DEPTHS = (1, 2, 4)
# XLA leaves out roundings between what it fuses, unless it is told not to.
ROUNDED, ALL_ROUNDINGS = "bfloat16 with all roundings", {"xla_allow_excess_precision": False}
# Folders of tests/data/family.
FIXTURES = ("gla", "gla_conv", "retnet", "hgrn2", "linear_attn", "rwkv6", "mamba2")
# Theirs with one rounding less.
ROTATION = "retnet, their cosines and sines in float32"
DECAY = "gla, their log decay rounded once"


def models() -> dict[str, tuple[str, dict[str, Any]]]:
    """Class and options but for the number of blocks, by name."""
    sized = {
        name: (kind, options)
        for name, (package, kind, options) in families(False).items()
        if package == "fla" and options["num_hidden_layers"] == 2
    }
    width = {"hidden_size": 256, "vocab_size": 1024}
    # The other families' defaults are those sizes, or differ from them by the width of softmax attention's heads alone.
    defaults = {"gla, their defaults": ("GLA", width), "retnet, their defaults": ("RetNet", width)}
    return {**sized, **defaults, ROTATION: sized["retnet"], DECAY: defaults["gla, their defaults"]}


def cases(folder: pathlib.Path, seeds: int) -> list[tuple[str, int, int, pathlib.Path]]:
    """Name, blocks, seed, and where its files are."""
    return [
        (name, depth, seed, place(folder, f"{name} {depth} {seed}"))
        for name in models()
        for depth in DEPTHS
        for seed in range(seeds)
    ]


# Theirs.


def take_naive_ops() -> None:
    """Put their naive functions where their layers call kernels."""
    import fla.layers.gla
    import fla.layers.hgrn2
    import fla.layers.linear_attn
    import fla.layers.multiscale_retention
    import fla.layers.rwkv6
    import fla.models.rwkv6.modeling_rwkv6
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    # Their heads come third, where some naive functions have them second.
    swap = lambda *arrays: (x.transpose(1, 2) for x in arrays)

    def gla(q: Any, k: Any, v: Any, gk: Any = None, g: Any = None, **_: Any) -> Any:
        return naive_recurrent_gla(q, k, v, (g if gk is None else gk).to(q.dtype))

    def retention(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return naive_retention(*swap(q, k, v)).transpose(1, 2), None

    def linear(q: Any, k: Any, v: Any, normalize: bool, **_: Any) -> Any:
        return naive_recurrent_linear_attn(q, k, v, normalize=normalize)

    def rwkv6(r: Any, k: Any, v: Any, w: Any, u: Any, scale: float, **_: Any) -> Any:
        return naive_recurrent_rwkv6(*swap(r, k, v, w), u, scale)[0].transpose(1, 2), None

    layers = fla.layers
    for module, name, op in (
        (layers.gla, "gla", gla),
        (layers.hgrn2, "gla", gla),
        (layers.multiscale_retention, "retention", retention),
        (layers.linear_attn, "linear_attn", linear),
        (layers.rwkv6, "rwkv6", rwkv6),
    ):
        for called in [entry for entry in vars(module) if entry.endswith(f"_{name}")]:
            setattr(module, called, op)
    fla.layers.rwkv6.token_shift = fla.models.rwkv6.modeling_rwkv6.token_shift = token_shift_ref


def prepare() -> None:
    """Let theirs run without a GPU, as this page's beginning says."""
    import torch
    from fla.modules.activations import ops

    torch.set_num_threads(1)
    take_first_configuration()
    round_to_nearest()
    for kernel in [x for x in vars(ops).values() if hasattr(x, "configs")]:
        kernel.configs.reverse()  # numbers alone: their largest blocks take the interpreter a tenth of the time
    their_class("fla", "GLA")
    take_naive_ops()


def less_rounded(model: Any, name: str) -> None:
    """Take one of their roundings to bfloat16 away, where the case's name says so."""
    import torch

    for module in model.modules():
        if name == ROTATION and type(module).__name__ == "RotaryEmbedding":

            def rotate(q: Any, k: Any, _forward: Any = module.forward, **options: Any) -> Any:
                return tuple(x.to(q.dtype) for x in _forward(q.float(), k.float(), **options))

            module.forward = rotate
        if name == DECAY and type(module).__name__ == "GatedLinearAttention":

            def up(x: Any, layer: Any = module.gk_proj[1]) -> Any:
                return torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())

            module.gk_proj[1].forward = up


def logits_of(path: pathlib.Path, x: np.ndarray, dtype: str, case: str = "") -> np.ndarray:
    """Theirs of the checkpoint, for tokens x [b, t]."""
    import torch

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    model = their_class("fla", name.removesuffix("ForCausalLM"))[1].from_pretrained(path)
    model = model.to(getattr(torch, dtype)).eval()
    less_rounded(model, case)
    with torch.no_grad():
        return model(torch.from_numpy(x), use_cache=False).logits.float().numpy()


def run_theirs(folder: pathlib.Path, seeds: int) -> None:
    """Checkpoints and logits of all cases that are not there yet."""
    prepare()
    for name, depth, seed, where in cases(folder, seeds):
        if (where / "theirs.npz").exists():
            continue
        kind, options = models()[name]
        save("fla", kind, {**options, "num_hidden_layers": depth}, where, seed)
        # In float32 all seeds are alike.
        dtypes = BARS if seed == 0 else ("bfloat16",)
        logits = {dtype: logits_of(where, tokens(False), dtype, name) for dtype in dtypes}
        np.savez(where / "theirs.npz", **logits)
        print(f"theirs: {name}, {depth}, {seed}", flush=True)


def run_their_fixtures(folder: pathlib.Path, fixtures: pathlib.Path) -> None:
    """Their logits in bfloat16, as bits, of what `write_fixtures` has written to the folder."""
    prepare()
    for path in sorted(entry.parent for entry in folder.glob("*/config.json")):
        with np.load(fixtures / path.name / "expected.npz") as there:
            bits = logits_of(path, there["tokens"], "bfloat16").view(np.uint32)
        assert not (bits & 0xFFFF).any()
        np.savez_compressed(fixtures / path.name / "bfloat16.npz", logits=(bits >> 16).astype(np.uint16))


# Ours.


def write_fixtures(folder: pathlib.Path, fixtures: pathlib.Path) -> None:
    """Models of the tests as checkpoints, their weights as small as a new model's."""
    from gla_jax.interop import load_pretrained, save_pretrained
    from tests.nn.options import with_small_weights

    for name in FIXTURES:
        save_pretrained(with_small_weights(load_pretrained(fixtures / name)), folder / name, dtype="bfloat16")


def run_ours(folder: pathlib.Path, seeds: int) -> dict[str, Any]:
    """The result: of each number of blocks the ratios by seed."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gla_jax.interop import load_pretrained

    x, results, run = jnp.asarray(tokens(False), jnp.int32), {}, {}
    runs = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), ROUNDED: ("bfloat16", ALL_ROUNDINGS)}
    for name, depth, seed, where in cases(folder, seeds):
        logits = {}
        for which, (dtype, options) in runs.items():
            graphdef, state = nnx.split(load_pretrained(where, dtype=dtype))
            if seed == 0:  # the other seeds' graphs are the same
                call = lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x)
                run[which] = jax.jit(call, compiler_options=options)
            with jax.default_matmul_precision("highest" if dtype == "float32" else None):
                logits[which] = np.asarray(run[which](state, x))
        with np.load(where / "theirs.npz") as theirs:
            found = {
                "bfloat16": ratio(logits["bfloat16"], theirs["bfloat16"]),
                "our bfloat16 to float32": ratio(logits["bfloat16"], logits["float32"]),
                "their bfloat16 to float32": ratio(theirs["bfloat16"], logits["float32"]),
                ROUNDED: ratio(logits[ROUNDED], theirs["bfloat16"]),
                f"our {ROUNDED} to float32": ratio(logits[ROUNDED], logits["float32"]),
            }
            if seed == 0:
                found["float32"] = ratio(logits["float32"], theirs["float32"])
        print(f"{name}, {depth}, {seed}: {found}", flush=True)
        kind, options = models()[name]
        row = results.setdefault(name, {"class": f"fla.{kind}ForCausalLM", "options": options, "blocks": {}})
        for what, value in found.items():
            row["blocks"].setdefault(str(depth), {}).setdefault(what, []).append(value)
    return results


def main() -> None:
    """Theirs in a process of another Python, then ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="for checkpoints and logits, 3 GB")
    parser.add_argument("--out", type=pathlib.Path, help="where the result goes")
    parser.add_argument("--seeds", type=int, default=5, help="models of each kind")
    parser.add_argument("--theirs", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--fixtures", type=pathlib.Path, help="make only their logits beside the tests' checkpoints")
    parser.add_argument("--part", choices=["theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part and options.fixtures:
        run_their_fixtures(options.folder, options.fixtures)
        return
    if options.part:
        run_theirs(options.folder, options.seeds)
        return
    from gla_jax.records import begin  # needs JAX, which the Python of theirs may lack

    command = [options.theirs, __file__, str(options.folder), "--part", "theirs", "--seeds", str(options.seeds)]
    if options.fixtures:
        write_fixtures(options.folder, options.fixtures)
        command += ["--fixtures", str(options.fixtures)]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    if options.fixtures:
        return
    asked = (
        f"import importlib.metadata, json; print(json.dumps([importlib.metadata.version(x) for x in {THEIR_VERSIONS}]))"
    )
    versions = json.loads(subprocess.run([options.theirs, "-c", asked], check=True, stdout=subprocess.PIPE).stdout)
    record = begin("parity with naive ops", ["python", "tools/parity_naive.py", "FOLDER"], VERSIONS)
    record["versions"] |= dict(zip(THEIR_VERSIONS, versions, strict=True))
    record |= {"tokens_bt": list(tokens(False).shape), "bars": BARS}
    record["results"] = run_ours(options.folder, options.seeds)
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
