"""Tokens that are sent up, whose they are, and a clock that stands still."""

import numpy as np

from effc.delta.uplink import Tokens

WHO = {"encoder": "e" * 64, "tokenizer": "t" * 64, "engine": "a" * 64}


def tokens(count=3, kept=4, width=16, length=49, seed=0):
    draw = np.random.default_rng(seed)
    return Tokens(
        length=length,
        index=np.stack([draw.permutation(length)[:kept] for _ in range(count)]),
        tokens=draw.normal(size=(count, kept, width)).astype("f4"),
        score=draw.random(count).astype("f4"),
        beside={"question": draw.integers(0, 30, (count, 3))},
    )


class Clock:
    now = 1e9

    def __call__(self):
        return self.now
