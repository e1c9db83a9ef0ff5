import json
from pathlib import Path

import pytest

from gla_jax.nn import CausalLMConfig, GatedLinearAttentionConfig
from gla_jax.nn.config import MIXERS
from gla_jax.train import InputError, MeshConfig, TrainConfig
from gla_jax.train.config import _check_types, config_from_json, config_to_json, differences

from .small import small


@pytest.mark.parametrize("data", [None, Path("texts/mine.jsonl")])
def test_a_config_survives_json(data):
    config = small(Path("runs/a"), data=data, optimizer="adamw", mix=("b=2",), mesh=MeshConfig(fsdp=2))
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


def test_a_layer_of_ones_own_is_saved_by_its_name_in_mixers(monkeypatch):
    class MineConfig(GatedLinearAttentionConfig):
        pass

    config = small("runs/mine", model=CausalLMConfig.tiny("gla").replace(mixer=MineConfig(num_heads=2)))
    with pytest.raises(InputError, match=r"--model.mixer: MineConfig has no name .*MIXERS\["):
        config_to_json(config)
    monkeypatch.setitem(MIXERS, "mine", MineConfig)
    assert config_from_json(json.loads(json.dumps(config_to_json(config)))) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "argument --steps: must be at least 1, got 0"),
        ("save_every", 0, "argument --save-every: must be at least 1, got 0"),
        ("learning_rate", float("nan"), "argument --learning-rate: must be a positive number, got nan"),
        ("final_learning_rate", 1.5, "argument --final-learning-rate: must be between 0 and 1, got 1.5"),
        ("weight_decay", -1.0, "argument --weight-decay: must be at least 0, got -1.0"),
        ("accumulate", 3, "argument --accumulate: must be a divisor of --batch = 4, got 3"),
        ("pieces", 3, "argument --pieces: must be a divisor of --length = 256, got 3"),
        ("spike", 1.0, "argument --spike: must be above 1 or None, got 1.0"),
        ("ema", 1.0, "argument --ema: must be at least 0 and below 1, got 1.0"),
        ("profile", 0, "argument --profile: must be at least 1 or None, got 0"),
        ("seed", -1, "argument --seed: must be between 0 and 2^32 - 1, got -1"),
        ("sample", -1, "argument --sample: must be at least 0, got -1"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(InputError) as error:
        TrainConfig(**{field: value})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("run", "runs/a", "argument --run: must be of type Path, got 'runs/a'"),
        ("data", 3, "argument --data: must be of type Path | None, got 3"),
        ("steps", "3", "argument --steps: must be of type int, got '3'"),
        ("batch", True, "argument --batch: must be of type int, got True"),
        ("spike", "x", "argument --spike: must be of type float | None, got 'x'"),
        ("mix", ["a=1"], "argument --mix: must be of type tuple, got ['a=1']"),
        ("optimizer", "sgd", "argument --optimizer: must be one of muon, adamw, got 'sgd'"),
        ("mesh", 3, "argument --mesh: must be of type MeshConfig, got 3"),
        ("model", None, "argument --model: must be of type ModelConfig, got None"),
    ],
)
def test_wrong_types_are_named(field, value, message):
    # The check by itself: while tests run, beartype would refuse most of these values first.
    config = TrainConfig()
    object.__setattr__(config, field, value)
    with pytest.raises(InputError) as error:
        _check_types(config)
    assert str(error.value) == message


def test_attention_without_a_window_bounds_what_is_sampled_and_read_in_pieces():
    model = CausalLMConfig.tiny("attention")
    assert TrainConfig(model=model, length=4096, sample=2047).pieces == 1
    with pytest.raises(
        InputError, match=r"^argument --sample: must be below --model.mixer.cache-size = 2048, got 2048$"
    ):
        TrainConfig(model=model, sample=2048)
    with pytest.raises(InputError, match=r"^argument --pieces: must be 1 with --length above --model.mixer.cache-size"):
        TrainConfig(model=model, length=4096, pieces=2)


def test_the_vocabulary_must_hold_all_bytes():
    with pytest.raises(InputError, match=r"argument --model.vocab-size: must be at least 256, got 100"):
        TrainConfig(model=TrainConfig().model.replace(vocab_size=100))


def test_differences_name_flags_and_both_values():
    saved = {"steps": 10, "model": {"num_heads": 2, "dtype": "float32"}, "seed": 0}
    given = {"steps": 20, "model": {"num_heads": 4, "dtype": "float32"}, "seed": 0}
    assert differences(saved, given) == ["--model.num-heads (2 there, 4 here)", "--steps (10 there, 20 here)"]
    assert differences(saved, saved) == []
