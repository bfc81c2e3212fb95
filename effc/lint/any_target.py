"""Rules that hold wherever a graph runs: broken grids, values that are no numbers, sizes that are baked in."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from effc.backends.onnx_match import constant
from effc.lint import edit
from effc.lint.rule import ERROR, OPENVINO, ORT, TARGETS, WARNING, Hit, rule
from effc.lint.view import DQ, Q, behind, codes, fixed, grid, name, nodes, readers, sizes

KNOWN_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft")


@rule(
    "QDQ001", ERROR, *TARGETS,
    what="the scale of a grid is zero, negative, infinite or no number",
    cost="onnxruntime gives NaN or wrong numbers without a word, openvino other wrong ones, tensorrt refuses the file",
    fix="calibrate again; a tensor that was all zero needs any positive scale",
)  # fmt: skip
def broken_scale(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, Q, DQ):
        scale = grid(node).scale
        if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
            bad = scale[~(np.isfinite(scale) & (scale > 0))]
            more = f"{bad.size} of {scale.size} scales are like {bad.flat[0]:g}"
            yield Hit(node=node, tensor=name(node.inputs[1]), evidence=more)


@rule(
    "QDQ002", WARNING, *TARGETS,
    what="a value is quantised on one grid and dequantised on another",
    cost="everything behind it is off by the ratio of the scales",
    fix="give both nodes the same scale and zero point",
)  # fmt: skip
def other_grid(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, DQ):
        quantize = behind(node.inputs[0], Q)
        if quantize is None:
            continue
        one, other = grid(quantize), grid(node)
        if one.scale is None or other.scale is None or one.same(other):
            continue
        if one.zero is None or other.zero is None:
            continue
        evidence = f"scale {one.scale.flat[0]:g} in front, {other.scale.flat[0]:g} behind"
        if np.array_equal(one.scale, other.scale):
            evidence = "the zero points differ"
        yield Hit(node=node, tensor=name(node.inputs[0]), evidence=evidence)


@rule(
    "QDQ003", ERROR, *TARGETS,
    what="a constant holds NaN",
    cost="every value that depends on it is NaN; no runtime says so",
    fix="export again: a weight that diverged, or an overflow in 16 bit",
)  # fmt: skip
def not_a_number(graph: ir.Graph) -> Iterator[Hit]:
    for value in graph.initializers.values():
        kind = value.dtype
        if value.const_value is None or kind is None or not kind.is_floating_point():
            continue
        array = value.const_value.numpy().astype(np.float32, copy=False)
        if bad := int(np.isnan(array).sum()):
            found = readers(value)
            if found:
                evidence = f"{bad} of {array.size} values"
                yield Hit(node=found[0], tensor=name(value), evidence=evidence)


@rule(
    "QDQ004", WARNING, *TARGETS,
    what="a value is quantised twice on the same grid",
    cost="the second pair changes no number; openvino runs a node for it",
    fix="read what the first pair gives",
)  # fmt: skip
def twice(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, DQ):
        second = behind(node.inputs[0], Q)
        first = behind(second.inputs[0], DQ) if second is not None else None
        if second is None or first is None or codes(first) is not None:
            continue
        if grid(first).same(grid(second)) and grid(second).same(grid(node)):
            if grid(first).kind != grid(node).kind:
                continue
            yield Hit(
                node=second, tensor=name(second.inputs[0]),
                evidence=f"{first.name} gives it on that grid",
                repair=edit.replace(node.outputs[0], first.outputs[0]),
            )  # fmt: skip


@rule(
    "QDQ005", WARNING, ORT, OPENVINO,
    what="a weight is stored in float and quantised when the file is opened",
    cost="four times the bytes on disk and to send, and more time to open",
    fix="store the codes",
)  # fmt: skip
def float_weight(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, Q):
        value = node.inputs[0]
        array = constant(value) if value is not None and value.const_value is not None else None
        g = grid(node)
        if array is None or array.size < 256 or g.scale is None or g.zero is None or g.block:
            continue
        if g.kind is None or g.kind.itemsize != 1 or not g.kind.is_integer():
            continue
        evidence = f"{array.nbytes:,} bytes for {array.size:,} codes"
        yield Hit(
            node=node, tensor=name(value), evidence=evidence,
            repair=edit.store_codes(graph, node, array, g),
        )  # fmt: skip


@rule(
    "ONX001", ERROR, *TARGETS,
    what="an operator that the standard does not have, of nobody's domain",
    cost="no runtime opens the file without the library that brings the operator",
    fix="export without it, or ship its library; lint sees nothing behind it",
)  # fmt: skip
def unknown_operator(graph: ir.Graph) -> Iterator[Hit]:
    opset = graph.opset_imports.get("", 1)
    for node in nodes(graph):
        if node.domain in ("", "ai.onnx"):
            try:
                onnx.defs.get_schema(node.op_type, opset, "")
                continue
            except onnx.defs.SchemaError:
                evidence = f"{node.op_type} is not in opset {opset}"
        elif node.domain in KNOWN_DOMAINS or node.op_identifier() in _functions(graph):
            continue
        else:
            evidence = f"{node.op_type} of domain {node.domain!r}"
        yield Hit(node=node, tensor=name(next(iter(node.outputs), None)), evidence=evidence)


def _functions(graph: ir.Graph) -> set[object]:
    return set(graph.meta.get("functions", ()))


@rule(
    "ONX002", ERROR, *TARGETS,
    what="a reshape to fixed sizes of a value whose size is free",
    cost="one batch or length runs, every other fails; tensorrt does not build where the profile has others",
    fix="write -1 for one of the sizes, or 0 for one that is kept; or export with that dimension fixed",
)  # fmt: skip
def baked(graph: ir.Graph) -> Iterator[Hit]:
    for node in nodes(graph, "Reshape"):
        shape = constant(node.inputs[1])
        had = sizes(node.inputs[0])
        if shape is None or not had or fixed(had) or (shape <= 0).any():
            continue
        evidence = f"{_shown(had)} becomes {[int(n) for n in shape.ravel()]}"
        yield Hit(node=node, tensor=name(node.inputs[0]), evidence=evidence)


def _shown(shape: list[object]) -> str:
    return "[" + ", ".join(str(size) for size in shape) + "]"
