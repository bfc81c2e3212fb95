"""A dialogue as the numbers that its model reads: utterances as tokens, and where each stands in the tree of answers.

Utterances are read by themselves, each between two marks: ids and mask [utterances, pieces]. The dialogue is all of
them behind each other, of length N; what is said of its places is [batch, N]:

    gather              the row and column of a place in the above, as one number
    utterance           its utterance        −1 on marks and padding, which only see themselves
    parent              whom that answers    −2 where that is nobody
    speaker, group      who says it, and in which thread; 0 is the first utterance
    thread              the same on marks too, for the distances
    token_position      tokens since the beginning; every thread goes on from the end of the first utterance
    utterance_position  answers since the beginning

Three faults of the authors' published program can be had with `released`: whom an utterance answers is read from a list
that has been overwritten by depths, so that threads but the first answer wrong ones; the first and last piece of an
utterance are not in its thread; and marks see all, padding too, where the view is of the speaker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from effc.errors import CalibrationError
from effc.zoo.dialogue_files import Dialogue, Span

Array = np.ndarray[Any, np.dtype[Any]]
PLACES = (
    "gather", "utterance", "parent", "speaker", "group", "thread", "token_position", "utterance_position",
)  # fmt: skip
NONE = {"utterance": -1, "parent": -2, "speaker": -1, "group": -1}
"""What stands for padding; 0 elsewhere."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer: that of transformers does it."""

    cls_token_id: int | None
    sep_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: list[str], **options: Any) -> Mapping[str, list[list[int]]]: ...


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A dialogue in pieces, and the token that each place [N] is of, −1 for marks."""

    dialogue: Dialogue
    rows: tuple[tuple[int, ...], ...]
    """The ids of each utterance, marks included."""
    tokens: Array

    @property
    def length(self) -> int:
        return len(self.tokens)

    def ends(self, span: Span) -> tuple[int, int] | None:
        """The first and the last place of a span; None where the tokenizer made nothing of it."""
        inside = np.flatnonzero((self.tokens >= span.start) & (self.tokens < span.end))
        return (int(inside[0]), int(inside[-1])) if len(inside) else None

    def span(self, first: int, last: int) -> Span | None:
        """The tokens from the one at a place to the one at another; None where either is a mark."""
        start, end = int(self.tokens[first]), int(self.tokens[last])
        return Span(start, end + 1) if 0 <= start <= end else None

    @property
    def utterances(self) -> Array:
        """The utterance of every place [N], marks included."""
        return np.repeat(np.arange(len(self.rows)), [len(row) for row in self.rows])


def lay(dialogue: Dialogue, tokenizer: Tokenizer, longest: int | None = None) -> Laid:
    """A dialogue in pieces, every token taken by itself, as the published model does.

    Raises CalibrationError where an utterance has more than `longest` pieces: nothing is cut, because quadruples would
    be lost without a word.
    """
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    if begin is None or end is None:
        raise CalibrationError(
            "the tokenizer has no marks for the beginning and the end",
            hint="take an encoder whose tokenizer has [CLS] and [SEP]",
        )
    words = [token for utterance in dialogue.utterances for token in utterance]
    pieces = tokenizer(words, add_special_tokens=False)["input_ids"]
    rows, tokens = [], []
    for i, first in enumerate(dialogue.starts[:-1]):
        owners = [t for t in range(first, dialogue.starts[i + 1]) for _ in pieces[t]]
        row = (begin, *(p for t in range(first, dialogue.starts[i + 1]) for p in pieces[t]), end)
        if longest is not None and len(row) > longest:
            raise CalibrationError(
                f"dialogue {dialogue.name}: utterance {i} has {len(row)} pieces, the encoder takes {longest}",
                hint="split the utterance, or take an encoder of more positions",
            )
        rows.append(row)
        tokens += [-1, *owners, -1]
    return Laid(dialogue=dialogue, rows=tuple(rows), tokens=np.array(tokens, np.int64))


def inputs(laid: Sequence[Laid], pad: int = 0, *, released: bool = False) -> dict[str, Array]:
    """Dialogues as one batch of inputs by name, padded at the right."""
    rows = [row for each in laid for row in each.rows]
    widest, longest = max(map(len, rows)), max(each.length for each in laid)
    ids = np.full((len(rows), widest), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    found = {name: np.full((len(laid), longest), NONE.get(name, 0), np.int64) for name in PLACES}
    first = 0
    for b, each in enumerate(laid):
        for name, values in _places(each, first, widest, released).items():
            found[name][b, : each.length] = values
        first += len(each.rows)
    return {"input_ids": ids, "attention_mask": mask, **found}


def _places(laid: Laid, first: int, widest: int, released: bool) -> dict[str, Array]:
    """What is said of the places of one dialogue; `first` is the row of its first utterance in a batch."""
    dialogue, of = laid.dialogue, laid.utterances
    lengths = np.array([len(row) for row in laid.rows])
    begins = np.cumsum(lengths) - lengths
    inside = np.arange(laid.length) - begins[of]
    is_mark = laid.tokens < 0
    threads, depths = np.array(dialogue.threads), np.array(dialogue.depths)
    parents = np.array([p if p >= 0 else -2 for p in dialogue.replies])
    if released:
        parents = np.array([d - 1 if d else -2 for d in depths])
    group = np.where(is_mark, -1, threads[of])
    if released:
        is_edge = (inside == 1) | (inside == lengths[of] - 2)
        group = np.where(is_edge & (group > 0), -1, group)
    begin_of_thread = begins[[_first(dialogue.threads, t) for t in dialogue.threads]]
    position = (
        np.arange(laid.length) - begin_of_thread[of] + np.where(threads[of] > 0, lengths[0], 0)
    )
    return {
        "gather": (first + of) * widest + inside,
        "utterance": np.where(is_mark, -1, of),
        "parent": np.where(is_mark, -2, parents[of]),
        "speaker": np.where(is_mark, -1, _numbered(dialogue.speakers)[of]),
        "group": group,
        "thread": threads[of],
        "token_position": position,
        "utterance_position": depths[of],
    }


def _first(threads: Sequence[int], thread: int) -> int:
    return threads.index(thread)


def _numbered(speakers: Sequence[int]) -> Array:
    """Speakers from 0, as files may count them from anywhere."""
    return np.unique(np.array(speakers), return_inverse=True)[1]
