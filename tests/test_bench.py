"""Timing under a clock of our own: what is told apart is different, whatever the machine does meanwhile."""

import itertools
import json
import math

import numpy as np
import pytest

from effc import bench
from effc.bench import Case, Timing, compare, ratio_of, verdict, warm_up


class Clock:
    """A machine in which time passes by what engines take: `slow(now)` is how much slower than usual it is."""

    def __init__(self, seed=0, noise=0.0, slow=lambda now: 1.0):
        self.now, self.rng, self.noise, self.slow = 0.0, np.random.default_rng(seed), noise, slow
        self.worked, self.spins_until = 0.0, 0.0

    def perf_counter(self):
        return self.now

    def process_time(self):
        return self.worked

    def sleep(self, seconds):
        self.worked += max(0.0, min(seconds, self.spins_until - self.now))
        self.now += seconds

    def work(self, ms):
        self.now += ms / 1e3 * self.slow(self.now) * math.exp(self.noise * self.rng.normal())


class Stub:
    """An engine of some milliseconds; what it happens to get when it is opened makes it faster or slower.

    Its first run behind another's takes `cold` times as long, and its threads spin for `spin_s`, in which all others
    take twice as long.
    """

    last = None

    def __init__(self, clock, ms, name="", log=None, open_ms=1.0, luck=0.0, cold=1.0, spin_s=0.0):
        self.clock, self.name, self.cold, self.spin_s = clock, name, cold, spin_s
        self.log = log if log is not None else []
        self.clock.work(open_ms)
        self.ms = ms * math.exp(luck * clock.rng.normal())
        self.log.append(("open", name))

    def __call__(self, feeds):
        self.log.append(("run", self.name))
        first, Stub.last = Stub.last is not self, self
        beside = 2 if first and self.clock.now < self.clock.spins_until else 1
        self.clock.work(self.ms * beside * (self.cold if first else 1))
        self.clock.spins_until = self.clock.now + self.spin_s
        return {}

    def ready(self, feeds):
        return feeds

    def close(self):
        self.log.append(("close", self.name))


CASE = Case(batch=1, length=None, feeds={})


@pytest.fixture
def clock(monkeypatch):
    def make(**options):
        made = Clock(**options)
        monkeypatch.setattr(bench, "time", made)
        return made

    return make


def timed(clock, engine_ms=3.0, reference_ms=3.0, budget_s=8.0, seed=0, **options):
    """One shape of a comparison of two stubs, and what was called on them in order."""
    log = []
    openers = {
        "engine": lambda: Stub(clock, engine_ms, "engine", log, **options),
        "float": lambda: Stub(clock, reference_ms, "float", log, **options),
    }
    (shape,) = compare(openers, [CASE], threads=1, budget_s=budget_s, seed=seed).shapes
    return shape, log


def word(shape):
    ratio = shape.ratios["float"]
    return verdict(ratio.low, ratio.high)


# What is measured


def test_engines_take_turns_in_short_blocks_and_their_first_runs_are_dropped(clock):
    shape, log = timed(clock(), cold=1.5)
    runs = [name for what, name in log if what == "run"]
    changes = sum(a != b for a, b in itertools.pairwise(runs))
    assert changes > len(runs) / 8
    counted = [b for t in shape.timings.values() for session in t.sessions for b in session]
    assert {len(b) for b in counted} == {2}
    assert all(ms == pytest.approx(3.0) for b in counted for ms in b)


def test_nobody_is_timed_while_the_threads_of_another_spin(clock):
    machine = clock()
    openers = {
        "engine": lambda: Stub(machine, 3.0),
        "float": lambda: Stub(machine, 3.0),
        "torch": lambda: Stub(machine, 9.0, spin_s=0.009),
    }
    (shape,) = compare(openers, [CASE], threads=1).shapes
    runs = {name: timing.runs for name, timing in shape.timings.items()}
    assert max(runs["engine"]) == pytest.approx(3.0) == max(runs["float"])
    assert bench.rest(lambda: openers["engine"]()({})) == 0
    assert 0.009 <= bench.rest(lambda: openers["torch"]()({})) <= 0.012


def test_a_machine_that_gets_ever_slower_favours_nobody(clock):
    """A round's order is turned round in the next."""
    shape, _ = timed(clock(slow=lambda now: 1 + now / 4))
    assert shape.ratios["float"].ratio == pytest.approx(1, abs=0.001)


def test_every_session_opens_the_engines_anew(clock):
    shape, log = timed(clock())
    assert len(shape.timings["engine"].sessions) == shape.openings == bench.SESSIONS
    opened = [name for what, name in log if what == "open"]
    assert opened.count("engine") == opened.count("float") == bench.SESSIONS + 1
    assert {tuple(opened[i : i + 2]) for i in range(0, len(opened), 2)} == {
        ("engine", "float"),
        ("float", "engine"),
    }
    assert [w for w, _ in log].count("close") == len(opened)


def test_a_first_opening_that_is_slow_does_not_count(clock):
    """It loads libraries, and may meet a busy moment."""
    slow = iter([500.0, 500.0])
    machine = clock()
    openers = {n: lambda: Stub(machine, 3.0, open_ms=next(slow, 5.0)) for n in ("engine", "float")}
    found = compare(openers, [CASE], threads=1)
    assert found.shapes[0].openings == bench.SESSIONS
    assert found.load_ms["engine"] == pytest.approx(500)


@pytest.mark.parametrize(
    ("open_ms", "sessions", "opened"), [(100, 11, 11), (300, 16, 1), (5_000, 16, 1)]
)
def test_engines_that_are_slow_to_open_are_opened_seldom(clock, open_ms, sessions, opened):
    shape, log = timed(clock(), open_ms=open_ms)
    assert len(shape.timings["engine"].sessions) == sessions
    assert shape.openings == opened
    times = [what for what, _ in log].count("open") / 2
    assert times <= opened + 2


@pytest.mark.parametrize("ms", [0.2, 3.0, 80.0, 170.0])
def test_a_shape_lasts_for_its_budget(clock, ms):
    machine = clock()
    shape, _ = timed(machine, ms, 2 * ms)
    assert machine.now == pytest.approx(8.0, rel=0.15)
    assert shape.ratios["float"].ratio == pytest.approx(2)


def test_an_engine_of_seconds_gets_the_fewest_sessions(clock):
    machine = clock()
    shape, _ = timed(machine, 4_000, 2_000)
    assert len(shape.timings["engine"].sessions) == bench.FEWEST
    assert [len(s) for s in shape.timings["engine"].sessions] == [1] * bench.FEWEST
    assert word(shape) == "worse"


def test_streams_run_at_once_and_all_are_counted():
    openers = {name: lambda: Stub(Clock(), 1.0) for name in ("engine", "float")}
    found = compare(openers, [CASE], threads=1, budget_s=0.05, streams=3)
    (shape,) = found.shapes
    assert {len(b) % 3 for s in shape.timings["engine"].sessions for b in s} == {0}
    assert found.to_json()["streams"] == 3


def test_what_was_opened_is_closed_where_another_fails(clock):
    machine, log = clock(), []

    def fails():
        raise OSError("gone")

    openers = {"engine": lambda: Stub(machine, 1.0, "engine", log), "float": fails}
    with pytest.raises(OSError, match="gone"):
        compare(openers, [CASE], threads=1)
    assert log == [("open", "engine"), ("close", "engine")]


def test_warming_up_lasts_until_it_gets_no_faster(clock):
    machine = clock(slow=lambda now: max(1.0, 3.0 - 20 * now))
    engine = Stub(machine, 1.0)

    def once():
        before = machine.now
        engine({})
        return (machine.now - before) * 1e3

    assert warm_up(once, budget_s=1.0) == pytest.approx(1.0, rel=0.01)
    assert 0.1 < machine.now < 0.3
    assert warm_up(once, budget_s=0.0) == pytest.approx(1.0)


# What is said


def test_the_ratio_is_the_mean_over_sessions_and_its_interval_holds_it():
    ones = ((1.0, 1.0),)
    reference = Timing(sessions=(((2.0, 2.0), (9.0, 2.2), (50.0, 50.0)), ((4.0, 4.0),)))
    found = ratio_of(reference, Timing(sessions=(3 * ones, ones)))
    # of a block the least run, of three rounds the middle one
    assert found.ratio == pytest.approx((2.2 * 4) ** 0.5)
    assert found.low < found.ratio < found.high
    assert found.low * found.high == pytest.approx(found.ratio**2)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1.01, 1.2, "better"),
        (0.8, 0.99, "worse"),
        (0.99, 1.01, "not distinguishable"),
        (1.0, 1.2, "not distinguishable"),
    ],
)
def test_a_verdict_is_one_of_three_words(low, high, said):
    assert verdict(low, high) == said


def test_a_shape_says_what_its_picture_needs(clock):
    shape, _ = timed(clock(noise=0.05), 3.0, 4.5)
    found = json.loads(json.dumps(shape.to_json()))
    assert {"engine_ms", "p95_ms", "n", "reference", "reference_ms", "ratio", "low", "high"} <= set(
        found
    )
    assert found["sessions"] == bench.SESSIONS
    assert set(found["quantiles_ms"]) == {"engine", "float"}
    for name, quantiles in found["quantiles_ms"].items():
        runs = shape.timings[name].runs
        assert len(quantiles) == 41 and quantiles == sorted(quantiles)
        assert (quantiles[0], quantiles[-1]) == pytest.approx((runs.min(), runs.max()), abs=1e-4)
        assert quantiles[20] == pytest.approx(np.median(runs), abs=1e-4)


# How often it is right


def words(clock, repeats, engine_ms=3.0, noise=0.03, slow=lambda now: 1.0, **options):
    found = []
    for seed in range(repeats):
        machine = clock(seed=seed, noise=noise, slow=slow)
        shape, _ = timed(machine, engine_ms, budget_s=2.0, seed=seed, **options)
        found.append(word(shape))
    return found


MACHINES = {
    "quiet": lambda now: 1.0,
    "ever slower": lambda now: 1 + now / 4,
    "half speed in the middle": lambda now: 2.0 if 0.6 < now < 1.3 else 1.0,
    "in waves": lambda now: 1 + 0.2 * math.sin(9 * now),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_an_engine_is_not_told_apart_from_itself(clock, machine):
    assert words(clock, 30, slow=MACHINES[machine]).count("not distinguishable") >= 28


@pytest.mark.parametrize("machine", ["quiet", "ever slower", "half speed in the middle"])
def test_three_percent_are_found(clock, machine):
    assert words(clock, 20, engine_ms=3.09, slow=MACHINES[machine]).count("worse") >= 19


def test_the_luck_of_an_opened_engine_is_no_difference(clock):
    """Rounds of one session share its luck; counted one by one they would be too sure."""
    assert words(clock, 40, luck=0.02).count("not distinguishable") >= 38
