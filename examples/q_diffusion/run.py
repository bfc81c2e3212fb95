"""A diffusion model in 8 and 4 bit, calibrated on its own sampler, and how far its pictures are from the float model's.

    python examples/q_diffusion/run.py [--smoke | --fast] [--state DIR] [--folder DIR] [--json FILE] [-o OUT]

The model is a trained DDPM of MNIST digits: `ddpm_mnist.safetensors` and the `unet.py` that loads it, in `--folder`, in
`$EFFC_DATA/ddpm-mnist` or `../shared/data/ddpm-mnist`. Digits of a test set, in `mnist-t10k` beside it, teach a small
classifier, on whose features sets of pictures are compared; models see none of them. Without the model a pipeline with
random weights is made, which shows that all of it runs, and nothing else. Each arm is compiled for ONNX Runtime and
paints from the float model's noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


def eyes(folder: Path | None, few: bool) -> Callable[[Any], Any] | None:
    """What sees features of pictures; None where they are too few for a distance, or digits are not at hand."""
    place = folder.parent / "mnist-t10k" if folder is not None else None
    if few or place is None or not place.is_dir():
        return None
    import distances

    return distances.trained(*distances.digits(place)).features


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


FULL, NEAREST, FLOAT = "full w4a8", "nearest w4a8", "float"
CORRECTED = ", corrected"
"""Behind the name of an arm whose sampler uses the table of its package."""


WIDE = ["*e1*", "*f3*", "*model.out"]
"""The first and the last stage of the model, whose weights are few and keep 8 bit in the full stack."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Passes and calibration; with `corrected` the same package is sampled with its table, too."""

    passes: list[Any]
    calib: Json
    corrected: bool | str = False


def arms(steps: int, count: int, *, smoke: bool, learning: int) -> dict[str, Arm]:
    """By name; `learning` is how many steps a block is reconstructed."""
    calib = {"trajectories": count, "steps": steps, "batch": 16}
    w8a8 = {"pass": "quantize", "bits": 8, "activation_bits": 8}
    w4a8 = {**w8a8, "bits": 4, "weight_range": "mse"}
    learned = {"pass": "reconstruct", "steps": learning, "activation_steps": max(1, learning // 4)}
    prepared, biases = ["split-concat", "timestep-table"], {"bias_correction": True}
    gain = {"pass": "step-gain", "select": {"module": WIDE}}
    ends = {"wide": WIDE}
    whole = [*prepared, gain, {**w4a8, **learned, **ends}]
    if smoke:
        whole = [*prepared, "step-gain", {**w4a8, **learned}]
    full = Arm(passes=whole, calib=calib, corrected="mean")
    if smoke:
        return {FLOAT: Arm(passes=[], calib=calib), FULL: full}
    third = {**calib, "keep": max(1, steps // 3)}
    found = {
        FLOAT: Arm(passes=[], calib=calib),
        NEAREST: Arm(passes=[w4a8], calib=calib),
        FULL: full,
        "nearest w8a8": Arm(passes=[w8a8], calib=calib),
        "w8a8, biases": Arm(passes=[{**w8a8, **biases}], calib=calib, corrected="mean"),
        "w8a8, biases, gain": Arm(passes=[gain, {**w8a8, **biases}], calib=calib),
        "w8a8, last stage in float": Arm(
            passes=[{**w8a8, "select": {"exclude": "*f3*"}}], calib=calib
        ),
        "nearest w4a32": Arm(passes=[{**w4a8, "activation_bits": 16}], calib=calib),
        "w4a8, split": Arm(passes=["split-concat", w4a8], calib=calib),
        "w4a8, table": Arm(passes=["timestep-table", w4a8], calib=calib),
        "w4a8, ends in 8 bit": Arm(passes=[{**w4a8, **ends}], calib=calib),
        "w4a8, ends in 8 bit, biases": Arm(
            passes=[{**w4a8, **biases, **ends}], calib=calib, corrected="mean"
        ),
        "w4a8, adaround": Arm(passes=[{**w4a8, **learned}], calib=calib, corrected="mean"),
        "full w4a8, gain of predictions": Arm(passes=whole, calib=calib, corrected=True),
    }
    for at in ("uniform", "first", "middle", "last"):
        found[f"w8a8, {at} third of steps"] = Arm(passes=[w8a8], calib={**third, "at": at})
    return found


@dataclass(frozen=True, kw_only=True)
class State:
    """Units of work that are done, one file each, so that a long table goes on where it was; None keeps nothing."""

    folder: Path | None

    def unit(self, asked: Json, make: Callable[[], Json]) -> Json:
        """What a unit gave: read where it was done for the same, made and written where not."""
        if self.folder is None:
            return make()
        text = json.dumps(asked, sort_keys=True)
        place = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"
        if place.is_file():
            return dict(json.loads(place.read_text(encoding="utf-8"))["found"])
        found = make()
        part = place.with_suffix(".part")
        part.write_text(json.dumps({"asked": asked, "found": found}), encoding="utf-8")
        part.replace(place)
        return found


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What pictures are held against: the float model's from the same noise, and what a classifier sees in them."""

    wanted: Any
    see: Callable[[Any], Any] | None


def unit(
    source: Mapping[str, Any],
    arm: Arm,
    place: Path,
    seed: int,
    steps: int,
    count: int,
    judge: Judge,
) -> Json:
    """An arm under one seed: what its engine is, and how far each picture is from the float model's."""
    import arms as measured

    seeds = range(FIRST_SEED * (seed + 1), FIRST_SEED * (seed + 1) + count)
    calib = {**arm.calib, "seed": 10_000 * seed, "correct": arm.corrected}
    started = time.perf_counter()
    manifest = measured.compiled({"source": source, "passes": arm.passes, "calib": calib}, place)
    seconds = time.perf_counter() - started
    (engine,) = manifest["engines"]
    found: Json = {
        "bytes": (place / engine["path"]).stat().st_size,
        "coded_ratio": measured.coded_ratio(place / engine["path"]),
        "int8_sites": engine["int8_sites"], "total_sites": engine["total_sites"],
        "compile_s": round(seconds, 1), "times": manifest["data"]["times"],
    }  # fmt: skip
    for word in ("", CORRECTED) if arm.corrected else ("",):
        painted = measured.of_package(place, seeds, steps, corrected=bool(word))
        found[f"errors{word}"] = measured.errors(painted, judge.wanted).tolist()
        if judge.see is not None:
            found[f"features{word}"] = judge.see(painted).round(5).tolist()
    return found


def of_engines(
    source: Mapping[str, Any], pair: Mapping[str, Arm], out: Path, steps: int, seeds: range
) -> Json:
    """How much faster the second of two arms samples, and how far its places are from what its file says."""
    import arms as measured
    import sites

    from effc.source import load

    places = []
    for number, arm in enumerate(pair.values()):
        place = out / f"pair-{number}"
        calib = {**arm.calib, "correct": arm.corrected}
        manifest = measured.compiled(
            {"source": source, "passes": arm.passes, "calib": calib}, place
        )
        places.append(place)
    (engine,) = manifest["engines"]
    off = [
        sites.steps_off(places[1] / engine["path"], feeds)
        for feeds in measured.shown(load(_flat(source)), seeds, steps)
    ]
    most = {name: max(each[name] for each in off) for name in off[0]}
    return {
        "loop_speedup": measured.speedup(*places, steps),
        "engine_steps_off": {"most": max(most.values()), "sites": len(most), "batches": len(off)},
    }


def _flat(source: Mapping[str, Any]) -> Json:
    """A source as the loader takes it: options beside the rest."""
    return {k: v for k, v in {**source, **source.get("options", {})}.items() if k != "options"}


def run(
    source: Mapping[str, Any], out: Path, *, steps: int, count: int, smoke: bool, calibrated: int,
    learning: int, seeds: int, state: State, digest: str, see: Callable[[Any], Any] | None,
) -> Json:  # fmt: skip
    """Compile and sample every arm under every seed; gives what was measured."""
    import arms as measured
    import distances
    import numpy as np

    from effc.source import load

    model = load(_flat(source))
    errors: dict[str, list[float]] = {}
    features: dict[str, list[Any]] = {}
    truth: list[Any] = []
    found: Json = {}
    for seed in range(seeds):
        first = FIRST_SEED * (seed + 1)
        wanted = measured.of_source(model, range(first, first + count), steps)
        judge = Judge(wanted=wanted, see=see)
        truth += [] if see is None else see(wanted).tolist()
        chosen = arms(steps, calibrated, smoke=smoke, learning=learning)
        for number, (name, arm) in enumerate(chosen.items()):
            place = out / f"arm-{number}-{seed}"
            asked = {"model": digest, "arm": name, "seed": seed, "steps": steps, "count": count}
            asked |= {"passes": arm.passes, "calib": arm.calib, "corrected": arm.corrected}
            asked |= {"features": see is not None}

            def make(
                arm: Arm = arm, place: Path = place, seed: int = seed, judge: Judge = judge
            ) -> Json:
                return unit(source, arm, place, seed, steps, count, judge)

            made = state.unit(asked, make)
            for word in ("", CORRECTED) if arm.corrected else ("",):
                errors.setdefault(name + word, []).extend(made[f"errors{word}"])
                features.setdefault(name + word, []).extend(made.get(f"features{word}", []))
                known = np.array(errors[name + word])
                found[name + word] = {
                    "paired_rel_l2": measured.mean(known), "median_rel_l2": float(np.median(known)),
                    "frechet_minus_null": None,
                    **{k: v for k, v in made.items() if not k.startswith(("errors", "features"))},
                }  # fmt: skip
                told = found[name + word]["paired_rel_l2"]
                print(
                    f"{name + word:32} paired error {told['mean']:.3f} [{told['low']:.3f}, {told['high']:.3f}], "
                    f"median {found[name + word]['median_rel_l2']:.3f}, {told['n']} pictures of {steps} steps",
                    flush=True,
                )
    if see is not None:
        for name, seen in features.items():
            apart = distances.beside_null(np.array(seen), np.array(truth))
            found[name] |= apart
            told = apart["frechet_minus_null"]
            print(
                f"{name:32} Fréchet distance less null {told['mean']:+.3f} [{told['low']:+.3f}, {told['high']:+.3f}]"
            )
    best = {name: np.array(values) for name, values in errors.items()}
    pairs = [(FULL, NEAREST), (FULL + CORRECTED, NEAREST), (FULL + CORRECTED, FULL)]
    pairs += [("w8a8, biases, gain", "w8a8, biases"), (FULL, "w4a8, ends in 8 bit, biases")]
    pairs += [("w4a8, adaround", NEAREST), ("w4a8, ends in 8 bit, biases" + CORRECTED, NEAREST)]
    pairs += [
        ("w8a8, biases" + CORRECTED, "nearest w8a8"),
        ("full w4a8, gain of predictions" + CORRECTED, FULL + CORRECTED),
    ]
    pairs += [
        ("w8a8, uniform third of steps", f"w8a8, {at} third of steps")
        for at in ("first", "middle", "last")
    ]
    compared = {
        f"{a} / {b}": measured.ratio(best[a], best[b]) for a, b in pairs if a in best and b in best
    }
    for word, told in compared.items():
        print(f"{word:60} {told['ratio']:.2f} [{told['low']:.2f}, {told['high']:.2f}]")
    whole = {
        "arms": found, "compared": compared,
        "disk_ratio": found[FULL]["bytes"] / found[FLOAT]["bytes"],
        "coded_ratio": found[FULL]["coded_ratio"],
    }  # fmt: skip
    chosen = arms(steps, calibrated, smoke=smoke, learning=learning)
    pair = {name: chosen[name] for name in (FLOAT, FULL)}
    asked = {
        "model": digest,
        "steps": steps,
        "pair": {n: dataclasses.asdict(a) for n, a in pair.items()},
    }
    rows = range(FIRST_SEED // 2, FIRST_SEED // 2 + 4)
    whole |= state.unit(asked, lambda: of_engines(source, pair, out, steps, rows))
    print("sampling, full w4a8 against float: " + json.dumps(whole["loop_speedup"]))
    print("places of the engine against its file: " + json.dumps(whole["engine_steps_off"]))
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description="A DDPM in 8 and 4 bit for ONNX Runtime.")
    parser.add_argument("--smoke", action="store_true", help="two arms, few pictures and steps")
    parser.add_argument("--fast", action="store_true", help="24 pictures an arm, one seed")
    parser.add_argument("--folder", type=Path, help="where the trained model is")
    parser.add_argument(
        "--state", type=Path, help="keep every arm and seed that is done here, and go on from there"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        help="seeds of calibration and sampling; 3 where nothing is said, else 1",
    )
    parser.add_argument("--pictures", type=int, help="pictures an arm and seed")
    parser.add_argument("--json", metavar="FILE", help="write what was measured as JSON")
    parser.add_argument("-o", "--out", type=Path, help="keep the packages here")
    given = parser.parse_args()
    count = given.pictures or (4 if given.smoke else 24 if given.fast else 256)
    steps = 4 if given.smoke else 20
    seeds = given.seeds or (1 if given.smoke or given.fast else 3)
    if given.state is not None:
        given.state.mkdir(parents=True, exist_ok=True)
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
        measured = run(
            source, out, steps=steps, count=count, smoke=given.smoke, seeds=seeds, digest=digest,
            calibrated=4 if given.smoke else 16 if given.fast else 32,
            learning=5 if given.smoke else 120 if given.fast else 400,
            state=State(folder=given.state), see=eyes(folder, given.smoke or given.fast),
        )  # fmt: skip
    found = {
        "example": "q_diffusion",
        "smoke": given.smoke,
        "is_trained": folder is not None,
        "data": {"name": name, "n": count, "sha256": digest},
        "steps": steps,
        **measured,
    }
    if given.json:
        text = json.dumps(found, indent=1, sort_keys=True) + "\n"
        Path(given.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
