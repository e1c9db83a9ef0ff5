"""Text from a trained run, byte by byte from a cache of constant size."""

import codecs
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gla_jax.nn import stream
from gla_jax.train.checkpoints import Checkpoints
from gla_jax.train.config import InputError, MeshConfig
from gla_jax.train.corpus import DOCUMENT
from gla_jax.train.mesh import make_mesh
from gla_jax.train.run_folder import CHECKPOINTS, TOKENIZER, load_config
from gla_jax.train.step import make_program
from gla_jax.train.tokens import load_tokenizer


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
    if tokenizer is None:
        separator, text = DOCUMENT, _text
        tokens = np.frombuffer(prompt.encode("utf-8"), np.uint8).astype(np.int32)
    else:
        separator, text = tokenizer.get_vocab_size(with_added_tokens=True), functools.partial(_decoded, tokenizer)
        tokens = np.array(tokenizer.encode(prompt, add_special_tokens=False).ids, np.int32)
    tokens = np.insert(tokens, 0, separator)
    drawn = stream(
        model,
        tokens[None],
        length,
        key=jax.random.key(seed) if temperature > 0 else None,
        temperature=temperature,
        top_p=top_p if temperature > 0 else None,
        stop_tokens=(separator,),
    )
    return text(drawn)


def run_tokenizer(run: Path) -> Any:
    """The tokenizer in a run's folder; None for a run over bytes."""
    path = run / TOKENIZER
    return load_tokenizer(path) if path.exists() else None


def _decoded(tokenizer: Any, drawn: Iterator[np.ndarray]) -> Iterator[str]:
    from tokenizers.decoders import DecodeStream

    text = DecodeStream(skip_special_tokens=False)  # it holds back what is not yet a whole character
    for token in drawn:
        if int(token[0]) >= tokenizer.get_vocab_size(with_added_tokens=True):
            break
        if piece := text.step(tokenizer, int(token[0])):
            yield piece


def _text(drawn: Iterator[np.ndarray]) -> Iterator[str]:
    # A character of several bytes is shown when it is whole; bytes that are no UTF-8 show as U+FFFD.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in drawn:
        byte = int(token[0])
        if byte == DOCUMENT:
            break
        if piece := decoder.decode(bytes([byte]) if byte < 256 else b"\xff"):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
