"""Quadruples from dialogues: trained, compiled to int8 for two runtimes, and measured by the task's own score.

    python examples/diaasq/run.py [--smoke | --fast | --full] [--json FILE] [--seed N] [--work DIR]

`--smoke` and `--fast` make up their dialogues and a tiny encoder (`made.py`): they show that all of it runs, and what
it takes. `--full` trains on `$EFFC_DATA/diaasq/zh` over the encoder that `encoder.py` writes, for hours; a run that was
stopped goes on with the same `--work`. Its model is chosen on a part of train, and `valid.json` is only measured.

`metrics` are micro F1 of whole quadruples by the float model in torch and by the int8 engines, each with the paired
interval of its difference. `decoded_equal` says whether torch and the float engines find the same in every dialogue.
`speedup` is int8 against the plain float export, both on ONNX Runtime, over dialogues at five lengths of the measured
file, every length weighted by its time; its ends take those of all lengths at once, which is wider than need be.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import task_runs  # noqa: E402  the folder above has what examples of tasks share

TINY = ["source.options={inner: 16}", "passes.0.precision=f32", "passes.0.dropout=0.05",
        'passes.0.rates={"encoder.*": 0.5}', "passes.0.lr=0.01", "passes.0.batch=8", "calib.samples=16"]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "smoke": {"train": 64, "valid": 12, "hidden": 32, "budget_s": 0.2, "set": [
        *TINY, "gate=false", "passes.0.batch=4", "passes.0.samples=56", "passes.0.held=8",
        "passes.0.steps=40", "passes.0.every=20"]},
    "fast": {"train": 400, "valid": 100, "hidden": 128, "budget_s": 4.0, "set": [
        *TINY, "passes.0.samples=360", "passes.0.held=40", "passes.0.steps=400", "passes.0.every=100"]},
    "full": {"budget_s": 20.0, "set": []},
}  # fmt: skip


def prepared(kind: str, work: Path) -> tuple[Path, Path]:
    """Folder of the dialogues, and of the encoder."""
    asked = KINDS[kind]
    if kind != "full":
        made = task_runs.beside(HERE, "made")
        made.write(work / "train.json", asked["train"], 0)
        made.write(work / "valid.json", asked["valid"], 1)
        return work, made.encoder(work / "encoder", asked["hidden"])
    root = task_runs.data_root(HERE)
    if root is None or not (root / "diaasq" / "zh").is_dir():
        raise SystemExit("there is no diaasq/zh in $EFFC_DATA")
    place = work / "encoder"
    if not place.is_dir():
        task_runs.beside(HERE, "encoder").write(place, root / "encoders")
    return root / "diaasq" / "zh", place


EXAMPLE = task_runs.Example(
    task="diaasq", score="micro F1", folder=HERE, kinds=KINDS, prepared=prepared, valid="valid.json"
)

if __name__ == "__main__":
    raise SystemExit(task_runs.main(EXAMPLE, "Quadruples from dialogues, in int8."))
