"""A clock for passes that ask how long graphs take: each is lowered for the target and timed beside the first.

Engines take turns in shuffled blocks, as in a bench (`effc.bench`), on the threads and one shape of the compile. Of the
passes that stand behind in a recipe those go before that decide which kernels run: `quantize`, with the ranges of one
batch and codes rounded to nearest, and `mixed-precision`. Tuning, smoothing and better ranges change numbers and no
time.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effc import alone, bench, measure, scratch
from effc.backends import BACKENDS
from effc.backends.base import Lowered
from effc.backends.dialect import DIALECTS
from effc.bench import Case
from effc.calib.calibrator import collect
from effc.calib.data import Batch
from effc.errors import PreconditionError
from effc.ir.edit import refresh
from effc.ir.program import Graph
from effc.machine import default_threads
from effc.passes.base import Pass, Stats
from effc.passes.mixed_precision import MixedPrecision
from effc.passes.quantize import Quantize

AT_ONCE = 6
"""Graphs that are open at once beside the first."""
EACH_S = 1.2
"""Seconds of runs for every open engine."""
Step = Callable[[int, int | None], None]


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times graphs of one role on one target, behind the passes that are still to come."""

    target: str
    case: Callable[[Lowered], Case]
    """The inputs of an engine."""
    threads: int
    options: Any = None
    """Those of the target, where a recipe has some."""
    behind: Sequence[Pass] = ()
    batches: Callable[[], Iterable[Batch]] = lambda: ()
    """What ranges are measured on, where a pass behind does."""
    step: Step = lambda done, total: None
    each_s: float = EACH_S

    def __call__(self, graphs: Iterable[Graph]) -> list[list[float]]:
        """Milliseconds, [graphs, sessions]. Raises PreconditionError where this machine cannot run the target."""
        with scratch.held() as place:
            whole: Lowered | None = None
            ratios: list[Any] = []
            whole_ms, waiting, done = 0.0, [], 0
            for number, graph in enumerate(graphs):
                made = self._lowered(graph, place / str(number))
                if whole is None:
                    whole = made
                    continue
                waiting.append(made)
                done += 1
                self.step(done, None)
                if len(waiting) == AT_ONCE:
                    whole_ms, found = self._timed(whole, waiting)
                    ratios, waiting = ratios + found, []
            if waiting:
                assert whole is not None
                whole_ms, found = self._timed(whole, waiting)
                ratios += found
        fewest = min(map(len, ratios), default=0)
        return [[whole_ms] * fewest, *((whole_ms / r[:fewest]).tolist() for r in ratios)]

    def _lowered(self, graph: Graph, place: Path) -> Lowered:
        graph = graph.clone()
        for asked in self.behind:
            pass_ = asked.resolve(DIALECTS[self.target])
            probes = list(pass_.probes(graph))
            stats = Stats(collect(graph, probes, self.batches()) if probes else {})
            if pass_.rewrite(graph, stats):
                refresh(graph)
        kind = BACKENDS[self.target]
        backend = kind() if self.options is None else kind(self.options)
        lowered: Lowered = backend.lower(graph, place)
        if (why := backend.obstacle(lowered)) is not None:
            raise PreconditionError(
                f"how long {self.target} takes cannot be measured here: {why}",
                hint="`align: 8` or `align: 64` in place of `auto`, and a `ratio` in place of a latency budget",
            )
        return lowered

    def _timed(self, whole: Lowered, others: Sequence[Lowered]) -> tuple[float, list[Any]]:
        """Milliseconds of the whole graph, and whole ÷ other for every session; the others' files are removed."""
        openers = {"engine": measure.opener(whole, self.threads)}
        openers |= {str(n): measure.opener(o, self.threads) for n, o in enumerate(others)}
        with alone.timing():
            (shape,) = bench.compare(
                openers, [self.case(whole)], threads=self.threads,
                budget_s=self.each_s * len(openers), references=(),
            ).shapes  # fmt: skip
        mine = shape.timings["engine"]
        found = [bench.log_ratios(mine, shape.timings[str(n)]) for n in range(len(others))]
        for lowered in others:
            shutil.rmtree(lowered.directory)
        return mine.median_ms, [np.exp(logs) for logs in found]


def clock(
    target: str,
    feeds: Mapping[str, Any],
    *,
    threads: int | None = None,
    behind: Sequence[Pass] = (),
) -> Clock:
    """What times graphs in `effc.apply(PruneDims(…), program, clock=…)`: on a target, for inputs by name.

    `behind` are passes that will follow; ranges are measured on those inputs.
    """
    given = {name: np.asarray(value) for name, value in feeds.items()}
    rows = max((value.shape[0] for value in given.values() if value.ndim), default=1)
    case = Case(batch=rows, length=None, feeds=given)
    return Clock(
        target=target, case=lambda lowered: case, threads=threads or default_threads(),
        behind=deciding(behind), batches=lambda: [Batch(inputs=given)],
    )  # fmt: skip


def deciding(behind: Iterable[Pass]) -> list[Pass]:
    """Of passes those that decide which kernels run, in their quickest form."""
    found: list[Pass] = []
    for pass_ in behind:
        if isinstance(pass_, Quantize):
            quick = {"rounding": "nearest", "bias_correction": False, "weight_range": "minmax"}
            found.append(dataclasses.replace(pass_, range="minmax", **quick))  # type: ignore[arg-type]
        elif isinstance(pass_, MixedPrecision):
            found.append(dataclasses.replace(pass_, check_range=False))
    return found
