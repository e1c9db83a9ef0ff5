"""Text to train on: the corpus that ships with the package, or files of documents.

A corpus is two streams of tokens, one to train on and one held out. Each document stands between two separators: a
model that reads one knows that a text begins, one that predicts it that it ends. Where tokens are bytes the separator
is DOCUMENT, 0xFF, which no UTF-8 text contains; a tokenizer's is the number after its vocabulary.
"""

import dataclasses
import hashlib
import json
import lzma
from pathlib import Path

import grain
import numpy as np
from jaxtyping import Integer

from gla_jax.train.config import InputError

DOCUMENT = 0xFF
SHAKESPEARE = Path(__file__).with_name("shakespeare.jsonl.xz")
HELD_OUT = 0.05
SPLITS = ("train", "validation")

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
        from gla_jax.train.tokens import open_tokens

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
