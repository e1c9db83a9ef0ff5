"""Writes the tables of the README and the docs from benchmarks/results: `python -m benchmarks.tables`.

A table stands between `<!-- NAME, made by benchmarks/tables.py -->` and `<!-- end of NAME -->`; a test checks that
pages and results agree.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np

from benchmarks import extrapolation, ladder, lengths, mqar
from benchmarks.small_runs import plus_minus

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/performance.md", "docs/kernels.md", "docs/experiments.md", "docs/layers.md")


# What the paper says, as each experiment finds it in its results.
CLAIMS: dict[str, Any] = {
    "mqar": mqar.claims,
    "ladder": ladder.claims,
    "extrapolation": extrapolation.claims,
    "training against length": lengths.claims_of_training,
    "op against length": lengths.claims_of_ops,
}
QUANTITIES = {"training against length": "tokens a second", "op against length": "milliseconds"}


def records(what: str) -> list[tuple[str, dict]]:
    """Name and content of each committed result of one kind."""
    found = ((path.stem, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json")))
    return [(name, record) for name, record in found if record.get("what") == what]


def plot(name: str, says: str) -> list[str]:
    """A plot, for pages of the site."""
    return ["", f"![{says}](../benchmarks/results/{name}.svg)", ""]


def op_table() -> str:
    """Milliseconds of every line of the op's record, a section a device and shape."""
    lines = []
    for _, record in records("op"):
        for shape in dict.fromkeys(tuple(row["shape"]) for row in record["results"]):
            rows = [row for row in record["results"] if tuple(row["shape"]) == shape]
            where = f"{record['device']} ({record['machine']}), {rows[0]['dtype']}, (b, t, h, k, v) = {shape}"
            lines += [f"{where}, jax {record['versions']['jax']}, {record['date'][:10]}:", ""]
            lines += ["| | forward, ms | forward + backward, ms |", "|---|---|---|"]
            lines += [f"| {row['op']} | {row['forward']:.2f} | {row['forward and backward']:.2f} |" for row in rows]
            lines.append("")
    return "\n".join(lines)


def peers_table() -> str:
    """Milliseconds of the op and of what a user would pick instead, a row a shape."""
    lines = []
    for _, record in records("peers"):
        here = [row for _, other in records("op") if other["device"] == record["device"] for row in other["results"]]
        times = {(row["op"], tuple(row["shape"])): row for row in (*here, *record["results"])}
        ops = ["mosaic_gpu", *(x for x in record["versions"] if x in {row["op"] for row in record["results"]})]
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        own = any(row["op"] == "mosaic_gpu" for row in record["results"])
        where = "" if own else "; mosaic_gpu from the record of `python -m benchmarks.op gpu`"
        lines += [f"`{record['command']}`, {record['device']}, {record['date'][:10]}; {versions}{where}:", ""]
        names = ["b, t, h, k, v", *ops, "attention, 16 x 128"]
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for shape in dict.fromkeys(shape for op, shape in times if op in ops):
            rows = [*(times.get((op, shape)) for op in ops), times.get(("attention", (*shape[:2], 16, 128, 128)))]
            numbers = (f"{x['forward']:.2f} / {x['forward and backward']:.2f}" if x else "-" for x in rows)
            lines.append(f"| {', '.join(map(str, shape))} | {' | '.join(numbers)} |")
        lines.append("")
    return "\n".join(lines) or "Not run yet.\n"


def forward_table() -> str:
    """Milliseconds of the forward's kernels by shape, of what they were to reach, and what other gates cost."""
    lines = []
    for name, record in records("op_gpu"):
        groups: dict[str, dict[str, dict]] = {}
        for row in record["results"]:
            groups.setdefault(row["group"], {})[row["name"]] = row
        copy, matmul = groups["ceilings"]["copy"]["TB/s"], groups["ceilings"]["matmul"]["TFLOP/s"]
        where = f"{record['device']}, jax {record['versions']['jax']}, {record['date'][:10]}; bfloat16"
        ceilings = f"copying {copy:.2f} TB/s, a product of 8192 x 8192 matrices {matmul:.0f} TFLOP/s"
        lines += [f"{where}. Ceilings there: {ceilings}.", ""]
        kinds = list(dict.fromkeys(name.split(") ")[-1] for name in groups.get("gates", {})))
        names = ("b, t, h, k, v", "kernels, ms", "with launches", "to reach", "TB/s", "TFLOP/s", *kinds)
        lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for shape, row in groups["bars"].items():
            ratios = [groups["gates"].get(f"{shape} {kind}", {}).get("ratio") for kind in kinds]
            times = " | ".join("" if x is None else f"{x:.2f}x" for x in ratios)
            numbers = f"{row['ms']:.3f} | {row['to reach']} | {row['TB/s']:.2f} | {row['TFLOP/s']:.0f}"
            kernels = f"{row['of kernels']:.3f}" if "of kernels" in row else ""
            lines.append(f"| {shape.strip('()')} | {kernels} | {numbers} | {times} |")
        peers = {key.split(" ", 2)[2]: row["ms"] for key, row in groups["ceilings"].items() if "ms" in row}
        shown = "; ".join(f"{shape} {ms:.3f} ms" for shape, ms in peers.items())
        lines += ["", f"cuDNN attention, causal, of (b, t, heads, width): {shown}."]
        lines += plot(name, "Milliseconds with launches, and what was to be reached")
    return "\n".join(lines)


def backward_table() -> str:
    """Milliseconds of the forward's and the backward's kernels, by shape and gates, and of what they were to reach."""
    lines = []
    for name, record in records("backward_gpu"):
        where = f"{record['device']}, jax {record['versions']['jax']}, {record['date'][:10]}, commit {record['commit']}"
        lines += [f"{where}; bfloat16:", ""]
        lines += ["| b, t, h, k, v | gates | both, ms | to reach | each kernel |", "|---|---|---|---|---|"]
        for row in record["results"]:
            if "kernels" in row:
                shape, bar = ", ".join(map(str, row["shape"])), row["to reach"] if row["gates"] == "mild" else ""
                each = ", ".join(f"{ms:.3f}" for _, ms in row["kernels"])
                lines.append(f"| {shape} | {row['gates']} | {row['ms']:.3f} | {bar} | {each} |")
        lines += plot(name, "Milliseconds, and what was to be reached")
    return "\n".join(lines)


def decode_table() -> str:
    """Tokens a second of decoding, by batch and place."""
    lines = []
    for name, record in records("decode"):
        lines += [f"{record['parameters']:,} parameters, {record['device']}, {record['date'][:10]}:", ""]
        lines += ["| batch | after | tokens/s | ms a token |", "|---|---|---|---|"]
        for row in (*record["positions"], record["many rows"]):
            after = f"{row['position']:,} tokens" if "position" in row else "the prompt"
            lines.append(f"| {row['batch']} | {after} | {row['tokens_per_s']:,.0f} | {row['ms_per_token']:.2f} |")
        lines += plot(name, "Milliseconds a token against tokens seen")
    return "\n".join(lines)


def heading(record: dict) -> list[str]:
    """How a record was made."""
    how = record["settings"]
    after = "after ± is the sample's standard deviation over them"
    seeds = "1 seed" if how["seeds"] == 1 else f"{how['seeds']} seeds; {after}"
    where = f"`{record['command']}`, {record['device']}, {record['date'][:10]}, {seeds}:"
    return [where, "", ", ".join(f"{key} {value}" for key, value in how.items() if key != "seeds") + ".", ""]


def ending(name: str, record: dict) -> list[str]:
    """A record's plot, and what was seen of the paper's claims."""
    quantity = record.get("quantity", QUANTITIES.get(record["what"]))
    found = CLAIMS[record["what"]](record["results"])
    words = {claim: {True: "seen", False: "not seen"}.get(seen, seen).capitalize() for claim, seen in found.items()}
    marked = {claim: said if said.startswith("Seen") else f"**{said}**" for claim, said in words.items()}
    return [
        *plot(name, f"{record['what']}: {quantity}"),
        *(f"- {said}: {claim}." for claim, said in marked.items()),
        "",
    ]


def experiment_table(what: str) -> str:
    """What was measured of every model of an experiment, and what was seen of the paper's ordering."""
    lines = []
    for name, record in records(what):
        quantity = record["quantity"]
        lines += heading(record)
        lines += [f"| model | {quantity} | learning rate | parameters |", "|---|---|---|---|"]
        for model, row in record["results"].items():
            lines.append(
                f"| {model} | {plus_minus(row['measured'])} | {row['learning rate']:g} | {row['parameters']:,} |"
            )
        lines += ending(name, record)
    return "\n".join(lines) or "Not run yet.\n"


def recall_table() -> str:
    """Accuracy by the number of pairs."""
    lines = []
    for name, record in records("mqar"):
        pairs = [str(n) for n in mqar.counts(record["settings"]["pairs"])]
        lines += heading(record)
        lines += [
            f"| model | {' | '.join(pairs)} pairs | the most, each seed | learning rate | parameters |",
            "|---" * (len(pairs) + 4) + "|",
        ]
        for model, row in record["results"].items():
            recalled = " | ".join(plus_minus(x) for x in zip(*row["measured"], strict=True))
            each = ", ".join(f"{x[-1]:.3f}" for x in row["measured"])
            lines.append(f"| {model} | {recalled} | {each} | {row['learning rate']:g} | {row['parameters']:,} |")
        lines += ending(name, record)
    return "\n".join(lines) or "Not run yet.\n"


def extrapolation_table() -> str:
    """Bits a byte by bucket, and what was seen of the paper's figure."""
    lines = []
    for name, record in records("extrapolation"):
        how = record["settings"]
        lines += [
            *heading(record),
            "| model | " + " | ".join(places(how)) + " |",
            "|---" * (len(places(how)) + 1) + "|",
        ]
        for model, row in record["results"].items():
            measured = list(zip(*row["measured"], strict=True))
            cells = " | ".join(plus_minus(measured[i]) for i in shown(how))
            lines.append(f"| {model} | {cells} |")
        lines += ending(name, record)
    return "\n".join(lines) or "Not run yet.\n"


def shown(how: dict) -> list[int]:
    """Buckets 1, 2, 4, 8, ... and the last."""
    return sorted(
        {*(2**i - 1 for i in range(how["buckets"].bit_length())), how["buckets"] - 1} & set(range(how["buckets"]))
    )


def places(how: dict) -> list[str]:
    """The first and last place of each bucket shown."""
    return [f"{i * how['length']} to {(i + 1) * how['length'] - 1}" for i in shown(how)]


def training_lengths_table() -> str:
    """Tokens a second and memory of training against length, and what was seen of the paper's figure."""
    lines = []
    for name, record in records("training against length"):
        lines += [f"`{record['command']}`, {record['device']}, {record['date'][:10]}:", ""]
        lines += ["| model | tokens | batch | blocks | parameters | tokens/s | of Transformer++'s | memory |"]
        lines += ["|---" * 8 + "|"]
        peer = {x["length"]: x["tokens_per_s"] for x in record["results"] if x["model"] == "Transformer++"}
        for row in record["results"]:
            speed = row["tokens_per_s"]
            of_peer = f"{speed / peer[row['length']]:.2f}" if row["length"] in peer else "-"
            size = f"{row['length']} | {row['batch']} | {row['layers']} | {row['parameters']:,}"
            lines.append(f"| {row['model']} | {size} | {speed:,} | {of_peer} | {row['memory_gb']:.1f} GB |")
        lines += ending(name, record)
    return "\n".join(lines) or "Not run yet.\n"


def op_lengths_table() -> str:
    """Milliseconds of the op against length, and what was seen of the paper's figure."""
    lines = []
    for name, record in records("op against length"):
        sizes = {row["length"]: f"{row['batch']} x {row['length']}" for row in record["results"]}
        lines += [f"`{record['command']}`, {record['device']}, {record['date'][:10]}:", ""]
        lines += [
            f"| forward / with the backward, ms | {' | '.join(sizes.values())} |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for op in dict.fromkeys(row["op"] for row in record["results"]):
            rows = [row for row in record["results"] if row["op"] == op]
            times = " | ".join(f"{row['forward']:.2f} / {row['forward and backward']:.2f}" for row in rows)
            lines.append(f"| {op} | {times} |")
        lines += ending(name, record)
    return "\n".join(lines) or "Not run yet.\n"


def op_plots() -> str:
    """The plots of the op's records and of those beside peers, for pages of the site."""
    lines = []
    for what, says in (("op", "Milliseconds on"), ("peers", "Milliseconds beside peers on")):
        for name, record in records(what):
            lines += plot(name, f"{says} {record['device']}")[1:]
    return "\n".join(lines)


def speed_table() -> str:
    """How fast each preset was seen to train."""
    names = ("preset", "tokens a step", "device", "tokens/s", "6 N a token, of the peak", "memory", "date")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for _, x in records("train"):
        use = "-" if x["mfu_6n"] is None else f"{100 * x['mfu_6n']:.1f} %"
        numbers = f"{x['tokens_per_s']:,} | {use} | {x['memory_gb']:.1f} GB | {x['date'][:10]}"
        lines.append(f"| {x['preset']} | {x['batch']} x {x['length']} | {x['device']} | {numbers} |")
    return "\n".join([*lines, ""])


def train_table() -> str:
    """The same, and where the time of those went that were profiled."""
    lines, profiled = [speed_table()], [x for _, x in records("train") if "kernels" in x]
    for x in profiled:
        step = sorted(x["step_ms"])[len(x["step_ms"]) // 2]
        lines += [f"{x['preset']}: a step of {step:.1f} ms; its kernels, as the profiler has them:", ""]
        lines += ["| of | work | ms | share | kernels |", "|---|---|---|---|---|"]
        for row in x["kernels"]:
            numbers = f"{row['ms']:.2f} | {100 * row['share']:.1f} % | {row['calls']}"
            lines.append(f"| {row['part']} | {row['work']} | {numbers} |")
        lines.append("")
    if profiled:
        lines += plot("training-steps", "Share of a step's time by work")[1:]
    return "\n".join(lines)


def cluster_table() -> str:
    """What was seen on several GPUs, and of the training loop on one."""
    lines = []

    def begin(record: dict, *columns: str) -> None:
        lines.extend(
            [f"`{record['command']}`, {record['device']}, jax {record['versions']['jax']}, {record['date'][:10]}:", ""]
        )
        lines.extend([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"])

    for _, record in records("cluster fsdp"):
        begin(
            record,
            "fsdp on GPUs",
            "parameters",
            "rows a GPU",
            "step, ms",
            "tokens/s a GPU",
            "efficiency",
            "memory a GPU",
        )
        for gpus, row in record["gpus"].items():
            rows, step = f"{row['batch'] // int(gpus)} x {row['length']}", 1e3 * float(np.median(row["step_s"]))
            numbers = f"{row['tokens_per_s_a_gpu']:,.0f} | {record['efficiency'][gpus]:.3f} | {row['memory_gb']} GB"
            lines.append(f"| {gpus} | {row['parameters']:,} | {rows} | {step:.1f} | {numbers} |")
        lines += ["", f"remat {record['remat']}.", ""]
    for _, record in records("cluster op"):
        columns = (
            "forward, ms",
            "with the backward, ms",
            "exchange by itself, ms",
            "forward / one GPU's",
            "both / one GPU's",
        )
        begin(record, "the op on GPUs", "exchange", *columns)
        for gpus, rows in record["milliseconds"].items():
            for exchange, row in rows.items():
                ratio = record.get("against_one", {}).get(gpus, {}).get(exchange, {})
                found = [row.get(name) for name in ("forward", "forward_backward", "exchange")]
                found += [ratio.get(name) for name in ("forward", "forward_backward")]
                numbers = " | ".join("-" if x is None else f"{x:.3f}" for x in found)
                lines.append(f"| {gpus} | {exchange if int(gpus) > 1 else '-'} | {numbers} |")
        sizes = (
            f"{record['tokens_a_gpu']} tokens a GPU, {record['h']} heads, k {record['k']}, v {record['v']}, bfloat16"
        )
        errors = ((f"{x:.1e}", name) for row in record["errors"].values() for name, x in row.items())
        largest, name = max(errors, key=lambda x: float(x[0]))
        lines += ["", f"{sizes}. RMS error against plain JAX on one device: at most {largest} ({name}).", ""]
    for _, record in records("cluster long"):
        begin(record, "tokens of one sequence", "GPUs", "parameters", "step, s", "tokens/s", "memory a GPU", "losses")
        for tokens, row in record["tokens"].items():
            numbers = f"{np.median(row['step_s']):.2f} | {row['tokens_per_s']:,.0f} | {row['memory_gb']} GB"
            losses = ", ".join(f"{x:.2f}" for x in row["losses"])
            lines.append(f"| {int(tokens):,} | {record['gpus']} | {row['parameters']:,} | {numbers} | {losses} |")
        lines += ["", f"remat {record['remat']}.", ""]
    for _, record in records("cluster restore"):
        begin(record, f"saved on {record['saved_on']} GPUs", "the next step's loss")
        lines += [f"| {how} | {loss:.5f} |" for how, loss in record["loss_of_the_next_step"].items()] + [""]
    for _, record in records("cluster data"):
        begin(
            record, "`gla-jax train`, tokens/s", "the bare step's", "ratio", "wait for data a step, ms", "of the time"
        )
        speeds = f"{record['tokens_per_s']:,} | {record['bare_tokens_per_s']:,.0f} | {record['against_bare']:.4f}"
        lines += [f"| {speeds} | {record['data_wait_ms']:.2f} | {100 * record['data_wait_share']:.2f} % |", ""]
    return "\n".join(lines) or "Not run yet.\n"


def parity_table() -> str:
    """How far logits are from the peers' own, by family."""
    lines = []
    for _, record in records("parity"):
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        rows, length = record["tokens_bt"]
        lines += [f"{record['device']}, {record['date'][:10]}, {rows} x {length} tokens; {versions}:", ""]
        names = ("model", "float32", "bfloat16", "ours to float32", "theirs to float32", "theirs to theirs", "a block")
        lines += [f"| {' | '.join(names)} | written back |", "|---" * (len(names) + 1) + "|"]
        for name, row in record["results"].items():
            alone = row.get("each block alone, of what entered theirs in bfloat16", ())
            blocks = [block["our bfloat16 to their bfloat16"] for block in alone]
            back = [row["theirs of what we wrote"][dtype]["to theirs of its own"] for dtype in record["bars"]]
            # 0 where the same kernels ran twice.
            itself = row.get("their bfloat16 token by token", {}).get("to theirs in bfloat16", "") or ""
            numbers = [*row["logits"].values(), itself, float(np.mean(blocks)) if blocks and None not in blocks else ""]
            shown = ["none" if x is None else x if x == "" else f"{x:.2e}" for x in numbers]
            same = "the same" if back == [0, 0] else " and ".join("none" if x is None else f"{x:.1e}" for x in back)
            lines.append(f"| {name} | {' | '.join(shown)} | {same} |")
        lines.append("")
    return "\n".join(lines) or "Not run yet.\n"


def naive_table() -> str:
    """Logits against the peer's by its naive ops: the largest of several seeds, in thousandths."""
    lines = []
    for _, record in records("parity with naive ops"):
        versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        rows, length = record["tokens_bt"]
        lines += [f"{record['device']}, {record['date'][:10]}, {rows} x {length} tokens; {versions}:", ""]
        depths = list(next(iter(record["results"].values()))["blocks"])
        names = [f"{depth} block{'' if depth == '1' else 's'}" for depth in depths]
        lines += [f"| model | {' | '.join(names)} | float32 |", "|---" * (len(names) + 2) + "|"]
        whats = ("bfloat16", "bfloat16 with all roundings", "our bfloat16 to float32", "their bfloat16 to float32")
        for name, row in record["results"].items():
            largest = [[1000 * max(row["blocks"][depth][what]) for what in whats] for depth in depths]
            cells = [", ".join(f"{x:.1f}" for x in numbers) for numbers in largest]
            exact = max(x for depth in depths for x in row["blocks"][depth]["float32"])
            lines.append(f"| {name} | {' | '.join(cells)} | {exact:.1e} |")
        lines.append("")
    return "\n".join(lines) or "Not run yet.\n"


def roundings_table() -> str:
    """What each rounding does to logits, by model, in thousandths."""
    lines = []
    for _, record in records("parity, rounding by rounding"):
        models = record["results"]
        lines += [f"| | {' | '.join(name.replace('_', ' ') for name in models)} |", "|---" * (len(models) + 1) + "|"]
        for choice in sorted({choice for row in models.values() for choice in row["of"]}):
            pairs = [row["of"].get(choice) for row in models.values()]
            numbers = [x and [1000 * x[name] for name in ("to theirs", "to float32")] for x in pairs]
            shown = [f"{x[0]:.1f}, {x[1]:.1f}" if x else "" for x in numbers]
            lines.append(f"| {choice} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines) or "Not run yet.\n"


TABLES = {
    "op timings": op_table,
    "peers": peers_table,
    "training speed": speed_table,
    "training steps": train_table,
    "op plots": op_plots,
    "forward": forward_table,
    "backward": backward_table,
    "decoding": decode_table,
    "cluster": cluster_table,
    "mqar": recall_table,
    "ladder": lambda: experiment_table("ladder"),
    "extrapolation": extrapolation_table,
    "training against length": training_lengths_table,
    "op against length": op_lengths_table,
    "parity": parity_table,
    "parity with naive ops": naive_table,
    "parity by roundings": roundings_table,
}


def with_tables(page: str) -> str:
    """The page with its tables made anew.

    Raises:
      ValueError: a table's two marks are not one after the other, or name no table.
    """
    marks = re.findall(r"<!-- (?:(.+?), made by (\S+)|end of (.+?)) -->", page)
    begun, ended = marks[::2], [end for _, _, end in marks[1::2]]
    unknown = [name for name, maker, _ in begun if maker == "benchmarks/tables.py" and name not in TABLES]
    if unknown or [name or None for name, _, _ in begun] != ended:
        raise ValueError(f"marks of tables have to be pairs, of {', '.join(TABLES)}; got {marks}")
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}, made by benchmarks/tables.py -->\n", f"<!-- end of {name} -->"
        if begin in page:
            inside = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
            made = f"{begin}\n{table()}\n{end}"
            page = inside.sub(lambda _, made=made: made, page)
    return page


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(with_tables((ROOT / name).read_text()))
