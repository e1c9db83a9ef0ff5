"""What a step costs, and where its record goes beside the JSONL log: the device's use, tensorboard, wandb."""

import resource
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from gla_jax.nn import SoftmaxAttentionConfig
from gla_jax.nn.config import ModelConfig
from gla_jax.nn.recurrent import MixerConfig
from gla_jax.train.config import InputError, TrainConfig

# Dense bfloat16 operations a second by what JAX calls the device (the makers' data sheets).
PEAKS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def flops_per_token(model: ModelConfig, parameters: int, length: int = 0) -> float:
    """Operations of a training step a token: 6 a parameter that multiplies, and 12 a number of a layer's state.

    A token of softmax attention multiplies with what it sees of `length` tokens instead, on average, k and v each. The
    backward counts twice the forward, and what remat computes again not at all (as in arXiv 2204.02311, appendix B,
    for the model's FLOPs utilisation). Lookups multiply nothing: an embedding counts if it is also the output layer.
    """
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size

    def mixing(mixer: MixerConfig) -> int | float:
        layer: Any = nnx.eval_shape(lambda: mixer.build(model.hidden_size, rngs=nnx.Rngs(0)))
        if isinstance(mixer, SoftmaxAttentionConfig):
            return mixer.num_heads * layer.head_size * min(length, mixer.window or length) / 2
        return jax.eval_shape(lambda: layer.init_cache(1))["state"].size

    layers = sum(mixing(mixer) for mixer in model.mixers) * model.num_layers / len(model.mixers)
    return 6.0 * (parameters - looked_up) + 12.0 * layers


def peak_flops() -> float | None:
    """What the first device can do at most in a second, in bfloat16; None where that is not known, as of CPUs."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)


def memory_gb() -> float:
    """The most memory in use so far, in 10^9 bytes: of the first device, or of the process where devices do not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    used = stats.get("peak_bytes_in_use") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(used / 1e9, 3)


class Trackers:
    """Sends records to tensorboard and wandb, as the config says; to neither by default.

    Raises:
      InputError: if the library is not installed.
    """

    def __init__(self, config: TrainConfig, folder: Path):
        self._board = self._wandb = None
        if config.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ModuleNotFoundError:
                raise InputError("argument --tensorboard: needs tensorboardX; install gla_jax[track]") from None
            self._board = SummaryWriter(str(folder / "tensorboard"))
        if config.wandb:
            try:
                import wandb  # pyrefly: ignore[missing-import]
            except ModuleNotFoundError:
                raise InputError("argument --wandb: needs wandb; install gla_jax[track]") from None
            self._wandb = wandb.init(project=config.wandb, dir=str(folder), name=folder.name, resume="allow")

    def write(self, record: dict[str, Any]) -> None:
        """Send the numbers of a record {"step": ..., ...}; those of its "timing" as timing/..."""
        step = record["step"]
        flat = {**record, **{f"timing/{name}": x for name, x in record.get("timing", {}).items()}}
        values = {name: x for name, x in flat.items() if isinstance(x, int | float) and name != "step"}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Write what is left."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
