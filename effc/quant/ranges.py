"""From a histogram of values to the range that loses least.

The squared error of a grid is integrated over every bin in closed form, the values of a bin taken as evenly spread:

    ∫₀ᵘ (t − k)² dt = k / 12 + (u − k)³ / 3        u = value / step, k = clamp(round(u), lowest, highest)

One formula holds for what lies between two codes, for what is far smaller than a step, and for what is clipped. To
count step² / 12 a value instead was tried: it charges values near zero for rounding that they do not suffer, and
where a few channels are large it clips them (at 4 bits, six times the error of no clipping at all).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from effc.quant.scheme import Scheme

Array = np.ndarray[Any, np.dtype[Any]]

SHARES = np.geomspace(1.0, 0.01, 40)
"""Clip candidates, as shares of the exact ends; the widest first, so that of two equals the wider wins."""
_REFINED = np.linspace(SHARES[0] / SHARES[1], SHARES[1] / SHARES[0], 7)
"""Between two neighbours of `SHARES`."""
_NARROW = 1e-5
"""A bin below this share of a step is a point: its integral would be lost in rounding."""


def mse_range(starts: Array, stops: Array, counts: Array, scheme: Scheme) -> tuple[float, float]:
    """The [low, high] with the least expected squared error, for `counts[i]` samples in `starts[i]` … `stops[i]`.

    Bins ascend, and may leave gaps. Both ends are searched, because a skewed activation wants to lose a tail on one
    side only; the range returned is symmetric where the scheme is.
    """
    kept = counts > 0
    if not kept.any():
        return 0.0, 0.0
    bins = (starts[kept].astype(np.float64), stops[kept].astype(np.float64), counts[kept])
    low, high = min(float(bins[0][0]), 0.0), max(float(bins[1][-1]), 0.0)

    def best(lows: Array, highs: Array) -> tuple[float, float]:
        errors = expected_error(*bins, lows, highs, scheme)
        place = int(np.argmin(errors))
        return float(lows[place]), float(highs[place])

    if scheme.symmetric:
        low, high = -max(-low, high), max(-low, high)
    wide_low, wide_high = low, high
    low, high = best(wide_low * SHARES, wide_high * SHARES)  # together: one end alone may not pay
    if not scheme.symmetric:
        ends = np.append(SHARES, 0.0)
        low, high = best(np.full(ends.shape, low), wide_high * ends)
        low, high = best(wide_low * ends, np.full(ends.shape, high))
    lows, highs = (np.clip(end * _REFINED, wide_low, wide_high) for end in (low, high))
    if scheme.symmetric:
        return best(lows, highs)
    return best(np.repeat(lows, len(highs)), np.tile(highs, len(lows)))


def expected_error(
    starts: Array, stops: Array, counts: Array, lows: Array, highs: Array, scheme: Scheme
) -> Array:
    """The summed squared error of quantising the histogram with each of the ranges [lows[i], highs[i]]."""
    lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
    if scheme.symmetric:
        step = np.maximum(-lows, highs) / scheme.high
        zero = np.zeros_like(step)
    else:
        step = (highs - lows) / (scheme.high - scheme.low)
        zero = np.rint(scheme.low - lows / np.where(step > 0, step, 1.0))
    step = np.where(step > 0, step, 1.0)
    errors = np.empty(len(step))
    for i, (width, rest) in enumerate(zip(step.tolist(), zero.tolist(), strict=True)):
        least, most = scheme.low - rest, scheme.high - rest
        a, b = starts / width, stops / width
        spans = b - a
        points = spans < _NARROW
        whole = _integral(b, least, most) - _integral(a, least, most)
        middle = (a + b) / 2
        at_point = (middle - np.clip(np.rint(middle), least, most)) ** 2
        each = np.where(points, at_point, whole / np.where(points, 1.0, spans))
        errors[i] = float((counts * each).sum()) * width * width
    return errors


def _integral(u: Array, least: float, most: float) -> Array:
    codes = np.clip(np.rint(u), least, most)
    result: Array = codes / 12 + (u - codes) ** 3 / 3
    return result


def percentile_range(values: Array, counts: Array, percentile: float) -> tuple[float, float]:
    """The range that holds `percentile` per cent of the samples, the rest left out evenly at both ends.

    `values` ascend; the ends returned are two of them.
    """
    total = int(counts.sum())
    if not total:
        return 0.0, 0.0
    cumulative = np.cumsum(counts) / total
    tail = (1 - percentile / 100) / 2
    last = len(values) - 1
    low = values[min(int(np.searchsorted(cumulative, tail, side="right")), last)]
    high = values[min(int(np.searchsorted(cumulative, 1 - tail, side="left")), last)]
    return float(low), float(high)
