"""Quadruples as tags in three square tables over the places of a dialogue, and back again (Li et al., 2023).

    entity     [N, N]  0 none, 1 target, 2 aspect, 3 opinion    at (first, last place) of a mention
    relation   [N, N]  0 none, 1 heads, 2 tails              of target → aspect, target → opinion, aspect → opinion
    polarity   [N, N]  0 none, 1 pos, 2 neg, 3 other            at heads and at tails of target and opinion

Two mentions of one piece each have heads and tails in the same cell, where one table of relations can hold but one of
them: the pair is lost. With `split` heads and tails have tables of their own: 0 or 1 each, stacked [N, N, 2].

Nothing here needs torch: it runs beside an engine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.zoo.dialogue_files import POLARITIES, Quad, Span, Truth
from effc.zoo.dialogue_layout import Laid

Array = np.ndarray[Any, np.dtype[Any]]
TARGET, ASPECT, OPINION = 1, 2, 3
HEADS, TAILS = 1, 2
MOST_MENTIONS = 192
"""Mentions of a dialogue that are looked at, in order: a model that knows nothing marks thousands. The data have 60."""


@dataclass(frozen=True, kw_only=True)
class Tags:
    """The three tables of one dialogue."""

    entity: Array
    relation: Array
    polarity: Array

    @property
    def heads(self) -> Array:
        split = self.relation.ndim == 3
        return self.relation[..., 0] > 0 if split else self.relation == HEADS

    @property
    def tails(self) -> Array:
        split = self.relation.ndim == 3
        return self.relation[..., 1] > 0 if split else self.relation == TAILS


def encode(laid: Laid, *, split: bool) -> Tags:
    """The tables of a dialogue whose truth is known."""
    truth, n = laid.dialogue.truth or Truth(), laid.length
    entity = np.zeros((n, n), np.int64)
    both = np.zeros((n, n, 2), np.int64)
    polarity = np.zeros((n, n), np.int64)
    kinds = {TARGET: truth.targets, ASPECT: truth.aspects, OPINION: truth.opinions}
    for kind, spans in kinds.items():
        for ends in filter(None, map(laid.ends, sorted(spans))):
            entity[ends] = kind
    for pairs in (truth.target_aspect, truth.target_opinion, truth.aspect_opinion):
        for left, right in pairs:
            a, b = laid.ends(left), laid.ends(right)
            if a and b:
                both[a[0], b[0], 0] = both[a[1], b[1], 1] = 1
    for quad in sorted(truth.quads):
        a, b = laid.ends(quad.target), laid.ends(quad.opinion)
        if a and b:
            polarity[a[0], b[0]] = polarity[a[1], b[1]] = 1 + POLARITIES.index(quad.polarity)
    one = np.where(both[..., 1] > 0, TAILS, both[..., 0] * HEADS)
    return Tags(entity=entity, relation=both if split else one, polarity=polarity)


def of_logits(outputs: Mapping[str, Array], row: int, laid: Laid) -> Tags:
    """The tables that a model's outputs [batch, N, N, classes] say of one dialogue, cells that mean nothing cleared."""
    n = laid.length
    entity, relation, polarity = (
        np.asarray(outputs[name][row, :n, :n]) for name in ("entity", "relation", "polarity")
    )
    if relation.shape[-1] == 4:
        relation = relation.reshape(n, n, 2, 2)
    return Tags(
        entity=np.where(_may(laid), entity.argmax(-1), 0), relation=relation.argmax(-1), polarity=polarity.argmax(-1)
    )  # fmt: skip


def decode(tags: Tags, laid: Laid, most_mentions: int = MOST_MENTIONS) -> Truth:
    """What tables say is in a dialogue.

    A pair is two mentions whose heads and whose tails are related. Three of them that are pairs all round are a
    quadruple, in the order of their arrows, whatever kinds they were found to be. Pairs count as the kinds of their
    mentions say. Mentions that begin or end on a mark are dropped.
    """
    mentions = _mentions(tags, laid, most_mentions)
    related = _related(tags, list(mentions))
    found: dict[str, set[Any]] = defaultdict(set)
    for ends, (kind, span) in mentions.items():
        found[{TARGET: "targets", ASPECT: "aspects", OPINION: "opinions"}[kind]].add(span)
        for other in related[ends]:
            word = PAIRS.get((kind, mentions[other][0]))
            if word is not None:
                found[word].add((span, mentions[other][1]))
            for last in related[ends] & related[other]:
                target, aspect, opinion = (mentions[each][1] for each in (ends, other, last))
                polarity = _polarity(tags.polarity, ends, last)
                found["quads"].add(Quad(target, aspect, opinion, polarity))
    return Truth(**{name: frozenset(values) for name, values in found.items()})


PAIRS = {
    (TARGET, ASPECT): "target_aspect",
    (TARGET, OPINION): "target_opinion",
    (ASPECT, OPINION): "aspect_opinion",
}
Ends = tuple[int, int]


def _mentions(tags: Tags, laid: Laid, most: int) -> dict[Ends, tuple[int, Span]]:
    """Kind and tokens of every mention, by its first and last place."""
    found: dict[Ends, tuple[int, Span]] = {}
    for first, last in np.argwhere(tags.entity > 0).tolist():
        span = laid.span(first, last)
        if span is not None and len(found) < most:
            found[first, last] = (int(tags.entity[first, last]), span)
    return found


def _related(tags: Tags, mentions: list[Ends]) -> dict[Ends, set[Ends]]:
    """The mentions that each is in relation with, along the arrow."""
    if not mentions:
        return {}
    first, last = np.array(mentions).T
    both = tags.heads[np.ix_(first, first)] & tags.tails[np.ix_(last, last)]
    found: dict[Ends, set[Ends]] = {ends: set() for ends in mentions}
    for a, b in np.argwhere(both).tolist():
        found[mentions[a]].add(mentions[b])
    return found


def _polarity(table: Array, target: Ends, opinion: Ends) -> str:
    """That at the tails where the heads agree or say nothing, that at the heads where the tails do; else the first."""
    head, tail = int(table[target[0], opinion[0]]), int(table[target[1], opinion[1]])
    if tail and head in (0, tail):
        return POLARITIES[tail - 1]
    return POLARITIES[head - 1] if head and not tail else POLARITIES[0]


NOT_COUNTED = -100


def targets(laid: list[Laid], *, split: bool) -> dict[str, Array]:
    """The tables of a batch as its model's loss takes them: entity, relation and polarity [batch, N, N].

    Cells that do not count are −100: padding, and of mentions what is no end behind a beginning in one utterance.
    """
    longest = max(each.length for each in laid)
    shape = (len(laid), longest, longest)
    found = {
        "entity": np.full(shape, NOT_COUNTED, np.int64),
        "relation": np.full((*shape, 2) if split else shape, NOT_COUNTED, np.int64),
        "polarity": np.full(shape, NOT_COUNTED, np.int64),
    }
    for b, each in enumerate(laid):
        tags, n = encode(each, split=split), each.length
        found["entity"][b, :n, :n] = np.where(_may(each), tags.entity, NOT_COUNTED)
        found["relation"][b, :n, :n] = tags.relation
        found["polarity"][b, :n, :n] = tags.polarity
    return found


def _may(laid: Laid) -> Array:
    """Where a mention may be: its last place not before its first, in the same utterance."""
    of = laid.utterances
    return np.triu(of[:, None] == of[None, :])
