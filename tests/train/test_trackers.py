import dataclasses
import sys
import types

import jax
import pytest
from flax import nnx

from gla_jax.nn import GLAConfig, GLAForCausalLM
from gla_jax.train import InputError
from gla_jax.train.trackers import Trackers, flops_per_token, memory_gb, peak_flops

from .small import MODEL, small

RECORD = {"step": 3, "loss": 1.5, "rejected": "a reason", "timing": {"tokens_per_s": 10}}


def test_operations_are_those_of_the_matrices_and_the_recurrence():
    """340m: 341.7 M parameters of which embeddings count as the output layer; h = 4, k = 128, v = 256."""
    config = GLAConfig.gla_340m()
    abstract = jax.eval_shape(lambda: nnx.state(GLAForCausalLM(config, rngs=nnx.Rngs(0))))
    parameters = sum(x.size for x in jax.tree.leaves(abstract))
    assert flops_per_token(config, parameters) == 6 * parameters + 24 * 4 * 12 * 128 * 256
    untied = dataclasses.replace(MODEL, tie_embeddings=False)
    assert flops_per_token(untied, 100_000) == flops_per_token(MODEL, 100_000 - 256 * 32)


def test_peaks_are_known_by_the_devices_name(monkeypatch):
    assert peak_flops() is None
    for kind, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v6 lite", 918e12)):
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [types.SimpleNamespace(device_kind=kind)])
        assert peak_flops() == peak


def test_memory_is_that_of_the_process_on_a_cpu():
    assert 0.05 < memory_gb() < 100


def test_wandb_gets_numbers_alone(tmp_path, monkeypatch):
    logged, options = [], {}
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **given: options.update(given) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trackers = Trackers(small(tmp_path, wandb="mine"), tmp_path)
    trackers.write(RECORD)
    trackers.close()
    assert options == {"project": "mine", "dir": str(tmp_path), "name": tmp_path.name, "resume": "allow"}
    assert logged == [(3, {"loss": 1.5, "timing/tokens_per_s": 10}), "end"]


@pytest.mark.parametrize(("module", "flag"), [("wandb", {"wandb": "mine"}), ("tensorboardX", {"tensorboard": True})])
def test_a_library_that_is_missing_is_named(module, flag, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"needs {module}; install gla_jax\[track\]$"):
        Trackers(small(tmp_path, **flag), tmp_path)
    Trackers(small(tmp_path), tmp_path).write(RECORD)
