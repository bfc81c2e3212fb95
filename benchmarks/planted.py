"""Faults to plant: small edits of a graph or of an ONNX file, each of which says where it was made."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from effc.ir.edit import insert, insert_after, rebind, replace, tensor_name, tensor_of
from effc.ir.program import Graph
from effc.ir.select import op_name, site_names
from effc.noise import bits_of
from effc.quant.affine import quantize
from effc.quant.ops import DEQUANTIZE
from effc.quant.scheme import Scheme

aten = torch.ops.aten

Plant = Callable[[Graph], fx.Node]
"""Edits a graph, and gives the node that is to be named for it."""
FilePlant = Callable[[ir.Model], ir.Node]
"""The same for an ONNX file."""
How = Callable[[Tensor], Tensor]


def at(graph: Graph, op: str, number: int = 0, path: str = "") -> fx.Node:
    """A node by operator, part of its name, and number."""
    names = site_names(graph)
    return [n for n in graph.nodes if op_name(n) == op and path in names[n]][number]


def change(graph: Graph, node: Any, how: How) -> None:
    """A constant becomes another."""
    name = tensor_name(graph, node)
    assert name is not None, f"{node} is no constant"
    rebind(graph, name, how(tensor_of(graph, node).clone()), "fault")


def set_argument(node: fx.Node, place: int, value: Any) -> fx.Node:
    args = [*node.args, *[None] * (place + 1 - len(node.args))]
    args[place] = value
    node.args = tuple(args)
    return node


def constant(op: str, number: int, place: int, how: How, path: str = "") -> Plant:
    """A constant operand is changed."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, op, number, path)
        change(graph, node.args[place], how)
        return node

    return plant


def weight(op: str, number: int, part: int, how: How, place: int = 1) -> Plant:
    """Codes (0), scale (1) or zero point (2) of a layer's weight (1) or bias (2) are changed."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, op, number)
        change(graph, node.args[place].args[part], how)  # type: ignore[union-attr]
        return node

    return plant


def literal(op: str, number: int, place: int, value: Any, path: str = "") -> Plant:
    return lambda graph: set_argument(at(graph, op, number, path), place, value)


def both(first: Plant, second: Plant) -> Plant:
    def plant(graph: Graph) -> fx.Node:
        first(graph)
        return second(graph)

    return plant


def regridded(exact: Graph, op: str, number: int, factor: float) -> Plant:
    """A weight on a grid with other steps, and codes of the `exact` weight that were made with them."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, op, number)
        codes, scale, zero, axis, group = node.args[1].args  # type: ignore[union-attr]
        name = tensor_name(graph, codes)
        assert name is not None
        weight = exact.tensors()[graph.origins[name].source]
        scheme = Scheme(bits=bits_of(graph, node.args[1]), axis=axis, group=group or None)  # type: ignore[arg-type]
        step = tensor_of(graph, scale) * factor  # type: ignore[arg-type]
        made = quantize(weight, step, tensor_of(graph, zero), scheme)  # type: ignore[arg-type]
        change(graph, scale, lambda _: step)
        change(graph, codes, lambda _: made)
        return node

    return plant


def rescaled(number: int, factor: float) -> Plant:
    """The scale of an attention, which is 1/√size where nothing is said."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, "scaled_dot_product_attention", number)
        size = node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        scale: Any = node.kwargs.get("scale") or size**-0.5
        node.kwargs = {**node.kwargs, "scale": factor * scale}
        return node

    return plant


def target(op: str, number: int, other: Any, path: str = "") -> Plant:
    """Another operator in its place."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, op, number, path)
        node.target = other
        return node

    return plant


def replaced(op: str, number: int, other: Any) -> Plant:
    """A new node of another operator in its place."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, op, number)
        new = insert(graph, node, other, node.args[:1])
        replace(graph, node, new)
        return new

    return plant


def swapped(op: str, number: int, path: str = "") -> Plant:
    """Its two inputs change places."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, op, number, path)
        node.args = (node.args[1], node.args[0], *node.args[2:])
        return node

    return plant


def stale(op: str, number: int, other: int, place: int = 1) -> Plant:
    """The weight, or the bias, of another layer."""

    def plant(graph: Graph) -> fx.Node:
        return set_argument(at(graph, op, number), place, at(graph, op, other).args[place])

    return plant


def along(number: int) -> Plant:
    """The scales of a square weight are laid along its other axis."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, "linear", number)
        set_argument(node.args[1], 3, 1)  # type: ignore[arg-type]
        return node

    return plant


def gone(op: str, number: int, path: str = "", kept: int = 0) -> Plant:
    """A node is left out, and one of its inputs stands in its place."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, op, number, path)
        before, readers = node.args[kept], list(node.users)
        assert isinstance(before, fx.Node)
        alone = len(before.users) == 1
        replace(graph, node, before)
        if not alone:
            return readers[0]
        return before.args[0] if before.target is DEQUANTIZE else before  # type: ignore[return-value]

    return plant


def rewired(op: str, number: int, place: int, source: str, other: int, path: str = "") -> Plant:
    """It reads another value of the same shape."""

    def plant(graph: Graph) -> fx.Node:
        return set_argument(at(graph, op, number, path), place, at(graph, source, other))

    return plant


def inserted(op: str, number: int, *calls: tuple[Any, tuple[Any, ...]], path: str = "") -> Plant:
    """Calls that nobody asked for stand behind a node, and all its readers see them."""

    def plant(graph: Graph) -> fx.Node:
        last = node = at(graph, op, number, path)
        readers = list(node.users)
        for other, args in calls:
            last = insert_after(graph, last, other, (last, *args))
        for reader in readers:
            reader.replace_input_with(node, last)
        return last

    return plant


def flipped_heads(number: int) -> Plant:
    """The keys of an attention are those of other heads."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, "scaled_dot_product_attention", number)
        flipped = insert(graph, node, aten.flip.default, (node.args[1], [1]))
        set_argument(node, 1, flipped)
        return flipped

    return plant


def unmasked(number: int, *, causal: bool) -> Plant:
    """An attention without its mask, or with one that looks back only."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, "scaled_dot_product_attention", number)
        node.args = node.args[:3]
        kept = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal")}
        node.kwargs = {**kept, "is_causal": True} if causal else kept
        return node

    return plant


def one_further(number: int) -> Plant:
    """A slice starts and ends one place later."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, "slice", number)
        start, end = node.args[2:4]
        assert isinstance(start, int)
        is_free = isinstance(end, fx.Node)
        later = insert(graph, node, operator.add, (end, 1)) if is_free else end + 1  # type: ignore[operator]
        node.args = (*node.args[:2], start + 1, later)
        return node

    return plant


def looked_up(part: int, how: How) -> Plant:
    """Codes (0) or scales (1) of a quantised table; what is read from it is named."""

    def plant(graph: Graph) -> fx.Node:
        table = at(graph, "embedding", part)
        value: Any = table.args[0]
        change(graph, value if part == 0 else value.args[0], how)
        return at(graph, "mul", 0)

    return plant


def grid(number: int, part: int, how: How) -> Plant:
    """Scale (1) or zero point (2) of a grid on activations."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, "quantize", number)
        change(graph, node.args[part], how)
        return node

    return plant


def cut_range(number: int) -> Plant:
    return lambda graph: set_argument(at(graph, "quantize", number), 4, 127)


def read_otherwise(number: int, factor: float) -> Plant:
    """Codes are read with another scale than they were written with."""

    def plant(graph: Graph) -> fx.Node:
        node = at(graph, "quantize", number)
        (reader,) = node.users
        scale = insert(graph, reader, aten.mul.Tensor, (reader.args[1], factor))
        set_argument(reader, 1, scale)
        return node

    return plant


def shifted(by: int) -> How:
    def shift(zero: Tensor) -> Tensor:
        info = torch.iinfo(zero.dtype)
        return (zero.int() + by).clamp(info.min, info.max).to(zero.dtype)

    return shift


def times(factor: float) -> How:
    return lambda t: t * factor


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous()


def first_row(factor: float) -> How:
    return lambda t: torch.cat([t[:1] * factor, t[1:]])


# --- ONNX files -------------------------------------------------------------------------------------------------------


def in_file(model: ir.Model, op: str, number: int = 0) -> ir.Node:
    return [n for n in model.graph if n.op_type == op][number]


def tensor(
    op: str, number: int, place: int, how: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> FilePlant:
    """One node reads another constant; who else reads the old one still does."""

    def plant(model: ir.Model) -> ir.Node:
        node = in_file(model, op, number)
        old = node.inputs[place]
        assert old is not None and old.const_value is not None
        array = np.ascontiguousarray(how(old.const_value.numpy().copy()))
        name = f"{old.name}.fault"
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=old.type,
            const_value=ir.tensor(array, name=name, dtype=old.const_value.dtype),
        )  # fmt: skip
        model.graph.register_initializer(value)
        node.replace_input_with(place, value)
        return node

    return plant


def attribute(op: str, number: int, **values: Any) -> FilePlant:
    def plant(model: ir.Model) -> ir.Node:
        node = in_file(model, op, number)
        for name, value in values.items():
            node.attributes[name] = ir.convenience.convert_attribute(name, value)
        return node

    return plant


def file_swapped(op: str, number: int, first: int = 0, second: int = 1) -> FilePlant:
    def plant(model: ir.Model) -> ir.Node:
        node = in_file(model, op, number)
        a, b = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, b)
        node.replace_input_with(second, a)
        return node

    return plant


def file_rewired(op: str, number: int, place: int, source: str, other: int) -> FilePlant:
    """It reads what another node computes, or a constant of another node of its kind."""

    def plant(model: ir.Model) -> ir.Node:
        node = in_file(model, op, number)
        giver = in_file(model, source, other)
        node.replace_input_with(place, giver.inputs[place] if source == op else giver.outputs[0])
        return node

    return plant


def file_op(op: str, number: int, other: str) -> FilePlant:
    """Another operator in its place."""

    def plant(model: ir.Model) -> ir.Node:
        node = in_file(model, op, number)
        node.op_type = other
        node.attributes.clear()
        return node

    return plant
