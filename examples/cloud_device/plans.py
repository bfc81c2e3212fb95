"""How much is drawn, trained and tested, and which arms, domains and seeds are measured, in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import arms as made_of
import world

SHIFTS = "shifts"
"""In the place of a domain: three of them, one after the other."""
SHOWN, WHOLE, CHANCE = "akd", "labels", "random"
UNSEEN = tuple(name for name in world.DOMAINS if name != world.SOURCE)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Every arm in every domain, for so many seeds."""

    arms: tuple[str, ...]
    domains: tuple[str, ...] = UNSEEN
    seeds: int = 1

    def units(self) -> Iterator[tuple[str, str, int]]:
        """Domain, arm and seed; all arms of a seed before the next one."""
        for domain in self.domains:
            for seed in range(self.seeds):
                yield from ((domain, arm, seed) for arm in self.arms)


@dataclass(frozen=True, kw_only=True)
class Plan:
    crowded: int
    """Pictures that the encoder is trained on, and how often."""
    epochs: float
    day: int
    """Pictures of the source domain that the student is trained on, and of every domain for the teacher."""
    passes: int
    stream: int
    """Pictures that a device meets in a round."""
    test: int
    stages: tuple[Stage, ...]
    rounds: int = 3
    successive: tuple[int, ...] = (3, 3, 4)
    """Rounds of each domain where they come one after the other."""
    steps: int = 150
    batch: int = 32
    share: float = 0.2
    """Of pictures by day that may be above the threshold."""
    calibrated: int = 100

    def courses(self, domain: str) -> tuple[str, ...]:
        """The domain of every round."""
        if domain != SHIFTS:
            return (domain,) * self.rounds
        both = zip(UNSEEN, self.successive, strict=True)
        return tuple(name for name, count in both for _ in range(count))

    def trained(self) -> dict[str, object]:
        """What encoder, teacher and students hang on."""
        every = dataclasses.asdict(self)
        return {name: every[name] for name in ("crowded", "epochs", "day", "passes")}

    def measured(self) -> dict[str, object]:
        """What a unit hangs on, beside its arm, domain and seed."""
        every = dataclasses.asdict(self)
        return {name: value for name, value in every.items() if name != "stages"}


FIRST = (SHOWN, WHOLE, CHANCE, "no teacher")
FULL = (
    Stage(arms=FIRST, domains=("dusk",), seeds=5),
    Stage(
        arms=("random masked", "masked", "energy", "mcdrop", "low", "answers", "logits", "features"),
        domains=("dusk",), seeds=5,
    ),
    Stage(arms=("open", SHOWN), domains=(SHIFTS,), seeds=3),
    Stage(arms=("all tokens", "tent", "prompt", "top-k", "unweighted", "lossless"), domains=("dusk",), seeds=5),
    Stage(arms=FIRST, domains=("ink", "frost"), seeds=5),
    Stage(arms=("half", "small", "l2-sp", "open"), domains=("dusk",), seeds=3),
    Stage(arms=tuple(made_of.GRID), domains=("dusk",)),
)  # fmt: skip
PLANS = {
    "smoke": Plan(
        crowded=32, epochs=2, day=32, passes=128, stream=16, test=8, rounds=1, steps=2, batch=8,
        successive=(1, 1, 1), share=0.95, calibrated=20, stages=(Stage(arms=(SHOWN, WHOLE), domains=("ink",)),),
    ),
    "fast": Plan(
        crowded=1500, epochs=3, day=600, passes=30000, stream=100, test=80, rounds=2, steps=100, calibrated=60,
        stages=(Stage(arms=(SHOWN, WHOLE, CHANCE, "energy", "mcdrop"), domains=("dusk",)),),
    ),
    "full": Plan(crowded=3000, epochs=4, day=1500, passes=60000, stream=200, test=250, stages=FULL),
}  # fmt: skip
