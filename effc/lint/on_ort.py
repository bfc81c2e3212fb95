"""Rules of ONNX Runtime's CPU provider. Each was tried on 1.32: what its optimised graph has, and what it gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from effc.backends.onnx_match import constant
from effc.lint import edit
from effc.lint.rule import ERROR, ORT, WARNING, Hit, rule
from effc.lint.view import (
    DQ,
    EIGHT,
    FOUR,
    SIXTEEN,
    Array,
    Q,
    activation,
    behind,
    codes,
    fixed,
    given,
    grid,
    is_quantised_behind,
    name,
    nodes,
    rank,
    readers,
    sizes,
    weight,
)

_NO_INTEGERS = (
    "LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization", "Gelu", "Tanh", "Erf",
    "HardSwish", "HardSigmoid", "ReduceMean", "Exp", "Sqrt", "Pow", "Div", "Relu", "Elu", "Selu", "Softplus", "Mish",
    "ConvTranspose", "BatchNormalization", "LogSoftmax", "Sin", "Cos",
)  # fmt: skip
"""Operators that have no kernel on integers; what stands between a convolution and its grid is another rule's."""
_FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSwish", "Elu", "Gelu")


def _is_static(value: ir.Value | None) -> bool:
    node = activation(value)
    return node is not None and grid(node).kind in EIGHT


def _is_integer(node: ir.Node) -> bool:
    """Whether a layer reads codes of 8 bit and a weight of codes."""
    right = weight(given(node, 1))
    if not _is_static(given(node, 0)) or right is None or grid(right).kind not in EIGHT:
        return False
    return not _outside(node)


def _outside(node: ir.Node) -> list[ir.Node]:
    """The dequantise nodes of a layer that are not in the same branch or loop."""
    found = [activation(given(node, 0)), weight(given(node, 1))]
    return [dq for dq in found if dq is not None and dq.graph is not node.graph]


def _bias(node: ir.Node) -> ir.Node | None:
    """The addition of a constant vector right behind a product; the optimiser takes it into a Gemm."""
    uses = readers(node.outputs[0])
    if len(uses) != 1 or uses[0].op_type != "Add" or node.outputs[0].is_graph_output():
        return None
    add = uses[0]
    other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
    value = constant(other) if other is not None else None
    if value is None and (dq := weight(other)) is not None:
        value = constant(codes(dq))
    columns = sizes(node.outputs[0])[-1:] or sizes(given(node, 1))[-1:]
    if value is None or not columns or value.size != columns[0]:
        return None
    is_flat = value.ndim == 1 or (rank(node.outputs[0]) == 2 and value.shape[0] == 1)
    return add if is_flat else None


def _products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Integer products with a bias that the optimiser makes a Gemm of: of tables, or with fixed sizes in front."""
    for node in nodes(graph, "MatMul"):
        add = _bias(node) if _is_integer(node) else None
        had = sizes(given(node, 0))
        if add is not None and (len(had) == 2 or (len(had) > 2 and fixed(had[:-1]))):
            yield node, add


@rule(
    "ORT001", WARNING, ORT,
    what="int8 activations that are dequantised once and read more than once",
    cost="every layer that reads them runs in float; of uint8 they stay on integers",
    fix="the same grid as uint8: zero point and codes moved by 128",
)  # fmt: skip
def shared_activation(graph: ir.Graph) -> Iterator[Hit]:
    seen: set[ir.Node] = set()
    for node in nodes(graph, "MatMul", "Gemm", "Conv"):
        dq = activation(given(node, 0))
        if dq is None or dq in seen or not _is_integer(node) or grid(dq).kind != ir.DataType.INT8:
            continue
        others = len(readers(dq.outputs[0])) - 1 + dq.outputs[0].is_graph_output()
        if others:
            seen.add(dq)
            yield Hit(
                node=node, tensor=name(dq.outputs[0]), evidence=f"{others} more read {name(dq.outputs[0])}",
                repair=_to_unsigned(graph, behind(dq.inputs[0], Q, ("Clip",))),
            )  # fmt: skip


def _to_unsigned(graph: ir.Graph, quantize: ir.Node | None) -> edit.Edit | None:
    """Move a grid by 128, with all that stands on it; None where something else reads its codes."""
    if quantize is None or grid(quantize).zero is None:
        return None
    found, todo = [quantize], [quantize]
    while todo:
        value = todo.pop().outputs[0]
        if value.is_graph_output():
            return None
        for reader in readers(value):
            if reader.op_type == "Clip":
                if any(
                    given(reader, n) is None or constant(given(reader, n)) is None for n in (1, 2)
                ):
                    return None
                todo.append(reader)
            elif reader.op_type != DQ:
                return None
            if reader not in found:
                found.append(reader)
    if len({grid(n).kind for n in found if n.op_type != "Clip"}) > 1:
        return None
    return edit.shift(graph, found, 128)


@rule(
    "ORT002", ERROR, ORT,
    what="a rank-1 bias behind a product of int8 activations with fixed sizes in front",
    cost="the session is not created: an optimiser makes a Gemm of it and gives its grid another type",
    fix="write the addition as Sum, which no optimiser takes into the product; the numbers are the same",
)  # fmt: skip
def signed_bias(graph: ir.Graph) -> Iterator[Hit]:
    for node, add in _products(graph):
        dq = activation(given(node, 0))
        if dq is not None and grid(dq).kind == ir.DataType.INT8 and len(sizes(given(node, 0))) > 2:
            yield Hit(
                node=add, tensor=name(given(node, 1)),
                evidence=f"{name(given(node, 0))} is {sizes(given(node, 0))} of int8",
                repair=edit.sum_for_add(add),
            )  # fmt: skip


@rule(
    "ORT003", WARNING, ORT,
    what="a bias behind a product of codes that the optimiser makes a Gemm of",
    cost="the layer runs in float: the Gemm has integers only with a grid behind it",
    fix="write the addition as Sum, which no optimiser takes into the product; the numbers are the same",
)  # fmt: skip
def float_bias(graph: ir.Graph) -> Iterator[Hit]:
    for node, add in _products(graph):
        dq = activation(given(node, 0))
        is_refused = dq is not None and grid(dq).kind == ir.DataType.INT8
        if (is_refused and len(sizes(given(node, 0))) > 2) or is_quantised_behind(add.outputs[0]):
            continue
        if _integer_bias(add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]):
            continue
        yield Hit(
            node=add, tensor=name(given(node, 1)),
            evidence=f"{name(given(node, 0))} is {_shown(sizes(given(node, 0)))}",
            repair=edit.sum_for_add(add),
        )  # fmt: skip


def _shown(shape: list[object]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"


def _integer_bias(value: ir.Value | None) -> ir.Node | None:
    """The dequantise node of a bias of int32."""
    node = weight(value)
    return node if node is not None and grid(node).kind == ir.DataType.INT32 else None


def _float_gemm(node: ir.Node) -> str | None:
    """Why a Gemm that reads codes has no kernel on integers; None where it has."""
    if node.attributes.get_float("alpha", 1.0) != 1.0:
        return f"alpha is {node.attributes.get_float('alpha', 1.0):g}"
    third = given(node, 2)
    if third is None or _integer_bias(third) is not None or is_quantised_behind(node.outputs[0]):
        return None
    return "its bias is in float, and no grid is behind it"


@rule(
    "ORT004", WARNING, ORT,
    what="a Gemm of codes with a float bias and no grid behind it, or with another alpha than 1",
    cost="the layer runs in float",
    fix="take the bias out and add it behind; for alpha, put it into the scale of the weight",
)  # fmt: skip
def float_gemm(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Gemm"):
        why = _float_gemm(node) if _is_integer(node) else None
        if why is None:
            continue
        bias, beta = constant(given(node, 2)), node.attributes.get_float("beta", 1.0)
        can = bias is not None and beta == 1.0 and "alpha" not in why
        repair = edit.bias_behind(graph, node, bias) if can and bias is not None else None
        yield Hit(node=node, tensor=name(given(node, 1)), evidence=why, repair=repair)


def _expected(node: ir.Node) -> Array | None:
    """s_x · s_w of a layer, which the bias of a fused kernel counts in."""
    left, right = activation(given(node, 0)), weight(given(node, 1))
    if left is None or right is None:
        return None
    one, other = grid(left).scale, grid(right).scale
    return None if one is None or other is None or one.size != 1 else (one * other).ravel()


def _off(node: ir.Node, bias: ir.Node) -> float | None:
    """How far the scale of a bias is from s_x · s_w, as a ratio; None where it fits or is not known."""
    wanted, has = _expected(node), grid(bias).scale
    if wanted is None or has is None or has.size not in (1, wanted.size):
        return None
    ratios = has.ravel() / wanted
    worst = float(ratios[np.abs(np.log(np.abs(ratios) + 1e-30)).argmax()])
    return worst if abs(worst - 1) > 1e-3 else None


def _plain(bias: ir.Node) -> Array | None:
    """The values of a dequantised bias."""
    array, g = constant(codes(bias)), grid(bias)
    if array is None or g.scale is None or g.zero is None or array.ndim != 1:
        return None
    return np.asarray((array.astype(np.float64) - g.zero) * g.scale, np.float32)


@rule(
    "ORT005", ERROR, ORT,
    what="the int32 bias of a Gemm, or behind a product that becomes one, has another scale than s_x·s_w",
    cost="wrong numbers without a word: the fused kernel adds the codes as they are",
    fix="add the bias in float behind the product",
)  # fmt: skip
def wrong_bias(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Gemm"):
        bias = _integer_bias(given(node, 2)) if _is_integer(node) else None
        ratio = _off(node, bias) if bias is not None else None
        if bias is None or ratio is None:
            continue
        values = _plain(bias)
        can = values is not None and node.attributes.get_float("beta", 1.0) == 1.0
        yield Hit(
            node=node, tensor=name(bias.inputs[1]), evidence=f"{ratio:.3g} times s_x·s_w",
            repair=edit.bias_behind(graph, node, values) if can and values is not None else None,
        )  # fmt: skip
    for node, add in _products(graph):
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        bias = _integer_bias(other)
        ratio = _off(node, bias) if bias is not None else None
        if bias is not None and ratio is not None:
            yield Hit(
                node=add, tensor=name(bias.inputs[1]), evidence=f"{ratio:.3g} times s_x·s_w",
                repair=edit.sum_for_add(add),
            )  # fmt: skip


@rule(
    "ORT006", ERROR, ORT,
    what="the weight of a product has scales along the axis that is summed over",
    cost="wrong numbers without a word where the weight is square, and a run that fails where it is not",
    fix="quantise the weight again with a scale per output channel",
)  # fmt: skip
def wrong_axis(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul", "Gemm"):
        dq = weight(given(node, 1)) if _is_static(given(node, 0)) else None
        array = codes(dq) if dq is not None else None
        if dq is None or array is None or grid(dq).block or grid(dq).kind not in EIGHT:
            continue
        scale, dims = grid(dq).scale, len(sizes(array))
        if scale is None or scale.size < 2 or dims != 2:
            continue
        is_turned = behind(given(node, 1), "Transpose") is not None
        is_turned ^= node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
        axis = grid(dq).axis % dims
        if axis != (0 if is_turned else 1):
            evidence = f"axis {axis} of a weight {sizes(array)}"
            yield Hit(node=node, tensor=name(dq.inputs[1]), evidence=evidence)


def _convolutions(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    """Convolutions of codes that run in float, and why."""
    for node in nodes(graph, "Conv"):
        if not _is_integer(node):
            continue
        uses = readers(node.outputs[0])
        if is_quantised_behind(node.outputs[0]):
            continue
        behind_it = uses[0] if len(uses) == 1 else None
        if (
            behind_it is not None
            and behind_it.op_type in ("Relu", "Clip")
            and is_quantised_behind(behind_it.outputs[0])
        ):
            point = grid(readers(behind_it.outputs[0])[0])
            least = 0 if point.kind == ir.DataType.UINT8 else -128
            if point.zero is not None and int(point.zero.flat[0]) == least:
                continue
            yield (
                node,
                f"{behind_it.op_type} and then a grid whose zero point is above its least code",
            )
        elif behind_it is not None and behind_it.op_type in _FUSED:
            yield node, f"{behind_it.op_type} is behind it, and no grid"
        else:
            yield node, "no grid is behind it"


@rule(
    "ORT007", WARNING, ORT,
    what="a convolution of codes without a quantiser behind it",
    cost="it runs in float, and its input is dequantised for it",
    fix="quantise what it gives; ConvInteger stays on integers too, and is slower than the floats",
)  # fmt: skip
def float_convolution(graph: ir.Graph) -> Iterator[Hit]:
    for node, why in _convolutions(graph):
        if "above its least code" not in why:
            yield Hit(
                node=node, tensor=name(node.outputs[0]), evidence=why,
            )  # fmt: skip


@rule(
    "ORT008", WARNING, ORT,
    what="a rectifier between a convolution of codes and a grid whose zero point is not its least code",
    cost="the rectifier stays a node of its own, so the convolution runs in float",
    fix="calibrate the grid behind the rectifier without a sign: zero point 0 of uint8, and twice the codes",
)  # fmt: skip
def float_rectified(graph: ir.Graph) -> Iterator[Hit]:
    for node, why in _convolutions(graph):
        if "above its least code" in why:
            yield Hit(
                node=node, tensor=name(node.outputs[0]), evidence=why,
            )  # fmt: skip


@rule(
    "ORT009", WARNING, ORT,
    what="the int32 bias of a convolution has another scale than s_x·s_w",
    cost="it runs in float",
    fix="give the bias in float: the runtime puts it on the right grid itself",
)  # fmt: skip
def wrong_convolution_bias(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Conv"):
        bias = _integer_bias(given(node, 2)) if _is_integer(node) else None
        ratio = _off(node, bias) if bias is not None else None
        if bias is not None and ratio is not None:
            values = _plain(bias)
            yield Hit(
                node=node, tensor=name(bias.inputs[1]), evidence=f"{ratio:.3g} times s_x·s_w",
                repair=None if values is None else edit.float_constant(graph, bias.outputs[0], values),
            )  # fmt: skip


@rule(
    "ORT010", WARNING, ORT,
    what="a concatenation of dequantised values that a layer reads without a grid behind it",
    cost="the layer behind it runs in float",
    fix="of one grid: concatenate the codes and dequantise once; else quantise what comes out",
)  # fmt: skip
def float_concat(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Concat"):
        pairs = [activation(value) for value in node.inputs]
        users = [n for n in readers(node.outputs[0]) if n.op_type in ("Conv", "MatMul", "Gemm")]
        layers = [n for n in users if weight(given(n, 1)) is not None]
        if len(pairs) < 2 or None in pairs or not layers:
            continue
        found = [pair for pair in pairs if pair is not None]
        is_one = all(grid(p).same(grid(found[0])) and _is_alone(p) for p in found)
        is_one &= len({grid(p).kind for p in found}) == 1
        yield Hit(
            node=node, tensor=name(node.outputs[0]), evidence=f"{layers[0].op_type} {layers[0].name} reads it",
            repair=edit.codes_together(graph, node, found) if is_one else None,
        )  # fmt: skip


def _is_alone(node: ir.Node) -> bool:
    scale = grid(node).scale
    return scale is not None and scale.size == 1


@rule(
    "ORT011", WARNING, ORT,
    what="a weight of 4 bit beside activations of 8 bit",
    cost="the layer runs in float: there is no kernel for the two",
    fix="read the weight through Cast to 8 bit, done when the file is opened; the file stays as small",
)  # fmt: skip
def four_bit(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul", "Gemm", "Conv"):
        dq = weight(given(node, 1))
        if dq is None or grid(dq).kind not in FOUR or not _is_static(given(node, 0)):
            continue
        can = (
            not grid(dq).block and dq.inputs[0] is not None and dq.inputs[0].const_value is not None
        )
        more = f"in blocks of {grid(dq).block}" if grid(dq).block else "with a scale per channel"
        yield Hit(
            node=node, tensor=name(codes(dq)), evidence=more,
            repair=edit.widen_codes(graph, dq) if can else None,
        )  # fmt: skip


@rule(
    "ORT012", WARNING, ORT,
    what="a convolution with a weight of 4 bit and activations in float",
    cost="the weight is made float when the file is opened: nothing but the file is smaller",
    fix="quantise the activations too, or keep the weight in float",
)  # fmt: skip
def four_bit_convolution(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Conv", "ConvTranspose"):
        dq = weight(given(node, 1))
        if dq is not None and grid(dq).kind in FOUR and not _is_static(given(node, 0)):
            yield Hit(node=node, tensor=name(codes(dq)), evidence=f"{sizes(codes(dq))}")


@rule(
    "ORT013", WARNING, ORT,
    what="a weight in blocks that MatMulNBits does not take: of less than 16, or not along the sum",
    cost="the product runs in float, on a weight that is made float when the file is opened",
    fix="quantise again in blocks of 32 along the axis that is summed over",
)  # fmt: skip
def odd_blocks(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul"):
        dq = weight(given(node, 1))
        if dq is None or not grid(dq).block or _is_static(given(node, 0)):
            continue
        is_turned = behind(given(node, 1), "Transpose") is not None
        axis, block = grid(dq).axis % 2, grid(dq).block
        if block < 16 or block & (block - 1) or axis != (1 if is_turned else 0):
            evidence = f"blocks of {block} along axis {axis}"
            yield Hit(node=node, tensor=name(codes(dq)), evidence=evidence)


@rule(
    "ORT014", ERROR, ORT,
    what="the activations of a product have a scale per channel or per row, as a constant",
    cost="the file opens, and its run fails where they are uint8; where they are int8 the layer runs in float",
    fix="calibrate one scale for the tensor",
)  # fmt: skip
def activation_axis(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul", "Gemm", "Conv"):
        dq = activation(given(node, 0))
        scale = grid(dq).scale if dq is not None else None
        if dq is not None and scale is not None and scale.size > 1 and weight(given(node, 1)):
            yield Hit(node=node, tensor=name(dq.inputs[1]), evidence=f"{scale.size} scales")


@rule(
    "ORT015", WARNING, ORT,
    what="activations or weights on a grid of 16 bit",
    cost="no kernel on integers takes them: the grid is computed and the layer runs in float or on the weight alone",
    fix="8 bit; or leave the activations in float",
)  # fmt: skip
def sixteen_bit(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul", "Gemm", "Conv"):
        dq = activation(given(node, 0))
        if dq is not None and grid(dq).kind in SIXTEEN and weight(given(node, 1)) is not None:
            yield Hit(node=node, tensor=name(dq.inputs[0]), evidence=str(grid(dq).kind))


@rule(
    "ORT016", WARNING, ORT,
    what="a clip of int8 codes between quantise and dequantise",
    cost="the layer behind it runs in float; of uint8 it stays on integers",
    fix="the same grid as uint8: zero point, bounds and codes moved by 128",
)  # fmt: skip
def clipped(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Clip"):
        quantize = behind(node.inputs[0], Q)
        pairs = [n for n in readers(node.outputs[0]) if n.op_type == DQ]
        if quantize is None or not pairs or grid(quantize).kind != ir.DataType.INT8:
            continue
        users = [n for pair in pairs for n in readers(pair.outputs[0]) if _is_integer(n)]
        if users:
            yield Hit(
                node=node, tensor=name(node.outputs[0]), evidence=f"{users[0].op_type} {users[0].name} reads it",
                repair=_to_unsigned(graph, quantize),
            )  # fmt: skip


@rule(
    "ORT017", WARNING, ORT,
    what="grids around an operator that has no kernel on integers",
    cost="the value is rounded, and quantised and dequantised once more, for nothing",
    fix="quantise only what matrix products and convolutions read",
)  # fmt: skip
def around_float(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, *_NO_INTEGERS):
        dq = activation(given(node, 0))
        if dq is None or not is_quantised_behind(node.outputs[0]):
            continue
        others = [n for n in readers(dq.outputs[0]) if n.op_type not in _NO_INTEGERS]
        if not others:
            evidence = f"{name(given(node, 0))} is dequantised for it, and {name(node.outputs[0])} quantised"
            yield Hit(node=node, tensor=name(node.outputs[0]), evidence=evidence)


@rule(
    "ORT018", WARNING, ORT,
    what="one range over the whole batch, found as it runs, with a free first dimension",
    cost="what is said of a sample depends on the others in its batch",
    fix="static ranges, or a scale per row",
)  # fmt: skip
def neighbours(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "DynamicQuantizeLinear"):
        shape = sizes(given(node, 0))
        if shape and not isinstance(shape[0], int):
            yield Hit(
                node=node, tensor=name(given(node, 0)), evidence=f"{_shown(shape)} has one scale"
            )


@rule(
    "ORT019", WARNING, ORT,
    what="the weight of a convolution has scales along another axis than its output channels",
    cost="it runs in float",
    fix="quantise the weight again with a scale per output channel: axis 0",
)  # fmt: skip
def convolution_axis(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Conv"):
        dq = weight(given(node, 1)) if _is_static(given(node, 0)) else None
        scale = grid(dq).scale if dq is not None else None
        if dq is not None and scale is not None and scale.size > 1 and grid(dq).axis != 0:
            evidence = f"axis {grid(dq).axis} of a weight {sizes(codes(dq))}"
            yield Hit(node=node, tensor=name(dq.inputs[1]), evidence=evidence)


@rule(
    "ORT020", WARNING, ORT,
    what="a layer inside of a branch or a loop reads what was dequantised outside of it",
    cost="it runs in float: nodes are put together within one graph only",
    fix="put the dequantise nodes into the branch or the loop, beside the layer",
)  # fmt: skip
def from_outside(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "MatMul", "Gemm", "Conv"):
        right = weight(given(node, 1))
        if not _is_static(given(node, 0)) or right is None or grid(right).kind not in EIGHT:
            continue
        if found := _outside(node):
            evidence = f"{found[0].name} is outside"
            yield Hit(node=node, tensor=name(found[0].outputs[0]), evidence=evidence)
