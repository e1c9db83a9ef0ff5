"""Training a GLA language model on text, and sampling from it."""

from gla_jax.train.config import InputError, MeshConfig, TrainConfig
from gla_jax.train.corpus import Corpus, load_corpus, tokenize
from gla_jax.train.loop import Result, train
from gla_jax.train.processes import Stopped
from gla_jax.train.sampling import continue_text, load_model

__all__ = [
    "Corpus",
    "InputError",
    "MeshConfig",
    "Result",
    "Stopped",
    "TrainConfig",
    "continue_text",
    "load_corpus",
    "load_model",
    "tokenize",
    "train",
]
