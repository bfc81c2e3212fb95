"""A small model that learns from a large one what neither has labels for, through adapters: arms of one loss.

    answers     cross-entropy to the teacher's own answer, where it gives that at least the probability `sure`
    logits      T² · KL(teacher ‖ student), where both have one vocabulary
    features    mean (A s − t)² + Σⱼ mean |Dⱼ(A s) − Dⱼ(t)|           for every pair of features s, t
    replay      cross-entropy to labels of the domain that the student comes from, so that it forgets less

A is a linear map from the student's width to the teacher's that is trained beside the adapters and thrown away; Dⱼ are
details of a wavelet along the positions (`wavelet`). This is the adapter-based distillation of CD-CCA (CVPR 2024) as
its released code has it, with answers that are gated and logits beside it. `anchor` is the other means against
forgetting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from effc.errors import TuneError
from effc.train.graph import InGraph
from effc.train.losses import LOGITS, Outputs, divergence
from effc.train.wavelet import details

ALIGNED = "aligned."
"""What stands before the name of a feature that A has brought to the teacher's width."""
Feeds = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What each part of the loss counts for; 0 leaves it out. `levels` is how many Dⱼ there are."""

    answers: float = 1.0
    logits: float = 0.0
    features: float = 0.0
    replay: float = 0.0
    sure: float = 0.0
    temperature: float = 2.0
    levels: int = 3


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A batch: inputs of what the teacher is asked, and of what is replayed, with its labels [batch, …].

    `real` [batch, positions] says which positions of a feature were there; elsewhere both sides count as 0.
    """

    feeds: Feeds
    real: Tensor | None = None
    replay: Feeds | None = None
    labels: Tensor | None = None


class Taught(nn.Module):
    """A student in its graph, and a map A for each of its features; `widths` are (student's, teacher's) by name."""

    def __init__(
        self, student: InGraph, widths: Mapping[str, tuple[int, int]], seed: int = 0
    ) -> None:
        super().__init__()
        self.student = student
        draw = torch.Generator().manual_seed(seed)
        self.maps = nn.ModuleDict()
        for name, (mine, theirs) in sorted(widths.items()):
            made = nn.Linear(mine, theirs)
            with torch.no_grad():  # not the global draw: a student is the same with and without
                made.weight.copy_(torch.randn(theirs, mine, generator=draw) / mine**0.5)
                made.bias.zero_()
            self.maps[name] = made

    def forward(self, feeds: Feeds) -> dict[str, Tensor]:
        outputs: dict[str, Tensor] = self.student(feeds)
        mapped = {f"{ALIGNED}{name}": map_(outputs[name]) for name, map_ in self.maps.items()}
        return {**outputs, **mapped}

    def live(self) -> dict[str, Tensor]:
        return self.student.live()

    @property
    def instead(self) -> dict[str, Tensor]:
        return self.student.instead

    @instead.setter
    def instead(self, tensors: dict[str, Tensor]) -> None:
        self.student.instead = tensors


def loss(
    how: Distillation, teacher: Callable[[Feeds], Outputs]
) -> Callable[[Callable[[Feeds], Outputs], Lesson], Tensor]:
    """The loss of a `Taught` on a lesson. Raises TuneError where nothing counts, or a lesson lacks what does."""
    parts = (how.answers, how.logits, how.features, how.replay)
    if not any(parts) or min(parts) < 0 or not 0 <= how.sure < 1 or how.temperature <= 0:
        raise TuneError(
            f"{how} is nothing to learn by", hint="weights of 0 and more, one of them above 0"
        )

    def value(student: Callable[[Feeds], Outputs], lesson: Lesson) -> Tensor:
        outputs = student(lesson.feeds)
        with torch.no_grad():
            wanted = teacher(lesson.feeds)
        found = []
        if how.answers:
            found.append(how.answers * answers(outputs[LOGITS], wanted[LOGITS], how.sure))
        if how.logits:
            _expect_one_vocabulary(outputs[LOGITS], wanted[LOGITS])
            far = divergence(outputs[LOGITS], wanted[LOGITS], how.temperature)
            found.append(how.logits * far)
        if how.features:
            found.append(how.features * _features(outputs, wanted, lesson.real, how.levels))
        if how.replay:
            if lesson.replay is None or lesson.labels is None:
                raise TuneError("there is nothing to replay", hint="replay: 0, or give samples")
            known = student(lesson.replay)[LOGITS]
            found.append(how.replay * _cross_entropy(known, lesson.labels).mean())
        return torch.stack(found).sum()

    return value


def answers(student: Tensor, teacher: Tensor, sure: float = 0.0) -> Tensor:
    """Cross-entropy to the teacher's likeliest class […, classes], of rows where that has the probability `sure`."""
    most, chosen = teacher.softmax(-1).max(-1)
    counts = (most >= sure).to(student.dtype)
    return (_cross_entropy(student, chosen) * counts).sum() / counts.sum().clamp_min(1)


def features(student: Tensor, teacher: Tensor, levels: int = 3) -> Tensor:
    """Mean square, and mean magnitudes of details along positions, of a difference [batch, positions, channels]."""
    off = student - teacher  # D is linear, so that of the difference is the difference
    fine = [band.abs().mean() for band in details(off, levels)]
    return off.square().mean() + sum(fine, off.new_zeros(()))


def _features(outputs: Outputs, wanted: Outputs, real: Tensor | None, levels: int) -> Tensor:
    names = [name for name in outputs if name.startswith(ALIGNED)]
    if not names:
        raise TuneError("no feature is brought to the teacher's width", hint="features: 0")
    found = []
    for name in names:
        mine, theirs = outputs[name], wanted[name.removeprefix(ALIGNED)]
        if real is not None and mine.shape[:2] == real.shape:
            seen = real[..., None].to(mine.dtype)
            mine, theirs = mine * seen, theirs * seen
        found.append(features(mine, theirs, levels))
    return torch.stack(found).sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row; logits […, classes] and labels […]."""
    rows = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return rows.view(labels.shape)


def _expect_one_vocabulary(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise TuneError(
            f"the student has {student.shape[-1]} classes and the teacher {teacher.shape[-1]}",
            hint="logits: 0, and learn from answers and features",
        )
