"""How well a plan foretells a compile: predicted and real seconds, memory and size, stage by stage.

python benchmarks/plan.py                # a few minutes; writes benchmarks/results/plan-FEATURES.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

STAGES = {
    "load": ("load",),
    "trace": ("trace",),
    "quantize": ("quantize",),
    "lower": ("lower", "lower (float reference)"),
    "verify": ("verify",),
    "metric": ("metric",),
    "bench": ("bench",),
}
"""Stages of a compile, and those of the plan that stand for them."""


def models() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"MiniLM-L6": [common.minilm(), "--calib", common.SENTENCES]}
    data = common.data_root()
    if data is not None:
        found["MiniLM-L6"] += ["--metric", f"sts:{data / 'stsb' / 'stsb-en-test.csv'}"]
        images = data / "fashion-mnist"
        found["ViT"] = [data / "vit-fashion-mnist", "--calib", images]
        found["ViT"] += ["--metric", f"accuracy:{images}"]
        text = data / "tinystories"
        found["stories260K"] = [data / "stories260k-llama", "--calib", text / "train_head.txt"]
        found["stories260K"] += ["--metric", f"perplexity:{text / 'valid_sample.txt'}"]
    return found


def main() -> int:
    rows = []
    for name, flags in models().items():
        with tempfile.TemporaryDirectory(prefix="effc-plan-") as place:
            root = Path(place)
            words = ["compile", *flags, "-o", root / "OUT", "--quantize", "int8", "--threads", "2"]
            common.run_cli(*words, "--plan", "--json", root / "plan.json")
            common.run_cli(*words, "--json", root / "report.json")
            plan = json.loads((root / "plan.json").read_text())
            report = json.loads((root / "report.json").read_text())
        real = {stage["name"]: stage for stage in report["stages"]}
        stages = [
            {
                "name": stage,
                "predicted_s": sum(s["seconds"] for s in plan["stages"] if s["name"] in words),
                "real_s": round(real[stage]["seconds"], 1),
            }
            for stage, words in STAGES.items()
            if stage in real
        ]
        rows.append(
            {
                "name": name,
                "stages": stages,
                "predicted_s": plan["seconds"],
                "real_s": round(sum(stage["seconds"] for stage in real.values()), 1),
                "predicted_mb": plan["memory_mb"],
                "real_mb": max(stage["peak_mb"] or 0 for stage in real.values()),
                "predicted_bytes": plan["model_bytes"],
                "real_bytes": report["model_bytes"],
            }
        )
        print(json.dumps(rows[-1], indent=1))
    print(common.write(f"plan-{common.features()}", {"name": "plan", "rows": rows}))
    missed = [
        f"{what} of {r['name']}"
        for r in rows
        for what in ("s", "mb", "bytes")
        if not 0.5 <= r[f"predicted_{what}"] / r[f"real_{what}"] <= 2
    ]
    for name in missed:
        print(f"MISSED: the plan's {name} is off by more than a factor of 2")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
