"""How many quadruples, pairs and mentions of dialogues are found: precision, recall and F1 over all of them (micro).

    F1 = 2 · found ÷ (said + there)

    quads           all three spans and the polarity: the figure that models are compared by
    identified      the three spans alone
    intra, inter    quads whose spans lie in one utterance, and in several; inter_1, inter_2, inter_3 by the most
                    answers between two of them, 3 or more in the last
    targets, aspects, opinions, target_aspect, target_opinion, aspect_opinion       exact spans

What is said twice counts once. (Li et al., 2023; the intervals are those of `effc.metrics`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effc.zoo.dialogue_files import Dialogue, Truth

Array = np.ndarray[Any, np.dtype[Any]]
PARTS = ("targets", "aspects", "opinions", "target_aspect", "target_opinion", "aspect_opinion")
SCORES = ("quads", "identified", "intra", "inter", "inter_1", "inter_2", "inter_3", *PARTS)


def counts(dialogue: Dialogue, said: Truth) -> dict[str, tuple[int, int, int]]:
    """Found, said and there, by score, of one dialogue whose truth is known."""
    there = dialogue.truth or Truth()
    a, b = _sets(dialogue, said), _sets(dialogue, there)
    return {name: (len(a[name] & b[name]), len(a[name]), len(b[name])) for name in SCORES}


def _sets(dialogue: Dialogue, truth: Truth) -> dict[str, frozenset[Any]]:
    found: dict[str, set[Any]] = {name: set() for name in SCORES}
    for quad in truth.quads:
        far = dialogue.distance(quad[:3])
        found["quads"].add(quad)
        found["identified"].add(quad[:3])
        for name in ("inter", f"inter_{min(far, 3)}") if far else ("intra",):
            found[name].add(quad)
    made = {name: frozenset(values) for name, values in found.items()}
    return made | {name: getattr(truth, name) for name in PARTS}


def f1(found: float, said: float, there: float) -> float:
    """0 where there is nothing to find and nothing is said."""
    return 2 * found / (said + there) if said + there else 0.0


def scores(
    columns: Mapping[str, Array], names: Sequence[str] = SCORES
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and how many are there, by score, of counts [dialogues, 3]."""
    made = {}
    for name in names:
        found, said, there = (float(x) for x in np.asarray(columns[name]).sum(axis=0))
        made[name] = {
            "precision": found / said if said else 0.0, "recall": found / there if there else 0.0,
            "f1": f1(found, said, there), "there": there,
        }  # fmt: skip
    return made


def table(rows: list[dict[str, tuple[int, int, int]]]) -> dict[str, Array]:
    """Counts of dialogues as columns [dialogues, 3]."""
    return {name: np.array([row[name] for row in rows], np.float64) for name in SCORES}
