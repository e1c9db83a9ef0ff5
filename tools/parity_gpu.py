"""Compares logits with flash-linear-attention's and transformers' own models on one GPU, for every family that we load.

    python tools/parity_gpu.py /tmp/parity --out benchmarks/results/parity-h100.json     # with a GPU
    python tools/parity_gpu.py /tmp/parity --small --theirs OTHER_PYTHON                 # minutes on two cores

--small has tiny models and 48 tokens, and runs their kernels in Triton's interpreter, which has no bfloat16 arithmetic
(RWKV-6's token shift gives NaN there) and takes their recurrent kernels, not those in chunks.

Needs PyTorch, transformers, triton and flash-linear-attention beside the library (or another Python that has them). A
model is made by its own class and initialisation, with noise on parameters that start at a constant, so that each
matters; all are rounded to bfloat16, so that only arithmetic differs. Theirs runs in float32 (sums of products in full:
no TF32, "ieee" in Triton) and wholly in bfloat16; ours reads their safetensors and computes in float32 (highest
precision) and in bfloat16, with the implementation that a user would get. What ours writes of it theirs reads again.
Where the bfloat16 logits differ by more than the bar, each block is then compared alone. Where theirs has kernels that
go token by token beside those in chunks, they are compared with each other too: as much as one library differs from
itself, two may.

Every number is RMS(x - y) / RMS(y) over logits, or over what a block hands to the next. Triton's autotuners take the
first configuration that runs, and XLA's none: which is fastest makes no difference here.

The work is cut into tasks, each of which leaves a file: NAME.npz (or a checkpoint NAME) and NAME.ready, or NAME.failed.
A few processes of each part take the next task whose needs are there; what one of them fails in, or takes more than
--limit seconds for, costs that task alone. The result is written whenever a task has ended.
"""

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

BARS = {"float32": 2e-3, "bfloat16": 1e-2}
NOISE = 0.1
VERSIONS = ("jax", "jaxlib", "flax")
THEIR_VERSIONS = ("torch", "triton", "transformers", "flash-linear-attention")
# Processes of each part.
WORKERS = {"theirs-float32": 3, "theirs-bfloat16": 2, "ours": 5}
# No search for the fastest matrix product, and cuBLAS's for all: half the time of compiling.
XLA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def families(small: bool) -> dict[str, tuple[str, str, dict[str, Any]]]:
    """Package, model and options by name."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2}
    if small:
        sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2}
    width = {"intermediate_size": 96 if small else 768}
    # Heads of up to 128: Triton takes 40 s for some wider ones in full float32.
    two, four = ({**sizes, **width, "num_heads": 2 if small else heads} for heads in (2, 4))
    mamba2 = {"state_size": 16, "head_dim": 16, "num_heads": 8} if small else {"num_heads": 8}
    llama = {**sizes, **width, "num_attention_heads": 4, "num_key_value_heads": 2}
    large = {**two, "num_hidden_layers": 4, "hidden_size": 128 if small else 512, "num_heads": 4}
    return {
        "gla": ("fla", "GLA", two),
        "gla, one block": ("fla", "GLA", {**two, "num_hidden_layers": 1}),
        "gla with convolutions": ("fla", "GLA", {**two, "use_short_conv": True, "num_kv_heads": 1}),
        "retnet": ("fla", "RetNet", four),
        "retnet, one block": ("fla", "RetNet", {**four, "num_hidden_layers": 1}),
        "hgrn2": ("fla", "HGRN2", {**two, "num_heads": None, "expand_ratio": 32 if small else 128}),
        "linear_attn": ("fla", "LinearAttention", four),
        "rwkv6": ("fla", "RWKV6", two),
        "mamba2": ("fla", "Mamba2", {**sizes, **mamba2, "chunk_size": 64}),
        "transformer": ("fla", "Transformer", {**four, "num_kv_heads": 2}),
        "llama": ("transformers", "Llama", llama),
        "gla, twice as wide and deep": ("fla", "GLA", {**large, "intermediate_size": 192 if small else 1536}),
    }


def place(folder: pathlib.Path, family: str) -> pathlib.Path:
    """The family's own folder."""
    return folder / re.sub(r"\W+", "_", family)


def tokens(small: bool) -> np.ndarray:
    """The same for every model."""
    sizes = families(small)["gla"][2]
    # Up to 64 tokens fla takes kernels that Triton's interpreter can run.
    shape = (2, 48) if small else (2, 512)
    return np.random.default_rng(0).integers(0, sizes["vocab_size"], shape)


# Tasks.


@dataclasses.dataclass(frozen=True)
class Task:
    """What makes `name` in a family's folder, once all that it needs is there."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[str, pathlib.Path, bool], dict[str, Any] | None]


def tasks(part: str) -> list[Task]:
    """In the order in which they are taken; each is done for every family before the next."""
    if part == "ours":
        runs = [Task(f"ours-{dtype}", ("theirs",), Ours(dtype)) for dtype in reversed(BARS)]
        compared = ("theirs-bfloat16", "ours-bfloat16")
        return [Task("ours", ("theirs",), write_ours), *runs, Task("alone", compared, each_block_alone)]
    dtype = part.removeprefix("theirs-")
    made = [Task("theirs", (), make)] if dtype == "float32" else []
    again = [Task(f"back-{dtype}", ("ours", part), Theirs(dtype, "ours"))]
    if dtype == "bfloat16":
        again.insert(0, Task("recurrent", ("theirs",), by_token))
    return [*made, Task(part, ("theirs",), Theirs(dtype, "theirs")), *again]


def work(part: str, chosen: Iterable[str], folder: pathlib.Path, small: bool) -> None:
    """Take tasks of one part until none is left."""
    left = [(task, family, place(folder, family)) for task in tasks(part) for family in chosen]
    while left:
        for entry in left:
            task, family, where = entry
            if any((where / f"{need}.failed").exists() for need in task.needs):
                (where / f"{task.name}.failed").write_text(f"for want of {' and '.join(task.needs)}")
            elif not all((where / f"{need}.ready").exists() for need in task.needs):
                continue
            else:
                try:
                    with open(where / f"{task.name}.begun", "x") as file:
                        file.write(f"{os.getpid()}")
                except FileExistsError:  # another process has it
                    left.remove(entry)
                    break
                say(f"{family}: {task.name}")
                try:
                    result = task.run(family, where, small)
                except Exception as error:  # of any library here; the other tasks go on
                    traceback.print_exc()
                    (where / f"{task.name}.failed").write_text(f"{type(error).__name__}: {str(error)[:300]}")
                else:
                    if result is not None:
                        np.savez(where / f"{task.name}.npz", **result)
                    (where / f"{task.name}.ready").touch()
                say("done")
            left.remove(entry)
            break
        else:
            time.sleep(0.05)


def say(what: str) -> None:
    """A line of a process's log, with the seconds since the machine's start."""
    print(f"{time.monotonic():.1f} {what}", flush=True)


def prepare(part: str, small: bool) -> None:
    """Import what the part's tasks need, and set what holds for all of them."""
    if part == "ours":
        import jax

        jax.devices()
    else:
        take_first_configuration()
        if small:
            round_to_nearest()
        their_class("fla", "GLA")
    say("imported")


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
    """Save one of their models."""
    save(*families(small)[family], folder / "theirs")


def save(package: str, name: str, options: dict[str, Any], path: pathlib.Path, seed: int = 0) -> None:
    """Save a new model of a class of theirs, every parameter exact in bfloat16."""
    import torch

    config, model = their_class(package, name)
    torch.manual_seed(seed)
    made = model(config(**options))
    with torch.no_grad():
        for param in made.parameters():
            if param.min() == param.max():
                param += NOISE * torch.randn(param.shape)
            param.copy_(param.to(torch.bfloat16).to(param.dtype))
    made.save_pretrained(path)


@dataclasses.dataclass(frozen=True)
class Theirs:
    """Logits of their class in one dtype, of what it saved ("theirs") or of what we wrote of that ("ours").

    `options` replace some of its config's.
    """

    dtype: str
    checkpoint: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, family: str, folder: pathlib.Path, small: bool) -> dict[str, Any]:
        """Arrays and facts of the run."""
        import torch
        import triton

        triton.knobs.language.fp32_default = "ieee" if self.dtype == "float32" else None
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        device, path = "cuda" if torch.cuda.is_available() else "cpu", folder / self.checkpoint
        package, name, _ = families(small)[family]
        # What their Transformer holds we write as a Llama, since no config of fla's would say less.
        llama = json.loads((path / "config.json").read_text())["model_type"] == "llama"
        _, kind = their_class("transformers", "Llama") if llama else their_class(package, name)
        model, report = kind.from_pretrained(path, output_loading_info=True, **dict(self.options))
        # from_pretrained(dtype=torch.bfloat16) leaves Mamba-2's norms in float32, and then its products fail.
        model, seen = model.to(device, getattr(torch, self.dtype)).eval(), []

        def see(module: Any, inputs: Any, outputs: Any) -> None:
            seen.append((outputs[0] if isinstance(outputs, tuple) else outputs).float().cpu().numpy())

        for layer in getattr(model, "model", getattr(model, "backbone", None)).layers:
            layer.register_forward_hook(see)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens(small)).to(device), use_cache=False).logits
        return {
            "logits": logits.float().cpu().numpy(),
            "blocks": np.stack(seen),
            "wrong": json.dumps({key: str(value) for key, value in report.items() if value}),
            "versions": json.dumps({package: importlib.metadata.version(package) for package in THEIR_VERSIONS}),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
        }


def by_token(family: str, folder: pathlib.Path, small: bool) -> dict[str, Any]:
    """Their logits in bfloat16 by the kernels that go token by token, if the config has a choice."""
    if json.loads((folder / "theirs" / "config.json").read_text()).get("attn_mode") is None:
        return {}
    run = Theirs("bfloat16", "theirs", (("attn_mode", "fused_recurrent"),))
    return {"logits": run(family, folder, small)["logits"]}


# Ours.


def write_ours(family: str, folder: pathlib.Path, small: bool) -> None:
    """Save what we read of theirs."""
    from gla_jax.interop import load_pretrained, save_pretrained

    save_pretrained(load_pretrained(folder / "theirs"), folder / "ours")


def precision(dtype: str) -> Any:
    """The products' precision that goes with a dtype."""
    import jax

    return jax.default_matmul_precision("highest" if dtype == "float32" else None)


@dataclasses.dataclass(frozen=True)
class Ours:
    """Logits of ours in one dtype."""

    dtype: str

    def __call__(self, family: str, folder: pathlib.Path, small: bool) -> dict[str, Any]:
        """Arrays and facts of the run."""
        import jax
        import jax.numpy as jnp
        from flax import nnx

        from gla_jax.interop import load_pretrained

        graphdef, state = nnx.split(load_pretrained(folder / "theirs", dtype=self.dtype))
        x = jnp.asarray(tokens(small), jnp.int32)
        with precision(self.dtype):
            lowered = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, x)
            say("lowered")
            compiled = lowered.compile()
        say("compiled")
        return {
            "logits": np.asarray(compiled(state, x)),
            "kernels": len(re.findall(r'custom_call_target="mosaic_gpu', compiled.as_text())),
            "parameters": sum(np.size(leaf) for leaf in jax.tree.leaves(state)),
        }


def each_block_alone(family: str, folder: pathlib.Path, small: bool) -> dict[str, Any]:
    """Where the bfloat16 logits are above their bar: what our blocks make of what entered theirs in bfloat16."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gla_jax.interop import load_pretrained

    with np.load(folder / "theirs-bfloat16.npz") as run, np.load(folder / "ours-bfloat16.npz") as own:
        theirs, apart = run["blocks"], ratio(own["logits"], run["logits"])
    if apart is not None and apart <= BARS["bfloat16"]:
        return {}
    x, found = jnp.asarray(tokens(small), jnp.int32), {}
    for dtype in BARS:
        graphdef, state = nnx.split(load_pretrained(folder / "theirs", dtype=dtype))

        def blocks(state: Any, x: Any, theirs: Any, graphdef: Any = graphdef) -> Any:
            model = nnx.merge(graphdef, state)
            first = model._embed(x)
            entering = jnp.concatenate([first[None], theirs[:-1].astype(first.dtype)])

            def run(x: Any, block: Any, own: Any, before: Any) -> tuple[Any, Any]:
                return x, block(before, None, own).astype(jnp.float32)

            return model._scan(run, first, (entering,))[1][0]

        with precision(dtype):
            found[dtype] = np.asarray(jax.jit(blocks)(state, x, jnp.asarray(theirs)))
    return found


# Both.


def ratio(x: np.ndarray | None, y: np.ndarray | None) -> float | None:
    """RMS(x - y) / RMS(y); None where one of them is missing, or that is no number."""
    if x is None or y is None:
        return None
    assert x.shape == y.shape, (x.shape, y.shape)
    value = np.sqrt(np.mean(np.square(x - y), dtype=np.float64) / np.mean(np.square(y), dtype=np.float64))
    return float(f"{value:.3g}") if np.isfinite(value) else None


def compare(family: str, folder: pathlib.Path, small: bool) -> dict[str, Any]:
    """The family's entry of the result, of what is there."""
    runs = {path.stem: dict(np.load(path)) for path in folder.glob("*.npz") if path.with_suffix(".ready").exists()}
    failed = {path.stem: path.read_text() for path in sorted(folder.glob("*.failed"))}
    package, name, options = families(small)[family]

    def get(run: str, what: str, *at: int) -> Any:
        return runs[run][what][at] if what in runs.get(run, ()) else None

    def text(run: str, what: str) -> str | None:
        return None if (value := get(run, what)) is None else str(value)

    def number(what: str, dtype: str) -> int | None:
        return None if (value := get(f"ours-{dtype}", what)) is None else int(value)

    def four(half: Any, full: Any, their_half: Any, their_full: Any) -> dict[str, float | None]:
        return {
            "float32": ratio(full, their_full),
            "bfloat16": ratio(half, their_half),
            "our bfloat16 to their float32": ratio(half, their_full),
            "their bfloat16 to their float32": ratio(their_half, their_full),
        }

    def back(dtype: str) -> dict[str, Any]:
        again = get(f"back-{dtype}", "logits")
        return {
            "to theirs of its own": ratio(again, get(f"theirs-{dtype}", "logits")),
            "to ours": ratio(again, get(f"ours-{dtype}", "logits")),
            "complaints of their loader": json.loads(text(f"back-{dtype}", "wrong") or "null"),
        }

    def alone(block: int) -> dict[str, float | None]:
        half, full = (get("alone", dtype, block) for dtype in ("bfloat16", "float32"))
        theirs = get("theirs-bfloat16", "blocks", block)
        return {
            "our bfloat16 to their bfloat16": ratio(half, theirs),
            "our bfloat16 to our float32": ratio(half, full),
            "their bfloat16 to our float32": ratio(theirs, full),
        }

    logits = (get(f"{who}-{dtype}", "logits") for who in ("ours", "theirs") for dtype in ("bfloat16", "float32"))
    found = {
        "class": f"{package}.{name}ForCausalLM",
        "options": options,
        "parameters": number("parameters", "float32"),
        "our kernels": {dtype: number("kernels", dtype) for dtype in BARS},
        "their float32 products in Triton": "ieee",
        "logits": four(*logits),
        "theirs of what we wrote": {dtype: back(dtype) for dtype in BARS},
    }
    if (recurrent := get("recurrent", "logits")) is not None:
        whole = {who: get(who, "logits") for who in ("theirs-bfloat16", "theirs-float32", "ours-bfloat16")}
        names = ("to theirs in bfloat16", "to their float32", "to our bfloat16")
        found["their bfloat16 token by token"] = dict(
            zip(names, (ratio(recurrent, y) for y in whole.values()), strict=True)
        )
    if "float32" in runs.get("alone", ()):
        blocks = [alone(i) for i in range(options["num_hidden_layers"])]
        found["each block alone, of what entered theirs in bfloat16"] = blocks
    return {**({"failed": failed} if failed else {}), **found}


class Workers:
    """The processes of all parts, and those that take the place of ones that fail."""

    def __init__(self, chosen: list[str], options: argparse.Namespace):
        self.chosen, self.options = chosen, options
        self.count: collections.Counter = collections.Counter()
        self.running: list[tuple[str, subprocess.Popen]] = []
        for part, workers in WORKERS.items():
            for _ in range(1 if options.small else workers):
                self.start(part)

    def start(self, part: str) -> None:
        """One more process."""
        options, theirs = self.options, part != "ours"
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "OMP_NUM_THREADS": "2", **os.environ}
        # A kernel compiled for the one precision must not serve the other.
        environment["TRITON_CACHE_DIR"] = str(options.folder / f"triton-{part}")
        if options.small:
            environment |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
        else:
            environment.setdefault("XLA_FLAGS", XLA_FLAGS)
        python, log = options.theirs if theirs else sys.executable, options.folder / f"{part}-{self.count[part]}.log"
        self.count[part] += 1
        command = [python, __file__, str(options.folder), "--part", part, *["--small"] * options.small]
        for family in self.chosen:
            command += ["--family", family]
        with open(log, "w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        self.running.append((part, process))

    def look(self) -> bool:
        """Whether any are at work; a task that takes too long, or has ended its process, fails."""
        begun = {}
        for family in self.chosen:
            for path in place(self.options.folder, family).glob("*.begun"):
                ended = any(path.with_suffix(kind).exists() for kind in (".ready", ".failed"))
                # A process that has just made the file may not have written its number yet.
                if not ended and (written := path.read_text()):
                    begun[int(written)] = path
        for part, process in list(self.running):
            path = begun.get(process.pid)
            if process.poll() is None and path and time.time() - path.stat().st_mtime > self.options.limit:
                process.kill()
                process.wait()
            if process.poll() is None:
                continue
            self.running.remove((part, process))
            if process.returncode and path:
                path.with_suffix(".failed").write_text(f"its process ended with {process.returncode}")
            if process.returncode and self.count[part] < WORKERS[part] + 5:
                self.start(part)
            elif all(part != other for other, _ in self.running):
                self.give_up(part)
        return bool(self.running)

    def give_up(self, part: str) -> None:
        """What a part that has no process left has not done fails."""
        for task in tasks(part):
            for family in self.chosen:
                path = place(self.options.folder, family) / f"{task.name}.failed"
                if not path.with_suffix(".ready").exists() and not path.exists():
                    path.write_text(f"no process of {part} is left")

    def end(self) -> None:
        """Stop all of them."""
        for _, process in self.running:
            process.kill()
            process.wait()


def main() -> None:
    """All families, or the tasks of one part in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="for checkpoints and logits, 1 GB")
    parser.add_argument("--out", type=pathlib.Path, help="where the result goes")
    parser.add_argument("--family", action="append", help="only this one; may stand several times")
    parser.add_argument("--small", action="store_true", help="tiny models, which run without a GPU")
    parser.add_argument("--theirs", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a task")
    parser.add_argument("--whole-limit", type=float, default=600, help="seconds for all")
    parser.add_argument("--part", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = options.family or list(families(options.small))
    if options.part:
        prepare(options.part, options.small)
        work(options.part, chosen, options.folder, options.small)
        return
    from gla_jax.records import begin  # needs JAX, which the Python of theirs may lack

    began = time.monotonic()
    for family in chosen:
        folder = place(options.folder, family)
        folder.mkdir(parents=True, exist_ok=True)
        for kind in ("begun", "ready", "failed", "npz"):
            for old in folder.glob(f"*.{kind}"):
                old.unlink()
    record: dict[str, Any] = {
        **begin("parity", ["python", "tools/parity_gpu.py", *sys.argv[1:]], VERSIONS, device="nothing has been run"),
        "tokens_bt": list(tokens(options.small).shape),
        "bars": BARS,
        "results": {},
    }
    workers, known, shown, going = Workers(chosen, options), {}, set(), True
    while going:
        time.sleep(0.2)
        going = workers.look() and time.monotonic() - began < options.whole_limit
        for family in chosen:
            folder = place(options.folder, family)
            ended = sorted(path.name for kind in ("ready", "failed") for path in folder.glob(f"*.{kind}"))
            if not ended or known.get(family) == ended:
                continue
            known[family] = ended
            record["results"][family] = result = compare(family, folder, options.small)
            record["results"] = {name: record["results"][name] for name in chosen if name in record["results"]}
            if "theirs-float32.ready" in ended:
                with np.load(folder / "theirs-float32.npz") as run:
                    record["versions"] |= json.loads(str(run["versions"]))
                    record["device"] = str(run["device"])
            if options.out:
                options.out.write_text(json.dumps(record, indent=1) + "\n")
            line = json.dumps({name: result[name] for name in ("logits", "failed") if name in result})
            if (None not in result["logits"].values() or "failed" in result) and line not in shown:
                shown.add(line)
                print(f"{time.monotonic() - began:.0f} s", family, line, flush=True)
    print(f"{time.monotonic() - began:.0f} s", "stopped" if workers.running else "all done", flush=True)
    workers.end()


if __name__ == "__main__":
    main()
