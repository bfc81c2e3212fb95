"""What the places that lint finds cost in time: one layer with the fault, and without, on the runtime that it is of.

Where `effc lint --fix` puts it right, `without` is what it wrote; else it is the same layer made as the rule advises.

    python benchmarks/lint.py             # some minutes; writes benchmarks/results/lint-FEATURES.json
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np

from effc.backends.openvino_engine import OpenVinoEngine
from effc.backends.ort import optimized
from effc.backends.ort_engine import OrtEngine
from effc.bench import Case, compare
from effc.lint import run

sys.path.insert(0, str(common.ROOT / "tests"))
from nets import FLOAT, Net
from planted_onnx import (
    S8,
    U8,
    around,
    convolution,
    four_bit,
    halves,
    product,
    shared,
    two_activations,
)

BUDGET_S = 6.0
Build = Callable[[], Net]
ROWS = (1, 128, 768)
conv = partial(convolution, inputs=64, channels=64, size=28)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rule on a layer; `without` is made by --fix where it is not given.

    Without a rule it is a claim that one might make of it, and none does.
    """

    rule: str
    layer: str
    fault: Build
    without: Build | None = None
    advice: str = "--fix"


def integers() -> Net:
    """A convolution as ConvInteger, Cast and Mul, which stays on integers and gives floats."""
    net = Net()
    codes = net.q(net.input("x", ["n", 64, 28, 28]), 0.05, *U8)
    weight = net.const(net.draw.integers(-64, 64, (64, 64, 3, 3)).astype(np.int8))
    zeros = [net.const(np.uint8(128)), net.const(np.int8(0))]
    sums = net.add("Cast", net.add("ConvInteger", codes, weight, *zeros, pads=[1] * 4), to=FLOAT)
    y = net.add("Mul", sums, net.const(np.full((1, 64, 1, 1), 1e-4, np.float32)))
    net.give(net.add("Add", y, net.const(net.weight(1, 64, 1, 1))))
    return net


PLACES = {
    "ort": (
        Place(rule="ORT001", layer="three products 128×768×768 of one value",
              fault=shared(S8, 3, rows=128, size=768)),
        Place(rule="", layer="one product 128×768×768 of int8", fault=product(shape=ROWS, columns=768, act=S8),
              without=product(shape=ROWS, columns=768), advice="uint8"),
        Place(rule="ORT003", layer="product 128×768×3072", fault=product(shape=ROWS, columns=3072, bias="1")),
        Place(rule="ORT003", layer="table 128×768×768", fault=product(shape=(128, 768), columns=768, bias="1")),
        Place(rule="ORT004", layer="Gemm 128×768×768",
              fault=product(shape=(128, 768), columns=768, bias="1", op="Gemm")),
        Place(rule="ORT007", layer="convolution 64→64, 28×28", fault=conv(out=None), without=conv(),
              advice="a grid behind"),
        Place(rule="ORT007", layer="convolution 64→64, 28×28", fault=conv(out=None), without=integers,
              advice="ConvInteger"),
        Place(rule="ORT008", layer="convolution and rectifier, 28×28", fault=conv(between="Relu"),
              without=conv(between="Relu", out=(0, np.uint8)), advice="a grid without a sign"),
        Place(rule="ORT009", layer="convolution 64→64, 28×28", fault=conv(bias="int32", off=4.0)),
        Place(rule="ORT010", layer="convolution of two halves, 28×28",
              fault=halves(U8, (0.05, 0.05), inputs=32, size=28)),
        Place(rule="ORT011", layer="product 128×768×768, 4 bit",
              fault=four_bit(act=U8, axis=1, rows=128, sizes=(768, 768))),
        Place(rule="ORT013", layer="product 1×768×3072, 4 bit",
              fault=four_bit(block=32, axis=1, rows=1, sizes=(768, 3072)),
              without=four_bit(block=32, rows=1, sizes=(768, 3072)), advice="blocks along the sum"),
        Place(rule="ORT015", layer="product 128×768×768",
              fault=product(shape=ROWS, columns=768, act=(32768, np.uint16)),
              without=product(shape=ROWS, columns=768), advice="8 bit"),
        Place(rule="ORT016", layer="product 128×768×768, clipped",
              fault=product(shape=ROWS, columns=768, act=S8, clip=True)),
        Place(rule="ORT017", layer="Gelu of 128×3072", fault=around("Gelu", shape=(1, 128, 3072)),
              without=around("Gelu", None, shape=(1, 128, 3072)), advice="no grids"),
        Place(rule="ORT017", layer="LayerNormalization of 128×768", fault=around("LayerNormalization", shape=ROWS),
              without=around("LayerNormalization", None, shape=ROWS), advice="no grids"),
        Place(rule="ORT019", layer="convolution 64→64, 28×28", fault=conv(axis=1), without=conv(),
              advice="axis 0"),
    ),
    "openvino": (
        Place(rule="OV001", layer="product 128×768×768, uint8 around 128",
              fault=product(shape=ROWS, columns=768, kind=np.uint8, zero=128)),
        Place(rule="OV001", layer="convolution 64→64, 28×28, uint8 around 128", fault=conv(kind=np.uint8, zero=128)),
        Place(rule="OV002", layer="convolution of two halves, 28×28",
              fault=halves(U8, (0.05, 0.02), inputs=32, size=28),
              without=halves(U8, (0.05, 0.05), inputs=32, size=28), advice="one grid"),
        Place(rule="OV006", layer="product of activations", fault=two_activations(U8, 512),
              without=two_activations(S8, 512), advice="int8"),
        Place(rule="OV007", layer="convolution 64→64, 28×28", fault=conv(axis=1), without=conv(),
              advice="axis 0"),
        Place(rule="OV009", layer="transposed convolution, 28×28",
              fault=conv(op="ConvTranspose", axis=1, out=None),
              without=conv(op="ConvTranspose", axis=1, act=S8, out=None), advice="int8"),
    ),
}  # fmt: skip


def opener(target: str, path: Path) -> Callable[[], Any]:
    if target == "ort":
        return partial(OrtEngine, path, threads=1)
    return partial(OpenVinoEngine, path, {"precision": "f32"}, threads=1)


def timed(target: str, place: Place, folder: Path) -> dict[str, Any]:
    """The time of a layer with and without a fault; the rule must find the one and not the other."""
    rules = run.chosen(target, only=[place.rule] if place.rule else ())
    fault, without = place.fault().save(folder / "fault.onnx"), folder / "without.onnx"
    assert {one.id for one in run.check(fault, rules)} == ({place.rule} if place.rule else set()), (
        place
    )
    if place.without is None:
        assert run.repair(fault, without, rules).done
    else:
        place.without().save(without)
    assert not run.check(without, rules), place
    with opener(target, fault)() as engine:
        draw = np.random.default_rng(0)
        shapes = {
            p.name: [n if isinstance(n, int) and n > 0 else 1 for n in p.shape]
            for p in engine.inputs
        }
        feeds = {n: draw.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    openers = {"engine": opener(target, without), "fault": opener(target, fault)}
    case = Case(batch=1, length=None, feeds=feeds)
    shape = compare(openers, [case], threads=1, budget_s=BUDGET_S).to_json()["shapes"][0]
    against = shape["against"]["fault"]
    return {
        "target": target, "rule": place.rule, "layer": place.layer, "advice": place.advice, "fault_ms": against["ms"],
        "without_ms": shape["engine_ms"], "n": shape["n"], **{k: against[k] for k in ("ratio", "low", "high")},
    }  # fmt: skip


def whole(folder: Path) -> dict[str, Any]:
    """MiniLM as `quantize_static` of onnxruntime quantises it by default, to int8, and the same behind --fix."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    common.run_cli(
        "compile", common.minilm(), "-o", folder / "plain", "--target", "onnx", "--no-bench"
    )
    plain, fault, without = (
        folder / "plain" / "model.onnx",
        folder / "fault.onnx",
        folder / "without.onnx",
    )
    draw = np.random.default_rng(0)

    def drawn(batch: int, length: int) -> dict[str, Any]:
        with OrtEngine(plain, threads=1) as engine:
            names = [p.name for p in engine.inputs]
        ids = draw.integers(1000, 20000, (batch, length))
        return {n: ids if n == "input_ids" else np.full_like(ids, "mask" in n) for n in names}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = [drawn(2, 32) for _ in range(4)]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    quantize_static(
        plain, fault, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
        activation_type=QuantType.QInt8,
    )  # fmt: skip
    rules = run.chosen("ort")
    repaired = run.repair(fault, without, rules)
    openers = {
        "engine": opener("ort", without),
        "fault": opener("ort", fault),
        "float": opener("ort", plain),
    }
    case = Case(batch=1, length=128, feeds=drawn(1, 128))
    shape = compare(openers, [case], threads=1, budget_s=30).to_json()["shapes"][0]
    kinds = [[node.op_type for node in optimized(file).graph] for file in (fault, without)]
    return {
        "fixed": dict(Counter(one.id for one in repaired.done)),
        "left": dict(Counter(one.id for one in repaired.left)),
        "gap": repaired.gap,
        "float_products": [found.count("MatMul") + found.count("Gemm") for found in kinds],
        "integer_products": [
            found.count("QLinearMatMul") + found.count("MatMulIntegerToFloat") for found in kinds
        ],
        "shape": shape,
    }


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="effc-lint-") as folder:
        model = whole(Path(folder))
    print({k: v for k, v in model.items() if k != "shape"}, model["shape"]["against"], flush=True)
    found = []
    for target, places in PLACES.items():
        for place in places:
            with tempfile.TemporaryDirectory(prefix="effc-lint-") as folder:
                found.append(timed(target, place, Path(folder)))
            print(
                {k: round(v, 3) if isinstance(v, float) else v for k, v in found[-1].items()},
                flush=True,
            )
    print(
        common.write(
            f"lint-{common.features()}",
            {"name": "lint", "threads": 1, "places": found, "model": model},
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
