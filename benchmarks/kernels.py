"""How fast ONNX Runtime's matrix products are on this processor, one form beside the other.

The shapes are those of MiniLM's layers at 128 and 1024 tokens. What no form of product reaches, no engine can.

    python benchmarks/kernels.py             # a minute; writes benchmarks/results/kernels-FEATURES.json
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import onnx_ir as ir

from effc.backends.ort_engine import OrtEngine
from effc.backends.ort_rewrites import MICROSOFT, _pack
from effc.bench import Case, compare, geometric_mean

SHAPES = [
    (rows, inner, columns)
    for rows in (128, 1024)
    for inner, columns in ((384, 384), (384, 1536), (1536, 384))
]
Array = np.ndarray[Any, np.dtype[Any]]


def model(
    x: ir.Value, tensors: dict[str, Array], nodes: list[tuple[str, list[str], str, dict[str, Any]]]
) -> ir.Model:
    """A graph of a few nodes over one input; the last gives `y`."""
    values: dict[str, ir.Value] = {x.name or "": x}
    for name, array in tensors.items():
        tensor = ir.tensor(array, name=name)
        values[name] = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
    made = []
    for kind, inputs, output, attributes in nodes:
        domain = (
            MICROSOFT
            if kind.startswith(("MatMulIntegerToFloat", "MatMulNBits", "DynamicQuantizeMatMul"))
            else ""
        )
        node = ir.node(
            kind, [values[n] if n else None for n in inputs], attributes=attributes, domain=domain
        )
        node.outputs[0].name = output
        values[output] = node.outputs[0]
        made.append(node)
    y = values["y"]
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, None])
    graph = ir.Graph(
        [x],
        [y],
        nodes=made,
        initializers=[values[n] for n in tensors],
        opset_imports={"": 21, MICROSOFT: 1},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


def forms(inner: int, columns: int) -> dict[str, ir.Model]:
    """The same product in every form that ONNX Runtime has for it."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((inner, columns)).astype(np.float32)
    scale = (np.abs(weight).max(0) / 64).astype(np.float32)
    codes = np.rint(weight / scale).astype(np.int8)
    one = np.float32(0.05)

    def x() -> ir.Value:
        return ir.Value(
            name="x", shape=ir.Shape([None, inner]), type=ir.TensorType(ir.DataType.FLOAT)
        )

    def integers(activation: Any, zero: int, weights: Array) -> ir.Model:
        tensors = {"s": np.array(one), "z": np.array(zero, activation), "w": weights, "t": scale,
                   "v": np.full(columns, 128 if weights.dtype == np.uint8 else 0, weights.dtype)}  # fmt: skip
        nodes: list[Any] = [("QuantizeLinear", ["x", "s", "z"], "q", {}),
                            ("MatMulIntegerToFloat", ["q", "w", "s", "t", "z", "v"], "y", {})]  # fmt: skip
        return model(x(), tensors, nodes)

    def blocks(bits: int, level: int) -> ir.Model:
        packed = _pack(np.ascontiguousarray((codes if bits == 8 else codes // 16).T), bits, 32)
        tensors = {"w": packed, "t": np.ones(columns * inner // 32, np.float32)}
        attributes = {
            "K": inner,
            "N": columns,
            "bits": bits,
            "block_size": 32,
            "accuracy_level": level,
        }
        return model(x(), tensors, [("MatMulNBits", ["x", "w", "t"], "y", attributes)])

    dynamic: list[Any] = [("DynamicQuantizeMatMul", ["x", "w", "t"], "y", {})]
    return {
        "engine": integers(np.uint8, 128, codes),
        "float": model(x(), {"w": weight}, [("MatMul", ["x", "w"], "y", {})]),
        "uint8 x uint8": integers(np.uint8, 128, (codes.astype(np.int16) + 128).astype(np.uint8)),
        "int8 x int8": integers(np.int8, 0, codes),
        "dynamic uint8": model(x(), {"w": codes, "t": scale}, dynamic),
        "8-bit blocks, int8 inside": blocks(8, 4),
        "4-bit blocks, int8 inside": blocks(4, 4),
    }


def main() -> int:
    found: list[dict[str, Any]] = []
    for rows, inner, columns in SHAPES:
        with tempfile.TemporaryDirectory(prefix="effc-kernels-") as place:
            openers: dict[str, Callable[[], Any]] = {}
            for number, (name, form) in enumerate(forms(inner, columns).items()):
                file = Path(place) / f"{number}.onnx"
                ir.save(form, file)
                openers[name] = partial(OrtEngine, file, threads=2)
            feeds = {
                "x": np.random.default_rng(1).standard_normal((rows, inner)).astype(np.float32)
            }
            case = Case(batch=rows, length=None, feeds=feeds)
            shape = compare(openers, [case], threads=2, budget_s=6).to_json()["shapes"][0]
        speeds = {n: a["ms"] for n, a in shape["against"].items()} | {
            "uint8 x int8": shape["engine_ms"]
        }
        found.append(
            {"rows": rows, "inner": inner, "columns": columns, "ms": speeds, "n": shape["n"]}
        )
        print(rows, inner, columns, {n: round(ms, 3) for n, ms in speeds.items()})
    names = found[0]["ms"]
    ratios = {n: geometric_mean([r["ms"]["float"] / r["ms"][n] for r in found]) for n in names}
    print("faster than float by", {n: round(r, 2) for n, r in ratios.items()})
    print(
        common.write(
            f"kernels-{common.features()}", {"name": "kernels", "shapes": found, "ratios": ratios}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
