"""What few bits cost a vision transformer, by what is put in front of its grids: noise, offsets, levels, all of it.

    python benchmarks/noisy.py                 # hours on two cores; writes results/noisy.json, and goes on where it was
    python benchmarks/noisy.py 2000 1 6 4      # so many pictures and draws, and these bits alone

Every unit is arm × bits × draw of 128 calibration pictures, which are some of those measured, without their labels. All
linear layers have weights and activations of that many bits on a grid without a zero point, as GPUs want it; attention
and the first convolution stay in float. The graph is measured, which rounds as the engine does. KL is from the float
model's answers, per picture, and compared picture by picture with clip search (`quantize`, range mse). `shuffled` is
the control of the offsets: the same ones, among channels that they were not chosen for.
"""

from __future__ import annotations

import gzip
import sys
import zlib
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

import effc
from effc.backends.dialect import DIALECTS
from effc.calib.data import Batch
from effc.compiler import trace_source
from effc.ir.program import Program
from effc.passes import PASSES
from effc.source import load

Json = dict[str, Any]
STATE = common.ROOT / "benchmarks" / "state" / "noisy"
TARGET, CALIBRATED, BATCH, DRAWS, BITS = "tensorrt", 128, 32, 5, (8, 6, 4, 3)
CLIP, SHUFFLED = "clip search", "offsets, shuffled"
LINEAR = {"select": effc.Select(op="linear")}


def arms() -> dict[str, list[Json]]:
    """Passes by name of an arm, but for their bits."""

    def offsets(**options: Any) -> Json:
        return {"pass": "noisyquant", **options}

    level, best = {"pass": "level"}, {"weight_range": "mse", "rounding": "gptq"}
    return {
        "min/max": [{"pass": "quantize", "range": "minmax"}],
        "percentile": [{"pass": "quantize", "range": "percentile"}],
        CLIP: [{"pass": "quantize"}],
        "min/max, paper": [offsets(mode="paper", range="minmax")],
        "percentile, paper": [offsets(mode="paper", range="percentile")],
        "clip search, paper": [offsets(mode="paper")],
        "clip search, paper, bias compensation": [offsets(mode="paper", bias_correction=True)],
        "released": [offsets(mode="released")],
        "offsets, ends by range": [offsets(clip="range")],
        "offsets": [offsets()],
        "offsets, no sum added": [offsets(add=False)],
        SHUFFLED: [offsets()],
        "level": [level, {"pass": "quantize"}],
        "clip search, gptq": [{"pass": "quantize", **best}],
        "offsets, gptq": [offsets(**best)],
        "level, offsets": [level, offsets()],
        "level, offsets, gptq": [level, offsets(**best)],
        "level, offsets, gptq, refit": [level, offsets(refit=True, **best)],
        "level alike, offsets, gptq": [{**level, "alike": True}, offsets(**best)],
        "level, offsets, gptq, 8192 rows": [level, offsets(rows=8192, **best)],
    }


def main(words: list[str]) -> int:
    data = common.data_root()
    if data is None:
        print("skipped: there are no data sets; set EFFC_DATA")
        return 0
    torch.set_num_threads(2)
    count, draws, *bits = [*map(int, words), *(10_000, DRAWS)[len(words) :]]
    pictures, labels = read(data / "fashion-mnist")
    model = common.cleaned(
        trace_source(load({"transformers": str(data / "vit-fashion-mnist")})), TARGET
    )
    wanted = logits(model, pictures[:count])
    seen = {}
    for bit in bits or BITS:
        for arm, passes in arms().items():
            for draw in range(draws):
                seen[arm, bit, draw] = unit(arm, passes, bit, draw, model, pictures, wanted)
                kl = seen[arm, bit, draw][0].mean()
                print(f"{bit} bit, {arm}, draw {draw}: KL {kl:.5f}", flush=True)
    right = labels[:count].numpy()
    plain = wanted.argmax(-1).numpy() == right
    rows = [
        told(arm, bit, [seen[arm, bit, d] for d in range(draws)],
             [seen[CLIP, bit, d] for d in range(draws)], plain, right)
        for bit in bits or BITS for arm in arms()
    ]  # fmt: skip
    found = {"name": "noisy", "n": count, "draws": draws, "target": TARGET, "rows": rows}
    print(common.write("noisy", {**found, "accuracy": float(plain.mean())}))
    return 0


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures in −1 … 1 and labels, always in the same shuffled order."""

    def bytes_of(word: str, head: int) -> np.ndarray[Any, Any]:
        raw = gzip.decompress((folder / word).read_bytes())
        return np.frombuffer(raw, np.uint8, offset=head)

    images = bytes_of("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    labels = bytes_of("t10k-labels-idx1-ubyte.gz", 8)
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.from_numpy(images[order]) / 127.5 - 1, torch.from_numpy(labels[order].copy())


def logits(program: Program, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([program.run(pixel_values=x)["logits"] for x in pictures.split(250)])


def unit(
    arm: str, passes: list[Json], bits: int, draw: int, model: Program,
    pictures: torch.Tensor, wanted: torch.Tensor,
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:  # fmt: skip
    """KL, squared error of the logits and answer of every picture; taken from the last run where it is there."""
    STATE.mkdir(parents=True, exist_ok=True)
    mark = zlib.crc32(f"{arm} {passes} {bits} {draw} {len(wanted)}".encode())
    file = STATE / f"{mark:08x}.npz"
    if file.is_file():
        kept = np.load(file)
        return kept["kl"], kept["error"], kept["answer"]
    program = quantised(arm, passes, bits, draw, model, pictures)
    found = logits(program, pictures[: len(wanted)])
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    error, answer = (found - wanted).square().mean(-1).numpy(), found.argmax(-1).numpy()
    np.savez(file, kl=kl, error=error, answer=answer)
    return kl, error, answer


def quantised(
    arm: str, passes: list[Json], bits: int, draw: int, model: Program, pictures: torch.Tensor
) -> Program:
    program, dialect = model.clone(), DIALECTS[TARGET]
    chosen = np.random.default_rng(1 + draw).permutation(len(pictures))[:CALIBRATED]
    data = [Batch(inputs={"pixel_values": x.numpy()}) for x in pictures[chosen].split(BATCH)]
    for options in passes:
        given = {k: v for k, v in options.items() if k != "pass"}
        pass_ = PASSES[options["pass"]](bits=bits, activation_bits=bits, **LINEAR, **given)
        before = program.clone()
        record = effc.apply(pass_, program, data, dialect=dialect)
        if arm == SHUFFLED:
            program = before
            effc.apply(pass_, program, dialect=dialect, recorded=shuffled(record.decisions, draw))
    return program


def shuffled(decisions: Json, seed: int) -> Json:
    """Offsets given to other channels; the means behind the grid are moved along, so biases take them out."""
    made, draw = dict(decisions), np.random.default_rng(seed)
    for key in [k for k, v in decisions.items() if k.endswith(":offset") and v]:
        old = np.array(decisions[key])
        new = old[draw.permutation(len(old))]
        made[key] = [float(v) for v in new]
        means = f"{key.removesuffix(':offset')}:means"
        before, behind = decisions[means]
        made[means] = [before, [float(v) for v in np.array(behind) - old + new]]
    return made


def told(
    arm: str, bits: int, mine: list[Any], clip: list[Any],
    plain: np.ndarray[Any, Any], right: np.ndarray[Any, Any],
) -> Json:  # fmt: skip
    """Means over draws, with intervals of 95 % from pictures drawn again, the same for both sides."""
    kl, kl_clip = (np.mean([u[0] for u in side], 0) for side in (mine, clip))
    error = np.mean([u[1] for u in mine], 0)
    hit, hit_clip = (np.mean([u[2] == right for u in side], 0) for side in (mine, clip))
    draw = np.random.default_rng(0)
    places = [draw.integers(len(kl), size=len(kl)) for _ in range(1000)]

    def interval(values: Any) -> list[float]:
        return [float(v) for v in np.percentile(values, [2.5, 97.5])]

    first, second = (side[0][2] == right for side in (mine, clip))
    return {
        "arm": arm,
        "bits": bits,
        "accuracy": float(hit.mean()),
        "accuracy_interval": interval([hit[p].mean() for p in places]),
        "change": float(hit.mean() - plain.mean()),
        "change_interval": interval([(hit - plain)[p].mean() for p in places]),
        "against_clip": interval([(hit - hit_clip)[p].mean() for p in places]),
        "kl": float(kl.mean()),
        "kl_ratio": float(kl.mean() / kl_clip.mean()),
        "kl_ratio_interval": interval([kl[p].mean() / kl_clip[p].mean() for p in places]),
        "kl_by_draw": [float(u[0].mean()) for u in mine],
        "logit_error": float(error.mean()),
        "mcnemar": [int((first & ~second).sum()), int((second & ~first).sum())],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
