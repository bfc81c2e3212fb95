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
        known = model.graph.initializers.get(f"{part.name}.int4")
        if known is None:
            known = _narrow(model, part.name or "", array)
        node.replace_input_with(list(node.inputs).index(part), known)
        if not part.uses() and part.name and part.name in model.graph.initializers:
            del model.graph.initializers[part.name]


FEWEST = 512
"""Codes of a weight at least: the node that widens fewer takes more bytes than they save."""


def store_behind_casts(model: ir.Model) -> None:
    """Write codes of 4 bit as INT4 with a Cast to INT8 behind them, for kernels that multiply bytes.

    A runtime folds a cast of a constant when it opens the file: two codes lie in a byte on disk, and what runs is what
    would run without it. Weights with a scale per row are meant; in blocks they have kernels of their own.
    """
    for name, value in list(model.graph.initializers.items()):
        tensor, uses = value.const_value, list(value.uses())
        if tensor is None or tensor.dtype != ir.DataType.INT8 or len(tensor.shape) < 2:
            continue
        codes = tensor.numpy()
        if codes.size < FEWEST or codes.min() < -8 or codes.max() > 7:
            continue
        if value.is_graph_output() or not all(_is_byte_weight(use.node, use.idx) for use in uses):
            continue
        value.const_value = None
        del model.graph.initializers[name]
        narrow = _narrow(model, name, codes)
        cast = ir.node(
            "Cast", [narrow], attributes={"to": int(ir.DataType.INT8)}, name=f"{name}.wide"
        )
        wide = cast.outputs[0]
        wide.type, wide.shape = value.type, value.shape
        value.replace_all_uses_with(wide)
        value.name, wide.name = f"{name}.gone", name
        model.graph.insert_before(uses[0].node if len(uses) == 1 else model.graph[0], cast)


def _is_byte_weight(node: ir.Node, place: int) -> bool:
    """Whether a node reads a value as the codes of a weight with a scale for each row."""
    if node.op_type == "DequantizeLinear":
        return place == 0 and not node.attributes.get_int("block_size", 0)
    return node.op_type == "MatMulIntegerToFloat" and place == 1


def _narrow(model: ir.Model, name: str, codes: Array) -> ir.Value:
    """An INT4 initialiser of codes."""
    array, kind = codes.astype(ir.DataType.INT4.numpy()), ir.DataType.INT4
    made = ir.Value(
        name=f"{name}.int4", type=ir.TensorType(kind), shape=ir.Shape(codes.shape),
        const_value=ir.Tensor(array, name=f"{name}.int4", dtype=kind),
    )  # fmt: skip
    model.graph.register_initializer(made)
    return made


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
