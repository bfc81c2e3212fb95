"""What rewrites of ONNX graphs ask of a value, and how they put one node where others were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def only_consumer(value: ir.Value, kind: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type == kind else None


def constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None:
        node = producer(value, "Constant")
        if node is None:
            return None
        attribute = next(iter(node.attributes.values()))
        return np.asarray(
            attribute.value.numpy() if hasattr(attribute.value, "numpy") else attribute.value
        )
    return tensor.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """The initialiser of that name, made if it is new: layers that share a weight share its packed form."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def take_over(old: ir.Value, new: ir.Value) -> None:
    """`new` takes the name, type, shape and readers of `old`."""
    new.type, new.shape = old.type, old.shape
    name, old.name = old.name, f"{old.name}_gone"
    new.name = name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def swap(old: ir.Node, new: ir.Node, graph: ir.Graph, gone: Sequence[ir.Node]) -> None:
    """Put `new` where `old` is; its output takes over the name, type and readers of `old`'s."""
    graph.insert_before(old, new)
    take_over(old.outputs[0], new.outputs[0])
    for node in gone:
        graph.remove(node, safe=True)
