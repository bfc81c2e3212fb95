"""How much of the lexical fusions of paragraphs is found: precision, recall and F1 over all of them (micro).

    F1 = 2 · found ÷ (said + there)

    pairs           a fusion word and one of its separation words, all four ends exact: the first score
    tuples          a fusion word and all of its separation words
    mentions        fusion words and separation words, each with ends and kind exact; fusions, separations alone
    characters      a character of a fusion word and the separation word that it stands for

A word that is there several times counts at each place as a mention; in pairs, tuples and characters any of its places
is right, and several count once. What characters stand for was not annotated in the published files but inferred,
mostly from characters in common: a model can learn more about that rule than about the language.

`alarms` are of paragraphs without a fusion: how many there are, in how many of them a fusion word is said, and in how
many a whole fusion (a tuple). Every paragraph goes into one of `ERRORS`, the first that fits. The paper's own
definitions were not at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from effc.zoo import dialogue_scores
from effc.zoo.fusion_files import Span, Truth

Array = np.ndarray[Any, np.dtype[Any]]
Json = dict[str, Any]
SCORES = ("pairs", "tuples", "mentions", "fusions", "separations", "characters")
ERRORS = {
    "right": "all of it is found and nothing else is said",
    "fusion missed": "no fusion word is said where there is one",
    "fusion border": "it is said with other ends",
    "separation missed": "no separation word is said where there is one",
    "separation border": "it is said with other ends",
    "link missed": "the words are found, and a link between them is not",
    "link too many": "all links are found, and more are said",
    "mention too many": "all is found, and further words are said",
    "quiet": "nothing is there, and no fusion word is said",
    "false alarm": "nothing is there, and a fusion word is said",
}


def counts(truth: Truth, said: Truth) -> dict[str, tuple[int, ...]]:
    """Found, said and there, by score, of one paragraph; `alarms` and `errors` beside them."""
    there, given = _sets(truth, truth), _sets(said, truth)
    found = {
        name: (len(there[name] & given[name]), len(given[name]), len(there[name]))
        for name in SCORES
    }
    is_empty = not truth.fusions
    alarms = (int(is_empty), int(is_empty and bool(said.fusions)), int(is_empty and bool(said.tuples)))  # fmt: skip
    kind = verdict(truth, said)
    return {**found, "alarms": alarms, "errors": tuple(int(kind == name) for name in ERRORS)}


def verdict(truth: Truth, said: Truth) -> str:
    """Which of `ERRORS` fits first."""
    if not truth.fusions:
        return "false alarm" if said.fusions else "quiet"
    if word := _lacks(truth, said, {f for f, _ in truth.pairs}, said.fusions):
        return f"fusion {word}"
    if word := _lacks(truth, said, {s for _, s in truth.pairs}, said.separations):
        return f"separation {word}"
    there, given = _sets(truth, truth), _sets(said, truth)
    if there["pairs"] - given["pairs"]:
        return "link missed"
    if given["pairs"] - there["pairs"]:
        return "link too many"
    return "mention too many" if given["mentions"] - there["mentions"] else "right"


def _lacks(truth: Truth, said: Truth, named: set[Span], given: Iterable[Span]) -> str | None:
    """How the first word that is not found is missed: at each of its places."""
    given = set(given)
    for word in sorted(named):
        places = truth.places(word)
        if given.isdisjoint(places):
            near = any(a.start < b.end and b.start < a.end for a in given for b in places)
            return "border" if near else "missed"
    return None


def _sets(said: Truth, truth: Truth) -> dict[str, frozenset[Any]]:
    """What is said, by score; words at further places of the truth as at the one that it names."""
    named = truth.again

    def of(span: Span) -> Span:
        return named.get(span, span)

    def place(character: int) -> int:
        at = next((s for s in named if s.start <= character < s.end), None)
        return character if at is None else named[at].start + character - at.start

    return {
        "pairs": frozenset((of(f), of(s)) for f, s in said.pairs),
        "tuples": Truth(pairs=frozenset((of(f), of(s)) for f, s in said.pairs)).tuples,
        "mentions": frozenset(
            [*(("fusion", f) for f in said.fusions), *(("separation", s) for s in said.separations)]
        ),
        "fusions": said.fusions,
        "separations": said.separations,
        "characters": frozenset((place(c), of(s)) for c, s in said.characters),
    }


def table(rows: Sequence[Mapping[str, tuple[int, ...]]]) -> dict[str, Array]:
    """Counts of paragraphs as columns [paragraphs, counts]."""
    names = (*SCORES, "alarms", "errors")
    return {name: np.array([row[name] for row in rows], np.float64) for name in names}


def scores(columns: Mapping[str, Array]) -> Json:
    """Precision, recall, F1 and how many are there by score, false alarms, and the table of errors."""
    made: Json = dict(dialogue_scores.scores(columns, SCORES))
    empty, alarms, whole = (int(x) for x in np.asarray(columns["alarms"]).sum(axis=0))
    made["alarms"] = {
        "without": empty, "said": alarms, "share": alarms / empty if empty else None,
        "whole": whole, "share_whole": whole / empty if empty else None,
    }  # fmt: skip
    counted = np.asarray(columns["errors"]).sum(axis=0)
    made["errors"] = {name: int(n) for name, n in zip(ERRORS, counted, strict=True)}
    return made
