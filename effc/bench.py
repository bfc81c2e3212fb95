"""Which engine is faster, and how sure is that?

Engines take turns in shuffled blocks with a short pause before each, the first runs of a block dropped, so that drift
of the machine hits all alike. A shape's ratio is that of the medians, with a 99 % interval from resampling blocks.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

DROPPED = 2
PAUSE_S = 0.02
BLOCK_S = 0.25
"""A block lasts about this long, within 3 and 10 counted runs."""
DRAWS = 2000


def shape_word(batch: int, length: int | None) -> str:
    """`8x128`, or `batch 8` for a model without a length."""
    return f"{batch}x{length}" if length else f"batch {batch}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one shape; `length` is None for models without one."""

    batch: int
    length: int | None
    feeds: dict[str, Array]

    @property
    def word(self) -> str:
        return shape_word(self.batch, self.length)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Counted runs of one engine on one shape, by block, in milliseconds."""

    blocks: tuple[tuple[float, ...], ...]

    @property
    def runs(self) -> Array:
        return np.array([t for block in self.blocks for t in block])

    @property
    def median_ms(self) -> float:
        return float(np.median(self.runs))

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.runs, 95))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """reference ÷ engine, with its interval: above 1 the engine is faster."""

    ratio: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ShapeResult:
    case: Case
    timings: Mapping[str, Timing]
    ratios: Mapping[str, Ratio]
    references: tuple[str, ...]

    @property
    def reference(self) -> str | None:
        """The fastest of the references."""
        return min(self.references, key=lambda n: self.timings[n].median_ms, default=None)

    def to_json(self) -> dict[str, Any]:
        mine = self.timings["engine"]
        name = self.reference
        found: dict[str, Any] = {
            "batch": self.case.batch,
            "length": self.case.length,
            "engine_ms": round(mine.median_ms, 4),
            "p95_ms": round(mine.p95_ms, 4),
            "n": len(mine.runs),
            "reference": name,
            "reference_ms": None,
            "ratio": None,
            "low": None,
            "high": None,
            "against": {
                other: {
                    "ms": round(self.timings[other].median_ms, 4),
                    "p95_ms": round(self.timings[other].p95_ms, 4),
                    "n": len(self.timings[other].runs),
                    **_rounded(ratio),
                }
                for other, ratio in self.ratios.items()
            },
        }
        if name is not None:
            found |= {
                "reference_ms": round(self.timings[name].median_ms, 4),
                **_rounded(self.ratios[name]),
            }
        return found


def _rounded(ratio: Ratio) -> dict[str, float]:
    return {
        "ratio": round(ratio.ratio, 4),
        "low": round(ratio.low, 4),
        "high": round(ratio.high, 4),
    }


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    shapes: tuple[ShapeResult, ...]
    load_ms: Mapping[str, float]
    first_run_ms: Mapping[str, float]
    threads: int
    streams: int = 1
    peak_rss_mb: Mapping[str, float] = field(default_factory=dict)
    """Peak resident memory of a process that loads one engine and runs the largest shape, by engine."""

    def to_json(self) -> dict[str, Any]:
        return {
            "shapes": [shape.to_json() for shape in self.shapes],
            "load_ms": {n: round(v, 3) for n, v in self.load_ms.items()},
            "first_run_ms": {n: round(v, 3) for n, v in self.first_run_ms.items()},
            "peak_rss_mb": dict(self.peak_rss_mb),
            "reference": sorted({s.reference for s in self.shapes if s.reference}),
            "threads": self.threads,
            "streams": self.streams,
            "cpu": cpu_name(),
        }


def compare(
    openers: Mapping[str, Callable[[], Any]],
    cases: Iterable[Case],
    *,
    threads: int,
    budget_s: float = 10.0,
    seed: int = 0,
    streams: int = 1,
    references: Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> BenchResult:
    """Time `engine` against every other name in `openers`, shape by shape.

    Openers give engines whose threads do not spin. `budget_s` bounds a shape, give or take one block. `streams`
    callers use an engine at once; times are then what each of them waits. `references` are the names that the
    published ratio is against, the fastest of them counting; all where not given.
    """
    if references is None:
        references = [name for name in openers if name != "engine"]
    engines: dict[str, Any] = {}
    load_ms: dict[str, float] = {}
    first_ms: dict[str, float] = {}
    cases = list(cases)
    try:
        for name, opener in openers.items():
            started = time.perf_counter()
            engines[name] = opener()
            load_ms[name] = (time.perf_counter() - started) * 1e3
            if cases:
                first_ms[name] = _once(engines[name], cases[0])
        rng = np.random.default_rng(seed)
        shapes = []
        for number, case in enumerate(cases):
            shapes.append(_shape(engines, case, budget_s, rng, streams, tuple(references)))
            if progress is not None:
                progress(number + 1, len(cases))
    finally:
        for engine in engines.values():
            engine.close()
    return BenchResult(
        shapes=tuple(shapes),
        load_ms=load_ms,
        first_run_ms=first_ms,
        threads=threads,
        streams=streams,
    )


def _once(engine: Any, case: Case) -> float:
    started = time.perf_counter()
    engine(case.feeds)
    return (time.perf_counter() - started) * 1e3


def _block(engine: Any, case: Case, count: int, streams: int) -> list[float]:
    """`count` counted runs of every stream, those before them dropped."""

    def runs(_: int) -> list[float]:
        return [_once(engine, case) for _ in range(DROPPED + count)][DROPPED:]

    if streams == 1:
        return runs(0)
    with ThreadPoolExecutor(streams) as pool:
        return [ms for stream in pool.map(runs, range(streams)) for ms in stream]


def _shape(
    engines: Mapping[str, Any],
    case: Case,
    budget_s: float,
    rng: np.random.Generator,
    streams: int,
    references: tuple[str, ...],
) -> ShapeResult:
    deadline = time.perf_counter() + budget_s
    speeds = {n: warm_up(partial(_once, e, case), budget_s / 20) for n, e in engines.items()}
    counts = {n: max(3, min(10, int(BLOCK_S * 1e3 / max(ms, 1e-3)))) for n, ms in speeds.items()}
    blocks: dict[str, list[tuple[float, ...]]] = {name: [] for name in engines}
    rounds = 0
    while rounds < 3 or (time.perf_counter() < deadline and rounds < 60):
        for name in rng.permutation(list(engines)):
            time.sleep(PAUSE_S)
            blocks[name].append(tuple(_block(engines[name], case, counts[name], streams)))
        rounds += 1
        if rounds >= 3 and time.perf_counter() > deadline:
            break
    timings = {name: Timing(blocks=tuple(b)) for name, b in blocks.items()}
    mine = timings["engine"]
    ratios = {n: ratio_of(t, mine, seed=len(t.blocks)) for n, t in timings.items() if n != "engine"}
    return ShapeResult(case=case, timings=timings, ratios=ratios, references=references)


def warm_up(once: Callable[[], float], budget_s: float, window: int = 3) -> float:
    """Run until the median of the last few stops falling, or the budget is spent; gives that median in ms."""
    deadline = time.perf_counter() + budget_s
    runs = [once() for _ in range(window)]
    best = float(np.median(runs))
    while time.perf_counter() < deadline:
        runs.append(once())
        latest = float(np.median(runs[-window:]))
        if len(runs) >= 2 * window and latest > 0.98 * best:
            return latest
        best = min(best, latest)
    return float(np.median(runs[-window:]))


def ratio_of(reference: Timing, engine: Timing, *, seed: int = 0) -> Ratio:
    """Ratio of medians and its 99 % interval, blocks drawn again with replacement on each side."""
    rng = np.random.default_rng(seed)
    top, bottom = (_resampled_medians(t, rng) for t in (reference, engine))
    low, high = np.percentile(top / bottom, [0.5, 99.5])
    return Ratio(ratio=reference.median_ms / engine.median_ms, low=float(low), high=float(high))


def _resampled_medians(timing: Timing, rng: np.random.Generator) -> Array:
    blocks = np.array(timing.blocks)
    chosen = rng.integers(0, len(blocks), (DRAWS, len(blocks)))
    return np.asarray(np.median(blocks[chosen].reshape(DRAWS, -1), axis=1))


def verdict(low: float, high: float) -> str:
    """What an interval of reference ÷ engine says, in a printed word."""
    if low > 1.0:
        return "faster"
    return "slower" if high < 1.0 else "not distinguishable"


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(math.log(r) for r in ratios) / len(ratios))


def cpu_name() -> str:
    """Model name of the processor, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            name = next(
                (ln.split(":", 1)[1].strip() for ln in stream if ln.startswith("model name")), name
            )
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"
