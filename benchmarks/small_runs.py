"""Small models trained in one compiled program: every learning rate and seed of a model side by side, under vmap."""

import datetime
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gla_jax.nn import CausalLM, CausalLMConfig


class Batch(NamedTuple):
    tokens: Any  # [b, t]
    labels: Any  # [b, t]
    weights: Any  # [b, t], 0 where a label does not count


class Fitted(NamedTuple):
    rate: float  # the learning rate with the lowest mean loss over the last tenth of the steps
    losses: np.ndarray  # [seeds, steps] at that rate
    measured: np.ndarray  # [seeds, ...] at that rate: what `measure` has returned
    parameters: int
    seconds: float

    def __str__(self) -> str:
        spread = f"{self.measured.mean():.4f} +- {self.measured.std():.4f}"
        return f"{spread}  rate {self.rate:g}, {self.parameters:,} parameters, {self.seconds:.0f} s"

    def row(self) -> dict[str, Any]:
        """What a record keeps: losses are means over seeds at about 50 of the steps."""
        return {
            "measured": self.measured.tolist(),
            "learning rate": self.rate,
            "parameters": self.parameters,
            "seconds": round(self.seconds, 1),
            "loss": self.losses.mean(0)[:: max(1, self.losses.shape[1] // 50)].tolist(),
        }


def losses_and_hits(model: CausalLM, batch: Batch) -> tuple[Any, Any]:
    """Nats [b, t], and whether the likeliest token is the label's [b, t]."""
    logits = model(batch.tokens)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return nats, jnp.argmax(logits, -1) == batch.labels


def fit(
    config: CausalLMConfig,
    draw: Callable[[Any], Batch],
    measure: Callable[[CausalLM], Any],
    *,
    steps: int,
    rates: list[float],
    seeds: int,
) -> Fitted:
    """Train a model for each rate and seed on `draw(key)` (the same batches for all models), then `measure` it.

    AdamW (0.9, 0.95, weight decay 0.01), the gradient's norm clipped to 1, a tenth of warm-up, a cosine to a tenth.
    """

    def make(seed):
        return CausalLM(config, rngs=nnx.Rngs(jax.random.key(seed)))

    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make(0)))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95), optax.add_decayed_weights(0.01))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps, 0.1)

    def loss(params, batch):
        nats, _ = losses_and_hits(nnx.merge(graphdef, params), batch)
        return jnp.sum(nats * batch.weights) / jnp.sum(batch.weights)

    def run(seed, rate):
        params = nnx.state(make(seed))

        def step(carry, i):
            params, moments = carry
            batch = draw(jax.random.fold_in(jax.random.key(seed), i))
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, moments = adam.update(grads, moments, params)
            params = jax.tree.map(lambda p, u: p - rate * schedule(i) * u, params, updates)
            return (params, moments), value

        (params, _), values = jax.lax.scan(step, (params, adam.init(params)), jnp.arange(steps))
        return values, measure(nnx.merge(graphdef, params))

    began = time.perf_counter()
    grid = jnp.repeat(jnp.array(rates), seeds), jnp.tile(jnp.arange(seeds), len(rates))
    out = jax.device_get(jax.jit(jax.vmap(lambda rate, seed: run(seed, rate)))(*grid))
    losses, measured = (np.asarray(x).reshape(len(rates), seeds, *x.shape[1:]) for x in out)
    last = np.nan_to_num(losses[:, :, -max(1, steps // 10) :].mean((1, 2)), nan=np.inf)
    best = int(np.argmin(last))
    size = sum(np.prod(p.shape) for p in jax.tree.leaves(shapes))
    return Fitted(rates[best], losses[best], measured[best], int(size), time.perf_counter() - began)


def write(
    out: pathlib.Path | None, what: str, quantity: str, settings: dict, results: dict, claims: dict[str, bool]
) -> None:
    """The record of an experiment, as JSON."""
    if out is None:
        return
    record = {
        "what": what,
        "command": " ".join(["python", "-m", f"benchmarks.{what}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": str(jax.devices()[0].device_kind),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "quantity": quantity,
        "settings": settings,
        "results": results,
        "claims": claims,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {out}")
