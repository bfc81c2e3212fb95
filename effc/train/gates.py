"""Tells of gated experts while they are trained: what their gates listen to, and how much they count.

    share       ω = σ(100 w)        of the router in the gates of an adapter; the rest is the intuition's
    strength    σ(100 v)            what an adapter's change is multiplied by

It adds nothing to the loss and changes nothing; the formulas are in `effc/nn/rank1.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from effc.ir.program import Graph
from effc.nn.rank1 import MIX, SIZE, SLOPE
from effc.train.terms import Course, Live

WORD = "gates"
BINS = 10
PARTS = {"share of the router": MIX, "strength": SIZE}


def begin(graph: Graph) -> list[GatesCourse]:
    """The course of a graph with experts; none for one without gates of that kind."""
    found = {part: [n for n in graph.tensors() if n.endswith(word)] for part, word in PARTS.items()}
    return [GatesCourse(found)] if any(found.values()) else []


class GatesCourse(Course):
    """One training of one graph."""

    word = WORD

    def __init__(self, parts: dict[str, list[str]]) -> None:
        self.parts = parts

    def told(self, step: int, live: Live) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for part, names in self.parts.items():
            values = [live[name].detach().float() * SLOPE for name in names if name in live]
            if not values:
                continue
            shares = torch.sigmoid(torch.stack(values).flatten())
            found[f"{part}, mean"] = round(float(shares.mean()), 4)
            found[part] = torch.histc(shares, BINS, 0, 1).int().tolist()
        return found
