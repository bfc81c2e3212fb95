"""`effc run --task`: what the engine of a task's package says of every sample of a file.

The package has all that it takes beside the engine: tokenizer, settings and words of the tags. No torch is needed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import bounded, package
from effc.engine import Engine
from effc.errors import PackageError, UsageError
from effc.progress import Progress
from effc.table import unknown
from effc.task import Array, Task, opened
from effc.tasks import TASKS

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Samples with what was found in each, and what of that is right where the file says so of all of them."""

    task: Task
    items: list[Any]
    answers: list[Json]
    columns: dict[str, Array] | None
    seconds: float

    def lines(self, *, in_colour: bool) -> list[str]:
        """For a terminal."""
        return [
            line
            for item, answer in zip(self.items, self.answers, strict=True)
            for line in self.task.lines(item, answer, in_colour=in_colour)
        ]

    def page(self) -> str:
        """For a browser: one page that loads nothing."""
        return self.task.page(self.items, self.answers)

    def to_json(self) -> Json:
        return {
            "task": self.task.word, "answers": self.answers,
            "scores": self.task.scores(self.columns) if self.columns is not None else None,
            "seconds": round(self.seconds, 3),
        }  # fmt: skip

    def line(self) -> str:
        """What it took, in one line, and how good it is where that is known."""
        words = f"{len(self.items)} samples in {self.seconds:.1f} s"
        if self.columns is not None:
            words += f"; F1 {self.task.value(self.columns):.4f}"
            for part in self.task.parts:
                words += f", {part} {self.task.value(self.columns, part):.4f}"
        return words


def solve(
    out: Path,
    file: Path,
    word: str,
    *,
    target: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Solved:
    """Raises UsageError for a package of another kind, CalibrationError for a file that is none of the task's."""
    progress = progress or Progress()
    if word not in TASKS:
        raise UsageError(unknown("task", word, TASKS), hint=f"--task {next(iter(TASKS))}")
    manifest = package.read(out)
    if manifest.kind != f"task:{word}":
        raise UsageError(
            f"{out} holds a model of kind {manifest.kind}, which does not do the task {word}",
            hint=f"compile a checkpoint of {word}: effc compile CKPT -o OUT",
        )
    config = bounded.read_json(out / "config.json", PackageError)
    if not isinstance(config, dict):
        raise PackageError(f"{out / 'config.json'} holds no settings", hint=package.UNHARMED)
    task = opened(out, config)
    items = task.read(file, labelled=False)
    started = time.perf_counter()
    said = []
    with (
        Engine.open(out, target, threads=threads) as engine,
        progress.stage("run") as step,
    ):
        for number, item in enumerate(items, 1):
            said.append(task.said(engine, item))
            step(number, len(items))
    is_known = all(task.is_labelled(item) for item in items)
    return Solved(
        task=task, items=items, seconds=time.perf_counter() - started,
        answers=[task.answer(item, each) for item, each in zip(items, said, strict=True)],
        columns=task.tally(items, said) if is_known else None,
    )  # fmt: skip
