"""Paragraphs of published ones whose three words are exchanged for others, so that there are many fusion words.

    python examples/lexical_fusion/exchange.py FILE DICTIONARY OUT [--times N] [--seed N]

The two words become others of the dictionary as long as they are, with a sememe in common where they are in it; the
fusion word becomes characters of those, at the places that it had of the old ones. It is a word that nobody says, so
that a model must see what it is made of. They are marked as synthetic, and are for training alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import task_runs  # noqa: E402  the folder above has what examples of tasks share

TRIES = 20
Json = dict[str, Any]


class Exchange:
    """Words of a dictionary by length and sememe."""

    def __init__(self, dictionary: Path, avoid: Collection[str] = ()) -> None:
        from effc.zoo import sememes

        self.avoid = frozenset(avoid)
        self.words = sememes.of_dictionary(dictionary).words
        self.alike: dict[tuple[int, int], list[str]] = {}
        for word, of in sorted(self.words.items()):
            if len(word) > 1 and all("\u4e00" <= c <= "\u9fff" for c in word):
                for number in (0, *of):  # 0: any word
                    self.alike.setdefault((len(word), number), []).append(word)

    def other(self, word: str, draw: random.Random) -> str | None:
        """Another word like it; None where there is none of its length."""
        number = draw.choice(self.words.get(word, (0,)))
        found = self.alike.get((len(word), number)) or self.alike.get((len(word), 0))
        return draw.choice(found) if found else None

    def __call__(self, row: Json, draw: random.Random, name: str) -> Json | None:
        """A paragraph with other words; None where none were found that stand in it nowhere else."""
        old = [row["fusion"][2], *(part[2] for part in row["separations"])]
        for _ in range(TRIES):
            new = [self.other(word, draw) for word in old[1:]]
            if None in new:
                return None
            fused = "".join(
                _taken(old[0][place - row["fusion"][0]], old[1 + part], str(new[part]), draw)
                for place, part in sorted(row["char_links"])
            )
            words = [fused, *map(str, new)]
            fresh = all(w not in row["text"] and w not in old for w in words)
            if fresh and fused not in self.avoid and len({*words}) == 3:
                return _put(row, words, name)
        return None


def _taken(character: str, old: str, new: str, draw: random.Random) -> str:
    """The character of the new word at the place that one has in the old word; any where it is not of that."""
    place = old.find(character)
    return new[place] if place >= 0 else draw.choice(new)


def _put(row: Json, words: list[str], name: str) -> Json:
    """The paragraph with words in the place of its three; none of the places changes, as all are as long as before."""
    text = list(row["text"])
    named = [row["fusion"], *row["separations"]]
    extra = row.get("extra", {})
    kept: dict[str, list[list[int]]] = {}
    taken = [False] * len(text)
    for word, (start, end, _) in zip(words, named, strict=True):
        text[start:end] = word
        taken[start:end] = [True] * (end - start)
    for key, word in zip(("fusion", "A", "B"), words, strict=True):
        kept[key] = []
        for start, end in extra.get(key, []):
            if not any(taken[start:end]):
                text[start:end] = word
                taken[start:end] = [True] * (end - start)
                kept[key].append([start, end])
    fusion, *parts = ([s, e, word] for word, (s, e, _) in zip(words, named, strict=True))
    return {
        "id": name, "text": "".join(text), "fusion": fusion, "separations": parts,
        "char_links": row["char_links"], "extra": kept, "synthetic": True,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Paragraphs with other words.")
    parser.add_argument("file", type=Path)
    parser.add_argument("dictionary", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    quiet = task_runs.beside(HERE, "quiet")
    exchange, draw = Exchange(given.dictionary), random.Random(given.seed)
    made = [
        found for row in quiet.rows_of(given.file) for i in range(given.times)
        if row["fusion"] and (found := exchange(row, draw, f"{row['id']}-{i}")) is not None
    ]  # fmt: skip
    print(f"{quiet.write(given.out, made)}: {len(made)} paragraphs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
