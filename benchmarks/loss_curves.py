"""Trains a preset through "mosaic_gpu" in bfloat16 and through "xla" in float32, and compares the losses at the end.

    python -m benchmarks.loss_curves --out benchmarks/results/loss-curves-h100.json

Both take the same batches of the shipped corpus from the same initial parameters, with AdamW; float32 products are
whole ("highest"). The end is the mean of the last 20 steps. --controls says what two such runs differ by anyway: "xla" in
bfloat16, and in float32 with products of TF32. --small is for a CPU: "xla" in both dtypes.
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


def losses(config: TrainConfig) -> list[float]:
    program = make_program(config, make_mesh(config))
    corpus = load_corpus()
    batches = training_batches([Source(corpus.train)], batch=config.batch, length=config.length, seed=config.seed)
    state, found = program.initialize(), []
    for _ in range(config.steps):
        state, metrics = program.train(state, program.place(next(batches)))
        found.append(metrics["loss"])
    return [float(loss) for loss in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--controls", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = GLAConfig.gla_340m()
    if arguments.small:
        model = model.replace(hidden_size=64, num_layers=2, vocab_size=256)
    runs = {
        "bfloat16": ("bfloat16", "xla" if arguments.small else "mosaic_gpu", None),
        "float32": ("float32", "xla", "highest"),
    }
    if arguments.controls:
        runs |= {"bfloat16, xla": ("bfloat16", "xla", None), "float32, TF32": ("float32", "xla", "tensorfloat32")}
    curves = {}
    for name, (dtype, implementation, precision) in runs.items():
        # The paper's optimizer and its rate; a warm-up of a tenth.
        config = TrainConfig(
            model=model.replace(dtype=dtype, implementation=implementation, layer_unroll=1),
            steps=arguments.steps,
            batch=arguments.batch,
            length=arguments.length,
            mesh=MeshConfig(data=1),
            optimizer="adamw",
        )
        with jax.default_matmul_precision(precision):
            curves[name] = losses(dataclasses.replace(config, learning_rate=3e-4, warmup=0.1))
        print(
            name,
            implementation,
            [round(loss, 4) for loss in curves[name][:: max(1, arguments.steps // 10)]],
            flush=True,
        )
    ends = {name: float(np.mean(curve[-LAST:])) for name, curve in curves.items()}
    from_float32 = {name: end / ends["float32"] - 1 for name, end in ends.items()}
    apart = abs(from_float32["bfloat16"])
    print(f"the last {LAST} steps: {ends}, {100 * apart:.3f} % apart, to be at most {100 * BOUND} %")
    print("from float32:", {name: f"{100 * x:.3f} %" for name, x in from_float32.items()})
    record = {
        **begin("loss curves", ["python", "-m", "benchmarks.loss_curves", *sys.argv[1:]]),
        "batch": arguments.batch,
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
    sys.exit(0 if apart <= BOUND else 1)


if __name__ == "__main__":
    main()
