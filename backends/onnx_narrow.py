"""Codes of 4 bit written in 4 bit: passes hold them in bytes, as torch does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from effc.backends.base import Array


def store_int4(model: ir.Model) -> None:
    """Write codes of 4 bit as INT4: block-wise weights whose codes all fit."""
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or not node.attributes.get_int("block_size", 0):
            continue
        parts = [v for v in (node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None) if v]
        tensors = [part.const_value for part in parts]
        if any(t is None or t.dtype != ir.DataType.INT8 for t in tensors):
            continue
        arrays = [t.numpy() for t in tensors if t is not None]
        if any(a.size and (a.min() < -8 or a.max() > 7) for a in arrays):
            continue
        if any(use.node is not node for part in parts for use in part.uses() if part is parts[0]):
            continue
        _retype(model, node, parts, arrays)


def _retype(
    model: ir.Model, node: ir.Node, parts: Sequence[ir.Value], arrays: Sequence[Array]
) -> None:
    for part, array in zip(parts, arrays, strict=True):
        narrow = array.astype(ir.DataType.INT4.numpy())
        name = f"{part.name}.int4"
        known = model.graph.initializers.get(name)
        if known is None:
            known = ir.Value(
                name=name, type=ir.TensorType(ir.DataType.INT4), shape=ir.Shape(array.shape),
                const_value=ir.Tensor(narrow, name=name, dtype=ir.DataType.INT4),
            )  # fmt: skip
            model.graph.initializers[name] = known
        node.replace_input_with(list(node.inputs).index(part), known)
        if not part.uses() and part.name and part.name in model.graph.initializers:
            del model.graph.initializers[part.name]


def drop_zeros(model: ir.Model) -> None:
    """Leave out zero points that are 0 for every block: a kernel that takes any subtracts them."""
    for node in model.graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        zero = node.inputs[2]
        if zero is None or zero.const_value is None or node.inputs[0] is None:
            continue
        if node.inputs[0].const_value is None or zero.const_value.numpy().astype(np.int32).any():
            continue
        node.resize_inputs(2)
        if not zero.uses() and zero.name and zero.name in model.graph.initializers:
            del model.graph.initializers[zero.name]
