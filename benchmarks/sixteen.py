"""What 16 bit costs, in three models: drift of every output, the task's metric, and which operators must stay in 32.

    python benchmarks/sixteen.py            # about ten minutes; writes benchmarks/results/sixteen.json

The graph that a TensorRT engine is built from runs on ONNX Runtime, every value rounded where it has a cast. `arms` has
one kind of operator at a time in 16 bit too which the pass leaves in 32; what it computes is rounded, what it sums
inside is not, so an arm shows the least that this would cost.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

from effc import compiler, recipe
from effc.errors import EffcError
from effc.passes import mixed_precision
from effc.passes.mixed_precision import FOLLOWERS

DTYPES = ("fp16", "bf16")
ARMS = {
    "as the pass has it": (),
    "norms": ("layer_norm", "rms_norm", "group_norm", "batch_norm"),
    "softmax": ("softmax", "_softmax", "log_softmax"),
    "powers and exponents": ("pow", "rsqrt", "sqrt", "exp", "reciprocal", "div"),
    "sums": ("mean", "sum", "var", "cumsum"),
    "sines": ("sin", "cos"),
}  # fmt: skip
"""Operators that are in 16 bit as well."""


def models() -> dict[str, dict[str, Any]]:
    """What a recipe says of each model."""
    data = common.data_root()
    if data is None:
        raise SystemExit("there are no data sets; set EFFC_DATA")
    images, stories = str(data / "fashion-mnist"), data / "tinystories"
    return {
        "MiniLM-L6": {
            "source": {"transformers": str(common.minilm())},
            "calib": {"file": str(common.SENTENCES)},
            "metric": {"sts": str(data / "stsb" / "stsb-en-test.csv")},
        },
        "ViT on Fashion-MNIST": {
            "source": {"transformers": str(data / "vit-fashion-mnist")},
            "calib": {"file": images},
            "metric": {"accuracy": images},
        },
        "Llama stories260K": {
            "source": {"transformers": str(data / "stories260k-llama")},
            "calib": {"file": str(stories / "train_head.txt")},
            "metric": {"perplexity": str(stories / "valid_sample.txt")},
        },
    }


def measured(
    content: dict[str, Any], dtype: str, extra: tuple[str, ...], folder: Path
) -> dict[str, Any]:
    """One compile; the metric only where nothing but the pass's own list is in 16 bit."""
    whole = {
        **content, "passes": [{"pass": "mixed-precision", "dtype": dtype, "check_range": dtype == "fp16"}],
        "targets": ["tensorrt"], "gate": False, "bench": False,
    }  # fmt: skip
    if extra:
        del whole["metric"]
    mixed_precision.FOLLOWERS = FOLLOWERS | set(extra)
    try:
        found = compiler.run(recipe.build(whole), folder / "out").report
    finally:
        mixed_precision.FOLLOWERS = FOLLOWERS
    drifts = found["verify"]["tensorrt"]["held out"]
    (step,) = (p for p in found["passes"] if p["name"] == "mixed-precision")
    return {
        "sites": step["sites"],
        "outputs": {
            name: {k: d[k] for k in ("rel_l2", "max_abs", "n")} for name, d in drifts.items()
        },
        "metric": found["metric"],
    }


def main() -> int:
    os.environ["EFFC_CACHE"] = "off"  # which knows nothing of arms
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="effc-sixteen-") as folder:
        for model, content in models().items():
            for dtype in DTYPES:
                own: dict[str, Any] = {}
                for arm, extra in ARMS.items():
                    row: dict[str, Any] = {"model": model, "dtype": dtype, "arm": arm}
                    try:
                        row |= measured(content, dtype, extra, Path(folder))
                    except (
                        EffcError
                    ) as error:  # an arm may give what is no number, or have no kernel
                        row["failed"] = " ".join(error.what.split())[:200]
                    own = own or row
                    if row is not own and row.get("sites") == own.get("sites"):
                        continue  # the model has no such operator
                    rows.append(row)
                    print(json.dumps(row), flush=True)
    print(common.write("sixteen", {"name": "sixteen", "rows": rows}))
    shipped = [row for row in rows if row["arm"] == next(iter(ARMS))]
    return int(any("failed" in r or r["metric"]["verdict"] == "worse" for r in shipped))


if __name__ == "__main__":
    sys.exit(main())
