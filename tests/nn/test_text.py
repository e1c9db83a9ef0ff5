"""Streaming text: the pieces are the text, whole characters at a time, whatever the tokenizer joins."""

import numpy as np
import pytest

from gla_jax.files import CheckpointError
from gla_jax.interop import ByteTokenizer, load_tokenizer, stream_text
from gla_jax.nn.text import _pieces, save_byte_tokenizer, text_after
from tests.nn.family import CONFIGS
from tests.nn.options import build


class Ids(list):
    @property
    def ids(self):
        return self


class Bytes:
    """Bytes as tokens; 256 is a token that decodes to nothing."""

    def encode(self, text):
        return Ids(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Words:
    """Words as tokens, with spaces between them: what a token shows depends on whether one stands before it."""

    words = ("to", "be", "or", "not")

    def encode(self, text):
        return Ids(self.words.index(word) for word in text.split())

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)


def pieces(tokenizer, prompt, text, stops=()):
    drawn = ([token] for token in tokenizer.encode(text).ids)
    return list(_pieces(drawn, tokenizer, list(tokenizer.encode(prompt).ids), frozenset(stops)))


@pytest.mark.parametrize("text", ["plain", "naïve café", "日本語", "a👩‍👩‍👧b", "�", ""])
def test_bytes_of_a_character_come_together(text):
    made = pieces(Bytes(), "Über ", text)
    assert "".join(made) == text
    assert "�" not in "".join(made).replace("�", "", text.count("�"))
    assert all(len(piece) == 1 for piece in made)


def test_bytes_that_are_no_character_are_shown_at_the_end():
    drawn = ([byte] for byte in "é".encode()[:1])
    assert list(_pieces(drawn, Bytes(), [65], frozenset())) == ["�"]


def test_spaces_between_tokens_are_kept():
    made = pieces(Words(), "to be", "or not to be")
    assert made == [" or", " not", " to", " be"]


def test_stop_tokens_are_not_shown():
    drawn = iter([[97], [10], [98]])
    assert list(_pieces(drawn, Bytes(), [65], frozenset([10]))) == ["a"]


def test_from_a_model():
    model = build(CONFIGS["gla"].replace(vocab_size=128))
    made = "".join(stream_text(model, Bytes(), "hello", 12))
    assert len(made.encode()) == 12
    assert made == "".join(stream_text(model, Bytes(), "hello", 12, temperature=0.0))
    stops = np.array([ord(made[5])] * 2)
    assert "".join(stream_text(model, Bytes(), "hello", 12, stop_tokens=stops)) == made[: made.index(made[5])]
    with pytest.raises(ValueError, match=r"^prompt: must have at least one token"):
        stream_text(model, Bytes(), "", 3)
    with pytest.raises(ValueError, match=r"^num_samples: must be 1 to stream text, got 2"):
        stream_text(model, Bytes(), "a", 3, num_samples=2)


def test_a_tokenizer_of_the_package(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the extra gla_jax[hub] is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["to be or not to be, that is the question: naïve 日本語"] * 3, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = " is naïve, not 日本 — 語 👩‍👧"
    assert "".join(pieces(tokenizer, "to be", text)) == text


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no such file; it must be a tokenizer.json$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_that_is_none(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra gla_jax[hub] is not installed")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is not a tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_prompt_whose_last_tokens_begin_within_a_character():
    # As byte fallback has it: one byte too few, and all that follow each other are U+FFFD.
    class Fallback(Bytes):
        def decode(self, ids):
            try:
                return bytes(ids).decode()
            except UnicodeDecodeError:
                return "\ufffd" * len(ids)

    assert "".join(pieces(Fallback(), "日本語", "日 x")) == "日 x"


def test_a_text_stands_after_one_token():
    class Beginning(Bytes):
        def encode(self, text):
            return Ids([256, *text.encode()])

    assert text_after(Bytes(), "a", 255) == [255, 97]
    assert text_after(Beginning(), "a", 255) == [256, 97]


def test_the_tokenizer_of_bytes_is_saved_for_other_libraries(tmp_path):
    pytest.importorskip("tokenizers", reason="the extra gla_jax[hub] is not installed")
    save_byte_tokenizer(tmp_path)
    there, ours = load_tokenizer(tmp_path), ByteTokenizer()
    for text in ("", "To be é 漢字 👩‍👩‍👧\n\t\x00 ÿ¡\xad", "  a  b"):
        assert there.encode(text).ids == ours.encode(text).ids
        assert there.decode(there.encode(text).ids) == text
    assert [there.decode([i]) for i in range(256)] == [ours.decode([i]) for i in range(256)]
    assert there.get_vocab_size() == 256
    assert there.encode("a<|endoftext|>").ids == [97, 255]
