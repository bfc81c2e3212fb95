"""Trains tensors by AdamW along a cosine, and can be killed at any step: what it has lies in files, none of them code.

    lr(step) = peak · min(step / warm-up, (1 + cos(π · (step − warm-up) / (steps − warm-up))) / 2)

Every so many steps the loss on held-out batches is taken, and a score where there is one; the tensors that had least
loss, or the highest score, are what comes out: they are never worse there than those that went in. Which batch a step
sees, and its random numbers, hang on seed and step alone, so that a run that goes on after a break is the run that had
none.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effc import many
from effc.errors import TuneError
from effc.train.terms import Course, Own

log = logging.getLogger(__name__)

SAVE_S = 30.0
"""Seconds between two saves."""
STATE, TENSORS = "state.json", "tensors-{}.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW knows of a parameter once it had a gradient."""
Precision = Literal["f32", "bf16"]
Batch = Any
Loss = Callable[[Any, Batch], Tensor]
Score = Callable[[Any], float]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast. `warmup` is a share of the steps; `clip` bounds the norm of a step's gradient."""

    steps: int
    lr: float
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    check_every: int = 50
    patience: int | None = None
    """After so many points without a better one training ends."""

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - warm)
        return self.lr * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, kw_only=True)
class Point:
    """Losses after so many steps: the mean since the last point, None before the first, and of held-out batches.

    `soft` is that of held-out batches in the graph as it is trained, where a term has them judge another one; `told` is
    what terms tell of themselves, by number of the term. What comes out is of a point that `counts`.
    """

    step: int
    loss: float | None
    held: float | None
    seconds: float
    soft: float | None = None
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    counts: bool = True
    score: float | None = None
    """Of held-out samples by the task's own measure, which then judges in the place of the loss."""

    @property
    def cost(self) -> tuple[float, float] | None:
        """The less the better, the loss between equal scores; None where nothing judges."""
        return None if self.held is None else (-(self.score or 0.0), self.held)


class Graphlike(Protocol):
    """A module whose parameters have the names of a graph's tensors, and which takes other tensors in their place."""

    instead: dict[str, Tensor]

    def live(self) -> dict[str, Tensor]: ...


@dataclass
class Run:
    """Where a training is."""

    step: int = 0
    points: list[Point] = field(default_factory=list)
    best: int = 0
    """The step whose tensors were the best on held-out batches."""
    losses: list[float] = field(default_factory=list)
    """Since the last point."""
    seconds: float = 0.0

    def is_over(self, schedule: Schedule) -> bool:
        """Whether all steps are done, or none was better for as long as there is patience."""
        since = sum(point.step > self.best for point in self.points if point.counts)
        gave_up = schedule.patience is not None and since >= schedule.patience
        return self.step >= schedule.steps or gave_up


def fit(
    module: nn.Module,
    loss: Loss,
    batch: Callable[[int], Batch],
    schedule: Schedule,
    *,
    held: Sequence[Batch] = (),
    folder: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    courses: Sequence[Course] = (),
    precision: Precision = "f32",
    score: Score | None = None,
    shares: Sequence[float] = (),
    accumulate: int = 1,
) -> Run:
    """Train the parameters of a module in place; `batch` gives them by number, `accumulate` for each step.

    With `courses` the module is a `Graphlike`, and has at the end what they leave to stand in it. `folder` keeps the
    state, and a run that finds one there goes on from it. Products are taken in `precision`; parameters, their moments
    and the loss are in float32. `score` of the module judges in the place of the held-out loss, the higher the better.
    `shares` of the schedule's rate are those that parameters have, 1 where there are none. The loss of a step is the
    mean over its batches, of which one at a time is in memory, and each of several processes has its share. Raises
    TuneError where a loss is no number, with the step.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise TuneError("training needs accelerate", hint="pip install 'effc[train]'") from error
    accelerator = Accelerator(cpu=True)  # the graph, its teacher and its samples are there
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise TuneError("there is nothing to train", hint="`tensors` matches none of the graph's")
    if accumulate % many.count():
        raise TuneError(
            f"{many.count()} processes cannot share the {accumulate} batches of a step",
            hint=f"accumulate: {many.count()}, or a multiple of it",
        )
    terms = _Terms(module, courses)
    marks = {schedule.steps, *(step for course in courses for step in course.marks())}
    groups = _groups(parameters, terms, schedule, shares or [1.0] * len(parameters))
    optimizer = torch.optim.AdamW([group.options() for group in groups], lr=schedule.lr)
    optimizer = accelerator.prepare(optimizer)
    asked = _in_bfloat16(module) if precision == "bf16" else module
    run, best = _resumed(folder, parameters, optimizer, schedule)
    saved = started = time.monotonic()
    before = run.seconds
    if not run.points:
        _check(run, asked, loss, held, parameters, best, terms, score)
    while not run.is_over(schedule):
        torch.manual_seed(schedule.seed * 1_000_003 + run.step * accumulate)
        for place, group in zip(optimizer.param_groups, groups, strict=True):
            place["lr"] = group.rate(run.step)
        terms.stand(run.step)
        optimizer.zero_grad()
        total = torch.zeros(1)
        first = run.step * accumulate
        for number in range(first + many.rank(), first + accumulate, many.count()):
            if number != first:
                torch.manual_seed(schedule.seed * 1_000_003 + number)
            value = (loss(asked, batch(number)) + terms.loss(run.step)) / accumulate
            if bool(torch.isfinite(value)):
                accelerator.backward(value)
            total += float(value.detach())
        many.sum_up([total])
        if not bool(torch.isfinite(total)):
            raise TuneError(
                f"the loss is {float(total)} at step {run.step}",
                hint=f"a lower learning rate may help; it is {schedule.lr:g}",
            )
        many.sum_up([_slope(parameter) for parameter in parameters])
        for group in groups:
            accelerator.clip_grad_norm_(group.parameters, schedule.clip)
        optimizer.step()
        run.losses.append(float(total))
        run.step += 1
        run.seconds = before + time.monotonic() - started
        if run.step % schedule.check_every == 0 or run.step in marks:
            _check(run, asked, loss, held, parameters, best, terms, score)
        progress(run.step, schedule.steps)
        is_due = time.monotonic() - saved > SAVE_S and run.step < schedule.steps
        if folder is not None and many.rank() == 0 and is_due:
            try:
                _save(folder, run, parameters, best, optimizer, schedule)
            except (OSError, SafetensorError) as error:
                log.warning("the state of the training is not kept: %s", error)
            saved = time.monotonic()
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    terms.stand(run.best if held else run.step)
    return run


def _slope(parameter: Tensor) -> Tensor:
    """The gradient of a parameter, of zeros where nothing here hung on it."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _in_bfloat16(module: nn.Module) -> Callable[[Any], dict[str, Tensor]]:
    """The module with products of bfloat16, whose outputs are of float32 again (Micikevicius et al., ICLR 2018)."""

    def run(feeds: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):  # accelerate's own is one for a whole process
            outputs: dict[str, Tensor] = module(feeds)
        return {
            name: value.float() if value.dtype == torch.bfloat16 else value
            for name, value in outputs.items()
        }

    return run


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Parameters that go together: one rate, and one norm of their gradients."""

    parameters: list[Tensor]
    rate: Callable[[int], float]
    weight_decay: float

    def options(self) -> dict[str, Any]:
        return {"params": self.parameters, "weight_decay": self.weight_decay}


def _groups(
    parameters: Sequence[Tensor], terms: _Terms, schedule: Schedule, shares: Sequence[float]
) -> list[_Group]:
    owned = terms.owned()
    rest: dict[float, list[Tensor]] = {}
    for parameter, share in zip(parameters, shares, strict=True):
        if all(parameter is not mine for mine, _ in owned):
            rest.setdefault(share, []).append(parameter)
    found = [
        _Group(parameters=[p], rate=own.rate, weight_decay=own.weight_decay) for p, own in owned
    ]
    first = [
        _Group(parameters=mine, rate=_part(schedule, share), weight_decay=schedule.weight_decay)
        for share, mine in rest.items()
    ]
    return [*first, *found]


def _part(schedule: Schedule, share: float) -> Callable[[int], float]:
    return lambda step: share * schedule.rate(step)


class _Terms:
    """Courses beside the module that they are about; nothing where there are none."""

    def __init__(self, module: Any, courses: Sequence[Course]) -> None:
        self.module: Graphlike = module
        self.courses = courses

    def owned(self) -> list[tuple[Tensor, Own]]:
        live = self.module.live() if self.courses else {}
        return [
            (live[name], own)
            for course in self.courses for name, own in course.owns().items() if name in live
        ]  # fmt: skip

    def stand(self, step: int, *, judged: bool = False) -> bool:
        """Put in place what is trained in a step, or what is judged then; gives whether that is something else."""
        differs = False
        if self.courses:
            live = self.module.live()
            instead: dict[str, Tensor] = {}
            for course in self.courses:
                instead |= course.stands(step, live)
                other = course.judged(step, live) if judged else {}
                instead |= other
                differs |= bool(other)
            self.module.instead = instead
        return differs

    def loss(self, step: int) -> Tensor | float:
        live = self.module.live() if self.courses else {}
        found = [x for course in self.courses for x in course.losses(step, live).values()]
        return torch.stack(found).sum() if found else 0.0

    def is_ready(self, step: int) -> bool:
        return all(course.is_ready(step) for course in self.courses)

    def told(self, step: int) -> dict[str, dict[str, Any]]:
        live = self.module.live() if self.courses else {}
        return {course.word: course.told(step, live) for course in self.courses}


def _check(
    run: Run,
    module: Any,
    loss: Loss,
    held: Sequence[Batch],
    parameters: Sequence[Tensor],
    best: list[Tensor],
    terms: _Terms,
    score: Score | None,
) -> None:
    """A point of the curve; the tensors are kept where none before was better."""

    def mean_loss() -> float | None:
        values = [float(loss(module, batch)) for batch in held]
        return sum(values) / len(values) if values else None

    with torch.no_grad():
        differs = terms.stand(run.step, judged=True)
        now, soft = mean_loss(), None
        scored = score(module) if score is not None else None
        if differs:
            terms.stand(run.step)
            soft = mean_loss()
        told = terms.told(run.step)
    if now is not None and not math.isfinite(now):
        raise TuneError(
            f"the loss of held-out samples is {now} at step {run.step}",
            hint="a lower learning rate may help, or `held: 0`, where they are at fault",
        )
    before = [p.cost for p in run.points if p.cost is not None and p.counts]
    counts = terms.is_ready(run.step)
    mean = sum(run.losses) / len(run.losses) if run.losses else None
    seconds = round(run.seconds, 3)
    run.points.append(
        Point(
            step=run.step, loss=mean, held=now, seconds=seconds, soft=soft, told=told,
            counts=counts, score=scored,
        )
    )  # fmt: skip
    run.losses = []
    cost = run.points[-1].cost
    if cost is None or not before or cost < min(before):
        run.best = run.step
        best[:] = [p.detach().clone() for p in parameters]


def _resumed(
    folder: Path | None, parameters: Sequence[Tensor], optimizer: Any, schedule: Schedule
) -> tuple[Run, list[Tensor]]:
    """A run as it was left, its tensors and moments put in place; a new one where there is none, or none whole."""
    best = [p.detach().clone() for p in parameters]
    if folder is None or not (folder / STATE).exists():
        return Run(), best
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["schedule"] != dataclasses.asdict(schedule):
            return Run(), best
        held = load_file(folder / state["tensors"])
        points = [Point(**point) for point in state["points"]]
        values = [held[f"{i}"] for i in range(len(parameters))]
        kept = [held[f"{i}.best"] for i in range(len(parameters))]
        moments = [{m: held.get(f"{i}.{m}") for m in MOMENTS} for i in range(len(parameters))]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return Run(), best
    with torch.no_grad():
        for parameter, value, found in zip(parameters, values, moments, strict=True):
            parameter.copy_(value)
            if all(moment is not None for moment in found.values()):
                optimizer.state[parameter] = found
    run = Run(
        step=state["step"], points=points, best=state["best"], losses=state["losses"], seconds=state["seconds"]
    )  # fmt: skip
    return run, kept


def _save(
    folder: Path,
    run: Run,
    parameters: Sequence[Tensor],
    best: Sequence[Tensor],
    optimizer: Any,
    schedule: Schedule,
) -> None:
    """Tensors first, then the state that names them, each by one rename; what was before them goes last."""
    folder.mkdir(parents=True, exist_ok=True)
    name = TENSORS.format(run.step)
    found: dict[str, Tensor] = {}
    for i, (parameter, kept) in enumerate(zip(parameters, best, strict=True)):
        found |= {f"{i}": parameter.detach(), f"{i}.best": kept}
        found |= {f"{i}.{m}": moment for m, moment in optimizer.state[parameter].items()}
    save_file({n: t.contiguous() for n, t in found.items()}, folder / f"{name}.part")
    os.replace(folder / f"{name}.part", folder / name)
    state: Mapping[str, Any] = {
        **dataclasses.asdict(run), "tensors": name, "schedule": dataclasses.asdict(schedule),
    }  # fmt: skip
    (folder / f"{STATE}.part").write_text(json.dumps(state), encoding="utf-8")
    os.replace(folder / f"{STATE}.part", folder / STATE)
    for old in folder.glob(TENSORS.format("*")):
        if old.name != name:
            old.unlink(missing_ok=True)
