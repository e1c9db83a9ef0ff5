"""The command `gla-jax`: reads flags, calls the library, prints."""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro

    from gla_jax.train import InputError, Stopped, TrainConfig, continue_text, load_model, tokenize, train
    from gla_jax.train.processes import is_first
    from gla_jax.train.sampling import run_tokenizer
except ModuleNotFoundError as error:
    raise SystemExit(f"gla-jax: {error.name} is missing; install the extra that trains: gla_jax[train]") from None

__all__ = ["STOPPED", "main"]

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
    print(f'more text: gla-jax sample {result.run} "To be"')


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
    print(config.prompt, end="", flush=True)
    options = {"length": config.length, "temperature": config.temperature, "top_p": config.top_p, "seed": config.seed}
    _print_stream(continue_text(model, config.prompt, tokenizer=tokenizer, **options))


def _print_stream(pieces: Any) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


# Another command is another line here.
COMMANDS: dict[str, tuple[Any, Callable[[Any], None], str]] = {
    "train": (TrainConfig, _train, "Train a language model on text; with no flags, on Shakespeare."),
    "tokenize": (TokenizeConfig, _tokenize, "Turn text into tokens once, for runs to train on."),
    "sample": (SampleConfig, _sample, "Continue a prompt with a trained model."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, and return the exit status.

    0; 2 for unusable arguments or a full disk; 75 for a run that SIGTERM stopped; 130 when interrupted.
    """
    kinds = [
        Annotated[kind, tyro.conf.subcommand(name, description=text)] for name, (kind, _, text) in COMMANDS.items()
    ]
    union: Any = kinds[0]
    for kind in kinds[1:]:
        union = union | kind
    about = "Gated Linear Attention: training and sampling."
    try:
        config = tyro.cli(union, prog="gla-jax", description=about, args=arguments)
        command = next(run for kind, run, _ in COMMANDS.values() if kind is type(config))
        command(config)
    except InputError as error:
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
