"""How a neutral quantised ONNX graph is rewritten into the nodes that ONNX Runtime's CPU kernels are fastest in.

Every rewrite matches a whole pattern or leaves it alone, and changes no number by more than the order of a sum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from effc.backends.onnx_match import constant, initializer, only_consumer, producer, swap, take_over
from effc.backends.ort_attention import heads_side_by_side, mask_every_query, rotary_for_every_row
from effc.backends.ort_cache import attention_on_codes
from effc.backends.ort_products import products_of_matrices
from effc.quant.pack import pack

MICROSOFT = "com.microsoft"


def rewrite(model: ir.Model, *, one_token: bool = False) -> None:
    """All rewrites, in order, and then dead nodes out and every node under a name of its own.

    `one_token` says that a run sees one token, for which fewer nodes count more than faster ones.
    """
    graph = model.graph
    products_of_matrices(graph)
    _integer_matmul(graph)
    _product_of_rows(graph)
    _weight_only_matmul(graph)
    rotary_for_every_row(graph)
    if one_token:
        attention_on_codes(graph)
    heads_side_by_side(graph)
    mask_every_query(graph)
    _residual_as_sum(graph)
    if one_token:
        _residual_in_norm(graph)
    _drop_dead(graph)
    _unique_names(graph)
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1


def _weight_of(matmul: ir.Node) -> tuple[ir.Node, bool] | None:
    """The DequantizeLinear behind the second factor, and whether a transpose stands between."""
    value = matmul.inputs[1]
    transpose = producer(value, "Transpose")
    node = producer(transpose.inputs[0] if transpose else value, "DequantizeLinear")
    if node is None or node.inputs[0] is None or node.inputs[0].const_value is None:
        return None
    return node, transpose is not None


def _block(dequantize: ir.Node) -> int:
    """Weights that share a scale along a row; 0 where a row has one."""
    attribute = dequantize.attributes.get("block_size")
    return attribute.as_int() if attribute is not None else 0


def _bias(matmul: ir.Node, size: int) -> tuple[ir.Node, ir.Value] | None:
    """The addition of a constant vector [size] right behind a product."""
    add = only_consumer(matmul.outputs[0], "Add")
    if add is None:
        return None
    other = add.inputs[1] if add.inputs[0] is matmul.outputs[0] else add.inputs[0]
    if other is None or other.const_value is None or list(other.const_value.shape) != [size]:
        return None
    return add, other


def _integer_matmul(graph: ir.Graph) -> None:
    """dequantize(codes) · dequantize(weight)ᵀ [+ bias] → MatMulIntegerToFloat."""
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        left, right = producer(node.inputs[0], "DequantizeLinear"), _weight_of(node)
        if left is None or right is None or _block(left) or _block(right[0]):
            continue
        codes, scale, zero = left.inputs[:3]
        weight_node, transposed = right
        weight, weight_scale, weight_zero = weight_node.inputs[:3]
        assert weight is not None and weight_scale is not None
        columns = weight.shape[0 if transposed else 1] if weight.shape is not None else None
        weight = _transposed(graph, node, weight) if transposed else weight
        bias = _bias(node, columns) if isinstance(columns, int) else None
        new = ir.node(
            "MatMulIntegerToFloat",
            [codes, weight, scale, weight_scale, zero, weight_zero, bias[1] if bias else None],
            domain=MICROSOFT,
            name=_layer(weight),
        )
        last = bias[0] if bias else node
        swap(last, new, graph, [bias[0], node] if bias else [node])


def _product_of_rows(graph: ir.Graph) -> None:
    """dequantize(codes) · dequantize(weight)ᵀ with a scale per row of codes → MatMulIntegerToFloat · scales."""
    made: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "MatMul":
            continue
        rows, right = _rows(node.inputs[0]), _weight_of(node)
        if rows is None or right is None or _block(right[0]):
            continue
        x, scale = rows
        weight_node, transposed = right
        weight, weight_scale, weight_zero = weight_node.inputs[:3]
        assert weight is not None and weight_scale is not None
        weight = _transposed(graph, node, weight) if transposed else weight
        if rows not in made:
            made[rows] = _unsigned(graph, node, x, scale)
        one = initializer(graph, "one.of.rows", np.array(1, np.float32))
        middle = initializer(graph, "middle.of.rows", np.array(128, np.uint8))
        product = ir.node(
            "MatMulIntegerToFloat",
            [made[rows], weight, one, weight_scale, middle, weight_zero],
            domain=MICROSOFT,
            name=_layer(weight),
        )
        product.outputs[0].name = f"{node.outputs[0].name}.rows"
        product.outputs[0].type, product.outputs[0].shape = (
            node.outputs[0].type,
            node.outputs[0].shape,
        )
        graph.insert_before(node, product)
        scaled = ir.node("Mul", [product.outputs[0], scale], name=f"{_layer(weight)}.scale")
        swap(node, scaled, graph, [node])


def _rows(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """What is rounded with a scale per row, and the scales: [batch, length, size] and [batch, length, 1]."""
    scaled = producer(value, "Mul")
    wide = producer(scaled.inputs[0], "Cast") if scaled else None
    codes = producer(wide.inputs[0], "Cast") if wide else None
    clip = producer(codes.inputs[0], "Clip") if codes else None
    rounded = producer(clip.inputs[0], "Round") if clip else None
    divided = producer(rounded.inputs[0], "Div") if rounded else None
    if scaled is None or codes is None or divided is None:
        return None
    x, scale = divided.inputs
    if x is None or scale is None or scaled.inputs[1] is not scale:
        return None
    return (x, scale) if codes.attributes["to"].as_int() == ir.DataType.INT8 else None


def _unsigned(graph: ir.Graph, before: ir.Node, x: ir.Value, scale: ir.Value) -> ir.Value:
    """Codes around 128 of every row: the kernel for a scale per row takes [rows, size]."""
    flat = initializer(graph, "all.rows", np.array([-1], np.int64))
    middle = initializer(graph, "middle.of.rows", np.array(128, np.uint8))
    size = x.shape[-1] if x.shape is not None else None
    assert isinstance(size, int)
    table = initializer(graph, f"rows.of.{size}", np.array([-1, size], np.int64))

    def put(op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes)
        node.outputs[0].name = node.name = f"{x.name}.rows.{op}.{len(made)}"
        graph.insert_before(before, node)
        made.append(node.outputs[0])
        return made[-1]

    made: list[ir.Value] = []
    scales = put("Reshape", [scale, flat])
    zeros = put("Expand", [middle, put("Shape", [scales])])
    codes = put("QuantizeLinear", [put("Reshape", [x, table]), scales, zeros], axis=0)
    return put("Reshape", [codes, put("Shape", [x])])


def _layer(weight: ir.Value) -> str:
    return (weight.name or "").removesuffix(".t").removesuffix("_int8").removesuffix(".weight")


def _transposed(graph: ir.Graph, before: ir.Node, weight: ir.Value) -> ir.Value:
    """`weight` with its two axes exchanged: stored that way, unless somebody else reads it as it is.

    A shared table keeps one copy on disk and is transposed when the session is made.
    """
    assert weight.const_value is not None
    others = [u.node for u in weight.uses() if u.node.op_type != "DequantizeLinear"]
    name = f"{weight.name}.t"
    if not others:
        return initializer(graph, name, np.ascontiguousarray(weight.const_value.numpy().T))
    node = ir.node("Transpose", [weight], attributes={"perm": [1, 0]}, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _weight_only_matmul(graph: ir.Graph) -> None:
    """x · dequantize(weight)ᵀ → MatMulNBits, with 4 or 8 bit per weight and a scale per block."""
    for node in list(graph):
        left = producer(node.inputs[0], "DequantizeLinear")
        if node.op_type != "MatMul" or (left is not None and not _block(left)):
            continue
        right = _weight_of(node)
        if right is None or not right[1]:
            continue
        weight, scale, zero = right[0].inputs[:3]
        assert weight is not None and weight.const_value is not None
        assert scale is not None and zero is not None
        codes, scales, zeros = weight.const_value.numpy(), constant(scale), constant(zero)
        if scales is None or zeros is None:
            continue
        rows, columns = codes.shape
        block = _block(right[0]) or _widest_block(columns)
        if block < 16 or block & (block - 1):
            continue
        bits = 4 if codes.min() >= -8 and codes.max() <= 7 else 8
        lookups = _lookups(weight)
        if lookups is None or (lookups and (columns % block or zeros.any())):
            continue
        blocks = -(-columns // block)
        if scales.ndim == 1:
            scales, zeros = (np.repeat(v[:, None], blocks, axis=1) for v in (scales, zeros))
        name = weight.name or ""
        packed = initializer(graph, f"{name}.nbits", _pack(codes, bits, block))
        for lookup in lookups:
            if bits == 4:
                _look_up_blocks(graph, lookup, packed, columns, block)
            else:
                _look_up_packed(graph, lookup, packed, columns)
        flat = np.ascontiguousarray(scales.reshape(-1).astype(np.float32))
        inputs = [node.inputs[0], packed, initializer(graph, f"{scale.name}.nbits", flat)]
        if zeros.any():
            points = _pack(zeros, bits, blocks).reshape(-1)
            inputs.append(initializer(graph, f"{zero.name}.nbits", points))
        new = ir.node(
            "MatMulNBits",
            inputs,
            attributes={
                "K": columns,
                "N": rows,
                "bits": bits,
                "block_size": block,
                "accuracy_level": 4,
            },
            domain=MICROSOFT,
            name=_layer(weight),
        )
        swap(node, new, graph, [node])


def _widest_block(columns: int) -> int:
    """How many weights the kernel takes at a time where a whole row shares its scale."""
    return next((size for size in (128, 64, 32, 16) if columns % size == 0), 32)


def _lookups(weight: ir.Value) -> list[ir.Node] | None:
    """Every lookup of rows of a table behind which they are scaled; None where one is read in another way."""
    found = []
    for use in weight.uses():
        if use.node.op_type == "Gather":
            rows, value = use.node.inputs[1], use.node.outputs[0]
            scaled = only_consumer(value, "Cast") or only_consumer(value, "DequantizeLinear")
            if scaled is None or rows is None or rows.shape is None:
                return None
            found.append(use.node)
    return found


def _look_up_blocks(
    graph: ir.Graph, gather: ir.Node, packed: ir.Value, columns: int, block: int
) -> None:
    """dequantize(rows of codes, rows of scales) → GatherBlockQuantized, on the bytes that MatMulNBits reads."""
    scaled = only_consumer(gather.outputs[0], "DequantizeLinear")
    scales = producer(scaled.inputs[1], "Gather") if scaled else None
    assert scaled is not None and scales is not None
    whole = initializer(graph, f"{packed.name}.rows", np.array([-1, columns // 2], np.int64))
    table = ir.node("Reshape", [packed, whole], name=f"{packed.name}.table")
    table.outputs[0].name = table.name
    graph.insert_before(scaled, table)
    new = ir.node(
        "GatherBlockQuantized",
        [table.outputs[0], gather.inputs[1], scales.inputs[0]],
        attributes={"bits": 4, "block_size": block, "gather_axis": 0, "quantize_axis": 1},
        domain=MICROSOFT,
        name=gather.name,
    )
    swap(scaled, new, graph, [scaled])


def _look_up_packed(graph: ir.Graph, gather: ir.Node, packed: ir.Value, columns: int) -> None:
    """Read rows of a table where they lie for MatMulNBits: [rows, blocks, block], unsigned around 128."""
    rows, cast = gather.inputs[1], only_consumer(gather.outputs[0], "Cast")
    assert rows is not None and rows.shape is not None and cast is not None
    sizes = [0] * len(rows.shape)
    whole = initializer(
        graph, f"{packed.name}.row.{len(sizes)}", np.array([*sizes, columns], np.int64)
    )
    middle = initializer(graph, "middle.of.8.bit", np.array(128, np.float32))
    blocks = ir.node("Gather", [packed, rows], name=f"{gather.name}.blocks")
    row = ir.node("Reshape", [blocks.outputs[0], whole], name=f"{gather.name}.row")
    wide = ir.node(
        "Cast",
        [row.outputs[0]],
        attributes={"to": int(ir.DataType.FLOAT)},
        name=f"{gather.name}.wide",
    )
    for node in (blocks, row, wide):
        node.outputs[0].name = node.name
        graph.insert_before(cast, node)
    signed = ir.node("Sub", [wide.outputs[0], middle], name=f"{gather.name}.signed")
    swap(cast, signed, graph, [cast])


def _pack(codes: np.ndarray[Any, Any], bits: int, block: int) -> np.ndarray[Any, Any]:
    """Codes [out, in] as MatMulNBits stores them: [out, blocks, bytes], unsigned around the middle."""
    rows, columns = codes.shape
    blocks = -(-columns // block)
    middle = 1 << (bits - 1)
    padded = np.full((rows, blocks * block), middle, np.uint8)
    padded[:, :columns] = (codes.astype(np.int16) + middle).astype(np.uint8)
    if bits == 4:
        padded = pack(torch.from_numpy(padded)).numpy()
    return np.asarray(padded.reshape(rows, blocks, -1))


def _residual_as_sum(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Add" or any(
            v is None or v.const_value is not None for v in node.inputs
        ):
            continue
        readers = [use.node.op_type for use in node.outputs[0].uses()]
        if "LayerNormalization" in readers:
            node.op_type = "Sum"


def _residual_in_norm(graph: ir.Graph) -> None:
    """RMSNormalization(x + y) → SkipSimplifiedLayerNormalization, which gives the sum too."""
    for node in list(graph):
        add = producer(node.inputs[0], "Add") if node.op_type == "RMSNormalization" else None
        if add is None or node.domain or node.attributes.get_int("axis", -1) != -1:
            continue
        x, y, weight = *add.inputs, node.inputs[1]
        if x is None or y is None or not _alike(x, y) or len(x.shape or ()) != 3:
            continue
        if weight is None or weight.const_value is None:
            continue
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        new = ir.Node(
            MICROSOFT, "SkipSimplifiedLayerNormalization", [x, y, weight],
            [ir.AttrFloat32("epsilon", epsilon)], name=node.name, num_outputs=4,
        )  # fmt: skip
        graph.insert_after(add, new)
        for place, output in enumerate(new.outputs):
            output.name = f"{node.name}.{place}"
        take_over(add.outputs[0], new.outputs[3])
        take_over(node.outputs[0], new.outputs[0])
        for unused in new.outputs[1:3]:
            unused.name = ""


def _alike(x: ir.Value, y: ir.Value) -> bool:
    return x.shape is not None and y.shape is not None and list(x.shape) == list(y.shape)


def _unique_names(graph: ir.Graph) -> None:
    """A layer that runs more than once would name several nodes alike."""
    taken: dict[str, int] = {}
    for node in graph:
        name = node.name or ""
        count = taken[name] = taken.get(name, -1) + 1
        if count:
            node.name = f"{name}.{count}"


def _drop_dead(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[name]
