"""Keys of somebody else's settings, each of which is answered for: what became of it, or that nothing did.

A reader takes the keys that it knows, one by one, and says what each became. What it has not taken when it is done is
named as unknown, so nothing is left out without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effc.errors import RecipeError
from effc.paths import shown, word

UNKNOWN = "effc does not know this key"
HINT = "correct it, or take it out"
WORDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a mapping",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Note:
    """What became of some keys, by their paths; `is_lost` where effc does not do what they say."""

    keys: tuple[str, ...]
    became: str
    is_lost: bool = False


@dataclass(kw_only=True)
class Wish:
    """What settings ask for, in the parts of a recipe, and what became of their keys."""

    passes: list[dict[str, Any]] = field(default_factory=list)
    target: str | None = None
    model: str | None = None
    calib: dict[str, Any] = field(default_factory=dict)
    rounds: bool = False
    """Whether they ask for rounding at all; a recipe without any would be another model then."""
    notes: list[Note] = field(default_factory=list)

    def became(self, keys: str | Sequence[str], what: str, *, is_lost: bool = False) -> None:
        paths = (keys,) if isinstance(keys, str) else tuple(keys)
        if paths:
            self.notes.append(
                Note(keys=tuple(word(p) for p in paths), became=what, is_lost=is_lost)
            )

    def lost(self, keys: str | Sequence[str], why: str) -> None:
        self.became(keys, why, is_lost=True)


class Keys:
    """One mapping of the settings, at a path. Raises RecipeError for values of another type than a reader asks for."""

    def __init__(self, values: Mapping[Any, Any], wish: Wish, place: str = "") -> None:
        self.left = {str(key): value for key, value in values.items()}
        self.wish, self.place = wish, place
        self.elsewhere: dict[str, str] = {}
        self.given = set(self.left)
        if len(self.left) != len(values):
            raise RecipeError(
                f"{word(place) or 'the settings'}: a key stands there twice", hint=HINT
            )

    def path(self, key: str) -> str:
        if key in self.elsewhere:
            return self.elsewhere[key]
        return f"{self.place}.{key}" if self.place else key

    def paths(self, *keys: str) -> list[str]:
        return [self.path(key) for key in keys]

    def there(self, *keys: str) -> list[str]:
        """Paths of those of the keys that the settings have, taken or not."""
        return self.paths(*(key for key in keys if key in self.given))

    def take(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """The value of a key, which is answered for by whoever takes it; the default where it is none or not there."""
        if key not in self.left:
            return default
        value = self.left.pop(key)
        if value is None or value in ([], {}):
            self.wish.became(self.path(key), "nothing: it is empty")
        if value is None:
            return default
        is_number = kind is float and isinstance(value, int)
        if (not isinstance(value, kind) and not is_number) or (
            isinstance(value, bool) and kind is not bool
        ):
            raise self.error(key, f"{shown(str(value))} is not {WORDS[kind]}")
        return value

    def told(
        self, key: str, kind: type[Any], became: str, default: Any = None, *, lost: bool = False
    ) -> Any:
        """Take a key, and say what became of it where it is there."""
        if key not in self.left:
            return default
        value = self.take(key, kind, default)
        self.wish.became(self.path(key), became, is_lost=lost)
        return value

    def words(self, key: str) -> list[str] | None:
        """A list of texts, or None."""
        found = self.take(key, list)
        if found is not None and not all(isinstance(one, str) for one in found):
            raise self.error(key, "is not a list of texts")
        return found  # type: ignore[no-any-return]

    def inner(self, key: str) -> Keys | None:
        """A mapping in this one, to be closed by whoever takes it; None where it is none, or empty."""
        value = self.take(key, dict)
        return Keys(value, self.wish, self.path(key)) if value else None

    def adopt(self, other: Keys, *keys: str) -> None:
        """Take keys of another mapping over, which go on under their old paths; those here already stay."""
        for key in keys:
            if key in other.left and key not in self.left:
                self.move(other, key, key)

    def move(self, other: Keys, key: str, own: str) -> None:
        """Take one key of another mapping over under a name of this one's."""
        self.left[own], self.elsewhere[own] = other.left.pop(key), other.path(key)
        self.given.add(own)

    def drop(self, became: str, *keys: str, lost: bool = False) -> None:
        """Answer for those of the keys that are there, whatever they hold."""
        there = {key: self.left.pop(key) for key in dict.fromkeys(keys) if key in self.left}
        empty = [key for key, value in there.items() if value is None]
        self.wish.became(self.paths(*(k for k in there if k not in empty)), became, is_lost=lost)
        self.wish.became(self.paths(*empty), "nothing: it is empty")

    def close(self, why: str = UNKNOWN) -> None:
        """Name what nobody has taken."""
        self.wish.lost(self.paths(*self.left), why)
        self.left = {}

    def error(self, key: str, what: str) -> RecipeError:
        return RecipeError(f"{word(self.path(key))}: {what}", hint=HINT)
