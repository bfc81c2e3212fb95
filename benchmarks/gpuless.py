"""Which architectures TensorRT-RTX builds, in which precision, without a GPU: size, seconds, layers, refusals.

    python benchmarks/gpuless.py            # a quarter of an hour; writes results/gpuless.json, resumes after a stop

The models are those of benchmarks/coverage.py, small and with random weights. Drift is that of the ONNX that the engine
was built from, on ONNX Runtime, every value rounded where the file says. `same` says whether a second build gives the
same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import coverage
import torch

from effc import compiler, recipe
from effc.errors import EffcError

WORDS = ("fp32", "fp16", "bf16", "w8a16", "w4a16", "w8a8")
SMOKE = ("bert", "resnet")
Json = dict[str, Any]


def build(name: str, word: str, root: Path) -> Json:
    """One row: an architecture in a precision, built twice."""
    torch.manual_seed(0)
    row: Json = {"name": name, "precision": word}
    try:
        if name in coverage.FACTORIES:
            model, where = None, {"python": f"{coverage.__file__}:{name}"}
        else:
            model = coverage.awaken(coverage.MODELS[name]().eval())
            model.save_pretrained(root / name)
            where = {"transformers": str(root / name)}
        data = coverage.calibration(model, name, root / f"{name}.npz")
        passes = [] if word == "fp32" else compiler._passes(word, ["tensorrt"])
        asked = recipe.build({
            "source": where, "calib": {"file": str(data), "samples": 16}, "passes": passes,
            "targets": ["tensorrt"], "bench": False, "gate": False,
        })  # fmt: skip
        made = [compiler.run(asked, root / f"{name}-{word}-{k}") for k in range(2)]
    except Exception as error:  # whatever it is, the table goes on
        reason = error.what if isinstance(error, EffcError) else str(error)
        return {**row, "refused": " ".join(f"{type(error).__name__}: {reason}".split())[:400]}
    report, (entry, twin) = made[0].report, (m.report["manifest"]["engines"][0] for m in made)
    (drift, *_) = next(iter(report["verify"].values())).values()
    return {
        **row,
        "bytes": report["model_bytes"],
        "weights": report["source_bytes"],
        "seconds": round(float(report["timings"]["lower"]), 1),
        "layers": int(entry["options"]["layers"]),
        "attention": entry["options"].get("attention"),
        "why": entry["options"].get("attention_refused"),
        "rel_l2": max(d["rel_l2"] for d in drift.values()),
        "same": entry["sha256"] == twin["sha256"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two models in two precisions")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop before this is up")
    options = parser.parse_args()
    started = time.monotonic()
    names = SMOKE if options.smoke else (*coverage.MODELS, *coverage.FACTORIES)
    words = WORDS[1:3] if options.smoke else WORDS
    kept = common.ROOT / "benchmarks" / "state" / "gpuless.json"
    rows: list[Json] = json.loads(kept.read_text()) if kept.exists() and not options.smoke else []
    known = {(row["name"], row["precision"]) for row in rows}
    for name in names:
        for word in words:
            if (name, word) in known or time.monotonic() - started > 60 * options.minutes:
                continue
            with tempfile.TemporaryDirectory(prefix="effc-tensorrt-") as place:
                rows.append(build(name, word, Path(place)))
            print(json.dumps(rows[-1]), flush=True)
            if not options.smoke:
                kept.parent.mkdir(exist_ok=True)
                kept.write_text(json.dumps(rows))
    if not options.smoke and len(rows) == len(names) * len(words):
        print(common.write("gpuless", {"name": "gpuless", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
