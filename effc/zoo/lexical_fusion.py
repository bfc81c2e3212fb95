"""A model that finds words which stand for two others of their paragraph (lexical fusion, Liu et al., COLING 2020).

An encoder reads the paragraph character by character, h [batch, L, hidden]. L characters and S sememes of the words
among them are the nodes x [batch, M, width] of a graph; that of a character knows those beside it. A character is
joined to the sememes of every word that it is part of and to the same character elsewhere, and everything to itself.
Attention runs along the edges (Veličković et al., ICLR 2018), for each of K heads

    z = W x        score[i, j] = LeakyReLU(a · z_i + b · z_j)        x'_i = ELU(Σ_j softmax_j(score, over edges) z_j)

in dense form: two layers, the heads of the first end to end, those of the last averaged. With g = h + W_o x' of the
characters,

    tag_logits  [batch, L, 5] = MLP g             link_logits [batch, L, L] = [r; 1] U [c; 1]ᵀ,  r, c = MLP g

where rows of links are characters of fusion words, and columns where separation words begin. Most characters of a
fusion word stand in the words that it is for: whether a character is there twice is told to its node, and a link's
score has a term for the same character at the beginning of a word, and one for the place behind. The paper was at hand
in its declared shape alone: layout and numbers are ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from effc.zoo.fusion_tags import LABELS
from effc.zoo.fusion_task import Settings

MASKED = -1e4
SLOPE = 0.2
"""Of the rectifier of scores where they are below 0."""


class Attention(nn.Module):
    """Attention along the edges of a graph, its heads end to end or averaged."""

    def __init__(self, width: int, heads: int, size: int, *, joined: bool) -> None:
        super().__init__()
        self.heads, self.joined = heads, joined
        self.value = nn.Linear(width, heads * size, bias=False)
        self.left, self.right = (
            nn.Parameter(torch.randn(heads, 1, size) * size**-0.5) for _ in range(2)
        )

    def forward(self, x: Tensor, bias: Tensor, rows: int | None = None) -> Tensor:
        """x [batch, M, width], bias [batch, 1, M, M] → [batch, rows, heads · size], or size where averaged.

        `bias` is 0 along edges and `MASKED` elsewhere; every node has an edge to itself. Where so many `rows` are asked
        for, only the first nodes are told what they read.
        """
        z = self.value(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        u, v = (z[:, :, :rows] * self.left).sum(-1), (z * self.right).sum(-1)  # [batch, heads, M]
        score = functional.leaky_relu(u[..., :, None] + v[..., None, :], SLOPE)
        made = (score + bias[:, :, :rows]).softmax(-1) @ z
        made = made.transpose(1, 2).flatten(2) if self.joined else made.mean(1)
        return functional.elu(made)


class Links(nn.Module):
    """How much a character in a row stands for the word that begins at a column."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.row, self.column = (
            nn.Sequential(nn.Linear(hidden, inner), nn.ReLU()) for _ in range(2)
        )
        self.between = nn.Linear(inner + 1, inner + 1, bias=False)
        self.first, self.second = (nn.Parameter(torch.zeros(1)) for _ in range(2))

    def forward(self, g: Tensor, same: Tensor) -> Tensor:
        """g [batch, L, hidden] and which places have one character [batch, L, L] → [batch, L, L]"""
        row, column = (functional.pad(x(g), (0, 1), value=1.0) for x in (self.row, self.column))
        found: Tensor = self.between(row) @ column.transpose(1, 2)
        behind = functional.pad(same[..., 1:], (0, 1))
        found = found + self.first * same + self.second * behind
        return found


class LexicalFusionModel(nn.Module):
    """An encoder of transformers, a graph of characters and sememes, tags and links.

    Inputs are those of `fusion_layout.inputs`; outputs `tag_logits` [batch, L, 5] and `link_logits` [batch, L, L].
    `vectors` [1 + sememes, size] are what sememes begin as.
    """

    def __init__(self, encoder: nn.Module, settings: Settings, vectors: Tensor) -> None:
        super().__init__()
        hidden = int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
        width, inner = settings.heads * settings.size, settings.inner
        self.encoder, self.same = encoder, settings.same
        self.sememes = nn.Embedding.from_pretrained(vectors.clone(), freeze=False)
        self.of_character, self.of_sememe = (
            nn.Linear(3 * (hidden + 1), width),
            nn.Linear(vectors.shape[1], width),
        )
        self.graph = nn.ModuleList([
            Attention(width, settings.heads, settings.size, joined=True),
            Attention(width, settings.heads, settings.size, joined=False),
        ])  # fmt: skip
        self.back = nn.Linear(settings.size, hidden)
        self.tags = nn.Sequential(nn.Linear(hidden, inner), nn.ReLU(), nn.Linear(inner, len(LABELS)))  # fmt: skip
        self.links = Links(hidden, inner)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, sememe_ids: Tensor, incidence: Tensor
    ) -> dict[str, Tensor]:
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        itself = _itself(h.shape[1], h.device)
        same = (input_ids[:, :, None] == input_ids[:, None]) & (attention_mask[:, None] > 0)
        same = same if self.same else same & itself
        twice = (same.to(torch.int64).sum(-1, keepdim=True) > 1).to(h.dtype)
        known = torch.cat((h, twice), -1) * attention_mask[..., None].to(h.dtype)
        # the two layers have biases of their own, which tell the kinds of nodes apart
        characters = self.of_character(with_neighbours(known))
        x = torch.cat((characters, self.of_sememe(self.sememes(sememe_ids))), 1)
        bias = torch.where(joined(same | itself, incidence)[:, None], 0.0, MASKED)
        first, last = self.graph
        # what sememes would read at last is of no use to anybody
        g = h + self.back(last(first(x, bias), bias, rows=h.shape[1]))
        return {"tag_logits": self.tags(g), "link_logits": self.links(g, same.to(h.dtype))}


def joined(characters: Tensor, incidence: Tensor) -> Tensor:
    """The edges [batch, L + S, L + S] of those among characters [batch, L, L] and to sememes [batch, L, S].

    Sememes are joined to themselves, as characters are.
    """
    sememes = _itself(incidence.shape[2], incidence.device).expand(incidence.shape[0], -1, -1)
    rows = torch.cat((characters, incidence), 2), torch.cat((incidence.transpose(1, 2), sememes), 2)
    return torch.cat(rows, 1)


def with_neighbours(x: Tensor) -> Tensor:
    """What is known of each place, of the one before and the one behind: [batch, L, width] → [batch, L, 3 · width]."""
    before, behind = functional.pad(x[:, :-1], (0, 0, 1, 0)), functional.pad(x[:, 1:], (0, 0, 0, 1))
    return torch.cat((before, x, behind), -1)


def _itself(count: int, device: torch.device) -> Tensor:
    """Each of so many nodes joined to itself [count, count]."""
    places = torch.arange(count, device=device)
    return places[:, None] == places


def loss(outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], settings: Settings) -> Tensor:
    """Cross-entropy of tags, the mean over characters, and `link_weight` times that of links; −100 does not count.

    Of links it is the mean over rows that are characters of fusion words, in which a link weighs `positive_weight`,
    plus the mean over all other rows: as if as many of them were drawn.
    """
    tags = wanted["tags"].flatten()
    off = functional.cross_entropy(outputs["tag_logits"].flatten(0, 1), tags, reduction="sum")
    found = off / (tags >= 0).sum().clamp(min=1)
    links, logits = wanted["links"], outputs["link_logits"]
    counts, is_link = links >= 0, links == 1
    each = functional.binary_cross_entropy_with_logits(logits, is_link.to(logits.dtype), reduction="none")  # fmt: skip
    of_fusion = is_link.any(-1, keepdim=True) & counts
    weights = torch.where(is_link, settings.positive_weight, 1.0) * of_fusion
    others = (counts & ~of_fusion).to(logits.dtype)
    for weight in (weights, others):
        found = found + settings.link_weight * (each * weight).sum() / weight.sum().clamp(min=1)
    return found
