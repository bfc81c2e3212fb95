"""What each way to choose ranges is worth: two models in int8, for every target, by drift and by the metric.

python benchmarks/ranges.py            # five minutes; writes benchmarks/results/ranges-FEATURES.json

Each arm has what those before it have. Speed is not asked: all give the same kernels, but for the multiplications
that `smooth` leaves on ort, which benchmarks/minilm.py would show.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

TARGETS = ("openvino", "ort")
SAMPLES = 128
ARMS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "min/max": ([], {"range": "minmax"}),
    "least squares": ([], {}),
    "smooth": (["smooth"], {}),
    "bias correction": (["smooth"], {"bias_correction": True}),
}
"""By name: passes in front of `quantize`, and its options."""


def models() -> dict[str, dict[str, Any]]:
    """What a recipe says of each model."""
    data = common.data_root()
    if data is None:
        raise SystemExit("there are no data sets; set EFFC_DATA")
    sts, images = data / "stsb" / "stsb-en-test.csv", str(data / "fashion-mnist")
    return {
        "MiniLM-L6": {
            "source": {"transformers": str(common.minilm())},
            "calib": {"file": str(common.SENTENCES), "samples": SAMPLES},
            "metric": {"sts": str(sts)},
        },
        "ViT on Fashion-MNIST": {
            "source": {"transformers": str(data / "vit-fashion-mnist")},
            "calib": {"file": images, "samples": SAMPLES},
            "metric": {"accuracy": images},
        },
    }


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory(prefix="effc-ranges-") as folder:
        for model, content in models().items():
            for target in TARGETS:
                for arm in ARMS:
                    rows.append({"model": model, **measured(content, target, arm, Path(folder))})
                    print(rows[-1], flush=True)
    print(common.write(f"ranges-{common.features()}", {"name": "ranges", "rows": rows}))
    drifts = [r["drift"] for r in rows if r["target"] == "openvino"]
    worse = [a < b for a, b in zip(drifts[1::4], drifts[2::4], strict=True)]
    return int(any(worse))


def measured(content: dict[str, Any], target: str, arm: str, folder: Path) -> dict[str, Any]:
    """One compile."""
    recipe, report = folder / "recipe.yaml", folder / "report.json"
    passes, options = ARMS[arm]
    whole = {
        **content,
        "passes": [*passes, {"pass": "quantize", **options}],
        "targets": [target],
        "gate": False,
        "bench": False,
    }
    recipe.write_text(json.dumps(whole), encoding="utf-8")
    common.run_cli("compile", recipe, "-o", folder / "out", "--json", report)
    found = json.loads(report.read_text())
    (drift,) = found["verify"][target]["held out"].values()
    wanted = ("name", "reference", "engine", "low", "high", "n", "verdict")
    return {
        "target": target,
        "arm": arm,
        "smooth_sites": sum(p["sites"] for p in found["passes"] if p["name"] == "smooth"),
        "drift": round(drift["rel_l2"], 4),
        "n": drift["n"],
        "metric": {name: found["metric"][name] for name in wanted},
    }


if __name__ == "__main__":
    sys.exit(main())
