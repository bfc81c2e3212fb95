"""What pruning costs in accuracy, by ranking and after short training: a vision transformer and a conv net.

    apt-get install dataset-fashion-mnist       # training pictures (Debian, MIT)
    python benchmarks/convnet.py                # once: trains the conv net
    python benchmarks/pruning.py                # an hour; writes results/pruning.json, and goes on where it was

Every unit is model × ranking × ratio × seed. Of all groups that can be pruned that part of the units goes, as the
ratio says; at the smaller ratio also so that multiples of 16 stay ("align 16"), but for the case where the residual
width alone is pruned. The graph is then trained for a few hundred steps towards the model it was (`tune`: the same
pictures, steps and rates for every ranking), and quantised to int8. Accuracy is of 5,000 test pictures. Seeds change
what is calibrated and trained on, in which order, and the random ranking. Latency is of the graph and of its int8
engine on ONNX Runtime, one picture, two threads: it hangs on sizes, the same for all rankings of a ratio, and is
measured once. `random` is the control.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import common
import convnet
import numpy as np
import torch

import effc
from effc import bench, measure
from effc.backends.dialect import ORT
from effc.backends.ort import Ort
from effc.calib.data import Batch
from effc.compiler import trace_source
from effc.ir.program import Program
from effc.passes import PASSES
from effc.passes.coupling import coupled_dims
from effc.passes.prune_dims import PruneDims
from effc.passes.quantize import Quantize
from effc.passes.tune import Tune
from effc.source import load

SEEDS, FEWER, RATIOS = range(10), range(6), (0.3, 0.5)
ALIGN = 16
RANKINGS = ("random", "magnitude", "wanda", "taylor")
WIDTH = "ViT, residual width"
CALIBRATED, TRAINED, STEPS, BATCH, TESTED = 256, 4096, 150, 64, 5000
THREADS, BUDGET_S = 2, 8.0
Json = dict[str, Any]


def models() -> Iterator[tuple[str, Program]]:
    """The models, after the exact passes of every compile; the last loses width of its residual stream alone."""
    data = common.data_root()
    if data is not None:
        yield (
            "ViT",
            common.cleaned(trace_source(load({"transformers": str(data / "vit-fashion-mnist")}))),
        )
    net = convnet.net()
    yield "conv net", common.cleaned(effc.trace(net.modules["main"], net.inputs["main"]))
    if data is not None:
        found = common.cleaned(
            trace_source(load({"transformers": str(data / "vit-fashion-mnist")}))
        )
        effc.apply(PASSES["layernorm-to-rmsnorm"](), found, dialect=ORT)
        yield WIDTH, found


def pixels(name: str, word: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures as a model takes them, and their labels."""
    images, labels = convnet.pictures(convnet.TRAIN, word)
    if name != "conv net":  # in −1 … 1, as its processor makes them
        images = ((images * 0.353 + 0.286) - 0.5) / 0.5
    return images, labels


def accuracy(run: Any, images: torch.Tensor, labels: torch.Tensor) -> float:
    right = sum(
        int((run(pixel_values=x)["logits"].argmax(-1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def main() -> int:
    if not convnet.TRAIN.is_dir() or not convnet.WEIGHTS.exists():
        sys.exit("skipped: apt-get install dataset-fashion-mnist; python benchmarks/convnet.py")
    file = common.RESULTS / "pruning.json"
    found: Json = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    units: Json = found.get("units", {})
    for name, whole in models():
        program = whole.clone()
        groups = common.stream(program).name if name == WIDTH else "*"
        train = pixels(name, "train")[0]
        test = tuple(part[: 2 * TESTED : 2] for part in pixels(name, "t10k"))
        reached = accuracy(program.run, *test)
        for word, ratio, align in cases(name):
            units.setdefault(f"{word} whole", {"accuracy": reached})
            for ranking in (*RANKINGS, "pca") if name == WIDTH else RANKINGS:
                for seed in SEEDS if word == name != WIDTH else FEWER:
                    key = f"{word}: {ranking}, {ratio}, {seed}"
                    if key in units:
                        continue
                    units[key] = unit(program, groups, ranking, ratio, seed, train, test, align)
                    print(key, units[key], flush=True)
                    _keep(units)
            if (key := f"{word} latency {ratio}") not in units:
                units[key] = latency(program, groups, ratio, train, align)
                _keep(units)
    return 0


def cases(name: str) -> Iterator[tuple[str, float, int | None]]:
    """What a model's case is called, its ratio, and what its sizes are multiples of."""
    for ratio in RATIOS:
        yield name, ratio, None
    if name != WIDTH:
        yield f"{name}, align {ALIGN}", RATIOS[0], ALIGN


def _keep(units: Json) -> None:
    content = {
        "name": "pruning", "steps": STEPS, "trained": TRAINED, "batch": BATCH, "tested": TESTED, "units": units,
        "threads": THREADS,
    }  # fmt: skip
    common.write("pruning", content)


def batches(images: torch.Tensor, seed: int, count: int, size: int) -> list[Json]:
    """Pictures drawn by a seed."""
    chosen = np.random.default_rng([7, seed]).permutation(len(images))[:count]
    drawn = images[torch.from_numpy(chosen)]
    return [{"pixel_values": x.numpy()} for x in drawn.split(size)]


def pruned(
    program: Program,
    groups: str,
    ranking: str,
    ratio: float,
    seed: int,
    images: torch.Tensor,
    align: int | None = None,
) -> Program:
    made = program.clone()
    calib = [Batch(inputs=b) for b in batches(images, seed, CALIBRATED, BATCH)]
    options: Json = {"ratio": ratio, "importance": ranking, "groups": groups, "align": align}
    if ranking == "pca":
        effc.apply(PASSES["pca-rotate"](), made, calib, dialect=ORT)
        options["importance"] = "first"
    if ranking == "random":
        options = {"keep": by_chance(made, groups, ratio, seed, align)}
    effc.apply(PruneDims(**options), made, calib)
    return made


def by_chance(
    program: Program, groups: str, ratio: float, seed: int, align: int | None
) -> dict[str, tuple[int, ...]]:
    """As many units of every group as a ranking keeps, drawn by a seed."""
    ranked = program.clone()
    effc.apply(PruneDims(ratio=ratio, importance="magnitude", groups=groups, align=align), ranked)
    sizes = {group.name: group.size for group in coupled_dims(ranked.only()).prunable()}
    draw = np.random.default_rng([11, seed])
    return {
        group.name: tuple(sorted(draw.permutation(group.size)[: sizes[group.name]].tolist()))
        for group in coupled_dims(program.only()).prunable()
        if fnmatchcase(group.name, groups)
    }


def unit(
    program: Program,
    groups: str,
    ranking: str,
    ratio: float,
    seed: int,
    images: torch.Tensor,
    test: Any,
    align: int | None,
) -> Json:
    made = pruned(program, groups, ranking, ratio, seed, images, align)
    before = accuracy(made.run, *test)
    drawn = batches(images, 100 + seed, TRAINED + BATCH, BATCH)
    tune = Tune(steps=STEPS, lr=1e-3, seed=seed, batch=BATCH)
    record = effc.apply(tune, made, train=effc.trainer(program, drawn))
    after = accuracy(made.run, *test)
    effc.apply(Quantize(), made, [Batch(inputs=b) for b in drawn[:4]], dialect=ORT)
    return {
        "pruned": before, "tuned": after, "int8": accuracy(made.run, *test),
        "share": round(1 - parameters(made) / parameters(program), 4),
        "seconds": round(record.seconds, 1), "revision": common.circumstances()["revision"],
    }  # fmt: skip


def parameters(program: Program) -> int:
    return sum(t.numel() for t in program.only().tensors().values() if t.dim() > 0)


def latency(
    program: Program, groups: str, ratio: float, images: torch.Tensor, align: int | None
) -> Json:
    """The whole graph ÷ the pruned one, in float and in int8."""
    found: Json = {}
    feeds = {"pixel_values": images[:1].numpy()}
    for word in ("float", "int8"):
        lowered = {}
        with tempfile.TemporaryDirectory() as place:
            for name, of in (
                ("whole", program),
                ("engine", pruned(program, groups, "magnitude", ratio, 0, images, align)),
            ):
                made = of.clone()
                if word == "int8":
                    calib = [Batch(inputs=b) for b in batches(images, 0, CALIBRATED, BATCH)]
                    effc.apply(Quantize(), made, calib, dialect=ORT)
                lowered[name] = Ort().lower(made.only(), Path(place) / name)
            openers = {name: measure.opener(low, THREADS) for name, low in lowered.items()}
            case = bench.Case(batch=1, length=None, feeds=feeds)
            timed = bench.compare(openers, [case], threads=THREADS, budget_s=BUDGET_S)
            found[word] = timed.to_json()["shapes"][0]
    return found


if __name__ == "__main__":
    raise SystemExit(main())
