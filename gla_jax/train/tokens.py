"""Text tokenised once, into a folder of memory-mapped token files that runs train on.

train.bin, validation.bin   the streams, little-endian unsigned integers of 1, 2 or 4 bytes
tokens.json                 their dtype, the separator, the vocabulary's size, the bytes held out, the text's SHA-256
tokenizer.json              the tokenizer, if there is one
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gla_jax.train.config import InputError
from gla_jax.train.corpus import DOCUMENT, Corpus, read_documents

ABOUT, TOKENIZER = "tokens.json", "tokenizer.json"
# Documents that a tokenizer has at once, one a thread.
TOGETHER = 256


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
    encoder = None if tokenizer is None else load_tokenizer(tokenizer)
    if encoder is not None:
        separator = encoder.get_vocab_size(with_added_tokens=True)
    out.mkdir(parents=True, exist_ok=True)
    dtype = next(d for d in ("<u1", "<u2", "<u4") if separator <= np.iinfo(d).max)
    for name, texts in (("train", documents.train), ("validation", documents.validation)):
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
        for name in ("train", "validation"):
            known[name] = np.memmap(folder / f"{name}.bin", about["dtype"], "r")
        tokenizer = folder / TOKENIZER
        return Corpus(**known, tokenizer=tokenizer if tokenizer.exists() else None)
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise InputError(f"argument --data: {folder} has no {missing}; give a file or what `tokenize` made") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"argument --data: {folder / ABOUT} is damaged ({error!r})") from None


def load_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer`.

    Raises:
      InputError: if the file is no tokenizer, or the library is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise InputError("argument --tokenizer: needs tokenizers; install the extra gla_jax[data]") from None
    if not path.is_file():
        raise InputError(f"argument --tokenizer: {path} does not exist; give a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception, whatever is wrong with a file
        raise InputError(f"argument --tokenizer: {path} is not a tokenizer.json ({error})") from None


def _encode(encoder: Any, texts: list[bytes]) -> Iterator[np.ndarray]:
    for first in range(0, len(texts), TOGETHER):
        some = texts[first : first + TOGETHER]
        if encoder is None:
            yield from (np.frombuffer(text, np.uint8) for text in some)
        else:
            encoded = encoder.encode_batch([text.decode("utf-8") for text in some], add_special_tokens=False)
            yield from (np.array(e.ids, np.uint32) for e in encoded)
