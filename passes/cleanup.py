"""Exact clean-up: what an exported graph carries that an engine does not need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from effc.ir.edit import insert, is_constant, lift, replace, tensor_name, tensor_of
from effc.ir.program import Graph, Origin
from effc.ir.select import op_name
from effc.ir.show import shape_words
from effc.passes.base import Pass, Stats
from effc.quant import ops

aten = torch.ops.aten

_INT_MAX = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class DropNoops(Pass):
    """Removes metadata asserts, dropout in evaluation, casts to the type a value has, slices of everything."""

    name = "drop-noops"

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        changed = 0
        for node in list(graph.nodes):
            if op_name(node) in (
                "_assert_tensor_metadata",
                "_assert_scalar",
                "sym_constrain_range",
            ):
                graph.fx.erase_node(node)
                changed += 1
            elif _is_noop(node):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                if not _is_output(node) or source.op == "call_function":
                    replace(graph, node, source)
                    changed += 1
        return changed


def _is_output(node: fx.Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_noop(node: fx.Node) -> bool:
    """Whether a call gives back its first argument unchanged."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    same_type = before.dtype == after.dtype
    match op_name(node):
        case "dropout" | "feature_dropout" | "alpha_dropout":
            return not (len(node.args) > 2 and node.args[2])
        case "to" | "_to_copy" | "type_as" | "detach" | "alias" | "lift_fresh_copy":
            return same_type  # not `contiguous` or `clone`: a later `view` may need the layout that they make
        case "add" | "sub":
            return same_type and node.args[1] in (0, 0.0) and not node.kwargs
        case "mul" | "div":
            return same_type and node.args[1] in (1, 1.0) and not node.kwargs
        case "slice":
            start, end = (*node.args[2:4], None, None)[:2]
            step = node.args[4] if len(node.args) > 4 else 1
            return start in (0, None) and end in (_INT_MAX, None) and step in (1,)
        case "expand" | "view" | "reshape" | "_unsafe_view":
            return same_type and _same_shape(before, after)
    return False


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return len(a.shape) == len(b.shape) and all(
        str(x) == str(y) for x, y in zip(a.shape, b.shape, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class SimplifyMask(Pass):
    """Writes `mask[arange(b)[:, None, None, None], arange(s)]` as `mask[:, None, None, :]`: same values, no gather."""

    name = "simplify-mask"

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        changed = 0
        for node in list(graph.nodes):
            places = _whole_axes(graph, node)
            if places is None:
                continue
            value = node.args[0]
            assert isinstance(value, fx.Node)
            for axis in range(node.meta["val"].dim()):
                if axis not in places:
                    value = insert(graph, node, aten.unsqueeze.default, (value, axis))
            replace(graph, node, value)
            changed += 1
        return changed


def _whole_axes(graph: Graph, node: fx.Node) -> list[int] | None:
    """For an index by whole ranges, where each axis of the indexed tensor goes; None for any other node."""
    if op_name(node) != "index" or not isinstance(node.args[0], fx.Node):
        return None
    sizes, indices = shape_words(graph, node.args[0].meta["val"].shape), node.args[1]
    if not isinstance(indices, list | tuple) or len(indices) != len(sizes):
        return None
    places = []
    dimensions = node.meta["val"].dim()
    for axis, index in enumerate(indices):
        if not isinstance(index, fx.Node) or not _is_range(graph, index, sizes[axis]):
            return None
        shape = index.meta["val"].shape
        wide = [i for i, size in enumerate(shape) if str(size) != "1"]
        if len(wide) != 1:
            return None
        places.append(wide[0] + dimensions - len(shape))
    return places if places == sorted(set(places)) else None


def _is_range(graph: Graph, node: fx.Node, size: str) -> bool:
    """Whether a node holds 0 … size − 1, axes of 1 aside."""
    while op_name(node) in ("unsqueeze", "view", "reshape") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    if op_name(node) != "arange" or len(node.args) != 1:
        return False
    return shape_words(graph, node.meta["val"].shape) == [size]


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Computes once what depends on tensors of the model alone. Never folds a quantised weight back to float."""

    name = "fold-constants"
    max_growth_bytes: int = 1 << 20
    """A fold whose result is larger than its inputs by more than this is left to run time."""

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        changed = 0
        for node in list(graph.nodes):
            inputs = node.all_input_nodes
            if not inputs or not all(is_constant(graph, n) for n in inputs):
                continue
            if node.target in (ops.QUANTIZE, ops.DEQUANTIZE) or not _is_pure(node):
                continue
            shape = node.meta.get("val")
            if not isinstance(shape, Tensor) or not all(isinstance(s, int) for s in shape.shape):
                continue
            tensors = [tensor_of(graph, n) for n in inputs]
            if any(t.dtype in (torch.int8, torch.uint8) for t in tensors):
                continue  # codes of a quantised weight
            grown = shape.numel() * shape.element_size() - sum(
                t.numel() * t.element_size() for t in tensors
            )
            if grown > self.max_growth_bytes:
                continue
            _fold(graph, node)
            changed += 1
        return changed


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _fold(graph: Graph, node: fx.Node) -> None:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: tensor_of(graph, n))
    assert callable(node.target)
    with torch.no_grad():
        value = node.target(*args, **kwargs)
    names = [tensor_name(graph, n) or "" for n in node.all_input_nodes]
    first = graph.origins[names[0]]
    word = f"{op_name(node)}({', '.join(names[1:])})" if names[1:] else op_name(node)
    origin = Origin(first.source, (*first.transforms, word))
    placeholder = lift(graph, f"{names[0]}.{op_name(node)}", value.contiguous().clone(), origin)
    replace(graph, node, placeholder)
