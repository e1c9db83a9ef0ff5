"""Draws a plot beside each record that has one; `python -m benchmarks.plots` draws those of benchmarks/results anew."""

import json
import pathlib
from typing import Any

import numpy as np

try:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
except ModuleNotFoundError:  # records are made without it
    plt: Any = None

RESULTS = pathlib.Path(__file__).parent / "results"
# Text stays text, so that files are small; ids that do not change from run to run.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "gla_jax", "axes.spines.top": False, "axes.spines.right": False}


def spread(measured):
    """The sample's standard deviation over seeds, the first axis; None of one seed."""
    return np.std(measured, 0, ddof=1) if len(measured) > 1 else None


def op(record: dict):
    """Milliseconds of each line, forward and with the backward."""
    rows = record["results"]
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(rows) + 1.2))
    places = np.arange(len(rows))
    for i, what in enumerate(("forward", "forward and backward")):
        axis.barh(places + 0.4 * i, [row[what] for row in rows], 0.38, label=what)
    names = [f"{row['op']}\n{', '.join(map(str, row['shape']))}" for row in rows]
    axis.set_yticks(places + 0.2, names, fontsize="small")
    axis.invert_yaxis()
    axis.set(xlabel="ms", xscale="log", title=f"{record['device']}, by b, t, h, k, v")
    axis.legend()
    return figure


def experiment(record: dict):
    """What was measured of each model, with a dot a seed, and the training losses."""
    how, results = record["settings"], record["results"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    for i, (name, row) in enumerate(results.items()):
        measured = np.array(row["measured"])
        left.errorbar(i, measured.mean(), spread(measured), fmt="o", color=f"C{i}", capsize=6)
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
        pairs = [how["pairs"] >> i for i in reversed(range(measured.shape[1]))]
        left.errorbar(pairs, measured.mean(0), spread(measured), fmt=".-", capsize=4, label=name)
        right.plot(np.linspace(0, how["steps"], len(row["loss"])), row["loss"], label=name)
    left.set_xscale("log", base=2)
    left.set_xticks(pairs, [str(n) for n in pairs])
    left.set(xlabel="pairs", ylabel=record["quantity"])
    right.set(xlabel="step", ylabel="loss")
    right.legend()
    return figure


def against_length(record: dict, of: str, quantities: dict[str, str]):
    """Lines of what was measured of each model or op, against length."""
    figure, axes = plt.subplots(1, len(quantities), figsize=(4.8 * len(quantities), 3.4), layout="constrained")
    for axis, (key, label) in zip(axes, quantities.items(), strict=True):
        for name in dict.fromkeys(row[of] for row in record["results"]):
            rows = [row for row in record["results"] if row[of] == name]
            axis.plot([row["length"] for row in rows], [row[key] for row in rows], ".-", label=name)
        axis.set_xscale("log", base=2)
        lengths = sorted({row["length"] for row in record["results"]})
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.set(xlabel="tokens of a sequence", ylabel=label, yscale="log" if of == "op" else "linear")
        if of != "op":
            axis.set_ylim(0)
    axes[0].legend()
    return figure


def training_lengths(record: dict):
    """Tokens a second and memory of training."""
    return against_length(record, "model", {"tokens_per_s": "tokens/s", "memory_gb": "memory, GB"})


def op_lengths(record: dict):
    """Milliseconds of the op, forward and with the backward."""
    labels = {"forward": "forward, ms", "forward and backward": "forward and backward, ms"}
    return against_length(record, "op", labels)


def extrapolation(record: dict):
    """Bits a byte by place, with the deviation over seeds, and a line where training ended."""
    how = record["settings"]
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    middles = (np.arange(how["buckets"]) + 0.5) * how["length"]
    for name, row in record["results"].items():
        measured = np.array(row["measured"])
        axis.errorbar(middles, measured.mean(0), spread(measured), fmt=".-", capsize=3, label=name)
    axis.axvline(how["length"], color="grey", linestyle=":")
    axis.set(xlabel="place", ylabel=record["quantity"])
    axis.legend()
    return figure


KINDS = {
    "op": op,
    "mqar": recall,
    "ladder": experiment,
    "extrapolation": extrapolation,
    "training against length": training_lengths,
    "op against length": op_lengths,
}


def draw(record: pathlib.Path) -> pathlib.Path | None:
    """Draws a record's plot as an SVG beside it, and returns where; None for a kind that has no plot.

    Raises:
      ModuleNotFoundError: matplotlib is missing.
    """
    content = json.loads(record.read_text())
    if (plot := KINDS.get(content.get("what"))) is None:
        return None
    if plt is None:
        raise ModuleNotFoundError("matplotlib is missing, which the extra notebooks has: pip install '.[notebooks]'")
    out = record.with_suffix(".svg")
    with plt.rc_context(STYLE):
        figure = plot(content)
        figure.savefig(out, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return out


def draw_or_say_why(record: pathlib.Path | None) -> None:
    """Draws the plot of a record just written, if it was, and says where it is, or that matplotlib is missing."""
    if record is None:
        return
    try:
        print(f"drawn: {draw(record)}")
    except ModuleNotFoundError as error:
        print(f"no plot: {error}")


if __name__ == "__main__":
    for path in sorted(RESULTS.glob("*.json")):
        if drawn := draw(path):
            print(drawn)
