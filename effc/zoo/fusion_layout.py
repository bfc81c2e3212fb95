"""A paragraph as the numbers that its model reads: a place for every character, and the sememes of its words.

input_ids, attention_mask   [batch, L]      a character each, between two marks; padded at the right
sememe_ids                  [batch, S]      0 for padding
incidence                   [batch, L, S]   which place is of a word that has which sememe
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from effc.errors import CalibrationError
from effc.zoo.dialogue_layout import Tokenizer as Pieces
from effc.zoo.fusion_files import Paragraph
from effc.zoo.sememes import Sememes

Array = np.ndarray[Any, np.dtype[Any]]


class Tokenizer(Pieces, Protocol):
    """What is asked of a tokenizer: that of transformers does it."""

    unk_token_id: int | None

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]: ...


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A paragraph in characters, marks included, with its sememes and which places [characters] have them."""

    paragraph: Paragraph
    ids: tuple[int, ...]
    sememes: tuple[int, ...] = ()
    incidence: Array
    """[characters, sememes]"""

    @property
    def length(self) -> int:
        return len(self.ids)


def lay(
    paragraph: Paragraph,
    tokenizer: Tokenizer,
    sememes: Sememes,
    longest: int | None = None,
    *,
    singles: bool = False,
) -> Laid:
    """A paragraph in characters. Raises CalibrationError where the encoder takes less than it has: nothing is cut."""
    begin, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    if begin is None or end is None:
        raise CalibrationError(
            "the tokenizer has no marks for the beginning and the end",
            hint="take an encoder whose tokenizer has [CLS] and [SEP]",
        )
    length = len(paragraph.text) + 2
    if longest is not None and length > longest:
        raise CalibrationError(
            f"paragraph {paragraph.name} has {length} characters with its marks, the encoder takes {longest}",
            hint="split the paragraph, or take an encoder of more positions",
        )
    numbers = pieces(paragraph.text, tokenizer)
    of, incidence = sememes.match(paragraph.text, singles=singles)
    return Laid(
        paragraph=paragraph, ids=(begin, *(numbers[c] for c in paragraph.text), end), sememes=of,
        incidence=incidence,
    )  # fmt: skip


def pieces(text: str, tokenizer: Tokenizer) -> dict[str, int]:
    """One id for every character of a text, so that places stay those of the text.

    A character is looked up as it is; where it is no piece, as the tokenizer takes it, if that is one piece. All
    others are unknown.
    """
    other = tokenizer.unk_token_id
    if other is None:
        raise CalibrationError(
            "the tokenizer has no piece for what it does not know",
            hint="take an encoder whose tokenizer has [UNK]",
        )
    characters = sorted(set(text))
    bare = tokenizer.convert_tokens_to_ids(characters)
    found = {c: other if i is None else i for c, i in zip(characters, bare, strict=True)}
    rest = [c for c in characters if found[c] == other]
    if rest:
        for c, ids in zip(
            rest, tokenizer(rest, add_special_tokens=False)["input_ids"], strict=True
        ):
            found[c] = ids[0] if len(ids) == 1 else other
    return found


def inputs(laid: Sequence[Laid], pad: int = 0) -> dict[str, Array]:
    """Paragraphs as one batch of inputs by name; one without sememes has a place for one all the same."""
    longest, most = max(each.length for each in laid), max(len(each.sememes) for each in laid)
    ids = np.full((len(laid), longest), pad, np.int64)
    mask = np.zeros_like(ids)
    sememes = np.zeros((len(laid), max(most, 1)), np.int64)
    incidence = np.zeros((len(laid), longest, max(most, 1)), np.bool_)
    for b, each in enumerate(laid):
        ids[b, : each.length], mask[b, : each.length] = each.ids, 1
        sememes[b, : len(each.sememes)] = each.sememes
        incidence[b, 1 : each.length - 1, : len(each.sememes)] = each.incidence
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "sememe_ids": sememes,
        "incidence": incidence,
    }
