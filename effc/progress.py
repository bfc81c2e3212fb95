"""Stages of a long run: what is being done, how far it is, how long each took.

The compiler only speaks to this; the command line draws it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("effc")

Step = Callable[[int, int | None], None]
"""`step(done, total)`; `total` is None where nobody knows it."""


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
        yield lambda done, total: None
