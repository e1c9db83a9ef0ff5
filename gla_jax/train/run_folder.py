"""A run's folder: what it holds, that its settings are those asked for, and that one process at a time writes there.

config.json    the run's settings, and the SHA-256 of its corpus
log.jsonl      a record a step, and one an evaluation
tokenizer.json the tokenizer, if the data have one
checkpoints/   the newest few, one folder a step
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gla_jax.train.config import InputError, TrainConfig, config_from_json, config_to_json, differences

CONFIG, LOG, CHECKPOINTS, LOCK = "config.json", "log.jsonl", "checkpoints", ".lock"
# Settings that a run may go on without.
NO_MATTER = ("mesh", "distributed", "profile", "tensorboard", "wandb", "keep")


@contextlib.contextmanager
def open_run(config: TrainConfig, corpus_sha256: str) -> Iterator[Path]:
    """The folder of a new run, or of one with the same settings, for as long as the context lasts.

    Raises:
      InputError: if the folder holds a run with other settings or another corpus, or something else than a run, or is
        in use by another process.
    """
    folder = config.run
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"argument --run: {folder} must be a folder, and a file is there") from None
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"argument --run: {folder} is in use by another process; give another folder") from None
        _claim(folder, config, corpus_sha256)
        yield folder


def load_config(folder: Path) -> TrainConfig:
    """The settings of the run in a folder.

    Raises:
      InputError: if it holds no run.
    """
    try:
        saved = _read(folder / CONFIG)
        del saved["corpus_sha256"]
        return config_from_json(saved)
    except FileNotFoundError:
        raise InputError(f"argument RUN: {folder} has no {CONFIG}; give a folder that `gla-jax train` made") from None
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"argument RUN: {folder / CONFIG} is not a run's: {error}") from None


def _claim(folder: Path, config: TrainConfig, corpus_sha256: str) -> None:
    given = {**config_to_json(config), "corpus_sha256": corpus_sha256}
    path = folder / CONFIG
    fresh = path.with_suffix(".tmp")
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK, CONFIG, fresh.name))

    def write() -> None:
        fresh.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")
        fresh.replace(path)

    if not path.exists():
        if others:
            raise InputError(f"argument --run: {folder} has {others[0]} and no {CONFIG}; give a new or empty folder")
        write()
        return
    try:
        saved = _read(path)
    except ValueError as error:
        raise InputError(f"argument --run: {path} is not JSON ({error}); give a new folder") from None
    # Where the corpus and the run lie does not matter, nor on what devices; what the corpus says does.
    same_text = saved.get("corpus_sha256") == given["corpus_sha256"]
    ignored = {"run", "corpus_sha256", *NO_MATTER} | ({"data"} if same_text else set())
    old, new = ({name: x[name] for name in x.keys() - ignored} for x in (saved, given))
    changed = differences(old, new)
    if not same_text and saved.get("data") == given["data"]:
        changed.append("--data (its text has changed)")
    if changed and "corpus_sha256" in saved and not others:
        # A run that was refused, or stopped before its first step: nothing would be lost.
        write()
    elif changed:
        raise InputError(
            f"argument --run: {folder} holds a run with other settings: {', '.join(changed)}; "
            "give the same settings to go on with it, or another --run"
        )


def _read(path: Path) -> dict[str, Any]:
    fields = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    return fields
