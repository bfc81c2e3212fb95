"""Several tasks on short English texts as one: every task has an instruction in front and classes of its own.

    sst2                sentiment of a sentence from a film review                        accuracy
    meld sentiment      sentiment of a line of dialogue (MELD)                            weighted F1
    meld emotion        its emotion, one of seven                                         weighted F1
    emorynlp            emotion of another series' lines, one of seven others             weighted F1
    stsb                how alike two sentences are, in classes from 0 to 5               Spearman of the mean class

A model gives logits of all classes of all tasks, and is asked about those of one task alone.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Row = tuple[str, float]
"""A text, and the number of its class in the task; for stsb a score."""


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    classes: int
    train: tuple[Row, ...]
    test: tuple[Row, ...]
    measure: str = "weighted f1"

    def score(self, logits: Array, gold: Array) -> float:
        """Of logits [samples, classes of this task] and classes or scores [samples]."""
        if self.measure == "spearman":
            from scipy.stats import spearmanr

            powers = np.exp(logits - logits.max(1, keepdims=True))
            mean = (powers / powers.sum(1, keepdims=True)) @ np.arange(self.classes)
            return float(spearmanr(mean, gold).statistic) if np.ptp(mean) else 0.0
        found = logits.argmax(1)
        if self.measure == "accuracy":
            return float((found == gold).mean())
        return weighted_f1(found, gold.astype(int), self.classes)


def weighted_f1(found: Array, gold: Array, classes: int) -> float:
    """The mean of the classes' F1, each weighed by how many samples are of it."""
    total = 0.0
    for k in range(classes):
        hit, mine, theirs = (
            ((found == k) & (gold == k)).sum(),
            (found == k).sum(),
            (gold == k).sum(),
        )
        total += theirs * (2 * hit / max(mine + theirs, 1))
    return float(total / len(gold))


def load(data: Path) -> list[Task]:
    """Those tasks whose files are there."""
    meld, emory = data / "cer" / "meld", data / "cer" / "emorynlp"
    makers = (
        ("sst2", data / "sst2" / "train.tsv", lambda: _sst2(data / "sst2")),
        ("meld", meld / "train_sent_emo.csv", lambda: _meld(meld)),
        ("emorynlp", emory / "emorynlp_train_final.csv", lambda: _emory(emory)),
        ("stsb", data / "stsb" / "stsb-en-dev.csv", lambda: _stsb(data / "stsb")),
    )
    return [task for _, file, make in makers if file.is_file() for task in make()]


def _sst2(place: Path) -> Iterator[Task]:
    def rows(name: str) -> tuple[Row, ...]:
        lines = (place / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        parts = [line.rsplit("\t", 1) for line in lines if line.strip()]
        return tuple((f"sentiment of a review: {text}", float(label)) for text, label in parts)

    yield Task(name="sst2", classes=2, train=rows("train"), test=rows("test"), measure="accuracy")


def _meld(place: Path) -> Iterator[Task]:
    tables = [_table(place / f"{part}_sent_emo.csv") for part in ("train", "dev")]
    for column, what in (("Sentiment", "sentiment"), ("Emotion", "emotion")):
        train, test, classes = _coded(tables, column, f"{what} of a line")
        yield Task(name=f"meld {what}", classes=classes, train=train, test=test)


def _emory(place: Path) -> Iterator[Task]:
    tables = [_table(place / f"emorynlp_{part}_final.csv") for part in ("train", "dev")]
    train, test, classes = _coded(tables, "Emotion", "feeling in a scene")
    yield Task(name="emorynlp", classes=classes, train=train, test=test)


def _stsb(place: Path) -> Iterator[Task]:
    def rows(name: str) -> tuple[Row, ...]:
        with (place / f"stsb-en-{name}.csv").open(encoding="utf-8", newline="") as file:
            return tuple((f"how alike: {a} [SEP] {b}", float(s)) for a, b, s in csv.reader(file))

    yield Task(name="stsb", classes=6, train=rows("dev"), test=rows("test"), measure="spearman")


def _table(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _coded(
    tables: Sequence[list[dict[str, str]]], column: str, instruction: str
) -> tuple[tuple[Row, ...], tuple[Row, ...], int]:
    """Rows of train and test with numbers for the words of a column, and how many words there are."""
    words = sorted({row[column] for row in tables[0]})
    train, test = (
        tuple((f"{instruction}: {r['Utterance']}", float(words.index(r[column]))) for r in table)
        for table in tables
    )
    return train, test, len(words)
