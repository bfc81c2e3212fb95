"""A model that is told what its requests are about: an input `intuition` [batch, clusters] beside its own.

The model itself leaves it unread; experts that a pass puts beside its layers read it (`passes/rank1.py`). Arrays bring
it under that name, and of texts it is worked out: a frozen sentence encoder embeds them, and centroids score that. Both
are one module, `Scorer`, which is compiled beside the model, so that a package needs no more than texts.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from effc.errors import CalibrationError
from effc.intuition import INPUT, Array, Intuition
from effc.processor import Pooling, Processor

Run = Callable[[Mapping[str, Any]], Mapping[str, Array]]
TOGETHER = 32
"""Texts that are embedded in one batch."""


class Guided(nn.Module):
    """A model with one input more than it reads; `guided` makes one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = getattr(model, "config", None)


def guided(model: nn.Module, names: Sequence[str]) -> Guided:
    """The module of a model that takes inputs of those `names`, and `intuition`, as its signature says."""

    def forward(self: Guided, **named: Tensor) -> Any:
        return self.model(**{n: value for n, value in named.items() if n != INPUT})

    made: Guided = type("Guided", (Guided,), {"forward": signed(forward, (*names, INPUT))})(model)
    return made


def signed(forward: Any, names: Sequence[str]) -> Any:
    """A method whose signature says what inputs it takes by name."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    words = [inspect.Parameter(word, kind) for word in ("self", *names)]
    forward.__signature__ = inspect.Signature(words)
    return forward


class Scorer(nn.Module):
    """A frozen sentence encoder with its pooling and the centroids behind it; `scorer` makes one.

    Of tokens [batch, length] it gives `intuition` [batch, clusters].
    """

    centroids: Tensor

    def __init__(self, encoder: nn.Module, pooling: Pooling, clusters: Intuition) -> None:
        super().__init__()
        self.encoder, self.pooling, self.temperature = encoder, pooling, clusters.temperature
        self.register_buffer("centroids", torch.from_numpy(clusters.centroids))

    def embedding(self, named: Mapping[str, Tensor]) -> Tensor:
        """[batch, size]"""
        hidden = self.encoder(**named)["last_hidden_state"]
        mask = named["attention_mask"]
        parts = [pooled(mode, hidden, mask) for mode in self.pooling.modes]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def compute(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        embedding = functional.normalize(self.embedding(named), dim=-1)
        score = functional.linear(embedding, self.centroids)
        if self.temperature is not None:
            score = functional.softmax(score / self.temperature, -1)
        return {INPUT: score}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The same of arrays."""
        with torch.no_grad():
            made = self(**{name: torch.from_numpy(array) for name, array in feeds.items()})
        return {INPUT: made[INPUT].numpy()}


def scorer(
    encoder: nn.Module, pooling: Pooling, clusters: Intuition, names: Sequence[str]
) -> Scorer:
    """The module of an encoder that takes inputs of those `names`, as its signature says."""

    def forward(self: Scorer, **named: Tensor) -> dict[str, Tensor]:
        return self.compute(named)

    kind = type("Scorer", (Scorer,), {"forward": signed(forward, names)})
    made: Scorer = kind(encoder, pooling, clusters).eval()
    return made


def pooled(mode: str, hidden: Tensor, mask: Tensor) -> Tensor:
    """hidden [batch, length, size], mask [batch, length] → [batch, size], as `Pooling` does it without torch."""
    if mode == "cls":
        return hidden[:, 0]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if mode == "max":
        return hidden.masked_fill(weights == 0, -torch.inf).amax(1)
    if mode == "lasttoken":  # where as many are counted as there are for the first time
        count = mask.cumsum(1)
        is_last = (count == count[:, -1:]) & (mask > 0)
        return (hidden * is_last.unsqueeze(-1).to(hidden.dtype)).sum(1)
    if mode == "weightedmean":
        weights = torch.ones_like(weights).cumsum(1) * weights
    total = weights.sum(1).clamp(min=1e-9)
    if mode == "mean_sqrt_len_tokens":
        total = total.sqrt()
    return (hidden * weights).sum(1) / total


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedder:
    """A frozen sentence encoder and centroids: what runs it, what makes inputs of texts, the sha256 of the weights."""

    run: Run
    processor: Processor
    digest: str

    def __call__(self, texts: Sequence[str]) -> Array:
        """Scores [texts, clusters]."""
        found: list[Array] = []
        for first in range(0, len(texts), TOGETHER):
            found.append(self.run(self.processor.encode(texts[first : first + TOGETHER]))[INPUT])
        return np.concatenate(found)


@dataclass(frozen=True, kw_only=True, eq=False)
class Teller:
    """What texts are about, as numbers; without an embedder only arrays bring that."""

    clusters: Intuition
    embedder: Embedder | None = None

    @property
    def digest(self) -> str:
        """sha256 over all that decides what is told of a text."""
        parts = self.clusters.digest + (self.embedder.digest if self.embedder is not None else "")
        return hashlib.sha256(parts.encode()).hexdigest()

    def by(self, run: Run) -> Teller:
        """The same with another runtime of the encoder, such as the engine that was made of it."""
        if self.embedder is None:
            return self
        return replace(self, embedder=replace(self.embedder, run=run))

    def __call__(self, texts: Sequence[str]) -> Array:
        """Scores [texts, clusters]. Raises CalibrationError where nobody embeds texts."""
        if self.embedder is None:
            raise CalibrationError(
                f"the model takes {INPUT!r} [batch, {len(self.clusters.centroids)}], and the samples are texts alone",
                hint="name who embeds them: source.embedder: DIR; or bring it as an array of an .npz",
            )
        return self.embedder(texts)
