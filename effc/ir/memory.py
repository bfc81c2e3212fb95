"""How much memory a graph needs at most while it runs, read from its shapes.

Every value lives from its call to its last reader, as in `calib.calibrator` and in every runtime; a view lives as long
as what it looks at. The largest sum over all calls is what activations need, weights aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from effc.ir.program import Graph


def peak_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Bytes of all activations alive at once, at most, where free dimensions have `sizes` by name.

    A dimension that is not named counts as the size it had in the example. Kernels need room of their own on top.
    """
    known = {symbol: sizes[word] for symbol, word in graph.dims.items() if word in sizes}
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        for used in node.all_input_nodes:
            last[_owner(used)] = node
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        ends.setdefault(reader, []).append(value)
    alive: dict[fx.Node, int] = {}
    peak = total = 0
    for node in graph.fx.nodes:
        if node.op == "call_function" and _owner(node) is node:
            alive[node] = _bytes(node.meta.get("val"), known)
            total += alive[node]
        peak = max(peak, total)
        for value in ends.get(node, ()):
            total -= alive.pop(value, 0)
    return peak


def whole_bytes(graph: Graph, sizes: Mapping[str, int]) -> int:
    """Bytes of all activations together, as who goes back through a graph keeps them."""
    known = {symbol: sizes[word] for symbol, word in graph.dims.items() if word in sizes}
    return sum(
        _bytes(node.meta.get("val"), known)
        for node in graph.fx.nodes
        if node.op == "call_function" and _owner(node) is node
    )


def _owner(node: fx.Node) -> fx.Node:
    """The node whose memory a view looks at; itself for everything else."""
    while _is_view(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node = source
    return node


def _is_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _bytes(value: Any, known: Mapping[str, int]) -> int:
    if isinstance(value, list | tuple):
        return sum(_bytes(item, known) for item in value)
    if not isinstance(value, Tensor):
        return 0
    count = value.element_size()
    for size in value.shape:
        count *= _size(size, known)
    return count


def _size(size: Any, known: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    names = {s: known[str(s)] for s in expression.free_symbols if str(s) in known}
    left = expression.subs(names)
    return int(left) if left.is_number else int(size.node.hint or 1)
