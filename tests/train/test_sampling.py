import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax.nn import GLAForCausalLM
from gla_jax.nn import text as nn_text
from gla_jax.train import InputError, continue_text, load_model, train

from .small import MODEL, small


@pytest.fixture(scope="module")
def model():
    return GLAForCausalLM(MODEL, rngs=nnx.Rngs(0))


def drawn(monkeypatch, model, content):
    monkeypatch.setattr(nn_text, "stream", lambda *_, **__: iter(np.frombuffer(content, np.uint8)[:, None]))
    return list(continue_text(model, "", length=100))


def test_characters_are_shown_when_whole_and_stray_bytes_marked(monkeypatch, model):
    assert drawn(monkeypatch, model, "aé€".encode()) == ["a", "é", "€"]
    assert drawn(monkeypatch, model, b"a\x80b\xc3") == ["a", "�b", "�"]


def test_the_text_ends_where_a_document_does(monkeypatch, model):
    assert drawn(monkeypatch, model, b"the end\xffmore") == list("the end")


def test_temperature_zero_takes_the_likeliest_byte_of_the_full_forward(model):
    made = "".join(continue_text(model, "ROMEO.", length=12, temperature=0.0)).encode()
    tokens = np.frombuffer(b"\xffROMEO.", np.uint8).astype(np.int32)
    expected = b""
    for _ in range(12):
        token = int(jnp.argmax(model(jnp.asarray(tokens[None]))[0, -1]))
        tokens, expected = np.append(tokens, np.int32(token)), expected + bytes([token])
    assert made == expected.decode("utf-8", errors="replace").encode()


def test_the_seed_decides(model):
    a, b, c = ("".join(continue_text(model, "", length=30, seed=seed)) for seed in (1, 1, 2))
    assert a == b != c


def test_a_trained_models_weights_are_loaded(tmp_path, text):
    config = small(tmp_path / "run", data=text, steps=1)
    train(config)
    model = load_model(config.run)
    initial = GLAForCausalLM(MODEL, rngs=nnx.Rngs(0))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), nnx.state(model), nnx.state(initial))
    assert max(jax.tree.leaves(moved)) > 0
    assert len("".join(continue_text(model, "a", length=5, temperature=0.0))) <= 5


def test_folders_without_a_model(tmp_path):
    with pytest.raises(InputError, match=r"argument RUN: .* has no config.json"):
        load_model(tmp_path)
