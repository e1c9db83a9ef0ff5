import json
import subprocess
import sys
from pathlib import Path

import pytest

from gla_jax.train import InputError, MeshConfig
from gla_jax.train.run_folder import load_config, open_run

from .small import MODEL, small


def test_a_folder_explains_itself_and_opens_again(tmp_path):
    config = small(tmp_path / "deep" / "run", data=Path("some.txt"))
    with open_run(config, "abc") as folder:
        assert folder == config.run
    saved = json.loads((config.run / "config.json").read_text())
    assert [saved["steps"], saved["model"]["hidden_size"], saved["corpus_sha256"]] == [12, 32, "abc"]
    assert load_config(config.run) == config
    # The same text may lie elsewhere.
    with open_run(small(config.run, data=Path("moved.txt")), "abc"):
        pass
    # So may the devices.
    with open_run(small(config.run, mesh=MeshConfig(fsdp=2, axes="explicit"), profile=3, tensorboard=True), "abc"):
        pass


@pytest.mark.parametrize(
    ("changes", "sha256", "named"),
    [
        ({"steps": 13}, "abc", "--steps (12 there, 13 here)"),
        (
            {"model": MODEL.replace(num_layers=3), "seed": 4},
            "abc",
            "--model.num-layers (2 there, 3 here), --seed (0 there",
        ),
        ({"optimizer": "adamw"}, "abc", '--optimizer ("muon" there, "adamw" here)'),
        ({"data": Path("b.txt")}, "xyz", '--data (null there, "b.txt" here)'),
        ({}, "xyz", "--data (its text has changed)"),
    ],
)
def test_a_run_of_other_settings_is_refused_by_name(tmp_path, changes, sha256, named):
    with open_run(small(tmp_path), "abc"):
        (tmp_path / "log.jsonl").touch()
    with pytest.raises(InputError) as error, open_run(small(tmp_path, **changes), sha256):
        pass
    message = str(error.value)
    assert message.startswith(f"argument --run: {tmp_path} holds a run with other settings: {named}")
    assert message.endswith("give the same settings to go on with it, or another --run")
    assert "\n" not in message


def test_a_run_that_took_no_step_gives_way_to_other_settings(tmp_path):
    with open_run(small(tmp_path), "abc"):
        pass
    other = small(tmp_path, steps=13)
    with open_run(other, "abc"):
        pass
    assert load_config(tmp_path) == other


def test_folders_that_hold_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(InputError, match=r"has thesis.tex and no config.json; give a new or empty folder"),
        open_run(small(tmp_path), "abc"),
    ):
        pass
    with (
        pytest.raises(InputError, match="must be a folder, and a file is there"),
        open_run(small(tmp_path / "thesis.tex"), "abc"),
    ):
        pass
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is not JSON"), open_run(small(tmp_path), "abc"):
        pass
    with pytest.raises(InputError, match=r"argument RUN: .*config.json is not a run's"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"corpus_sha256": "abc", "steps": 3}')
    with pytest.raises(InputError, match=r"argument RUN: .*config.json is not a run's"):
        load_config(tmp_path)
    own = {"corpus_sha256": "abc", "data": None, "run": "x", "model": {"mixer": {"kind": "mine"}}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match=r"its mixer is of kind 'mine', which .*MIXERS does not have \(gla, "):
        load_config(tmp_path)
    with pytest.raises(
        InputError, match=r"argument RUN: .* has no config.json; give a folder that `gla-jax train` made"
    ):
        load_config(tmp_path / "nothing")


def test_one_process_at_a_time(tmp_path):
    holder = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        with (
            pytest.raises(InputError, match="is in use by another process; give another folder"),
            open_run(small(tmp_path), "abc"),
        ):
            pass
        process.stdin.close()
    with open_run(small(tmp_path), "abc"):
        pass
