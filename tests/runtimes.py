"""What runtimes make of an ONNX file: whether it opens, what runs in float, and how far it is from node by node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from effc.backends.ort import optimized
from effc.backends.ort_engine import OrtEngine, PlainEngine
from effc.errors import LoweringError

LAYERS = ("MatMul", "Gemm", "Conv", "FusedConv", "ConvTranspose", "FusedMatMul")


def feeds_of(engine: Any, size: int = 3) -> dict[str, Any]:
    draw = np.random.default_rng(1)
    made = {}
    for port in engine.inputs:
        shape = [n if isinstance(n, int) and n > 0 else size for n in port.shape]
        kind = np.dtype(port.dtype)
        made[port.name] = (
            (draw.standard_normal(shape) * 1.5).astype(kind)
            if kind.kind == "f"
            else np.ones(shape, kind)
        )
    return made


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = [(one[k].astype(np.float64), other[k].astype(np.float64)) for k in one]
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-30)) for a, b in pairs)


def on_ort(path: Path) -> str:
    try:
        with OrtEngine(path, threads=1) as engine, PlainEngine(path, threads=1) as plain:
            feeds = feeds_of(engine)
            exact = plain(feeds)
            if gap(exact, engine(feeds)) > 0.02:
                return "wrong"
    except LoweringError as error:
        return "refused" if "refuses" in error.what else "fails"
    kinds = [node.op_type for node in optimized(path).graph.all_nodes()]
    return "float" if any(kind in LAYERS for kind in kinds) else "fine"


def on_openvino(path: Path) -> str:
    openvino = __import__("openvino")
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    try:
        made = openvino.Core().compile_model(str(path), "CPU", settings)
    except RuntimeError:
        return "refused"
    with PlainEngine(path, threads=1) as plain:
        feeds = feeds_of(plain)
        exact = plain(feeds)
    found = {
        p.any_name: np.array(v) for p, v in zip(made.outputs, made(feeds).values(), strict=True)
    }
    if gap(exact, found) > 0.02:
        return "wrong"
    seen = []
    for node in made.get_runtime_model().get_ops():
        info = {k: v.astype(str) for k, v in node.get_rt_info().items()}
        reads = [v.get_node().get_rt_info() for v in node.input_values()]
        first = reads[0]["layerType"].astype(str) if reads and "layerType" in reads[0] else ""
        seen.append((info.get("layerType"), info.get("runtimePrecision"), first))
    layers = [
        s for s in seen if s[0] in ("FullyConnected", "MatMul", "Convolution", "Deconvolution")
    ]
    is_float = any(kind == "f32" or first == "Eltwise" for _, kind, first in layers)
    return "float" if is_float else "fine"


def on_tensorrt(path: Path) -> str:
    from effc.backends import tensorrt_build as build

    graph = ir.load(path).graph
    names = {v.name: list(v.shape) for v in graph.inputs}
    shapes = {k: [n if isinstance(n, int) else str(n.value) for n in v] for k, v in names.items()}
    free = {n for shape in shapes.values() for n in shape if isinstance(n, str)}
    try:
        build.build(path, build.Plan(profile=dict.fromkeys(free, (1, 2, 4))), shapes)
    except LoweringError:
        return "refused"
    return "fine"


RUNTIMES = {"ort": on_ort, "openvino": on_openvino, "tensorrt": on_tensorrt}
TESTED = onnxruntime.__version__
