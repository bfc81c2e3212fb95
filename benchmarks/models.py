"""Real models with their real task: a vision transformer and a small Llama to int8, by the usual command.

    python benchmarks/models.py              # minutes; writes benchmarks/results/models-FEATURES.json

The data sets are looked for at `$EFFC_DATA`, else in `../shared/data` beside the repository.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

MODELS = {
    "ViT on Fashion-MNIST": ("vit-fashion-mnist", "fashion-mnist", "accuracy", "fashion-mnist"),
    "Llama stories260K": (
        "stories260k-llama",
        "tinystories/train_head.txt",
        "perplexity",
        "tinystories/valid_sample.txt",
    ),
}


def holds(metric: dict[str, Any]) -> bool:
    """Half a point of accuracy, 2 % of perplexity."""
    if metric["higher_is_better"]:
        return bool(metric["engine"] >= metric["reference"] - 0.005)
    return bool(metric["engine"] <= metric["reference"] * 1.02)


def main() -> int:
    data = common.data_root()
    if data is None:
        print("skipped: there are no data sets; set EFFC_DATA")
        return 0
    rows = []
    for name, (model, calib, metric, file) in MODELS.items():
        with tempfile.TemporaryDirectory(prefix="effc-models-") as place:
            report = Path(place) / "report.json"
            words = ["compile", data / model, "-o", Path(place) / "OUT", "--quantize", "int8"]
            words += ["--calib", data / calib, "--metric", f"{metric}:{data / file}"]
            seconds, rss = common.run_cli(*words, "--json", report, "--threads", "2")
            found = json.loads(report.read_text())
        (engine,) = found["manifest"]["engines"]
        rows.append(
            {
                "name": name,
                "metric": found["metric"],
                "shapes": found["bench"]["shapes"],
                "bytes": [found["source_bytes"], found["model_bytes"]],
                "sites": [engine["int8_sites"], engine["total_sites"]],
                "compile_s": round(seconds, 1),
                "compile_peak_mb": round(rss),
            }
        )
    print(common.write(f"models-{common.features()}", {"name": "models", "rows": rows}))
    missed = [row["name"] for row in rows if not holds(row["metric"])]
    for name in missed:
        print(f"MISSED: {name} loses too much")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
