"""How many emotions of utterances are right: F1 of each class, weighted by how often it is there.

    weighted F1 = Σ_c (n_c / n) · F1_c        F1_c = 2 · right_c ÷ (said_c + n_c)

over all utterances, the neutral ones included. `macro` is the plain mean over classes that are there or are said: it
shows the rare ones, which the weights hide. `accuracy` is the share of utterances. (Poria et al., 2019.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Json = dict[str, Any]
PARTS = ("macro", "accuracy")


def table(wanted: Sequence[Sequence[int]], said: Sequence[Sequence[int]], classes: int) -> Array:
    """Utterances [conversations, classes, classes] by what they are and what was said of them."""
    found = np.zeros((len(wanted), classes, classes))
    for i, (right, given) in enumerate(zip(wanted, said, strict=True)):
        np.add.at(found[i], (np.asarray(right), np.asarray(given)), 1)
    return found


def value(counted: Array, part: str | None = None) -> float:
    """Weighted F1 of counts [classes, classes], or one of `PARTS`; 0 where there are no utterances."""
    there, said, right = counted.sum(1), counted.sum(0), np.diagonal(counted)
    if not there.sum():
        return 0.0
    if part == "accuracy":
        return float(right.sum() / there.sum())
    both = there + said
    f1 = 2 * right / np.maximum(both, 1)
    if part == "macro":
        return float(f1[both > 0].mean())
    return float((there * f1).sum() / there.sum())


def scores(counted: Array, names: Sequence[str]) -> Json:
    """All scores, and precision, recall, F1 and how many are there of every class."""
    there, said, right = counted.sum(1), counted.sum(0), np.diagonal(counted)
    return {
        "weighted": value(counted), **{part: value(counted, part) for part in PARTS},
        "classes": {
            name: {
                "precision": float(right[c] / said[c]) if said[c] else 0.0,
                "recall": float(right[c] / there[c]) if there[c] else 0.0,
                "f1": float(2 * right[c] / max(1, there[c] + said[c])), "there": int(there[c]),
            }
            for c, name in enumerate(names)
        },
    }  # fmt: skip
