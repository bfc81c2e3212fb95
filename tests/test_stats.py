"""Intervals hold what they say, tests are those of scipy, and chance is not taken for a finding."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle

from effc import stats
from effc.errors import UsageError
from effc.stats import Interval

LEVELS = st.sampled_from([0.8, 0.95, 0.99])


def shares(most=500):
    return st.integers(1, most).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


# Words


@pytest.mark.parametrize(
    ("interval", "null", "higher", "lower"),
    [
        (Interval(0.1, 0.2), 0, "better", "worse"),
        (Interval(-0.2, -0.1), 0, "worse", "better"),
        (Interval(-0.1, 0.1), 0, "not distinguishable", "not distinguishable"),
        (Interval(0.0, 0.1), 0, "not distinguishable", "not distinguishable"),
        (Interval(0.0, 0.0), 0, "not distinguishable", "not distinguishable"),
        (Interval(1.01, 1.2), 1, "better", "worse"),
        (Interval(0.9, 1.2), 1, "not distinguishable", "not distinguishable"),
        (Interval(math.nan, math.nan), 0, "not distinguishable", "not distinguishable"),
    ],
)
def test_a_verdict_needs_an_interval_that_leaves_out_the_null(interval, null, higher, lower):
    assert interval.verdict(null) == higher
    assert interval.verdict(null, higher_is_better=False) == lower


# Shares


@given(shares(), LEVELS)
def test_wilson_is_that_of_scipy(share, level):
    hits, n = share
    found = stats.wilson(hits, n, level)
    wanted = oracle.binomtest(hits, n).proportion_ci(level, method="wilson")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert 0 <= found.low <= hits / n <= found.high <= 1


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
def test_wilson_covers_a_share_as_often_as_it_says(share):
    """Averaged over neighbouring n, because hits are whole numbers and coverage jumps from n to n."""
    covered = []
    for n in range(60, 100):
        hits = np.arange(n + 1)
        chances = oracle.binom.pmf(hits, n, share)
        inside = [stats.wilson(int(h), n) for h in hits]
        covered.append(
            sum(c for c, i in zip(chances, inside, strict=True) if i.low <= share <= i.high)
        )
    assert 0.94 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_what_is_no_share_has_no_interval(hits, n):
    with pytest.raises(UsageError, match="is no share"):
        stats.wilson(hits, n)


# Right and wrong


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_a_binomial_test_of_what_differs(pairs):
    first, second = np.array(pairs).T
    found = stats.mcnemar(first, second)
    assert found.only_first == sum(a and not b for a, b in pairs)
    assert found.only_second == sum(b and not a for a, b in pairs)
    n = found.only_first + found.only_second
    assert found.p == pytest.approx(oracle.binomtest(found.only_first, n).pvalue if n else 1)


def test_mcnemar_of_many_samples_is_that_of_scipy():
    a, b = np.zeros((2, 10_000), bool)
    a[:2_300], b[2_300:4_800] = True, True
    assert stats.mcnemar(a, b).p == pytest.approx(oracle.binomtest(2_300, 4_800).pvalue)


def test_mcnemar_is_seldom_wrong_where_both_are_as_good():
    rng = np.random.default_rng(0)
    first, second = rng.random((2, 1000, 60)) < 0.7
    false = [stats.mcnemar(a, b).p <= 0.05 for a, b in zip(first, second, strict=True)]
    assert np.mean(false) <= 0.05


def test_samples_that_are_not_the_same_cannot_be_paired():
    with pytest.raises(UsageError, match="3 and 2 samples"):
        stats.mcnemar(np.ones(3), np.ones(2))
    with pytest.raises(UsageError, match="3 and 2 rounds"):
        stats.ratio_of_medians(np.ones((3, 2)), np.ones((2, 2)))


# Bootstrap


def test_a_bootstrap_is_the_same_every_time_and_by_rows_the_same_as_one_by_one():
    x = np.random.default_rng(0).normal(size=50)
    one = stats.paired_bootstrap(lambda i: x[i].mean(), 50, seed=3)
    assert one == stats.paired_bootstrap(lambda i: x[i].mean(axis=-1), 50, seed=3, vectorised=True)
    assert one == stats.paired_bootstrap(lambda i: x[i].mean(), 50, seed=3)
    assert one != stats.paired_bootstrap(lambda i: x[i].mean(), 50, seed=4)


def test_a_bootstrap_by_rows_draws_a_part_at_a_time(monkeypatch):
    x = np.random.default_rng(0).normal(size=50)
    whole = stats.resample(lambda i: x[i].mean(axis=-1), 50, vectorised=True)
    monkeypatch.setattr(stats, "AT_ONCE", 333)
    rows = []

    def mean(index):
        rows.append(len(index))
        return x[index].mean(axis=-1)

    np.testing.assert_allclose(stats.resample(mean, 50, vectorised=True), whole)
    assert set(rows) == {6, 2} and sum(rows) == stats.DRAWS


@pytest.mark.parametrize("n", [10, 40, 150])
def test_a_bootstrap_covers_a_difference_as_often_as_it_says(n):
    """The plain percentile interval covers 90 % at n = 10; see scipy's below."""
    rng = np.random.default_rng(1)
    covered = []
    for seed in range(300):
        hard = rng.normal(size=n)
        gap = (hard + rng.normal(0.3, 0.5, n)) - hard
        found = stats.paired_bootstrap(
            lambda i, gap=gap: gap[i].mean(axis=-1), n, draws=400, seed=seed, vectorised=True
        )
        covered.append(found.low <= 0.3 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_a_bootstrap_of_many_samples_is_that_of_scipy():
    x = np.random.default_rng(0).exponential(size=2_000)
    found = stats.paired_bootstrap(lambda i: x[i].mean(axis=-1), 2_000, vectorised=True)
    wanted = oracle.bootstrap((x,), np.mean, n_resamples=2_000, method="percentile", rng=1)
    bounds = wanted.confidence_interval
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), abs=0.006)


def test_draws_without_a_value_are_left_out():
    found = stats.percentiles(np.array([np.nan, *range(1001)]), 10**6)
    assert (found.low, found.high) == pytest.approx((25, 975), abs=0.1)


def test_seven_of_one_sign_are_had_by_chance_more_often_than_once_in_a_hundred():
    assert [stats.fewest(level) for level in (0.75, 0.95, 0.99)] == [3, 6, 8]
    assert oracle.binomtest(7, 7).pvalue > 0.01 >= oracle.binomtest(8, 8).pvalue


# Times


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=20), LEVELS)
def test_student_is_that_of_scipy(values, level):
    x = np.array(values)
    found = stats.student(x, level)
    spread = max(float(oracle.sem(x)), 1e-12)
    wanted = oracle.t.interval(level, len(x) - 1, loc=x.mean(), scale=spread)
    assert (found.low, found.high) == pytest.approx(wanted, abs=1e-9)


def test_one_value_has_no_interval():
    with pytest.raises(UsageError, match="1 value has no interval"):
        stats.student(np.ones(1))


def rounds(rng, n, ratio=1.0):
    """Two engines in rounds of five runs: what slows a round down slows both."""
    slow = np.exp(0.3 * rng.normal(size=(n, 1)))
    top, bottom = slow * np.exp(0.05 * rng.normal(size=(2, n, 5)))
    return ratio * top, bottom


def test_what_slows_both_sides_of_a_round_cancels():
    top, bottom = rounds(np.random.default_rng(0), 30, ratio=2)
    found = stats.ratio_of_medians(top, bottom)
    alone = stats.ratio_of_medians(top, bottom[np.random.default_rng(1).permutation(30)])
    assert found.low < 2 < found.high
    assert found.high - found.low < (alone.high - alone.low) / 2


def test_a_ratio_of_medians_is_covered_at_least_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = []
    for seed in range(150):
        found = stats.ratio_of_medians(*rounds(rng, 25), level=0.9, draws=300, seed=seed)
        covered.append(found.low <= 1 <= found.high)
    assert np.mean(covered) >= 0.88
