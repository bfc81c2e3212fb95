"""Parts of a graph that are put right together: the layers of one module, where they are few, or a layer by itself.

A block is the outermost module that holds no more than so many of the layers that count: a residual block, an attention
with its projections, a feed-forward part. It is known from where its nodes were traced, so any graph has blocks. What
leaves a block must not come back into it; a module of which that is not true is taken apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from effc.ir.program import Graph


@dataclass(frozen=True, kw_only=True)
class Block:
    """Nodes of a graph by name, those of them that count as `sites`, and those whose values others read."""

    name: str
    nodes: frozenset[str]
    sites: tuple[str, ...]
    outputs: tuple[str, ...]


def blocks(graph: Graph, sites: Sequence[fx.Node], most: int) -> list[Block]:
    """Blocks of at most `most` sites, which hold every site once, in order of execution."""
    scopes = {node: _scopes(node) for node in graph.nodes}
    counts: dict[str, int] = {}
    for site in sites:
        for path in scopes[site]:
            counts[path] = counts.get(path, 0) + 1
    wanted, found, taken = set(sites), [], set[fx.Node]()
    for site in sites:
        if site in taken:
            continue
        for path in scopes[site]:
            nodes = [node for node in graph.nodes if path in scopes[node]]
            if counts[path] <= most and not taken & set(nodes) and _is_convex(graph, nodes):
                break
        else:
            path, nodes = site.name, [site]
        outputs = tuple(n.name for n in nodes if _leaves(n, nodes))
        mine = [n for n in nodes if n in wanted]
        taken |= set(nodes)
        names = frozenset(n.name for n in nodes)
        found.append(
            Block(name=path, nodes=names, sites=tuple(n.name for n in mine), outputs=outputs)
        )
    place = {node.name: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda block: max(place[name] for name in block.outputs))


def _scopes(node: fx.Node) -> list[str]:
    """Paths of the modules around a node, outermost first, without the whole model."""
    stack = node.meta.get("nn_module_stack") or {}
    return [path for path, _ in stack.values() if path]


def _leaves(node: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    inside = set(nodes)
    value = node.meta.get("val")
    is_number = isinstance(value, Tensor) and value.is_floating_point()
    return is_number and any(user not in inside for user in node.users)


def _is_convex(graph: Graph, nodes: Sequence[fx.Node]) -> bool:
    inside, behind = set(nodes), set[fx.Node]()
    for node in graph.nodes:
        comes = any(n in behind for n in node.all_input_nodes)
        if node in inside:
            if comes:
                return False
        elif comes or any(n in inside for n in node.all_input_nodes):
            behind.add(node)
    return any(_leaves(node, nodes) for node in nodes)


def above(ends: Sequence[fx.Node], stop: frozenset[fx.Node] = frozenset()) -> Iterator[fx.Node]:
    """Nodes that the `ends` hang on, themselves too, in order of execution; what `stop` names is not looked behind."""
    seen, left = set[fx.Node](), list(ends)
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in stop:
            left += node.all_input_nodes
    graph = ends[0].graph
    return (node for node in graph.nodes if node in seen)
