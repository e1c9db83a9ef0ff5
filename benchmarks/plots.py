"""Draws plots beside the records that they are of; `python -m benchmarks.plots` draws those of benchmarks/results anew.

Most are of one record, and some of all records of a kind.
"""

import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

try:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker
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


def peers(record: dict):
    """Milliseconds of the op and of its peers by shape; attention is of the same batch and tokens, as wide as it is."""
    rows = {(row["op"], tuple(row["shape"])): row for row in record["results"]}
    shapes = dict.fromkeys(shape for name, shape in rows if name != "attention")
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.4 * len(shapes) + 1.4), sharey=True, layout="constrained")
    for axis, what in zip(axes, ("forward", "forward and backward"), strict=True):
        for name in dict.fromkeys(name for name, _ in rows):
            of = {x[:2] if name == "attention" else x: row[what] for (op, x), row in rows.items() if op == name}
            places = [(i, of.get(x[:2], of.get(x))) for i, x in enumerate(shapes)]
            axis.plot(*zip(*((ms, i) for i, ms in places if ms is not None), strict=True), "o", label=name)
        axis.set(xlabel=f"{what}, ms", xscale="log")
        axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(shapes)), [", ".join(map(str, x)) for x in shapes])
    axes[0].set_ylabel("b, t, h, k, v")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def kernels(record: dict):
    """Milliseconds of each shape and kind of gates, and what mild ones were to reach."""
    rows = [row for row in record["results"] if "to reach" in row]
    mild = [row.get("gates", "mild") == "mild" for row in rows]
    figure, axis = plt.subplots(figsize=(7, 0.4 * len(rows) + 1.2), layout="constrained")
    places = np.arange(len(rows))
    axis.barh(places, [row["ms"] for row in rows], 0.6, label="measured")
    if all("of kernels" in row for row in rows):  # apart from their launches
        axis.plot([row["of kernels"] for row in rows], places, "C1o", label="kernels alone")
    axis.plot(
        [row["to reach"] for row in itertools.compress(rows, mild)],
        places[mild],
        "k|",
        markersize=14,
        markeredgewidth=2,
        label="to reach",
    )
    names = [(row.get("name") or str(tuple(row["shape"]))).strip("()") for row in rows]
    kinds = ("" if plain else f"\n{row['gates']}" for row, plain in zip(rows, mild, strict=True))
    axis.set_yticks(places, [name + kind for name, kind in zip(names, kinds, strict=True)])
    axis.invert_yaxis()
    axis.set(xlabel="ms", ylabel="b, t, h, k, v")
    axis.legend()
    return figure


def decoding(record: dict):
    """Milliseconds of a token of one sequence, by how many it has seen."""
    rows = record["positions"]
    figure, axis = plt.subplots(figsize=(5, 2.6), layout="constrained")
    times = [row["ms_per_token"] for row in rows]
    axis.plot([row["position"] for row in rows], times, "o-")
    axis.set(xlabel="tokens seen", ylabel="ms a token", xscale="log", ylim=(0, 1.2 * max(times)))
    return figure


def training_steps(records: list[dict]):
    """Where the time of each profiled preset's step goes, by work; what takes little everywhere is the rest."""
    shares = {
        record["preset"]: {f"{row['part']}: {row['work']}": 100 * row["share"] for row in record["kernels"]}
        for record in records
        if "kernels" in record
    }
    works = dict.fromkeys(work for found in shares.values() for work in found)
    large = [work for work in works if max(found.get(work, 0) for found in shares.values()) >= 2]
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(shares) + 1.6), layout="constrained")
    for preset, found in shares.items():
        parts, before = [found.get(work, 0) for work in large], 0.0
        for i, share in enumerate([*parts, sum(found.values()) - sum(parts)]):
            axis.barh(preset, share, left=before, color=f"C{i}")
            before += share
    labels = [*large, "the rest"]
    axis.set(xlabel="% of the time of a step's kernels", xlim=(0, 100))
    handles = [plt.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(labels))]
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def loss_curves(records: list[dict]):
    """Losses of the runs that saw the same batches, and how far their means of 20 steps are from float32's."""
    runs: dict[tuple[int, ...], dict[str, Any]] = {}
    for record in records:
        for name, loss in record["losses"].items():
            how = record["runs"][name]
            key = record["batch"], record["length"], record.get("of", len(loss)), record.get("seed", 0)
            implementation = "" if how["implementation"] in name else f", {how['implementation']}"
            runs.setdefault(key, {})[name + implementation] = np.array(loss)
    names = sorted({name for curves in runs.values() for name in curves})
    figure, axes = plt.subplots(2, len(runs), figsize=(10, 5), sharex="col", squeeze=False, layout="constrained")
    for (upper, lower), ((batch, length, steps, _), curves) in zip(axes.T, sorted(runs.items()), strict=True):
        means = {name: np.convolve(loss, np.ones(20) / 20, "valid") for name, loss in curves.items()}
        for name, loss in curves.items():
            color = f"C{names.index(name)}"
            upper.plot(np.arange(1, len(loss) + 1), loss, color=color, linewidth=1)
            if "float32, xla" in means:
                apart = 100 * (means[name] / means["float32, xla"] - 1)
                lower.plot(np.arange(20, len(loss) + 1), apart, color=color)
        upper.set(title=f"{batch} x {length} tokens a step, of a run of {steps} steps", ylabel="loss")
        lower.set(xlabel="step", ylabel="from float32, %, mean of 20")
    handles = [plt.Line2D([], [], color=f"C{i}") for i in range(len(names))]
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    return figure


KINDS = {
    "op": op,
    "peers": peers,
    "op_gpu": kernels,
    "backward_gpu": kernels,
    "decode": decoding,
    "mqar": recall,
    "ladder": experiment,
    "extrapolation": extrapolation,
    "training against length": training_lengths,
    "op against length": op_lengths,
}


# Of all records of a kind, and the file's name.
TOGETHER = {"train": ("training-steps", training_steps), "loss curves": ("loss-curves", loss_curves)}


def draw(record: pathlib.Path) -> pathlib.Path | None:
    """Draws a record's plot as an SVG beside it, and returns where; None for a kind that has no plot of its own.

    Raises:
      ModuleNotFoundError: matplotlib is missing.
    """
    content = json.loads(record.read_text())
    if (plot := KINDS.get(content.get("what"))) is None:
        return None
    return _save(plot, content, record.with_suffix(".svg"))


def draw_all(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws the plots of all records of a folder, those of several with them, and returns where.

    Raises:
      ModuleNotFoundError: matplotlib is missing.
    """
    paths = sorted(folder.glob("*.json"))
    drawn = [out for path in paths if (out := draw(path))]
    records = [json.loads(path.read_text()) for path in paths]
    for what, (name, plot) in TOGETHER.items():
        if found := [record for record in records if record["what"] == what]:
            drawn.append(_save(plot, found, folder / f"{name}.svg"))
    return drawn


def _save(plot: Callable[[Any], Any], content: Any, out: pathlib.Path) -> pathlib.Path:
    """Writes the figure that is made of the content."""
    if plt is None:
        raise ModuleNotFoundError("matplotlib is missing, which the extra notebooks has: pip install '.[notebooks]'")
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
    for drawn in draw_all(RESULTS):
        print(drawn)
