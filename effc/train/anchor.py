"""Keeps what is trained near to where it began, so that less is forgotten (L2-SP, Li et al., ICML 2018).

loss + weight / 2 · Σ ‖w − w₀‖²        over all tensors that are trained
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from effc.ir.program import Graph
from effc.train.terms import Course, Live


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """How strongly. Of an adapter's factors it is their own distance, not that of the weight that takes them up."""

    term: Literal["l2-sp"] = "l2-sp"
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01

    def begin(self, graph: Graph, steps: int, rate: Callable[[int], float]) -> AnchorCourse:
        return AnchorCourse(self.weight, graph.tensors())


class AnchorCourse(Course):
    """One training of one graph."""

    word = "l2-sp"

    def __init__(self, weight: float, start: Mapping[str, Tensor]) -> None:
        self.weight, self.start = weight, {n: t.detach() for n, t in start.items()}

    def losses(self, step: int, live: Live) -> dict[str, Tensor]:
        return {"l2-sp": self.weight / 2 * self._far(live)}

    def told(self, step: int, live: Live) -> dict[str, Any]:
        with torch.no_grad():
            return {"distance": round(float(self._far(live)) ** 0.5, 6)}

    def _far(self, live: Live) -> Tensor:
        """Σ ‖w − w₀‖², a tensor under several names once."""
        distinct = {id(tensor): name for name, tensor in live.items()}
        terms = [(live[n] - self.start[n]).square().sum() for n in distinct.values()]
        return torch.stack(terms).sum()
