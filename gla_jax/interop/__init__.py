"""Other libraries: their checkpoints as safetensors, tokenizers, and lm-evaluation-harness."""

from gla_jax.interop.harness import Harness, make_lm
from gla_jax.interop.pretrained import load_pretrained, save_pretrained
from gla_jax.interop.scoring import Bucket, Likelihood, continuation_likelihoods, perplexity_by_place
from gla_jax.interop.text import load_tokenizer, stream_text
from gla_jax.safetensors import CheckpointError

__all__ = [
    "Bucket",
    "CheckpointError",
    "Harness",
    "Likelihood",
    "continuation_likelihoods",
    "load_pretrained",
    "load_tokenizer",
    "make_lm",
    "perplexity_by_place",
    "save_pretrained",
    "stream_text",
]
