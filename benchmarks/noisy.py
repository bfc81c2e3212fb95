"""What few bits cost a vision transformer, by what is put in front of its grids: noise, offsets, levels, all of it.

    python benchmarks/noisy.py                 # two hours on one core; writes results/noisy.json
    python benchmarks/noisy.py --pictures 2000 --draws 1 --bits 6 4
    python benchmarks/noisy.py --finished      # the table of what there is so far

Every unit is model × arm × bits × draw of 128 calibration pictures, which are some of those measured, without their
labels; a unit that is finished is not done again. All linear layers have weights and activations of that many bits on a
grid without a zero point, as GPUs want it; attention and the first convolution stay in float. Measured is an engine of
ONNX Runtime that computes with the codes of those grids, as unsigned integers whose zero is their middle. KL is from
the float model's answers, per picture, and compared picture by picture with clip search (`quantize`, range mse).
`shuffled` is the control of the offsets: the same ones, among channels that they were not chosen for.

EasyQuant, PTQ4ViT and twin-uniform are the ways to choose grids of those papers (`twin.py` says what of the last there
is here); each stands beside the same with uniform noise and with offsets. `outliers` is the same model with three
channels of every norm made eight times as large, and the weights behind them as much smaller: it computes the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import twin

import effc
from effc.backends.dialect import DIALECTS
from effc.backends.ort import Ort
from effc.calib.data import Batch
from effc.compiler import trace_source
from effc.ir.edit import lift, refresh, tensor_of
from effc.ir.program import Origin, Program
from effc.ir.select import op_name
from effc.passes import PASSES
from effc.passes.scaling import places, rescale
from effc.quant.ops import DEQUANTIZE, QUANTIZE
from effc.source import load

Json = dict[str, Any]
STATE = common.ROOT / "benchmarks" / "state" / "noisy"
TARGET, CALIBRATED, BATCH, DRAWS = "tensorrt", 128, 32, 5
OUTLIERS, LARGER = 3, 8.0
CLIP, SHUFFLED = "clip search", "offsets, shuffled"
ALL, ALIKE = "level, offsets, gptq", "level alike, offsets, gptq"
TAILS = "level alike, percentile, offsets, gptq"
LINEAR = {"select": effc.Select(op="linear")}
TWIN, TWINS = "twin", "twin-uniform"
"""What is done behind the passes of an arm, where it is done."""


def offsets(**options: Any) -> Json:
    return {"pass": "noisyquant", **options}


EASYQUANT = {"clip": "cosine", "weight_clip": "output"}
PTQ4VIT = {"clip": "output", "weight_clip": "output", "slopes": True}
BASES: dict[str, Json] = {
    "min/max": {"range": "minmax", "clip": "range"},
    "percentile": {"range": "percentile", "clip": "range"},
    CLIP: {"clip": "range"},
    "EasyQuant": EASYQUANT,
    "PTQ4ViT": PTQ4VIT,
}


def arms() -> dict[str, list[Json]]:
    """Passes by name of an arm, but for their bits."""
    level, best = {"pass": "level"}, {"weight_range": "mse", "rounding": "gptq"}
    alike = {**level, "alike": True}
    found = {
        CLIP: [{"pass": "quantize"}],
        "released": [offsets(mode="released")],
        "clip search, bias compensation": [offsets(mode="none", bias_correction=True)],
        "clip search, noise, bias compensation": [offsets(mode="paper", bias_correction=True)],
        "offsets": [offsets()],
        "offsets, no compensation": [offsets(bias_correction=False)],
        "offsets, no sum added": [offsets(add=False)],
        SHUFFLED: [offsets()],
        "level alike": [alike, {"pass": "quantize"}],
        "level": [level, {"pass": "quantize"}],
        "clip search, gptq": [{"pass": "quantize", **best}],
        "offsets, gptq": [offsets(**best)],
        "level, offsets": [level, offsets()],
        ALL: [level, offsets(**best)],
        ALIKE: [alike, offsets(**best)],
        TAILS: [alike, offsets(**BASES["percentile"], **best)],
        "level, offsets, gptq, refit": [level, offsets(refit=True, **best)],
        "level, offsets, gptq, slopes": [level, offsets(slopes=True, **best)],
    }
    for name, base in BASES.items():
        found.setdefault(name, [offsets(mode="none", **base)])
        found[f"{name}, noise"] = [offsets(mode="paper", **base)]
        found.setdefault(f"{name}, offsets", [offsets(**base)])
    for name in ("", ", noise", ", offsets"):
        extra = {"offsets": True} if name == ", offsets" else {}
        found[f"{TWINS}{name}"] = [
            *found[f"PTQ4ViT{name}"],
            {"pass": TWIN, "noise": name == ", noise", **extra},
        ]
    return found


FIRST = (CLIP, ALIKE, "offsets", SHUFFLED, "clip search, noise")
MAIN = ("min/max", "released", "clip search, bias compensation", "offsets, no compensation",
        "level alike", ALL)  # fmt: skip
PAIRS = tuple(
    name for base in ("min/max", "percentile", "EasyQuant", "PTQ4ViT", TWINS)
    for name in (base, f"{base}, noise")
)  # fmt: skip
SHIFTED = tuple(f"{base}, offsets" for base in (*BASES, TWINS))
REST = tuple(name for name in arms() if name not in (*FIRST, *MAIN, *PAIRS, *SHIFTED, TAILS))
PLAN = (
    ("trained", 6, FIRST, DRAWS),
    ("trained", 4, (CLIP, ALIKE), DRAWS),
    ("trained", 3, (CLIP, ALIKE), DRAWS),
    ("trained", 6, MAIN, DRAWS),
    ("trained", 6, PAIRS, DRAWS),
    ("trained", 6, SHIFTED, DRAWS),
    ("trained", 6, (TAILS,), DRAWS),
    ("trained", 4, (TAILS,), DRAWS),
    ("outliers", 6, (CLIP, "clip search, noise", *PAIRS), 2),
    ("trained", 8, (CLIP, ALIKE, "offsets", SHUFFLED, "clip search, noise"), 3),
    ("trained", 4, ("offsets", SHUFFLED, "clip search, noise", ALL), DRAWS),
    ("trained", 3, ("offsets", SHUFFLED, "clip search, noise", ALL), DRAWS),
    ("trained", 6, REST, 2),
    (
        "trained",
        4,
        ("level, offsets", "level, offsets, gptq, refit", "level, offsets, gptq, slopes"),
        2,
    ),
)
"""Model, bits, arms and draws, what matters most first."""


def main() -> int:
    parser = argparse.ArgumentParser(description="What few bits cost a vision transformer.")
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--draws", type=int, default=DRAWS, help="at most")
    parser.add_argument("--bits", type=int, nargs="*", default=(3, 4, 6, 8))
    parser.add_argument("--finished", action="store_true", help="only tell what is there")
    given = parser.parse_args()
    data = common.data_root()
    if data is None:
        print("skipped: there are no data sets; set EFFC_DATA")
        return 0
    torch.set_num_threads(1)
    STATE.mkdir(parents=True, exist_ok=True)
    pictures, labels = read(data / "fashion-mnist")
    trained = common.cleaned(
        trace_source(load({"transformers": str(data / "vit-fashion-mnist")})), TARGET
    )
    models = {"trained": trained, "outliers": outliers(trained)}
    wanted = logits(trained, pictures[: given.pictures])
    seen: dict[tuple[str, int, str], dict[int, Unit]] = {}
    for (model, bits, names, most), draw in itertools.product(PLAN, range(given.draws)):
        if bits not in given.bits or draw >= most:
            continue
        for arm in names:
            found = unit(arm, bits, draw, models[model], pictures, wanted, model, given.finished)
            if found is not None:
                seen.setdefault((model, bits, arm), {})[draw] = found
    right = labels[: len(wanted)].numpy()
    plain, rows = wanted.argmax(-1) == right, []
    for (model, bits, arm), units in seen.items():
        clip = seen.get((model, bits, CLIP), {})
        draws = sorted(units.keys() & clip.keys())
        if draws:
            both = ([units[d] for d in draws], [clip[d] for d in draws])
            rows.append({**told(arm, bits, *both, plain, right), "model": model})
    accuracy = float((wanted.argmax(-1) == right).mean())
    found = {
        "name": "noisy",
        "n": len(wanted),
        "target": TARGET,
        "rows": rows,
        "pairs": pairs(seen),
        "accuracy": accuracy,
    }
    print(common.write("noisy", found))
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


Array = np.ndarray[Any, np.dtype[Any]]
Unit = tuple[Array, Array, Array]
"""KL, squared error of the logits, and answer, of every picture."""


def logits(program: Program, pictures: torch.Tensor) -> Array:
    feeds = ({"pixel_values": x.numpy()} for x in pictures.split(50))
    return np.concatenate([found["logits"] for found in answers(program, feeds)])


def answers(program: Program, feeds: Iterable[Json]) -> list[Json]:
    """What an engine gives for every batch."""
    with tempfile.TemporaryDirectory(prefix="effc-") as place:
        lowered = Ort().lower(unsigned(program).only(), Path(place))
        with Ort().open(lowered, threads=1) as engine:
            return [dict(engine(batch)) for batch in feeds]


def unsigned(program: Program) -> Program:
    """The same program, its signed codes as unsigned ones, which ONNX Runtime has kernels for."""
    made = program.clone()
    graph = made.only()
    for node in [n for n in graph.nodes if n.target is QUANTIZE]:
        x, scale, zero, low, high, *rest = node.args
        old = tensor_of(graph, zero)
        if old.dtype != torch.int8:
            continue
        middle = (old.int() - low).to(torch.uint8)
        name = lift(graph, f"{node.name}_middle", middle, Origin(node.name, ("unsigned",)))
        node.args = (x, scale, name, 0, high - low, *rest)
        for reader in list(node.users):
            assert reader.target is DEQUANTIZE
            reader.update_arg(2, name)
    refresh(graph)
    return made


def outliers(program: Program) -> Program:
    """The same function, with a few channels of what every norm gives made larger and the weights behind smaller."""
    made = program.clone()
    graph, draw = made.only(), np.random.default_rng(0)
    linear = [n for n in graph.nodes if op_name(n) == "linear"]
    for place in places(graph, linear):
        if op_name(place.value) != "layer_norm" or not place.owners:
            continue
        sizes = np.ones(place.value.meta["val"].shape[-1], np.float32)
        sizes[draw.choice(len(sizes), OUTLIERS, replace=False)] = 1 / LARGER
        rescale(graph, place.value.name, place, torch.from_numpy(sizes), "outliers")
    refresh(graph)
    return made


def unit(
    arm: str, bits: int, draw: int, model: Program, pictures: torch.Tensor, wanted: Array,
    name: str, only_finished: bool,
) -> Unit | None:  # fmt: skip
    """Taken from the last run where it is there."""
    mark = zlib.crc32(f"engine {name} {arm} {arms()[arm]} {bits} {draw} {len(wanted)}".encode())
    file = STATE / f"{mark:08x}.npz"
    if not file.is_file() and only_finished:
        return None
    if not file.is_file():
        started = time.process_time()
        chosen = pictures[places_of(draw, len(pictures))]
        data = [Batch(inputs={"pixel_values": x.numpy()}) for x in chosen.split(BATCH)]
        found = logits(quantised(arm, bits, draw, model, data, name), pictures[: len(wanted)])
        kl = divergence(wanted, found)
        np.savez(file, kl=kl, error=np.square(found - wanted).mean(-1), answer=found.argmax(-1))
        spent = time.process_time() - started
        print(
            f"{name}, {bits} bit, {arm}, draw {draw}: KL {kl.mean():.5f}, {spent:.0f} s", flush=True
        )
    kept = np.load(file)
    return kept["kl"], kept["error"], kept["answer"]


def divergence(wanted: Array, found: Array) -> Array:
    """KL of answers from those that are wanted, by sample, from logits [n, classes]."""
    p, q = (torch.from_numpy(side).double().log_softmax(-1) for side in (wanted, found))
    kl: Array = (p.exp() * (p - q)).sum(-1).numpy()
    return kl


def places_of(draw: int, count: int) -> Array:
    """Which of so many samples calibrate."""
    return np.random.default_rng(1 + draw).permutation(count)[:CALIBRATED]


decided: dict[tuple[str, int, int], Json] = {}
"""What `offsets` chose, by model, bits and draw, for those that are shuffled."""


def quantised(
    arm: str, bits: int, draw: int, model: Program, data: list[Batch], name: str
) -> Program:
    """`model`, which is called `name`, behind the passes of an arm."""
    program, dialect, key = model.clone(), DIALECTS[TARGET], (name, bits, draw)
    if arm == SHUFFLED and key not in decided:
        quantised("offsets", bits, draw, model, data, name)
    for options in arms()[arm]:
        if options["pass"] == TWIN:
            kind = {word: bool(options.get(word)) for word in ("noise", "offsets")}
            twin.put(program, data, bits, seed=draw, **kind)
            continue
        given = {k: v for k, v in options.items() if k != "pass"}
        pass_ = PASSES[options["pass"]](bits=bits, activation_bits=bits, **LINEAR, **given)
        if hasattr(pass_, "seed"):
            pass_ = dataclasses.replace(pass_, seed=draw)
        if arm == SHUFFLED:
            known = shuffled(decided[key], draw)
            effc.apply(pass_, program, dialect=dialect, recorded=known)
            continue
        record = effc.apply(pass_, program, data, dialect=dialect)
        if arm == "offsets":
            decided[key] = record.decisions
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


def pairs(seen: dict[tuple[str, int, str], dict[int, Unit]]) -> list[Json]:
    """Grids of each kind beside the same with noise and with offsets, and twin grids beside linear ones with noise."""
    asked = [(base, f"{base}, {word}") for word in ("noise", "offsets") for base in (*BASES, TWINS)]
    asked += [(TWINS, f"{base}, noise") for base in BASES]
    made = []
    for (model, bits), (base, arm) in itertools.product(
        dict.fromkeys(key[:2] for key in seen), asked
    ):
        mine, theirs = (seen.get((model, bits, name), {}) for name in (arm, base))
        draws = sorted(mine.keys() & theirs.keys())
        if not draws:
            continue
        kl, was = (np.stack([side[d][0] for d in draws]) for side in (mine, theirs))
        each = [float(a.mean() / b.mean()) for a, b in zip(kl, was, strict=True)]
        places = drawn_again(kl.shape[1])
        made.append({
            "model": model, "bits": bits, "base": base, "arm": arm, "draws": len(draws),
            "kl": [float(was.mean()), float(kl.mean())], "kl_ratio": float(kl.mean() / was.mean()),
            "kl_ratio_interval": interval([kl.mean(0)[p].mean() / was.mean(0)[p].mean() for p in places]),
            "kl_ratio_by_draw": each,
        })  # fmt: skip
    return made


def drawn_again(count: int) -> list[Array]:
    """Places of pictures, as many as there are, drawn with returning, the same each time."""
    draw = np.random.default_rng(0)
    return [draw.integers(count, size=count) for _ in range(1000)]


def interval(values: Any) -> list[float]:
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def told(
    arm: str, bits: int, mine: list[Unit], clip: list[Unit], plain: Array, right: Array
) -> Json:
    """Means over draws, with intervals of 95 % from pictures drawn again, the same for both sides."""
    kl, kl_clip = (np.mean([u[0] for u in side], 0) for side in (mine, clip))
    error = np.mean([u[1] for u in mine], 0)
    hit, hit_clip = (np.mean([u[2] == right for u in side], 0) for side in (mine, clip))
    places = drawn_again(len(kl))
    first, second = (side[0][2] == right for side in (mine, clip))
    return {
        "arm": arm,
        "bits": bits,
        "draws": len(mine),
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
    sys.exit(main())
