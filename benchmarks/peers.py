"""effc beside what else turns a model into an engine for this processor: each peer is made here, and all run in turns.

    pip install nncf==3.4.0 torchao==0.18.0 diffusers    # peers, and no part of effc
    python benchmarks/peers.py minilm                    # ten minutes a model; writes results/peers-MODEL-FEATURES.json

Peers: torch eager, compiled, and quantised by torchao and compiled; ONNX Runtime in float and by its own dynamic and
static quantisation; OpenVINO in float (in bfloat16 where the processor has it), and NNCF's int8 for OpenVINO. All are
calibrated on the same samples, have the same threads, and take turns in shuffled blocks; a ratio is peer ÷ effc's
engine, with its 99 % interval. effc's engines are those of one compile for both targets, as the gate lets them
through; `all int8` is the same without a gate.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import peermakers
import peernets

from effc import bench, measure, metrics, package
from effc.backends.base import Engine, EngineBase, Lowered
from effc.backends.eager import ModuleEngine
from effc.backends.openvino import OpenVinoEngine, has_bf16
from effc.backends.ort import Ort
from effc.backends.ort_engine import OrtEngine
from effc.compiler import trace_source
from effc.engine import lowered as lowered_of
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import Source, load

THREADS = 2
SAMPLES = 128
BUDGET_S = 40.0
FAR = 5.0
BF16 = {"precision": "bf16"}
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is compared on one model: where it is from, its calibration data, shapes, and metric where there is one."""

    title: str
    source: Json
    calib: str
    shapes: tuple[tuple[int, int], ...]
    metric: str | None = None
    samples: int = SAMPLES
    all_int8: bool = False


def minilm(place: Path) -> Model:
    data = common.data_root()
    return Model(
        title="MiniLM-L6", source={"transformers": str(common.minilm())},
        calib=str(common.SENTENCES), shapes=((1, 16), (1, 128), (8, 128)), all_int8=True,
        metric=data and f"sts:{data / 'stsb' / 'stsb-en-test.csv'}",
    )  # fmt: skip


def vit(place: Path) -> Model:
    data = common.data_root()
    if data is None:
        raise SystemExit("there are no data sets; set EFFC_DATA")
    images = str(data / "fashion-mnist")
    return Model(
        title="ViT on Fashion-MNIST", source={"transformers": str(data / "vit-fashion-mnist")},
        calib=images, shapes=((1, 1), (32, 1)), metric=f"accuracy:{images}",
    )  # fmt: skip


def random(
    name: str, title: str, shapes: tuple[tuple[int, int], ...], samples: int
) -> Callable[[Path], Model]:
    def make(place: Path) -> Model:
        calib = place / "calib.npz"
        np.savez(calib, **peernets.SAMPLES[name](samples + 32, 4))
        source = {"python": f"{peernets.__file__}:{name}"}
        return Model(
            title=f"{title}, random weights", source=source, calib=str(calib), shapes=shapes,
            samples=samples,
        )  # fmt: skip

    return make


MODELS: dict[str, Callable[[Path], Model]] = {
    "minilm": minilm,
    "vit": vit,
    "bert_base": random("bert_base", "BERT-base", ((1, 16), (1, 128)), 32),
    "vit_base": random("vit_base", "ViT-base", ((1, 1),), 16),
    "resnet50": random("resnet50", "ResNet-50", ((1, 1), (8, 1)), 32),
    "unet": random("unet", "DDPM's UNet at 32×32", ((1, 1), (4, 1)), 32),
}


class Peers:
    """Engines of others, each made once into a folder, with what making one took."""

    def __init__(
        self, source: Source, graph: Graph, samples: Samples, place: Path, *, compiles: bool
    ) -> None:
        self.compiles = compiles
        self.source, self.graph, self.samples, self.place = source, graph, samples, place
        self.made: dict[str, Json] = {}
        self.left_out: dict[str, str] = {}
        self.plain = measure.plain_export(graph, place / "float", "ort")

    def openers(self) -> dict[str, Callable[[], Engine]]:
        """By name, what opens every peer that could be made."""
        found: dict[str, Callable[[], Engine]] = {
            "torch": lambda: ModuleEngine(self.source.module, self.graph),
            "ort float": lambda: Ort().open(self.plain, threads=THREADS),
            "openvino float": lambda: OpenVinoEngine(self.plain.path, threads=THREADS),
        }
        for name, change in (("torch.compile", None), ("torchao int8, compiled", _torchao)):
            engine = self._compiled(name, change)
            if engine is not None:
                found[name] = lambda e=engine: e  # type: ignore[misc]
        if has_bf16():
            found["openvino bf16"] = lambda: OpenVinoEngine(self.plain.path, BF16, threads=THREADS)
        data = self.place / "rows.npz"
        np.savez(data, **dict(self._rows()))
        for name in peermakers.TOOLS:
            opener = OpenVinoEngine if name == "nncf int8" else OrtEngine
            out = self.place / f"{name}.{'xml' if name == 'nncf int8' else 'onnx'}"
            if not self._make(name, data, out):
                continue
            found[name] = lambda e=opener, f=out: e(f, threads=THREADS)  # type: ignore[misc]
            if name == "nncf int8" and has_bf16():
                found["nncf int8, rest bf16"] = lambda f=out: OpenVinoEngine(  # type: ignore[misc]
                    f, BF16, threads=THREADS
                )
        return found

    def _make(self, name: str, data: Path, out: Path) -> bool:
        attends = any(op_name(node).startswith("scaled_dot") for node in self.graph.nodes)
        code, seconds, peak = common.run_python(
            peermakers.__file__, name, self.plain.path, data, out, str(attends)
        )
        if code:
            self.left_out[name] = f"ended with {code}"
            return False
        self.made[name] = {"seconds": round(seconds, 1), "peak_mb": round(peak)}
        return True

    def _compiled(self, name: str, change: Callable[[Any], None] | None) -> Engine | None:
        """The module as torch compiles it: once, since that takes longer than all the rest."""
        import copy

        import torch

        if not self.compiles:
            self.left_out[name] = "--no-compile"
            return None
        module = copy.deepcopy(self.source.module).eval()
        try:
            if change is not None:
                change(module)
            engine = _Kept(torch.compile(module, dynamic=True), self.graph)
            engine({name: np.ascontiguousarray(v) for name, v in self.samples.example().items()})
        except Exception as error:
            self.left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return None
        return engine

    def _rows(self) -> Iterator[tuple[str, Any]]:
        number = itertools.count()
        for batch in self.samples(self.graph.role):
            for row in _single(batch.inputs):
                place = next(number)
                yield from ((f"{place}/{name}", value) for name, value in row.items())


class _Kept(ModuleEngine):
    """A compiled module, which stays open while its turns come and go."""

    def close(self) -> None:
        pass


def _torchao(module: Any) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(module, Int8DynamicActivationInt8WeightConfig())


def _single(batch: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Sample by sample, without padding."""
    count = len(next(iter(batch.values())))
    for row in range(count):
        mask = batch.get("attention_mask")
        length = None if mask is None else int(mask[row].sum())
        yield {
            name: value[row : row + 1, :length] if value.ndim > 1 else value[row : row + 1]
            for name, value in batch.items()
        }


def effc_engines(model: Model, place: Path, *, gate: bool) -> tuple[dict[str, Lowered], Json]:
    """effc's engines for both runtimes out of one compile, and what that took."""
    recipe, out = place / f"gate-{gate}.yaml", place / f"out-{gate}"
    content: Json = {
        "source": model.source,
        "calib": {"file": model.calib, "samples": model.samples},
        "passes": [{"pass": "smooth"}, {"pass": "quantize"}],
        "targets": ["ort", "openvino"],
        "bench": {"shapes": [list(s) for s in model.shapes], "threads": THREADS, "budget_s": 4.0},
    }
    if not gate:
        content |= {"gate": False, "bench": False}
    elif model.metric is not None:
        name, _, file = model.metric.partition(":")
        content["metric"] = {name: file}
    recipe.write_text(json.dumps(content), encoding="utf-8")
    seconds, peak = common.run_cli("compile", recipe, "-o", out)
    word = "" if gate else ", all int8"
    entries = {f"effc {e.target}{word}": e for e in package.read(out).engines}
    engines = {name: lowered_of(out, entry) for name, entry in entries.items()}
    took = {"seconds": round(seconds, 1), "peak_mb": round(peak)}
    sites = {name: [entry.int8_sites, entry.total_sites] for name, entry in entries.items()}
    return engines, {"took": took, "int8_sites": sites}


def compared(model: Model, place: Path, budget_s: float, *, compiles: bool = True) -> Json:
    """All engines of one model beside the fastest that effc ships."""
    mine, told = effc_engines(model, place, gate=True)
    made = {"effc, both, gated": told["took"]}
    sites = told["int8_sites"]
    if model.all_int8:
        more, also = effc_engines(model, place, gate=False)
        mine |= more
        made["effc, both, all int8"] = also["took"]
        sites |= also["int8_sites"]
    source = load(model.source)
    samples = Samples(source, CalibSpec(file=model.calib, samples=model.samples))
    graph = trace_source(source).only()
    peers = Peers(source, graph, samples, place, compiles=compiles)
    openers = peers.openers()
    openers |= {name: measure.opener(low, THREADS) for name, low in mine.items()}
    cases = measure.shaped_cases(
        samples, model.shapes, mine["effc ort"].inputs, measure.longest(source, graph)
    )
    held = [dict(b.inputs) for b in itertools.islice(samples.held_out(), 4)]
    timed_feeds = [dict(case.feeds) for case in cases]
    quality = {
        name: _quality(source, graph, opener, timed_feeds, None)
        if "compile" in name  # anew for most shapes, which takes longer than all the rest
        else _quality(source, graph, opener, held, model.metric)
        for name, opener in openers.items()
    }
    first = "effc ort"
    engine = openers.pop(first)
    far = _far_behind(engine, openers, cases[-1])
    near = {name: opener for name, opener in openers.items() if name not in far}
    timed = _timed(engine, near, cases, budget_s)
    if far:  # in a comparison of their own: they would take the turns of all others
        other = _timed(engine, {name: openers[name] for name in far}, cases, budget_s / 3)
        for shape, more in zip(timed["shapes"], other["shapes"], strict=True):
            shape["against"] |= more["against"]
        timed["load_ms"] = {**other["load_ms"], **timed["load_ms"]}
    return {
        "name": "peers", "model": model.title, "engine": first, "threads": THREADS,
        "samples": model.samples, "made": {**peers.made, **made}, "left_out": peers.left_out,
        "int8_sites": sites, "quality": quality, "metric": model.metric and model.metric.partition(":")[0],
        "shapes": timed["shapes"], "load_ms": timed["load_ms"], "peer_versions": _peer_versions(),
    }  # fmt: skip


def _timed(
    engine: Callable[[], Engine], others: Mapping[str, Callable[[], Engine]], cases: list[bench.Case],
    budget_s: float,
) -> Json:  # fmt: skip
    return bench.compare(
        {"engine": engine, **others}, cases, threads=THREADS, budget_s=budget_s,
        references=tuple(others),
    ).to_json()  # fmt: skip


def _far_behind(
    engine: Callable[[], Engine], others: Mapping[str, Callable[[], Engine]], case: bench.Case
) -> list[str]:
    """Engines that take more than `FAR` times as long as effc's."""

    def seconds(opener: Callable[[], Engine]) -> float:
        with opener() as opened:
            opened(case.feeds)
            started = time.perf_counter()
            opened(case.feeds)
            return time.perf_counter() - started

    bound = FAR * seconds(engine)
    return [name for name, opener in others.items() if seconds(opener) > bound]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", choices=list(MODELS), help="all where none is named")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for a shape")
    parser.add_argument(
        "--no-compile", action="store_true", help="without what torch compiles, for a quick look"
    )
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(THREADS)
    import torch

    torch.set_num_threads(THREADS)
    for name in options.models or MODELS:
        with tempfile.TemporaryDirectory(prefix="effc-peers-") as folder:
            model = MODELS[name](Path(folder))
            found = compared(model, Path(folder), options.budget, compiles=not options.no_compile)
        print(common.write(f"peers-{name}-{common.features()}", found), flush=True)
    return 0


def _peer_versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("onnxruntime", "openvino", "nncf", "torchao")}


def _quality(
    source: Source,
    graph: Graph,
    opener: Callable[[], EngineBase],
    feeds: list[dict[str, Any]],
    metric: str | None,
) -> Json:
    """Drift over those inputs, and the metric where there is one."""
    from effc.verify import parity

    found: Json = {}
    with opener() as engine, ModuleEngine(source.module, graph) as reference:
        (drift,) = parity(reference, engine, feeds).values()
        found["drift"] = round(drift.rel_l2, 4)
        if metric is not None:
            measured = metrics.parse(metric)
            found["metric"] = round(
                float(measured.value(measured.measure(engine, source.processor))), 4
            )
    return found


if __name__ == "__main__":
    sys.exit(main())
