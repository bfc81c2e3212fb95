"""A diffusion model in 8 and 4 bit, calibrated on its own sampler, and how far its pictures are from the float model's.

    python examples/q_diffusion/run.py [--smoke | --fast] [--folder DIR] [--json FILE] [-o OUT]

The model is a trained DDPM of MNIST digits: `ddpm_mnist.safetensors` and the `unet.py` that loads it, in `--folder`, in
`$EFFC_DATA/ddpm-mnist` or `../shared/data/ddpm-mnist`. Without it a pipeline with random weights is made, which shows
that all of it runs, and nothing else. Each arm is compiled for ONNX Runtime and paints from the float model's noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
Json = dict[str, Any]

FIRST_SEED = 1_000_000
"""Of the pictures that are compared; calibration has the seeds from 0 on."""


def folder_of(given: Path | None) -> Path | None:
    """Where the trained model is; None where it is not at hand."""
    places = [os.environ.get("EFFC_DATA"), HERE.parents[2] / "shared" / "data"]
    found = [given] if given else [Path(place) / "ddpm-mnist" for place in places if place]
    return next((place for place in found if (place / "ddpm_mnist.safetensors").is_file()), None)


def random_pipeline(place: Path) -> Path:
    """A small UNet with random weights, as a pipeline directory of diffusers."""
    import diffusers
    import torch

    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(place)
    return place


def arms(steps: int, count: int, *, smoke: bool) -> dict[str, tuple[list[Any], Json]]:
    """Passes and calibration by the name of the arm."""
    calib = {"trajectories": count, "steps": steps, "batch": 16}
    w8a8 = {"pass": "quantize", "bits": 8, "activation_bits": 8}
    w4a8 = {**w8a8, "bits": 4, "weight_range": "mse"}
    w4a32 = {**w4a8, "activation_bits": 16}
    corrected = {"bias_correction": True}
    prepared = ["split-concat", "timestep-table"]
    if smoke:
        return {"w8a8": ([*prepared, w8a8], calib)}
    third = {**calib, "keep": max(1, steps // 3)}
    found: dict[str, tuple[list[Any], Json]] = {
        "float": ([], calib),
        "nearest w8a8": ([w8a8], calib),
        "nearest w4a32": ([w4a32], calib),
        "nearest w4a8": ([w4a8], calib),
        "w8a8, split, table": ([*prepared, w8a8], calib),
        "w8a8, split, table, bias": ([*prepared, {**w8a8, **corrected}], calib),
        "w4a8, split, table": ([*prepared, w4a8], calib),
        "w4a8, split, table, bias": ([*prepared, {**w4a8, **corrected}], calib),
    }
    for at in ("uniform", "first", "middle", "last"):
        found[f"w8a8, {at} third of steps"] = ([w8a8], {**third, "at": at})
    return found


def run(source: Mapping[str, Any], out: Path, *, steps: int, count: int, smoke: bool) -> Json:
    """Compile and sample every arm; gives what was measured."""
    import arms as measured
    import numpy as np

    from effc.source import load

    flat = {**source, **source.get("options", {})}
    flat.pop("options", None)
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    wanted = measured.of_source(load(flat), seeds, steps)
    found: Json = {}
    for number, (name, (passes, calib)) in enumerate(arms(steps, count, smoke=smoke).items()):
        place = out / f"arm-{number}"
        started = time.perf_counter()
        manifest = measured.compiled({"source": source, "passes": passes, "calib": calib}, place)
        seconds = time.perf_counter() - started
        painted = measured.of_package(place, seeds, steps)
        errors = measured.errors(painted, wanted)
        (engine,) = manifest["engines"]
        found[name] = {
            "paired_rel_l2": measured.mean(errors),
            "median_rel_l2": float(np.median(errors)),
            "bytes": (place / engine["path"]).stat().st_size,
            "int8_sites": engine["int8_sites"],
            "total_sites": engine["total_sites"],
            "compile_s": round(seconds, 1),
            "times": manifest["data"]["times"],
        }
        told = found[name]["paired_rel_l2"]
        print(
            f"{name:28} paired error {told['mean']:.3f} [{told['low']:.3f}, {told['high']:.3f}], "
            f"median {found[name]['median_rel_l2']:.3f}, {told['n']} pictures of {steps} steps",
            flush=True,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="A DDPM in 8 and 4 bit for ONNX Runtime.")
    parser.add_argument("--smoke", action="store_true", help="one arm, few pictures and steps")
    parser.add_argument("--fast", action="store_true", help="32 pictures an arm")
    parser.add_argument("--folder", type=Path, help="where the trained model is")
    parser.add_argument("--json", metavar="FILE", help="write what was measured as JSON")
    parser.add_argument("-o", "--out", type=Path, help="keep the packages here")
    given = parser.parse_args()
    count = 4 if given.smoke else 32 if given.fast else 256
    steps = 4 if given.smoke else 20
    folder = folder_of(given.folder)
    with tempfile.TemporaryDirectory(prefix="effc-") as scratch:
        out = given.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        if folder is not None:
            file = folder / "ddpm_mnist.safetensors"
            word = f"{HERE / 'mnist.py'}:make"
            source: Json = {"python": word, "options": {"folder": str(folder)}}
        else:
            print("the trained model is not here: random weights, whose figures say nothing")
            place = random_pipeline(Path(scratch) / "pipeline")
            file = place / "unet" / "diffusion_pytorch_model.safetensors"
            source = {"diffusers": str(place)}
        name, digest = file.name, hashlib.sha256(file.read_bytes()).hexdigest()
        measured = run(source, out, steps=steps, count=count, smoke=given.smoke)
    found = {
        "example": "q_diffusion",
        "smoke": given.smoke,
        "is_trained": folder is not None,
        "data": {"name": name, "n": count, "sha256": digest},
        "steps": steps,
        "arms": measured,
    }
    if given.json:
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        Path(given.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
