"""Scales of a calibration cache as quantise and dequantise nodes in front of the layers that have integer kernels.

What TensorRT did with a cache by itself: int8 without a zero point, one scale for what a layer reads, and one for each
output channel of its weight, whose range is its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.backends.onnx_match import constant, initializer

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """How many layers read codes, and those that could and whose input has no scale in the cache."""

    layers: int
    without_scale: tuple[str, ...]


def is_quantised(graph: ir.Graph) -> bool:
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.all_nodes())


def quantise(
    model: ir.Model, scales: Mapping[str, float], wanted: Callable[[ir.Node], bool]
) -> Quantised:
    """Put grids on what layers with a constant weight read, where the cache has a scale for it."""
    graph = model.graph
    made: dict[ir.Value, ir.Value] = {}
    layers, without = 0, []
    for node in list(graph):
        value, weight = (*node.inputs, None, None)[:2]
        array = constant(weight)
        if node.op_type not in LAYERS or node.domain or value is None or array is None:
            continue
        if (
            array.dtype != np.float32
            or array.ndim < 2
            or constant(value) is not None
            or not wanted(node)
        ):
            continue
        if (value.name or "") not in scales:
            without.append(node.name or node.op_type)
            continue
        if value not in made:
            made[value] = _grid(graph, node, value, scales[value.name or ""])
        node.replace_input_with(0, made[value])
        assert weight is not None
        node.replace_input_with(1, _weight(graph, node, weight, array))
        layers += 1
    return Quantised(layers=layers, without_scale=tuple(without))


def _grid(graph: ir.Graph, before: ir.Node, value: ir.Value, scale: float) -> ir.Value:
    step = initializer(graph, f"{value.name}.scale", np.array(scale, np.float32))
    zero = initializer(graph, f"{value.name}.zero", np.array(0, np.int8))
    quantize = ir.node("QuantizeLinear", [value, step, zero], name=f"{value.name}.quantize")
    quantize.outputs[0].name = f"{value.name}.codes"
    quantize.outputs[0].type, quantize.outputs[0].shape = (
        ir.TensorType(ir.DataType.INT8),
        value.shape,
    )
    graph.insert_before(before, quantize)
    return _dequantized(before, quantize.outputs[0], step, zero, value)


def _dequantized(
    before: ir.Node, codes: ir.Value, step: ir.Value, zero: ir.Value, like: ir.Value, **axis: int
) -> ir.Value:
    node = ir.node(
        "DequantizeLinear", [codes, step, zero], attributes=axis, name=f"{like.name}.dequantize"
    )
    made = node.outputs[0]
    made.name, made.type, made.shape = (
        f"{like.name}.dequantized",
        ir.TensorType(ir.DataType.FLOAT),
        like.shape,
    )
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return made


def channel_axis(node: ir.Node, dims: int) -> int:
    """The axis of a weight that its outputs lie along."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        return 0
    return dims - 1


def _weight(graph: ir.Graph, node: ir.Node, weight: ir.Value, array: Array) -> ir.Value:
    """The weight as codes of int8, with a scale for every output channel where it is a table or a kernel."""
    axis = channel_axis(node, array.ndim)
    title = f"{weight.name}.{axis}"
    is_table = node.op_type != "MatMul" or array.ndim == 2
    others = tuple(n for n in range(array.ndim) if n != axis) if is_table else None
    most = np.abs(array).max(axis=others, keepdims=is_table)
    scale = (np.where(most > 0, most, 1) / 127).astype(np.float32)
    codes = np.clip(np.rint(array / scale), -127, 127).astype(np.int8)
    step = initializer(
        graph, f"{title}.scale", scale.reshape(-1) if is_table else scale.reshape(())
    )
    zero = initializer(
        graph, f"{title}.zero", np.zeros(step.shape.numpy() if step.shape else (), np.int8)
    )
    held = initializer(graph, f"{title}.codes", codes)
    return _dequantized(node, held, step, zero, weight, **({"axis": axis} if is_table else {}))
