"""What is compared: how tokens are chosen on the way up, what the student learns by, and what comes down.

akd              tokens of the score `maha`; answers where the teacher is sure, its logits and its features
answers, logits, features    one part of that loss alone
energy, mcdrop, random       akd, with tokens of another score; random is what a score is held against
low              akd, with the tokens of the lowest scores
all tokens       akd, and every token goes up
no teacher       akd, from a teacher whose answers are those to other pictures: what the teacher is held against
l2-sp            akd, near to where it began instead of with samples replayed
labels           every tensor of the answerer trained on true answers to every picture, all tokens, sent whole
lossless, small  akd, with all of the change sent down, or a quarter of the bytes
"""

from __future__ import annotations

from dataclasses import dataclass, field

from effc.train.akd import Distillation

ALL = Distillation(answers=1.0, logits=1.0, features=0.5, replay=1.0, sure=0.6)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`budget` is bytes of a release, 0 for all of the change; the first that `score` names chooses the tokens."""

    score: str = "maha"
    keep: str = "high"
    every: bool = False
    """Whether every token of every picture goes up."""
    how: Distillation = field(default_factory=lambda: ALL)
    truth: bool = False
    teacher: str = "own"
    anchor: float = 0.0
    lr: float = 4e-3
    budget: int = 50_000


ARMS = {
    "akd": Arm(),
    "labels": Arm(every=True, truth=True, budget=0, lr=1e-3),
    "energy": Arm(score="energy"),
    "random": Arm(score="random"),
    "mcdrop": Arm(score="mcdrop"),
    "low": Arm(keep="low"),
    "answers": Arm(how=Distillation(replay=1.0, sure=0.6)),
    "logits": Arm(how=Distillation(answers=0.0, logits=1.0, replay=1.0)),
    "features": Arm(how=Distillation(answers=0.0, features=1.0, replay=1.0)),
    "no teacher": Arm(teacher="another picture's"),
    "l2-sp": Arm(how=Distillation(answers=1.0, logits=1.0, features=0.5, sure=0.6), anchor=0.05),
    "all tokens": Arm(every=True),
    "lossless": Arm(budget=0),
    "small": Arm(budget=12_500),
}
UPLINK = ("akd", "energy", "mcdrop", "random")
"""Arms that differ in the score alone."""
