"""Text to train on: the corpus that ships with the package, or any text or .jsonl file.

A corpus is two streams of bytes, one to train on and one held out. Each document stands between two DOCUMENT bytes,
0xFF, which no UTF-8 text contains: a model that reads it knows that a text begins, one that predicts it that it ends.
"""

import dataclasses
import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from gla_jax.train.config import InputError

__all__ = ["DOCUMENT", "SHAKESPEARE", "Corpus", "load_corpus"]

DOCUMENT = 0xFF
SHAKESPEARE = Path(__file__).with_name("shakespeare.jsonl.xz")
HELD_OUT = 0.05
SPLITS = ("train", "validation")

Stream = UInt8[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two byte streams, and the SHA-256 of the file they came from."""

    train: Stream
    validation: Stream
    sha256: str


def load_corpus(path: Path | None = None) -> Corpus:
    """Read a corpus into memory and split it.

    Lines of a .jsonl file may say `"split": "train"` or `"validation"`. Where none does, the last 5 % of the documents
    are held out, or of a single document's bytes.

    Args:
      path: UTF-8 text (one document) or .jsonl (a document a line, in its field "text"), as it is or compressed
        to .xz; None for Shakespeare's plays and poems.

    Raises:
      InputError: if the file is missing, empty, not UTF-8, or has a bad line, which the message names.
    """
    path = SHAKESPEARE if path is None else path
    raw = _read(path)
    is_jsonl = ".jsonl" in path.suffixes[-2:]
    documents = _jsonl(path, raw) if is_jsonl else [(_utf8(path, raw), None)]
    documents = [(text, split) for text, split in documents if text]
    if not documents:
        raise InputError(f"argument --data: {path} is empty; it must hold text")
    train, validation = _split(documents)
    for missing, texts in (("has nothing to train on", train), ("holds nothing out", validation)):
        if not any(texts):
            raise InputError(f"argument --data: {path} {missing}; a line must say, or there must be more text")
    return Corpus(_stream(train), _stream(validation), hashlib.sha256(raw).hexdigest())


def _read(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return lzma.decompress(raw) if path.suffix == ".xz" else raw
    except FileNotFoundError:
        raise InputError(f"argument --data: {path} does not exist; give a text or .jsonl file") from None
    except IsADirectoryError:
        raise InputError(f"argument --data: {path} is a folder; give one text or .jsonl file") from None
    except (OSError, lzma.LZMAError) as error:
        raise InputError(f"argument --data: cannot read {path}: {error}") from None


def _utf8(path: Path, raw: bytes) -> bytes:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"argument --data: {path} must be UTF-8, but line {line} has byte 0x{raw[error.start]:02x}"
        ) from None
    return raw if raw.strip() else b""


def _jsonl(path: Path, raw: bytes) -> list[tuple[bytes, str | None]]:
    documents = []
    for number, line in enumerate(_utf8(path, raw).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"argument --data: {path} line {number}"
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{where} is not JSON ({error.msg} at column {error.colno})") from None
        text = document.get("text") if isinstance(document, dict) else None
        if not isinstance(text, str):
            raise InputError(f'{where} must be an object with a string "text"')
        split = document.get("split")
        if split is not None and split not in SPLITS:
            raise InputError(f'{where}: "split" must be one of {", ".join(SPLITS)}, got {split!r}')
        try:
            documents.append((text.encode("utf-8"), split))
        except UnicodeEncodeError:
            raise InputError(f'{where}: "text" has half of a surrogate pair; it must be Unicode text') from None
    return documents


def _split(documents: list[tuple[bytes, str | None]]) -> tuple[list[bytes], list[bytes]]:
    if any(split for _, split in documents):
        train = [text for text, split in documents if split != "validation"]
        validation = [text for text, split in documents if split == "validation"]
        return train, validation
    texts = [text for text, _ in documents]
    if len(texts) == 1:
        text = texts[0]
        cut = int(len(text) * (1 - HELD_OUT))
        while cut < len(text) and text[cut] & 0xC0 == 0x80:  # inside a character
            cut += 1
        return [text[:cut]], [text[cut:]]
    held_out = max(1, round(len(texts) * HELD_OUT))
    return texts[:-held_out], texts[-held_out:]


def _stream(texts: list[bytes]) -> Stream:
    boundary = bytes([DOCUMENT])
    return np.frombuffer(boundary + b"".join(text + boundary for text in texts), np.uint8)
