"""A graph beside its reference, on one batch: what its outputs are off by, and what of it is one node's.

The share of a node in the final error is what the outputs are off by where only its error is put on the reference. It
can be tried out for a node, and be estimated for all at once by a few backward passes with random signs z (Hutchinson
1990); shares of honest nodes add up to about 1:

    share = ‖J e‖² / ‖E‖² = mean of ⟨Jᵀ z, e⟩² / ‖E‖²        e, E: error of node and outputs, J: from one to the other
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.align import Alignment, align
from effc.ir.gap import MASK, Padding, difference, power
from effc.ir.program import Graph
from effc.ir.show import shape_words
from effc.ir.values import Change, Edge, Values, reads
from effc.noise import Local
from effc.samples import LENGTHS

PROBES = 4
"""Backward passes at least; more where there are few rows, each of which is a draw of its own."""


class Case:
    """A graph beside its reference, on one batch."""

    def __init__(
        self,
        reference: Graph,
        graph: Graph,
        feeds: Mapping[str, Tensor],
        *,
        is_made_up: bool = False,
    ) -> None:
        self.reference, self.graph, self.feeds = reference, graph, feeds
        self.is_made_up = is_made_up
        self.alignment = align(reference, graph)
        self.padding = Padding(graph, feeds)
        self.exact: dict[str, Tensor] = {}
        self.total = 0.0
        """Σ ‖error‖² / ‖output‖² over the outputs."""
        self.rows = self.probes = 0
        """Rows of the batch and backward passes that shares were estimated from."""

    def theirs(self, seen: dict[fx.Node, Tensor]) -> Values:
        """Values of the reference; what is in `seen` afterwards can be differentiated by."""
        views = self._views(lambda node: _Seen(node, seen))
        asked = reads(self.graph, self.alignment)
        return Values(self.reference, self.feeds, more=asked, views=views)

    def _views(self, make: Callable[[fx.Node], Change | None]) -> dict[Edge, tuple[Change, ...]]:
        """Changes to what readers see of values that are several nodes' counterpart."""
        views: dict[Edge, tuple[Change, ...]] = {}
        for node in self.graph.nodes:
            change = make(node) if node in self.alignment.beside else None
            if change is None:
                continue
            for reader in self.alignment.readers(node):
                edge = reader, self.alignment.values[node]
                views[edge] = (*views.get(edge, ()), change)
        return views

    def estimate(
        self, found: Iterable[Local], seen: Mapping[fx.Node, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """Give every node an estimate of its share."""
        felt = [
            (x, seen[x.node], x.error)
            for x in found
            if x.error is not None and math.isfinite(x.noise)
            and x.node in seen and seen[x.node].requires_grad
        ]  # fmt: skip
        ends = [name for name in self.exact if outputs[name].requires_grad]
        if not felt or not ends or not 0 < self.total < math.inf:
            return
        rows = min(len(v) if v.dim() else 1 for v in outputs.values())
        probes = max(PROBES, min(16, 32 // max(rows, 1)))
        self.rows, self.probes = rows, probes
        draw = torch.Generator().manual_seed(0)
        for probe in range(probes):
            slopes = torch.autograd.grad(
                [outputs[name] for name in ends], [value for _, value, _ in felt],
                [self._signs(name, draw) for name in ends],
                allow_unused=True, retain_graph=probe + 1 < probes,
            )  # fmt: skip
            for (local, _, error), slope in zip(felt, slopes, strict=True):
                if slope is None:
                    continue
                shape = (rows, -1) if slope.dim() > 1 and len(slope) == rows else (1, -1)
                pull = torch.linalg.vecdot(slope.reshape(shape), error.reshape(shape))
                part = power(pull) / self.total / probes
                local.share += part if math.isfinite(part) else 0.0

    def _signs(self, name: str, draw: torch.Generator) -> Tensor:
        """Random signs for an output, scaled so that outputs of all sizes count alike."""
        exact = self.exact[name]
        signs = torch.randint(0, 2, exact.shape, generator=draw) * 2 - 1
        signs = self.padding.zeroed_output(name, signs.to(exact.dtype))
        return signs / math.sqrt(power(self.padding.zeroed_output(name, exact)) or 1.0)

    def run(self, graph: Graph, **options: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return Values(graph, self.feeds, **options).outputs()

    def off(self, outputs: Mapping[str, Tensor]) -> float:
        """Σ ‖error‖² / ‖output‖², padded positions left out."""
        total = 0.0
        for name, exact in self.exact.items():
            if name not in outputs:
                continue
            if outputs[name].shape != exact.shape:
                return math.inf
            error = power(self.padding.zeroed_output(name, difference(outputs[name], exact)))
            total += error / (power(self.padding.zeroed_output(name, exact)) or 1.0)
        return total

    def alone(self, local: Local) -> float:
        """Error of the outputs where the reference is off by this node's error alone."""
        if local.node in self.alignment.beside:
            views = self._views(lambda n: local.change if n is local.node else None)
            return self._tried(self.reference, views=views)
        changes = {self.alignment.values[local.node]: local.change}
        return self._tried(self.reference, changes=changes)

    def without(self, found: Iterable[Local]) -> float:
        """Error of the outputs of the graph where the errors of nodes are taken out."""
        changes = {x.node: _minus(x.error) for x in found if x.error is not None}
        return self._tried(self.graph, changes=changes)

    def _tried(self, graph: Graph, **options: Any) -> float:
        try:
            return self.off(self.run(graph, **options))
        except Exception:  # a value of another shape breaks whatever reads it
            return math.inf


@dataclass(frozen=True, eq=False)
class _Seen:
    """Keeps what the readers of a node see, so that it can be differentiated by."""

    node: fx.Node
    kept: dict[fx.Node, Tensor]

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        seen = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        self.kept[self.node] = seen
        return seen


def _minus(error: Tensor) -> Change:
    return lambda value: value - error.to(value.dtype)


def unmatched(alignment: Alignment, nodes: Sequence[fx.Node]) -> Alignment:
    """The alignment where those nodes have no counterpart."""
    values = {n: o for n, o in alignment.values.items() if n not in nodes}
    return dataclasses.replace(alignment, values=values, beside=alignment.beside & values.keys())


def tensors(graph: Graph, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(feeds[name]) for name in graph.inputs}


def made_up(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """Inputs drawn from the values of the example that a graph was traced on: two rows, the last padded at its end."""
    draw = torch.Generator().manual_seed(seed)
    given = graph.exported.example_inputs
    example = dict(given[1]) if given is not None else {}
    feeds = {}
    for name, node in graph.input_nodes().items():
        value = node.meta["val"]
        known = example.get(name, torch.ones(2 * value.dim() or 1, dtype=value.dtype)).reshape(-1)
        words = shape_words(graph, value.shape)
        shape = [_size(graph, word, axis, example.get(name)) for axis, word in enumerate(words)]
        feeds[name] = known[torch.randint(len(known), shape, generator=draw)]
    mask = feeds.get(MASK)
    if mask is not None and mask.dim() == 2 and mask.shape[1] > 2:
        mask[-1, 2 * mask.shape[1] // 3 :] = 0
    return feeds


def _size(graph: Graph, word: str, axis: int, example: Tensor | None) -> int:
    if word.isdecimal():
        return int(word)
    if word in LENGTHS:
        return min(16, graph.largest(word) or 16)
    return 2 if word == "batch" or example is None else example.shape[axis]


def few(graph: Graph, feeds: Mapping[str, Tensor], tokens: int = 1024) -> dict[str, Tensor]:
    """As many rows of a batch as a backward pass has memory for: so many tokens, or as much of pictures.

    An input without rows, such as the positions whose logits are wanted, stays as it is.
    """
    words = {
        name: shape_words(graph, node.meta["val"].shape)
        for name, node in graph.input_nodes().items()
    }
    batched = {name for name, axes in words.items() if axes[:1] == ["batch"]}
    left = [word for name, axes in words.items() for word in axes[name in batched :]]
    if any("batch" in word for word in left):  # as in 2 · batch
        return dict(feeds)
    found = [feeds[name] for name in batched if len(feeds[name])]
    cost = max((v[0].numel() * (1 if v.is_floating_point() else 64) for v in found), default=1)
    rows = max(1, 64 * tokens // max(1, cost))
    return {name: value[:rows] if name in batched else value for name, value in feeds.items()}
