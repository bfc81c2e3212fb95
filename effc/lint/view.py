"""What rules ask of a graph: its grids, the codes behind them, and the layers that read both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from effc.backends.onnx_match import constant, producer

Array = np.ndarray[Any, Any]
Q, DQ = "QuantizeLinear", "DequantizeLinear"
LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
FOUR = (ir.DataType.INT4, ir.DataType.UINT4)
EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)
SIXTEEN = (ir.DataType.INT16, ir.DataType.UINT16)
_WEIGHTS_THROUGH = ("Transpose", "Cast", "Reshape", "Identity")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Scale and zero point of a quantise or dequantise node; None where they are computed."""

    scale: Array | None
    zero: Array | None
    kind: ir.DataType | None
    axis: int
    block: int

    def same(self, other: Grid) -> bool:
        """Whether both are known and equal."""
        if self.scale is None or other.scale is None or self.zero is None or other.zero is None:
            return False
        return (
            np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero, other.zero)
            and (self.scale.size == 1 or (self.axis, self.block) == (other.axis, other.block))
        )


def grid(node: ir.Node) -> Grid:
    scale = constant(given(node, 1))
    point = given(node, 2)
    zero = constant(point) if point is not None else np.zeros(1, np.int8)
    codes = node.outputs[0] if node.op_type == Q else given(node, 0)
    kind = point.dtype if point is not None and point.dtype is not None else None
    if kind is None and codes is not None:
        kind = codes.dtype
    return Grid(
        scale=scale if scale is None else np.asarray(scale, np.float64),
        zero=zero if zero is None else np.asarray(zero, np.int64),
        kind=kind,
        axis=node.attributes.get_int("axis", 1),
        block=node.attributes.get_int("block_size", 0),
    )


def nodes(graph: ir.Graph, *kinds: str) -> Iterator[ir.Node]:
    """Every node of these kinds, those inside of branches and loops too."""
    for node in graph.all_nodes():
        if not kinds or (node.op_type in kinds and node.domain in ("", "ai.onnx")):
            yield node


def behind(value: ir.Value | None, kind: str, through: Sequence[str] = ()) -> ir.Node | None:
    """The node of a kind that makes a value, other nodes between allowed."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in through and node.op_type != kind:
        value = given(node, 0)
        node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def weight(value: ir.Value | None) -> ir.Node | None:
    """The dequantise node of constant codes behind the weight of a layer."""
    node = behind(value, DQ, ("Transpose",))
    return node if node is not None and codes(node) is not None else None


def activation(value: ir.Value | None) -> ir.Node | None:
    """The dequantise node of computed codes behind what a layer reads."""
    node = producer(value, DQ)
    return node if node is not None and codes(node) is None else None


def codes(node: ir.Node) -> ir.Value | None:
    """The constant codes that a dequantise node reads; None where they are computed."""
    value = given(node, 0)
    while value is not None and value.const_value is None:
        made = value.producer()
        if made is None or (made.op_type not in _WEIGHTS_THROUGH and made.op_type != "Constant"):
            return None
        if made.op_type == "Constant":
            return value
        value = given(made, 0)
    return value


def readers(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def given(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if len(node.inputs) > place else None


def is_quantised_behind(value: ir.Value) -> bool:
    """Whether all that reads a value is one quantise node."""
    found = readers(value)
    return len(found) == 1 and found[0].op_type == Q and not value.is_graph_output()


def name(value: ir.Value | None) -> str:
    return value.name or "" if value is not None else ""


def rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def sizes(value: ir.Value | None) -> list[Any]:
    """The sizes of a value, as far as they are known; [] where not even their number is."""
    return list(value.shape) if value is not None and value.shape is not None else []


def fixed(values: Sequence[Any]) -> bool:
    return all(isinstance(size, int) for size in values)
