"""How often the words `better` and `worse` of a bench are right, over many comparisons of two engines.

    python benchmarks/verdicts.py --part aa           # an engine against itself: a word is chance
    python benchmarks/verdicts.py --part neighbour    # the same beside a process that keeps core 0 busy
    python benchmarks/verdicts.py --part slowdown     # one layer more than the reference: the word is `worse`
    python benchmarks/verdicts.py --part share        # how much slower that is, measured for long
    python benchmarks/verdicts.py                     # all of it into benchmarks/results/verdicts-FEATURES.json

A part is 100 repeats (`--repeats`) of about ten seconds each; the last two want a quiet machine. Every repeat is kept
with all its runs in `--state`, so that an interrupted part goes on where it was, and other intervals can be tried on
the same runs: the file written says how those would have done. The interval of `effc bench` was chosen among them on
repeats of other seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import nn

from effc import bench, stats
from effc.backends.ort import Ort
from effc.backends.ort_engine import OrtEngine
from effc.ir.trace import trace
from effc.recipe import BenchSpec

LAYERS, WIDTH, ROWS, THREADS = 33, 256, 64, 2
STATE = common.ROOT / "benchmarks" / "state" / "verdicts.jsonl"
REPEATS = 100
FIRST = 50
"""The seed of the first repeat that counts: intervals were chosen on those before it."""
PARTS = ("aa", "neighbour", "slowdown")
ENGINE_MS = (2.0, 5.0)
SHARE = (0.025, 0.035)
"""How much of its time the planted layer is."""
ALLOWED = {"aa": 5, "neighbour": 5}
"""Words that chance may give in 100 repeats."""
WANTED = 90
"""Repeats of 100 that must find the planted layer."""
LONG_S = 120.0

Json = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]


class Stack(nn.Module):
    """Equal layers, so that one more is a known share of the work."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def lower(layers: int, place: Path) -> Path:
    """An engine of that many layers."""
    place.mkdir()
    program = trace(Stack(layers), {"x": torch.zeros(ROWS, WIDTH)})
    return place / str(Ort().lower(program.only(), place).files[0])


SPIN = """
import os, sys, numpy as np
os.sched_setaffinity(0, {0})
a = np.ones((256, 256), np.float32)
while os.getppid() == int(sys.argv[1]):
    a @ a
"""


@contextmanager
def neighbour(wanted: bool) -> Iterator[None]:
    """A process that keeps core 0 busy with matrix products; it ends when this one does, however that ends."""
    if not wanted:
        yield
        return
    alone = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())], env=alone)
    try:
        time.sleep(1)  # until it spins
        yield
    finally:
        process.kill()
        process.wait()


def busy_s() -> float:
    """Seconds that all cores together have worked, for whomever."""
    words = Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:9]
    user, nice, system, _, _, *rest = (int(word) for word in words)
    return float(user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def compared(files: dict[str, Path], seed: int, budget_s: float) -> Json:
    """One comparison, its verdict and all its runs, and how many cores others kept busy meanwhile."""
    openers = {name: partial(OrtEngine, file, threads=THREADS) for name, file in files.items()}
    feeds = {"x": np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)}
    case = bench.Case(batch=ROWS, length=None, feeds=feeds)
    started, busy, mine = time.perf_counter(), busy_s(), time.process_time()
    found = bench.compare(openers, [case], threads=THREADS, budget_s=budget_s, seed=seed)
    seconds = time.perf_counter() - started
    others = (busy_s() - busy - (time.process_time() - mine)) / seconds
    (shape,) = found.shapes
    ratio = shape.ratios["reference"]
    return {
        "seed": seed,
        "seconds": round(seconds, 2),
        "others": round(others, 2),
        "openings": shape.openings,
        "ratio": ratio.ratio,
        "low": ratio.low,
        "high": ratio.high,
        "verdict": bench.verdict(ratio.low, ratio.high),
        "runs": {
            name: [[[round(ms, 4) for ms in block] for block in s] for s in timing.sessions]
            for name, timing in shape.timings.items()
        },
    }


def rows_of(state: Path, part: str) -> list[Json]:
    """What was measured of a part under these very settings; a line that a kill cut short is left out."""
    lines = state.read_text(encoding="utf-8").splitlines() if state.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    mine = [row for row in rows if row["part"] == part and row["settings"] == settings()]
    return [row for row in mine if part == "share" or row["seed"] >= FIRST]


def settings() -> Json:
    return {
        "layers": LAYERS, "width": WIDTH, "rows": ROWS, "threads": THREADS,
        "budget_s": BenchSpec().budget_s, "sessions": bench.SESSIONS, "opening": bench.OPENING,
        "dropped_ms": bench.DROPPED_MS,
        "block_ms": bench.BLOCK_MS, "cpu": bench.cpu_name(),
    }  # fmt: skip


def measure(part: str, repeats: int, state: Path) -> None:
    """Repeats of a part that are not in the state yet, each put there when it is done."""
    done = {row["seed"] for row in rows_of(state, part)}
    seeds = range(1) if part == "share" else range(FIRST, FIRST + repeats)
    todo = [seed for seed in seeds if seed not in done]
    if not todo:
        return
    state.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="effc-verdicts-") as place,
        neighbour(part == "neighbour"),
        state.open("a", encoding="utf-8") as stream,
    ):
        plain = lower(LAYERS, Path(place) / "plain")
        more = lower(LAYERS + 1, Path(place) / "more") if part in ("slowdown", "share") else plain
        files = {"reference": plain, "engine": more}
        budget_s = LONG_S if part == "share" else BenchSpec().budget_s
        for seed in todo:
            row = {"part": part, "settings": settings(), **compared(files, seed, budget_s)}
            print(f"\n{json.dumps(row)}", file=stream, flush=True)
            words = f"{row['ratio']:.4f} [{row['low']:.4f}, {row['high']:.4f}] {row['verdict']}"
            print(f"{part} {seed}: {words}, others {row['others']:.2f} cores", flush=True)


def said(row: Json) -> bench.Ratio:
    """What the bench says of a row's runs today, which may be in other words than when they were measured."""
    timings = {
        name: bench.Timing(sessions=tuple(tuple(map(tuple, s)) for s in sessions))
        for name, sessions in row["runs"].items()
    }
    return bench.ratio_of(timings["reference"], timings["engine"])


def summary(rows: list[Json]) -> Json:
    """Words of a part, and how wide its intervals are and how long they took, in the middle."""
    ratios = [said(row) for row in rows]
    words = [bench.verdict(ratio.low, ratio.high) for ratio in ratios]
    medians = [
        np.median([ms for s in row["runs"]["engine"] for b in s for ms in b]) for row in rows
    ]
    return {
        "n": len(rows),
        **{word: words.count(word) for word in (stats.BETTER, stats.WORSE, stats.SAME)},
        "engine_ms": round(float(np.median(medians)), 3),
        "half_width": round(float(np.median([(r.high / r.low) ** 0.5 - 1 for r in ratios])), 5),
        "seconds": round(float(np.median([row["seconds"] for row in rows])), 2),
        "others": round(float(np.median([row["others"] for row in rows])), 2),
        "openings": round(float(np.median([row["openings"] for row in rows]))),
    }


# Other intervals from the same runs, all of log(reference ÷ engine).

Sessions = list[list[list[float]]]
Estimator = Callable[[Sessions, Sessions], stats.Interval]


def _pooled(reference: Sessions, engine: Sessions, *, together: bool) -> stats.Interval:
    """Ratio of the medians of all runs, blocks drawn again: the same of both sides, or of each side for itself."""
    top, bottom = (np.array([block for s in side for block in s]) for side in (reference, engine))
    if together:
        found = stats.percentiles(_ratios(top, bottom), len(top), bench.LEVEL)
    else:
        rng = np.random.default_rng(0)
        above, below = (
            np.median(t[rng.integers(0, len(t), (1000, len(t)))].reshape(1000, -1), axis=1)
            for t in (top, bottom)
        )
        found = stats.percentiles(above / below, len(top), bench.LEVEL)
    return stats.Interval(float(np.log(found.low)), float(np.log(found.high)), bench.LEVEL)


def _ratios(top: Array, bottom: Array) -> Array:
    """median(top) ÷ median(bottom), both [rounds, runs], of rounds drawn again, and for both the same.

    Block bootstrap (Künsch, Ann. Statist. 17, 1989): runs of a round resemble each other.
    """

    def ratio(index: Array) -> Array:
        above, below = (np.median(t[index].reshape(len(index), -1), axis=1) for t in (top, bottom))
        return np.asarray(above / below)

    return stats.resample(ratio, len(top), draws=1000, vectorised=True)


def _rounds(reference: Sessions, engine: Sessions, block: Any) -> list[Array]:
    """The log ratio of every round, by session; `block` makes one number of a block's runs."""
    return [
        np.log([block(a) / block(b) for a, b in zip(*both, strict=True)])
        for both in zip(reference, engine, strict=True)
    ]


def _by_rounds(reference: Sessions, engine: Sessions) -> stats.Interval:
    return stats.student(np.concatenate(_rounds(reference, engine, np.median)), bench.LEVEL)


def _by_session(session: Any, block: Any, reference: Sessions, engine: Sessions) -> stats.Interval:
    middles = [float(session(logs)) for logs in _rounds(reference, engine, block)]
    return stats.student(np.array(middles), bench.LEVEL)


def _middle_of_pairs(logs: Array) -> float:
    """Median of the means of all pairs (Hodges and Lehmann, Ann. Math. Statist. 34, 1963)."""
    first, second = np.triu_indices(len(logs))
    return float(np.median((logs[first] + logs[second]) / 2))


ESTIMATORS: dict[str, Estimator] = {
    "ratio of medians, blocks of either side drawn": partial(_pooled, together=False),
    "ratio of medians, rounds drawn": partial(_pooled, together=True),
    "Student over rounds": _by_rounds,
    "Student over sessions, mean of rounds": partial(_by_session, np.mean, np.median),
    "Student over sessions, median of rounds": partial(_by_session, np.median, np.median),
    "Student over sessions, Hodges-Lehmann of rounds": partial(
        _by_session, _middle_of_pairs, np.median
    ),
    "Student over sessions, median of rounds, a block's least run": partial(
        _by_session, np.median, np.min
    ),
}


def estimators(parts: dict[str, list[Json]]) -> Json:
    """By estimator and part: how many verdicts, how many `worse`, and how wide an interval is in the middle."""
    found: Json = {}
    for name, estimator in ESTIMATORS.items():
        found[name] = {}
        for part, rows in parts.items():
            bounds = [estimator(row["runs"]["reference"], row["runs"]["engine"]) for row in rows]
            words = [bound.verdict() for bound in bounds]
            found[name][part] = {
                "n": len(words),
                "words": sum(word != stats.SAME for word in words),
                "worse": words.count(stats.WORSE),
                "half_width": round(float(np.median([b.high - b.low for b in bounds])) / 2, 5),
            }
    return found


def missed(parts: dict[str, Json]) -> list[str]:
    """What the words should have been and were not, and what was not measured as it should be."""
    found = [
        f"{name}: {parts.get(name, {'n': 0})['n']} of {REPEATS} repeats are there"
        for name in PARTS
        if parts.get(name, {"n": 0})["n"] < REPEATS
    ]
    low, high = ENGINE_MS
    if "slowdown" in parts and not low <= (ms := parts["slowdown"]["engine_ms"]) <= high:
        found.append(f"slowdown: an engine takes {ms} ms, not {low} to {high}")
    for name, part in parts.items():
        words = part[stats.BETTER] + part[stats.WORSE]
        if name in ALLOWED and words > ALLOWED[name] * part["n"] / 100:
            found.append(f"{name}: {words} of {part['n']} are told apart from themselves")
        if name == "slowdown" and part[stats.WORSE] < WANTED * part["n"] / 100:
            found.append(f"{name}: found in {part[stats.WORSE]} of {part['n']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS, "share"])
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--state", type=Path, default=STATE)
    options = parser.parse_args()
    if options.part:
        measure(options.part, options.repeats, options.state)
        return 0
    rows = {name: rows_of(options.state, name) for name in PARTS}
    rows = {name: found for name, found in rows.items() if found}
    parts = {name: summary(found) for name, found in rows.items()}
    content: Json = {"name": "verdicts", "settings": settings(), "long_s": LONG_S, "parts": parts}
    for row in rows_of(options.state, "share"):
        content["share"] = {n: round(v, 5) for n, v in dataclasses.asdict(said(row)).items()}
    content["estimators"] = estimators(rows)
    for name, by_part in content["estimators"].items():
        print(f"{name:60}", by_part)
    print(common.write(f"verdicts-{common.features()}", content))
    for name, part in parts.items():
        print(name, part)
    print("share", content.get("share", "not measured"))
    failed = missed(parts)
    share = content.get("share")
    if share is None or not SHARE[0] <= 1 - share["ratio"] <= SHARE[1]:
        failed.append(f"share: {share}, not {SHARE[0]} to {SHARE[1]} slower")
    for text in failed:
        print(f"MISSED: {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
