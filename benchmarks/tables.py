"""Writes the README's tables from benchmarks/results: `python benchmarks/tables.py` (a test checks that they agree)."""

import json
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
BEGIN, END = "<!-- op timings, made by benchmarks/tables.py -->\n", "<!-- end of op timings -->\n"


def op_table() -> str:
    """Milliseconds of every entry of every op-*.json, a section a device."""
    lines = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("op-*.json")):
        record = json.loads(path.read_text())
        shape = ", ".join(map(str, record["shape_bthkv"]))
        where = f"{record['device']} ({record['machine']}), {record['dtype']}, (b, t, h, k, v) = ({shape})"
        lines += [f"{where}, jax {record['versions']['jax']}, {record['date'][:10]}:", ""]
        lines += ["| | forward, ms | forward + backward, ms |", "|---|---|---|"]
        for name, row in record["milliseconds"].items():
            lines.append(f"| {name} | {row['forward']:.2f} | {row['forward + backward']:.2f} |")
        lines.append("")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README with its table made anew."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{op_table()}\n{END}{after}"


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(with_table(page.read_text()))
