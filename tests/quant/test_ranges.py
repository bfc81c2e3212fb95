"""The range from a histogram loses about as little as the best that trying finds on the values themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effc.quant.affine import fake_quantize, qparams
from effc.quant.ranges import expected_error, mse_range, percentile_range
from effc.quant.scheme import Scheme

pytestmark = pytest.mark.slow

UINT8 = Scheme(signed=False, symmetric=False)
SYMMETRIC = [Scheme(bits=b) for b in (4, 6, 8)]
SCHEMES = [*SYMMETRIC, *(Scheme(bits=b, signed=False, symmetric=False) for b in (4, 6, 8))]


def stories() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator)
    place = torch.arange(len(x))
    return {
        "normal": x,
        "skewed": torch.exp(x) - 0.2,
        "relu": torch.relu(x),
        "gelu": torch.nn.functional.gelu(2 * x),
        "rare outliers": torch.where(place % 5000 == 7, 60 * x, x),
        "one large channel": torch.where(place % 384 == 7, 40 * x, 0.5 * x),
        "probabilities": torch.softmax(3 * x.reshape(-1, 100), -1).reshape(-1),
    }


def histogram(x: torch.Tensor, bins: int = 4000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts, edges = np.histogram(x.double().numpy(), bins)
    return edges[:-1], edges[1:], counts


def squared_error(x: torch.Tensor, low: float, high: float, scheme: Scheme) -> float:
    scale, zero = qparams(torch.tensor(low), torch.tensor(high), scheme)
    return float((fake_quantize(x, scale, zero, scheme) - x).double().square().sum())


def least_by_trying(x: torch.Tensor, scheme: Scheme) -> float:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    shares = np.geomspace(0.02, 1, 14).tolist()
    if scheme.symmetric:
        end = max(-low, high)
        return min(squared_error(x, -end * s, end * s, scheme) for s in shares)
    lows = shares if low < 0 else [1.0]
    return min(squared_error(x, low * a, high * b, scheme) for a in lows for b in shares)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}{'s' if s.symmetric else 'a'}")
@pytest.mark.parametrize("story", stories())
def test_the_range_is_as_good_as_the_best_that_trying_finds(story, scheme):
    x = stories()[story]
    found = squared_error(x, *mse_range(*histogram(x), scheme), scheme)
    assert found <= 1.05 * least_by_trying(x, scheme)
    low, high = float(x.min()), float(x.max())
    assert found <= 1.01 * squared_error(x, low, high, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}{'s' if s.symmetric else 'a'}")
def test_the_expected_error_of_a_bin_is_that_of_values_spread_over_it(scheme):
    starts, stops = np.array([-2.0, -0.011, 0.3, 4.0]), np.array([-0.5, 0.002, 0.3, 5.0])
    counts = np.array([3, 50, 7, 2])
    low, high = -1.0, 3.3
    expected = 0.0
    for a, b, count in zip(starts, stops, counts, strict=True):
        values = torch.linspace(float(a), float(b), 20_001, dtype=torch.float64)
        expected += count * squared_error(values, low, high, scheme) / len(values)
    (found,) = expected_error(starts, stops, counts, np.array([low]), np.array([high]), scheme)
    assert found == pytest.approx(expected, rel=2e-3)


def test_values_below_half_a_step_do_not_pull_the_range_in():
    """A few large channels carry the signal; the rest would be zero on either grid."""
    x = stories()["one large channel"]
    scheme = Scheme(bits=4)
    low, high = mse_range(*histogram(x, 20_000), scheme)
    assert high > 0.6 * float(x.abs().max()) and low == -high


def test_a_tail_on_one_side_is_cut_on_that_side_only():
    x = torch.cat([stories()["normal"].abs().neg().clamp(min=-1.0), torch.tensor([50.0])])
    low, high = mse_range(*histogram(x, 20_000), Scheme(bits=4, signed=False, symmetric=False))
    assert low < -0.8
    assert high < 25


@given(st.integers(0, 10_000), st.sampled_from(SCHEMES))
def test_a_range_lies_within_the_ends_and_holds_zero(seed, scheme):
    rng = np.random.default_rng(seed)
    edges = np.sort(rng.normal(size=9)) * 10.0 ** rng.integers(-6, 6)
    counts = rng.integers(0, 5, size=8)
    low, high = mse_range(edges[:-1], edges[1:], counts, scheme)
    assert low <= 0 <= high
    largest = max(abs(edges[0]), abs(edges[-1]))
    assert -largest <= low and high <= largest
    if scheme.symmetric:
        assert low == -high


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s.bits}{'s' if s.symmetric else 'a'}")
def test_nothing_and_zeros_have_the_range_of_zero(scheme):
    nothing = np.zeros(0)
    assert mse_range(nothing, nothing, np.zeros(0, np.int64), scheme) == (0.0, 0.0)
    zero = np.zeros(1)
    assert mse_range(zero, zero, np.array([5]), scheme) == (0.0, 0.0)


@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=60),
    st.sampled_from([50.0, 90.0, 99.0, 99.99, 100.0]),
)
def test_a_percentile_range_leaves_out_no_more_than_it_may(values, percentile):
    centres, counts = np.unique(np.array(values, np.float64), return_counts=True)
    low, high = percentile_range(centres, counts, percentile)
    tail = (1 - percentile / 100) / 2
    array = np.array(values)
    assert (array < low).mean() <= tail + 1e-9
    assert (array > high).mean() <= tail + 1e-9
    if percentile == 100:
        assert (low, high) == (array.min(), array.max())


def test_the_percentile_of_nothing_is_zero():
    assert percentile_range(np.zeros(0), np.zeros(0, np.int64), 99.0) == (0.0, 0.0)
