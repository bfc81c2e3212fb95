"""effc beside what else turns a model into an engine for this processor: each peer is made here, and all run in turns.

    pip install nncf==3.4.0                     # a peer, and no part of effc
    python benchmarks/peers.py                  # ten minutes; writes benchmarks/results/peers-minilm-FEATURES.json

Peers: torch eager, ONNX Runtime in float and by its own dynamic and static quantisation, OpenVINO in float (in bfloat16
where the processor has it), and NNCF's int8 for OpenVINO. All are calibrated on the same samples, have the same
threads, and take turns in shuffled blocks; a ratio is peer ÷ effc's engine, with its 99 % interval.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import common

from effc import bench, inspection, measure, metrics, package
from effc.backends.base import EngineBase, Lowered
from effc.backends.eager import ModuleEngine
from effc.backends.openvino import OpenVinoEngine, has_bf16
from effc.backends.ort import Ort, OrtEngine
from effc.compiler import trace_source
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import Source, load

THREADS = 2
SAMPLES = 128
BUDGET_S = 40.0
SHAPES = ((1, 16), (1, 128), (8, 128))
Json = dict[str, Any]


class Peer:
    """Engines of others, each made once into a folder; `seconds` is what making one took."""

    def __init__(self, source: Source, graph: Graph, samples: Samples, place: Path) -> None:
        self.source, self.graph, self.samples, self.place = source, graph, samples, place
        self.seconds: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.plain = measure.plain_export(graph, place / "float", "ort")

    def openers(self) -> dict[str, Callable[[], Any]]:
        """By name, what opens every peer that could be made."""
        found: dict[str, Callable[[], Any]] = {
            "torch": lambda: ModuleEngine(self.source.module, self.graph),
            "ort float": lambda: Ort().open(self.plain, threads=THREADS),
            "openvino float": lambda: OpenVinoEngine(self.plain.path, threads=THREADS),
        }
        bf16 = {"precision": "bf16"}
        if has_bf16():
            found["openvino bf16"] = lambda: OpenVinoEngine(self.plain.path, bf16, threads=THREADS)
        for name, make, engine in (
            ("ort dynamic int8", self._dynamic, OrtEngine),
            ("ort static int8", self._static, OrtEngine),
            ("nncf int8", self._nncf, OpenVinoEngine),
        ):
            started = time.perf_counter()
            try:
                file = make(self.place / f"{name}.onnx")
            except Exception as error:
                self.left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                continue
            self.seconds[name] = round(time.perf_counter() - started, 1)
            found[name] = lambda e=engine, f=file: e(f, threads=THREADS)  # type: ignore[misc]
            if name == "nncf int8" and has_bf16():
                found["nncf int8, rest bf16"] = lambda f=file: OpenVinoEngine(  # type: ignore[misc]
                    f, bf16, threads=THREADS
                )
        return found

    def rows(self) -> Iterator[Mapping[str, Any]]:
        for batch in self.samples(self.graph.role):
            yield from _rows(batch.inputs)

    def _dynamic(self, file: Path) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(self.plain.path, file, per_channel=True, weight_type=QuantType.QInt8)
        return file

    def _static(self, file: Path) -> Path:
        from onnxruntime.quantization import (
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, batches: Iterator[Mapping[str, Any]]) -> None:
                self.batches = batches

            def get_next(self) -> Any:
                return next(self.batches, None)

        ready = file.with_suffix(".ready.onnx")
        quant_pre_process(self.plain.path, ready, skip_symbolic_shape=True)
        quantize_static(
            ready, file, Reader(self.rows()), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        return file

    def _nncf(self, file: Path) -> Path:
        import nncf
        import openvino

        model = openvino.Core().read_model(str(self.plain.path))
        data = nncf.Dataset(list(self.rows()))
        attends = any(op_name(node).startswith("scaled_dot") for node in self.graph.nodes)
        kind = nncf.ModelType.TRANSFORMER if attends else None
        made = nncf.quantize(model, data, model_type=kind, subset_size=SAMPLES)
        place = file.with_suffix(".xml")
        openvino.save_model(made, str(place), compress_to_fp16=False)
        return place


def _rows(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Sample by sample, without padding, as the peers' guides have it."""
    count = len(next(iter(batch.values())))
    for row in range(count):
        mask = batch.get("attention_mask")
        length = None if mask is None else int(mask[row].sum())
        yield {name: value[row : row + 1, :length] for name, value in batch.items()}


def effc_engines(model: Path, place: Path) -> tuple[dict[str, Lowered], dict[str, float]]:
    """effc's own engines for both runtimes, ungated so that every kind is seen, and what a compile took."""
    engines, seconds = {}, {}
    for target in ("ort", "openvino"):
        recipe = place / f"{target}.yaml"
        smooth = [{"pass": "smooth", "gain_db": 8.0 if target == "ort" else 1.0}]
        content = {
            "source": {"transformers": str(model)},
            "calib": {"file": str(common.SENTENCES), "samples": SAMPLES},
            "passes": [*smooth, {"pass": "quantize"}],
            "targets": [target],
            "gate": False,
            "bench": False,
        }
        recipe.write_text(json.dumps(content), encoding="utf-8")
        out = place / f"out-{target}"
        took, _ = common.run_cli("compile", recipe, "-o", out)
        (entry,) = package.read(out).engines
        engines[f"effc {target}"] = inspection._lowered(out, entry)
        seconds[f"effc {target}"] = round(took, 1)
    return engines, seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for a shape")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    import torch

    torch.set_num_threads(THREADS)
    model, data = common.minilm(), common.data_root()
    with tempfile.TemporaryDirectory(prefix="effc-peers-") as folder:
        place = Path(folder)
        mine, seconds = effc_engines(model, place)
        source = load({"transformers": str(model)})
        samples = Samples(source, CalibSpec(file=str(common.SENTENCES), samples=SAMPLES))
        original = trace_source(source)
        graph = original.only()
        peer = Peer(source, graph, samples, place)
        openers = peer.openers()
        openers |= {name: measure.opener(low, THREADS) for name, low in mine.items()}
        quality = {
            name: _quality(source, graph, opener, samples, data) for name, opener in openers.items()
        }
        first = mine["effc ort"]
        cases = measure.shaped_cases(samples, SHAPES, first.inputs, measure.longest(source, graph))
        engine = openers.pop("effc ort")
        timed = bench.compare(
            {"engine": engine, **openers}, cases, threads=THREADS, budget_s=options.budget,
            references=tuple(openers),
        )  # fmt: skip
    told = timed.to_json()
    found = {
        "name": "peers", "model": "MiniLM-L6", "engine": "effc ort", "threads": THREADS,
        "samples": SAMPLES, "seconds": {**peer.seconds, **seconds}, "left_out": peer.left_out,
        "quality": quality, "shapes": told["shapes"], "load_ms": told["load_ms"],
        "peer_versions": _peer_versions(),
    }  # fmt: skip
    print(common.write(f"peers-minilm-{common.features()}", found))
    return 0


def _peer_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnxruntime", "openvino", "nncf")}


def _quality(
    source: Source,
    graph: Graph,
    opener: Callable[[], EngineBase],
    samples: Samples,
    data: Path | None,
) -> Json:
    """Drift over held-out samples, and Spearman on STS-B where that is here."""
    from effc.verify import parity

    found: Json = {}
    with opener() as engine, ModuleEngine(source.module, graph) as reference:
        fresh = [dict(b.inputs) for b in itertools.islice(samples.held_out(), 4)]
        (drift,) = parity(reference, engine, fresh).values()
        found["drift"] = round(drift.rel_l2, 4)
        if data is not None:
            metric = metrics.parse(f"sts:{data / 'stsb' / 'stsb-en-test.csv'}")
            found["sts"] = round(float(metric.value(metric.measure(engine, source.processor))), 4)
    return found


if __name__ == "__main__":
    sys.exit(main())
