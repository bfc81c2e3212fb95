"""How far two values are apart, and which of their positions count."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from effc.ir.program import Graph
from effc.ir.show import shape_words

MASK = "attention_mask"


def difference(a: Tensor, b: Tensor) -> Tensor:
    """a − b; zero where both are the same infinity or no number, infinite where only one of them is."""
    if a.dtype in (torch.bool, torch.uint8):
        a, b = a.float(), b.float()
    gap = a - b
    if not gap.is_floating_point() or math.isfinite(norm(gap)):
        return gap
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros((), dtype=gap.dtype), gap)
    return torch.where(gap.isnan(), math.inf, gap)


def norm(x: Tensor) -> float:
    x = x if x.is_floating_point() else x.to(torch.float64)
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def power(x: Tensor) -> float:
    """Σ x², values that are no numbers left out."""
    length = norm(x)
    return length**2 if not math.isnan(length) else norm(x[~x.isnan()]) ** 2


def decibel(signal: float, noise: float) -> float:
    """10 log₁₀(signal / noise)"""
    if not noise:
        return math.inf
    if not signal or not noise < math.inf:
        return -math.inf
    return 10 * math.log10(signal / noise)


class Padding:
    """Positions [batch, length, …] of a graph's values that a mask input leaves out, because nobody reads them."""

    def __init__(self, graph: Graph, feeds: Mapping[str, Tensor]) -> None:
        self.graph = graph
        self.kept: Tensor | None = None
        (output,) = [n for n in graph.fx.nodes if n.op == "output"]
        self._ends: dict[str, fx.Node] = dict(zip(graph.outputs, output.args[0], strict=True))
        if MASK in graph.inputs and feeds[MASK].dim() == 2 and not bool(feeds[MASK].all()):
            self.kept = feeds[MASK].bool()
            self._sizes = shape_words(graph, graph.input_nodes()[MASK].meta["val"].shape)

    def _fits(self, node: fx.Node, value: Tensor) -> bool:
        if self.kept is None or value.dim() < 3 or value.shape[:2] != self.kept.shape:
            return False
        shape = getattr(node.meta.get("val"), "shape", ())
        return shape_words(self.graph, shape[:2]) == self._sizes

    def zeroed(self, node: fx.Node, value: Tensor) -> Tensor:
        """The value of a node, zero in padded positions."""
        if self.kept is None or not self._fits(node, value):
            return value
        kept = self.kept.reshape(*self.kept.shape, *[1] * (value.dim() - 2))
        return torch.where(kept, value, torch.zeros((), dtype=value.dtype))

    def without(self, node: fx.Node, value: Tensor) -> Tensor:
        """The value of a node in all other positions."""
        if self.kept is None or not self._fits(node, value):
            return value
        return value[self.kept]

    def zeroed_output(self, name: str, value: Tensor) -> Tensor:
        return self.zeroed(self._ends[name], value) if name in self._ends else value
