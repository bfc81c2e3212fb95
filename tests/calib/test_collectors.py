"""Collectors see a stream as they would see all of it at once, and forget nothing that they promise to keep."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effc.calib.collectors import (
    COLLECTORS,
    Directions,
    Gram,
    LeastSquares,
    LogHistogram,
    MinMax,
    Moments,
    Percentile,
    Rows,
)
from effc.errors import CalibrationError
from effc.quant.affine import fake_quantize, qparams
from effc.quant.scheme import Scheme

KINDS = [MinMax, LogHistogram, LeastSquares, Percentile, Moments]
EXACT = [MinMax, LogHistogram, LeastSquares, Percentile]
UINT8 = Scheme(signed=False, symmetric=False)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.floats(-1e3, 1e3, width=32)
STREAMS = st.lists(st.lists(SMALL, max_size=12), min_size=1, max_size=5)


def seen(kind, *parts):
    made = kind()
    for part in parts:
        made.update(torch.as_tensor(part, dtype=torch.float32).reshape(-1, 1))
    return made


def same(a, b) -> bool:
    x, y = a.state(), b.state()
    return x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
@given(parts=STREAMS)
def test_merging_is_seeing_everything_in_any_order(kind, parts):
    whole = seen(kind, *parts)
    forward, backward = kind(), kind()
    for part in parts:
        forward = forward.merge(seen(kind, part))
        backward = seen(kind, part).merge(backward)
    assert same(whole, forward) and same(whole, backward)
    assert whole.range(UINT8) == backward.range(UINT8)


@pytest.mark.parametrize("kind", EXACT)
@given(a=st.lists(SMALL), b=st.lists(SMALL), c=st.lists(SMALL))
def test_merging_is_associative(kind, a, b, c):
    x, y, z = (seen(kind, part) for part in (a, b, c))
    assert same(x.merge(y).merge(z), x.merge(y.merge(z)))


@given(parts=STREAMS)
def test_moments_merge_to_those_of_everything(parts):
    merged = Moments()
    for part in reversed(parts):
        merged = seen(Moments, part).merge(merged)
    values = np.array([v for part in parts for v in part], np.float64)
    assert merged.count == len(values)
    if not len(values):
        return
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    assert merged.mean[0] == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert merged.variance[0] == pytest.approx(variance, rel=1e-9, abs=1e-6)
    assert (merged.low[0], merged.high[0]) == (values.min(), values.max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_leaves_both_sides_as_they_were(kind):
    for other in ([3.0], []):
        a, b = seen(kind, [1.0, 2.0]), seen(kind, other)
        before = seen(kind, [1.0, 2.0]), seen(kind, other)
        made = a.merge(b)
        made.update(torch.tensor([[100.0]]))
        assert same(a, before[0]) and same(b, before[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_through_a_file_without_pickle(kind):
    made = seen(kind, [1.0, -2.5, 0.0], [7.0])
    file = io.BytesIO()
    np.savez(file, **made.state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as state:
        back = kind.from_state(dict(state))
    assert same(made, back)
    back.update(torch.tensor([[9.0]]))
    made.update(torch.tensor([[9.0]]))
    assert same(made, back)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_does_not_grow(kind):
    made = kind()
    made.update(normal(10, 4))
    size = sum(array.nbytes for array in made.state().values())
    for seed in range(20):
        made.update(normal(10, 4, seed=seed) * 10.0**seed)
    assert sum(array.nbytes for array in made.state().values()) == size


@pytest.mark.parametrize("kind", KINDS)
def test_padded_positions_are_left_out(kind):
    x = normal(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x[~mask] = 1e9
    masked, alone = kind(), kind()
    masked.update(x, mask)
    alone.update(torch.cat([x[0, :2], x[1, :1]]))
    assert same(masked, alone)
    whole_numbers = kind()
    whole_numbers.update(x, mask.long())
    assert same(masked, whole_numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_padding_adds_nothing(kind):
    made = kind()
    made.update(torch.full((2, 3), float("nan")), torch.zeros(2, dtype=torch.bool))
    made.update(torch.zeros(0, 3))
    assert same(made, kind())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_what_is_not_a_number_is_refused_and_not_counted(kind, bad, place):
    made = seen(kind, [1.0])
    x = normal(1000, 1)
    x[place] = bad
    with pytest.raises(CalibrationError, match="not a number"):
        made.update(x)
    assert same(made, seen(kind, [1.0]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "x",
    [
        torch.tensor([[1, -2], [3, 4]]),
        torch.tensor([[1.0, -2.0], [3.0, 4.0]], dtype=torch.bfloat16),
        torch.tensor([[1.0, 3.0], [-2.0, 4.0]]).T,
        torch.tensor([[1.0, -2.0], [3.0, 4.0]], requires_grad=True),
        torch.tensor([[1.0, -2.0, 9.0], [3.0, 4.0, 9.0]])[:, :2],
    ],
    ids=["int", "bfloat16", "transposed", "grad", "slice"],
)
def test_every_kind_of_tensor_counts_alike(kind, x):
    plain = kind()
    plain.update(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
    made = kind()
    made.update(x)
    assert same(made, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_number_is_a_tensor(kind):
    made = kind()
    made.update(torch.tensor(3.0))
    assert same(made, seen(kind, [3.0]))


@pytest.mark.parametrize("kind", EXACT)
def test_having_seen_nothing_is_the_range_of_zero(kind):
    assert kind().range(UINT8) == (0.0, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_nothing(kind):
    x, threads = normal(64, 5000), torch.get_num_threads()
    made = []
    for count in (1, 2):
        torch.set_num_threads(count)
        made.append(kind())
        made[-1].update(x)
    torch.set_num_threads(threads)
    assert same(*made)


@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_every_value_lies_in_a_bin_of_its_own_size(values):
    made = seen(LogHistogram, values)
    starts, stops, counts = made.bins()
    assert counts.sum() == len(values)
    assert (starts <= stops).all() and (stops[:-1] <= starts[1:]).all()
    for value in values:
        float32 = float(np.float32(value))
        assert ((starts <= float32) & (float32 <= stops)).any() or abs(float32) < 1.2e-38
    normal_bins = np.abs(np.maximum(np.abs(starts), np.abs(stops))) > 2e-38
    widths = (stops - starts)[normal_bins]
    least = np.minimum(np.abs(starts), np.abs(stops))[normal_bins]
    assert (widths <= least / 32 + 1e-45).all()


def test_counts_agree_with_a_loop():
    values = (normal(3000) * 10 ** normal(3000, seed=1)).tolist()
    starts, stops, counts = seen(LogHistogram, values).bins()
    for start, stop, count in zip(starts, stops, counts, strict=True):
        # An edge belongs to the bin farther from zero; the exact ends belong to theirs.
        if start >= 0:
            inside = [v for v in values if start <= v < stop or v == stop == max(values)]
        else:
            inside = [v for v in values if start < v <= stop or v == start == min(values)]
        assert len(inside) == count


@given(
    st.integers(0, 1000),
    st.sampled_from([50.0, 90.0, 99.0, 99.9]),
    st.integers(-20, 20),
)
def test_a_percentile_is_within_a_64th_of_the_true_one(seed, percentile, magnitude):
    x = normal(2000, seed=seed) * 10.0**magnitude
    made = Percentile(percentile)
    made.update(x)
    low, high = made.range(UINT8)
    tail = (1 - percentile / 100) / 2
    values = np.sort(x.double().numpy())
    for found, share in ((low, tail), (high, 1 - tail)):
        place = share * len(values)
        near = values[max(int(place) - 2, 0) : int(place) + 2]  # either neighbour is a percentile
        assert np.abs(found - near).min() <= np.abs(near).max() / 64


def test_a_percentile_leaves_an_outlier_out():
    made = Percentile(99.9)
    made.update(torch.cat([normal(100_000), torch.tensor([1e6])]))
    low, high = made.range(UINT8)
    assert -4 < low < -2.5 and 2.5 < high < 4
    assert made.merge(made).percentile == Percentile.from_state(made.state()).percentile == 99.9


@pytest.mark.parametrize("percentile", [0.0, -1.0, 100.1, float("nan")])
def test_a_percentile_that_is_none_is_refused(percentile):
    with pytest.raises(ValueError, match="percentile"):
        Percentile(percentile)


@pytest.mark.parametrize("scheme", [Scheme(bits=b) for b in (4, 8)] + [UINT8])
def test_least_squares_loses_less_than_the_ends_and_than_a_percentile(scheme):
    x = normal(40_000) ** 3

    def error(collector):
        collector.update(x)
        low, high = (torch.tensor(end) for end in collector.range(scheme))
        scale, zero = qparams(low, high, scheme)
        return float((fake_quantize(x, scale, zero, scheme) - x).square().sum())

    least = error(LeastSquares())
    assert least <= 1.01 * min(error(MinMax()), *(error(Percentile(p)) for p in (99, 99.9, 99.99)))


def test_moments_are_per_channel_and_pool_to_the_whole():
    x = normal(3, 50, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(4)
    made = Moments()
    for part in x:
        made.update(part)
    rows = x.reshape(-1, 4).double().numpy()
    assert made.count == 150
    np.testing.assert_allclose(made.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(made.variance, rows.var(0), rtol=1e-12)
    np.testing.assert_array_equal((made.low, made.high), (rows.min(0), rows.max(0)))
    whole = made.whole()
    assert whole.count == 600
    np.testing.assert_allclose(whole.mean, [rows.mean()], rtol=1e-12)
    np.testing.assert_allclose(whole.variance, [rows.var()], rtol=1e-12)
    assert (whole.low, whole.high) == (rows.min(), rows.max())
    assert same(Moments().whole(), Moments())


def test_moments_of_large_numbers_keep_their_variance():
    made = Moments()
    for seed in range(5):
        made.update((normal(1000, 2, seed=seed) + 4096).float())
    assert made.variance == pytest.approx([1.0, 1.0], abs=0.1)


def test_moments_refuse_another_number_of_channels():
    made = Moments()
    made.update(normal(5, 4))
    with pytest.raises(CalibrationError, match="4 channels, and now has 1"):
        made.update(normal(5, 1))


def test_the_table_has_the_words_of_a_recipe():
    assert list(COLLECTORS) == ["minmax", "mse", "percentile"]
    assert [COLLECTORS[word] for word in COLLECTORS] == [MinMax, LeastSquares, Percentile]
    with pytest.raises(CalibrationError, match="did you mean 'minmax'"):
        COLLECTORS["min_max"]


def test_a_gram_matrix_is_the_same_however_the_rows_were_divided():
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = Gram(), Gram()
    whole.update(x.reshape(3, 20, 8))
    for part in x.split(7):
        fresh = Gram()
        fresh.update(part)
        parts = parts.merge(fresh)
    assert whole.count == parts.count == 60
    assert torch.allclose(whole.matrix(), x.double().T @ x.double(), rtol=1e-12)
    assert torch.allclose(whole.matrix(), parts.matrix(), rtol=1e-12)
    assert torch.allclose(parts.magnitudes(), x.abs().double().mean(0), rtol=1e-12)


def test_a_gram_matrix_leaves_padding_out_and_refuses_what_is_no_number():
    x, mask = torch.ones(2, 3, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    seen = Gram()
    seen.update(x, mask)
    assert seen.count == 3 and bool((seen.matrix() == 3).all())
    with pytest.raises(CalibrationError, match="not a number"):
        seen.update(torch.full((1, 4), float("nan")))
    blind = Gram()
    blind.update(x, torch.zeros(2, 3))
    with pytest.raises(CalibrationError, match="nothing but padding"):
        blind.matrix()


def test_directions_count_long_rows_as_short_ones():
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    lengths = torch.logspace(-3, 3, 30)[:, None]
    plain, long = Directions(), Directions()
    plain.update(rows)
    long.update((rows * lengths).reshape(3, 10, 5))
    assert torch.allclose(plain.matrix(), long.matrix(), rtol=1e-5, atol=1e-5)
    assert plain.matrix().trace() == pytest.approx(30 * 5)


def test_a_row_of_nothing_has_no_direction():
    seen = Directions()
    seen.update(torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([True, True]))
    assert seen.count == 2 and seen.matrix().trace() == pytest.approx(2)
    with pytest.raises(CalibrationError):
        seen.update(torch.tensor([[float("inf"), 1.0]]))


def test_a_sample_of_rows_is_of_fixed_size_and_holds_out_every_second_sample():
    seen, other = Rows(64), Rows(64, seed=1)
    for part in (seen, other):
        for batch in range(8):
            x = torch.zeros(4, 10, 3)
            x[:] = torch.arange(4.0).reshape(4, 1, 1) + 4 * batch
            part.update(x)
    made = seen.merge(other)
    for rows in (seen, other, made):
        chosen, held = rows.parts()
        assert len(chosen) + len(held) == 64 and rows.rows.shape == (64, 3)
        assert bool((chosen[:, 0] % 2 == 0).all()) and bool((held[:, 0] % 2 == 1).all())
    assert (made.count, made.samples) == (640, 64)
    assert torch.equal(made.places, torch.cat([seen.places, other.places]).sort().values[:64])
    again = other.merge(seen)
    assert torch.equal(made.rows, again.rows)


def test_no_row_at_all_is_refused():
    seen = Rows(8)
    seen.update(torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(CalibrationError, match="padding"):
        seen.parts()
