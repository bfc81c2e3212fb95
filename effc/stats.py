"""Intervals and tests for what is measured twice on the same things: shares, differences, ratios of times.

Nothing here knows a model. A share has Wilson's interval, two columns of right and wrong Tango's for their difference
and McNemar's exact test, anything else over samples the paired bootstrap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from effc.errors import UsageError

Array = np.ndarray[Any, np.dtype[Any]]
DRAWS = 2000
AT_ONCE = 1 << 20
"""Numbers that are drawn at a time: a bootstrap stays within a few MB however many samples it has."""

BETTER, WORSE, SAME = "better", "worse", "not distinguishable"


@dataclass(frozen=True)
class Interval:
    """Where a number lies, with that much confidence."""

    low: float
    high: float
    level: float = 0.95

    def verdict(self, null: float = 0.0, *, higher_is_better: bool = True) -> str:
        """`better` or `worse` where the interval leaves out `null`, else `not distinguishable`."""
        if self.low > null:
            return BETTER if higher_is_better else WORSE
        if self.high < null:
            return WORSE if higher_is_better else BETTER
        return SAME


def fewest(level: float) -> int:
    """How many differences there must be before all of one sign can be that sure: 2·2⁻ⁿ ≤ 1 − level."""
    return math.ceil(1 - math.log2(1 - level))


def wilson(hits: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a share (Wilson, JASA 22, 1927): inside 0 and 1, and of use near them.

    The shares p with |hits/n − p| ≤ z·√(p(1 − p)/n).
    """
    if not 0 <= hits <= n or not n:
        raise UsageError(f"{hits} of {n} is no share")
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    middle = (hits + z2 / 2) / (n + z2)
    spread = math.sqrt(z2 * (hits * (n - hits) / n + z2 / 4)) / (n + z2)
    # The ends are exact where nothing or everything is hit, whatever rounding says.
    low = 0.0 if hits == 0 else middle - spread
    high = 1.0 if hits == n else middle + spread
    return Interval(low, high, level)


def paired_shares(first: Array, second: Array, level: float = 0.95) -> Interval:
    """Interval of share(second) − share(first), two columns of right and wrong over the same samples.

    Tango's score interval (Statistics in Medicine 17, 1998): the differences d with |c − b − n·d| ≤ z·√(n·(2q + d −
    d²)), of b samples that only the first gets right and c that only the second does, where q is the likeliest share of
    b under d. Unlike a bootstrap it has a width where the two never differ: z²/(n + z²) to either side.
    """
    from scipy.optimize import brentq

    counts = mcnemar(first, second)
    n, b, c = len(first), counts.only_first, counts.only_second
    if not n:
        raise UsageError("no samples have no share")
    z = NormalDist().inv_cdf((1 + level) / 2)

    def score(d: float) -> float:
        linear = b + c - d * (2 * n + b - c)
        root = max(linear * linear + 8 * n * b * d * (1 - d), 0.0)
        q = (linear + math.sqrt(root)) / (4 * n)
        return (c - b - n * d) / math.sqrt(max(n * (2 * q + d * (1 - d)), 1e-300))

    middle = (c - b) / n
    edge = 1 - 1e-12
    low = -1.0 if score(-edge) < z else brentq(lambda d: score(d) - z, -edge, middle, xtol=1e-9)
    high = 1.0 if score(edge) > -z else brentq(lambda d: score(d) + z, middle, edge, xtol=1e-9)
    return Interval(float(low), float(high), level)


@dataclass(frozen=True)
class McNemar:
    """How many samples only one of two gets right, and the chance of a split that uneven if both were as good."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Array, second: Array) -> McNemar:
    """Exact McNemar test of two columns of right and wrong over the same samples.

    McNemar, Psychometrika 12, 1947; where they differ, either is right with chance 1/2: a binomial test, two-sided
    (Fagerland, Lydersen and Laake, BMC Med Res Methodol 13:91, 2013).
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape:
        raise UsageError(f"columns of {len(a)} and {len(b)} samples cannot be paired")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    return McNemar(only_first, only_second, _sign_test(only_first, only_second))


def _sign_test(plus: int, minus: int) -> float:
    """Two-sided p of a binomial test with chance 1/2."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(plus, minus), plus + minus, 0.5)))


def resample(
    statistic: Callable[[Array], Any],
    n: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    vectorised: bool = False,
) -> Array:
    """What a statistic of samples becomes when n of them are drawn again with replacement: [draws, …].

    `statistic` takes indices [n]; where it is `vectorised` it takes [some draws, n] and gives a value for each row.
    Whatever it computes from one index is paired.
    """
    rng = np.random.default_rng(seed)
    if not vectorised:
        return np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)])
    step = max(1, AT_ONCE // n)
    sizes = [min(step, draws - start) for start in range(0, draws, step)]
    return np.concatenate([np.asarray(statistic(rng.integers(0, n, (s, n)))) for s in sizes])


def percentiles(values: Array, n: int, level: float = 0.95) -> Interval:
    """The middle of resampled values, wide enough for a statistic of n samples.

    Percentile bootstrap (Efron and Tibshirani 1993, ch. 13), expanded: resampling n samples gives a spread that is too
    small by √((n − 1)/n), and tails as if it were known; the quantiles Φ(±√(n/(n − 1))·t) make good for both
    (Hesterberg, The American Statistician 69:4, 2015). Draws without a value, such as a correlation of constants, are
    left out.
    """
    from scipy.special import ndtr, stdtrit

    reach = math.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + level) / 2) if n > 1 else math.inf
    tail = 100 * float(ndtr(-reach))
    low, high = np.nanpercentile(values, [tail, 100 - tail])
    return Interval(float(low), float(high), level)


def student(values: Array, level: float = 0.95) -> Interval:
    """Interval of the mean of a few independent values (Student, Biometrika 6, 1908)."""
    from scipy.special import stdtrit

    n = len(values)
    if n < 2:
        raise UsageError(f"{n} value has no interval")
    reach = float(stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1)) / math.sqrt(n)
    middle = float(values.mean())
    return Interval(middle - reach, middle + reach, level)
