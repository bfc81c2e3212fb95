"""Four short-answer tasks made of a held-out text: which of four is the right one?

    next line     a line that follows three others, among lines from elsewhere
    last word     the word that ends a line, among words that end others
    order         a line as it was written, among three with two neighbouring words exchanged
    spelling      a line as it was written, among three with two letters of a word exchanged

A model answers by the mean log-probability per token that it gives to each (the choice alone where there is a context).
Chance is 0.25. Questions are drawn by a seed, so that every model gets the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CHOICES = 4
Run = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What stands in front, and what may follow; the first choice is the right one."""

    context: str
    choices: tuple[str, ...]


def questions(text: str, count: int, seed: int = 0) -> dict[str, list[Question]]:
    """So many questions of each task about a text."""
    draw = np.random.default_rng([23, seed])
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if len(line.split()) >= 5]
    return {
        "next line": [_next_line(lines, draw) for _ in range(count)],
        "last word": [_last_word(lines, draw) for _ in range(count)],
        "order": [_changed(lines, draw, _exchanged_words) for _ in range(count)],
        "spelling": [_changed(lines, draw, _exchanged_letters) for _ in range(count)],
    }


def _next_line(lines: Sequence[str], draw: np.random.Generator) -> Question:
    place = int(draw.integers(3, len(lines)))
    others = [lines[int(i)] for i in draw.integers(0, len(lines), CHOICES - 1)]
    context = "\n".join(lines[place - 3 : place]) + "\n"
    return Question(context=context, choices=(lines[place], *others))


def _last_word(lines: Sequence[str], draw: np.random.Generator) -> Question:
    front, _, word = lines[int(draw.integers(len(lines)))].rpartition(" ")
    found = [word]
    while len(found) < CHOICES:
        other = lines[int(draw.integers(len(lines)))].rpartition(" ")[2]
        if other not in found:
            found.append(other)
    return Question(context=front, choices=tuple(f" {word}" for word in found))


Change = Callable[[str, np.random.Generator], str]


def _changed(lines: Sequence[str], draw: np.random.Generator, change: Change) -> Question:
    line = lines[int(draw.integers(len(lines)))]
    found = [line]
    for _ in range(100):
        if (other := change(line, draw)) not in found:
            found.append(other)
        if len(found) == CHOICES:
            return Question(context="", choices=tuple(found))
    return _changed(lines, draw, change)


def _exchanged_words(line: str, draw: np.random.Generator) -> str:
    words = line.split()
    at = int(draw.integers(len(words) - 1))
    words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def _exchanged_letters(line: str, draw: np.random.Generator) -> str:
    at = int(draw.integers(len(line) - 1))
    pair = line[at : at + 2]
    return line[:at] + pair[::-1] + line[at + 2 :] if pair.isalpha() else line


def right(run: Run, processor: Any, asked: Sequence[Question]) -> list[bool]:
    """Whether each question is answered right, by a model's `run(inputs)` with logits [batch, length, vocabulary]."""
    return [_best(run, processor, question) == 0 for question in asked]


def _best(run: Run, processor: Any, question: Question) -> int:
    begin = [] if processor.bos_id is None else [processor.bos_id]

    def ids(text: str) -> list[int]:
        return list(processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [begin + ids(question.context + choice) for choice in question.choices]
    known = len(begin + ids(question.context))
    scores = np.asarray(run(processor.pad(rows))["logits"], np.float64)
    top = scores.max(-1, keepdims=True)
    logs = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    means = []
    for row, log in zip(rows, logs, strict=True):
        first = max(1, min(known, len(row) - 1))
        places = np.arange(first, len(row))
        means.append(log[places - 1, np.array(row)[places]].mean())
    return int(np.argmax(means))
