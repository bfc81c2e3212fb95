"""Naive int8 against gated int8: the same recipe with the gate off and on, on real and on random models.

    python benchmarks/gate.py [--only NAME]     # an hour; writes benchmarks/results/gate-FEATURES.json row by row

Wherever the naive engine is slower than its reference or loses more than it may, the gated one must not. Both are
judged anew by `effc bench`: timed again, and measured on samples that no gate has seen, since what was searched on a
sample looks better there than it is. Random models have no task: they are judged by how often their largest output is
that of the float model.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import randomnets
import torch

from effc import gate
from effc.recipe import GateSpec

HERE = Path(__file__).resolve()
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model with its calibration data, the metric of its gate, and that metric on other samples to judge by."""

    source: Json
    calib: Json
    metric: Json
    judged: Json
    shapes: tuple[tuple[int, int], ...] = ((1, 16), (1, 128), (8, 128))
    quantize: Json | None = None


def data() -> Path:
    found = common.data_root()
    if found is None:
        raise SystemExit("skipped: there are no data sets; set EFFC_DATA")
    return found


def minilm(place: Path) -> Task:
    return Task(
        source={"transformers": str(common.minilm())},
        calib={"file": str(common.SENTENCES)},
        metric={"sts": str(data() / "stsb" / "stsb-en-dev.csv")},
        judged={"sts": str(data() / "stsb" / "stsb-en-test.csv")},
    )


def vit(place: Path) -> Task:
    even, odd = idx_halves(data() / "fashion-mnist", place)
    return Task(
        source={"transformers": str(data() / "vit-fashion-mnist")},
        calib={"file": str(even)},
        metric={"accuracy": str(even)},
        judged={"accuracy": str(odd)},
    )


def idx_halves(given: Path, place: Path) -> list[Path]:
    """Every other picture of a folder of idx files, and the others."""
    made = [place / "even", place / "odd"]
    for half, folder in enumerate(made):
        folder.mkdir()
        for file in given.glob("*-ubyte.gz"):
            with gzip.open(file) as stream:
                content = stream.read()
            dimensions = content[3]
            sizes = np.frombuffer(content, ">u4", dimensions, 4)
            values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
            chosen = values[half::2]
            head = content[:4] + np.array(chosen.shape, ">u4").tobytes()
            with gzip.open(folder / file.name, "wb", compresslevel=1) as stream:
                stream.write(head + chosen.tobytes())
    return made


def vit_4bit(place: Path) -> Task:
    made = vit(place)
    return Task(
        source=made.source, calib=made.calib, metric=made.metric, judged=made.judged,
        quantize={"pass": "quantize", "bits": 4, "activation_bits": 4, "weight_range": "mse"},
    )  # fmt: skip


def stories(place: Path) -> Task:
    text = (data() / "tinystories" / "train_head.txt").read_text(encoding="utf-8")
    cut = text.index("\n", 3 * len(text) // 4)
    (place / "calib.txt").write_text(text[:cut], encoding="utf-8")
    (place / "gate.txt").write_text(text[cut:], encoding="utf-8")
    return Task(
        source={"transformers": str(data() / "stories260k-llama")},
        calib={"file": str(place / "calib.txt")},
        metric={"perplexity": str(place / "gate.txt")},
        judged={"perplexity": str(data() / "tinystories" / "valid_sample.txt")},
    )


def convnet(place: Path) -> Task:
    import convnet as made

    if not made.WEIGHTS.exists():
        made.train()
    calib, even, odd = made.write_arrays(place)
    return Task(
        source={"python": f"{HERE.with_name('convnet.py')}:net"},
        calib={"file": str(calib)},
        metric={"accuracy": str(even)},
        judged={"accuracy": str(odd)},
        shapes=((1, 1), (8, 1), (32, 1)),
    )


def random(name: str) -> Callable[[Path], Task]:
    """A random model, labelled by its own float answers."""

    def make(place: Path) -> Task:
        source = getattr(randomnets, name)()
        for word, seed in (("gate", 3), ("judge", 5)):
            pixels = randomnets.pixels(2000, seed)
            with torch.no_grad():
                found = [
                    source.module(torch.from_numpy(p)).logits.argmax(-1)
                    for p in np.split(pixels, 40)
                ]
            np.savez(place / f"{word}.npz", pixel_values=pixels, label=torch.cat(found).numpy())
        np.savez(place / "calib.npz", pixel_values=randomnets.pixels(256, 4))
        return Task(
            source={"python": f"{randomnets.__file__}:{name}"},
            calib={"file": str(place / "calib.npz")},
            metric={"accuracy": str(place / "gate.npz")},
            judged={"accuracy": str(place / "judge.npz")},
            shapes=((1, 1), (8, 1)),
        )

    return make


MODELS: dict[str, Callable[[Path], Task]] = {
    "MiniLM-L6, int8": minilm,
    "ViT on Fashion-MNIST, int8": vit,
    "ViT on Fashion-MNIST, 4 bit": vit_4bit,
    "separable conv net, int8": convnet,
    "stories260K Llama, int8": stories,
    "ResNet-18, random, int8": random("resnet"),
    "MobileNetV2, random, int8": random("mobilenet"),
}


def row(name: str, make: Callable[[Path], Task]) -> Json:
    with tempfile.TemporaryDirectory(prefix="effc-gate-") as folder:
        place = Path(folder)
        task = make(place)
        recipe: Json = {
            "source": task.source,
            "calib": task.calib,
            "metric": task.metric,
            "passes": [task.quantize or {"pass": "quantize"}],
            "bench": {"shapes": [list(s) for s in task.shapes], "threads": 2},
        }
        found: Json = {"name": name, "circumstances": common.circumstances()}
        for word, spec in (("naive", False), ("gated", {"latency": "not-slower", "metric": {}})):
            (place / f"{word}.yaml").write_text(json.dumps({**recipe, "gate": spec}))
            report = place / f"{word}.json"
            words = ["compile", place / f"{word}.yaml", "-o", place / word, "--json", report]
            seconds, _ = common.run_cli(*words)
            compiled = json.loads(report.read_text())
            judged = _judge(place, word, task)
            found[word] = {
                "compile_s": round(seconds, 1),
                "gate": {
                    k: compiled["gate"][k] for k in ("verdict", "rolled_back", "tried", "seconds")
                },
                "bytes": compiled["model_bytes"],
                **judged,
            }
        return found


def _judge(place: Path, word: str, task: Task) -> Json:
    """Speed and metric of a package, measured anew."""
    file = place / f"{word}-bench.json"
    shapes = ",".join(f"{b}x{n}" for b, n in task.shapes)
    ((metric, path),) = task.judged.items()
    words = ["bench", place / word, "--shapes", shapes, "--threads", "2", "--json", file]
    model = task.source.get("transformers") or task.source["python"]
    common.run_cli(
        *words, "--model", model, "--metric", f"{metric}:{path}", "--calib", task.calib["file"]
    )
    found = json.loads(file.read_text())
    checks = gate.checks(
        GateSpec(), bench=found, metric=found["metric"], sizes=None, asked=()
    )  # fmt: skip
    return {
        "shapes": [
            {
                k: s[k]
                for k in ("batch", "length", "engine_ms", "reference", "ratio", "low", "high", "n")
            }
            for s in found["shapes"]
        ],
        "metric": found["metric"],
        "failed": [check.text for check in gate.fails(GateSpec(), checks)],
        "beyond": [check.text for check in checks if check.is_beyond],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=sorted(MODELS))
    only = parser.parse_args().only
    file = common.RESULTS / f"gate-{common.features()}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for name, make in MODELS.items():
        if only in (None, name) and (only or name not in [r["name"] for r in rows]):
            rows = [r for r in rows if r["name"] != name] + [row(name, make)]
            rows.sort(key=lambda r: list(MODELS).index(r["name"]))
            print(common.write(file.stem, {"name": "gate", "rows": rows}))
    missed = [r["name"] for r in rows if r["gated"]["failed"]]
    for r in rows:
        for word in ("naive", "gated"):
            print(f"{r['name']}, {word}:", "; ".join(r[word]["beyond"]) or "within its bounds")
    for name in missed:
        print(f"MISSED: {name}")
    return 1 if missed or len(rows) < len(MODELS) else 0


if __name__ == "__main__":
    sys.exit(main())
