"""Lexical fusions: trained, compiled to int8 for two runtimes, and measured by the task's own score.

    python examples/lexical_fusion/run.py [--smoke | --fast | --full] [--json FILE] [--seed N] [--state DIR]

`--smoke` and `--fast` make up their paragraphs, a dictionary and a tiny encoder (`made.py`): they show that all of it
runs, and what it takes. `--full` trains the arms of `arms.py` on `$EFFC_DATA/lexfusion` over the encoder that
`encoder.py` writes, with several seeds each, and measures int8 engines of the first; what is finished stays in the
folder of `--state`, and a run that was stopped goes on there. Models are chosen on a part of train whose words are not
in the rest, and the file for validation is only measured.

`metrics` are micro F1 of pairs of a fusion word and a separation word; what else is written stands in
`examples/task_runs.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import task_runs  # noqa: E402  the folder above has what examples of tasks share

TINY = ["source.options={dictionary: hownet.txt, vectors: sememe_vector.txt, sememe_size: 16, heads: 2, size: 16,"
        " inner: 32}", "passes.0.dropout=0.05", "passes.0.lr=0.005", "calib.samples=16"]  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "smoke": {"train": 360, "valid": 16, "hidden": 32, "budget_s": 0.2, "set": [
        *TINY, "gate=false", "bench={shapes: [[1, 32]]}", "passes.0.samples=344", "passes.0.held=16",
        "passes.0.steps=400", "passes.0.every=200", "passes.0.lr=0.01"]},
    "fast": {"train": 1200, "valid": 100, "hidden": 128, "budget_s": 3.0, "set": [
        *TINY, "passes.0.samples=1140", "passes.0.held=60", "passes.0.steps=900", "passes.0.every=300"]},
    "full": {"budget_s": 20.0, "set": [
        "passes.0.samples=100000", "passes.0.held=70", "passes.0.steps=1500", "passes.0.every=100"]},
}  # fmt: skip
"""What each changes in the recipe; where more samples are asked for than there are, the last of the file judge."""


def prepared(kind: str, work: Path) -> tuple[Path, Path]:
    """Folder of the paragraphs, and of the encoder."""
    asked = KINDS[kind]
    if kind == "full":
        return task_runs.beside(HERE, "arms").prepared(work)
    made = task_runs.beside(HERE, "made")
    made.write(work / "train.jsonl", asked["train"], 0)
    made.write(work / "valid.jsonl", asked["valid"], 1, "valid")
    made.dictionary(work)
    return work, made.encoder(work / "encoder", asked["hidden"])


def more(kind: str, data: Path, encoder: Path, work: Path) -> dict[str, Any]:
    """The arms, where the published data are there for them."""
    if kind != "full":
        return {}
    arms = task_runs.beside(HERE, "arms")
    found: dict[str, Any] = arms.measured(data, encoder, work, KINDS[kind]["set"])
    return found


EXAMPLE = task_runs.Example(
    task="lexical-fusion", score="F1 of pairs", folder=HERE, kinds=KINDS, prepared=prepared,
    valid="valid.jsonl", more=more,
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(task_runs.main(EXAMPLE, "Lexical fusions, in int8."))
