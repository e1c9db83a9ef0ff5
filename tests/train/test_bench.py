import dataclasses
import json

import jax
import pytest

from gla_jax import cli
from gla_jax.train import InputError
from gla_jax.train.bench import PRESETS, BenchTrainConfig, _work, bench_train

QUICK = BenchTrainConfig(preset="tiny", batch=1, length=32, layer_unroll=1, steps=1, repeats=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_compute_in_bfloat16_with_all_layers_written_out(preset):
    model = BenchTrainConfig(preset=preset).model()
    assert (model.dtype, model.param_dtype) == ("bfloat16", "float32")
    assert model.layer_unroll == model.num_layers
    assert BenchTrainConfig(preset=preset, layer_unroll=2, remat="dots").model().remat == "dots"


@pytest.mark.parametrize("preset", PRESETS)
def test_softmax_attention_is_cudnns_on_gpus(preset, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    kernels = [getattr(mixer, "kernel", None) for mixer in BenchTrainConfig(preset=preset).model().mixers]
    assert kernels == ["cudnn" if preset.startswith("transformer") else None]
    assert {getattr(x, "kernel", None) for x in BenchTrainConfig(preset=preset, dtype="float32").model().mixers} == {
        None
    }


def test_a_record_says_what_was_timed_where_and_with_what(tmp_path, capsys):
    out = tmp_path / "train.json"
    flags = ("--preset=tiny", "--batch=1", "--length=32", "--layer-unroll=1", "--steps=1", "--repeats=2")
    # The op that compiles soonest.
    assert cli.main(["bench", "train", *flags, "--implementation=reference", "--profile", f"--out={out}"]) == 0
    record = json.loads(out.read_text())
    assert record["parameters"] == 902_784
    assert record["device"] == "cpu"
    assert record["op_kernels"] == 0
    assert len(record["step_ms"]) == 2
    slowest, fastest = max(record["step_ms"]), min(record["step_ms"])
    assert 32 / slowest * 1e3 - 1 <= record["tokens_per_s"] <= 32 / fastest * 1e3 + 1
    assert sum(row["share"] for row in record["kernels"]) == pytest.approx(1, abs=0.01)
    assert {"mixer", "mlp", "head", "optimizer"} <= {row["part"] for row in record["kernels"]}
    printed = capsys.readouterr().out
    assert "902,784 parameters, 1 x 32 tokens a step, on cpu" in printed
    assert f"{record['tokens_per_s']:,} tokens/s, " in printed
    assert f"written: {out}" in printed


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_TNT", ("all parts", "matrix products")),
        ("anonymous_mosaic_gpu_kernel", ("op", "forward and backward")),
        ("loop_add_fusion_3", ("mlp", "elementwise")),
        ("input_reduce_fusion", ("optimizer", "elementwise")),
        ("MemcpyD2D", ("all parts", "copies")),
    ],
)
def test_kernels_from_a_cuda_graph_are_told_by_their_names(kernel, found):
    sources = {"loop_add_fusion.3": "jit(train)/jvp()/jit(turn)/mlp/add", "input_reduce_fusion": "jit(x)/optimizer/add"}
    assert _work("", kernel, sources) == found
    sources = {"mpmd_map.2": "jit(train)/transpose(jvp())/mixer/mpmd_map"}
    assert _work("mpmd_map.2", "mosaic_gpu_kernel", sources) == ("op", "backward")


def test_bad_values_are_named(tmp_path):
    with pytest.raises(InputError, match=r"^argument --steps: must be at least 1, got 0$"):
        dataclasses.replace(QUICK, steps=0)
    with pytest.raises(InputError, match=r"^argument --loss-parts: must be at least 1 or None, got 0$"):
        dataclasses.replace(QUICK, loss_parts=0)
    with pytest.raises(InputError, match=r"^argument --out: .*nowhere is no folder$"):
        bench_train(dataclasses.replace(QUICK, out=tmp_path / "nowhere" / "x.json"))
