"""An ONNX file in 16 bit on a processor without kernels for it: computed in float32, rounded where the file says.

Every node that reads or gives 16 bit is put between casts, so that what leaves it is rounded as it would be. Left
alone, onnxruntime has no kernels for bfloat16, and computes whole chains of fp16 in float32, where nothing overflows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from effc import scratch
from effc.backends.ort_attention import mask_every_query
from effc.backends.ort_engine import OrtEngine

NARROW = (ir.DataType.BFLOAT16, ir.DataType.FLOAT16)
FLOAT = ir.DataType.FLOAT


def open_widened(path: Path, threads: int | None) -> OrtEngine:
    """The file in a session of onnxruntime, in which integers are not fused: kernels of this processor may saturate."""
    model = ir.load(path)
    mask_every_query(model.graph)
    widen(model)
    with scratch.held() as place:
        made = place / path.name
        ir.save(model, made, external_data=f"{made.name}.data")
        return OrtEngine(made, threads=threads, fuse_integers=False)


def widen(model: ir.Model) -> int:
    """Put every node that computes in 16 bit between casts; gives how many there were."""
    wide: dict[ir.Value, ir.Value] = {}
    changed = 0
    for node in list(model.graph):
        narrow = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype in NARROW]
        if not narrow or node.op_type in ("Cast", "Constant"):
            continue
        changed += 1
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype in NARROW:
                if value not in wide:
                    wide[value] = _cast(model, value, FLOAT, before=node)
                node.replace_input_with(place, wide[value])
        for value in node.outputs:
            if value.dtype in NARROW:
                _round(model, node, value)
    return changed


def between_casts(model: ir.Model, node: ir.Node) -> None:
    """Let a node that reads and gives 16 bit compute in float32."""
    for place, value in enumerate(node.inputs):
        if value is not None and value.dtype in NARROW:
            node.replace_input_with(place, _cast(model, value, FLOAT, before=node))
    for value in node.outputs:
        if value.dtype in NARROW:
            _round(model, node, value)


def _cast(model: ir.Model, value: ir.Value, kind: ir.DataType, *, before: ir.Node) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": int(kind)})
    made: Any = node.outputs[0]
    made.name, made.type, made.shape = f"{value.name}_wide", ir.TensorType(kind), value.shape
    model.graph.insert_before(before, node)
    found: ir.Value = made
    return found


def _round(model: ir.Model, node: ir.Node, value: ir.Value) -> None:
    """What a node gives is float32 now; the value that others read is that in 16 bit."""
    uses, kind = list(value.uses()), value.dtype
    assert kind is not None
    cast = ir.node("Cast", [value], attributes={"to": int(kind)})
    made: Any = cast.outputs[0]
    made.name, made.type, made.shape = f"{value.name}_narrow", ir.TensorType(kind), value.shape
    model.graph.insert_after(node, cast)
    for use in uses:
        use.node.replace_input_with(use.idx, made)
    value.type = ir.TensorType(FLOAT)
