"""How a neutral quantised ONNX graph is rewritten into the nodes that ONNX Runtime's CPU kernels are fastest in.

Every rewrite matches a whole pattern or leaves it alone, and changes no number by more than the order of a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from effc.quant.pack import pack

MICROSOFT = "com.microsoft"


def rewrite(model: ir.Model) -> None:
    """All rewrites, in order, and then dead nodes out and every node under a name of its own."""
    graph = model.graph
    _integer_matmul(graph)
    _weight_only_matmul(graph)
    _rotary_for_every_row(graph)
    _attention_without_transposes(graph)
    mask_every_query(graph)
    _residual_as_sum(graph)
    _drop_dead(graph)
    _unique_names(graph)
    if any(node.domain == MICROSOFT for node in graph):
        model.opset_imports[MICROSOFT] = 1


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def _only_consumer(value: ir.Value, kind: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type == kind else None


def _constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    if value is None:
        return None
    tensor = value.const_value
    if tensor is None:
        node = _producer(value, "Constant")
        if node is None:
            return None
        attribute = next(iter(node.attributes.values()))
        return np.asarray(
            attribute.value.numpy() if hasattr(attribute.value, "numpy") else attribute.value
        )
    return tensor.numpy()


def _initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
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


def _swap(old: ir.Node, new: ir.Node, graph: ir.Graph, gone: Sequence[ir.Node]) -> None:
    """Put `new` where `old` is; its output takes over the name, type and readers of `old`'s."""
    graph.insert_before(old, new)
    before, after = old.outputs[0], new.outputs[0]
    after.type, after.shape = before.type, before.shape
    name, before.name = before.name, f"{before.name}_gone"
    after.name = name
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    for node in gone:
        graph.remove(node, safe=True)


def _weight_of(matmul: ir.Node) -> tuple[ir.Node, bool] | None:
    """The DequantizeLinear behind the second factor, and whether a transpose stands between."""
    value = matmul.inputs[1]
    transpose = _producer(value, "Transpose")
    node = _producer(transpose.inputs[0] if transpose else value, "DequantizeLinear")
    if node is None or node.inputs[0] is None or node.inputs[0].const_value is None:
        return None
    return node, transpose is not None


def _block(dequantize: ir.Node) -> int:
    """Weights that share a scale along a row; 0 where a row has one."""
    attribute = dequantize.attributes.get("block_size")
    return attribute.as_int() if attribute is not None else 0


def _bias(matmul: ir.Node, size: int) -> tuple[ir.Node, ir.Value] | None:
    """The addition of a constant vector [size] right behind a product."""
    add = _only_consumer(matmul.outputs[0], "Add")
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
        left, right = _producer(node.inputs[0], "DequantizeLinear"), _weight_of(node)
        if left is None or right is None or _block(right[0]):
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
        _swap(last, new, graph, [bias[0], node] if bias else [node])


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
        return _initializer(graph, name, np.ascontiguousarray(weight.const_value.numpy().T))
    node = ir.node("Transpose", [weight], attributes={"perm": [1, 0]}, name=name)
    node.outputs[0].name = name
    graph.insert_before(before, node)
    return node.outputs[0]


def _weight_only_matmul(graph: ir.Graph) -> None:
    """x · dequantize(weight)ᵀ → MatMulNBits, with 4 or 8 bit per weight and a scale per block."""
    for node in list(graph):
        if node.op_type != "MatMul" or _producer(node.inputs[0], "DequantizeLinear") is not None:
            continue
        right = _weight_of(node)
        if right is None or not right[1]:
            continue
        weight, scale, zero = right[0].inputs[:3]
        assert weight is not None and weight.const_value is not None
        assert scale is not None and zero is not None
        codes, scales, zeros = weight.const_value.numpy(), _constant(scale), _constant(zero)
        if scales is None or zeros is None:
            continue
        if any(u.node.op_type == "Gather" for u in weight.uses()):
            continue
        block = _block(right[0]) or 32
        rows, columns = codes.shape
        if block < 16 or block & (block - 1):
            continue
        bits = 4 if codes.min() >= -8 and codes.max() <= 7 else 8
        blocks = -(-columns // block)
        if scales.ndim == 1:
            scales, zeros = (np.repeat(v[:, None], blocks, axis=1) for v in (scales, zeros))
        name = weight.name or ""
        packed = _initializer(graph, f"{name}.nbits", _pack(codes, bits, block))
        flat = np.ascontiguousarray(scales.reshape(-1).astype(np.float32))
        inputs = [node.inputs[0], packed, _initializer(graph, f"{scale.name}.nbits", flat)]
        if zeros.any():
            points = _pack(zeros, bits, blocks).reshape(-1)
            inputs.append(_initializer(graph, f"{zero.name}.nbits", points))
        new = ir.node(
            "MatMulNBits",
            inputs,
            attributes={
                "K": columns,
                "N": rows,
                "bits": bits,
                "block_size": block,
                "accuracy_level": 4 if bits == 4 else 0,
            },
            domain=MICROSOFT,
            name=_layer(weight),
        )
        _swap(node, new, graph, [node])


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


def _attention_without_transposes(graph: ir.Graph) -> None:
    """Attention over [batch, heads, length, size] between reshapes → over [batch, length, hidden]."""
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        sides = [_split_heads(node.inputs[i]) for i in range(3)]
        merge = _merge_heads(node.outputs[0])
        if merge is None or any(side is None for side in sides):
            continue
        query, key, value = (side for side in sides if side is not None)
        if key[1] != value[1]:
            continue
        inputs = [query[0], key[0], value[0], *node.inputs[3:]]
        attributes = dict(node.attributes)
        attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", query[1])
        attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", key[1])
        new = ir.Node(
            "", "Attention", inputs, list(attributes.values()), name=node.name, num_outputs=1
        )
        _swap(merge, new, graph, [])


def mask_every_query(graph: ir.Graph) -> None:
    """Spread a mask that is the same for every query over the queries: the kernel does not."""
    made: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for node in list(graph):
        mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
        query = node.inputs[0]
        if mask is None or mask.shape is None or query is None or query.shape is None:
            continue
        if node.domain or len(mask.shape) < 2 or mask.shape[-2] != 1:
            continue
        axis = len(query.shape) - 2
        if query.shape[axis] == 1:
            continue
        if (mask, query) not in made:
            made[mask, query] = _spread(graph, node, mask, query, axis)
        node.replace_input_with(3, made[mask, query])


def _spread(
    graph: ir.Graph, before: ir.Node, mask: ir.Value, query: ir.Value, axis: int
) -> ir.Value:
    name = f"{mask.name}.of.{query.name}"
    one = _initializer(graph, "one.of.shape", np.array([1], np.int64))
    size = ir.node(
        "Shape", [query], attributes={"start": axis, "end": axis + 1}, name=f"{name}.size"
    )
    shape = ir.node("Concat", [size.outputs[0], one], attributes={"axis": 0}, name=f"{name}.shape")
    spread = ir.node("Expand", [mask, shape.outputs[0]], name=name)
    for node in (size, shape, spread):
        node.outputs[0].name = node.name
        graph.insert_before(before, node)
    spread.outputs[0].type = mask.type
    return spread.outputs[0]


def _split_heads(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What is reshaped and transposed into heads, and how many heads there are."""
    transpose = _producer(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return None
    reshape = _producer(transpose.inputs[0], "Reshape")
    if reshape is None or reshape.inputs[0] is None:
        return None
    source, heads = reshape.inputs[0], _heads(reshape.inputs[0].shape, reshape.outputs[0].shape)
    return (source, heads) if heads is not None else None


def _heads(flat: ir.Shape | None, split: ir.Shape | None) -> int | None:
    """How many heads [batch, length, hidden] is split into, where nothing but the last axis is split."""
    if flat is None or split is None or len(flat) != 3 or len(split) != 4:
        return None
    heads, size = split[2], split[3]
    if not isinstance(heads, int) or not isinstance(size, int) or flat[2] != heads * size:
        return None
    same = all(
        str(a) == str(b) and str(a) != "None" for a, b in zip(flat[:2], split[:2], strict=True)
    )
    return heads if same else None


def _merge_heads(value: ir.Value) -> ir.Node | None:
    """The reshape that puts heads side by side again, behind its transpose."""
    transpose = _only_consumer(value, "Transpose")
    if transpose is None or list(transpose.attributes.get_ints("perm", [])) != [0, 2, 1, 3]:
        return None
    reshape = _only_consumer(transpose.outputs[0], "Reshape")
    if reshape is None:
        return None
    heads = _heads(reshape.outputs[0].shape, transpose.outputs[0].shape)
    return reshape if heads is not None else None


def _rotary_for_every_row(graph: ir.Graph) -> None:
    """Give RotaryEmbedding tables of the batch's size: the exporter leaves them at 1, which the kernel refuses."""
    made: dict[tuple[str, ir.Value | None], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "RotaryEmbedding" or node.domain or len(node.inputs) > 3:
            continue
        x = node.inputs[0]
        for place in (1, 2):
            table = node.inputs[place]
            wave = table.producer() if table is not None else None
            if x is None or table is None or wave is None or wave.op_type not in ("Cos", "Sin"):
                continue
            angles = wave.inputs[0]
            if angles is None or angles.shape is None or angles.shape[0] != 1:
                continue
            key = (wave.op_type, angles)
            if key not in made:
                made[key] = _expanded(graph, node, x, table)
            node.replace_input_with(place, made[key])


def _expanded(graph: ir.Graph, before: ir.Node, x: ir.Value, table: ir.Value) -> ir.Value:
    """`table` [1, length, size] repeated to [batch of x, length, size]."""
    batch = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
    rest = ir.node("Shape", [table], attributes={"start": 1})
    shape = ir.node("Concat", [batch.outputs[0], rest.outputs[0]], attributes={"axis": 0})
    wide = ir.node("Expand", [table, shape.outputs[0]])
    for word, node in (("batch", batch), ("rest", rest), ("shape", shape), ("wide", wide)):
        node.outputs[0].name = f"{table.name}_{word}"
        graph.insert_before(before, node)
    return wide.outputs[0]


def _residual_as_sum(graph: ir.Graph) -> None:
    for node in list(graph):
        if node.op_type != "Add" or any(
            v is None or v.const_value is not None for v in node.inputs
        ):
            continue
        readers = [use.node.op_type for use in node.outputs[0].uses()]
        if "LayerNormalization" in readers:
            node.op_type = "Sum"


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
