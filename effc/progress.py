"""Stages of a long run: what is being done, how far it is, how long each took.

The compiler only speaks to this; the command line draws it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("effc")

Step = Callable[[int, int | None], None]
"""`step(done, total)`; `total` is None where nobody knows it."""


def silent(done: int, total: int | None) -> None:
    """A step that nobody watches."""


class Progress:
    """Says nothing and remembers the seconds of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Step]:
        started = time.perf_counter()
        log.info("stage %s", name)
        try:
            with self.draw(name) as step:
                yield step
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    @contextmanager
    def draw(self, name: str) -> Iterator[Step]:
        yield silent


class Counted:
    """An engine that tells `step` of every call, and else is the engine that it wraps.

    Who makes the same calls of two engines knows after the first how many there will be:

        first = Counted(reference, step)
        second = Counted(engine, step, done=first.done, total=2 * first.done)
    """

    def __init__(self, run: Any, step: Step, *, done: int = 0, total: int | None = None) -> None:
        self._run, self._step, self._total = run, step, total
        self.done = done

    def __call__(self, feeds: Any) -> Any:
        found = self._run(feeds)
        self.done += 1
        self._step(self.done, self._total)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)
