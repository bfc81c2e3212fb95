"""Runs graphs value by value: alone, with values changed on the way, or on the values of another graph.

Values are worked out when they are asked for and dropped after their last use, so that memory is that of a plain run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.align import Alignment, is_weight
from effc.ir.program import Graph
from effc.quant.ops import DEQUANTIZE, QUANTIZE

Change = Callable[[Any], Any]
Edge = tuple[fx.Node, fx.Node]
"""A reader, and what it reads."""


def call(node: fx.Node, inputs: Mapping[fx.Node, Any]) -> Any:
    """What a node computes from values of the nodes that it reads."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: inputs[n])
    assert callable(node.target)
    return node.target(*args, **kwargs)


class Values:
    """The values of a graph on one batch.

    `more` says how often a value will be asked for beside the reads of the graph itself. `changes` are made to values
    as they are computed; `views` to what some readers see of them, in order: who reads is in the key, and a change that
    several readers share is made once. Under grad mode the graph is differentiable from its first float value on, a
    grid counting as the identity.
    """

    def __init__(
        self,
        graph: Graph,
        feeds: Mapping[str, Tensor],
        *,
        more: Mapping[fx.Node, int] | None = None,
        changes: Mapping[fx.Node, Change] | None = None,
        views: Mapping[Edge, tuple[Change, ...]] | None = None,
    ) -> None:
        self.graph, self.changes, self.views = graph, changes or {}, views or {}
        self.left = Counter({n: len(n.users) for n in graph.fx.nodes})
        self.left.update(more or {})
        places = [n for n in graph.fx.nodes if n.op == "placeholder"]
        self.known: dict[fx.Node, Any] = dict(zip(places, graph.arguments(feeds), strict=True))
        self._todo = (n for n in graph.fx.nodes if n.op != "placeholder")
        self._seen: dict[tuple[fx.Node, tuple[Change, ...]], Any] = {}
        self._quantized: dict[fx.Node, Any] = {}

    def __call__(self, node: fx.Node) -> Any:
        while node not in self.known:
            self._step(next(self._todo))
        return self._read(node)

    def outputs(self) -> dict[str, Tensor]:
        (output,) = [n for n in self.graph.fx.nodes if n.op == "output"]
        return dict(zip(self.graph.outputs, self(output), strict=True))

    def _read(self, node: fx.Node) -> Any:
        value = self.known[node]
        self.left[node] -= 1
        if self.left[node] <= 0:
            del self.known[node]
        return value

    def _step(self, node: fx.Node) -> None:
        inputs = {n: self._view(node, n, self._read(n)) for n in node.all_input_nodes}
        if node.op == "output":
            self.known[node] = fx.node.map_arg(node.args[0], lambda n: inputs[n])
            self.left[node] += 1
            return
        value = self._differentiable(node, inputs, call(node, inputs))
        if node in self.changes:
            value = self.changes[node](value)
        if self.left[node] > 0:
            self.known[node] = value

    def _view(self, reader: fx.Node, node: fx.Node, value: Any) -> Any:
        """What a reader sees of a value."""
        changes = self.views.get((reader, node), ())
        for count in range(1, len(changes) + 1):
            key = (node, changes[:count])
            if key not in self._seen:
                self._seen[key] = changes[count - 1](value)
            value = self._seen[key]
        return value

    def _differentiable(self, node: fx.Node, inputs: Mapping[fx.Node, Any], value: Any) -> Any:
        if not torch.is_grad_enabled() or not isinstance(value, Tensor):
            return value
        if node.target is QUANTIZE:
            self._quantized[node] = inputs[node.args[0]]  # type: ignore[index]
        if not value.is_floating_point() or value.requires_grad:
            return value
        source = self._quantized.pop(node.args[0], None) if node.target is DEQUANTIZE else None  # type: ignore[arg-type]
        if source is not None and source.requires_grad:
            return value + (source - source.detach())
        return value.detach().requires_grad_()


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a node computes from the reference's values, beside what the reference has in its place."""

    node: fx.Node
    mine: Any
    theirs: Any
    inputs: Mapping[fx.Node, Any]
    error: Exception | None = None
    """Why the node cannot take the reference's values; `mine` is None then."""


def compared(
    theirs: Values,
    graph: Graph,
    alignment: Alignment,
    feeds: Mapping[str, Tensor],
    weights: Values | None = None,
) -> Iterator[Compared]:
    """Every node that has a counterpart, fed with the counterparts of what it reads; in order of execution.

    So each answers for itself alone, and for nodes between it and its inputs that have no counterpart. `theirs` are
    the values of the reference, with `reads` as `more`. `weights` may lend values of the graph that are worked out
    anyway.
    """
    values, own = alignment.values, Values(graph, feeds)
    failed: dict[fx.Node, Exception] = {}
    for node in graph.nodes:
        inputs = {
            m: _as(theirs(values[m]), m) if m in values else own.known.get(m)
            for m in node.all_input_nodes
        }
        mine = None
        try:
            mine = weights(node) if weights and is_weight(node) else call(node, inputs)
        except Exception as reason:  # whatever an operator says to values that it was not made for
            failed[node] = next((failed[m] for m in inputs if m in failed), reason)
        if node in values:
            other = theirs(values[node])
            error = failed.pop(node, None)
            yield Compared(node=node, mine=mine, theirs=other, inputs=inputs, error=error)
        else:
            own.known[node] = mine
        for m in node.all_input_nodes:
            own.left[m] -= 1
            if own.left[m] <= 0:
                own.known.pop(m, None)


def reads(graph: Graph, alignment: Alignment) -> Counter[fx.Node]:
    """How often `compared` asks for each value of the reference."""
    values = alignment.values
    asked = Counter(values[n] for n in graph.nodes if n in values)
    asked.update(values[m] for n in graph.nodes for m in n.all_input_nodes if m in values)
    return asked


def _as(value: Any, node: fx.Node) -> Any:
    """A value of the reference in the type that a node of the graph has."""
    wanted = getattr(node.meta.get("val"), "dtype", None)
    return value.to(wanted) if isinstance(value, Tensor) and wanted is not None else value
