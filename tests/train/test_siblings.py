"""Runs of other layers than GLA: their settings survive, they train, and what is restored is what was trained."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gla_jax import cli
from gla_jax.nn import CausalLMConfig, GatedLinearAttentionConfig, SoftmaxAttentionConfig
from gla_jax.nn.config import MIXERS
from gla_jax.train import InputError, MeshConfig, load_model, train
from gla_jax.train.config import config_from_json, config_to_json
from gla_jax.train.mesh import make_mesh
from gla_jax.train.trackers import flops_per_token

from .small import records, small

SIZES = {"hidden_size": 64, "num_layers": 1, "mlp_size": 32, "layer_unroll": 1}
HYBRID = CausalLMConfig.tiny("attention").replace(
    mixer=(GatedLinearAttentionConfig(num_heads=2), SoftmaxAttentionConfig(num_heads=2, window=8)), num_layers=2
)
MODELS = {name: CausalLMConfig.tiny(name).replace(**SIZES) for name in MIXERS} | {"hybrid": HYBRID}


@pytest.mark.parametrize("name", MODELS)
def test_settings_survive_json(name):
    config = small("runs/a", model=MODELS[name])
    saved = json.loads(json.dumps(config_to_json(config)))
    assert config_from_json(saved) == config
    assert MODELS[name].mixers == config.model.mixers


# The normal suite trains one; `make exhaustive` all.
OTHERS = [pytest.param(name, marks=pytest.mark.exhaustive) for name in MODELS if name != "linear"]


@pytest.mark.parametrize("name", ["linear", *OTHERS])
def test_it_trains_and_is_restored(name, tmp_path, text):
    alone = MeshConfig(data=1)  # compiles in a fraction of the time
    config = small(tmp_path / "run", data=text, model=MODELS[name], steps=3, eval_every=3, batch=4, mesh=alone)
    train(config, io.StringIO())
    losses = [record["loss"] for record in records(config.run) if "loss" in record]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    model = load_model(config.run)
    assert model.config == config.model
    tokens = jnp.asarray(np.frombuffer(text.read_bytes()[:33], np.uint8), jnp.int32)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens[None, :-1])
    ahead = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[0]), tokens[1:, None], 1))
    assert float(ahead) < losses[0]


def test_the_command_takes_a_mixer_and_its_flags(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "train", lambda config: seen.append(config) or (_ for _ in ()).throw(InputError("seen")))
    flags = ["--model.mixer.num-heads=4", "--model.mixer.rope-theta=None", "--model.num-layers", "3", "--steps=7"]
    for mixer in (["--model.mixer", "retnet"], ["--model.mixer=retnet"]):
        assert cli.main(["train", *mixer, *flags]) == 2
    wanted = CausalLMConfig.tiny("retnet").replace(mixer=MIXERS["retnet"](num_heads=4, rope_theta=None), num_layers=3)
    assert [config.model for config in seen] == [wanted, wanted]
    assert seen[0].steps == 7
    assert cli.main(["train", "--model.mixer=gla", "--model.num-heads=1"]) == 2
    assert seen[2] == cli.TrainConfig(model=cli.TrainConfig().model.replace(num_heads=1))
    capsys.readouterr()
    for arguments, given in ((["--model.mixer", "s4"], "'s4'"), (["--model.mixer"], "''")):
        assert cli.main(["train", *arguments]) == 2
        names = ", ".join(MIXERS)
        assert capsys.readouterr().err == f"gla-jax: argument --model.mixer: must be one of {names}, got {given}\n"


def test_a_mesh_that_does_not_fit_is_named():
    model = MODELS["retnet"]
    with pytest.raises(InputError, match=r"--mesh: tensor = 4 must divide --model.mixer.num-heads = 2"):
        make_mesh(small("runs/a", model=model, mesh=MeshConfig(tensor=4)))
    with pytest.raises(InputError, match=r"--mesh.sequence: must be 1 but for gated linear attention, got 2"):
        make_mesh(small("runs/a", model=model, mesh=MeshConfig(sequence=2)))


def test_operations_of_states_and_of_attention():
    model, parameters = MODELS["retnet"], 100_000
    assert flops_per_token(model, parameters, 512) == 6 * parameters + 12 * 2 * 32 * 64
    # Half of 512 tokens, on average, for keys and values of 64 numbers.
    assert flops_per_token(MODELS["attention"], parameters, 512) == 6 * parameters + 12 * 64 * 256
    windowed = HYBRID.replace(num_layers=4)
    state = 2 * 32 * 64
    assert flops_per_token(windowed, parameters, 512) == 6 * parameters + 12 * (2 * state + 2 * 128 * 4)
