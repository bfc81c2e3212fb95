"""Tables of words: what a recipe may say, and where the code for it lives.

A value is written as `module:attribute` and imported when the word is first looked up, so that a table can
name everything without loading anything. A word that is not there is answered with the nearest one that is.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from effc.errors import EffcError, RecipeError


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like `word`, or None where nothing comes close."""
    hits = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return hits[0] if hits else None


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """The sentence that refuses `word`: what is unknown, the nearest known word, or all of them."""
    known = sorted(known)
    guess = nearest(word, known)
    more = f" and {len(known) - 30} more" if len(known) > 30 else ""
    tail = (
        f"did you mean {guess!r}?" if guess else f"known: {', '.join(known[:30]) or 'none'}{more}"
    )
    return f"unknown {kind} {word!r}; {tail}"


def _place(value: Any) -> tuple[Any, Any] | None:
    return (value.__module__, value.__qualname__) if isinstance(value, type) else None


class Table:
    """Words of one kind, each with the object that it stands for, loaded on demand."""

    def __init__(
        self, kind: str, words: dict[str, str], error: type[EffcError] = RecipeError
    ) -> None:
        self.kind, self.error = kind, error
        self._words: dict[str, Any] = dict(words)

    def __contains__(self, word: object) -> bool:
        return word in self._words

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._words))

    def __getitem__(self, word: str) -> Any:
        """What `word` stands for. Raises the table's error, naming the nearest known word."""
        if word not in self._words:
            raise self.error(unknown(self.kind, word, self._words))
        value = self._words[word]
        if isinstance(value, str):
            module, _, attribute = value.partition(":")
            value = self._words[word] = getattr(importlib.import_module(module), attribute)
        return value

    def add(self, word: str, value: Any, *, again: bool = False) -> None:
        """Make `word` known. A word that stands for something else already is refused.

        `again` lets a class take the place of one of the same name from the same module.
        """
        old = self._words.get(word, value)
        if old is not value and not (again and _place(old) == _place(value)):
            raise self.error(f"{self.kind} {word!r} is already taken", hint="choose another name")
        self._words[word] = value
