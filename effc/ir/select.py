"""Which call sites a pass may touch: by operator, by the path and by the class of the module they came from.

Words are shell patterns: `op: linear`, `module: "encoder.layer.*"`, `type: "*Attention"`. A site that matches any of
`exclude` (module patterns) is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import fx

from effc.ir.program import Graph

Words = str | tuple[str, ...]


def op_name(node: fx.Node) -> str:
    """`linear` for `aten.linear.default`, `quantize` for `effc.quantize.default`."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__) if packet else str(getattr(node.target, "__name__", node.target))


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that the node was traced in, `encoder.layer.0.output.dense`."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def module_type(node: fx.Node) -> str:
    """Class name of that module, `Linear`."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    kind = list(stack.values())[-1][1]
    return str(kind).rpartition(".")[2] if isinstance(kind, str) else str(kind.__name__)


def module_types(node: fx.Node) -> list[str]:
    """Class names of all modules around the node, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    kinds = [entry[1] for entry in stack.values()]
    return [k.rpartition(".")[2] if isinstance(k, str) else k.__name__ for k in kinds]


@dataclass(frozen=True, kw_only=True)
class Select:
    """A choice of sites. Every word given must match; a list matches where one of it does."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    op: Words = "*"
    module: Words = "*"
    type: Words = "*"
    exclude: Words = ()

    def matches(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return False
        path = module_path(node)
        if any(fnmatchcase(path, word) for word in _words(self.exclude)):
            return False
        return (
            _any(op_name(node), self.op)
            and _any(path, self.module)
            and (self.type == "*" or any(_any(kind, self.type) for kind in module_types(node)))
        )

    def sites(self, graph: Graph) -> list[fx.Node]:
        return [node for node in graph.nodes if self.matches(node)]


def _words(words: Words) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else tuple(words)


def _any(text: str, words: Words) -> bool:
    return any(fnmatchcase(text, word) for word in _words(words))


def site_names(graph: Graph) -> dict[fx.Node, str]:
    """A name for every node that stays the same from trace to trace: module path, operator, number.

    `encoder.layer.0.output.dense`, or `encoder.layer.0:add` and `encoder.layer.0:add.1` where a module runs more
    than its one layer.
    """
    names: dict[fx.Node, str] = {}
    taken: dict[str, int] = {}
    for node in graph.nodes:
        path, word = module_path(node), op_name(node)
        is_layer = word in ("linear", "conv1d", "conv2d", "embedding")
        stem = path if path and is_layer else f"{path}:{word}" if path else word
        count = taken.get(stem, 0)
        taken[stem] = count + 1
        names[node] = f"{stem}.{count}" if count else stem
    return names


def value_key(graph: Graph, names: dict[fx.Node, str], node: fx.Node) -> str:
    """What decisions about a value stand under, the same from trace to trace; `names` are the graph's `site_names`."""
    return f"{graph.role}/{names.get(node, node.name)}"
