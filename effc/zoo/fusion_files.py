"""Chinese paragraphs in which one short word stands for two others (lexical fusion, Liu et al., COLING 2020).

A file has a JSON object in every line:

    id              a name
    text            the paragraph
    fusion          [start, end, word] of the fusion word; null where the paragraph has none
    separations     [start, end, word] of each of the two words that it stands for
    char_links      [place of a character of the fusion word, 0 or 1]: the separation word that the character stands for
    extra           further places of the three words: {"fusion": [[start, end], …], "A": […], "B": […]}

Offsets count characters, ends exclusive. Other fields are not read. What a file of texts alone lacks is not asked for
where nothing is scored. Every error names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from effc.errors import CalibrationError
from effc.table import unknown
from effc.zoo import reading

HINT = "the format is described in docs/recipes.md"
WORDS = ("fusion", "A", "B")
"""Whose further places a file may have."""


class Span(NamedTuple):
    """Characters from `start` to before `end`."""

    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is in a paragraph: fusion words, separation words, and which stand for which.

    `pairs` join a fusion word and a separation word, `characters` the place of one of its characters and a separation
    word. Of a word that is there several times they have the place that the file names; the others are `again`, each
    with that place, and count as mentions.
    """

    fusions: frozenset[Span] = frozenset()
    separations: frozenset[Span] = frozenset()
    pairs: frozenset[tuple[Span, Span]] = frozenset()
    characters: frozenset[tuple[int, Span]] = frozenset()
    again: Mapping[Span, Span] = field(default_factory=dict)

    @property
    def tuples(self) -> frozenset[tuple[Span, frozenset[Span]]]:
        """Fusion words with all separation words that they are joined to, two or more."""
        found: dict[Span, set[Span]] = {}
        for fusion, separation in self.pairs:
            found.setdefault(fusion, set()).add(separation)
        return frozenset((f, frozenset(all_)) for f, all_ in found.items() if len(all_) > 1)

    @property
    def alone(self) -> Truth:
        """The words without their links."""
        return Truth(fusions=self.fusions, separations=self.separations, again=self.again)

    def places(self, span: Span) -> tuple[Span, ...]:
        """Where a word is, the place that the file names first."""
        return span, *(other for other, named in self.again.items() if named == span)


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """A text, and the line of the file that it is from; `truth` where that is known."""

    name: str
    text: str
    line: int = 0
    truth: Truth | None = None


def read(file: Path, *, labelled: bool = True) -> list[Paragraph]:
    """The paragraphs of a file. Raises CalibrationError, with file and line, for what is none.

    With `labelled` every paragraph says whether it has a fusion; else that is read where it is there.
    """
    found = []
    for line, text in enumerate(reading.text(file).split("\n"), 1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise reading.no_json(file, error, begun=line, line=line) from error
        try:
            found.append(_paragraph(value, line, labelled))
        except CalibrationError as error:
            raise CalibrationError(
                f"{file} line {line}: {error.what}", hint=error.hint or HINT
            ) from error
    if not found:
        raise CalibrationError(f"{file} holds no paragraphs", hint="give a JSON object a line")
    return found


def _paragraph(value: Any, line: int, labelled: bool) -> Paragraph:
    if not isinstance(value, Mapping):
        raise CalibrationError(f"it is a {type(value).__name__}, not a paragraph", hint=HINT)
    text = value.get("text")
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError("it has no `text`", hint=HINT)
    name = str(value.get("id", ""))
    if "fusion" not in value:
        if labelled:
            raise CalibrationError(
                "it has no `fusion`", hint="`fusion: null` says that there is none"
            )
        return Paragraph(name=name, text=text, line=line)
    return Paragraph(name=name, text=text, line=line, truth=_truth(text, value))


def _truth(text: str, value: Mapping[str, Any]) -> Truth:
    separations = value.get("separations", [])
    if value["fusion"] is None:
        if separations:
            raise CalibrationError("it has separation words of no fusion word", hint=HINT)
        return Truth()
    fusion = _word(text, value["fusion"], "fusion")
    if not isinstance(separations, list) or len(separations) != 2:
        raise CalibrationError("`separations` is no list of two words", hint=HINT)
    parts = [_word(text, part, f"separations[{i}]") for i, part in enumerate(separations)]
    characters = _characters(fusion, parts, value.get("char_links"))
    again = _again(text, dict(zip(WORDS, (fusion, *parts), strict=True)), value.get("extra", {}))
    return Truth(
        fusions=frozenset({fusion, *(s for s, of in again.items() if of == fusion)}),
        separations=frozenset({*parts, *(s for s, of in again.items() if of in parts)}),
        pairs=frozenset((fusion, part) for part in parts), characters=frozenset(characters), again=again,
    )  # fmt: skip


def _word(text: str, value: Any, place: str) -> Span:
    """A place with the word that must stand there."""
    if not isinstance(value, list) or len(value) != 3:
        raise CalibrationError(f"{place} is not [start, end, word]", hint=HINT)
    span = _span(text, value[:2], place)
    if text[span.start : span.end] != value[2]:
        raise CalibrationError(
            f"{place} says {str(value[2])[:20]!r}, and {text[span.start : span.end]!r} stands at {list(span)}",
            hint="offsets count characters, ends exclusive",
        )
    return span


def _span(text: str, ends: Sequence[Any], place: str) -> Span:
    if len(ends) != 2 or any(type(end) is not int for end in ends):
        raise CalibrationError(f"{place}: {list(ends)} are no two offsets", hint=HINT)
    span = Span(*ends)
    if not 0 <= span.start < span.end <= len(text):
        raise CalibrationError(
            f"{place}: {list(ends)} lies outside of the text, which has {len(text)} characters",
            hint=HINT,
        )
    return span


def _characters(fusion: Span, parts: Sequence[Span], value: Any) -> set[tuple[int, Span]]:
    if not isinstance(value, list):
        raise CalibrationError("it has no list of `char_links`", hint=HINT)
    found = {}
    for i, link in enumerate(value):
        if not isinstance(link, list) or len(link) != 2 or any(type(x) is not int for x in link):
            raise CalibrationError(f"char_links[{i}] is not [place, 0 or 1]", hint=HINT)
        place, part = link
        if not fusion.start <= place < fusion.end:
            raise CalibrationError(
                f"char_links[{i}]: {place} is no place in the fusion word", hint=HINT
            )
        if part not in (0, 1):
            raise CalibrationError(
                f"char_links[{i}]: unknown label {part}: a character stands for separation word 0 or 1",
                hint=HINT,
            )
        found[place] = parts[part]
    if len(found) != fusion.end - fusion.start or len(value) != len(found):
        raise CalibrationError(
            "`char_links` has not one entry for each character of the fusion word", hint=HINT
        )
    return set(found.items())


def _again(text: str, words: Mapping[str, Span], value: Any) -> dict[Span, Span]:
    """Further places of words, but for those that lie over a place that is taken: tags say one thing of a character."""
    if not isinstance(value, Mapping):
        raise CalibrationError("`extra` is no mapping of places", hint=HINT)
    for name in value:
        if name not in WORDS:
            raise CalibrationError(
                f"extra: {unknown('label', str(name), WORDS)}", hint=", ".join(WORDS)
            )
    taken = set().union(*(range(*span) for span in words.values()))
    found: dict[Span, Span] = {}
    for name, named in words.items():
        listed = value.get(name, [])
        if not isinstance(listed, list) or any(not isinstance(ends, list) for ends in listed):
            raise CalibrationError(f"extra.{name} is no list of places", hint=HINT)
        for i, ends in enumerate(listed):
            span = _span(text, ends, f"extra.{name}[{i}]")
            if text[span.start : span.end] != text[named.start : named.end]:
                raise CalibrationError(
                    f"extra.{name}[{i}]: another word stands at {list(span)}", hint=HINT
                )
            if not taken & set(range(*span)):
                taken |= set(range(*span))
                found[span] = named
    return found
