"""A trained run's model, and text from it."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx

from gla_jax.nn.text import TOKENIZER, ByteTokenizer, Tokenizer, read_tokenizer, stream_after, text_after
from gla_jax.train.checkpoints import Checkpoints
from gla_jax.train.config import InputError, MeshConfig
from gla_jax.train.corpus import DOCUMENT
from gla_jax.train.mesh import make_mesh
from gla_jax.train.run_folder import CHECKPOINTS, load_config
from gla_jax.train.step import make_program


def load_model(run: Path) -> nnx.Module:
    """The model of a run, with the parameters of its newest checkpoint.

    Raises:
      InputError: if the folder holds no run, or no checkpoint that is whole.
    """
    config = load_config(run)
    if not (run / CHECKPOINTS).is_dir():
        raise InputError(f"argument RUN: {run} has no checkpoint yet; train it first")
    config = dataclasses.replace(config, mesh=MeshConfig(data=1))  # a sample is one row
    program = make_program(config, make_mesh(config))
    with Checkpoints(run / CHECKPOINTS, keep=None) as checkpoints:
        return nnx.merge(program.graphdef, checkpoints.restore_params(program.abstract))


def continue_text(
    model: nnx.Module,
    prompt: str,
    *,
    length: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    tokenizer: Any = None,
) -> Iterator[str]:
    """Continue a prompt, a piece of text at a time as it is made; memory does not grow with prompt or length.

    Args:
      model: a language model over bytes, or over the tokenizer's tokens.
      prompt: what goes before; it may be empty, for a text from its beginning.
      length: bytes (or tokens) to make, at least 1; fewer if the model ends the text.
      temperature: 0 for the likeliest byte each time, else the logits are divided by it.
      top_p: draws only from the fewest bytes that together have this probability.
      seed: of the draws.
      tokenizer: of `run_tokenizer`.

    Raises:
      ValueError: naming the argument, if it is out of its range.
    """
    own, separator = tokens_of(tokenizer)
    options: dict[str, Any] = {}
    if temperature > 0:
        options = {"key": jax.random.key(seed), "top_p": top_p}
    ids = text_after(own, prompt, separator)
    return stream_after(model, own, ids, length, temperature=temperature, stop_tokens=(separator,), **options)


def run_tokenizer(run: Path) -> Any:
    """The tokenizer in a run's folder; None for a run over bytes."""
    path = run / TOKENIZER
    return read_tokenizer(path) if path.exists() else None


def tokens_of(tokenizer: Any) -> tuple[Tokenizer, int]:
    """Of `run_tokenizer`'s answer: a tokenizer of texts as the run reads them, and the token between texts."""
    if tokenizer is None:
        return ByteTokenizer(), DOCUMENT
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    return SimpleNamespace(encode=encode, decode=decode), tokenizer.get_vocab_size(with_added_tokens=True)
