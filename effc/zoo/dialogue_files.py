"""Dialogues with quadruples of target, aspect, opinion and polarity, as the DiaASQ files hold them (Li et al., 2023).

A file is a JSON list of dialogues:

    doc_id      a word
    sentences   an utterance each, its tokens between blanks
    replies     the utterance that each answers, −1 for the first; every other answers the first or the one before it
    speakers    a number for each
    triplets    [target start, end, aspect start, end, opinion start, end, polarity, and their three texts]
    targets, aspects, opinions      [start, end, text], of an opinion its polarity too

Offsets count tokens over the whole dialogue, ends exclusive, −1 for what is not there. The utterances between two
answers to the first are a thread: one block. What a file of texts alone lacks is not asked for where nothing is
scored. Every error names the file and the line on which the dialogue begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from effc import bounded
from effc.errors import CalibrationError
from effc.table import unknown
from effc.zoo import reading

POLARITIES = ("pos", "neg", "other")
FOLDED = {"pos": "pos", "neg": "neg", "other": "other", "neu": "other", "doubt": "other", "amb": "other"}  # fmt: skip
"""What a file may call a polarity, and what it counts as."""
SPACE = " \t\r\n"
HINT = "the format is described in docs/recipes.md"


class Span(NamedTuple):
    """Tokens from `start` to before `end`, over the whole dialogue."""

    start: int
    end: int


class Quad(NamedTuple):
    """A target, one of its aspects, and what is thought of that."""

    target: Span
    aspect: Span
    opinion: Span
    polarity: str


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is in a dialogue: mentions of the three kinds, related pairs of them, and whole quadruples."""

    targets: frozenset[Span] = frozenset()
    aspects: frozenset[Span] = frozenset()
    opinions: frozenset[Span] = frozenset()
    target_aspect: frozenset[tuple[Span, Span]] = frozenset()
    target_opinion: frozenset[tuple[Span, Span]] = frozenset()
    aspect_opinion: frozenset[tuple[Span, Span]] = frozenset()
    quads: frozenset[Quad] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Dialogue:
    """Utterances as tokens, whom each answers, and who speaks; `truth` where the file has it, and the line it is on."""

    name: str
    utterances: tuple[tuple[str, ...], ...]
    replies: tuple[int, ...]
    speakers: tuple[int, ...]
    truth: Truth | None = None
    line: int = field(default=0, compare=False)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each utterance begins, and where the last ends."""
        return tuple(accumulate((len(u) for u in self.utterances), initial=0))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Steps from each utterance to the first."""
        found: list[int] = []
        for parent in self.replies:
            found.append(0 if parent < 0 else found[parent] + 1)
        return tuple(found)

    @cached_property
    def threads(self) -> tuple[int, ...]:
        """The thread of each utterance, from 1; 0 for the first utterance."""
        return tuple(accumulate(1 if parent == 0 else 0 for parent in self.replies))

    def utterance_of(self, span: Span) -> int:
        """The utterance that a span begins in."""
        return next(i for i, end in enumerate(self.starts[1:]) if span.start < end)

    def distance(self, spans: Sequence[Span]) -> int:
        """The most answers that lie between two of the spans, along the tree."""
        places = [self.utterance_of(span) for span in spans]
        return max(self._apart(a, b) for a in places for b in places)

    def _apart(self, a: int, b: int) -> int:
        if 0 not in (self.threads[a], self.threads[b]) and self.threads[a] != self.threads[b]:
            return self.depths[a] + self.depths[b]
        return abs(self.depths[a] - self.depths[b])

    def text(self, span: Span) -> str:
        tokens = [token for utterance in self.utterances for token in utterance]
        return " ".join(tokens[span.start : span.end])


def read(file: Path, *, labelled: bool = True) -> list[Dialogue]:
    """The dialogues of a file. Raises CalibrationError, with file and line, for what is none.

    With `labelled` every dialogue has its triplets and mentions; else they are read where they are there.
    """
    found = []
    for line, value in items(file):
        try:
            found.append(replace(_dialogue(value, labelled), line=line))
        except CalibrationError as error:
            name = value.get("doc_id") if isinstance(value, Mapping) else None
            raise CalibrationError(
                f"{file} line {line}, dialogue {len(found)}{f' ({name})' if name else ''}: {error.what}",
                hint=error.hint or HINT,
            ) from error
    if not found:
        raise CalibrationError(f"{file} holds no dialogues", hint="give a JSON list of one or more")
    return found


def items(file: Path, most_bytes: int = reading.MOST_BYTES) -> Iterator[tuple[int, Any]]:
    """The members of the JSON list that a file is, or the one value, each with the line on which it begins."""
    text = reading.text(file, most_bytes)
    decoder = json.JSONDecoder()
    place, line, counted = _next(text, 0), 1, 0
    if place == len(text):
        raise CalibrationError(f"{file} is empty", hint="give a JSON list of one or more")
    is_list = text[place] == "["
    place = _next(text, place + 1) if is_list else place
    while place < len(text) and not (is_list and text[place] == "]"):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise reading.no_json(file, error, line=line) from error
        yield line, value
        place = _next(text, place)
        if not is_list:
            break
        if text[place : place + 1] == ",":
            place = _next(text, place + 1)
        elif text[place : place + 1] != "]":
            raise _broken(file, text, place, "a `,` or the closing `]` is missing")
    if (is_list and _next(text, place + 1) < len(text)) or (not is_list and place < len(text)):
        raise _broken(file, text, place, "there is more behind the end")
    if is_list and place >= len(text):
        raise _broken(file, text, place, "the closing `]` is missing: it is cut short")


def _broken(file: Path, text: str, place: int, why: str) -> CalibrationError:
    line = text.count("\n", 0, place) + 1
    return CalibrationError(f"{file} line {line} is no JSON: {why}", hint=bounded.HINT)


def _next(text: str, place: int) -> int:
    while place < len(text) and text[place] in SPACE:
        place += 1
    return place


def _dialogue(value: Any, labelled: bool) -> Dialogue:
    if not isinstance(value, Mapping):
        raise CalibrationError(f"it is a {type(value).__name__}, not a dialogue", hint=HINT)
    sentences = _field(value, "sentences", str)
    if not sentences:
        raise CalibrationError("it has no utterances", hint=HINT)
    utterances = tuple(tuple(sentence.split()) for sentence in sentences)
    for i, tokens in enumerate(utterances):
        if not tokens:
            raise CalibrationError(f"sentences[{i}] is empty", hint=HINT)
    made = Dialogue(
        name=str(value.get("doc_id", "")), utterances=utterances,
        replies=_replies(_field(value, "replies", int, len(sentences))),
        speakers=tuple(_field(value, "speakers", int, len(sentences))),
    )  # fmt: skip
    if not labelled and "triplets" not in value:
        return made
    return Dialogue(
        name=made.name, utterances=made.utterances, replies=made.replies, speakers=made.speakers,
        truth=_truth(made, value),
    )  # fmt: skip


def _field(value: Mapping[str, Any], name: str, kind: type, count: int | None = None) -> list[Any]:
    """A list of so many strings, numbers or lists. Raises CalibrationError where it is another thing."""
    if name not in value:
        raise CalibrationError(f"it has no `{name}`", hint=HINT)
    found = value[name]
    if not isinstance(found, list) or any(type(x) is not kind for x in found):
        raise CalibrationError(f"`{name}` is no list of {kind.__name__}", hint=HINT)
    if count is not None and len(found) != count:
        raise CalibrationError(
            f"`{name}` has {len(found)} entries for {count} utterances", hint=HINT
        )
    return found


def _replies(found: list[int]) -> tuple[int, ...]:
    for i, parent in enumerate(found):
        if i == 0 and parent != -1:
            raise CalibrationError(
                f"replies[0] is {parent}, and the first answers nobody: −1", hint=HINT
            )
        if i > 0 and parent not in (0, i - 1):
            raise CalibrationError(
                f"the reply tree is broken: replies[{i}] is {parent}, and an utterance answers 0 or "
                f"the one before it ({i - 1})",
                hint="put the utterances of a thread behind each other",
            )
    return tuple(found)


def _truth(dialogue: Dialogue, value: Mapping[str, Any]) -> Truth:
    pairs: dict[str, set[tuple[Span, Span]]] = {"ta": set(), "to": set(), "ao": set()}
    quads = set()
    for i, row in enumerate(_field(value, "triplets", list)):
        place = f"triplets[{i}]"
        if len(row) < 7:
            raise CalibrationError(f"{place} has {len(row)} entries, not 7 or more", hint=HINT)
        target, aspect, opinion = (_span(dialogue, row[j : j + 2], place) for j in (0, 2, 4))
        if target and aspect:
            pairs["ta"].add((target, aspect))
        if target and opinion:
            pairs["to"].add((target, opinion))
        if aspect and opinion:
            pairs["ao"].add((aspect, opinion))
        polarity = _polarity(row[6], place) if opinion else ""
        if target and aspect and opinion:
            quads.add(Quad(target, aspect, opinion, polarity))
    mentions = {
        name: _mentions(dialogue, value, name) for name in ("targets", "aspects", "opinions")
    }
    return Truth(
        **mentions, target_aspect=frozenset(pairs["ta"]), target_opinion=frozenset(pairs["to"]),
        aspect_opinion=frozenset(pairs["ao"]), quads=frozenset(quads),
    )  # fmt: skip


def _mentions(dialogue: Dialogue, value: Mapping[str, Any], name: str) -> frozenset[Span]:
    found = set()
    for i, row in enumerate(_field(value, name, list)):
        span = _span(dialogue, row[:2], f"{name}[{i}]")
        if span is None:
            raise CalibrationError(f"{name}[{i}] has no place", hint=HINT)
        found.add(span)
    return frozenset(found)


def _span(dialogue: Dialogue, ends: Sequence[Any], place: str) -> Span | None:
    """A span inside one utterance; None for −1."""
    if len(ends) != 2 or any(type(end) is not int for end in ends):
        raise CalibrationError(f"{place}: {list(ends)} are no two offsets", hint=HINT)
    if tuple(ends) == (-1, -1):
        return None
    span = Span(*ends)
    if not 0 <= span.start < span.end <= dialogue.starts[-1]:
        raise CalibrationError(
            f"{place}: {list(ends)} lies outside of the dialogue, which has {dialogue.starts[-1]} tokens",
            hint=HINT,
        )
    if span.end > dialogue.starts[dialogue.utterance_of(span) + 1]:
        raise CalibrationError(
            f"{place}: {list(ends)} goes over the end of an utterance", hint=HINT
        )
    return span


def _polarity(word: Any, place: str) -> str:
    if word not in FOLDED:
        raise CalibrationError(f"{place}: {unknown('polarity', str(word), FOLDED)}")
    return FOLDED[word]
