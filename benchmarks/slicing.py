"""What a residual width is cut by: a vision transformer at 90, 75 and 60 % of its width, without any training after it.

    python benchmarks/slicing.py           # minutes; writes benchmarks/results/slicing.json

Principal directions of what norms give (`pca-rotate`) and of what they read, raw channels by the size of their weights,
and channels drawn by chance, three times. Accuracy of the engine on ort is over all 10 000 pictures, 128 of which were
calibrated on, without their labels. Speed is not asked: all arms of a width have the same operators and sizes.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from effc import measure, metrics, recipe
from effc.build import Builder
from effc.cache import Cache
from effc.compiler import trace_source
from effc.metrics import Accuracy, Samples
from effc.progress import Progress
from effc.samples import Samples as Batches
from effc.source import load

SHARES = (0.9, 0.75, 0.6)
SEEDS = (0, 1, 2)
GROUP, SIZE = "vit.embeddings.patch_embeddings.projection", 128
"""The residual stream, and its channels."""
DIRECTIONS, AS_READ = "principal directions", "principal directions of what norms read"


def arms(share: float) -> dict[str, list[dict[str, Any]]]:
    """By name, the passes behind layernorm-to-rmsnorm."""
    ratio = {"pass": "prune-dims", "ratio": round(1 - share, 4), "groups": GROUP}
    first = {**ratio, "importance": "first"}
    found = {
        DIRECTIONS: [{"pass": "pca-rotate"}, first],
        AS_READ: [{"pass": "pca-rotate", "normed": False}, first],
        "channels by magnitude": [ratio],
    }
    for seed in SEEDS:
        units = sorted(random.Random(seed).sample(range(SIZE), round(SIZE * share)))
        found[f"channels by chance, {seed}"] = [{"pass": "prune-dims", "keep": {GROUP: units}}]
    return found


def main() -> int:
    data = common.data_root()
    if data is None:
        print("skipped: there are no data sets; set EFFC_DATA")
        return 0
    images = data / "fashion-mnist"
    content = {
        "source": {"transformers": str(data / "vit-fashion-mnist")},
        "calib": {"file": str(images), "samples": 128},
    }
    source, metric, rows = load(content["source"]), Accuracy(file=images), []
    original = trace_source(source)
    plain = measure.of_model(source, original.only(), metric, 1)
    with tempfile.TemporaryDirectory(prefix="effc-slicing-") as folder:
        for share in SHARES:
            mine: Samples | None = None
            for arm, passes in arms(share).items():
                asked = recipe.build({**content, "passes": ["layernorm-to-rmsnorm", *passes]})
                builder = Builder(
                    recipe=asked, source=source, samples=Batches(source, asked.calib),
                    original=original, progress=Progress(), cache=Cache(None),
                )  # fmt: skip
                lowered = builder.build("ort", Path(folder) / str(len(rows))).first
                seen = measure.of_engine(source, lowered, metric, 1)
                mine = mine or seen
                row = {
                    "channels": round(SIZE * share),
                    "arm": arm,
                    "model": told(metric, plain, seen),
                }
                rows.append({**row, "directions": told(metric, seen, mine)})
                print(rows[-1], flush=True)
    print(common.write("slicing", {"name": "slicing", "of": SIZE, "rows": rows}))
    raw = [row for row in rows if row["arm"].startswith("channels")]
    return int(any(row["directions"]["low"] <= 0 for row in raw))


def told(metric: Accuracy, reference: Samples, engine: Samples) -> dict[str, Any]:
    found = dataclasses.asdict(metrics.compare(metric, reference, engine))
    wanted = ("name", "reference", "engine", "low", "high", "n", "verdict")
    return {name: found[name] for name in wanted}


if __name__ == "__main__":
    sys.exit(main())
