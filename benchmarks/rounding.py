"""What ways to round weights cost a language model: perplexity on ort, by rounding, zero points and draw of the data.

python benchmarks/rounding.py          # two minutes on a quiet machine; writes benchmarks/results/rounding.json

The model is stories260K, calibrated on the first half of a text. It is measured on the other half, and on the
TinyStories validation sample, which is short. The interval of a way is that of the mean over its draws: losses of the
draws are averaged block by block, so a draw counts as the same text seen again and not as more of it.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np

from effc import measure, metrics, recipe
from effc.build import Builder
from effc.cache import Cache
from effc.compiler import trace_source
from effc.metrics import Perplexity, Samples
from effc.progress import Progress
from effc.samples import Samples as Batches
from effc.source import load

DRAWS, SAMPLES, THREADS = (0, 1, 2), 128, 1
FOUR = {"pass": "quantize", "bits": 4, "activation_bits": 16, "group": 32, "weight_range": "mse"}
AWQ = {"pass": "awq", "bits": 4, "group": 32}


def arms() -> dict[str, list[Any]]:
    """Passes by name of an arm."""
    found: dict[str, list[Any]] = {}
    for name, zero in (("symmetric", {}), ("zero points", {"weight_symmetric": False})):
        nearest, gptq = {**FOUR, **zero}, {**FOUR, **zero, "rounding": "gptq"}
        found |= {
            f"4 bit {name}, nearest": [nearest],
            f"4 bit {name}, awq": [{**AWQ, **zero}, nearest],
            f"4 bit {name}, gptq": [gptq],
            f"4 bit {name}, awq and gptq": [{**AWQ, **zero}, gptq],
        }
    return found | {
        "8 bit, nearest": [{"pass": "quantize", "bits": 8, "activation_bits": 16, "group": 32}],
        "cache of keys and values in 8 bit": ["quantize-cache"],
        "int8 with activations, nearest": ["smooth", "quantize"],
        "int8 with activations, gptq": ["smooth", {"pass": "quantize", "rounding": "gptq"}],
    }


def main() -> int:
    data = common.data_root()
    if data is None:
        raise SystemExit("skipped: there are no data sets; set EFFC_DATA")
    model, rows = data / "stories260k-llama", []
    with tempfile.TemporaryDirectory(prefix="effc-rounding-") as folder:
        calib, rest = halves(data / "tinystories" / "train_head.txt", Path(folder))
        source = load({"transformers": str(model)})
        original = trace_source(source)
        texts = {
            "other half": Perplexity(file=rest),
            "validation": Perplexity(file=data / "tinystories" / "valid_sample.txt"),
        }
        plain = {
            name: measure.of_model(source, original.only(), metric, THREADS)
            for name, metric in texts.items()
        }
        nearest: dict[str, Samples] = {}
        for arm, passes in arms().items():
            seen: dict[str, list[Samples]] = {name: [] for name in texts}
            first = recipe_of(model, calib, passes, 0)
            draws = DRAWS if any(pass_.measures for pass_ in first.passes) else DRAWS[:1]
            for draw in draws:
                asked = recipe_of(model, calib, passes, draw)
                builder = Builder(
                    recipe=asked, source=source, samples=Batches(source, asked.calib),
                    original=original, progress=Progress(), cache=Cache(None),
                )  # fmt: skip
                place = Path(folder) / f"{len(rows)}-{draw}"
                lowered = builder.build("ort", place).first
                for name, metric in texts.items():
                    seen[name].append(measure.of_engine(source, lowered, metric, THREADS))
            for name, metric in texts.items():
                mean = averaged(seen[name])
                if arm.endswith("nearest"):
                    nearest[name] = mean
                row = {
                    "arm": arm, "text": name, "draws": len(draws),
                    "by_draw": [round(metric.value(s), 4) for s in seen[name]],
                    "model": told(metric, plain[name], mean),
                }  # fmt: skip
                if arm.endswith(("awq", "gptq")):
                    row["nearest"] = told(metric, nearest[name], mean)
                rows.append(row)
                print(row, flush=True)
    print(common.write("rounding", {"name": "rounding", "samples": SAMPLES, "rows": rows}))
    four = [r for r in rows if r["arm"].startswith("4 bit") and r["text"] == "other half"]
    eight = [r for r in rows if not r["arm"].startswith("4 bit")]
    return int(
        any(r["nearest"]["high"] >= 0 for r in four if "nearest" in r)
        or any(r["model"]["drop"] > 0.01 for r in eight)
    )


def recipe_of(model: Path, calib: Path, passes: Sequence[Any], draw: int) -> recipe.Recipe:
    return recipe.build({
        "source": {"transformers": str(model)},
        "calib": {"file": str(calib), "samples": SAMPLES, "seed": draw},
        "passes": list(passes),
    })  # fmt: skip


def halves(text: Path, folder: Path) -> tuple[Path, Path]:
    """A text cut in two between lines."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    found = folder / "first.txt", folder / "second.txt"
    for file, part in zip(found, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        file.write_text("".join(part), encoding="utf-8")
    return found


def averaged(draws: Sequence[Samples]) -> Samples:
    """The mean loss of every block over the draws."""
    losses = np.mean([s.columns["loss"] for s in draws], axis=0)
    return Samples({"loss": losses, "tokens": draws[0].columns["tokens"]})


def told(metric: Perplexity, reference: Samples, engine: Samples) -> dict[str, Any]:
    found = dataclasses.asdict(metrics.compare(metric, reference, engine))
    wanted = ("name", "reference", "engine", "low", "high", "drop", "drop_low", "drop_high", "n")
    return {name: found[name] for name in (*wanted, "verdict")}


if __name__ == "__main__":
    sys.exit(main())
