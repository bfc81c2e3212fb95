"""Rules of TensorRT. What is refused was tried with TensorRT-RTX 1.7, which parses and builds without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from effc.backends.onnx_match import constant
from effc.lint import edit
from effc.lint.on_openvino import middle
from effc.lint.rule import ERROR, TENSORRT, WARNING, Hit, rule
from effc.lint.view import (
    DQ,
    SIXTEEN,
    Q,
    activation,
    behind,
    codes,
    given,
    grid,
    name,
    nodes,
    readers,
)

REFUSED = frozenset(
    {
        "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
        "BitwiseXor", "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd",
        "DFT", "DeformConv", "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool",
        "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional",
        "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch",
        "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert",
        "SequenceLength", "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat",
        "StringNormalizer", "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
    }
)  # fmt: skip
"""Standard operators that the parser of TensorRT-RTX 1.7.1 does not take."""
CONTRIB = frozenset(
    {
        "MatMulNBits", "Attention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization",
        "RotaryEmbedding", "MultiHeadAttention", "GroupQueryAttention", "QuantizeLinear",
        "DequantizeLinear",
    }
)  # fmt: skip
"""Operators of Microsoft's domain that it takes."""


@rule(
    "TRT001", ERROR, TENSORRT,
    what="a zero point that is not 0",
    cost="the parser refuses the node, and so the file",
    fix="symmetric grids; of uint8 around 128 the same codes as int8 around 0",
)  # fmt: skip
def zero_point(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, Q, DQ):
        zero = grid(node).zero
        if zero is None or not zero.any() or grid(node).kind == ir.DataType.INT32:
            continue
        if node.op_type == DQ and behind(node.inputs[0], Q) is not None:
            continue  # said of the node that quantises
        repair = _around_zero(graph, node) if node.op_type == Q else middle(graph, node)
        point = int(zero[zero != 0].flat[0])
        evidence = f"zero point {point} of {str(grid(node).kind).lower()}"
        yield Hit(node=node, tensor=name(given(node, 2)), evidence=evidence, repair=repair)


def _around_zero(graph: ir.Graph, quantize: ir.Node) -> edit.Edit | None:
    """Codes of uint8 around 128 as int8 around 0, where nothing but dequantise nodes reads them."""
    g = grid(quantize)
    users = readers(quantize.outputs[0])
    is_middle = g.kind == ir.DataType.UINT8 and g.zero is not None and (g.zero == 128).all()
    if not is_middle or not users or quantize.outputs[0].is_graph_output():
        return None
    can = all(n.op_type == DQ and grid(n).same(g) for n in users)
    return edit.shift(graph, [quantize, *users], -128) if can else None


@rule(
    "TRT002", ERROR, TENSORRT,
    what="a bias of int32 behind a dequantise node",
    cost="the parser refuses it: only codes of 4 and 8 bit are dequantised",
    fix="give the bias in float",
)  # fmt: skip
def integer_bias(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, DQ):
        if grid(node).kind != ir.DataType.INT32:
            continue
        array, g = constant(codes(node)), grid(node)
        repair = None
        if array is not None and array.ndim <= 1 and g.scale is not None and g.zero is not None:
            values = (array.astype("float64") - g.zero) * g.scale
            repair = edit.float_constant(graph, node.outputs[0], values)
        yield Hit(node=node, tensor=name(node.inputs[0]), evidence="int32", repair=repair)


@rule(
    "TRT003", ERROR, TENSORRT,
    what="codes of 16 bit",
    cost="the parser refuses them",
    fix="8 bit; or leave the value in 16-bit float",
)  # fmt: skip
def sixteen_bit(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, Q, DQ):
        if grid(node).kind in SIXTEEN and (node.op_type == Q or behind(node.inputs[0], Q) is None):
            yield Hit(node=node, tensor=name(given(node, 2)), evidence=str(grid(node).kind).lower())


@rule(
    "TRT004", WARNING, TENSORRT,
    what="quantised inputs of a concatenation on unlike grids",
    cost="stated, not measured here: a grid cannot be moved through the concatenation, so that it is not fused",
    fix="one grid for all of them, or one behind",
)  # fmt: skip
def unlike_halves(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Concat"):
        pairs = [activation(value) for value in node.inputs]
        found = [p for p in pairs if p is not None]
        scales = [grid(p).scale for p in found]
        if (
            len(found) < 2
            or any(s is None for s in scales)
            or all(grid(p).same(grid(found[0])) for p in found)
        ):
            continue
        shown = ", ".join(f"{s.flat[0]:g}" for s in scales[:4] if s is not None)
        yield Hit(node=node, tensor=name(node.outputs[0]), evidence=f"scales {shown}")


@rule(
    "TRT005", ERROR, TENSORRT,
    what="an operator that the parser does not take",
    cost="the file is refused",
    fix="quantise and dequantise nodes instead of QLinear and Integer operators; export others from parts",
)  # fmt: skip
def refused(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph):
        is_standard = node.domain in ("", "ai.onnx")
        is_known = node.op_type in CONTRIB if node.domain == "com.microsoft" else True
        if (is_standard and node.op_type in REFUSED) or not is_known:
            evidence = node.op_type if is_standard else f"{node.domain}.{node.op_type}"
            yield Hit(node=node, tensor=name(next(iter(node.outputs), None)), evidence=evidence)


@rule(
    "TRT006", ERROR, TENSORRT,
    what="attention as one operator, in float32",
    cost="the builder has no kernel for it and gives nothing",
    fix="cast what it reads to 16 bit, or export with opset 21, where it is decomposed",
)  # fmt: skip
def float_attention(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Attention"):
        kind = node.inputs[0].dtype if node.inputs[0] is not None else None
        if kind == ir.DataType.FLOAT:
            yield Hit(node=node, tensor=name(node.inputs[0]), evidence="float32")
