"""The cloud's half: a copy of the student is trained on what came up, and it is said what its weights matter.

Adapters of low rank, norms and biases learn (`effc.train.akd`), and adapters are merged before the student is compiled.
While it trains, the float student answers test pictures every 25 steps, which tells how soon it was good and chooses
nothing; seconds are of the processor, without those answers.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import arms as made_of
import models
import numpy as np
import torch
import world
from lessons import Known, Lessons

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
RANK = 4
EVERY = 25
"""Steps between two looks at test pictures."""
WEIGHED = 96
"""Samples that tell what weights matter, a third of them by day."""
FLOOR = 0.01
"""Of the mean: what a weight counts that seems to matter to none of them."""
PROMPT = "place"
"""The tensor of the answerer that is added to the tokens of every place."""


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """Tensors of the answerer behind a round, how it went, and bytes that other ways down would take."""

    tensors: dict[str, torch.Tensor]
    cpu_s: float
    curve: tuple[tuple[int, float, float], ...]
    """Steps, seconds of the processor, and accuracy of the float student."""
    trained_fp16: bytes


class Cloud:
    def __init__(
        self, arm: made_of.Arm, answerer: models.Answerer, teacher: models.Answerer, lessons: Lessons,
        steps: int,
    ) -> None:  # fmt: skip
        self.arm, self.answerer, self.teacher, self.lessons = arm, answerer, teacher, lessons
        self.steps = steps

    def train(self, test: Known) -> Tuned | None:
        """Train on all that came up so far; None where nothing did."""
        import effc
        from effc.ir.edit import rebind
        from effc.passes.lora import MergeLora
        from effc.train import akd
        from effc.train.anchor import Anchor
        from effc.train.graph import InGraph
        from effc.train.loop import Schedule, fit

        if not len(self.lessons):
            return None
        arm, lessons = self.arm, self.lessons
        day = lessons.day
        example = {"tokens": day.tokens[:2], "queries": day.queries[:2]}
        example |= {"sent": torch.ones(2, world.PLACES)}
        program = effc.trace(self.answerer, example, dims={n: {0: "batch"} for n in example})
        graph = program.only()
        names = self._trained(program)
        small, large = models.STUDENT[0], models.TEACHER[0]
        widths = {"image": (small, large), "last": (small, large)}
        has_features = arm.how.features and not (arm.truth or arm.alone)
        taught = akd.Taught(InGraph(graph, names), widths if has_features else {})
        schedule = Schedule(
            steps=self.steps, lr=arm.lr, seed=lessons.seed, check_every=min(EVERY, self.steps)
        )
        courses = [Anchor(weight=arm.anchor).begin(graph, self.steps, schedule.rate)] if arm.anchor else []  # fmt: skip
        if arm.alone:
            loss, batch = unsureness, lessons.met
        elif arm.truth:
            loss = akd.loss(akd.Distillation(answers=0.0, replay=1.0), self.taught_by)
            batch = lessons.true
        else:
            loss, batch = akd.loss(arm.how, self.taught_by), lessons.taught
        curve: list[tuple[int, float, float]] = []
        began, looked = time.process_time(), 0.0

        def look(module: Any) -> float:
            nonlocal looked
            now = time.process_time()
            feeds = {"tokens": test.tokens, "queries": test.queries}
            feeds["sent"] = torch.ones(len(test.tokens), world.PLACES)
            right = module(feeds)["logits"].argmax(-1) == test.answers
            accuracy = float(right.float().mean())
            step = min(len(curve) * schedule.check_every, self.steps)
            curve.append((step, round(now - began - looked, 3), accuracy))
            looked += time.process_time() - now
            return accuracy

        fit(taught, loss, batch, schedule, courses=courses, precision="bf16", score=look)
        seconds = time.process_time() - began - looked
        sent = taught.student.tensors()
        for name, tensor in sent.items():
            rebind(graph, name, tensor, "tuned")
        if arm.trains == "adapters":
            effc.apply(MergeLora(), program)
        held = self.answerer.state_dict()  # a graph has constants of its own beside these
        tensors = {n: t.detach().clone() for n, t in graph.tensors().items() if n in held}
        self.answerer.load_state_dict(tensors)
        plain = b"".join(t.to(torch.float16).numpy().tobytes() for t in sent.values())
        return Tuned(tensors=tensors, cpu_s=seconds, curve=tuple(curve), trained_fp16=plain)

    def _trained(self, program: Any) -> list[str]:
        """Names of the tensors that learn; adapters are attached where they do."""
        import effc
        from effc.ir.splice import attached
        from effc.passes.lora import AttachLora

        graph = program.only()
        own = list(graph.tensors())
        state = graph.exported.state_dict
        match self.arm.trains:
            case "all":
                return [n for n in own if isinstance(state.get(n), torch.nn.Parameter)]
            case "norms":
                return [n for n in own if "norm" in n]
            case "prompt":
                return [PROMPT]
        effc.apply(AttachLora(rank=RANK, output=True, seed=self.lessons.seed), program)
        return [*attached(graph), *(n for n in own if "norm" in n or n.endswith("bias"))]

    def taught_by(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the teacher makes of what was sent."""
        asked = {**feeds, "sent": feeds.get("real", feeds["sent"])}
        asked.pop("real", None)
        if self.arm.teacher != "own":  # answers to the same queries of another picture
            asked |= {name: asked[name].roll(1, 0) for name in ("tokens", "sent")}
        found: dict[str, torch.Tensor] = self.teacher(**asked)
        return found

    def importance(self, package: Path) -> dict[str, Array]:
        """What every weight of the answerer matters on what came up and by day, by the initialisers of a package."""
        from effc.delta.importance import by_initialiser
        from effc.train.fisher import information

        tensors = dict(self.answerer.named_parameters())
        found = information(lambda feeds: self.answerer(**feeds), tensors, self._samples())
        mean = torch.cat([h.flatten() for h in found.values()]).mean()
        known = {
            f"answerer.{name}": (h + FLOOR * mean).double().numpy() for name, h in found.items()
        }
        return by_initialiser(package, known)

    def _samples(self) -> Iterator[dict[str, torch.Tensor]]:
        """One at a time, and every third of them by day."""
        for i in range(WEIGHED):
            step, row = divmod(i, self.lessons.batch)
            lesson = self.lessons.taught(self.steps + step)
            feeds = lesson.replay if i % 3 == 2 else lesson.feeds
            assert feeds is not None
            yield {n: feeds[n][row : row + 1] for n in ("tokens", "queries", "sent")}


def unsureness(student: Any, lesson: Any) -> torch.Tensor:
    """Mean entropy of the student's own answers."""
    log = torch.log_softmax(student(lesson.feeds)["logits"], -1)
    return -(log.exp() * log).sum(-1).mean()


def zipped(content: bytes) -> int:
    return len(zlib.compress(content, 9))


def apart(teacher: models.Answerer, student: models.Answerer, test: Known) -> Json:
    """How far the float student is from the teacher on whole pictures: last features, and answers.

    Features by 1 − CKA of all rows (linear, Kornblith et al., ICML 2019), which asks for no map between widths;
    answers by mean KL(teacher ‖ student), in nats.
    """
    with torch.no_grad():
        theirs, own = (model(test.tokens, test.queries) for model in (teacher, student))
    x, y = (found["last"].flatten(0, 1).double() for found in (theirs, own))
    x, y = x - x.mean(0), y - y.mean(0)
    shared = (x.T @ y).square().sum()
    size = (x.T @ x).square().sum().sqrt() * (y.T @ y).square().sum().sqrt()
    p, q = (torch.log_softmax(found["logits"], -1) for found in (theirs, own))
    return {
        "features": 1 - float(shared / size),
        "answers": float((p.exp() * (p - q)).sum(-1).mean()),
    }
