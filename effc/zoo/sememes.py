"""Sememes: of what simpler notions a dictionary makes the words of a language (HowNet, Dong and Dong).

A dictionary is a file of two lines a word: the word, and its sememes between blanks, all senses together. What a
package carries of one (`text`) is shorter: a line of the sememes, then a word, a tab and the numbers of its sememes a
line. Numbers begin at 1, the most frequent first; 0 is none. Words of up to 4 characters are kept; those of one would
join nearly everything, and are asked about characters alone that no longer word has. Nothing here needs torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effc.errors import SourceError
from effc.zoo import reading

Array = np.ndarray[Any, np.dtype[Any]]
LONGEST = 4
MOST = 128
"""Sememes of a paragraph; where there are more, those of the fewest characters are left out."""
HINT = "a line of the word, then one of its sememes between blanks"


@dataclass(frozen=True, kw_only=True)
class Sememes:
    """The names of sememes, and the numbers of those of every word."""

    names: tuple[str, ...] = ()
    words: Mapping[str, tuple[int, ...]]

    def text(self) -> str:
        """What a package carries."""
        rows = (f"{word}\t{' '.join(map(str, of))}" for word, of in sorted(self.words.items()))
        return "\n".join([" ".join(self.names), *rows, ""])

    def shuffled(self, seed: int) -> Sememes:
        """The same with every word's sememes given to another word: what is left is where words are."""
        words = sorted(self.words)
        order = np.random.default_rng(seed).permutation(len(words))
        return Sememes(
            names=self.names,
            words={word: self.words[words[i]] for word, i in zip(words, order, strict=True)},
        )

    def match(self, text: str, *, singles: bool = False) -> tuple[tuple[int, ...], Array]:
        """Sememes of all words in a text, and which characters are of a word that has them [characters, sememes].

        Words have two characters or more; with `singles` a character of no such word has its own sememes.
        """
        joined: dict[int, set[int]] = {}
        covered: set[int] = set()
        for start in range(len(text)):
            for end in range(start + 2, min(start + LONGEST, len(text)) + 1):
                of = self.words.get(text[start:end], ())
                covered.update(range(start, end) if of else ())
                for number in of:
                    joined.setdefault(number, set()).update(range(start, end))
        for place, character in enumerate(text if singles else ""):
            for number in self.words.get(character, ()) if place not in covered else ():
                joined.setdefault(number, set()).add(place)
        kept = sorted(joined, key=lambda number: (-len(joined[number]), number))[:MOST]
        incidence = np.zeros((len(text), len(kept)), np.bool_)
        for column, number in enumerate(kept):
            incidence[sorted(joined[number]), column] = True
        return tuple(kept), incidence


def of_dictionary(file: Path) -> Sememes:
    """The sememes of a dictionary's words. Raises CalibrationError or SourceError, with file and line."""
    lines = reading.text(file).split("\n")
    found: dict[str, list[str]] = {}
    for number, word in enumerate(lines[::2]):
        line = 2 * number + 1
        if line == len(lines) and not word:
            continue  # the end of the last line
        of = lines[line].split() if line < len(lines) else []
        if not of:
            raise SourceError(f"{file} line {line + 1}: {word!r} has no sememes", hint=HINT)
        if any(c.isspace() for c in word):
            raise SourceError(f"{file} line {line}: {word[:40]!r} is no word", hint=HINT)
        if 1 <= len(word) <= LONGEST:
            found[word] = list(dict.fromkeys(of))
    if not found:
        raise SourceError(f"{file} has no word of up to {LONGEST} characters", hint=HINT)
    counted = Counter(name for of in found.values() for name in of)
    names = sorted(counted, key=lambda name: (-counted[name], name))
    numbers = {name: i for i, name in enumerate(names, 1)}
    return Sememes(
        names=tuple(names),
        words={word: tuple(numbers[name] for name in of) for word, of in found.items()},
    )


def of_text(file: Path) -> Sememes:
    """What `Sememes.text` wrote into a file. Raises SourceError, with file and line, where it did not."""
    first, *lines = reading.text(file).split("\n")
    names = tuple(first.split())
    words = {}
    for line, row in enumerate(lines, 2):
        if not row:
            continue
        word, _, numbers = row.partition("\t")
        try:
            of = tuple(map(int, numbers.split()))
        except ValueError:
            of = ()
        if not of or not all(1 <= number <= len(names) for number in of):
            raise SourceError(
                f"{file} line {line}: {word[:20]!r} has no sememes of those in the first line",
                hint="take it as `effc tune` wrote it",
            )
        words[word] = of
    return Sememes(names=names, words=words)


def vectors(file: Path, names: Sequence[str], size: int, seed: int = 0) -> tuple[Array, int]:
    """A vector for every sememe [1 + names, size], the first for none, and how many the file has.

    A line of the file is a sememe and its numbers. Others are drawn, as long as those that are there. Raises
    SourceError, with file and line, for what is no vector.
    """
    places = {name: i for i, name in enumerate(names, 1)}
    found = np.zeros((1 + len(names), size), np.float32)
    there = set()
    for line, row in enumerate(reading.text(file).split("\n"), 1):
        name, *numbers = row.split() or [""]
        if not name:
            continue
        try:
            vector = np.array(numbers, np.float32)
        except ValueError:
            vector = np.empty(0, np.float32)
        if vector.shape != (size,) or not np.isfinite(vector).all():
            raise SourceError(
                f"{file} line {line}: {name[:20]!r} has no vector of {size} numbers",
                hint="the source's option `sememe_size` says how many there are",
            )
        if name in places:
            found[places[name]] = vector
            there.add(places[name])
    scale = found[sorted(there)].std() if there else 0.1
    drawn = np.random.default_rng(seed).normal(0, scale, found.shape).astype(np.float32)
    lacking = [i for i in range(1, len(found)) if i not in there]
    found[lacking] = drawn[lacking]
    return found, len(there)
