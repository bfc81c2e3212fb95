"""Six bits on models that nothing was tuned for: a Swin, a DeiT and MiniLM, by the arms of `noisy.py`.

    python benchmarks/unseen.py --models DIR       # half an hour on one core; writes results/unseen.json
    python benchmarks/unseen.py --models DIR --only MiniLM-L6 --draws 1

DIR has `swin` and `deit`, as `examples/noisyquant/train.py` makes them. Errors of engines beside the float model are by
sample: KL of pictures' answers, 1 − cosine of sentences' vectors, compared with clip search on the same samples. Others
calibrate, 128 of them: pictures without their labels, sentences of STS-B's development part. The gate is asked by
a compile of the whole stack: what the metric may lose and how fast the engine is to be, as where a recipe says nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import common
import noisy
import numpy as np
import torch
from scipy.stats import spearmanr

from effc.calib.data import Batch
from effc.compiler import trace_source
from effc.ir.program import Program
from effc.source import load

Json = dict[str, Any]
Array = noisy.Array
BITS, DRAWS, SAMPLES, BATCH, LONGEST = 6, 3, 2000, 50, 128
ARMS = (noisy.CLIP, noisy.ALIKE, "offsets", noisy.SHUFFLED)
BEST = {"weight_range": "mse", "rounding": "gptq"}
STACK = ({"pass": "level", "alike": True}, {"pass": "noisyquant", **BEST})
GATED = "openvino"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, the batches that it is measured on, and what of its outputs counts.

    `calibration` gives samples of a draw, `error` compares two lists of outputs sample by sample, `score` is the metric
    of the task, and `recipe` is what a compile of it says of source, calibration and metric.
    """

    program: Program
    feeds: Sequence[Json]
    calibration: Callable[[int], list[Batch]]
    error: Callable[[list[Json], list[Json]], Array]
    score: Callable[[list[Json]], float]
    measure: str
    recipe: Json


def pictured(model: Path, data: Path, count: int) -> Task:
    folder = data / "fashion-mnist"
    pictures, labels = noisy.read(folder)
    seen, others = pictures[:count], pictures[count:]

    def calibration(draw: int) -> list[Batch]:
        chosen = others[noisy.places_of(draw, len(others))]
        return [Batch(inputs={"pixel_values": x.numpy()}) for x in chosen.split(noisy.BATCH)]

    def logits(found: list[Json]) -> Array:
        return np.concatenate([one["logits"] for one in found])

    return Task(
        program=_cleaned(model),
        feeds=[{"pixel_values": x.numpy()} for x in seen.split(BATCH)],
        calibration=calibration,
        error=lambda wanted, found: noisy.divergence(logits(wanted), logits(found)),
        score=lambda found: float((logits(found).argmax(-1) == labels[:count].numpy()).mean()),
        measure="KL",
        recipe={
            "source": {"transformers": str(model)},
            "calib": {"file": str(folder), "samples": noisy.CALIBRATED},
            "metric": {"accuracy": str(folder)},
        },
    )


def written(model: Path, data: Path, count: int) -> Task:
    """Sentences of pairs of the test part, the first and then the second of each; the score is of the pairs."""
    source = load({"transformers": str(model)})
    processor = source.processor
    assert processor is not None
    rows = _pairs(data / "stsb" / "stsb-en-test.csv")[: count // 2]
    others = list(
        dict.fromkeys(t for r in _pairs(data / "stsb" / "stsb-en-dev.csv") for t in r[:2])
    )
    (names,) = source.inputs.values()

    def encoded(texts: Sequence[str]) -> Json:
        made = processor.encode(list(texts), max_length=LONGEST)
        return {name: made[name] for name in names}

    texts = [*(r[0] for r in rows), *(r[1] for r in rows)]
    feeds = [encoded(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]

    def calibration(draw: int) -> list[Batch]:
        chosen = [others[i] for i in noisy.places_of(draw, len(others))]
        return [
            Batch(inputs=encoded(chosen[i : i + noisy.BATCH]))
            for i in range(0, len(chosen), noisy.BATCH)
        ]

    def vectors(found: list[Json]) -> Array:
        pooled = [
            processor.pool(one["last_hidden_state"], fed["attention_mask"])
            for one, fed in zip(found, feeds, strict=True)
        ]
        made = np.concatenate(pooled).astype(np.float64)
        return made / np.linalg.norm(made, axis=-1, keepdims=True)

    def score(found: list[Json]) -> float:
        first, second = np.split(vectors(found), 2)
        return float(spearmanr((first * second).sum(-1), [float(r[2]) for r in rows]).statistic)

    return Task(
        program=_cleaned(model),
        feeds=feeds,
        calibration=calibration,
        error=lambda wanted, found: 1 - (vectors(wanted) * vectors(found)).sum(-1),
        score=score,
        measure="1 − cosine",
        recipe={
            "source": {"transformers": str(model)},
            "calib": {"file": str(common.SENTENCES), "samples": noisy.CALIBRATED},
            "metric": {"sts": str(data / "stsb" / "stsb-en-test.csv")},
        },
    )


def _cleaned(model: Path) -> Program:
    return common.cleaned(trace_source(load({"transformers": str(model)})), noisy.TARGET)


@cache
def _pairs(file: Path) -> list[list[str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def measured(name: str, task: Task, draws: int) -> list[Json]:
    """A row for every arm: its error beside that of clip search on the same samples and draws."""
    wanted = noisy.answers(task.program, task.feeds)
    errors: dict[str, list[Array]] = {}
    scores: dict[str, list[float]] = {}
    for draw in range(draws):
        data = task.calibration(draw)
        for arm in ARMS:
            started = time.process_time()
            found = noisy.answers(
                noisy.quantised(arm, BITS, draw, task.program, data, name), task.feeds
            )
            errors.setdefault(arm, []).append(task.error(wanted, found))
            scores.setdefault(arm, []).append(task.score(found))
            print(
                f"{name}, {arm}, draw {draw}: {task.measure} {errors[arm][-1].mean():.6f}, score "
                f"{scores[arm][-1]:.4f}, {time.process_time() - started:.0f} s", flush=True,
            )  # fmt: skip
    clip = np.stack(errors[noisy.CLIP])
    rows, places = [], noisy.drawn_again(clip.shape[1])
    for arm, each in errors.items():
        error = np.stack(each)
        ratios = [error.mean(0)[p].mean() / clip.mean(0)[p].mean() for p in places]
        rows.append({
            "model": name, "arm": arm, "draws": draws, "n": error.shape[1], "measure": task.measure,
            "error": float(error.mean()), "ratio": float(error.mean() / clip.mean()),
            "ratio_interval": noisy.interval(ratios),
            "ratio_by_draw": [float(a.mean() / b.mean()) for a, b in zip(error, clip, strict=True)],
            "score": float(np.mean(scores[arm])), "float_score": task.score(wanted),
        })  # fmt: skip
    return rows


def gated(name: str, task: Task) -> Json:
    """What the gate says of a compile of the stack: taken back may be passes, and layers."""
    options = {"bits": BITS, "activation_bits": BITS, "select": {"op": "linear"}}
    asked = {
        **task.recipe,
        "passes": [{**p, **options} for p in STACK],
        "targets": [GATED],
        "gate": {"latency": "not-slower", "metric": {}},
    }
    with tempfile.TemporaryDirectory(prefix="effc-") as folder:
        file, report = Path(folder) / "recipe.yaml", Path(folder) / "report.json"
        file.write_text(json.dumps(asked), encoding="utf-8")
        words = ["compile", file, "-o", Path(folder) / "out", "--json", report, "--threads", "1"]
        common.run_cli(*words, "--time-budget", "5m", "--allow-worse")
        found = json.loads(report.read_text(encoding="utf-8"))
    return {
        "model": name, "target": GATED, "verdict": found["gate"]["verdict"],
        "checks": [check["text"] for check in found["gate"]["checks"]],
        "rolled_back": found["gate"]["rolled_back"], "tried": found["gate"]["tried"], "metric": found["metric"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Six bits on models that nothing was tuned for.")
    parser.add_argument("--models", type=Path, required=True, help="has `swin` and `deit`")
    parser.add_argument("--only", action="append", help="a model, by its name in the table")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--part", choices=("errors", "gate"), help="both where nothing is said")
    given = parser.parse_args()
    data = common.data_root()
    if data is None:
        raise SystemExit("there are no data sets; set EFFC_DATA")
    torch.set_num_threads(1)
    makers = {
        "Swin": lambda: pictured(given.models / "swin", data, given.samples),
        "DeiT": lambda: pictured(given.models / "deit", data, given.samples),
        "MiniLM-L6": lambda: written(common.minilm(), data, given.samples),
    }
    file = common.RESULTS / "unseen.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows, gates = kept.get("rows", []), kept.get("gates", [])
    for name, make in makers.items():
        if name not in (given.only or makers):
            continue
        task = make()
        if given.part != "gate":
            rows = [r for r in rows if r["model"] != name] + measured(name, task, given.draws)
        if given.part != "errors":
            gates = [r for r in gates if r["model"] != name] + [gated(name, task)]
            print(gates[-1])
        print(
            common.write("unseen", {"name": "unseen", "bits": BITS, "rows": rows, "gates": gates})
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
