"""Which architectures TensorRT-RTX builds, in which precision, without a GPU: size, seconds, layers, refusals.

    python benchmarks/gpuless.py            # a quarter of an hour; writes results/gpuless.json, resumes after a stop

The models are those of benchmarks/coverage.py and benchmarks/gpunets.py, small and with random weights, with every
size free that they name; `unet` wants diffusers. fp8 is for capability 8.9 and above. Drift is that of the ONNX that
the engine was built from, on ONNX Runtime, every value rounded where the file says. `gap` is how far that is from
kernels that sum integers and round once. `same` says whether a second build gives the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import coverage
import gpunets
import numpy as np
import torch

from effc import compiler, recipe
from effc.errors import EffcError

WORDS = ("fp32", "fp16", "bf16", "w8a16", "w4a16", "w8a8", "fp8")
TWICE = ("fp16", "w8a8")
"""Precisions that are built twice, to see whether the bytes agree."""
PROFILES: dict[str, Any] = {
    "convnet": {"batch": [1, 4, 16], "height": [32, 48, 96], "width": [32, 56, 96]},
    "llama_cache": {
        "batch": [1, 2, 8], "length": [1, 16, 64], "past": [0, 32, 128],
    },
}  # fmt: skip
FREE = ("convnet", "unet", "llama_cache")
LARGE = ("large", "fp32", ())
"""Weights of more than 2 GB."""
SEVERAL = ("bert", "fp16", ("sm86", "sm89", "sm120"))
"""A model, a precision, and the compute capabilities that one engine of it is for."""
SMOKE = ("bert", "resnet")
Json = dict[str, Any]


def build(name: str, word: str, root: Path, compute: tuple[str, ...] = ()) -> Json:
    """One row: an architecture in a precision."""
    torch.manual_seed(0)
    row: Json = {"name": name, "precision": word, "compute": list(compute)}
    asked = {"profile": PROFILES.get(name, {}), "compute": list(compute)}
    try:
        where, data = _opened(name, root)
        passes = [] if word == "fp32" else recipe.passes_of(word, ["tensorrt"], checks=True)
        made = recipe.build({
            "source": where, "calib": {"file": str(data), "samples": 16}, "passes": passes,
            "targets": [{"tensorrt": asked}], "bench": False, "gate": False,
        })  # fmt: skip
        times = 2 if word in TWICE else 1
        reports = [compiler.run(made, root / f"{name}-{word}-{k}").report for k in range(times)]
    except Exception as error:  # whatever it is, the table goes on
        reason = error.what if isinstance(error, EffcError) else str(error)
        return {**row, "refused": " ".join(f"{type(error).__name__}: {reason}".split())[:400]}
    report, entries = reports[0], [of["manifest"]["engines"][0] for of in reports]
    entry = entries[0]
    (drift, *_) = next(iter(report["verify"].values())).values()
    return {
        **row,
        "bytes": report["model_bytes"],
        "weights": report["source_bytes"],
        "seconds": round(float(report["timings"]["lower"]), 1),
        "layers": int(entry["options"]["layers"]),
        "attention": entry["options"].get("attention"),
        "why": entry["options"].get("attention_refused"),
        "profile": entry["options"]["profile"],
        "gap": entry["options"].get("gap"),
        "rel_l2": max(d["rel_l2"] for d in drift.values()),
        "same": entries[0]["sha256"] == entries[1]["sha256"] if times == 2 else None,
    }


def _opened(name: str, root: Path) -> tuple[Json, Path]:
    """A source as a recipe names it, and calibration data."""
    data = root / f"{name}.npz"
    if name in gpunets.SAMPLES:
        arrays = {n: v.numpy() for n, v in gpunets.SAMPLES[name](16).items()}
        np.savez(data, **arrays)
        return {"python": f"{gpunets.__file__}:{name}"}, data
    if name in coverage.FACTORIES:
        return {"python": f"{coverage.__file__}:{name}"}, coverage.calibration(None, name, data)
    model = coverage.awaken(coverage.MODELS[name]().eval())
    model.save_pretrained(root / name)
    return {"transformers": str(root / name)}, coverage.calibration(model, name, data)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="two models in two precisions")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop before this is up")
    options = parser.parse_args()
    started = time.monotonic()
    os.environ["EFFC_CACHE"] = "off"  # so that twice is twice
    names = SMOKE if options.smoke else (*coverage.MODELS, *coverage.FACTORIES, *FREE)
    words = WORDS[1:3] if options.smoke else WORDS
    todo: list[tuple[str, str, tuple[str, ...]]] = [
        (name, word, ()) for name in names for word in words
    ]
    todo += [] if options.smoke else [SEVERAL, LARGE]
    kept = common.ROOT / "benchmarks" / "state" / "gpuless.json"
    rows: list[Json] = json.loads(kept.read_text()) if kept.exists() and not options.smoke else []
    known = [(row["name"], row["precision"], tuple(row["compute"])) for row in rows]
    for each in todo:
        if each in known or time.monotonic() - started > 60 * options.minutes:
            continue
        with tempfile.TemporaryDirectory(prefix="effc-tensorrt-") as place:
            rows.append(build(*each[:2], Path(place), each[2]))
        print(json.dumps(rows[-1]), flush=True)
        if not options.smoke:
            kept.parent.mkdir(exist_ok=True)
            kept.write_text(json.dumps(rows))
    if not options.smoke and len(rows) == len(todo):
        print(common.write("gpuless", {"name": "gpuless", "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
