import hashlib
import json
import lzma

import numpy as np
import pytest

from gla_jax.train import InputError, load_corpus
from gla_jax.train.corpus import DOCUMENT, SHAKESPEARE


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
