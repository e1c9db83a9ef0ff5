"""Draws what benchmarks/results holds, for the docs: `python -m benchmarks.plots FOLDER` (`make docs` calls it)."""

import pathlib
import sys

import matplotlib
import numpy as np

from benchmarks.mqar import counts
from benchmarks.tables import records

matplotlib.use("svg")
import matplotlib.pyplot as plt


def op(record: dict):
    """Milliseconds of each entry, forward and with the backward."""
    rows = record["milliseconds"]
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(rows) + 1.2))
    places = np.arange(len(rows))
    for i, what in enumerate(("forward", "forward + backward")):
        axis.barh(places + 0.4 * i, [row[what] for row in rows.values()], 0.38, label=what)
    axis.set_yticks(places + 0.2, list(rows))
    axis.invert_yaxis()
    axis.set(xlabel="ms", xscale="log", title=f"{record['device']}, b, t, h, k, v = {record['shape_bthkv']}")
    axis.legend()
    return figure


def experiment(record: dict):
    """What was measured of each model, with a dot a seed, and the training losses."""
    how, results = record["settings"], record["results"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for i, (name, row) in enumerate(results.items()):
        measured = np.array(row["measured"])
        left.errorbar(i, measured.mean(), measured.std(), fmt="o", color=f"C{i}", capsize=6)
        left.plot([i] * measured.size, measured, "k.", markersize=3)
        right.plot(np.linspace(0, how["steps"], len(row["loss"])), row["loss"], label=name)
    left.set_xticks(range(len(results)), list(results), rotation=30, ha="right")
    left.set(ylabel=record["quantity"])
    right.set(xlabel="step", ylabel="loss")
    right.legend()
    return figure


def recall(record: dict):
    """Accuracy by the number of pairs, with the deviation over seeds, and the training losses."""
    how, results = record["settings"], record["results"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for name, row in results.items():
        measured = np.array(row["measured"])
        left.errorbar(counts(how["pairs"]), measured.mean(0), measured.std(0), fmt=".-", capsize=4, label=name)
        right.plot(np.linspace(0, how["steps"], len(row["loss"])), row["loss"], label=name)
    left.set_xscale("log", base=2)
    left.set_xticks(counts(how["pairs"]), [str(n) for n in counts(how["pairs"])])
    left.set(xlabel="pairs", ylabel=record["quantity"])
    right.set(xlabel="step", ylabel="loss")
    right.legend()
    return figure


def lengths(record: dict):
    """Tokens a second and memory of training, and milliseconds of the op, against length."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, quantity, scale in zip(axes, ("tokens_per_s", "memory_gb"), (1e-3, 1), strict=False):
        for name in dict.fromkeys(row["model"] for row in record["training"]):
            rows = [row for row in record["training"] if row["model"] == name]
            axis.plot([row["length"] for row in rows], [scale * row[quantity] for row in rows], ".-", label=name)
    for name in dict.fromkeys(row["op"] for row in record["op"]):
        rows = [row for row in record["op"] if row["op"] == name]
        axes[2].plot([row["length"] for row in rows], [row["forward and backward"] for row in rows], ".-", label=name)
    for axis, title in zip(
        axes, ("training, 1000 tokens/s", "memory, GB", "op, forward and backward, ms"), strict=True
    ):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="tokens", title=title, ylim=(0, None))
        axis.legend()
    axes[2].set_yscale("log")
    axes[2].set_ylim(None, None)
    return figure


def extrapolation(record: dict):
    """Bits a byte by place, with a line where training ended."""
    how = record["settings"]
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    middles = (np.arange(how["buckets"]) + 0.5) * how["length"]
    for name, row in record["results"].items():
        axis.plot(middles, np.mean(row["measured"], 0), ".-", label=name)
    axis.axvline(how["length"], color="grey", linestyle=":")
    axis.set(xlabel="place", ylabel=record["quantity"])
    axis.legend()
    return figure


KINDS = {"op": op, "mqar": recall, "ladder": experiment, "extrapolation": extrapolation, "lengths": lengths}


def draw(folder: pathlib.Path) -> list[pathlib.Path]:
    """One SVG a committed result, under the result's own name."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context({"svg.hashsalt": "gla_jax", "axes.spines.top": False, "axes.spines.right": False}):
        for what, plot in KINDS.items():
            for name, record in records(what):
                figure = plot(record)
                figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
                plt.close(figure)
                written.append(folder / f"{name}.svg")
    return written


if __name__ == "__main__":
    for path in draw(pathlib.Path(sys.argv[1])):
        print(path)
