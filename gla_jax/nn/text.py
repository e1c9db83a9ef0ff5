"""Text in and text out, with a tokenizer of the package `tokenizers`."""

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import nnx

from gla_jax.files import CheckpointError
from gla_jax.nn.generate import checked_stops, stream

TOKENIZER = "tokenizer.json"


@runtime_checkable
class Tokenizer(Protocol):
    """What is asked of a tokenizer: `tokenizers.Tokenizer` has it."""

    def encode(self, sequence: str) -> Any:
        """An object with the token numbers as `ids`."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""


class ByteTokenizer:
    """A token a byte of UTF-8, as `gla-jax train` has it; other tokens, such as its boundary, decode to nothing."""

    def encode(self, sequence: str) -> Any:
        """An object whose `ids` are the bytes of the text `sequence`."""
        return SimpleNamespace(ids=list(sequence.encode()))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes `ids`, with U+FFFD for what is none; 0xFF, which no UTF-8 has, is left out."""
        return bytes(i for i in ids if i < 0xFF).decode(errors="replace")


def save_byte_tokenizer(folder: Path | str) -> None:
    """Write `ByteTokenizer` as a tokenizer.json; token 255, the boundary, is "<|endoftext|>", in a text as well."""
    # What stands for each byte in byte-level BPE (GPT-2's): itself if it prints, else the next character from 256 on.
    prints = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    vocab = {chr(byte if byte in prints else next(others)): byte for byte in range(255)}
    end, level = {"id": 255, "content": "<|endoftext|>", "special": True}, {"type": "ByteLevel", "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    made = {
        "version": "1.0",
        "added_tokens": [{**end, **flags}],
        "pre_tokenizer": {**level, "add_prefix_space": False, "use_regex": False},
        "decoder": {**level, "add_prefix_space": False, "use_regex": False},
        "model": {"type": "BPE", "vocab": {**vocab, "<|endoftext|>": 255}, "merges": []},
    }
    (Path(folder) / TOKENIZER).write_text(json.dumps(made), encoding="utf-8")


def load_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a checkpoint folder, from its tokenizer.json.

    Raises:
      CheckpointError: there is none, or the package `tokenizers` (the extra gla_jax[hub]) is missing.
    """
    return read_tokenizer(Path(folder) / TOKENIZER)


def read_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` in a file; a CheckpointError as `load_tokenizer`."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; it must be a tokenizer.json")
    try:
        tokenizers = importlib.import_module("tokenizers")
    except ModuleNotFoundError:
        raise CheckpointError("the package tokenizers is missing; install the extra gla_jax[hub]") from None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception, whatever is wrong with a file
        raise CheckpointError(f"{path}: is not a tokenizer.json ({error})") from None


def text_after(tokenizer: Tokenizer, text: str, end_of_text: int) -> list[int]:
    """A text's tokens with one before them: the tokenizer's own first token of every text, or else end_of_text."""
    ids, own = list(tokenizer.encode(text).ids), list(tokenizer.encode("").ids)
    return ids if own and ids[:1] == own[:1] else [end_of_text, *ids]


def stream_text(
    model: nnx.Module, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, **options: Any
) -> Iterator[str]:
    """Continue a prompt, a piece of text at a time, as soon as it is certain.

    A piece comes when its characters are whole and no later token can change them; together the pieces are the text
    that the tokenizer gives for all new tokens after the prompt.

    Args:
      model: a language model over the tokenizer's tokens.
      tokenizer: see `Tokenizer`.
      prompt: text of at least one token.
      max_new_tokens: at most so many are made.
      options: of `gla_jax.nn.stream`, such as temperature, top_p, key and stop_tokens (which are not shown).

    Raises:
      ValueError: as `gla_jax.nn.stream`; num_samples must be 1.
    """
    ids = list(tokenizer.encode(prompt).ids)
    if not ids:
        raise ValueError("prompt: must have at least one token, got none")
    return stream_after(model, tokenizer, ids, max_new_tokens, **options)


def stream_after(
    model: nnx.Module, tokenizer: Tokenizer, ids: list[int], max_new_tokens: int, **options: Any
) -> Iterator[str]:
    """`stream_text` after the tokens `ids`, at least one."""
    if options.get("num_samples", 1) != 1:
        raise ValueError(f"num_samples: must be 1 to stream text, got {options['num_samples']}")
    stops = checked_stops(options.pop("stop_tokens", ()))
    drawn = stream(model, np.asarray([ids], np.int32), max_new_tokens, stop_tokens=stops, **options)
    return _pieces(drawn, tokenizer, ids, frozenset(stops))


def _pieces(drawn: Iterator[np.ndarray], tokenizer: Tokenizer, ids: list[int], stops: frozenset[int]) -> Iterator[str]:
    # Tokenizers join some tokens by their neighbours (spaces, bytes of one character), so a few already shown are
    # decoded again with the new ones. What ends in U+FFFD may be the first bytes of a character.
    start, shown = max(0, len(ids) - 8), len(ids)
    while start and "\ufffd" in tokenizer.decode(ids[start:shown]):  # it began within a character
        start = max(0, start - 8)
    for token in drawn:
        if int(token[0]) in stops:
            break
        ids.append(int(token[0]))
        before, text = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:])
        if len(text) > len(before) and not text.endswith("�"):
            yield text[len(before) :]
            start, shown = shown, len(ids)
    before, text = tokenizer.decode(ids[start:shown]), tokenizer.decode(ids[start:])
    if len(text) > len(before):
        yield text[len(before) :]
