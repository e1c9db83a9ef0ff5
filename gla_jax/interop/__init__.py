"""Other libraries: their checkpoints as safetensors, tokenizers, and lm-evaluation-harness."""

from gla_jax.files import CheckpointError
from gla_jax.interop.harness import Harness, make_lm, run_tasks
from gla_jax.interop.pretrained import convert, end_of_text, load_pretrained, save_pretrained
from gla_jax.interop.scoring import Bucket, Likelihood, continuation_likelihoods, perplexity_by_place
from gla_jax.nn.text import ByteTokenizer, load_tokenizer, stream_text

__all__ = [
    "Bucket",
    "ByteTokenizer",
    "CheckpointError",
    "Harness",
    "Likelihood",
    "continuation_likelihoods",
    "convert",
    "end_of_text",
    "load_pretrained",
    "load_tokenizer",
    "make_lm",
    "perplexity_by_place",
    "run_tasks",
    "save_pretrained",
    "stream_text",
]
