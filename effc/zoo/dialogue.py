"""A model that tags a dialogue with quadruples of target, aspect, opinion and polarity (DiaASQ, Li et al., ACL 2023).

An encoder reads every utterance by itself, X [batch, N, hidden] is all of them behind each other. Three attentions
look along whom an utterance answers, its thread and its speaker; with M what a view lets see,

    V = LayerNorm(X + W_o softmax(Q Kᵀ / √d, over M) V)        X' = max over the three views, element by element

Then each table of tags has, for every class c, queries and keys of N places that are turned by their position R(p):

    logit[m, n, c] = ⟨R(±p_m) q_m, R(±p'_n) k_n⟩ over tokens + the same over answers

which hangs on how far m is from n in the tree of answers: between two threads the distance goes through the first
utterance, and so a sign is turned (`signed`). The first table is asked about pairs inside an utterance alone and has
no part of answers, as in the authors' program, whose dimensions are taken; masks are those of the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from effc.zoo.dialogue_task import Settings

MASKED, HARD_MASKED = -1e4, -1e9
"""What stands for no attention; the second makes a row without any see all alike, as the authors' program does."""
TOKEN_BASE, UTTERANCE_BASE = 10_000.0, 15.0
CLASSES = {"entity": 4, "relation": 3, "polarity": 4}


class View(nn.Module):
    """Attention among the places that a mask [batch, N, N] lets see each other, added to what was there."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (
            nn.Linear(hidden, hidden, bias=False) for _ in range(4)
        )
        self.norm = nn.LayerNorm(hidden, eps=1e-6)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [batch, N, hidden], bias [batch, 1, N, N] → [batch, N, hidden]"""
        drop = self.dropout if self.training else 0.0
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, bias, dropout_p=drop)
        made = self.out(seen.transpose(1, 2).flatten(2))
        made = functional.dropout(made, drop, self.training) if drop else made
        found: Tensor = self.norm(made + x)
        return found


class Grid(nn.Module):
    """Logits [batch, N, N, classes] of pairs of places."""

    def __init__(self, hidden: int, classes: int, inner: int, *, far: bool, rotary: bool) -> None:
        super().__init__()
        self.classes, self.inner, self.rotary = classes, inner, rotary
        self.far = far
        """Whether pairs of different utterances are asked for, so that answers between them count."""
        self.project = nn.Linear(hidden, classes * (4 if far else 2) * inner)

    def forward(
        self, x: Tensor, tables: Mapping[str, Turn], signs: tuple[Tensor, Tensor]
    ) -> Tensor:
        """x [batch, N, hidden]; `tables` turn by tokens and by answers; `signs` say where whose turn is reversed."""
        parts = self.project(x).unflatten(-1, (self.classes, -1, self.inner)).unbind(3)
        if not self.far:
            query, key = (self._turned(part, tables["token"]) for part in parts)
            return torch.einsum("bmcd,bncd->bmnc", query, key)
        queries, keys = (parts[0], parts[1]), (parts[2], parts[3])
        query, key = self._both(queries, tables), self._both(keys, tables)
        plain = torch.einsum("bmcd,bncd->bmnc", query, key)
        if not self.rotary:
            return plain
        back = {name: turn.reversed() for name, turn in tables.items()}
        query_back, key_back = self._both(queries, back), self._both(keys, back)
        before, after = signs
        found = torch.where(before, torch.einsum("bmcd,bncd->bmnc", query_back, key), plain)
        return torch.where(after, torch.einsum("bmcd,bncd->bmnc", query, key_back), found)

    def _both(self, parts: tuple[Tensor, Tensor], tables: Mapping[str, Turn]) -> Tensor:
        """The parts of tokens and of answers, each turned, end to end: their products add up."""
        token, utterance = parts
        turned = self._turned(token, tables["token"]), self._turned(utterance, tables["utterance"])
        return torch.cat(turned, -1)

    def _turned(self, x: Tensor, turn: Turn) -> Tensor:
        return turn(x) if self.rotary else x


@dataclass(frozen=True)
class Turn:
    """Rotary positions: pairs (2i, 2i + 1) are turned by p · base^(−2i/D); cos and sin are [batch, N, 1, D/2]."""

    cos: Tensor
    sin: Tensor

    @staticmethod
    def of(positions: Tensor, inner: int, base: float) -> Turn:
        steps = torch.arange(0, inner, 2, dtype=torch.float32, device=positions.device) / inner
        angles = positions.to(torch.float32)[..., None, None] * base**-steps
        return Turn(angles.cos(), angles.sin())

    def reversed(self) -> Turn:
        return Turn(self.cos, -self.sin)

    def __call__(self, x: Tensor) -> Tensor:
        """x [batch, N, classes, D] → the same, first of all pairs before second: products sum over both in any order,
        and halves are put together in a fraction of the time that pairs are."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos, self.sin
        return torch.cat((even * cos - odd * sin, odd * cos + even * sin), -1)


class DialogueModel(nn.Module):
    """An encoder of transformers, three views and three tables of tags.

    Inputs are those of `dialogue_layout.inputs`; outputs `entity`, `relation` and `polarity` [batch, N, N, classes].
    `dropout` is that of the module in training mode; `effc tune`, which trains the graph, has its own.
    """

    def __init__(self, encoder: nn.Module, settings: Settings, dropout: float = 0.1) -> None:
        super().__init__()
        config: Any = encoder.config
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        self.encoder, self.settings, self.dropout = encoder, settings, dropout
        self.views = nn.ModuleList(
            View(hidden, heads, dropout) for _ in range(3 if settings.views else 0)
        )
        classes = dict(CLASSES, relation=4 if settings.split else 3)
        self.grids = nn.ModuleDict({
            name: Grid(
                hidden, count, settings.inner, far=name != "entity", rotary=settings.rotary
            )
            for name, count in classes.items()
        })  # fmt: skip

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        gather: Tensor,
        utterance: Tensor,
        parent: Tensor,
        speaker: Tensor,
        group: Tensor,
        thread: Tensor,
        token_position: Tensor,
        utterance_position: Tensor,
    ) -> dict[str, Tensor]:
        read = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        x = read.flatten(0, 1)[gather]
        if self.training:
            x = functional.dropout(x, self.dropout)
        if self.views:
            seen = views(utterance, parent, speaker, group, released=self.settings.released_masks)
            fill = HARD_MASKED if self.settings.released_masks else MASKED
            biases = [torch.where(mask, 0.0, fill)[:, None] for mask in seen]
            made = [view(x, bias) for view, bias in zip(self.views, biases, strict=True)]
            x = torch.maximum(torch.maximum(made[0], made[1]), made[2])
        inner = self.settings.inner
        tables = {
            "token": Turn.of(token_position, inner, TOKEN_BASE),
            "utterance": Turn.of(utterance_position, inner, UTTERANCE_BASE),
        }
        signs = signed(thread)
        return {name: grid(x, tables, signs) for name, grid in self.grids.items()}


def views(
    utterance: Tensor, parent: Tensor, speaker: Tensor, group: Tensor, *, released: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Who sees whom [batch, N, N] along answers, thread and speaker; every place sees itself."""
    rows, columns = utterance[:, :, None], utterance[:, None, :]
    real = (rows >= 0) & (columns >= 0)
    places = torch.arange(utterance.shape[1], device=utterance.device)
    itself = places[:, None] == places
    reply = (rows == columns) | (rows == parent[:, None, :]) | (parent[:, :, None] == columns)
    groups, others = group[:, :, None], group[:, None, :]
    thread = ((groups == others) & (groups >= 0)) | ((groups == 0) | (others == 0)) & real
    said = (speaker[:, :, None] == speaker[:, None, :]) & (speaker[:, :, None] >= 0)
    return (reply & real) | itself, thread | itself, said if released else said | itself


def signed(thread: Tensor) -> tuple[Tensor, Tensor]:
    """Where the query is turned back [batch, N, N, 1], and where the key is: between two threads, by their order.

    So a pair of them is turned by the sum of both depths, and any other by the difference.
    """
    rows, columns = thread[:, :, None, None], thread[:, None, :, None]
    apart = (rows > 0) & (columns > 0)
    return apart & (rows < columns), apart & (rows > columns)


def loss(
    outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], weights: Mapping[str, float]
) -> Tensor:
    """The sum over tables of cross-entropy over cells that count; −100 is what does not count.

    `wanted` are entity, relation and polarity [batch, N, N], the second [batch, N, N, 2] where heads and tails are
    split. Every class but the first has the weight of its table, and the mean is over weights.
    """
    terms = []
    for name, weight in weights.items():
        logits, tags = outputs[name], wanted[name]
        if tags.dim() == 4:
            logits = logits.unflatten(-1, (2, 2))
        classes = logits.shape[-1]
        scale = logits.new_full((classes,), weight)
        scale[0] = 1.0
        terms.append(functional.cross_entropy(logits.reshape(-1, classes), tags.reshape(-1), scale))
    return torch.stack(terms).sum()
