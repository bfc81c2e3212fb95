"""Attention for one token on a cache of codes, as onnxruntime's kernel reads it: GroupQueryAttention takes the bytes.

    dequantize([past, quantize(new)]) → attention      becomes      one node, which reads a quarter of the memory

It is faster than attention on floats for one token, the more so the longer the cache is, and several times slower for
many tokens: there the codes are made floats in front (benchmarks/cache.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from effc.backends.onnx_match import constant, initializer, producer, take_over
from effc.backends.ort_attention import flat, give_merged, merged_heads, repeated

MICROSOFT = "com.microsoft"
LOWEST = float(np.finfo(np.float32).min)


def attention_on_codes(graph: ir.Graph) -> None:
    """Attention over dequantised keys and values → GroupQueryAttention on the codes."""
    masks: dict[ir.Value, _Mask] = {}
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) != 4:
            continue
        key, value = _coded(node.inputs[1]), _coded(node.inputs[2])
        merge, mask = merged_heads(node.outputs[0]), node.inputs[3]
        if key is None or value is None or merge is None or mask is None or mask.dtype is None:
            continue
        query, keys, values = (
            flat(graph, node, side) for side in (node.inputs[0], key.new, value.new)
        )
        if query is None or keys is None or values is None or query[0].shape is None:
            continue
        if not (
            keys[1] == values[1] and query[1] == keys[1] * key.repeats == keys[1] * value.repeats
        ):
            continue
        if mask not in masks:
            masks[mask] = _mask(graph, node, mask, query[0])
        of = masks[mask]
        inputs = [
            query[0], keys[0], values[0], key.past, value.past, of.last, of.total,
            None, None, None, of.bias, None, key.scale, value.scale,
        ]  # fmt: skip
        attributes = [
            ir.AttrInt64("num_heads", query[1]), ir.AttrInt64("kv_num_heads", keys[1]),
            ir.AttrString("k_quant_type", "PER_CHANNEL"), ir.AttrString("v_quant_type", "PER_CHANNEL"),
            ir.AttrInt64("kv_cache_bit_width", 8),
            *(node.attributes[name] for name in ("scale", "softcap") if name in node.attributes),
        ]  # fmt: skip
        new = ir.Node(
            MICROSOFT, "GroupQueryAttention", inputs, attributes, name=node.name, num_outputs=3
        )
        graph.insert_before(node, new)
        give_merged(merge, new.outputs[0])
        for made, side in zip(new.outputs[1:], (key, value), strict=True):
            take_over(side.joined, made)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """Keys or values of an attention: the new ones, codes of those before, both joined, and the size of a code."""

    new: ir.Value
    past: ir.Value
    joined: ir.Value
    scale: ir.Value
    repeats: int


def _coded(value: ir.Value | None) -> _Side | None:
    value, repeats = repeated(value)
    scaled = producer(value, "Mul")
    wide = producer(scaled.inputs[0], "Cast") if scaled else None
    join = producer(wide.inputs[0], "Concat") if wide else None
    if scaled is None or join is None or len(join.inputs) != 2:
        return None
    past, codes = join.inputs
    narrow = producer(codes, "Cast")
    clip = producer(narrow.inputs[0], "Clip") if narrow else None
    rounded = producer(clip.inputs[0], "Round") if clip else None
    divided = producer(rounded.inputs[0], "Div") if rounded else None
    scale = scaled.inputs[1]
    if divided is None or past is None or scale is None or divided.inputs[1] is not scale:
        return None
    new, size = divided.inputs[0], constant(scale)
    if new is None or size is None or size.ndim != 4 or past.dtype != ir.DataType.INT8:
        return None
    return _Side(new=new, past=past, joined=join.outputs[0], scale=scale, repeats=repeats)


@dataclass(frozen=True, kw_only=True)
class _Mask:
    """A mask as the kernel wants it: added to the scores, with the number of positions and the last of every row."""

    bias: ir.Value
    total: ir.Value
    last: ir.Value


def _mask(graph: ir.Graph, before: ir.Node, mask: ir.Value, query: ir.Value) -> _Mask:
    """A mask [batch, 1, length, positions] that is true where attention may look, or is added to the scores."""
    name = f"{mask.name}.of.codes"
    made: list[ir.Node] = []

    def put(op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{name}.{len(made)}")
        node.outputs[0].name = node.name
        made.append(node)
        return node.outputs[0]

    bias = mask
    if mask.dtype == ir.DataType.BOOL:
        seen = initializer(graph, "seen.of.mask", np.array(0, np.float32))
        hidden = initializer(graph, "hidden.of.mask", np.array(LOWEST, np.float32))
        bias = put("Where", [mask, seen, hidden])
        bias.type = ir.TensorType(ir.DataType.FLOAT)
    one = initializer(graph, "one.of.positions", np.array(1, np.int32))
    flat_ = initializer(graph, "no.axes", np.array([], np.int64))
    length = put("Cast", [put("Shape", [mask], start=-1)], to=int(ir.DataType.INT32))
    total = put("Reshape", [length, flat_])
    last = put("Expand", [put("Sub", [length, one]), put("Shape", [query], start=0, end=1)])
    graph.insert_before(before, made)
    return _Mask(bias=bias, total=total, last=last)
