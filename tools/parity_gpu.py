"""Compares logits with flash-linear-attention's and transformers' own models on one GPU, for every family that we load.

    python tools/parity_gpu.py /tmp/parity --out benchmarks/results/parity-h100.json     # with a GPU
    python tools/parity_gpu.py /tmp/parity --small --theirs OTHER_PYTHON                 # two minutes on two cores

--small has tiny models and 48 tokens, and runs their kernels in Triton's interpreter, which has no bfloat16 arithmetic
(RWKV-6's token shift gives NaN there) and takes their recurrent kernels, not those in chunks.

Needs PyTorch, transformers, triton and flash-linear-attention beside the library (or another Python that has them). A
model is made by its own class and initialisation, with noise on parameters that start at a constant, so that each
matters; all are rounded to bfloat16, so that only arithmetic differs. Theirs runs in float32 (sums of products in full:
no TF32, "ieee" in Triton) and wholly in bfloat16; ours reads their safetensors and computes in float32 (highest
precision) and in bfloat16, with the implementation that a user would get. What ours writes of it theirs reads again.

Every number is RMS(x - y) / RMS(y) over logits, or over what a block hands to the next. Triton's autotuners take the
first configuration that runs: which is fastest makes no difference here.
"""

import argparse
import concurrent.futures
import datetime
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from typing import Any

import numpy as np

BARS = {"float32": 2e-3, "bfloat16": 1e-2}
NOISE = 0.1
VERSIONS = ("jax", "jaxlib", "flax")
THEIR_VERSIONS = ("torch", "triton", "transformers", "flash-linear-attention")


def families(small: bool) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Package, model and options by name."""
    sizes = {"vocab_size": 1024, "hidden_size": 512, "num_hidden_layers": 4}
    if small:
        sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
    width = {"intermediate_size": 96 if small else 1536}
    fla = {**sizes, **width, "num_heads": 2 if small else 4}
    mamba2 = {"state_size": 16, "head_dim": 16, "num_heads": 8} if small else {"num_heads": 16}
    llama = {**sizes, **width, "num_attention_heads": 8, "num_key_value_heads": 2}
    return {
        "gla": ("fla", "GLA", fla),
        "gla with convolutions": ("fla", "GLA", {**fla, "use_short_conv": True, "num_kv_heads": 1}),
        "retnet": ("fla", "RetNet", fla),
        "hgrn2": ("fla", "HGRN2", {**fla, "num_heads": None, "expand_ratio": 32 if small else 128}),
        "linear_attn": ("fla", "LinearAttention", fla),
        "rwkv6": ("fla", "RWKV6", fla),
        "mamba2": ("fla", "Mamba2", {**sizes, **mamba2, "chunk_size": 64}),
        "transformer": ("fla", "Transformer", {**fla, "num_kv_heads": 2}),
        "llama": ("transformers", "Llama", llama),
    }


def place(folder: pathlib.Path, family: str) -> pathlib.Path:
    """The family's own folder."""
    return folder / re.sub(r"\W+", "_", family)


def say(what: str) -> None:
    """A line of a process's log, with the seconds since the machine's start."""
    print(f"{time.monotonic():.1f} {what}", flush=True)


def ready(path: pathlib.Path) -> None:
    """Say that what lies at path is whole."""
    path.with_suffix(".ready").touch()


def wait(path: pathlib.Path) -> None:
    """Until another process has said so, or has failed."""
    while not path.with_suffix(".ready").exists():
        if any(path.parent.glob("*.failed")):
            raise RuntimeError(f"{path}: will not come")
        time.sleep(0.05)


def write(path: pathlib.Path, **values: Any) -> None:
    """Arrays and facts of one run."""
    np.savez(path.with_suffix(".npz"), **values)
    ready(path)


def tokens(small: bool) -> np.ndarray:
    """The same for every model."""
    sizes = families(small)["gla"][2]
    # Up to 64 tokens fla takes kernels that Triton's interpreter can run.
    shape = (2, 48) if small else (4, 1024)
    return np.random.default_rng(0).integers(0, sizes["vocab_size"], shape)


# Theirs.


def take_first_configuration() -> None:
    """Let Triton's autotuners try configurations only until one runs."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner._bench

    def bench(self: Any, *args: Any, config: Any, **meta: Any) -> Any:
        if getattr(self, "_found_for", None) is self.nargs:
            return [math.inf] * 3
        self.__dict__["do_bench"] = lambda call, quantiles: (call(), [0.0] * 3)[1]
        timings = original(self, *args, config=config, **meta)
        if timings[0] < math.inf:
            self._found_for = self.nargs
        return timings

    Autotuner._bench = bench


def round_to_nearest() -> None:
    """Let Triton's interpreter round float32 to bfloat16 as a GPU does; by itself it cuts off."""
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return original(x, source, target, mode)
        bits = np.frombuffer(x.tobytes(), np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).reshape(x.shape)

    interpreter._convert_float = convert


def their_class(package: str, name: str) -> tuple[Any, Any]:
    """Config and model."""
    import torch
    import transformers

    if package == "transformers":
        return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")
    import fla.layers.attn
    import fla.models

    def attention(q: Any, k: Any, v: Any, causal: bool, window_size: tuple[int, int]) -> Any:
        assert (causal, window_size) == (True, (-1, -1))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    # The package flash_attn, which fla's Transformer wants, is seldom there.
    if fla.layers.attn.flash_attn_func is None:
        fla.layers.attn.flash_attn_func = attention
    return getattr(fla.models, f"{name}Config"), getattr(fla.models, f"{name}ForCausalLM")


def make(family: str, folder: pathlib.Path, small: bool) -> None:
    """Save one of their models, every parameter exact in bfloat16."""
    import torch

    package, name, options = families(small)[family]
    config, model = their_class(package, name)
    torch.manual_seed(0)
    made = model(config(**options))
    with torch.no_grad():
        for param in made.parameters():
            if param.min() == param.max():
                param += NOISE * torch.randn(param.shape)
            param.copy_(param.to(torch.bfloat16).to(param.dtype))
    made.save_pretrained(folder / "theirs")
    say("made")
    ready(folder / "theirs")


def theirs(family: str, dtype: str, folder: pathlib.Path, small: bool) -> None:
    """Logits of their class in one dtype, of what it saved and of what we wrote of that."""
    import torch
    import triton

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    take_first_configuration()
    if small:
        round_to_nearest()
    say("imported PyTorch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    package, name, _ = families(small)[family]
    if dtype == "float32":
        triton.knobs.language.fp32_default = "ieee"
        make(family, folder, small)
    wait(folder / "theirs")

    @torch.no_grad()
    def run(path: pathlib.Path) -> tuple[Any, list[Any], dict[str, Any]]:
        # What their Transformer holds we write as a Llama, since no config of fla's would say less.
        llama = json.loads((path / "config.json").read_text())["model_type"] == "llama"
        _, kind = their_class("transformers", "Llama") if llama else their_class(package, name)
        model, report = kind.from_pretrained(path, output_loading_info=True)
        # from_pretrained(dtype=torch.bfloat16) leaves Mamba-2's norms in float32, and then its products fail.
        model, seen = model.to(device, getattr(torch, dtype)).eval(), []

        def see(module: Any, inputs: Any, outputs: Any) -> None:
            x = outputs[0] if isinstance(outputs, tuple) else outputs
            seen.append(x.float().cpu().numpy())

        for layer in getattr(model, "model", getattr(model, "backbone", None)).layers:
            layer.register_forward_hook(see)
        say(f"loaded {path.name}")
        logits = model(torch.from_numpy(tokens(small)).to(device), use_cache=False).logits
        say(f"ran {path.name}")
        return logits.float().cpu().numpy(), seen, {key: str(value) for key, value in report.items() if value}

    dots = "ieee" if dtype == "float32" else "tf32"
    try:
        logits, layers, wrong = run(folder / "theirs")
    except Exception as error:  # Triton's own, of several modules: a kernel without room or form for full float32
        if dtype != "float32":
            raise
        print(f"{family}: not in full float32, {type(error).__name__}: {str(error)[:200]}", flush=True)
        triton.knobs.language.fp32_default, dots = None, "tf32"
        logits, layers, wrong = run(folder / "theirs")
    versions = {package: importlib.metadata.version(package) for package in THEIR_VERSIONS}
    where = torch.cuda.get_device_name() if device == "cuda" else device
    facts = {"dots": dots, "versions": json.dumps(versions), "device": where, "wrong": json.dumps(wrong)}
    write(folder / f"theirs-{dtype}", logits=logits, blocks=np.stack(layers), **facts)
    wait(folder / "ours")
    logits, _, wrong = run(folder / "ours")
    write(folder / f"back-{dtype}", logits=logits, wrong=json.dumps(wrong))


# Ours.


def ours(family: str, folder: pathlib.Path, small: bool) -> None:
    """Logits of ours in both dtypes, and the checkpoint that it writes."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gla_jax.interop import load_pretrained, save_pretrained

    jax.devices()
    say("imported JAX")
    wait(folder / "theirs")
    save_pretrained(load_pretrained(folder / "theirs"), folder / "ours")
    ready(folder / "ours")
    say("wrote ours")
    x = jnp.asarray(tokens(small), jnp.int32)
    split = {dtype: nnx.split(load_pretrained(folder / "theirs", dtype=dtype)) for dtype in BARS}

    def precision(dtype: str) -> Any:
        return jax.default_matmul_precision("highest" if dtype == "float32" else None)

    for dtype, (graphdef, state) in split.items():
        with precision(dtype):
            program = jax.jit(lambda state, x, graphdef=graphdef: nnx.merge(graphdef, state)(x))
            compiled = program.lower(state, x).compile()
            kernels = len(re.findall(r'custom_call_target="mosaic_gpu', compiled.as_text()))
            parameters = sum(np.size(leaf) for leaf in jax.tree.leaves(state))
            say(f"compiled {dtype}")
            logits = np.asarray(compiled(state, x))
            say(f"ran {dtype}")
            write(folder / f"ours-{dtype}", logits=logits, kernels=kernels, parameters=parameters)
    # What entered each of their blocks in bfloat16, and what ours make of that, alone and one after another.
    wait(folder / "theirs-bfloat16")
    theirs = jnp.asarray(np.load(folder / "theirs-bfloat16.npz")["blocks"])
    for dtype, (graphdef, state) in split.items():

        def blocks(state: Any, x: Any, theirs: Any, graphdef: Any = graphdef) -> Any:
            model = nnx.merge(graphdef, state)
            first = model._embed(x)
            entering = jnp.concatenate([first[None], theirs[:-1].astype(first.dtype)])

            def run(x: Any, block: Any, own: Any, before: Any) -> tuple[Any, Any]:
                y = block(x, None, own)
                return y, (y.astype(jnp.float32), block(before, None, own).astype(jnp.float32))

            return model._scan(run, first, (entering,))[1][0]

        with precision(dtype):
            after, alone = jax.jit(blocks)(state, x, theirs)
        say(f"ran blocks in {dtype}")
        write(folder / f"alone-{dtype}", blocks=np.asarray(after), alone=np.asarray(alone))


# Both.


def ratio(x: np.ndarray | None, y: np.ndarray | None) -> float | None:
    """RMS(x - y) / RMS(y); None where one of them is missing, or that is no number."""
    if x is None or y is None:
        return None
    assert x.shape == y.shape, (x.shape, y.shape)
    value = np.sqrt(np.mean(np.square(x - y), dtype=np.float64) / np.mean(np.square(y), dtype=np.float64))
    return float(f"{value:.3g}") if np.isfinite(value) else None


def compare(family: str, folder: pathlib.Path, small: bool) -> dict[str, Any]:
    """The family's entry of the result, of what its processes left."""
    runs = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz") if path.with_suffix(".ready").exists()}
    package, name, options = families(small)[family]

    def get(run: str, what: str, *at: int) -> Any:
        return runs[run][what][at] if run in runs else None

    def four(ours: str, what: str, *at: int) -> dict[str, float | None]:
        half, full = (get(f"{ours}-{dtype}", what, *at) for dtype in ("bfloat16", "float32"))
        their_half, their_full = (get(f"theirs-{dtype}", what, *at) for dtype in ("bfloat16", "float32"))
        return {
            "float32": ratio(full, their_full),
            "bfloat16": ratio(half, their_half),
            "our bfloat16 to their float32": ratio(half, their_full),
            "their bfloat16 to their float32": ratio(their_half, their_full),
        }

    def alone(block: int) -> dict[str, float | None]:
        half, full = (get(f"alone-{dtype}", "alone", block) for dtype in ("bfloat16", "float32"))
        theirs = get("theirs-bfloat16", "blocks", block)
        return {
            "our bfloat16 to their bfloat16": ratio(half, theirs),
            "our bfloat16 to our float32": ratio(half, full),
            "their bfloat16 to our float32": ratio(theirs, full),
        }

    def back(dtype: str) -> dict[str, Any]:
        again = get(f"back-{dtype}", "logits")
        return {
            "to theirs of its own": ratio(again, get(f"theirs-{dtype}", "logits")),
            "to ours": ratio(again, get(f"ours-{dtype}", "logits")),
            "complaints of their loader": json.loads(str(runs.get(f"back-{dtype}", {}).get("wrong", "null"))),
        }

    def number(what: str, dtype: str) -> int | None:
        return None if f"ours-{dtype}" not in runs else int(runs[f"ours-{dtype}"][what])

    blocks = range(options["num_hidden_layers"])
    theirs = runs.get("theirs-float32", {})
    return {
        "class": f"{package}.{name}ForCausalLM",
        "options": options,
        "parameters": number("parameters", "float32"),
        "our kernels": {dtype: number("kernels", dtype) for dtype in BARS},
        "their float32 products in Triton": str(theirs["dots"]) if theirs else None,
        "logits": four("ours", "logits"),
        "theirs of what we wrote": {dtype: back(dtype) for dtype in BARS},
        "after each block": [four("alone", "blocks", i) for i in blocks],
        "each block alone, of what entered theirs in bfloat16": [alone(i) for i in blocks],
    }


def run_family(family: str, options: argparse.Namespace) -> dict[str, Any]:
    """Its processes side by side, then the comparison, with "failed" if one of them ended badly."""
    folder = place(options.folder, family)
    folder.mkdir(parents=True, exist_ok=True)
    for old in itertools.chain(*(folder.glob(f"*.{kind}") for kind in ("ready", "failed", "npz"))):
        old.unlink()
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    if options.small:
        environment |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    running = {}
    for part in (("theirs", "float32"), ("theirs", "bfloat16"), ("ours",)):
        python, log = options.theirs if part[0] == "theirs" else sys.executable, folder / f"{'-'.join(part)}.log"
        command = [python, __file__, str(options.folder), "--part", *part, "--family", family]
        command += ["--small"] if options.small else []
        # A kernel compiled for the one precision must not serve the other.
        cache = {"TRITON_CACHE_DIR": str(options.folder / f"triton-{part[-1]}")}
        with open(log, "w") as file:
            running[log] = subprocess.Popen(command, env=environment | cache, stdout=file, stderr=subprocess.STDOUT)
    begin = time.monotonic()
    while any(process.poll() is None for process in running.values()) and time.monotonic() - begin < options.limit:
        time.sleep(0.1)
    failed = {}
    for log, process in running.items():
        if process.poll() != 0:
            failed[log.stem] = [f"exit {process.poll()}", *log.read_text().strip().splitlines()[-8:]]
        process.terminate()
        process.wait()
    return {**({"failed": failed} if failed else {}), **compare(family, folder, options.small)}


def main() -> None:
    """All families, or a part of one in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="for checkpoints and logits, 3 GB")
    parser.add_argument("--out", type=pathlib.Path, help="where the result goes")
    parser.add_argument("--family", action="append", help="only this one; may stand several times")
    parser.add_argument("--small", action="store_true", help="tiny models, which run without a GPU")
    parser.add_argument("--theirs", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a family")
    parser.add_argument("--jobs", type=int, default=3, help="families at once, of three processes each")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        (family,) = options.family
        where = place(options.folder, family)
        try:
            if options.part[0] == "ours":
                ours(family, where, options.small)
            else:
                theirs(family, options.part[1], where, options.small)
        except Exception:  # raised again: the file tells those that wait for this part
            (where / "-".join(options.part)).with_suffix(".failed").touch()
            raise
        return
    chosen, begin = options.family or list(families(options.small)), time.monotonic()
    record: dict[str, Any] = {
        "what": "parity",
        "command": "python tools/parity_gpu.py FOLDER" + " --small" * options.small,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": None,
        "machine": platform.machine(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "tokens_bt": list(tokens(options.small).shape),
        "bars": BARS,
        "results": {},
    }
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(run_family, family, options): family for family in chosen}
        for job in concurrent.futures.as_completed(jobs):
            record["results"][jobs[job]] = result = job.result()
            shown = result["logits"] | {"failed": list(result.get("failed", ()))}
            print(f"{time.monotonic() - begin:.0f} s", jobs[job], json.dumps(shown), flush=True)
            if (place(options.folder, jobs[job]) / "theirs-float32.ready").exists():
                with np.load(place(options.folder, jobs[job]) / "theirs-float32.npz") as run:
                    record["versions"] |= json.loads(str(run["versions"]))
                    record["device"] = str(run["device"])
            record["results"] = {name: record["results"][name] for name in chosen if name in record["results"]}
            if options.out:
                options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
