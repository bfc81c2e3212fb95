"""What each rule of the ort dialect is worth: opset, and every rewrite left out in turn, on MiniLM-L6-v2.

python benchmarks/opset.py             # writes benchmarks/results/opset-FEATURES.json
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import common
import onnx_ir as ir

from effc.backends import ort_rewrites
from effc.backends.eager import ports
from effc.backends.onnx import save, to_onnx
from effc.backends.ort_engine import OrtEngine
from effc.bench import compare
from effc.build import Builder
from effc.cache import Cache
from effc.compiler import trace_source
from effc.measure import shaped_cases
from effc.progress import Progress
from effc.recipe import BenchSpec, build
from effc.samples import Samples
from effc.source import load

REWRITES: dict[str, Callable[[ir.Graph], None]] = {
    "integer matmul": ort_rewrites._integer_matmul,
    "attention": ort_rewrites.heads_side_by_side,
    "sum": ort_rewrites._residual_as_sum,
}


def rewritten(model: ir.Model, names: list[str]) -> ir.Model:
    """The model with the named rewrites alone."""
    for name in names:
        REWRITES[name](model.graph)
    ort_rewrites._drop_dead(model.graph)
    ort_rewrites._unique_names(model.graph)
    model.opset_imports[ort_rewrites.MICROSOFT] = 1
    return model


def main() -> int:
    recipe = build(
        {
            "source": {"transformers": str(common.minilm())},
            "calib": {"file": str(common.SENTENCES)},
            "passes": [{"pass": "quantize"}],
        }
    )
    source = load(recipe.source.as_mapping())
    samples = Samples(source, recipe.calib)
    original = trace_source(source)
    builder = Builder(
        recipe=recipe, source=source, samples=samples, original=original, progress=Progress(),
        cache=Cache(None),
    )  # fmt: skip
    program = builder.rewrite("ort").program
    plain, quantized = original.only(), program.only()
    everything = list(REWRITES)
    models = {
        "float opset 21": to_onnx(plain, 21, translate=False),
        "float opset 23": to_onnx(plain, 23, translate=False),
        "int8 opset 21": to_onnx(quantized, 21),
        "int8 opset 23": to_onnx(quantized, 23),
        **{
            f"int8 opset 23, without {name}": rewritten(
                to_onnx(quantized, 23), [n for n in everything if n != name]
            )
            for name in everything
        },
        "engine": rewritten(to_onnx(quantized, 23), everything),
    }
    with tempfile.TemporaryDirectory(prefix="effc-opset-") as place:
        openers = {}
        for number, (name, model) in enumerate(models.items()):
            folder = Path(place) / str(number)
            files = save(model, folder)
            openers[name] = partial(OrtEngine, folder / files[0], threads=2)
        cases = shaped_cases(samples, BenchSpec().shapes, ports(quantized)[0])
        found = compare(openers, cases, threads=2, budget_s=40).to_json()
    print(common.write(f"opset-{common.features()}", {"name": "opset", "bench": found}))
    for shape in found["shapes"]:
        print(f"{shape['batch']}x{shape['length']}: engine {shape['engine_ms']:.2f} ms")
        for name, other in shape["against"].items():
            print(
                f"    {name:40} {other['ms']:8.2f} ms  {other['ratio']:.2f} [{other['low']:.2f}, {other['high']:.2f}]"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
