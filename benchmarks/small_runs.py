"""Small models trained in one compiled program: every learning rate and seed of a model side by side, under vmap."""

import argparse
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from flax import nnx

from benchmarks import plots
from gla_jax.nn import CausalLM, CausalLMConfig
from gla_jax.records import begin
from gla_jax.train.step import GPU_OPTIONS


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
        how = f"rate {self.rate:g}, {self.parameters:,} parameters, {self.seconds:.0f} s"
        return f"{plus_minus(self.measured, 4)}  {how}"

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


def losses_in_pieces(model: CausalLM, batch: Batch, pieces: int) -> Any:
    """Nats [b, t] of rows that are read piece by piece."""
    if pieces == 1:
        return losses_and_hits(model, batch)[0]
    graphdef, params = nnx.split(model)
    parts = [jnp.moveaxis(x.reshape(x.shape[0], pieces, -1), 1, 0) for x in (batch.tokens, batch.labels)]

    def piece(cache, part):
        tokens, labels = part
        model = nnx.merge(graphdef, params)
        hidden, cache = model.hidden_after(tokens, jax.lax.stop_gradient(cache))
        return cache, optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), labels)

    _, nats = jax.lax.scan(piece, model.init_cache(batch.tokens.shape[0]), tuple(parts))
    return jnp.moveaxis(nats, 0, 1).reshape(batch.tokens.shape)


class Experiment(NamedTuple):
    config: CausalLMConfig
    draw: Callable[[Any], Batch]  # the batch of a key: the same for all models
    measure: Callable[[CausalLM], Any]  # what is looked at once a model has been trained
    steps: int
    rates: list[float]
    seeds: int
    pieces: int = 1  # parts of a row in time: each starts from the state before it, and gradients stop there


def fit_all(experiments: dict[str, Experiment]) -> Iterator[tuple[str, Fitted]]:
    """Each experiment's result as it comes: they run one after another, while those behind are being compiled."""
    options = GPU_OPTIONS if jax.default_backend() == "gpu" else None

    def ready(experiment: Experiment) -> tuple[Any, int]:
        program, parameters = lower(experiment)
        return program.compile(options), parameters

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        compiled = {name: pool.submit(ready, experiment) for name, experiment in experiments.items()}
        for name, experiment in experiments.items():
            program, parameters = compiled.pop(name).result()
            began = time.perf_counter()
            losses, measured = jax.device_get(program(*grid(experiment)))
            seconds = time.perf_counter() - began
            yield name, best(experiment, losses, measured, parameters, seconds)


def grid(experiment: Experiment) -> tuple[Any, Any]:
    """The learning rate and the seed of each run."""
    rates, seeds = experiment.rates, experiment.seeds
    return jnp.repeat(jnp.array(rates), seeds), jnp.tile(jnp.arange(seeds), len(rates))


def best(experiment: Experiment, losses: Any, measured: Any, parameters: int, seconds: float) -> Fitted:
    """The runs at the learning rate with the lowest mean loss over the last tenth of the steps."""
    rates, seeds, steps = experiment.rates, experiment.seeds, experiment.steps
    losses, measured = (np.asarray(x).reshape(len(rates), seeds, *x.shape[1:]) for x in (losses, measured))
    last = np.nan_to_num(losses[:, :, -max(1, steps // 10) :].mean((1, 2)), nan=np.inf)
    which = int(np.argmin(last))
    return Fitted(rates[which], losses[which], measured[which], parameters, seconds)


def lower(experiment: Experiment) -> tuple[Any, int]:
    """The program that trains a model for each rate and seed and then measures it, and the model's parameters.

    AdamW (0.9, 0.95, weight decay 0.01), the gradient's norm clipped to 1, a tenth of warm-up, a cosine to a tenth.
    """
    config, draw, measure, steps, *_, pieces = experiment
    if jax.default_backend() == "gpu":  # a loop over layers has a quarter more kernels to start
        config = config.replace(layer_unroll=config.num_layers)

    def make(seed):
        return CausalLM(config, rngs=nnx.Rngs(jax.random.key(seed)))

    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make(0)))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95), optax.add_decayed_weights(0.01))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 10), steps, 0.1)

    def loss(params, batch):
        nats = losses_in_pieces(nnx.merge(graphdef, params), batch, pieces)
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

    size = sum(math.prod(p.shape) for p in jax.tree.leaves(shapes))
    return jax.jit(jax.vmap(lambda rate, seed: run(seed, rate))).lower(*grid(experiment)), size


def verdict(margins: Any) -> str:
    """Whether a claim was seen, from by how much each seed's runs have it: above 0 where they do.

    "seen" if the mean's 95 % confidence interval (Student's t over the seeds) lies above 0, "not seen" if below, else
    "not told apart from chance"; of one seed, which has no spread, by the sign.
    """
    margins = np.asarray(margins, float)
    mean = margins.mean()
    if margins.size == 1:
        return "seen in the one seed" if mean > 0 else "not seen in the one seed"
    sure = scipy.stats.t.ppf(0.975, margins.size - 1)
    if abs(mean) <= sure * margins.std(ddof=1) / math.sqrt(margins.size):
        return "not told apart from chance"
    return "seen" if mean > 0 else "not seen"


def plus_minus(measured: Any, digits: int = 3) -> str:
    """The mean, and after ± the sample's standard deviation, of numbers a seed; of one seed the number alone."""
    measured = np.asarray(measured, float)
    mean = f"{measured.mean():.{digits}f}"
    return mean if measured.size == 1 else f"{mean} ± {measured.std(ddof=1):.{digits}f}"


def parse(about: str, presets: dict, models: dict, arguments: Sequence[str] | None) -> argparse.Namespace:
    """An experiment's flags, and `words`, what was given: by default all of `models` run."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--preset", choices=presets, default="h100", help="sizes (default: %(default)s)")
    parser.add_argument("--models", nargs="*", choices=list(models), default=list(models), help="some of them")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the record; its plot goes beside it")
    words = sys.argv[1:] if arguments is None else list(arguments)
    return parser.parse_args(words, argparse.Namespace(words=words))


def compare(
    given: argparse.Namespace,
    what: str,
    quantity: str,
    settings: dict,
    experiment: Callable[[str], Experiment],
    claims: Callable[[dict[str, dict]], dict[str, str]],
    show: Callable[[Fitted], str] = str,
) -> dict[str, dict]:
    """Trains the models of `given`, prints and writes a row of each, and says which of the paper's claims were seen."""
    results: dict[str, dict] = {}
    record = begin(what, ["python", "-m", f"benchmarks.{what}", *given.words])
    record |= {"quantity": quantity, "settings": settings, "results": results}
    for name, found in fit_all({name: experiment(name) for name in given.models}):
        results[name] = found.row()
        print(f"{name:17s} {show(found)}", flush=True)
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(record, indent=1) + "\n")
    for claim, found in claims(results).items():
        print(f"{found}: {claim}")
    plots.draw_or_say_why(given.out)
    return results
