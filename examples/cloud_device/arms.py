"""What is compared: how tokens are chosen on the way up, what the student learns by, and what comes down.

akd                    tokens of the score `maha`; answers where the teacher is sure, its logits and its features
answers, logits, features      one part of that loss alone
energy, mcdrop, random akd, with tokens of another score; random is what a score is held against
low                    akd, with the tokens of the lowest scores
masked, random masked  akd and random, where the student sees what was sent and never a whole picture
all tokens             akd, and every token of the same pictures goes up
no teacher             akd, from a teacher whose answers are those to other pictures: what the teacher is held against
l2-sp                  akd, near to where it began instead of with samples replayed
labels                 every tensor of the answerer trained on true answers to every picture, all tokens, sent whole
tent                   nothing goes up or down: norms trained on the device to be surer of what it sees (ICLR 2021)
prompt                 akd, and all that is trained and comes down is what is added to the tokens of every place
top-k                  akd, and the largest changes come down, each by itself
unweighted             akd, with every weight's error counted alike
open                   akd, each delta made against what the cloud had before, and not what the device holds
lossless, half, small  akd, with all of the change sent down, or fewer bytes
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from models import SENT

from effc.delta.codec import EXACT
from effc.train.akd import Distillation

ALL = Distillation(answers=1.0, logits=1.0, features=0.5, replay=1.0, sure=0.6)
BUDGET = 60_000
"""Bytes of a release: below 1 % of the engine's weights."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`score` and `keep` choose `sent` tokens, unless `every` one goes up; `budget` is of a release, 0 for no end."""

    score: str = "maha"
    keep: str = "high"
    sent: int = SENT
    every: bool = False
    filled: bool = True
    """Whether the student sees half of its pictures whole, with what was not sent made up (`lessons`)."""
    how: Distillation = field(default_factory=lambda: ALL)
    truth: bool = False
    teacher: str = "own"
    anchor: float = 0.0
    trains: Literal["adapters", "all", "norms", "prompt"] = "adapters"
    alone: bool = False
    """Whether the device is left to itself."""
    lr: float = 4e-3
    budget: int = BUDGET
    weighted: bool = True
    encodings: tuple[str, ...] = ()
    """Which of the encodings of a delta may be used, where not all."""
    is_open: bool = False


ARMS = {
    "akd": Arm(),
    "labels": Arm(every=True, truth=True, trains="all", budget=0, lr=1e-3),
    "random": Arm(score="random"),
    "no teacher": Arm(teacher="another picture's"),
    "energy": Arm(score="energy"),
    "mcdrop": Arm(score="mcdrop"),
    "low": Arm(keep="low"),
    "masked": Arm(filled=False),
    "random masked": Arm(score="random", filled=False),
    "answers": Arm(how=Distillation(replay=1.0, sure=0.6)),
    "logits": Arm(how=Distillation(answers=0.0, logits=1.0, replay=1.0)),
    "features": Arm(how=Distillation(answers=0.0, features=1.0, replay=1.0)),
    "all tokens": Arm(every=True),
    "l2-sp": Arm(how=Distillation(answers=1.0, logits=1.0, features=0.5, sure=0.6), anchor=0.05),
    "tent": Arm(trains="norms", alone=True, lr=1e-3, budget=0),
    "prompt": Arm(trains="prompt", lr=2e-2),
    "top-k": Arm(encodings=("topk", *EXACT), weighted=False),
    "unweighted": Arm(weighted=False),
    "open": Arm(is_open=True),
    "lossless": Arm(budget=0),
    "half": Arm(budget=BUDGET // 2),
    "small": Arm(budget=BUDGET // 4),
}  # fmt: skip
GRID = {
    f"{score} {keep} {sent}": Arm(score=score, keep=keep, sent=sent)
    for score in ("maha", "energy", "mcdrop", "random")
    for keep in ("high", "low")
    for sent in (4, 8, 16)
    if (score, keep) != ("random", "low")
}  # fmt: skip
"""Every score, either end and three ratios; `entropy` needs logits of every token, which this model has not."""
EVERY = {**ARMS, **GRID}
UPLINK = ("akd", "energy", "mcdrop", "random", "low", "masked", "random masked")
"""Arms that differ in what goes up alone, at one ratio."""
DOWNLINK = ("lossless", "akd", "half", "small", "unweighted", "top-k", "prompt", "open")
"""Arms that differ in what comes down."""
