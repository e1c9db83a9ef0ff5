"""Trains a preset through "mosaic_gpu" in bfloat16 and through "xla" in float32, and compares the losses at the end.

    python -m benchmarks.loss_curves --out benchmarks/results/loss-curves-h100.json

Both take the same batches of the shipped corpus from the same initial parameters, with AdamW; float32 products are
whole ("highest"). The end is the mean of the last 20 steps. --controls says what such runs differ by anyway: "xla" in
bfloat16, and in float32 with products of TF32; --runs takes some of the four. --small is for a CPU: "xla" alone.
--seed is that of weights and data; records that do not tell it are of 0.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from gla_jax.nn import GLAConfig
from gla_jax.records import begin
from gla_jax.train import MeshConfig, TrainConfig, load_corpus
from gla_jax.train.data import Source, training_batches
from gla_jax.train.mesh import make_mesh
from gla_jax.train.step import make_program

LAST, BOUND = 20, 0.005


def losses(config: TrainConfig, steps: int) -> list[float]:
    program = make_program(config, make_mesh(config))
    corpus = load_corpus()
    batches = training_batches([Source(corpus.train)], batch=config.batch, length=config.length, seed=config.seed)
    state, found = program.initialize(), []
    for _ in range(steps):
        state, metrics = program.train(state, program.place(next(batches)))
        found.append(metrics["loss"])
    return [float(loss) for loss in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--of", type=int, help="steps of the whole run, of whose schedule these are the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--runs", nargs="+", metavar="NAME")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = GLAConfig.gla_340m()
    if arguments.small:
        model = model.replace(hidden_size=64, num_layers=2, vocab_size=256)
    runs = {
        "bfloat16": ("bfloat16", "xla" if arguments.small else "mosaic_gpu", None),
        "float32": ("float32", "xla", "highest"),
    }
    if arguments.controls or arguments.runs:
        runs |= {"bfloat16, xla": ("bfloat16", "xla", None), "float32, TF32": ("float32", "xla", "tensorfloat32")}
    if unknown := set(arguments.runs or ()) - set(runs):
        parser.error(f"argument --runs: must be of {list(runs)}, got {sorted(unknown)}")
    runs = {name: run for name, run in runs.items() if not arguments.runs or name in arguments.runs}
    curves = {}
    for name, (dtype, implementation, precision) in runs.items():
        # The paper's optimizer and its rate; a warm-up of a tenth.
        config = TrainConfig(
            model=model.replace(dtype=dtype, implementation=implementation, layer_unroll=1),
            steps=arguments.of or arguments.steps,
            batch=arguments.batch,
            length=arguments.length,
            seed=arguments.seed,
            mesh=MeshConfig(data=1),
            optimizer="adamw",
        )
        with jax.default_matmul_precision(precision):
            curves[name] = losses(dataclasses.replace(config, learning_rate=3e-4, warmup=0.1), arguments.steps)
        print(
            name,
            implementation,
            [round(loss, 4) for loss in curves[name][:: max(1, arguments.steps // 10)]],
            flush=True,
        )
    ends = {name: float(np.mean(curve[-LAST:])) for name, curve in curves.items()}
    reference = next(name for name in ("float32", *ends) if name in ends)
    apart = {name: end / ends[reference] - 1 for name, end in ends.items()}
    print(f"the last {LAST} steps: {ends}; from {reference}:", {name: f"{100 * x:.3f} %" for name, x in apart.items()})
    record = {
        **begin("loss curves", ["python", "-m", "benchmarks.loss_curves", *sys.argv[1:]]),
        "seed": arguments.seed,
        "batch": arguments.batch,
        "of": arguments.of or arguments.steps,
        "length": arguments.length,
        "runs": {
            name: {"dtype": dtype, "implementation": how, "precision": precision}
            for name, (dtype, how, precision) in runs.items()
        },
        "ends": ends,
        "apart": apart,
        "losses": curves,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"bfloat16 through the kernels and float32 were to be at most {100 * BOUND} % apart")
    sys.exit(0 if abs(apart.get("bfloat16", 0.0)) <= BOUND else 1)


if __name__ == "__main__":
    main()
