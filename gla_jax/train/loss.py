"""The loss of an output layer without its logits: cross entropy in parts, each with its gradients at once."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt

from gla_jax.array_types import Array


def weighted_nats(
    logits: Float[Array, "*rows vocab"],
    targets: Int[Array, "*rows"] | UInt[Array, "*rows"],
    weights: Float[Array, "*rows"] | None,
) -> Float[Array, ""]:
    """The weighted sum over targets [...] of -log p(target) in nats, float32; weights None for ones."""
    logits = logits.astype(jnp.float32)
    # Not a gather: the vocabulary may be sharded.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    losses = jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(is_target, logits, 0), -1)
    return jnp.sum(losses if weights is None else losses * weights)


@jax.custom_vjp
def linear_cross_entropy(
    hidden: Float[Array, "parts *rows d"],
    weight: Float[Array, "d vocab"],
    targets: Int[Array, "parts *rows"] | UInt[Array, "parts *rows"],
    weights: Float[Array, "parts *rows"] | None,
) -> Float[Array, ""]:
    """`weighted_nats` of the logits hidden @ weight, float32, of which those of one part are held at a time.

    Under differentiation each part's logits become its gradients on the spot, so that no logits are kept or computed
    twice: what is kept is hidden's gradient and weight's, the latter summed in float32. Gradients for hidden and weight
    alone; differentiating those again raises a TypeError.

    Args:
      hidden: [parts, ..., d].
      weight: [d, vocab], of hidden's dtype: what is multiplied.
      targets: [parts, ...], in 0 <= target < vocab.
      weights: [parts, ...], of each target; None for ones.
    """

    def part(total: Array, x: Any) -> tuple[Array, None]:
        hidden, targets, weights = x
        return total + weighted_nats(_logits(hidden, weight), targets, weights), None

    return jax.lax.scan(part, jnp.float32(0), (hidden, targets, weights))[0]


def _forward(hidden: Array, weight: Array, targets: Array, weights: Array | None) -> tuple[Array, tuple[Array, Array]]:
    def part(sums: tuple[Array, Array], x: Any) -> tuple[tuple[Array, Array], Array]:
        total, dweight = sums
        hidden, targets, weights = x
        logits = _logits(hidden, weight)
        largest, exponentials = _largest_and_sum(logits)
        normalizer = largest + jnp.log(exponentials)
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        losses = normalizer - jnp.sum(jnp.where(is_target, logits, 0), -1)
        dlogits = jnp.exp(logits - normalizer[..., None]) - is_target
        if weights is not None:
            losses, dlogits = losses * weights, dlogits * weights[..., None]
        dlogits = dlogits.astype(hidden.dtype)
        rows = tuple(range(hidden.ndim - 1))
        own = jax.lax.dot_general(hidden, dlogits, ((rows, rows), ((), ())), preferred_element_type=jnp.float32)
        return (total + jnp.sum(losses), dweight + own), dlogits @ weight.T

    hidden, weight = _constant(hidden), _constant(weight)
    zeros = jnp.float32(0), jnp.zeros(weight.shape, jnp.float32)
    (total, dweight), dhidden = jax.lax.scan(part, zeros, (hidden, targets, weights))
    return total, (dhidden, dweight.astype(weight.dtype))


@jax.custom_jvp
def _constant(x: Array) -> Array:
    return x


@_constant.defjvp
def _constant_tangent(primals: Any, tangents: Any) -> Any:
    raise TypeError("linear_cross_entropy: its gradients have no derivatives; take weighted_nats of the logits")


def _largest_and_sum(logits: Array) -> tuple[Array, Array]:
    """A row's largest logit and the sum of exponentials below it, in one pass (arXiv 1805.02867, algorithm 3)."""

    def join(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        largest = jnp.maximum(a[0], b[0])
        return largest, a[1] * jnp.exp(a[0] - largest) + b[1] * jnp.exp(b[0] - largest)

    least = jnp.float32(jnp.finfo(jnp.float32).min)
    operands = logits, jnp.ones_like(logits)
    return jax.lax.reduce(operands, (least, jnp.float32(0)), join, (logits.ndim - 1,))


def _backward(gradients: tuple[Array, Array], ct: Array) -> tuple[Array, Array, None, None]:
    dhidden, dweight = ((ct * x).astype(x.dtype) for x in gradients)
    return dhidden, dweight, None, None


linear_cross_entropy.defvjp(_forward, _backward)


def _logits(hidden: Array, weight: Array) -> Array:
    return jnp.dot(hidden, weight, preferred_element_type=jnp.float32)
