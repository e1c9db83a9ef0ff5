"""Scores of text under a model: log-likelihoods of continuations, and perplexity by place in a document."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from gla_jax.array_types import Array
from gla_jax.nn.prompt import check_tokens


class Likelihood(NamedTuple):
    """Of a continuation: the sum of its tokens' log-probabilities (nats), and whether each is the likeliest."""

    log_likelihood: float
    """The sum."""
    greedy: bool
    """Whether each is the likeliest."""


class Bucket(NamedTuple):
    """Tokens at places start to stop of their documents: how many, and their mean negative log-likelihood (nats)."""

    start: int
    """The first place."""
    stop: int
    """The place after the last."""
    tokens: int
    """How many tokens."""
    loss: float
    """Their mean, in nats."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))


def token_log_likelihoods(
    model: Any, tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"] | None = None, piece: int = 256
) -> tuple[Float[Array, "b t1"], Array]:
    """log p(token i + 1 | tokens to i) [b, t - 1], and whether that token is the likeliest [b, t - 1].

    Logits are made for `piece` tokens at a time, so that [b, t, vocab] is never held.
    """
    hidden = model.hidden(tokens, segment_ids)[:, :-1]
    targets, time = tokens[:, 1:], tokens.shape[1] - 1
    rows = -(-time // piece) * piece

    def pieces(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, rows - time)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, piece, *x.shape[2:]), 1, 0)

    def score(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden, targets = inputs
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, -1), chosen >= jnp.max(logits, -1)

    scores = jax.lax.map(score, (pieces(hidden), pieces(targets)))
    scores, greedy = (jnp.moveaxis(x, 0, 1).reshape(tokens.shape[0], rows)[:, :time] for x in scores)
    return scores, greedy


@functools.partial(jax.jit, static_argnums=0)
def _scores(graphdef, params, tokens, segment_ids):
    return token_log_likelihoods(nnx.merge(graphdef, params), tokens, segment_ids)


def continuation_likelihoods(
    model: nnx.Module, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 8
) -> list[Likelihood]:
    """Each continuation's likelihood after its context.

    Args:
      model: a language model.
      pairs: (context, continuation) as token numbers, neither empty. Rows are padded at the right to a power of two,
        with tokens that nothing depends on.
      batch_size: rows at once, at least 1.

    Raises:
      ValueError: a context or continuation is empty, or batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    if any(not context or not continuation for context, continuation in pairs):
        raise ValueError("pairs: contexts and continuations must have at least one token each")
    check_tokens("pairs", model, np.concatenate([np.asarray(part) for pair in pairs for part in pair] or [[0]]))
    graphdef, params = nnx.split(model)
    found: list[Any] = [None] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        width = max(16, 1 << (sum(map(len, pairs[chosen[0]])) - 1).bit_length())
        tokens, ids = np.zeros((batch_size, width), np.int32), np.full((batch_size, width), -1, np.int32)
        for row, i in enumerate(chosen):
            whole = [*pairs[i][0], *pairs[i][1]]
            tokens[row, : len(whole)], ids[row, : len(whole)] = whole, 0
        scores, greedy = map(np.asarray, _scores(graphdef, params, tokens, ids))
        for row, i in enumerate(chosen):
            own = slice(len(pairs[i][0]) - 1, sum(map(len, pairs[i])) - 1)
            found[i] = Likelihood(float(scores[row, own].sum(dtype=np.float64)), bool(greedy[row, own].all()))
    return found


def perplexity_by_place(
    model: nnx.Module, documents: Iterable[Sequence[int]], *, block: int = 32768, bucket: int = 2048
) -> list[Bucket]:
    """Loss by the place of a token in its block, as in the paper's figure 5 (arXiv 2312.06635, section 5.2).

    Args:
      model: a language model.
      documents: token numbers; they are joined in order and cut into blocks, of which each starts from an empty state.
        The last one may be shorter.
      block: tokens of a block, at least 2.
      bucket: places that are averaged together, at least 1; the first token of a block is not scored.

    Raises:
      ValueError: an argument is out of range, or there are fewer than two tokens.
    """
    if block < 2 or bucket < 1:
        raise ValueError(f"block and bucket: must be at least 2 and 1, got {block} and {bucket}")
    joined = np.concatenate([np.zeros(0, np.int32), *(np.asarray(document, np.int32) for document in documents)])
    if joined.size < 2:
        raise ValueError(f"documents: must have at least two tokens together, got {joined.size}")
    check_tokens("documents", model, joined)
    graphdef, params = nnx.split(model)
    places = min(block, joined.size)
    total, count = np.zeros(places), np.zeros(places, np.int64)
    for begin in range(0, joined.size, block):
        tokens = joined[begin : begin + block]
        ids = np.zeros(places, np.int32)
        ids[tokens.size :] = -1
        padded = np.pad(tokens, (0, places - tokens.size))
        scores, _ = _scores(graphdef, params, padded[None], ids[None])
        total[1 : tokens.size] -= np.asarray(scores[0, : tokens.size - 1], np.float64)
        count[1 : tokens.size] += 1
    buckets = []
    for start in range(0, places, bucket):
        own = slice(start, min(start + bucket, places))
        if (tokens := int(count[own].sum())) > 0:
            buckets.append(Bucket(start, own.stop, tokens, float(total[own].sum() / tokens)))
    return buckets
