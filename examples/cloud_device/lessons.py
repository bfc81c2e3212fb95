"""What a student is taught from: tokens that came up, some of a picture's 49, beside samples of its own domain.

The device's answerer always sees whole pictures. Where a student in training never sees what was not sent, it learns to
answer from few tokens and not what to make of the rest. So half of its pictures are made whole: a place whose token was
not sent gets one of the last two that were sent of the same picture, whose scores are the nearest to its own. The
teacher is asked about what was sent and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import arms as made_of
import numpy as np
import torch
import world

from effc.delta.uplink import Tokens
from effc.train.akd import Lesson

Array = np.ndarray[Any, np.dtype[Any]]
LAST = 2
"""Of what was sent of a picture, those that stand for what was not."""
WHOLE = 0.5


@dataclass(frozen=True, kw_only=True)
class Known:
    """Tokens of scenes, and their queries and answers."""

    tokens: torch.Tensor
    queries: torch.Tensor
    answers: torch.Tensor
    shapes: torch.Tensor

    def told(self) -> dict[str, torch.Tensor]:
        return {"queries": self.queries, "answers": self.answers, "shapes": self.shapes}


def joined(parts: Sequence[Known]) -> Known:
    return Known(**{
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("tokens", "queries", "answers", "shapes")
    })  # fmt: skip


class Lessons:
    """Batches by the number of a step, the same for the same seed; `batch` of what came up and as many by day."""

    def __init__(self, arm: made_of.Arm, day: Known, batch: int, seed: int) -> None:
        self.arm, self.day, self.batch, self.seed = arm, day, batch, seed
        self.received: list[Tokens] = []
        self.truths: list[Known] = []
        """What only `labels` and `tent` see: all of the streams."""
        self._gathered: tuple[int, tuple[Array, Array, Array, Array]] | None = None

    def __len__(self) -> int:
        """Pictures that there is something of."""
        if self.arm.truth or self.arm.alone:
            return sum(len(known.tokens) for known in self.truths)
        return sum(len(each.tokens) for each in self.received)

    def taught(self, step: int) -> Lesson:
        """Tokens that came up, for a teacher to answer, and samples to replay."""
        tokens, sent, kept, queries = self._gather()
        rows = self._rows(step, len(tokens), 0)
        seen, features = sent[rows], tokens[rows]
        real = torch.from_numpy(seen)
        if self.arm.filled and not self.arm.every:
            draw = np.random.default_rng([29, self.seed, step])
            whole = draw.random(len(rows)) < WHOLE
            last = kept.shape[1] - 1 - draw.integers(0, LAST, seen.shape)
            made_up = kept[rows[:, None], last]
            features = np.where((seen | ~whole[:, None])[..., None], features, made_up)
            seen = seen | whole[:, None]
        feeds = {
            "tokens": torch.from_numpy(features), "queries": torch.from_numpy(queries[rows]),
            "sent": torch.from_numpy(seen).float(), "real": real.float(),
        }  # fmt: skip
        replay, labels = self._replayed(step)
        return Lesson(feeds=feeds, real=real, replay=replay, labels=labels)

    def true(self, step: int) -> Lesson:
        """All tokens of streams and their true answers, and samples to replay."""
        known = joined(self.truths)
        rows = self._rows(step, len(known.tokens), 0)
        replay, labels = self._replayed(step)
        feeds = {
            "tokens": torch.cat([known.tokens[rows], replay["tokens"]]),
            "queries": torch.cat([known.queries[rows], replay["queries"]]),
            "sent": torch.cat([replay["sent"], replay["sent"]]),
        }
        return Lesson(feeds=feeds, replay=feeds, labels=torch.cat([known.answers[rows], labels]))

    def met(self, step: int) -> Lesson:
        """All tokens of what the device met last, without answers."""
        known = self.truths[-1]
        rows = self._rows(step, len(known.tokens), 0)
        sent = torch.ones(len(rows), world.PLACES)
        feeds = {"tokens": known.tokens[rows], "queries": known.queries[rows], "sent": sent}
        return Lesson(feeds=feeds)

    def _gather(self) -> tuple[Array, Array, Array, Array]:
        """Features in their places, which were sent, features as sent, and queries, of all that came up."""
        count = len(self.received)
        if self._gathered is None or self._gathered[0] != count:
            wide = [each.spread() for each in self.received]
            parts = [
                (*spread, each.tokens, each.beside["queries"])
                for spread, each in zip(wide, self.received, strict=True)
            ]
            tokens, sent, kept, queries = (np.concatenate(p) for p in zip(*parts, strict=True))
            self._gathered = count, (tokens, sent, kept, queries)
        return self._gathered[1]

    def _rows(self, step: int, count: int, of: int) -> Array:
        return np.random.default_rng([23, self.seed, step, of]).integers(0, count, self.batch)

    def _replayed(self, step: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        rows = self._rows(step, len(self.day.tokens), 1)
        sent = torch.ones(len(rows), world.PLACES)
        feeds = {"tokens": self.day.tokens[rows], "queries": self.day.queries[rows], "sent": sent}
        return feeds, self.day.answers[rows]
