"""The command `gla-jax`: reads flags, calls the library, prints."""

import contextlib
import dataclasses
import importlib
import logging
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import tyro
    from flax import nnx

    from gla_jax import interop
    from gla_jax.nn import CausalLM, CausalLMConfig
    from gla_jax.nn.config import MIXERS
    from gla_jax.nn.text import TOKENIZER, save_byte_tokenizer, text_after
    from gla_jax.train import InputError, Stopped, TrainConfig, continue_text, load_model, tokenize, train
    from gla_jax.train.bench import BenchTrainConfig, bench_train
    from gla_jax.train.processes import is_first
    from gla_jax.train.sampling import run_tokenizer, tokens_of
except ModuleNotFoundError as error:
    raise SystemExit(f"gla-jax: {error.name} is missing; install the extra that trains: gla_jax[train]") from None

# The exit status of a run that SIGTERM has stopped and that can go on (EX_TEMPFAIL).
STOPPED = 75


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Continue a prompt with a trained model."""

    run: tyro.conf.Positional[Path]
    """Folder of a run that `gla-jax train` made."""
    prompt: tyro.conf.Positional[str] = ""
    """What goes before; empty for a text from its beginning."""
    length: int = 1000
    """Bytes to make."""
    temperature: float = 0.8
    """0 for the likeliest byte each time; higher for more surprise."""
    top_p: float = 0.95
    """Draw only from the fewest bytes that together have this probability."""
    seed: int = 0
    """Of the draws."""

    def check(self) -> None:
        """Raises an InputError for a value out of its range."""
        for name, holds, allowed in (
            ("length", self.length >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 2**32, "between 0 and 2^32 - 1"),
        ):
            if not holds:
                given = getattr(self, name.replace("-", "_"))
                raise InputError(f"argument --{name}: must be {allowed}, got {given!r}")
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise InputError("argument PROMPT: must be UTF-8 text")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Write a trained run, or a checkpoint of another library, as the library that has such models writes it."""

    source: tyro.conf.Positional[Path]
    """Folder of a run, or of a checkpoint: config.json and safetensors."""
    target: tyro.conf.Positional[Path]
    """Folder to write: new, or empty."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the arrays; by default the source's."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Score a trained run, or a checkpoint of another library: perplexity by place, and tasks."""

    model: tyro.conf.Positional[Path]
    """Folder of a run, or of a checkpoint: config.json, safetensors and tokenizer.json."""
    text: Path | None = None
    """UTF-8 text to score."""
    block: int = 32768
    """Tokens that are read on from an empty state."""
    bucket: int = 2048
    """Places that are averaged together."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness (the package lm-eval)."""
    task_folder: Path | None = None
    """Folder with tasks of your own."""
    limit: int | None = None
    """At most so many documents a task."""


@dataclasses.dataclass(frozen=True)
class BenchScript:
    """A program of the repository's folder benchmarks."""

    name: tyro.conf.Suppress[str]
    arguments: tyro.conf.Positional[tuple[str, ...]] = ()
    """Its own; `-- --help` lists them."""


def _script(name: str, about: str) -> Any:
    """The subcommand that runs benchmarks/NAME.py, which has a function `main` of its arguments."""
    about = f"{about} By benchmarks/{name}.py of the repository."
    return tyro.conf.subcommand(name, default=BenchScript(name), description=about)


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """Time training steps, the op or decoding, or repeat an experiment of the paper's (arXiv 2312.06635)."""

    what: tyro.conf.OmitSubcommandPrefixes[
        Annotated[BenchTrainConfig, tyro.conf.subcommand("train")]
        | Annotated[BenchScript, _script("op", "Time the op beside what a user would pick instead.")]
        | Annotated[BenchScript, _script("decode", "Time decoding.")]
        | Annotated[BenchScript, _script("lengths", "Time training, or the op, against length (figures 6 and 2).")]
        | Annotated[BenchScript, _script("ladder", "Train the paper's ladder of gates, small (table 4).")]
        | Annotated[BenchScript, _script("mqar", "Train multi-query associative recall, small (figure 4).")]
        | Annotated[BenchScript, _script("extrapolation", "Train at one length, test far beyond, small (figure 5).")]
    ]


def _train(config: TrainConfig) -> None:
    result = train(config)
    if not is_first():
        return
    print(f"loss of the last step: {result.loss:.4f}")
    print(f"held-out text: {result.bits_per_byte:.4f} bits per byte")
    if config.sample:
        print("sample:")
        model, tokenizer = load_model(result.run), run_tokenizer(result.run)
        _print_stream(continue_text(model, "", length=config.sample, seed=config.seed, tokenizer=tokenizer))
    print(f"settings, log and checkpoints: {result.run}")
    command = "gla-jax" if shutil.which("gla-jax") else shlex.quote(sys.argv[0])
    print(f'more text: {command} sample {shlex.quote(str(result.run))} "To be"')


@dataclasses.dataclass(frozen=True)
class TokenizeConfig:
    """Turn text into tokens once, for runs to train on."""

    data: tyro.conf.Positional[Path]
    """Text, .jsonl, .parquet or .array_record, as for `gla-jax train --data`."""
    out: tyro.conf.Positional[Path]
    """A new folder; give it to --data."""
    tokenizer: Path | None = None
    """A tokenizer.json of the tokenizers library; default: bytes."""


def _tokenize(config: TokenizeConfig) -> None:
    corpus = tokenize(config.data, config.out, config.tokenizer)
    print(f"{len(corpus.train):,} tokens to train on, {len(corpus.validation):,} held out")
    print(f"to train: gla-jax train --data {config.out} --model.vocab-size {corpus.vocab_size}")


def _sample(config: SampleConfig) -> None:
    config.check()
    model = load_model(config.run)
    tokenizer = run_tokenizer(config.run)
    options = {"length": config.length, "temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
    with _named("--length"):
        text = continue_text(model, config.prompt, tokenizer=tokenizer, **options)
    print(config.prompt, end="", flush=True)
    _print_stream(text)


def _convert(config: ConvertConfig) -> None:
    if config.target.exists() and (not config.target.is_dir() or any(config.target.iterdir())):
        raise InputError(f"argument TARGET: {config.target} must be a new or empty folder")
    if _is_run(config.source):
        model: Any = load_model(config.source)
        _, end = tokens_of(run_tokenizer(config.source))
        interop.save_pretrained(model, config.target, dtype=config.dtype, end_of_text=end)
        if (config.source / TOKENIZER).exists():
            shutil.copyfile(config.source / TOKENIZER, config.target / TOKENIZER)
        else:
            save_byte_tokenizer(config.target)
    else:
        interop.convert(config.source, config.target, dtype=config.dtype)
    print(f"written: {config.target}")


def _eval(config: EvalConfig) -> None:
    if config.text is None and not config.tasks:
        raise InputError("argument --text or --tasks: give one of them, got neither")
    for name, value, least in (("block", config.block, 2), ("bucket", config.bucket, 1), ("limit", config.limit, 1)):
        if value is not None and value < least:
            raise InputError(f"argument --{name}: must be at least {least}, got {value}")
    if _is_run(config.model):
        model, (tokenizer, end) = load_model(config.model), tokens_of(run_tokenizer(config.model))
    else:
        model, tokenizer = interop.load_pretrained(config.model), interop.load_tokenizer(config.model)
        end = interop.end_of_text(config.model)
    if config.text is not None:
        try:
            ids = text_after(tokenizer, config.text.read_text(encoding="utf-8"), end)
        except UnicodeDecodeError:
            raise InputError(f"argument --text: {config.text} is not UTF-8 text") from None
        if len(ids) < 2:
            raise InputError(f"argument --text: {config.text} must have at least one token, got none")
        with _named("--text"):
            buckets = interop.perplexity_by_place(model, [ids], block=config.block, bucket=config.bucket)
        for x in buckets:
            bits = x.loss / math.log(2)
            print(
                f"places {x.start} to {x.stop - 1}: perplexity {x.perplexity:.4f}, {bits:.4f} bits, {x.tokens} tokens"
            )
    if config.tasks:
        harness = interop.Harness(model, tokenizer, end)
        with _named("--tasks"):
            found = interop.run_tasks(harness, config.tasks, folder=config.task_folder, limit=config.limit)
        for task, results in found.items():
            for name, value in results.items():
                print(f"{task} {name}: {value}")


def _bench(config: BenchConfig) -> None:
    what = config.what
    if isinstance(what, BenchScript):
        root = Path(__file__).parents[1]
        if not (root / "benchmarks" / f"{what.name}.py").is_file():
            raise InputError(
                f"argument {what.name}: there is no {root}/benchmarks/{what.name}.py; it comes with the repository, "
                "in whose folder `pip install -e .` installs"
            )
        sys.path.insert(0, str(root))
        importlib.import_module(f"benchmarks.{what.name}").main(list(what.arguments))
        return
    found = bench_train(what)
    use = "" if found["mfu_6n"] is None else f", {100 * found['mfu_6n']:.1f} % of the device's peak (6 N a token)"
    print(f"{found['parameters']:,} parameters, {what.batch} x {what.length} tokens a step, on {found['device']}")
    print(f"{found['tokens_per_s']:,} tokens/s{use}, {found['memory_gb']} GB")
    for row in found.get("kernels", ()):
        print(f"{row['ms']:9.3f} ms {100 * row['share']:5.1f} %  {row['part']}, {row['work']}")
    if what.out is not None:
        print(f"written: {what.out}")


@contextlib.contextmanager
def _named(flag: str) -> Iterator[None]:
    """An InputError of one line that names the flag, in place of a ValueError of the library's."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"argument {flag}: {' '.join(str(error).split())}") from error


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _print_stream(pieces: Any) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


# Another command is another line here.
COMMANDS: dict[str, tuple[Any, Callable[[Any], None], str]] = {
    "train": (
        TrainConfig,
        _train,
        "Train a language model on text; with no flags, on Shakespeare. --model.mixer NAME: of another layer than GLA.",
    ),
    "tokenize": (TokenizeConfig, _tokenize, "Turn text into tokens once, for runs to train on."),
    "sample": (SampleConfig, _sample, "Continue a prompt with a trained model."),
    "convert": (ConvertConfig, _convert, "Write a model as safetensors that other libraries load."),
    "eval": (EvalConfig, _eval, "Perplexity by place, and tasks of lm-evaluation-harness."),
    "bench": (BenchConfig, _bench, "Time training steps, the op, decoding; repeat the paper's experiments, small."),
}


def _parse(arguments: list[str], about: str) -> Any:
    """The config that the arguments make, of a command's kind."""
    arguments, model = _model_of(_passed_on(arguments))
    default: dict[str, Any] = {"train": TrainConfig() if model is None else TrainConfig(model=model)}
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, description=text, default=default.get(name, tyro.MISSING_NONPROP))]
        for name, (kind, _, text) in COMMANDS.items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    config = tyro.cli(union, prog="gla-jax", description=about, args=arguments)
    if model is not None and isinstance(config, TrainConfig):
        fields = {field.name: getattr(config.model, field.name) for field in dataclasses.fields(config.model)}
        config = dataclasses.replace(config, model=CausalLMConfig(**fields))
        try:  # what the layer's options and the width do not allow together
            nnx.eval_shape(lambda: CausalLM(config.model, rngs=nnx.Rngs(0)))
        except ValueError as error:
            raise InputError(f"argument --model.mixer: {error}") from None
    return config


def _passed_on(arguments: list[str]) -> list[str]:
    """The arguments with the "--" before those of a program of benchmarks/, if it was left out."""
    command, script, own = arguments[:1], arguments[1:2], arguments[2:]
    if command != ["bench"] or script in ([], ["train"]) or own[:1] in ([], ["--"], ["-h"], ["--help"]):
        return arguments
    return [*command, *script, "--", *own]


def _model_of(arguments: list[str]) -> tuple[list[str], Any]:
    """The arguments without "--model.mixer NAME", and the model whose fields are flags then; None for GLA."""
    for i, argument in enumerate(arguments):
        flag, given, name = argument.partition("=")
        if flag != "--model.mixer":
            continue
        rest = arguments[:i] + arguments[i + (1 if given else 2) :]
        name = name if given else arguments[i + 1] if i + 1 < len(arguments) else ""
        if name not in MIXERS:
            raise InputError(f"argument --model.mixer: must be one of {', '.join(MIXERS)}, got {name!r}")
        if name == "gla":
            return rest, None
        tiny = CausalLMConfig.tiny(name)
        # Flags come of the types that fields are declared with.
        kind: Any = dataclasses.make_dataclass(
            "CausalLMConfig", [("mixer", MIXERS[name])], bases=(CausalLMConfig,), frozen=True, kw_only=True
        )
        return rest, kind(**{field.name: getattr(tiny, field.name) for field in dataclasses.fields(tiny)})
    return arguments, None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return the exit status.

    0; 2 for unusable arguments or a full disk; 75 for a run that SIGTERM stopped; 130 when interrupted.
    """
    about = "Gated Linear Attention: training, sampling, conversion, evaluation and timing."
    # What orbax cannot write it logs through absl, in a thousand lines; the command says it in one.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        config = _parse(list(sys.argv[1:] if arguments is None else arguments), about)
        command = next(run for kind, run, _ in COMMANDS.values() if kind is type(config))
        command(config)
    except ModuleNotFoundError as error:
        print(f"gla-jax: the package {error.name} is missing", file=sys.stderr)
        return 2
    except (InputError, interop.CheckpointError) as error:
        print(f"gla-jax: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"gla-jax: {stopped}; call again to go on", file=sys.stderr)
        return STOPPED
    except BrokenPipeError:  # whoever read the text wants no more of it
        sys.stderr.close()
    except OSError as error:
        print(f"gla-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; `gla-jax train` goes on from the last checkpoint when called again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
