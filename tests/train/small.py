"""A run small enough to train in seconds, and what its log says."""

import dataclasses
from pathlib import Path
from typing import Any

from gla_jax.nn import GLAConfig
from gla_jax.train import TrainConfig
from gla_jax.train.metrics import read_log

MODEL = GLAConfig.tiny().replace(hidden_size=32, num_layers=2, num_heads=2, mlp_size=64, layer_unroll=1)


def small(run: str | Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        run=Path(run), model=MODEL, steps=12, batch=8, length=32, eval_every=6, save_every=5, sample=20
    )
    return dataclasses.replace(config, **changes)


def records(run: Path) -> list[dict[str, Any]]:
    """The log without what differs from one time to the next."""
    return [
        {name: value for name, value in record.items() if name != "timing"} for record in read_log(run / "log.jsonl")
    ]
