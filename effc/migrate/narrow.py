"""A graph in float32 as one whose layers compute in 16 bit: casts where the two meet, and nothing left to a builder.

A node goes into 16 bit where the standard lets all that it reads and gives be of that type together, and where it is
not one of those whose sums or powers leave the range of 16 bit (`WIDE`). Weights are stored in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from effc.backends.onnx_match import constant

FLOAT = ir.DataType.FLOAT
KINDS = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
WIDE = frozenset(
    {
        "Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization", "GroupNormalization",
        "InstanceNormalization", "MeanVarianceNormalization", "LpNormalization", "BatchNormalization",
        "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceLogSum",
        "ReduceLogSumExp", "Exp", "Log", "Pow", "Reciprocal", "Sqrt", "CumSum", "Softplus", "GlobalAveragePool",
        "Range",
    }
)  # fmt: skip
"""Operators that stay in float32: sums of many terms, and what grows faster than 16 bit."""
LEAST_DIGITS = 2.0**-8
"""What the scale of a grid may be off by in 16 bit: below 6e-5 fp16 has fewer digits."""


@dataclass(frozen=True, kw_only=True)
class Narrowed:
    """How many nodes compute in 16 bit, how many in float32, and those whose constants do not fit."""

    nodes: int
    wide: int
    too_large: tuple[str, ...]


def narrow(model: ir.Model, kind: str, wanted: Callable[[ir.Node], bool]) -> Narrowed:
    """Put nodes into 16 bit; `wanted` says which may go. Shapes and types must be known. Inputs and outputs stay."""
    work = _Narrowing(model, KINDS[kind], wanted)
    for node in list(model.graph):
        work.node(node)
    return Narrowed(nodes=work.done, wide=work.left, too_large=tuple(work.too_large))


class _Narrowing:
    def __init__(
        self, model: ir.Model, kind: ir.DataType, wanted: Callable[[ir.Node], bool]
    ) -> None:
        self.graph, self.kind, self.wanted = model.graph, kind, wanted
        self.opset = model.graph.opset_imports.get("", 1)
        self.twins: dict[ir.Value, ir.Value] = {}
        self.done = self.left = 0
        self.too_large: list[str] = []

    def node(self, node: ir.Node) -> None:
        places = self._places(node)
        if places is None or not self.wanted(node):
            self.left += any(v.dtype == FLOAT for v in node.outputs)
            return
        if any(not self._fits(node, node.inputs[place]) for place in places):
            self.too_large.append(node.name or node.op_type)
            self.left += 1
            return
        for place in places:
            node.replace_input_with(place, self._twin(node, node.inputs[place]))
        for value in list(node.outputs):
            if value.dtype == FLOAT:
                self._give(node, value)
        self.done += 1

    def _places(self, node: ir.Node) -> list[int] | None:
        """The inputs of a node that would be of 16 bit; None where it stays as it is."""
        if node.domain or node.op_type in (*WIDE, "Cast", "Constant") or node.version:
            return None
        if any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for a in node.attributes.values()
        ):
            return None
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
        except onnx.defs.SchemaError:
            return None
        outputs = [v for v in node.outputs if v.dtype == FLOAT]
        if node.op_type == "QuantizeLinear":
            letters = {schema.inputs[0].type_str, schema.inputs[1].type_str}
        elif outputs and all(v.dtype is not None for v in node.outputs):
            letters = {
                _formal(schema.outputs, n).type_str
                for n, v in enumerate(node.outputs)
                if v.dtype == FLOAT
            }
        else:
            return None
        if any(self._word not in _types(schema, letter) for letter in letters):
            return None
        places = [
            n
            for n, value in enumerate(node.inputs)
            if value is not None
            and value.dtype == FLOAT
            and _formal(schema.inputs, n).type_str in letters
        ]
        unknown = any(v is not None and v.dtype is None for v in node.inputs)
        return places if places and not unknown else None

    @property
    def _word(self) -> str:
        return "tensor(float16)" if self.kind == ir.DataType.FLOAT16 else "tensor(bfloat16)"

    def _fits(self, node: ir.Node, value: ir.Value | None) -> bool:
        """Whether a constant can be in 16 bit; scales of grids need all their digits."""
        array = constant(value)
        if array is None or not array.size:
            return True
        there = array[np.isfinite(array)]
        with np.errstate(over="ignore"):
            small = there.astype(self.kind.numpy()).astype(np.float32)
        if not np.isfinite(small).all():
            return False
        is_scale = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        return not is_scale or bool((np.abs(small - there) <= LEAST_DIGITS * np.abs(there)).all())

    def _twin(self, before: ir.Node, value: ir.Value | None) -> ir.Value:
        """The same value in 16 bit: a constant made so, else behind a cast."""
        assert value is not None
        if value in self.twins:
            return self.twins[value]
        array = constant(value)
        if array is not None:
            small = array.astype(self.kind.numpy())
            tensor: Any = ir.tensor(small, dtype=self.kind, name=self._name(value))
            made = ir.Value(
                name=self._name(value), shape=ir.Shape(array.shape), type=ir.TensorType(self.kind),
                const_value=tensor,
            )  # fmt: skip
            self.graph.register_initializer(made)
        else:
            made = self._cast(value, self.kind, self._name(value))
            self.graph.insert_before(before, made.producer())  # type: ignore[arg-type]
        self.twins[value] = made
        return made

    def _name(self, value: ir.Value) -> str:
        return f"{value.name}.{'fp16' if self.kind == ir.DataType.FLOAT16 else 'bf16'}"

    @staticmethod
    def _cast(value: ir.Value, kind: ir.DataType, title: str) -> ir.Value:
        node = ir.node("Cast", [value], attributes={"to": int(kind)}, name=f"{title}.cast")
        made = node.outputs[0]
        made.name, made.type, made.shape = title, ir.TensorType(kind), value.shape
        return made

    def _give(self, node: ir.Node, value: ir.Value) -> None:
        """What a node gives is in 16 bit now; all that reads it reads it through a cast, which may prove dead."""
        title = value.name or ""
        wide = self._cast(value, FLOAT, title)
        value.name = self._name(value)
        value.type = ir.TensorType(self.kind)
        uses = [use for use in value.uses() if use.node is not wide.producer()]
        self.graph.insert_after(node, wide.producer())  # type: ignore[arg-type]
        for use in uses:
            use.node.replace_input_with(use.idx, wide)
        for place, output in enumerate(self.graph.outputs):
            if output is value:
                self.graph.outputs[place] = wide
        self.twins[wide] = value


def _formal(formals: Any, place: int) -> Any:
    """The formal parameter at a place; the last of a variadic operator stands for all behind it."""
    return formals[min(place, len(formals) - 1)]


def _types(schema: Any, letter: str) -> list[str]:
    """The types that a letter of a schema stands for; a type in its place stands for itself."""
    found = [c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == letter]
    return list(found[0]) if found else [letter]


def set_port(model: ir.Model, value: ir.Value, kind: ir.DataType) -> None:
    """Let an input or output of the graph be of a type, with a cast behind or in front of it."""
    graph = model.graph
    if value in graph.inputs:
        cast = ir.node(
            "Cast", [value], attributes={"to": int(FLOAT)}, name=f"{value.name}.wide.cast"
        )
        made = cast.outputs[0]
        made.name, made.type, made.shape = f"{value.name}.wide", ir.TensorType(FLOAT), value.shape
        uses = [use for use in value.uses() if use.node is not cast]
        graph.insert_before(next(iter(graph)), cast)
        for use in uses:
            use.node.replace_input_with(use.idx, made)
        value.type = ir.TensorType(kind)
        return
    place = list(graph.outputs).index(value)
    cast = ir.node("Cast", [value], attributes={"to": int(kind)}, name=f"{value.name}.port.cast")
    made = cast.outputs[0]
    title, value.name = value.name, f"{value.name}.inner"
    made.name, made.type, made.shape = title, ir.TensorType(kind), value.shape
    graph.append(cast)
    graph.outputs[place] = made
