"""Conversations with an emotion for every utterance, as the MELD and EmoryNLP files hold them.

    MELD            CSV: Utterance, Speaker, Emotion, Dialogue_ID          (Poria et al., ACL 2019)
    EmoryNLP        CSV: Utterance, Speaker, Emotion, Scene_ID, Season, Episode; a speaker is a list in brackets
    EmoryNLP v1     JSON: episodes of scenes of utterances: speakers, transcript, emotion       (Zahiri and Choi, 2018)

Which it is shows in the file itself. Rows of one dialogue stand behind each other; context never goes from one to the
next. Where nothing is trained or scored the emotion may be missing, and for whoever speaks there may be no name. Every
error names the file and the line.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

from effc.errors import CalibrationError
from effc.table import unknown
from effc.zoo import reading

HINT = "the formats are described in docs/recipes.md"
EMOTIONS = {
    "meld": ("neutral", "surprise", "fear", "sadness", "joy", "anger", "disgust"),
    "emorynlp": ("joyful", "mad", "peaceful", "neutral", "sad", "powerful", "scared"),
}
"""The emotions that each corpus tells apart, in the order of the model's classes."""
KEYS = (("Dialogue_ID",), ("Season", "Episode", "Scene_ID"))
"""Columns that say which dialogue a row is of, the first of these that a file has."""
LONG = 5
"""Words of an utterance that is told by its words; shorter ones are said everywhere."""


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """What somebody says: `speakers` as the file names them, an emotion's place among those of the corpus, the line."""

    text: str
    speakers: tuple[str, ...]
    emotion: int | None = None
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Utterances in their order."""

    name: str
    utterances: tuple[Utterance, ...]

    def is_known(self) -> bool:
        """Whether the emotion of every utterance is known."""
        return all(u.emotion is not None for u in self.utterances)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """An utterance as it stands in a file, with its line and what tells its dialogue from others."""

    line: int
    dialogue: tuple[str, ...]
    text: str
    speakers: tuple[str, ...]
    emotion: str


def read(
    file: Path, emotions: Sequence[str] | None = None, *, labelled: bool = True
) -> list[Conversation]:
    """The conversations of a file. Raises CalibrationError, with file and line, for what is none.

    With `labelled` every utterance has one of the `emotions`; else they are read where they are there. Where no
    emotions are asked for, none is read.
    """
    text = reading.text(file)
    is_json = text.lstrip()[:1] in ("{", "[")
    found = [
        _conversation(file, name, list(rows), emotions, labelled)
        for name, rows in groupby(
            (_of_json if is_json else _of_csv)(file, text), key=lambda row: row.dialogue
        )
    ]
    if not found:
        raise CalibrationError(f"{file} holds no utterances", hint=HINT)
    return found


def apart(found: Iterable[Conversation], others: Iterable[Conversation]) -> list[Conversation]:
    """Those that share less than two utterances of `LONG` words or more with every one of the others.

    Two corpora of one series hold some scenes both; words that a model is judged on must not be those it learnt on.
    """
    told = [_told(other) for other in others]
    return [c for c in found if not any(len(_told(c) & other) > 1 for other in told)]


def _told(conversation: Conversation) -> frozenset[tuple[str, ...]]:
    """The longer utterances, as words without marks."""
    words = (
        tuple("".join(c if c.isalnum() else " " for c in u.text.lower()).split())
        for u in conversation.utterances
    )
    return frozenset(w for w in words if len(w) >= LONG)


def _conversation(
    file: Path,
    name: tuple[str, ...],
    rows: list[_Row],
    emotions: Sequence[str] | None,
    labelled: bool,
) -> Conversation:
    return Conversation(
        name="-".join(name),
        utterances=tuple(
            Utterance(
                text=row.text, speakers=row.speakers, line=row.line,
                emotion=None if emotions is None else _emotion(file, row, emotions, labelled),
            )
            for row in rows
        ),
    )  # fmt: skip


def _emotion(file: Path, row: _Row, emotions: Sequence[str], labelled: bool) -> int | None:
    word = row.emotion.strip().lower()
    if not word and not labelled:
        return None
    if word not in emotions:
        what = unknown("emotion", row.emotion, emotions) if word else "it has no emotion"
        raise CalibrationError(
            f"{file} line {row.line}: {what}",
            hint="the source's option `emotions` says whose they are: " + ", ".join(EMOTIONS),
        )
    return list(emotions).index(word)


def _of_csv(file: Path, text: str) -> Iterator[_Row]:
    """Rows of a CSV file. Dialogue numbers may come again later: what stands apart is another dialogue."""
    reader = csv.DictReader(StringIO(text, newline=""), strict=True)
    try:
        columns = [name or "" for name in reader.fieldnames or ()]
        key = next((key for key in KEYS if set(key) <= set(columns)), None)
        lacks = next((n for n in ("Utterance", "Speaker") if n not in columns), None)
        if lacks is not None or key is None:
            raise CalibrationError(
                f"{file} line 1 has no column {lacks or KEYS[0][0]!r}",
                hint=HINT + "; its columns are " + (", ".join(columns[:12]) or "none"),
            )
        for row in reader:
            line = reader.line_num
            if None in row or None in row.values():
                raise CalibrationError(
                    f"{file} line {line} has not as many fields as the head of the file", hint=HINT
                )
            yield _Row(
                line=line, dialogue=tuple(row[name] for name in key),
                text=_said(file, line, row["Utterance"]), speakers=_names(file, line, row["Speaker"]),
                emotion=row.get("Emotion") or "",
            )  # fmt: skip
    except csv.Error as error:
        raise CalibrationError(
            f"{file} line {reader.line_num} is no CSV: {error}", hint=HINT
        ) from error


def _said(file: Path, line: int, text: str) -> str:
    words = " ".join(text.split())
    if not words:
        raise CalibrationError(f"{file} line {line} has an empty utterance", hint=HINT)
    return words


def _names(file: Path, line: int, text: str) -> tuple[str, ...]:
    """Who speaks: a name, or names as a list in brackets."""
    text = text.strip()
    if not text.startswith("["):
        return (text,) if text else ()
    try:
        found = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or any(not isinstance(name, str) for name in found):
        raise CalibrationError(
            f"{file} line {line}: {text[:40]!r} is no list of speakers", hint="['Monica Geller']"
        )
    return tuple(found)


def _of_json(file: Path, text: str) -> Iterator[_Row]:
    """Utterances of a file of episodes; the line is the one on which an utterance begins to say its own name."""
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise reading.no_json(file, error) from error
    place = 0
    for episode in _list(file, whole, "episodes", 1):
        for scene in _list(file, episode, "scenes", 1):
            name = str(scene.get("scene_id", "")) if isinstance(scene, Mapping) else ""
            for value in _list(file, scene, "utterances", 1):
                own = (
                    json.dumps(value.get("utterance_id", "")) if isinstance(value, Mapping) else ""
                )
                place = max(place, text.find(own, place)) if own not in ("", '""') else place
                line = text.count("\n", 0, place) + 1
                yield _of_value(file, line, name, value)


def _of_value(file: Path, line: int, name: str, value: Any) -> _Row:
    if not isinstance(value, Mapping) or not isinstance(value.get("transcript"), str):
        raise CalibrationError(
            f"{file} line {line}: an utterance of scene {name} has no `transcript`", hint=HINT
        )
    speakers, emotion = value.get("speakers", []), value.get("emotion", "")
    if not isinstance(speakers, list) or any(not isinstance(each, str) for each in speakers):
        raise CalibrationError(f"{file} line {line}: `speakers` is no list of names", hint=HINT)
    if not isinstance(emotion, str):
        raise CalibrationError(f"{file} line {line}: `emotion` is no word", hint=HINT)
    return _Row(
        line=line, dialogue=(name,), text=_said(file, line, value["transcript"]),
        speakers=tuple(speakers), emotion=emotion,
    )  # fmt: skip


def _list(file: Path, value: Any, name: str, line: int) -> list[Any]:
    found = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(found, list):
        raise CalibrationError(f"{file} line {line}: it has no list of `{name}`", hint=HINT)
    return found
