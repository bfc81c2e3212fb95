"""Rules of OpenVINO's CPU plugin. Each was tried on 2026.4: layers and types of the compiled model, and its numbers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from effc.backends.onnx_match import constant
from effc.lint import edit
from effc.lint.rule import ERROR, OPENVINO, WARNING, Hit, rule
from effc.lint.view import (
    EIGHT,
    FOUR,
    Array,
    Q,
    activation,
    behind,
    codes,
    given,
    grid,
    name,
    nodes,
    readers,
    sizes,
    weight,
)


def _zeros(node: ir.Node) -> Array | None:
    """Zero points that are not 0; None where all are, or they are not known."""
    zero = grid(node).zero
    return zero[zero != 0] if zero is not None and zero.any() else None


def middle(graph: ir.Graph, node: ir.Node) -> edit.Edit | None:
    """Make constant codes of uint8 around 128 codes of int8 around 0; None where they are not such."""
    zero, array = grid(node).zero, constant(node.inputs[0])
    if grid(node).kind != ir.DataType.UINT8 or zero is None or array is None:
        return None
    is_alone = len(readers(node.inputs[0])) == 1 if node.inputs[0] is not None else False
    return edit.shift_weight(graph, node, array, -128) if (zero == 128).all() and is_alone else None


@rule(
    "OV001", WARNING, OPENVINO,
    what="the weight of a layer has a zero point, beside activations of 8 bit",
    cost="a convolution runs in float; a product dequantises its activations and uses the weight alone",
    fix="a symmetric weight; of uint8 around 128 the same codes as int8 around 0",
)  # fmt: skip
def weight_zero_point(graph: ir.Graph) -> Iterator[Hit]:
    seen: set[ir.Node] = set()
    for node in nodes(graph, "MatMul", "Gemm", "Conv", "ConvTranspose"):
        dq = weight(given(node, 1)) if activation(given(node, 0)) is not None else None
        if dq is None or dq in seen or grid(dq).kind not in EIGHT or (off := _zeros(dq)) is None:
            continue
        seen.add(dq)
        evidence = f"zero point {int(off.flat[0])} of {str(grid(dq).kind).lower()}"
        yield Hit(node=node, tensor=name(codes(dq)), evidence=evidence, repair=middle(graph, dq))


@rule(
    "OV002", WARNING, OPENVINO,
    what="a concatenation of values on unlike grids in front of a convolution of codes",
    cost="the convolution runs in float",
    fix="calibrate both for one grid, or quantise what comes out",
)  # fmt: skip
def unlike_halves(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Concat"):
        pairs = [activation(value) for value in node.inputs]
        if len(pairs) < 2 or None in pairs:
            continue
        found = [p for p in pairs if p is not None]
        layers = [n for n in readers(node.outputs[0]) if n.op_type in ("Conv", "ConvTranspose")]
        scales = [grid(p).scale for p in found]
        if (
            layers
            and not all(grid(p).same(grid(found[0])) for p in found)
            and not any(s is None for s in scales)
        ):
            evidence = ", ".join(f"{s.flat[0]:g}" for s in scales[:4] if s is not None)
            yield Hit(node=node, tensor=name(node.outputs[0]), evidence=f"scales {evidence}")


@rule(
    "OV003", ERROR, OPENVINO,
    what="the activations of a layer have a scale per channel or per row, as a constant",
    cost="the model is not compiled",
    fix="calibrate one scale for the tensor",
)  # fmt: skip
def activation_axis(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, Q):
        scale = grid(node).scale
        array = node.inputs[0]
        if scale is None or scale.size < 2 or array is None or constant(array) is not None:
            continue
        if grid(node).axis % max(len(sizes(array)), 1) != 1:
            evidence = f"{scale.size} scales along axis {grid(node).axis}"
            yield Hit(node=node, tensor=name(node.inputs[1]), evidence=evidence)


@rule(
    "OV004", WARNING, OPENVINO,
    what="a product of integers on ranges that are found as it runs",
    cost="a dozen nodes, and the product in float",
    fix="static ranges, or a weight of codes and activations in float: the plugin rounds those by itself",
)  # fmt: skip
def dynamic_ranges(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMulInteger", "ConvInteger"):
        made = behind(node.inputs[0], "DynamicQuantizeLinear")
        evidence = f"{name(node.inputs[0])} is of {made.name}" if made else "codes of its own"
        yield Hit(node=node, tensor=name(node.outputs[0]), evidence=evidence)


@rule(
    "OV005", ERROR, OPENVINO,
    what="a weight in blocks along its output channels",
    cost="the file is refused, with sizes that do not fit",
    fix="blocks along the axis that is summed over",
)  # fmt: skip
def turned_blocks(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul"):
        dq = weight(given(node, 1))
        if dq is None or not grid(dq).block:
            continue
        is_turned = behind(given(node, 1), "Transpose") is not None
        if grid(dq).axis % 2 != (1 if is_turned else 0):
            evidence = f"blocks of {grid(dq).block} along axis {grid(dq).axis % 2}"
            yield Hit(node=node, tensor=name(codes(dq)), evidence=evidence)


@rule(
    "OV006", WARNING, OPENVINO,
    what="a product of two activations of which one has a zero point",
    cost="it runs in float, and both are dequantised for it",
    fix="int8 without a zero point for both",
)  # fmt: skip
def two_activations(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul"):
        left, right = activation(given(node, 0)), activation(given(node, 1))
        if left is None or right is None:
            continue
        found = [p for p in (left, right) if _zeros(p) is not None]
        if found:
            point = int(grid(found[0]).zero.flat[0])  # type: ignore[union-attr]
            yield Hit(
                node=node, tensor=name(found[0].inputs[0]), evidence=f"zero point {point}",
            )  # fmt: skip


@rule(
    "OV007", WARNING, OPENVINO,
    what="the weight of a layer has scales along the axis that is summed over, beside activations of 8 bit",
    cost="the layer uses the weight alone or runs in float; of a Gemm the numbers are wrong where it is square",
    fix="quantise the weight again with a scale per output channel",
)  # fmt: skip
def wrong_axis(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul", "Gemm", "Conv"):
        dq = weight(given(node, 1)) if activation(given(node, 0)) is not None else None
        scale = grid(dq).scale if dq is not None else None
        if dq is None or scale is None or scale.size < 2 or grid(dq).block:
            continue
        dims = max(len(sizes(codes(dq))), 1)
        is_turned = behind(given(node, 1), "Transpose") is not None
        is_turned ^= node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        right = 0 if is_turned or node.op_type == "Conv" else dims - 1
        if grid(dq).axis % dims != right:
            evidence = f"axis {grid(dq).axis} of a weight {sizes(codes(dq))}"
            yield Hit(node=node, tensor=name(dq.inputs[1]), evidence=evidence)


@rule(
    "OV008", WARNING, OPENVINO,
    what="a weight of 4 bit beside activations of 8 bit with a zero point",
    cost="the activations are quantised and dequantised for nothing: the layer uses the weight alone",
    fix="take the grid of the activations out, or store the weight in 8 bit",
)  # fmt: skip
def four_bit(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul", "Gemm", "Conv"):
        left, dq = activation(given(node, 0)), weight(given(node, 1))
        if left is None or dq is None or grid(dq).kind not in FOUR:
            continue
        if node.op_type == "Conv" or _zeros(left) is not None or grid(dq).block:
            yield Hit(node=node, tensor=name(codes(dq)), evidence=f"{sizes(codes(dq))}")


@rule(
    "OV009", WARNING, OPENVINO,
    what="a transposed convolution of activations with a zero point",
    cost="it runs in float; of int8 without a zero point it stays on integers",
    fix="int8 without a zero point",
)  # fmt: skip
def transposed(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "ConvTranspose"):
        left = activation(given(node, 0))
        if left is not None and weight(given(node, 1)) is not None and _zeros(left) is not None:
            point = int(grid(left).zero.flat[0])  # type: ignore[union-attr]
            yield Hit(node=node, tensor=name(left.inputs[0]), evidence=f"zero point {point}")
