"""A conversation as the numbers that its model reads: every utterance by itself, and which of them follow each other.

input_ids, attention_mask   [utterances, pieces]    each between two marks
gather                      [batch, N]              the row of an utterance in the above
present                     [batch, N]              1, and 0 where a shorter conversation is padded, at the right
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.errors import CalibrationError
from effc.zoo.conversation_files import Conversation
from effc.zoo.dialogue_layout import Tokenizer

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A conversation in pieces; `is_beside` where it is there for its speakers alone."""

    conversation: Conversation
    rows: tuple[tuple[int, ...], ...]
    """The ids of each utterance, marks included."""
    is_beside: bool = False

    @property
    def length(self) -> int:
        return len(self.rows)


def lay(conversation: Conversation, tokenizer: Tokenizer, longest: int | None = None) -> Laid:
    """A conversation in pieces. Raises CalibrationError where an utterance has more than `longest`: nothing is cut."""
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    if begin is None or end is None:
        raise CalibrationError(
            "the tokenizer has no marks for the beginning and the end",
            hint="take an encoder whose tokenizer has [CLS] and [SEP]",
        )
    texts = [utterance.text for utterance in conversation.utterances]
    pieces = tokenizer(texts, add_special_tokens=False)["input_ids"]
    rows = tuple((begin, *each, end) for each in pieces)
    for i, (row, said) in enumerate(zip(rows, conversation.utterances, strict=True)):
        if longest is not None and len(row) > longest:
            raise CalibrationError(
                f"line {said.line}, dialogue {conversation.name}: utterance {i} has {len(row)} pieces, "
                f"the encoder takes {longest}",
                hint="split the utterance, or take an encoder of more positions",
            )
    return Laid(conversation=conversation, rows=rows)


def inputs(laid: Sequence[Sequence[Sequence[int]]], pad: int = 0) -> dict[str, Array]:
    """Rows of conversations as one batch of inputs by name."""
    rows = [row for each in laid for row in each]
    widest, longest = max(map(len, rows)), max(map(len, laid))
    ids = np.full((len(rows), widest), pad, np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    gather = np.zeros((len(laid), longest), np.int64)
    present = np.zeros_like(gather)
    first = 0
    for b, each in enumerate(laid):
        gather[b, : len(each)] = np.arange(first, first + len(each))
        present[b, : len(each)] = 1
        first += len(each)
    return {"input_ids": ids, "attention_mask": mask, "gather": gather, "present": present}
