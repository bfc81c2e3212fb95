"""Which node of one graph computes what a node of another does, so that their values can be compared.

Two graphs of one trace share the names of their nodes, whatever passes did in between. Graphs of two traces share
module paths and operators, in order. What neither finds is read off its readers: a node stands for what the counterpart
of its reader reads in its place. So `dequantize(quantize(x))` stands for `x`, a fused norm for the last node of the
pattern, and a convolution with a batch norm folded in for the batch norm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, fx

from effc.ir.edit import is_constant
from effc.ir.program import Graph
from effc.ir.select import module_path, op_name
from effc.quant.ops import DEQUANTIZE, QUANTIZE

CLAMPS = ("relu", "relu_", "relu6", "hardtanh", "clamp")
"""Activations that a grid behind them may take over, because it cuts where they do."""

PASSING = ("dropout", "feature_dropout", "alias", "detach", "to", "clone", "contiguous")
"""Calls that give back what they are given, in evaluation and where the type stays."""

Place = tuple[Any, ...]
"""Where an operand stands among the arguments of a call."""
Nodes = dict[fx.Node, fx.Node]


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a graph lies on a reference. Weights on their way to a layer are part of the layer and have no counterpart.

    `values[node]` is the node of the reference that has the value of `node`; `calls[node]` is the call that was
    rewritten into `node`, whose arguments stand in the same places. They differ where a later node was folded in.
    A node in `beside` is one of several with the same counterpart, or stands for an input: it is that value in the
    eyes of its own readers only.
    """

    values: Nodes
    calls: Nodes
    beside: frozenset[fx.Node]

    def readers(self, node: fx.Node) -> set[fx.Node]:
        """The nodes of the reference that read the counterpart of `node` where this graph reads `node`."""
        value, found = self.values[node], set()
        for user in node.users:
            other = self.calls.get(user)
            if other is not None:
                found |= {other} & value.users.keys()
            elif self.values.get(user, value) is value:
                found |= self._past(user, value)
            else:
                found |= {n for n in value.users if _leads(n, self.values[user])}
        return found

    def _past(self, node: fx.Node, value: fx.Node) -> set[fx.Node]:
        """The same for a node without a counterpart, or with the same."""
        return Alignment(
            values={**self.values, node: value}, calls=self.calls, beside=self.beside
        ).readers(node)


def align(reference: Graph, graph: Graph) -> Alignment:
    """The counterparts of a graph's nodes, as far as there are any."""
    calls = _by_name(reference, graph) or _by_order(reference, graph)
    _drop_other_grids(calls)
    calls[_output(graph)] = _output(reference)
    values = {n: other for n, other in calls.items() if n.op != "output"}
    taken, beside = set(values.values()), set()
    places = _places_of_outputs(reference, graph)
    for node in reversed(list(graph.nodes)):
        wanted = None if is_weight(node) else _wanted(reference, node, calls, values, places)
        if wanted is None or is_constant(reference, wanted):
            continue
        if node not in values:
            if not _same_shape(node, wanted):
                continue
            values[node] = wanted
            if _is_grid(node) or wanted in taken or wanted.op == "placeholder":
                beside.add(node)
                continue
            if op_name(node) == op_name(wanted):
                calls[node] = wanted
        elif wanted not in taken and _is_behind(reference, values[node], _itself(wanted)):
            values[node] = wanted
        taken.add(values[node])
    return Alignment(values=values, calls=calls, beside=frozenset(beside))


def _leads(node: fx.Node, end: fx.Node) -> bool:
    """Whether `end` is computed from `node`."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        if node is end:
            return True
        fresh = node.users.keys() - seen
        seen |= fresh
        todo += fresh
    return False


def operands(node: fx.Node) -> dict[Place, fx.Node]:
    """Every node that a call reads, by its place among the arguments."""
    return {place: v for place, v in arguments(node).items() if isinstance(v, fx.Node)}


def arguments(node: fx.Node) -> dict[Place, Any]:
    """Every argument of a call by its place, those inside lists too."""
    return dict(_walk(node.args, ())) | dict(_walk(node.kwargs, ()))


def _walk(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, (*place, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _walk(item, (*place, index))
    else:
        yield place, value


def computed(graph: Graph) -> list[fx.Node]:
    """The nodes that compute something from a graph's inputs."""
    inputs = {str(name) for name in graph.exported.graph_signature.user_inputs}
    found = {n: None for n in graph.fx.nodes if n.name in inputs}
    first = len(found)
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found[node] = None
    return list(found)[first:]


def is_weight(node: fx.Node) -> bool:
    """Whether a node dequantises codes that are stored, not computed."""
    return node.target is DEQUANTIZE and _first(node).op == "placeholder"


def _by_name(reference: Graph, graph: Graph) -> Nodes:
    """Nodes of one trace: the same name, and the very record of modules that the trace made."""
    theirs = {n.name: n for n in reference.nodes}
    return {
        n: theirs[n.name]
        for n in graph.nodes
        if n.name in theirs
        and n.meta.get("nn_module_stack") is not None
        and n.meta["nn_module_stack"] is theirs[n.name].meta.get("nn_module_stack")
    }


def _by_order(reference: Graph, graph: Graph) -> Nodes:
    """Nodes of two traces: the longest runs of the same modules and operators."""
    sides = [list(reference.nodes), list(graph.nodes)]
    keys = [[(module_path(n), op_name(n)) for n in side] for side in sides]
    blocks = SequenceMatcher(None, keys[0], keys[1], autojunk=False).get_matching_blocks()
    return {
        sides[1][block.b + i]: sides[0][block.a + i] for block in blocks for i in range(block.size)
    }


def _drop_other_grids(calls: Nodes) -> None:
    """A grid is that of the reference only where it lies on the same value."""
    for node, other in list(calls.items()):
        if node.target not in (QUANTIZE, DEQUANTIZE):
            continue
        x = _first(node)
        same = (
            x.name == _first(other).name if x.op == "placeholder" else calls.get(x) is _first(other)
        )
        if is_weight(node) or other.target is not node.target or not same:
            del calls[node]


def _first(node: fx.Node) -> fx.Node:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def _output(graph: Graph) -> fx.Node:
    output: fx.Node
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    return output


def _places_of_outputs(reference: Graph, graph: Graph) -> dict[Place, Place]:
    """By the place of an output here, its place in the reference."""
    theirs = {name: (0, i) for i, name in enumerate(reference.outputs)}
    return {(0, i): theirs[name] for i, name in enumerate(graph.outputs) if name in theirs}


def _wanted(
    reference: Graph, node: fx.Node, calls: Nodes, values: Nodes, outputs: dict[Place, Place]
) -> fx.Node | None:
    """What the counterparts of a node's readers read in its place; None where that is not clear.

    Where they read different things, what is made of the node's own call in the reference goes before what is not.
    """
    found: Counter[fx.Node] = Counter()
    for reader in node.users:
        other = calls.get(reader)
        if other is None and reader.target is QUANTIZE:
            found.update(_before_grid(node, values[d]) for d in reader.users if d in values)
        if other is None or op_name(other) != op_name(reader):
            continue
        theirs, is_output = operands(other), reader.op == "output"
        for place, operand in operands(reader).items():
            place = outputs.get(place, ()) if is_output else place
            if operand is node and place in theirs:
                found[theirs[place]] += 1
    if len(found) < 2:
        return next(iter(found), None)
    source = _first(_first(node)) if _is_grid(node) else node
    own = calls.get(source, source)
    near = [n for n in found if n is own or _is_behind(reference, own, n)]
    if len(near) == 1:
        return near[0]
    (most, votes), (_, others) = found.most_common(2)
    return None if node in values or votes == others else most


def _is_grid(node: fx.Node) -> bool:
    return node.target is DEQUANTIZE and _first(node).target is QUANTIZE


def _before_grid(node: fx.Node, other: fx.Node) -> fx.Node:
    """What a node stands for whose grid stands for `other`: a grid may be the activation too."""
    if op_name(other) in CLAMPS and op_name(node) != op_name(other):
        return _first(other)
    return other


def _same_shape(node: fx.Node, other: fx.Node) -> bool:
    mine, theirs = node.meta.get("val"), other.meta.get("val")
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return False
    if mine.is_floating_point() != theirs.is_floating_point():
        return False  # codes are no numbers
    fixed = [
        (a, b) for a, b in zip(mine.shape, theirs.shape, strict=False)
        if isinstance(a, int) and isinstance(b, int)
    ]  # fmt: skip
    return mine.dim() == theirs.dim() and all(a == b for a, b in fixed)


def _itself(node: fx.Node) -> fx.Node:
    """The node whose very value a node passes on."""
    while op_name(node) in PASSING and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if getattr(source.meta.get("val"), "dtype", None) != getattr(
            node.meta["val"], "dtype", None
        ):
            break
        node = source
    return node


def _is_behind(reference: Graph, node: fx.Node, later: fx.Node) -> bool:
    """Whether `later` reads `node`, or is made of it and constants alone, as a batch norm behind a convolution is."""
    if later is node:
        return False
    if any(_itself(n) is node for n in later.all_input_nodes):
        return True
    for _ in range(4):
        computed = [n for n in later.all_input_nodes if not is_constant(reference, n)]
        if len(computed) != 1:
            return False
        (later,) = computed
        if later is node:
            return True
    return False
