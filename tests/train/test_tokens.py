"""Tokens written once, in every format of text, and trained on."""

import io
import json

import numpy as np
import pytest

from gla_jax.train import InputError, continue_text, load_corpus, load_model, tokenize, train
from gla_jax.train.metrics import read_log
from gla_jax.train.sampling import run_tokenizer
from gla_jax.train.tokens import open_tokens

from .small import MODEL, small

TEXTS = [f"number {i}: é is two bytes, to be or not to be. " * 8 for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS, vocab_size=300)
    made.save(str(path))
    return path


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path


def same(a, b):
    np.testing.assert_array_equal(a.train, b.train)
    np.testing.assert_array_equal(a.validation, b.validation)
    assert a.validation_bytes == b.validation_bytes


def test_bytes_on_disk_are_the_bytes_of_the_text(jsonl, tmp_path):
    made = tokenize(jsonl, tmp_path / "out")
    assert isinstance(made.train, np.memmap)
    same(made, load_corpus(jsonl))
    same(made, load_corpus(tmp_path / "out"))
    assert made.validation_bytes == sum(len(text.encode()) for text in TEXTS[38:])


def test_a_tokenizers_tokens_say_the_text(jsonl, tokenizer, tmp_path):
    made = tokenize(jsonl, tmp_path / "out", tokenizer)
    assert made.train.dtype == np.uint16
    assert made.vocab_size == made.separator + 1 == 301
    reader = run_tokenizer(tmp_path / "out")
    documents = np.split(made.train, np.flatnonzero(made.train == made.separator))[1:-1]
    assert [reader.decode(document[1:]) for document in documents] == TEXTS[:38]
    assert len(made.train) < sum(map(len, TEXTS[:38])) / 2


def test_parquet_and_array_record(jsonl, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    records = pytest.importorskip("array_record.python.array_record_module")
    whole = load_corpus(jsonl)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    same(load_corpus(path), whole)
    parquet.write_table(pyarrow.table({"text": ["a", "b"], "split": ["validation", None]}), path)
    assert bytes(load_corpus(path).validation) == b"\xffa\xff"
    parquet.write_table(pyarrow.table({"words": TEXTS}), path)
    with pytest.raises(InputError, match=r'^argument --data: .* must have a column "text", and has words$'):
        load_corpus(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"^argument --data: .* is not a .parquet file"):
        load_corpus(path)
    path = tmp_path / "a.array_record"
    writer = records.ArrayRecordWriter(str(path), "group_size:1")
    for text in TEXTS:
        writer.write(text.encode())
    writer.close()
    same(load_corpus(path), whole)


def test_a_run_on_tokens_packs_mixes_evaluates_in_bytes_and_writes_text(jsonl, tokenizer, tmp_path):
    tokenize(jsonl, tmp_path / "tokens", tokenizer)
    tokenize(jsonl, tmp_path / "more", tokenizer)
    config = small(
        tmp_path / "run",
        data=tmp_path / "tokens",
        mix=(f"{tmp_path / 'more'}=0.5",),
        pack=True,
        optimizer="adamw",
        model=MODEL.replace(vocab_size=304),
        tensorboard=True,
        profile=2,
    )
    pytest.importorskip("tensorboardX")
    result = train(config, io.StringIO())
    losses = [record["loss"] for record in read_log(config.run / "log.jsonl") if "loss" in record]
    assert losses[-1] < losses[0]
    assert result.bits_per_byte < 8  # a byte costs less than a token of one or more bytes
    assert list((config.run / "tensorboard").iterdir())
    assert list((config.run / "profile").rglob("*.xplane.pb"))
    text = "".join(continue_text(load_model(config.run), "number", length=30, tokenizer=run_tokenizer(config.run)))
    assert text
    with pytest.raises(
        InputError, match=r"^argument --model.vocab-size: must be at least 301, the data's tokens, got 256"
    ):
        train(small(tmp_path / "other", data=tmp_path / "tokens"), io.StringIO())
    with pytest.raises(
        InputError, match=r"^argument --mix: .* must have the tokens of --data; tokenise it with the same"
    ):
        train(
            small(tmp_path / "other", data=tmp_path / "tokens", mix=(f"{jsonl}=1",), model=config.model), io.StringIO()
        )


def test_what_is_no_folder_or_tokenizer_is_refused(jsonl, tokenizer, tmp_path):
    full = tmp_path / "out"
    tokenize(jsonl, full)
    with pytest.raises(InputError, match=r"^argument OUT: .* must be a new or empty folder$"):
        tokenize(jsonl, full)
    (full / "train.bin").unlink()
    with pytest.raises(
        InputError, match=r"^argument --data: .* has no train.bin; give a file or what `tokenize` made$"
    ):
        open_tokens(full)
    (full / "tokens.json").write_text("{}")
    with pytest.raises(InputError, match=r"^argument --data: .*tokens.json is damaged"):
        open_tokens(full)
    with pytest.raises(InputError, match=r"^argument --tokenizer: .*nothing does not exist; give a tokenizer.json$"):
        tokenize(jsonl, tmp_path / "new", tmp_path / "nothing")
    with pytest.raises(InputError, match=r"^argument --tokenizer: .* is not a tokenizer.json"):
        tokenize(jsonl, tmp_path / "new", jsonl)
    assert not (tmp_path / "new").exists()
