"""Tasks as questions to a language model, every answer one word of a few.

    the five of tasks.py     in words: good or bad, one of seven emotions, a number from 0 to 5
    diaasq                   what an utterance says of a thing: good, bad or neither           weighted F1
    story cloze              which of two sentences goes on with a story                       accuracy
    larger number, key lookup, counting, alphabet                        generated             accuracy

Training answers of diaasq were carried over from Chinese by a program, and test answers are people's. Tasks whose files
are missing are left out; generated ones are always there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tasks as told_of

WORDS = {
    "sst2": ("bad", "good"),
    "meld sentiment": ("negative", "neutral", "positive"),
    "meld emotion": ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"),
    "emorynlp": ("joyful", "mad", "neutral", "peaceful", "powerful", "sad", "scared"),
    "stsb": ("0", "1", "2", "3", "4", "5"),
}
PLACES = ("first", "second")
COUNT = 600
"""Questions of a generated task; the last quarter tests."""
THINGS = (
    "cat", "dog", "bird", "fish", "horse", "mouse", "apple", "pear", "plum", "lemon", "table", "chair", "river",
    "cloud", "stone", "wheel", "house", "tree", "boat", "road", "shoe", "glass", "king", "queen", "watch", "violin",
)  # fmt: skip
BOXES = ("box", "bag", "jar", "cup")
NUMBERS = ("one", "two", "three", "four")
Draw = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class Asked(told_of.Task):
    """A task whose classes have words."""

    words: tuple[str, ...]


def load(data: Path | None) -> list[Asked]:
    """Those tasks whose files are there, and those that are generated."""
    found = list(_of_files(data)) if data is not None else []
    makers: tuple[tuple[str, tuple[str, ...], Callable[[Draw], tuple[str, int]]], ...] = (
        ("larger number", PLACES, _larger),
        ("key lookup", BOXES, _lookup),
        ("counting", NUMBERS, _count),
        ("alphabet", PLACES, _alphabet),
    )
    for number, (name, words, make) in enumerate(makers):
        draw = np.random.default_rng([41, number])
        rows = dict(make(draw) for _ in range(COUNT))
        found.append(_task(name, words, [(text, float(k)) for text, k in rows.items()]))
    return found


def _of_files(data: Path) -> Iterator[Asked]:
    for task in told_of.load(data):
        yield Asked(
            name=task.name, classes=task.classes, train=task.train, test=task.test, measure=task.measure,
            words=WORDS[task.name],
        )  # fmt: skip
    silver, gold = (
        data / "diaasq" / name for name in ("en_reconstructed/train.silver.json", "en/valid.json")
    )
    if silver.is_file() and gold.is_file():
        yield Asked(
            name="diaasq", classes=3, train=_opinions(silver), test=_opinions(gold),
            words=("bad", "neither", "good"),
        )  # fmt: skip
    stories = data / "tinystories" / "train_head.txt"
    if stories.is_file():
        yield _task("story cloze", PLACES, _endings(stories.read_text(encoding="utf-8")))


def _task(name: str, words: tuple[str, ...], rows: list[told_of.Row]) -> Asked:
    cut = len(rows) * 3 // 4
    return Asked(
        name=name, classes=len(words), train=tuple(rows[:cut]), test=tuple(rows[cut:]), measure="accuracy",
        words=words,
    )  # fmt: skip


def _opinions(file: Path) -> tuple[told_of.Row, ...]:
    """Utterances with the thing that they have an opinion of; all kinds but good and bad are one."""
    rows = []
    for dialogue in json.loads(file.read_text(encoding="utf-8")):
        starts = np.cumsum([0, *(len(text.split()) for text in dialogue["sentences"])])
        for *offsets, kind, thing, aspect, opinion in dialogue["triplets"]:
            if not opinion or not (thing or aspect):
                continue
            place = int(np.searchsorted(starts, offsets[4], side="right")) - 1
            text = dialogue["sentences"][place]
            label = {"neg": 0.0, "pos": 2.0}.get(kind, 1.0)
            rows.append((f"opinion of {' '.join(filter(None, (thing, aspect)))}: {text}", label))
    return tuple(dict(rows).items())


def _endings(text: str) -> list[told_of.Row]:
    """Two sentences of each paragraph, and the next beside one of another paragraph."""
    found = (re.findall(r"[A-Z][^.!?]*[.!?]", part) for part in text.split("\n\n"))
    stories = [sentences for sentences in found if len(sentences) >= 3]
    draw, rows = np.random.default_rng(43), []
    for place, story in enumerate(stories):
        other = stories[(place + int(draw.integers(1, len(stories)))) % len(stories)]
        ends, first = [story[2].strip(), other[-1].strip()], int(draw.integers(2))
        if first:
            ends.reverse()
        told = f"{story[0].strip()} {story[1].strip()}"
        rows.append((f"which goes on: {told} First: {ends[0]} Second: {ends[1]}", float(first)))
    return rows


def _larger(draw: Draw) -> tuple[str, int]:
    a, b = (int(n) for n in draw.choice(np.arange(10, 100), 2, replace=False))
    return f"Which number is larger, the first, {a}, or the second, {b}?", int(b > a)


def _lookup(draw: Draw) -> tuple[str, int]:
    things = draw.choice(THINGS, 3, replace=False)
    boxes = draw.choice(len(BOXES), 3, replace=False)
    told = ", ".join(
        f"the {t} is in the {BOXES[int(b)]}" for t, b in zip(things, boxes, strict=True)
    )
    asked = int(draw.integers(3))
    return f"{told}. Where is the {things[asked]}?", int(boxes[asked])


def _count(draw: Draw) -> tuple[str, int]:
    word, *others = (str(w) for w in draw.choice(THINGS, 4, replace=False))
    times = int(draw.integers(1, 5))
    row = draw.permutation([word] * times + others[: int(draw.integers(1, 4))])
    return f"How often is {word} in: {' '.join(row)}?", times - 1


def _alphabet(draw: Draw) -> tuple[str, int]:
    a, b = (str(w) for w in draw.choice(THINGS, 2, replace=False))
    return f"Which word is earlier in the alphabet, the first, {a}, or the second, {b}?", int(b < a)


def tokens(processor: Any, words: tuple[str, ...]) -> list[int]:
    """The token that each word begins with behind a question; those of A, B, … where two words begin alike."""
    letters = [chr(ord("A") + i) for i in range(len(words))]
    for names in ([f" {word}" for word in words], words, letters):
        asked, *answered = processor.token_ids([MARK, *(f"{MARK}{name}" for name in names)])
        found = [ids[len(asked)] for ids in answered]
        if len(set(found)) == len(found):
            return found
    raise ValueError(f"the tokenizer tells {', '.join(words)} not apart by their first tokens")


MARK = "\nAnswer:"
