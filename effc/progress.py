"""Stages of a long run: what is being done, how far it is, how long each took.

The compiler only speaks to this; the command line draws it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from effc import heap

log = logging.getLogger("effc")

Step = Callable[[int, int | None], None]
"""`step(done, total)`; `total` is None where nobody knows it."""


def silent(done: int, total: int | None) -> None:
    """A step that nobody watches."""


@dataclass
class Stage:
    """What one stage took, over all the times it ran; `cached` counts how often its result was there already."""

    name: str
    seconds: float = 0.0
    peak_mb: float | None = None
    cached: int = 0


class Progress:
    """Says nothing and remembers what every stage took."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Step]:
        found = self.stages.setdefault(name, Stage(name))
        heap.trim()  # so that the peak of a stage is its own
        _forget_peak()
        started = time.perf_counter()
        log.info("stage %s", name)
        try:
            with self.draw(name) as step:
                yield step
        finally:
            found.seconds += time.perf_counter() - started
            if (peak := peak_mb()) is not None:
                found.peak_mb = max(found.peak_mb or 0.0, peak)

    def reuse(self, name: str) -> None:
        """Say that a stage had nothing to do, because its result was there."""
        log.info("stage %s: done before", name)
        self.stages.setdefault(name, Stage(name)).cached += 1

    @contextmanager
    def draw(self, name: str) -> Iterator[Step]:
        yield silent


def peak_mb() -> float | None:
    """Peak resident memory of this process in MB since the stage began; None where the system does not say."""
    return _status_mb("VmHWM")


def resident_mb() -> float | None:
    """Resident memory of this process now, in MB; None where the system does not say."""
    return _status_mb("VmRSS")


def _status_mb(word: str) -> float | None:
    try:
        with open("/proc/self/status", encoding="utf-8") as stream:
            line = next(line for line in stream if line.startswith(word))
        return round(int(line.split()[1]) * 1024 / 1e6, 1)
    except (OSError, StopIteration, ValueError):
        return None


def _forget_peak() -> None:
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="utf-8") as f:
        f.write("5")


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
