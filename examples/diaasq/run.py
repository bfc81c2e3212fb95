"""Quadruples from dialogues: trained, compiled to int8 for two runtimes, and measured by the task's own score.

    python examples/diaasq/run.py [--smoke | --fast | --full] [--json FILE] [--seed N] [--work DIR]

`--smoke` and `--fast` make up their dialogues and a tiny encoder (`made.py`): they show that all of it runs, and what
it takes. `--full` trains on `$EFFC_DATA/diaasq/zh` over the encoder that `encoder.py` writes, for hours; a run that was
stopped goes on with the same `--work`. Its model is chosen on a part of train, and `valid.json` is only measured.

`metrics` are micro F1 of whole quadruples by the float model in torch and by the int8 engines, each with the paired
interval of its difference. `decoded_equal` says whether torch and the float engines find the same in every dialogue.
`speedup` is int8 against the plain float export, both on ONNX Runtime, over dialogues at five lengths of the measured
file, every length weighted by its time; its ends take those of all lengths at once, which is wider than need be.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Json = dict[str, Any]
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Which dialogues are timed: at these places of their lengths."""
TINY = ["source.options={inner: 16}", "passes.0.precision=f32", "passes.0.dropout=0.05",
        'passes.0.rates={"encoder.*": 0.5}', "passes.0.lr=0.01", "passes.0.batch=8", "calib.samples=16"]  # fmt: skip
KINDS: dict[str, Json] = {
    "smoke": {"train": 64, "valid": 12, "hidden": 32, "budget_s": 0.2, "set": [
        *TINY, "gate=false", "passes.0.batch=4", "passes.0.samples=56", "passes.0.held=8",
        "passes.0.steps=40", "passes.0.every=20"]},
    "fast": {"train": 400, "valid": 100, "hidden": 128, "budget_s": 4.0, "set": [
        *TINY, "passes.0.samples=360", "passes.0.held=40", "passes.0.steps=400", "passes.0.every=100"]},
    "full": {"budget_s": 20.0, "set": []},
}  # fmt: skip


def data_root() -> Path | None:
    places = [os.environ.get("EFFC_DATA"), HERE.parents[2] / "shared" / "data"]
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def beside(name: str) -> Any:
    """A script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(f"diaasq_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(kind: str, work: Path) -> tuple[Path, Path]:
    """Folder of the dialogues, and of the encoder."""
    asked = KINDS[kind]
    if kind != "full":
        made = beside("made")
        made.write(work / "train.json", asked["train"], 0)
        made.write(work / "valid.json", asked["valid"], 1)
        return work, made.encoder(work / "encoder", asked["hidden"])
    root = data_root()
    if root is None or not (root / "diaasq" / "zh").is_dir():
        raise SystemExit("there is no diaasq/zh in $EFFC_DATA")
    place = work / "encoder"
    if not place.is_dir():
        beside("encoder").write(place, root / "encoders")
    return root / "diaasq" / "zh", place


def run(kind: str, data: Path, encoder: Path, seed: int, work: Path, threads: int) -> Json:
    """All that is measured of one training."""
    from effc import compiler, recipe
    from effc.progress import Progress

    seeds = [f"source.options.seed={seed}", f"passes.0.seed={seed}"]
    asked = [f"source.encoder={encoder}", *KINDS[kind]["set"], *seeds, "bench=false"]
    file, progress = HERE / "recipe.yaml", Progress()
    checkpoint = work / f"checkpoint-{seed}"
    if not checkpoint.is_dir():
        compiler.tune(recipe.read(file, asked, data_place=data), checkpoint, progress=progress)
    made = compiler.run(
        recipe.read(file, asked, data_place=data), work / f"int8-{seed}", tuned=checkpoint,
        threads=threads, allow_worse=True, progress=progress,
    )  # fmt: skip
    first, other = made.report["metric"], made.report["others"]["openvino"]["metric"]
    curve = json.loads((checkpoint / "tune.json").read_text(encoding="utf-8"))["curves"]["0.main"]
    return {
        "metrics": {"float": first["reference"], "ort": first["engine"], "openvino": other["engine"]},
        "compared": {"ort": first, "openvino": other},
        "gate": {
            "ort": made.report["gate"]["verdict"],
            "openvino": made.report["others"]["openvino"]["gate"]["verdict"],
        },
        **engines(checkpoint, work / f"int8-{seed}", data / "valid.json", threads, KINDS[kind]["budget_s"]),
        "curve": curve,
        "seconds": {name: round(stage.seconds, 1) for name, stage in progress.stages.items()},
    }  # fmt: skip


def engines(checkpoint: Path, package: Path, file: Path, threads: int, budget_s: float) -> Json:
    """Whether float engines find what torch finds, and how much faster those of a package are than the plain export."""
    import effc
    from effc import compiler, measure
    from effc.backends import BACKENDS
    from effc.backends.dialect import DIALECTS
    from effc.passes import CANONICAL, PASSES
    from effc.source import from_checkpoint

    source = from_checkpoint(checkpoint, "diaasq")
    program = compiler.trace_source(source)
    items = source.processor.read(file)  # type: ignore[union-attr]
    with tempfile.TemporaryDirectory(prefix="effc-") as place:
        floats = []
        for target in ("ort", "openvino"):
            (Path(place) / target).mkdir()
            cleaned = program.clone()
            for word in CANONICAL:
                effc.apply(PASSES[word](), cleaned, dialect=DIALECTS[target])
            floats.append(BACKENDS[target]().lower(cleaned.only(), Path(place) / target))
        (Path(place) / "plain").mkdir()
        plain = measure.plain_export(program.only(), Path(place) / "plain", "ort")
        return {
            "decoded_equal": decoded_equal(source, floats, items, threads),
            "speedup": speedup(source, plain, package, "ort", items, threads, budget_s),
            "speedup_openvino": speedup(
                source, plain, package, "openvino", items, threads, budget_s
            ),
        }


def decoded_equal(source: Any, floats: list[Any], items: list[Any], threads: int) -> bool:
    """Whether torch and the float engines find the same in every dialogue."""
    import torch

    from effc import measure

    task = source.processor

    def in_torch(feeds: Any) -> Any:
        with torch.no_grad():
            made = source.module(**{name: torch.from_numpy(value) for name, value in feeds.items()})
        return {name: value.numpy() for name, value in made.items()}

    wanted = [task.said(in_torch, item) for item in items]
    for lowered in floats:
        with measure.opened(lowered, threads) as engine:
            if [task.said(engine, item) for item in items] != wanted:
                return False
    return True


def speedup(
    source: Any, plain: Any, out: Path, target: str, items: list[Any], threads: int, budget_s: float
) -> Json:
    """Time of the plain float export on ONNX Runtime ÷ that of an int8 engine, over dialogues at several lengths."""
    from effc import bench, measure, package
    from effc.engine import entry_of, lowered

    ordered = sorted(items, key=lambda item: int(item.length))
    chosen = [ordered[round(share * (len(items) - 1))] for share in SHARES]
    cases = [
        bench.Case(batch=1, length=i.length, feeds=source.processor.feeds([i])) for i in chosen
    ]
    engine = lowered(out, entry_of(out, package.read(out), target))
    openers = {"engine": measure.opener(engine, threads), "float": measure.opener(plain, threads)}
    timed = bench.compare(openers, cases, threads=threads, budget_s=budget_s)
    found = [s.ratios["float"] for s in timed.shapes]
    took = [float(s.timings["float"].median_ms) for s in timed.shapes]

    def of(end: str) -> float:
        return sum(took) / sum(ms / getattr(r, end) for ms, r in zip(took, found, strict=True))

    return {
        "ratio": of("ratio"), "low": of("low"), "high": of("high"),
        "lengths": [case.length for case in cases], "float_ms": took,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Quadruples from dialogues, in int8.")
    parser.add_argument("--smoke", action="store_true", help="few made-up dialogues")
    parser.add_argument(
        "--fast", action="store_true", help="what runs where nothing is said: minutes"
    )
    parser.add_argument("--full", action="store_true", help="the published data: hours")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where what was made is kept")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured as JSON")
    given = parser.parse_args()
    kind = "smoke" if given.smoke else "full" if given.full else "fast"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="effc-") as scratch:
        work = given.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        place, encoder = prepared(kind, work)
        found = run(kind, place, encoder, given.seed, work, given.threads)
        data = place / "valid.json"
        count = len(json.loads(data.read_text(encoding="utf-8")))
        found |= {
            "example": "diaasq", "kind": kind, "seed": given.seed,
            "wall_s": round(time.perf_counter() - started, 1),
            "data": {"name": data.name, "n": count,
                     "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        }  # fmt: skip
    told = ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
    ratio = found["speedup"]
    print(f"micro F1: {told}; decoded alike: {found['decoded_equal']}")
    print(
        f"int8 on ort {ratio['ratio']:.2f}× [{ratio['low']:.2f}, {ratio['high']:.2f}] the plain export"
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
