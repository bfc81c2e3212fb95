"""A model that is told what its requests are about: an input `intuition` [batch, clusters] beside its own.

The model itself leaves it unread; experts that a pass puts beside its layers read it (`passes/rank1.py`). Arrays bring
it under that name, and of texts it is worked out: a frozen sentence encoder embeds them, and centroids score that.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effc.errors import CalibrationError
from effc.intuition import INPUT, Array, Intuition
from effc.processor import Processor

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
        return self.model(**{name: named[name] for name in names})

    made: Guided = type("Guided", (Guided,), {"forward": forward})(model)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    words = ["self", *names, INPUT]
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(word, kind) for word in words]
    )
    return made


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedder:
    """A frozen sentence encoder: its module, what makes inputs of texts, and the sha256 of its weights."""

    module: nn.Module
    processor: Processor
    digest: str

    def __call__(self, texts: Sequence[str]) -> Array:
        """Embeddings [texts, size], pooled as the directory says."""
        found: list[Array] = []
        for first in range(0, len(texts), TOGETHER):
            feeds = self.processor.encode(texts[first : first + TOGETHER])
            with torch.no_grad():
                made = self.module(**{name: torch.from_numpy(a) for name, a in feeds.items()})
            hidden = made["last_hidden_state"].numpy()
            found.append(self.processor.pool(hidden, feeds["attention_mask"]))
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

    def __call__(self, texts: Sequence[str]) -> Array:
        """Scores [texts, clusters]. Raises CalibrationError where nobody embeds texts."""
        if self.embedder is None:
            raise CalibrationError(
                f"the model takes {INPUT!r} [batch, {len(self.clusters.centroids)}], and the samples are texts alone",
                hint="name who embeds them: source.embedder: DIR; or bring it as an array of an .npz",
            )
        return self.clusters.scores(self.embedder(texts))
