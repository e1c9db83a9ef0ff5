"""Text to train on: the corpus that ships with the package, files of documents, or folders of tokens made of these.

A corpus is two streams of tokens, one to train on and one held out. Each document stands between two separators: a
model that reads one knows that a text begins, one that predicts it that it ends. Where tokens are bytes the separator
is DOCUMENT, 0xFF, which no UTF-8 text contains; a tokenizer's is the number after its vocabulary.

A folder that `tokenize` made is memory-mapped:

train.bin, validation.bin   the streams, little-endian unsigned integers of 1, 2 or 4 bytes
tokens.json                 their dtype, the separator, the vocabulary's size, the bytes held out, the text's SHA-256
tokenizer.json              the tokenizer, if there is one
"""

import dataclasses
import hashlib
import json
import lzma
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Integer

from gla_jax.files import CheckpointError
from gla_jax.nn.text import TOKENIZER, read_tokenizer
from gla_jax.train.config import InputError

DOCUMENT = 0xFF
SHAKESPEARE = Path(__file__).with_name("shakespeare.jsonl.xz")
HELD_OUT = 0.05
SPLITS = ("train", "validation")
ABOUT = "tokens.json"
# Documents that a tokenizer has at once, one a thread.
TOGETHER = 256

Stream = Integer[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two streams of tokens, and what there is to know of them.

    train, validation: [tokens]; in memory, or memory-mapped.
    sha256: of the file that they came from.
    separator: the token between documents.
    vocab_size: tokens are below it.
    validation_bytes: UTF-8 bytes of the text held out.
    tokenizer: a file of the `tokenizers` library; None for bytes.
    """

    train: Stream
    validation: Stream
    sha256: str
    separator: int
    vocab_size: int
    validation_bytes: int
    tokenizer: Path | None = None


@dataclasses.dataclass(frozen=True)
class Documents:
    """UTF-8 texts to train on and held out, and the SHA-256 of the file they came from."""

    train: list[bytes]
    validation: list[bytes]
    sha256: str


def load_corpus(path: Path | None = None) -> Corpus:
    """A corpus of bytes, from the file `path` as for `read_documents`, or the one in a folder that `tokenize` made.

    Raises:
      InputError: as `read_documents`, or if the folder is none of these.
    """
    if path is not None and path.is_dir():
        return open_tokens(path)
    documents = read_documents(path)
    held_out = sum(map(len, documents.validation))
    streams = _stream(documents.train), _stream(documents.validation)
    return Corpus(*streams, documents.sha256, DOCUMENT, DOCUMENT + 1, held_out)


def read_documents(path: Path | None = None) -> Documents:
    """Read documents into memory and split them.

    Documents may say `"split": "train"` or `"validation"`. Where none does, the last 5 % of the documents are held out,
    or of a single document's bytes.

    Args:
      path: UTF-8 text (one document); .jsonl (a document a line, in its field "text"), either of them as it is or
        compressed to .xz; .parquet (a document a row, in its column "text"); .array_record (a document a record, as
        UTF-8 text); None for Shakespeare's plays and poems.

    Raises:
      InputError: if the file is missing, empty, not UTF-8, or has a bad line, which the message names.
    """
    path = SHAKESPEARE if path is None else path
    raw = _read(path)
    if ".jsonl" in path.suffixes[-2:]:
        documents = _jsonl(path, raw)
    elif path.suffix == ".parquet":
        documents = _parquet(path)
    elif path.suffix == ".array_record":
        documents = _array_record(path)
    else:
        documents = [(_utf8(path, raw), None)]
    documents = [(text, split) for text, split in documents if text]
    if not documents:
        raise InputError(f"argument --data: {path} is empty; it must hold text")
    train, validation = _split(documents)
    for missing, texts in (("has nothing to train on", train), ("holds nothing out", validation)):
        if not any(texts):
            raise InputError(f"argument --data: {path} {missing}; a line must say, or there must be more text")
    return Documents(train, validation, hashlib.sha256(raw).hexdigest())


def tokenize(data: Path | None, out: Path, tokenizer: Path | None = None) -> Corpus:
    """Write the tokens of a corpus to the folder `out`, and open it.

    Args:
      data: as for `read_documents`.
      out: a new or empty folder.
      tokenizer: a file of the `tokenizers` library (tokenizer.json); None for bytes.

    Raises:
      InputError: if the data or the tokenizer cannot be read, or `out` is in use.
    """
    documents = read_documents(data)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"argument OUT: {out} must be a new or empty folder")
    separator = DOCUMENT
    encoder = None
    if tokenizer is not None:
        try:
            encoder = read_tokenizer(tokenizer)
        except CheckpointError as error:
            raise InputError(f"argument --tokenizer: {error}") from None
        separator = encoder.get_vocab_size(with_added_tokens=True)
    out.mkdir(parents=True, exist_ok=True)
    dtype = next(d for d in ("<u1", "<u2", "<u4") if separator <= np.iinfo(d).max)
    for name, texts in zip(SPLITS, (documents.train, documents.validation), strict=True):
        with (out / f"{name}.bin").open("wb") as file:
            np.array([separator], dtype).tofile(file)
            for tokens in _encode(encoder, texts):
                np.append(tokens.astype(dtype), np.array(separator, dtype)).tofile(file)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, out / TOKENIZER)
    about = {
        "dtype": dtype,
        "separator": separator,
        "vocab_size": separator + 1,
        "validation_bytes": sum(map(len, documents.validation)),
        "sha256": documents.sha256,
    }
    # Last: a folder without it was never finished.
    (out / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return open_tokens(out)


def open_tokens(folder: Path) -> Corpus:
    """The corpus in a folder of `tokenize`, memory-mapped.

    Raises:
      InputError: if the folder is none, or was never finished.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        known = {name: about[name] for name in ("sha256", "separator", "vocab_size", "validation_bytes")}
        for name in SPLITS:
            known[name] = np.memmap(folder / f"{name}.bin", about["dtype"], "r")
        tokenizer = folder / TOKENIZER
        return Corpus(**known, tokenizer=tokenizer if tokenizer.exists() else None)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise InputError(f"argument --data: {folder} has no {missing}; give a file or what `tokenize` made") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"argument --data: {folder / ABOUT} is damaged ({error!r})") from None


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


def _parquet(path: Path) -> list[tuple[bytes, str | None]]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise InputError("argument --data: .parquet needs pyarrow; install the extra gla_jax[data]") from None
    try:
        table = parquet.ParquetFile(path)
        columns = [name for name in ("text", "split") if name in table.schema_arrow.names]
        if "text" not in columns:
            names = ", ".join(table.schema_arrow.names)
            raise InputError(f'argument --data: {path} must have a column "text", and has {names}')
        rows = [row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist()]
    except (ArrowException, OSError) as error:
        raise InputError(f"argument --data: {path} is not a .parquet file ({str(error).splitlines()[0]})") from None
    documents = []
    for number, row in enumerate(rows, start=1):
        text, split = row["text"], row.get("split")
        if not isinstance(text, str) or split not in (None, *SPLITS):
            raise InputError(
                f'argument --data: {path} row {number} must have a "text" and a "split" of {SPLITS} or none'
            )
        documents.append((text.encode("utf-8"), split))
    return documents


def _array_record(path: Path) -> list[tuple[bytes, str | None]]:
    try:
        source = grain.sources.ArrayRecordDataSource(str(path))
        return [(_utf8(path, source[i]), None) for i in range(len(source))]
    except (ValueError, RuntimeError, OSError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).splitlines()[0]
        raise InputError(f"argument --data: {path} is not an .array_record file ({reason})") from None


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


def _encode(encoder: Any, texts: list[bytes]) -> Iterator[np.ndarray]:
    for first in range(0, len(texts), TOGETHER):
        some = texts[first : first + TOGETHER]
        if encoder is None:
            yield from (np.frombuffer(text, np.uint8) for text in some)
        else:
            encoded = encoder.encode_batch([text.decode("utf-8") for text in some], add_special_tokens=False)
            yield from (np.array(e.ids, np.uint32) for e in encoded)
