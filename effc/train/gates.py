"""Tells of gated experts while they are trained: what their gates listen to, and how much they count.

    share       ω = σ(100 w)        of the router in the gates of an adapter; the rest is the intuition's
    strength    σ(100 v)            what an adapter's change is multiplied by
    requests    how many held-out samples are nearest to each cluster

It adds nothing to the loss and changes nothing; the formulas are in `effc/nn/rank1.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from effc.ir.program import Graph
from effc.nn.rank1 import MIX, SIZE, SLOPE
from effc.train.terms import Course, Live

WORD = "gates"
BINS = 10
REQUESTS = "requests by cluster"
PARTS = {"share of the router": MIX, "strength": SIZE}


def begin(graph: Graph, nearest: Sequence[int] = ()) -> list[GatesCourse]:
    """The course of a graph with experts; none for one without gates. `nearest` counts held-out samples by cluster."""
    found = {part: [n for n in graph.tensors() if n.endswith(word)] for part, word in PARTS.items()}
    if not any(found.values()):
        return []
    return [GatesCourse(found, list(nearest))]


class GatesCourse(Course):
    """One training of one graph."""

    word = WORD

    def __init__(self, parts: dict[str, list[str]], nearest: list[int]) -> None:
        self.parts, self.nearest = parts, nearest

    def told(self, step: int, live: Live) -> dict[str, Any]:
        found: dict[str, Any] = {REQUESTS: self.nearest} if self.nearest else {}
        for part, names in self.parts.items():
            values = [live[name].detach().float() * SLOPE for name in names if name in live]
            if not values:
                continue
            shares = torch.sigmoid(torch.stack(values).flatten())
            found[f"{part}, mean"] = round(float(shares.mean()), 4)
            found[part] = torch.histc(shares, BINS, 0, 1).int().tolist()
        return found
