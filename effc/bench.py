"""Which engine is faster, and how sure is that?

The budget of a shape is cut into equal sessions. In each, all engines are opened anew and take turns in short blocks,
in shuffled order and then the other way round; a block waits until the threads of whoever ran before are at rest, and
drops its first runs. What slows the machine for longer than a block hits all alike and cancels; what an opened engine
happens to get, its places in memory and on cores, is drawn again in the next session. So a session is the unit of the
statistics: the ratio is the mean over sessions, its 99 % interval Student's.

Found by trial (benchmarks/verdicts.py): blocks of ten runs with a pause each need four times the time for an interval
as narrow, and engines opened once differ from themselves beside a busy neighbour.
"""

from __future__ import annotations

import itertools
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

from effc import stats

Array = np.ndarray[Any, np.dtype[Any]]

SESSIONS = 16
FEWEST = 5
"""Sessions that a shape gets however little its budget is."""
OPENING = 0.3
"""The share of a budget that opening engines may take; they are opened once where it is not enough for the fewest."""
BLOCK_MS = 6.0
"""A block counts runs for about this long, 1 to 20 of them."""
DROPPED_MS = 1.0
"""Before that it drops runs for about this long, one at least: they fill the caches that others have emptied."""
LONGEST_REST_S = 0.05
LEVEL = 0.99
QUANTILES = np.linspace(0, 1, 41)


def shape_word(batch: int, length: int | None, past: int = 0) -> str:
    """`8x128`, `1x1 behind 128` with a filled cache, or `batch 8` for a model without a length."""
    if not length:
        return f"batch {batch}"
    return f"{batch}x{length} behind {past}" if past else f"{batch}x{length}"


def word_of(shape: Mapping[str, Any]) -> str:
    """The word of a shape as it stands in a bench."""
    return shape_word(shape["batch"], shape.get("length"), shape.get("past", 0))


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of one shape; `length` is None for models without one, `past` what is in the cache of one that has any."""

    batch: int
    length: int | None
    feeds: dict[str, Array]
    past: int = 0

    @property
    def word(self) -> str:
        return shape_word(self.batch, self.length, self.past)


Block = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Counted runs of one engine on one shape in milliseconds, by session and block."""

    sessions: tuple[tuple[Block, ...], ...]

    @property
    def runs(self) -> Array:
        return np.array([ms for session in self.sessions for block in session for ms in block])

    @property
    def median_ms(self) -> float:
        return float(np.median(self.runs))

    @property
    def p95_ms(self) -> float:
        return float(np.percentile(self.runs, 95))

    @property
    def quantiles_ms(self) -> list[float]:
        """Least and most and 39 even steps between, for drawing the whole distribution."""
        return [round(float(ms), 4) for ms in np.quantile(self.runs, QUANTILES)]


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
    openings: int = 1
    """How often the engines were opened anew for this shape: once a session, or once for all."""

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
            **({"past": self.case.past} if self.case.past else {}),
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
            "sessions": len(mine.sessions),
            "openings": self.openings,
            "quantiles_ms": {n: timing.quantiles_ms for n, timing in self.timings.items()},
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
    gpu: str | None = None
    """Where the engine ran, if not on the processor."""
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
            **({"gpu": self.gpu} if self.gpu else {}),
        }


def compare(
    openers: Mapping[str, Callable[[], Any]],
    cases: Iterable[Case],
    *,
    threads: int,
    budget_s: float = 9.5,
    seed: int = 0,
    streams: int = 1,
    references: Sequence[str] | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> BenchResult:
    """Time `engine` against every other name in `openers`, shape by shape.

    Openers give engines whose threads do not spin. `budget_s` bounds a shape, give or take one block, but for engines
    so slow that the fewest sessions, of a round each, take longer. Those that open slowly are opened once: the
    interval then knows nothing of what the next opening would get, and `openings` says so. `streams`
    callers use an engine at once; times are then what each of them waits. `references` are the names that the
    published ratio is against, the fastest of them counting; all where not given.
    """
    if references is None:
        references = [name for name in openers if name != "engine"]
    cases = list(cases)
    shapes = []
    with _Engines(openers) as engines:
        engines.renew(openers)
        load_ms = dict(engines.load_ms)
        first_ms = {n: _once(e, cases[0]) for n, e in engines.items() if cases}
        rng = np.random.default_rng(seed)
        for number, case in enumerate(cases):
            shapes.append(_shape(engines, case, budget_s, rng, streams, tuple(references)))
            if progress is not None:
                progress(number + 1, len(cases))
    return BenchResult(
        shapes=tuple(shapes),
        load_ms=load_ms,
        first_run_ms=first_ms,
        threads=threads,
        streams=streams,
    )


class _Engines(dict[str, Any]):
    """All engines by name, open at once."""

    def __init__(self, openers: Mapping[str, Callable[[], Any]]) -> None:
        super().__init__()
        self._openers = openers
        self.load_ms: dict[str, float] = {}

    def renew(self, order: Iterable[str]) -> None:
        """Close all, then open them in that order."""
        self.close()
        for name in order:
            started = time.perf_counter()
            self[name] = self._openers[name]()
            self.load_ms[name] = (time.perf_counter() - started) * 1e3

    @property
    def opening_s(self) -> float:
        """What opening all of them took the last time."""
        return sum(self.load_ms.values()) / 1e3

    def close(self) -> None:
        while self:
            self.popitem()[1].close()

    def __enter__(self) -> _Engines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _once(engine: Any, case: Case) -> float:
    feeds = engine.ready(case.feeds)
    started = time.perf_counter()
    engine(feeds)
    return (time.perf_counter() - started) * 1e3


def _shape(
    engines: _Engines,
    case: Case,
    budget_s: float,
    rng: np.random.Generator,
    streams: int,
    references: tuple[str, ...],
) -> ShapeResult:
    deadline = time.perf_counter() + budget_s
    names = list(engines)
    if engines.opening_s <= OPENING * budget_s:
        engines.renew(
            rng.permutation(names).tolist()
        )  # the first opening paid for more than its own
    pace = _pace(engines, case, budget_s / 20)
    openings = int(OPENING * budget_s / max(engines.opening_s, 1e-6))
    renews = openings >= FEWEST
    count = min(SESSIONS, openings) if renews else SESSIONS
    sessions: list[dict[str, list[Block]]] = []
    last_s = 0.0
    while len(sessions) < count:
        started = time.perf_counter()
        left_s = deadline - started
        if left_s <= last_s / 2 and len(sessions) >= FEWEST:
            break
        end = started + left_s / (count - len(sessions))
        if sessions and renews:
            engines.renew(rng.permutation(names).tolist())
            for engine in engines.values():
                _runs(engine, case, min(5, int(30 / pace.ms)))
        sessions.append(_session(engines, case, pace, end, rng, streams))
        last_s = time.perf_counter() - started
    timings = {n: Timing(sessions=tuple(tuple(s[n]) for s in sessions)) for n in names}
    mine = timings["engine"]
    ratios = {n: ratio_of(timing, mine) for n, timing in timings.items() if n != "engine"}
    return ShapeResult(
        case=case,
        timings=timings,
        ratios=ratios,
        references=references,
        openings=len(sessions) if renews else 1,
    )


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """How long a run takes, and how long threads keep working behind the last one: the same for all engines of a shape.

    Blocks of unlike counts, or a rest behind one engine alone, would tell an engine apart from itself where the machine
    is busy.
    """

    ms: float
    rest_s: float

    @property
    def dropped(self) -> int:
        return max(1, min(20, round(DROPPED_MS / self.ms)))

    @property
    def counted(self) -> int:
        return max(1, min(20, round(BLOCK_MS / self.ms)))


def _pace(engines: _Engines, case: Case, budget_s: float) -> _Pace:
    once = [partial(_once, engine, case) for engine in engines.values()]
    speeds = [max(warm_up(run, budget_s), 1e-3) for run in once]
    return _Pace(ms=geometric_mean(speeds), rest_s=max(map(rest, once)))


def rest(once: Callable[[], object]) -> float:
    """Seconds until a process idles after a run: pools of threads spin for a while (libgomp's 5 to 10 ms)."""
    longest, begun = 0.0, time.perf_counter()
    for _ in range(3):
        if time.perf_counter() - begun > 0.1:
            break
        once()
        started, waited = time.perf_counter(), 0.0
        while waited < LONGEST_REST_S:
            worked = time.process_time()
            time.sleep(0.002)
            if time.process_time() - worked < 5e-4:
                break
            waited = time.perf_counter() - started
        longest = max(longest, waited)
    return longest


def _session(
    engines: _Engines,
    case: Case,
    pace: _Pace,
    end: float,
    rng: np.random.Generator,
    streams: int,
) -> dict[str, list[Block]]:
    """Blocks of every engine, one a round, until another round would end nearer behind `end` than before it."""
    blocks: dict[str, list[Block]] = {name: [] for name in engines}
    order: list[str] = []
    for number in itertools.count():
        started = time.perf_counter()
        order = order[::-1] if number % 2 else rng.permutation(list(engines)).tolist()
        for name in order:
            blocks[name].append(_block(engines[name], case, pace, streams))
            time.sleep(pace.rest_s)
        now = time.perf_counter()
        if now + (now - started) / 2 > end:
            break
    return blocks


def _block(engine: Any, case: Case, pace: _Pace, streams: int) -> Block:
    """Counted runs of every stream, the first of each dropped."""

    def runs(_: int) -> list[float]:
        return _runs(engine, case, pace.dropped + pace.counted)[pace.dropped :]

    if streams == 1:
        return tuple(runs(0))
    with ThreadPoolExecutor(streams) as pool:
        return tuple(ms for stream in pool.map(runs, range(streams)) for ms in stream)


def _runs(engine: Any, case: Case, count: int) -> list[float]:
    return [_once(engine, case) for _ in range(count)]


def warm_up(once: Callable[[], float], budget_s: float, window_s: float = 0.02) -> float:
    """Run until a window is no faster than the best before it, or the budget is spent; the last window's median in ms.

    A window is three runs or more that last `window_s`, so that an engine of microseconds warms up for as long.
    """
    deadline = time.perf_counter() + budget_s
    best = math.inf
    while True:
        end = time.perf_counter() + window_s
        window = [once()]
        while (now := time.perf_counter()) < deadline and (len(window) < 3 or now < end):
            window.append(once())
        latest = float(np.median(window))
        if latest > 0.98 * best or time.perf_counter() >= deadline:
            return latest
        best = latest


def ratio_of(reference: Timing, engine: Timing) -> Ratio:
    """Geometric mean over sessions of reference ÷ engine, and its interval; both sides share their sessions."""
    logs = log_ratios(reference, engine)
    found = stats.student(logs, LEVEL)
    return Ratio(ratio=math.exp(logs.mean()), low=math.exp(found.low), high=math.exp(found.high))


def log_ratios(reference: Timing, engine: Timing) -> Array:
    """log(reference ÷ engine) of every session."""
    both = zip(reference.sessions, engine.sessions, strict=True)
    return np.array([_log_ratio(*pair) for pair in both])


def _log_ratio(reference: Sequence[Block], engine: Sequence[Block]) -> float:
    """The median over a session's rounds of log(reference ÷ engine), of the least runs of two blocks side by side.

    What else a machine does only ever adds to a run.
    """
    rounds = [min(a) / min(b) for a, b in zip(reference, engine, strict=True)]
    return float(np.median(np.log(rounds)))


def verdict(low: float, high: float) -> str:
    """What an interval of reference ÷ engine says of the engine, in a printed word."""
    return stats.Interval(low, high, LEVEL).verdict(1.0)


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
