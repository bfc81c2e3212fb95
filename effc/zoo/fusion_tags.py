"""Words and links of a paragraph as tags and a square table over its places, and back again.

    tags     [L]       0 none; 1, 2 first and further character of a fusion word; 3, 4 the same of a separation word
    links    [L, L]    1 where a character of a fusion word (row) stands for the separation word that begins at a column

A word that is there several times is tagged everywhere, and a character stands for all of them. Places count the mark
in front. `best_path` is the decoder of a model that scores tags beside each other (Viterbi, 1967). No torch is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effc.zoo.fusion_files import Span, Truth
from effc.zoo.fusion_layout import Laid

Array = np.ndarray[Any, np.dtype[Any]]
LABELS = ("O", "B-fusion", "I-fusion", "B-separation", "I-separation")
FUSION, SEPARATION = 1, 3
"""The tags of first characters; one more is that of the further ones."""
THRESHOLD = 0.5
"""How probable a link must be."""
NOT_COUNTED = -100


def encode(laid: Laid) -> tuple[Array, Array]:
    """Tags [L] and links [L, L] of a paragraph whose truth is known."""
    truth = laid.paragraph.truth or Truth()
    tags = np.zeros(laid.length, np.int64)
    links = np.zeros((laid.length, laid.length), np.int64)
    for kind, spans in ((SEPARATION, truth.separations), (FUSION, truth.fusions)):
        for start, end in spans:
            tags[1 + start : 1 + end] = kind + 1
            tags[1 + start] = kind
    for place, separation in truth.characters:
        fusion = next(f for f, _ in truth.pairs if f.start <= place < f.end)
        for row in truth.places(fusion):
            for column in truth.places(separation):
                links[1 + row.start + place - fusion.start, 1 + column.start] = 1
    return tags, links


def targets(laid: Sequence[Laid]) -> dict[str, Array]:
    """Tags [batch, L] and links [batch, L, L] as a model's loss takes them; marks and padding do not count."""
    longest = max(each.length for each in laid)
    tags = np.full((len(laid), longest), NOT_COUNTED, np.int64)
    links = np.full((len(laid), longest, longest), NOT_COUNTED, np.int64)
    for b, each in enumerate(laid):
        inside = slice(1, each.length - 1)
        own, joined = encode(each)
        tags[b, inside] = own[inside]
        links[b, inside, inside] = joined[inside, inside]
    return {"tags": tags, "links": links}


def spans(tags: Sequence[int]) -> dict[Span, int]:
    """Words that tags [characters] say, with their kinds; a further character behind none of its kind begins one."""
    found: dict[Span, int] = {}
    start, kind = 0, 0
    for place, tag in enumerate([*map(int, tags), 0]):
        of = tag - 1 if tag in (FUSION + 1, SEPARATION + 1) else tag
        if kind and (tag == of or of != kind):
            found[Span(start, place)] = kind
            kind = 0
        if of and not kind:
            start, kind = place, of
    return found


def decode(tags: Sequence[int], links: Array, threshold: float = THRESHOLD) -> Truth:
    """What tags [characters] and logits of links [characters, characters] say is in a paragraph.

    Every character of a fusion word is joined to the separation word whose first character it goes to with the highest
    probability, if that is above the threshold; a fusion word is joined to all that its characters are.
    """
    words = spans(tags)
    fusions = [span for span, kind in words.items() if kind == FUSION]
    separations = [span for span, kind in words.items() if kind == SEPARATION]
    least = np.log(threshold / (1 - threshold))
    characters, pairs = set(), set()
    for fusion in fusions if separations else ():
        for place in range(*fusion):
            best = max(separations, key=lambda span: (links[place, span.start], -span.start))
            if links[place, best.start] > least:
                characters.add((place, best))
                pairs.add((fusion, best))
    return Truth(
        fusions=frozenset(fusions), separations=frozenset(separations), pairs=frozenset(pairs),
        characters=frozenset(characters),
    )  # fmt: skip


def of_outputs(
    outputs: Mapping[str, Array], row: int, laid: Laid, threshold: float = THRESHOLD
) -> Truth:
    """The same of a model's outputs `tag_logits` [batch, L, 5] and `link_logits` [batch, L, L]."""
    inside = slice(1, laid.length - 1)
    tags = np.asarray(outputs["tag_logits"][row, inside]).argmax(-1)
    return decode(tags.tolist(), np.asarray(outputs["link_logits"][row, inside, inside]), threshold)


def best_path(emissions: Array, moves: Array, first: Array, last: Array) -> list[int]:
    """The sequence of tags with the highest sum of emissions [N, T], moves [T, T] from row to column, and both ends."""
    total = first + emissions[0]
    came = np.zeros(emissions.shape, np.int64)
    for place in range(1, len(emissions)):
        ways = total[:, None] + moves
        came[place] = ways.argmax(0)
        total = ways.max(0) + emissions[place]
    found = [int((total + last).argmax())]
    for place in range(len(emissions) - 1, 0, -1):
        found.append(int(came[place, found[-1]]))
    return found[::-1]
