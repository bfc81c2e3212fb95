"""Paragraphs without a fusion, cut from published ones: those have one each, so that false alarms would go unseen.

    python examples/lexical_fusion/quiet.py FILE OUT [--seed N]

What is kept is a run of clauses: without the fusion word, or with it and without one of the words that it stands for,
half of them each where both can be had. They are marked as synthetic.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHORTEST = 12
"""Characters of a paragraph."""
CLAUSE = re.compile(r"[^。！？；，]+[。！？；，]*")


def cut(row: dict[str, Any], draw: random.Random) -> dict[str, Any] | None:
    """A paragraph without a fusion of one with one; None where nothing long enough is left."""
    fusion, parts = row["fusion"][2], [part[2] for part in row["separations"]]
    runs = list(_runs(CLAUSE.findall(row["text"])))
    kinds = [
        [text for text in runs if fusion not in text],
        [text for text in runs if fusion in text and not all(part in text for part in parts)],
    ]
    found = [max(texts, key=len) for texts in kinds if texts]
    if not found:
        return None
    return {
        "id": f"{row['id']}-quiet", "text": draw.choice(found), "fusion": None, "separations": [],
        "synthetic": True,
    }  # fmt: skip


def _runs(clauses: list[str]) -> Iterator[str]:
    """All runs of clauses that are long enough."""
    for start in range(len(clauses)):
        for end in range(start + 1, len(clauses) + 1):
            text = "".join(clauses[start:end])
            if len(text) >= SHORTEST:
                yield text


def cuts(rows: list[dict[str, Any]], seed: int, share: float = 1.0) -> list[dict[str, Any]]:
    """Of a share of the paragraphs one without a fusion each."""
    draw = random.Random(seed)
    return [made for row in rows if draw.random() < share and (made := cut(row, draw)) is not None]


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a file as plain values."""
    return [json.loads(line) for line in file.read_text("utf-8").split("\n") if line.strip()]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description="Paragraphs without a fusion.")
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    made = cuts(rows_of(given.file), given.seed)
    print(f"{write(given.out, made)}: {len(made)} paragraphs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
