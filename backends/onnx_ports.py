"""The ports of a language model's ONNX file under the words of other tools: free sizes, and which logits are computed.

An engine may take `logits_to_keep` [kept], the positions whose logits are wanted. Tools that know no such input get a
file that works the positions out by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

KEPT = "logits_to_keep"
IDS = "input_ids"
SCALARS = 64
"""A constant of fewer values is a setting of some node and no weight."""
BYTES = (ir.DataType.INT8, ir.DataType.UINT8)
WORDS = {
    ir.DataType.INT4: "q4",
    ir.DataType.UINT4: "q4",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.FLOAT: "fp32",
}


def rename_sizes(model: ir.Model, words: Mapping[str, str]) -> None:
    """Other names for free sizes, also inside of sums such as `past + sequence`, wherever in the graph they stand."""
    known = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b")

    def renamed(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        return known.sub(lambda found: words[found[0]], size.value)

    values = [*model.graph.inputs]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values += node.outputs
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


def keep_all(model: ir.Model) -> bool:
    """Logits of every position, where the file has the input `logits_to_keep`; it is gone then."""
    return _keep(model, asked=None)


def keep_last(model: ir.Model, asked: str) -> bool:
    """The same with an input `asked` [], which says of how many positions at the end; 0 is all of them."""
    return _keep(model, asked=asked)


def _keep(model: ir.Model, asked: str | None) -> bool:
    graph = model.graph
    ports = {value.name: value for value in graph.inputs}
    if KEPT not in ports:
        return False
    made: list[ir.Node] = []

    def op(kind: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(kind, inputs, attributes=attributes)
        (value,) = node.outputs
        value.name = node.name = f"{KEPT}.{len(made)}"
        made.append(node)
        return value

    def whole(number: int) -> ir.Value:
        array = np.array(number, np.int64)
        tensor = ir.tensor(array, name=f"{KEPT}.number.{number}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64),
            const_value=tensor,
        )  # fmt: skip
        graph.register_initializer(value)
        return value

    zero, one = whole(0), whole(1)
    length = op("Squeeze", op("Shape", ports[IDS], start=1, end=2))
    first = zero
    if asked is not None:
        wanted = ir.Value(name=asked, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(wanted)
        first = op("Where", op("Equal", wanted, zero), zero, op("Sub", length, wanted))
    places = op("Range", first, length, one)
    ports[KEPT].replace_all_uses_with(places)
    graph.inputs.remove(ports[KEPT])
    graph.insert_before(graph[0], made)
    return True


def precision(model: ir.Model) -> str:
    """The narrowest weights that there are: `q4`, `q8`, `fp16` or `fp32`; `q4f16` where 4 bit stand among 16."""
    found = set()
    for value in model.graph.initializers.values():
        if value.const_value is None or value.const_value.size < SCALARS:
            continue
        widths = {use.node.attributes.get_int("bits", 8) for use in value.uses()}
        kind = value.const_value.dtype
        found.add(f"q{min(widths, default=8)}" if kind in BYTES else WORDS.get(kind, "other"))
    if {"q4", "fp16"} <= found and "fp32" not in found:
        return "q4f16"
    return next((word for word in ("q4", "q8", "fp16") if word in found), "fp32")
