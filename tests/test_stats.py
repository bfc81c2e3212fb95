"""Intervals hold what they say, tests are those of scipy, and chance is not taken for a finding."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle
from scipy.optimize import minimize_scalar

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


def score_off(b, c, n, d):
    """How many standard deviations c − b is from n·d, under the likeliest shares of which d is the difference."""

    def unlikely(q):
        counts = ((b, q), (c, q + d), (n - b - c, 1 - 2 * q - d))
        return -sum(k * np.log(max(p, 1e-300)) for k, p in counts if k)

    ends = max(0.0, -d), (1 - d) / 2
    q = minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12}).x
    return (c - b - n * d) / np.sqrt(n * (2 * q + d - d * d))


@pytest.mark.parametrize(("b", "c", "n"), [(3, 5, 100), (10, 2, 50), (0, 4, 30), (1, 0, 12)])
def test_a_difference_of_shares_ends_where_its_score_is_that_improbable(b, c, n):
    first = np.array([1] * b + [0] * c + [1] * (n - b - c))
    second = np.array([0] * b + [1] * c + [1] * (n - b - c))
    found = stats.paired_shares(first, second)
    z = oracle.norm.ppf(0.975)
    assert score_off(b, c, n, found.low) == pytest.approx(z, abs=1e-3)
    assert score_off(b, c, n, found.high) == pytest.approx(-z, abs=1e-3)


@pytest.mark.parametrize("n", [1, 5, 100, 10_000])
def test_samples_that_never_differ_leave_room_for_a_difference(n):
    same = np.arange(n) % 3 > 0
    found = stats.paired_shares(same, same)
    z2 = oracle.norm.ppf(0.975) ** 2
    assert (found.low, found.high) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-6)


def test_samples_of_which_one_side_gets_all_right_have_an_interval():
    found = stats.paired_shares(np.zeros(40), np.ones(40))
    assert found.low == pytest.approx(1 - oracle.norm.ppf(0.975) ** 2 / 43.84, abs=0.1)
    assert found.high == 1
    turned = stats.paired_shares(np.ones(40), np.zeros(40))
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("share", [0.01, 0.1])
def test_a_difference_of_shares_is_covered_as_often_as_it_says(share):
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(300):
        first = rng.random(150) < 0.8
        second = first ^ (rng.random(150) < share)
        found = stats.paired_shares(first, second)
        covered.append(found.low <= -0.6 * share <= found.high)  # 0.8 of those that differ are lost
    assert np.mean(covered) >= 0.92


# Bootstrap


def test_a_bootstrap_is_the_same_every_time_and_by_rows_the_same_as_one_by_one():
    x = np.random.default_rng(0).normal(size=50)
    one = stats.resample(lambda i: x[i].mean(), 50, seed=3)
    rows = stats.resample(lambda i: x[i].mean(axis=-1), 50, seed=3, vectorised=True)
    np.testing.assert_allclose(one, rows)
    np.testing.assert_array_equal(one, stats.resample(lambda i: x[i].mean(), 50, seed=3))
    assert (one != stats.resample(lambda i: x[i].mean(), 50, seed=4)).any()


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
        drawn = stats.resample(
            lambda i, gap=gap: gap[i].mean(axis=-1), n, draws=400, seed=seed, vectorised=True
        )
        found = stats.percentiles(drawn, n)
        covered.append(found.low <= 0.3 <= found.high)
    assert 0.92 <= np.mean(covered) <= 0.98


def test_a_bootstrap_of_many_samples_is_that_of_scipy():
    x = np.random.default_rng(0).exponential(size=2_000)
    drawn = stats.resample(lambda i: x[i].mean(axis=-1), 2_000, vectorised=True)
    found = stats.percentiles(drawn, 2_000)
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
