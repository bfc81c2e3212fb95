"""What two calls do not have in common, in words."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from effc.ir.align import Alignment, Place, arguments, is_weight
from effc.ir.edit import is_constant, tensor_of
from effc.ir.gap import difference, power
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.ir.values import call
from effc.quant.ops import DEQUANTIZE


@dataclass(frozen=True, kw_only=True)
class Differences:
    """Compares calls of a graph with those of its reference."""

    reference: Graph
    graph: Graph
    alignment: Alignment

    def of(self, node: fx.Node) -> tuple[str, Any]:
        """What is not as in the reference, and what other nodes that show the same fault have in common with it."""
        other, value = self.alignment.calls.get(node), self.alignment.values[node]
        if node.target is DEQUANTIZE and other is None:
            gone = self.missing([value])
            return f"{gone[0]} of the reference is not there behind it" if gone else "", None
        if other is None:
            return f"the reference has no such {op_name(node)} in place of {value.name}", None
        if value is not other and (gone := self.missing([value])):
            return f"{', '.join(gone)} of the reference is not there behind it", None
        if node.target is not other.target:
            return f"it is {op_name(node)} where the reference has {op_name(other)}", None
        mine, theirs = arguments(node), arguments(other)
        found, cause = [], None
        for place in sorted(mine.keys() | theirs.keys(), key=str):
            a, b = mine.get(place), theirs.get(place)
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                found.append(self.of_operands(_word(node, place), a, b))
                cause = (a, b) if found[-1] and self.missing([b]) else cause
            elif a != b:
                found.append(f"{_word(node, place)} is {_shown(a)}, not {_shown(b)}")
        if gone := self.missing(other.all_input_nodes):
            found.append(f"{', '.join(gone)} of the reference is not there")
        return "; ".join(text for text in found if text) or "what stands before it differs", cause

    def of_operands(self, word: str, mine: fx.Node, theirs: fx.Node) -> str:
        """How an operand differs; nothing where it does not."""
        a, b = constant(self.graph, mine), constant(self.reference, theirs)
        if a is None and b is None:
            value = self.alignment.values.get(mine, mine)
            is_same = value is theirs or (value.op == "placeholder" and value.name == theirs.name)
            is_known = mine in self.alignment.values or mine.op == "placeholder"
            return f"{word} is {mine}, not {theirs}" if is_known and not is_same else ""
        if a is None or b is None:
            return f"{word} is {mine}, not {theirs}"
        if a.shape != b.shape:
            return f"{word} is {list(a.shape)}, not {list(b.shape)}"
        gap = math.sqrt(power(difference(a, b)) / max(power(b), 1e-300))
        return f"{word} is {gap:.2g} (relative L2) from the reference's" if gap else ""

    def missing(self, nodes: Iterable[fx.Node]) -> list[str]:
        """Those nodes of the reference that nothing in the graph is a rewriting of."""
        there = self._there()
        return [
            n.name for n in nodes if n.op == "call_function" and n not in there and not is_weight(n)
        ]

    def behind(self, node: fx.Node) -> set[fx.Node]:
        """What of the reference a node stands for beside its counterpart: back to what something else stands for."""
        there, todo = self._there(), [self.alignment.values[node]]
        found: set[fx.Node] = set()
        while todo:
            fresh = set(todo.pop().all_input_nodes) - there - found
            found |= fresh
            todo += fresh
        return found

    def _there(self) -> set[fx.Node]:
        """The nodes of the reference that something in the graph is a rewriting of."""
        known = self.alignment
        there = set(known.calls.values())
        return there | {
            o for n, o in known.values.items() if n not in known.calls and n not in known.beside
        }


def constant(graph: Graph, node: fx.Node) -> Tensor | None:
    """The tensor behind a constant or a quantised weight; None for a computed value."""
    if is_constant(graph, node):
        return tensor_of(graph, node)
    if not is_weight(node):
        return None
    value: Tensor = call(node, {n: tensor_of(graph, n) for n in node.all_input_nodes})
    return value


def _word(node: fx.Node, place: Place) -> str:
    """The name of an argument."""
    schema = getattr(node.target, "_schema", None)
    first, *rest = place
    if isinstance(first, int) and schema is not None and first < len(schema.arguments):
        first = schema.arguments[first].name
    return f"{first}{''.join(f'[{i}]' for i in rest)}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
