import hashlib
import io
import json
import lzma

import numpy as np
import pytest

from gla_jax.train import InputError, continue_text, load_corpus, load_model, tokenize, train
from gla_jax.train.corpus import DOCUMENT, SHAKESPEARE, open_tokens
from gla_jax.train.metrics import read_log
from gla_jax.train.sampling import run_tokenizer

from .small import MODEL, small


def texts(stream):
    assert stream[0] == stream[-1] == DOCUMENT
    return bytes(stream[1:-1]).split(bytes([DOCUMENT]))


def test_shakespeare_is_whole_and_holds_out_three_plays():
    corpus = load_corpus()
    train, validation = texts(corpus.train), texts(corpus.validation)
    assert [len(train), len(validation)] == [39, 3]
    assert [len(corpus.train) - 40, len(corpus.validation) - 4] == [4_712_937, 339_252]
    assert sorted(text.split(b"\n")[0] for text in validation) == [
        b"KING JOHN",
        b"MACBETH",
        b"TWELFTH NIGHT; OR, WHAT YOU WILL",
    ]
    assert corpus.sha256 == hashlib.sha256(lzma.decompress(SHAKESPEARE.read_bytes())).hexdigest()
    everything = bytes(corpus.train).lower() + bytes(corpus.validation).lower()
    assert everything.count(b"gutenberg") == everything.count(b"copyright") == 0
    assert SHAKESPEARE.stat().st_size < 2.5e6


def test_no_held_out_line_of_length_is_trained_on():
    corpus = load_corpus()
    trained = bytes(corpus.train)
    lines = [line for line in bytes(corpus.validation).split(b"\n") if len(line) > 30]
    assert sum(line in trained for line in lines) / len(lines) < 0.01


def test_a_text_file_is_one_document_whose_end_is_held_out(tmp_path):
    text = "é" * 1000  # two bytes each: the cut must not fall inside one
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    corpus = load_corpus(path)
    (train,), (validation,) = texts(corpus.train), texts(corpus.validation)
    assert train.decode() + validation.decode() == text
    assert len(validation) == 100
    # Without a suffix, and compressed, the same.
    for other in (tmp_path / "b", tmp_path / "c.txt.xz"):
        other.write_bytes(lzma.compress(path.read_bytes()) if other.suffix == ".xz" else path.read_bytes())
        np.testing.assert_array_equal(load_corpus(other).train, corpus.train)


def test_jsonl_documents_are_held_out_from_the_end_or_as_they_say(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i}"}) + "\n\n" for i in range(40)), encoding="utf-8")
    corpus = load_corpus(path)
    assert texts(corpus.train) == [f"number {i}".encode() for i in range(38)]
    assert texts(corpus.validation) == [b"number 38", b"number 39"]
    lines = [{"text": "a", "split": "validation"}, {"text": "b"}, {"text": "", "split": "train"}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    corpus = load_corpus(path)
    assert texts(corpus.train) == [b"b"]
    assert texts(corpus.validation) == [b"a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt is empty; it must hold text"),
        ("a.txt", b" \n\n", "a.txt is empty; it must hold text"),
        ("a.jsonl", b"\n", "a.jsonl is empty; it must hold text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl is empty; it must hold text"),
        ("a.txt", b"one\ntwo \xff\n", "a.txt must be UTF-8, but line 2 has byte 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl line 2 is not JSON (Expecting value at column 10)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}', 'a.jsonl line 3 must be an object with a string "text"'),
        ("a.jsonl", b'["a"]', 'a.jsonl line 1 must be an object with a string "text"'),
        ("a.jsonl", b'{"text": 1}', 'a.jsonl line 1 must be an object with a string "text"'),
        (
            "a.jsonl",
            b'{"text": "a", "split": "test"}',
            "a.jsonl line 1: \"split\" must be one of train, validation, got 'test'",
        ),
        (
            "a.jsonl",
            b'{"text": "\\ud800"}',
            'a.jsonl line 1: "text" has half of a surrogate pair; it must be Unicode text',
        ),
        ("a.jsonl", b'{"text": "a", "split": "train"}', "a.jsonl holds nothing out; a line must say"),
        ("a.jsonl", b'{"text": "a", "split": "validation"}', "a.jsonl has nothing to train on; a line must say"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_corpus(path)
    assert str(error.value).startswith(f"argument --data: {tmp_path}/{message}")
    assert "\n" not in str(error.value)


def test_what_is_no_readable_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"argument --data: .*nothing does not exist; give a text or .jsonl file"):
        load_corpus(tmp_path / "nothing")
    with pytest.raises(
        InputError, match=r"argument --data: .* has no tokens.json; give a file or what `tokenize` made"
    ):
        load_corpus(tmp_path)
    broken = tmp_path / "a.txt.xz"
    broken.write_bytes(b"not xz")
    with pytest.raises(InputError, match=r"argument --data: cannot read .*a.txt.xz: Input format not supported"):
        load_corpus(broken)


# Tokens written once, in every format of text, and trained on.

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
    with pytest.raises(
        InputError, match=r"^argument --tokenizer: .*nothing: no such file; it must be a tokenizer.json"
    ):
        tokenize(jsonl, tmp_path / "new", tmp_path / "nothing")
    with pytest.raises(InputError, match=r"^argument --tokenizer: .* is not a tokenizer.json"):
        tokenize(jsonl, tmp_path / "new", jsonl)
    assert not (tmp_path / "new").exists()
