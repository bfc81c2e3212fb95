"""Two small packages of one graph, as the compiler lays them out, without a compile."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from effc import package

SIZES = (64, 96, 8)


def weights(seed=0, step=0.0, sizes=SIZES):
    """Two layers, the first in int8 codes with a scale a row, and how far they have gone with another seed."""
    draw, move = np.random.default_rng(0), np.random.default_rng(seed)
    i, h, o = sizes
    first = draw.normal(size=(h, i)) + step * move.normal(size=(h, i))
    second = draw.normal(size=(o, h)) + step * move.normal(size=(o, h))
    scale = np.abs(first).max(axis=1) / 127
    codes = np.rint(first / scale[:, None]).astype(np.int8)
    bias = draw.normal(size=o) + step * move.normal(size=o)
    return {
        "first.codes": codes, "first.scale": scale.astype("f4"), "first.zero": np.zeros(h, np.int8),
        "second": second.astype("f4"), "bias": bias.astype("f4"),
    }  # fmt: skip


def ends(tensors):
    """How wide a row of the input is, and of the output."""
    return tensors["first.codes"].shape[1], tensors["second"].shape[0]


def model(tensors):
    i, o = ends(tensors)
    nodes = [
        helper.make_node("DequantizeLinear", ["first.codes", "first.scale", "first.zero"], ["w"], axis=0),
        helper.make_node("Gemm", ["x", "w"], ["a"], transB=1),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Gemm", ["b", "second", "bias"], ["y"], transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", i])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", o])],
        [numpy_helper.from_array(v, n) for n, v in sorted(tensors.items())],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def write(place: Path, tensors, *, external=False, source="0", **how):
    """A package of these weights that `effc verify` finds whole."""
    ports = list(zip(("x", "y"), ends(tensors), strict=True))
    return write_model(place, model(tensors), ports, external=external, source=source, **how)


def write_model(
    place: Path, made, ports, *, external=False, target="ort", source="0", options=None
):
    """A package of a model with one input and one output, each a name and the width of its rows."""
    place.mkdir(parents=True)
    beside = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save(made, place / "model.onnx", **(beside if external else {}))
    for name in ("decisions.json", "origins.json"):
        (place / name).write_text("{}\n", encoding="utf-8")
    (place / "bench.json").write_text(json.dumps({"ms": len(source)}), encoding="utf-8")
    told = [{"name": n, "dtype": "float32", "shape": ["batch", s]} for n, s in ports]
    engine = {
        "role": "main", "target": target, "path": "model.onnx", "opset": 21,
        "sha256": package.digest(place / "model.onnx"), "inputs": told[:1], "outputs": told[1:],
        "options": options or {},
    }  # fmt: skip
    package.write_manifest(
        place,
        {"schema": 1, "kind": "module", "engines": [engine], "links": [], "graph_digest": "0" * 64,
         "source": {"name": source}, "decisions": "decisions.json", "origins": "origins.json"},
    )  # fmt: skip
    assert package.check(place) == []
    return place
