"""What scaling channels is worth: MiniLM-L6-v2 in int8 with and without `smooth`, for every target, by drift and STS-B.

python benchmarks/smooth.py            # writes benchmarks/results/smooth-FEATURES.json

Speed is not asked: on openvino the scaling is part of the quantise node, on ort it is a multiplication of its own,
which benchmarks/minilm.py would show.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import common

TARGETS = ("openvino", "ort")
GAIN_DB = 1.0


def main() -> int:
    data = common.data_root()
    if data is None:
        raise SystemExit("the STS-B test set is not here; set EFFC_DATA")
    rows = []
    with tempfile.TemporaryDirectory(prefix="effc-smooth-") as folder:
        for target in TARGETS:
            for is_smooth in (False, True):
                report = Path(folder) / "report.json"
                recipe = Path(folder) / "recipe.json.yaml"
                passes = [{"pass": "smooth", "gain_db": GAIN_DB}] if is_smooth else []
                content = {
                    "source": {"transformers": str(common.minilm())},
                    "calib": {"file": str(common.SENTENCES), "samples": 128},
                    "passes": [*passes, {"pass": "quantize"}],
                    "targets": [target],
                    "metric": {"sts": str(data / "stsb" / "stsb-en-test.csv")},
                    "gate": False,
                    "bench": False,
                }
                recipe.write_text(json.dumps(content), encoding="utf-8")
                out = Path(folder) / f"{target}-{is_smooth}"
                common.run_cli("compile", recipe, "-o", out, "--json", report)
                found = json.loads(report.read_text())
                (drift,) = found["verify"][target]["held out"].values()
                wanted = ("reference", "engine", "low", "high", "n", "verdict")
                rows.append(
                    {
                        "target": target,
                        "smooth": is_smooth,
                        "sites": sum(p["sites"] for p in found["passes"] if p["name"] == "smooth"),
                        "drift": round(drift["rel_l2"], 4),
                        "n": drift["n"],
                        "metric": {name: found["metric"][name] for name in wanted},
                    }
                )
                print(rows[-1], flush=True)
    print(common.write(f"smooth-{common.features()}", {"name": "smooth", "rows": rows}))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return 0 if all(on["drift"] < off["drift"] for off, on in pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
