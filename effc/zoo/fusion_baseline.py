"""What a joint model of lexical fusions is held against: tags that score each other, and links in a second step.

    p(tags | text) = exp(Σ emission[place, tag] + Σ move[tag, next] + ends) ÷ the same over all sequences

The first is a conditional random field over a recurrence in both directions (Huang et al., 2015), as the group that
later described lexical fusion had it in 2019. Its emissions come out of the module, and `fusion_tags.best_path` decodes
them outside. torch.export gives a recurrence of this kind one fixed length, so that it is trained as it is and makes no
engine. `by_rule` joins its words, which know of no links. `PairScorer` is the second step of a pipeline: a model of its
own that is asked about words which another has found.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from effc.zoo import fusion_tags as tags
from effc.zoo.fusion_files import Span, Truth
from effc.zoo.fusion_layout import Laid

Array = np.ndarray[Any, np.dtype[Any]]
COUNT = len(tags.LABELS)


class Tagger(nn.Module):
    """Emissions [batch, L, 5] of two layers of LSTM over a table of characters, and the moves between tags."""

    def __init__(self, table: Tensor, size: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.characters = nn.Embedding.from_pretrained(table.clone(), freeze=False)
        self.read = nn.LSTM(
            table.shape[1], size, 2, batch_first=True, bidirectional=True, dropout=dropout
        )
        self.drop, self.out = nn.Dropout(dropout), nn.Linear(2 * size, COUNT)
        self.moves = nn.Parameter(torch.zeros(COUNT, COUNT))
        self.first, self.last = (nn.Parameter(torch.zeros(COUNT)) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.drop(self.characters(input_ids)), attention_mask.sum(1).cpu(), batch_first=True,
            enforce_sorted=False,
        )  # fmt: skip
        read, _ = pad_packed_sequence(
            self.read(packed)[0], batch_first=True, total_length=input_ids.shape[1]
        )
        made: Tensor = self.out(self.drop(read))
        return made

    def loss(self, emissions: Tensor, wanted: Tensor) -> Tensor:
        """−log p of the tags [batch, L], the mean over batches of it ÷ characters; −100 stands at both ends alone."""
        counts = wanted >= 0
        sizes, known = counts.sum(1), wanted.clamp(min=0)
        emissions, known = emissions[:, 1:], known[:, 1:]  # the mark in front
        total, paths = emissions[:, 0] + self.first, emissions[:, 0] + self.first
        right = paths.gather(1, known[:, :1])[:, 0]
        for place in range(1, emissions.shape[1]):
            inside = place < sizes
            ways = (total[:, :, None] + self.moves).logsumexp(1) + emissions[:, place]
            total = torch.where(inside[:, None], ways, total)
            step = self.moves[known[:, place - 1], known[:, place]]
            step = step + emissions[:, place].gather(1, known[:, place : place + 1])[:, 0]
            right = right + torch.where(inside, step, 0.0)
        end = known.gather(1, sizes[:, None] - 1)[:, 0]
        off = (total + self.last).logsumexp(1) - right - self.last[end]
        return off.sum() / sizes.sum()

    def said(self, emissions: Array, laid: Laid) -> Truth:
        """The words of one paragraph, joined by rule; emissions are [L, 5]."""
        scores = (self.moves, self.first, self.last)
        path = tags.best_path(emissions[1 : laid.length - 1], *(p.detach().numpy() for p in scores))
        return by_rule(laid.paragraph.text, tags.spans(path))


def by_rule(text: str, words: dict[Span, int]) -> Truth:
    """Words with links that characters alone decide.

    A character stands for the nearest separation word that has it; one that no word has for the nearest that no other
    character of its fusion word stands for.
    """
    separations = sorted(span for span, kind in words.items() if kind == tags.SEPARATION)
    fusions = sorted(span for span, kind in words.items() if kind == tags.FUSION)
    found: dict[int, Span] = {}
    for fusion in fusions:
        near = sorted(separations, key=lambda span: abs(span.start - fusion.start))
        for place in range(*fusion):
            if (own := next((s for s in near if text[place] in text[slice(*s)]), None)) is not None:
                found[place] = own
        for place in set(range(*fusion)) - set(found):
            taken = {found[p] for p in range(*fusion) if p in found}
            if (other := next((s for s in near if s not in taken), None)) is not None:
                found[place] = other
    return Truth(
        fusions=frozenset(fusions), separations=frozenset(separations), characters=frozenset(found.items()),
        pairs=frozenset((f, s) for f in fusions for place, s in found.items() if f.start <= place < f.end),
    )  # fmt: skip


class PairScorer(nn.Module):
    """How likely a character stands for a word: x, the character's vector twice, and y, those of the word's two ends,

    score = w · [x ⊙ y; x + y] + b
    """

    def __init__(self, encoder: nn.Module, dropout: float = 0.2) -> None:
        super().__init__()
        hidden = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.encoder, self.drop = encoder, nn.Dropout(dropout)
        self.product, self.sum = (
            nn.Linear(2 * hidden, 1, bias=False),
            nn.Linear(2 * hidden, 1),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor, ends: Tensor) -> Tensor:
        """`ends` [batch, P, 2], the first and last place of words → scores [batch, L, P]"""
        read = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        read = self.drop(read)
        rows = torch.arange(len(ends))[:, None, None]
        word, character = read[rows, ends].flatten(2), torch.cat((read, read), -1)
        both = (character * self.product.weight[0]) @ word.transpose(1, 2)
        found: Tensor = both + self.sum(character) + (word @ self.sum.weight[0])[:, None]
        return found

    def said(self, feeds: dict[str, Tensor], words: Truth) -> Truth:
        """Words of one paragraph, with their links."""
        if not words.separations or not words.fusions:
            return words.alone
        asked = sorted(words.separations)
        scores = self(**feeds, ends=torch.tensor([[(1 + s.start, s.end) for s in asked]]))[0, 1:-1]
        links = np.full((len(scores), len(scores)), -np.inf)
        links[:, [s.start for s in asked]] = scores.detach().numpy()
        of = np.zeros(len(scores), np.int64)
        for kind, spans in ((tags.SEPARATION, words.separations), (tags.FUSION, words.fusions)):
            for span in spans:
                of[span.start : span.end], of[span.start] = kind + 1, kind
        return tags.decode(of.tolist(), links)


def questions(laid: Sequence[Laid], draw: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Words to ask a `PairScorer` about in training: ends [batch, P, 2], and links [batch, L, P], −100 where not asked.

    They are the separation words that are there, and as many other places of two characters; asked are the characters
    of fusion words.
    """
    longest = max(each.length for each in laid)
    rows: list[list[Span]] = []
    for each in laid:
        truth = each.paragraph.truth or Truth()
        real = sorted(truth.separations)
        others = draw.integers(0, max(1, each.length - 3), max(2, len(real)))
        made = [Span(int(s), int(s) + 2) for s in others]
        rows.append([*real, *(s for s in made if s not in truth.separations)])
    most = max(map(len, rows))
    ends = np.zeros((len(laid), most, 2), np.int64)
    wanted = np.full((len(laid), longest, most), tags.NOT_COUNTED, np.int64)
    for b, (each, spans) in enumerate(zip(laid, rows, strict=True)):
        _, links = tags.encode(each)
        asked = np.flatnonzero(links.any(1))
        for column, span in enumerate(spans):
            ends[b, column] = 1 + span.start, span.end
            is_word = span in (each.paragraph.truth or Truth()).separations
            wanted[b, asked, column] = links[asked, 1 + span.start] if is_word else 0
    return torch.from_numpy(ends), torch.from_numpy(wanted)


def pair_loss(scores: Tensor, wanted: Tensor) -> Tensor:
    """Binary cross-entropy [batch, L, P], the mean over what is asked."""
    asked = wanted >= 0
    off = functional.binary_cross_entropy_with_logits(
        scores, (wanted == 1).to(scores.dtype), reduction="none"
    )
    return (off * asked).sum() / asked.sum().clamp(min=1)
