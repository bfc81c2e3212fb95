"""MiniLM-L6-v2 to int8 on ONNX Runtime: accuracy, size, speed, compile time, invariance, reproducibility.

python benchmarks/minilm.py            # a few minutes; writes benchmarks/results/minilm-FEATURES.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

from effc.backends.ort_engine import OrtEngine
from effc.bench import geometric_mean
from effc.calib.data import digest
from effc.package import MANIFEST, UNHASHED
from effc.processor import Processor
from effc.verify import invariance

CALIBRATION_SAMPLES = 128


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two packages are equal, files with measured times aside."""
    names = [{p.relative_to(r).as_posix() for p in r.rglob("*") if p.is_file()} for r in (a, b)]
    if names[0] != names[1]:
        return False
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names[0] if n not in UNHASHED)


def neighbours(out: Path, texts: list[str]) -> float:
    """Largest change of a sentence's embedding between alone and in a padded batch, in any coordinate."""
    config = json.loads((out / "config.json").read_text())
    manifest = json.loads((out / MANIFEST).read_text())
    inputs = [port["name"] for port in manifest["engines"][0]["inputs"]]
    processor = Processor(out, config, inputs)
    worst = 0.0
    with OrtEngine(out / "model.onnx", threads=2) as engine:

        def embed(feeds: Any) -> dict[str, Any]:
            hidden = engine(feeds)["last_hidden_state"]
            return {"embedding": processor.pool(hidden, feeds["attention_mask"])}

        for start in range(0, len(texts), 8):
            chosen = texts[start : start + 8]
            alone = [processor.encode([t]) for t in chosen]
            worst = max(worst, invariance(embed, alone, processor.encode(chosen)))
    return worst


def bounds(found: dict[str, Any]) -> dict[str, bool]:
    """What must hold, in words; the speed only where the processor has an int8 dot product."""
    bench = found["bench"]
    held = {
        "two compiles give the same bytes": found["identical"],
        "an embedding differs by at most 1e-5 in a batch": found["neighbours_max_abs"] <= 1e-5,
        "the engine has at most 27 MB": found["model_bytes"] <= 27e6,
        "a compile takes at most 90 s and 3 GB": found["compile_s"] <= 90
        and found["compile_peak_mb"] <= 3000,
    }
    if bench["metric"]:
        held["Spearman is at least 0.8165"] = bench["metric"]["engine"] >= 0.8165
    if common.features() not in ("avx2", "avx512f", "plain"):
        ratios = [s["against"]["float"]["ratio"] for s in bench["shapes"]]
        held["2.2 times faster on average, 1.8 at each shape"] = (
            found["geometric_mean"] >= 2.2 and min(ratios) >= 1.8
        )
    return held


def main() -> int:
    model, data = common.minilm(), common.data_root()
    sts = data / "stsb" / "stsb-en-test.csv" if data else None
    with tempfile.TemporaryDirectory(prefix="effc-minilm-") as place:
        root = Path(place)
        words = ["compile", model, "--quantize", "int8", "--calib", common.SENTENCES]
        words += ["--samples", str(CALIBRATION_SAMPLES)]
        seconds, rss = common.run_cli(*words, "-o", root / "a")
        common.run_cli(*words, "-o", root / "b")
        identical = same_bytes(root / "a", root / "b")
        words = [
            "bench",
            root / "a",
            "--model",
            model,
            "--calib",
            common.SENTENCES,
            "--threads",
            "2",
        ]
        words += ["--json", root / "bench.json", "--budget", "20"]
        if sts and sts.exists():
            words += ["--metric", f"sts:{sts}"]
        common.run_cli(*words)
        bench = json.loads((root / "bench.json").read_text())
        manifest = json.loads((root / "a" / MANIFEST).read_text())
        texts = [t for t in common.SENTENCES.read_text().splitlines() if t.strip()]
        change = neighbours(root / "a", texts)
    ratios = [s["against"]["float"]["ratio"] for s in bench["shapes"]]
    lows = [s["against"]["float"]["low"] for s in bench["shapes"]]
    found = {
        "name": "minilm",
        "calibration": {**digest(common.SENTENCES), "n": CALIBRATION_SAMPLES},
        "compile_s": round(seconds, 1),
        "compile_peak_mb": round(rss),
        "identical": identical,
        "neighbours_max_abs": change,
        "neighbours_n": len(texts),
        "model_bytes": bench["model_bytes"],
        "source_bytes": int(np.sum([p.stat().st_size for p in model.glob("*.safetensors")])),
        "int8_sites": manifest["engines"][0]["int8_sites"],
        "total_sites": manifest["engines"][0]["total_sites"],
        "geometric_mean": round(geometric_mean(ratios), 3),
        "geometric_mean_low": round(geometric_mean(lows), 3),
        "bench": bench,
    }
    print(common.write(f"minilm-{common.features()}", found))
    missed = [text for text, held in bounds(found).items() if not held]
    for shape in bench["shapes"]:
        print({k: shape[k] for k in ("batch", "length", "engine_ms")}, shape["against"])
    print({k: v for k, v in found.items() if k != "bench"}, bench["metric"])
    for text in missed:
        print(f"MISSED: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
