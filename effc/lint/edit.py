"""Edits that change no number: each is made when a rule finds its place, and done when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.backends.onnx_match import constant, initializer
from effc.lint.view import DQ, Array, Grid, readers

Edit = Callable[[], None]


def replace(old: ir.Value, new: ir.Value) -> Edit:
    """Let all that read one value read the other."""

    def edit() -> None:
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
            return
        alias = ir.node("Identity", [new], name=f"{old.name}.alias")
        where = old.producer()
        assert where is not None and where.graph is not None
        where.graph.insert_after(where, alias)
        _take_over(old, alias.outputs[0])

    return edit


def _take_over(old: ir.Value, new: ir.Value) -> None:
    new.type, new.shape = old.type, old.shape
    title, old.name = old.name, f"{old.name}_gone"
    new.name = title
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def fresh(graph: ir.Graph, stem: str, array: Array) -> ir.Value:
    """A new initialiser, under a name that nothing has."""
    taken = {v.name for node in graph.all_nodes() for v in node.outputs}
    title, number = stem, 0
    while title in graph.initializers or title in taken:
        title, number = f"{stem}.{number}", number + 1
    return initializer(graph, title, array)


def put(
    before: ir.Node, kind: str, inputs: Sequence[ir.Value | None], **attributes: Any
) -> ir.Value:
    """A new node of one output in front of another."""
    graph = before.graph
    assert graph is not None
    node = ir.node(kind, list(inputs), attributes=attributes)
    stem = f"{before.name or before.op_type}.{kind}"
    taken = {v.name for n in graph for v in n.outputs}
    number = 0
    while f"{stem}.{number}" in taken:
        number += 1
    node.name = node.outputs[0].name = f"{stem}.{number}"
    graph.insert_before(before, node)
    return node.outputs[0]


def store_codes(graph: ir.Graph, node: ir.Node, array: Array, grid: Grid) -> Edit:
    """Put the codes of a constant in the place of the node that makes them: rounded half to even, and clipped."""

    def edit() -> None:
        assert grid.scale is not None and grid.zero is not None and grid.kind is not None
        info = np.iinfo(grid.kind.numpy())
        scale, zero = (spread(part, array.ndim, grid.axis) for part in (grid.scale, grid.zero))
        rounded = np.rint(array.astype(np.float32) / scale.astype(np.float32))
        made = np.clip(rounded + zero, info.min, info.max).astype(grid.kind.numpy())
        value = fresh(graph, f"{node.outputs[0].name}.codes", made)
        node.outputs[0].replace_all_uses_with(value)

    return edit


def spread(array: Array, rank: int, axis: int) -> Array:
    """Scales or zero points in a shape that broadcasts over a tensor of that rank."""
    if array.size == 1:
        return array.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return array.reshape(shape)


def sum_for_add(node: ir.Node) -> Edit:
    """Write an addition as `Sum`: the same arithmetic, which no optimiser takes into the product in front."""

    def edit() -> None:
        node.op_type = "Sum"

    return edit


def bias_behind(graph: ir.Graph, node: ir.Node, bias: Array) -> Edit:
    """Take the bias out of a Gemm and add it behind, in float."""

    def edit() -> None:
        made = node.outputs[0]
        node.replace_input_with(2, None)
        value = fresh(graph, f"{node.name}.bias", bias.astype(np.float32))
        add = ir.node("Add", [made, value], name=f"{node.name}.add")
        assert node.graph is not None
        node.graph.insert_after(node, add)
        uses = [use for use in made.uses() if use.node is not add]
        inner, outer = made, add.outputs[0]
        outer.type, outer.shape = inner.type, inner.shape
        if inner.is_graph_output():
            assert isinstance(node.graph, ir.Graph)
            place = list(node.graph.outputs).index(inner)
            node.graph.outputs[place] = outer
        title = inner.name
        inner.name, outer.name = f"{title}.without_bias", title
        for use in uses:
            use.node.replace_input_with(use.idx, outer)

    return edit


def float_constant(graph: ir.Graph, value: ir.Value, array: Array) -> Edit:
    """Put a constant in float in the place of a dequantised one."""

    def edit() -> None:
        made = fresh(graph, f"{value.name}.float", array.astype(np.float32))
        value.replace_all_uses_with(made)

    return edit


def shift(graph: ir.Graph, pair: Sequence[ir.Node], by: int) -> Edit:
    """Move the zero points of quantise, clip and dequantise nodes by 128, and the codes with them."""
    kind = np.uint8 if by > 0 else np.int8

    def edit() -> None:
        for node in pair:
            place, last = (2, 2) if node.op_type != "Clip" else (1, 2)
            for number in range(place, last + 1):
                value = node.inputs[number] if len(node.inputs) > number else None
                old = constant(value) if value is not None else np.zeros((), np.int64)
                assert old is not None
                new = (old.astype(np.int64) + by).astype(kind)
                made = fresh(graph, f"{node.name}.point", new)
                if len(node.inputs) <= number:
                    node.resize_inputs(number + 1)
                node.replace_input_with(number, made)
            for output in node.outputs:
                if node.op_type != DQ:
                    output.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(kind)))

    return edit


def shift_weight(graph: ir.Graph, node: ir.Node, array: Array, by: int) -> Edit:
    """The same for constant codes, which become other ones."""
    kind = np.uint8 if by > 0 else np.int8

    def edit() -> None:
        codes = (array.astype(np.int64) + by).astype(kind)
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else np.zeros((), np.int64)
        assert zero is not None
        made = fresh(graph, f"{node.name}.codes", codes)
        point = fresh(graph, f"{node.name}.point", (zero.astype(np.int64) + by).astype(kind))
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(0, made)
        node.replace_input_with(2, point)

    return edit


def widen_codes(graph: ir.Graph, node: ir.Node) -> Edit:
    """Let a dequantise node read codes of 4 bit through a cast to 8, which a runtime does when the file is opened."""

    def edit() -> None:
        value = node.inputs[0]
        assert value is not None and value.dtype is not None
        is_signed = value.dtype == ir.DataType.INT4
        wide = ir.DataType.INT8 if is_signed else ir.DataType.UINT8
        made = put(node, "Cast", [value], to=int(wide))
        made.type, made.shape = ir.TensorType(wide), value.shape
        zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        node.replace_input_with(0, made)
        if zero is not None:
            point = zero.astype(np.int64).astype(wide.numpy())
            node.replace_input_with(2, fresh(graph, f"{node.name}.point", point))

    return edit


def codes_together(graph: ir.Graph, concat: ir.Node, pairs: Sequence[ir.Node]) -> Edit:
    """Concatenate codes of one grid, and dequantise once behind."""

    def edit() -> None:
        first = pairs[0]
        made = concat.outputs[0]
        axis = concat.attributes.get_int("axis", 0)
        joined = put(concat, "Concat", [p.inputs[0] for p in pairs], axis=axis)
        codes = pairs[0].inputs[0]
        assert codes is not None
        joined.type = codes.type
        wide = put(concat, DQ, [joined, *first.inputs[1:]])
        uses = readers(made)
        assert uses or made.is_graph_output()
        _take_over(made, wide)

    return edit
