"""Whether an ONNX file holds integers already, in which of the usual forms, and how much of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx

KERNELS = (
    "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSoftmax", "QLinearLeakyRelu", "QGemm",
    "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention",
    "QEmbedLayerNormalization", "MatMulNBits", "GatherBlockQuantized", "DynamicQuantizeLSTM",
)  # fmt: skip
"""Operators that compute with integers."""
BYTES = {
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.UINT8: "uint8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.UINT4: "uint4",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
    onnx.TensorProto.FLOAT8E5M2: "fp8",
}
FEW = 64
"""A tensor of fewer values is a scale or a zero point."""


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """How a file is quantised: a word, what was counted, and the bytes of weights in integers among all."""

    form: str
    counts: dict[str, int]
    integer_bytes: int
    weight_bytes: int

    @property
    def sentence(self) -> str:
        """What a file is, in a sentence."""
        told = ", ".join(f"{n} {word}" for word, n in sorted(self.counts.items()))
        share = 100 * self.integer_bytes / max(1, self.weight_bytes)
        return f"{FORMS[self.form]}: {told}; {share:.0f} % of {self.weight_bytes / 1e6:.1f} MB of weights are integers"

    def to_json(self) -> dict[str, Any]:
        return {
            "form": self.form, "counts": self.counts, "integer_bytes": self.integer_bytes,
            "weight_bytes": self.weight_bytes,
        }  # fmt: skip


FORMS = {
    "dynamic": "weights in integers, activations rounded to integers as they come",
    "static": "weights and activations rounded to fixed grids",
    "weight-only": "weights in integers, activations in float",
    "stored": "weights stored in integers and widened when the file is opened: it is smaller, and computes in float",
}


def quantised(proto: onnx.ModelProto) -> Quantised | None:
    """How a model is quantised; None where it computes with floats from floats."""
    bodies = [proto.graph, *proto.functions]
    nodes = [node for graph in bodies for node in graph.node]
    ops = Counter(node.op_type for node in nodes)
    sizes = {t.name: (t.data_type, _elements(t)) for t in proto.graph.initializer}
    integers = {
        n: (kind, size) for n, (kind, size) in sizes.items() if kind in BYTES and size >= FEW
    }
    kernels = {op: count for op, count in ops.items() if op in KERNELS}
    grids = {
        op: n
        for op in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
        if (n := ops[op])
    }
    widened = _widened(nodes, integers)
    if not kernels and not grids and not widened:
        return None
    if (
        "DynamicQuantizeLinear" in grids
        or {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"} & kernels.keys()
    ):
        form = "dynamic"
    elif "QuantizeLinear" in grids or any(
        op.startswith(("QLinear", "QGemm", "QAttention")) for op in kernels
    ):
        form = "static"
    else:
        form = "stored" if widened and not kernels and not grids else "weight-only"
    counts = {**kernels, **grids, **({"widened weights": widened} if widened else {})}
    return Quantised(
        form=form, counts=counts,
        integer_bytes=sum(_bytes(*entry) for entry in integers.values()),
        weight_bytes=sum(_bytes(*entry) for entry in sizes.values()),
    )  # fmt: skip


def _elements(tensor: Any) -> int:
    size = 1
    for dim in tensor.dims:
        size *= dim
    return size


def _bytes(kind: int, size: int) -> int:
    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return size // 2
    try:
        return int(size * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
    except (KeyError, TypeError):
        return size


def _widened(nodes: Any, integers: Any) -> int:
    """Weights of a byte that a cast makes floats of."""
    return sum(node.op_type == "Cast" and node.input[0] in integers for node in nodes)
