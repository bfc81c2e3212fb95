"""Small ONNX files as other tools write them, made on the spot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from effc.foreign import file
from effc.foreign.module import WRITTEN, Graph, module_of
from effc.foreign.steps import Step, Steps, steps_of


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> Any:
    """A node whose names are written in a row; `_` leaves an input out."""
    names = ["" if name == "_" else name for name in inputs.split()]
    return helper.make_node(op, names, outputs.split(), **attributes)


def save(
    place: Path,
    nodes: list[Any],
    inputs: Mapping[str, tuple[Any, ...]],
    tensors: Mapping[str, Any] | None = None,
    *,
    outputs: tuple[str, ...] = ("y",),
    opset: int = 21,
    kinds: Mapping[str, int] | None = None,
    domains: Mapping[str, int] | None = None,
) -> Path:
    """A file of nodes; inputs are float32 but for `kinds`, and free where a size is a word."""
    kinds = kinds or {}
    graph = helper.make_graph(
        nodes,
        "main",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), list(s)) for n, s in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (tensors or {}).items()],
    )  # fmt: skip
    imports = [
        helper.make_opsetid(word, version)
        for word, version in {"": opset, **(domains or {})}.items()
    ]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model) if not domains else model
    known = {v.name: v for v in inferred.graph.value_info}
    for value in model.graph.output:  # onnxruntime wants their types
        if value.name in known:
            value.type.CopyFrom(known[value.name].type)
        elif any(v.name == value.name for v in inferred.graph.output):
            value.CopyFrom(next(v for v in inferred.graph.output if v.name == value.name))
    onnx.save(model, place)
    return place


def steps(place: Path) -> Steps:
    return steps_of(file.read(place, file.parsed(place)), WRITTEN)


def module(place: Path) -> Graph:
    return module_of(steps(place))


def ops(made: Graph) -> list[str]:
    return [step.op for step in made.steps.steps]


def only(made: Graph, op: str) -> Step:
    (found,) = [step for step in made.steps.steps if step.op == op]
    return found


def run(place: Path, feeds: Mapping[str, Any]) -> list[Any]:
    """What ONNX Runtime makes of it."""
    session = onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])
    arrays = {n: v.numpy() if isinstance(v, Tensor) else v for n, v in feeds.items()}
    return list(session.run(None, arrays))
