"""From a histogram of values to the range that loses least.

The error of a range is that of its own grid: rounding, about step² / 12 a value inside, and clipping outside. Both
ends are searched, because a skewed activation wants to lose a tail on one side only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from effc.quant.scheme import Scheme

Array = np.ndarray[Any, np.dtype[Any]]

CANDIDATES = 48


def mse_range(values: Array, counts: Array, scheme: Scheme) -> tuple[float, float]:
    """The [low, high] with the least expected squared error, for `counts[i]` samples at `values[i]` (ascending).

    The rounding error of a value is taken as uniform over a step, so that a coarse histogram does not favour grids
    that happen to hit its centres.
    """
    kept = counts > 0
    values, counts = values[kept].astype(np.float64), counts[kept].astype(np.float64)
    if not len(values):
        return 0.0, 0.0
    low, high = min(float(values[0]), 0.0), max(float(values[-1]), 0.0)
    if scheme.symmetric:
        largest = max(-low, high)
        ends = largest * _shares()
        errors = [_error(values, counts, -e, e, scheme) for e in ends]
        best = float(ends[int(np.argmin(errors))])
        return -best, best
    best_low, best_high = low, high
    for _ in range(3):  # one end at a time: the error is nearly separable
        highs = np.unique(best_low + (high - best_low) * _shares()) if high > 0 else np.array([0.0])
        highs = highs[highs >= 0]
        best_high = float(
            highs[int(np.argmin([_error(values, counts, best_low, h, scheme) for h in highs]))]
        )
        lows = low * _shares() if low < 0 else np.array([0.0])
        best_low = float(
            lows[int(np.argmin([_error(values, counts, lo, best_high, scheme) for lo in lows]))]
        )
    return best_low, best_high


def _shares() -> Array:
    return np.geomspace(0.02, 1.0, CANDIDATES)


def _error(values: Array, counts: Array, low: float, high: float, scheme: Scheme) -> float:
    step = (high - low) / (scheme.high - scheme.low)
    inside = (values >= low) & (values <= high) & (values != 0.0)
    clipped = values - np.clip(values, low, high)
    return float((counts * clipped**2).sum() + counts[inside].sum() * step * step / 12)


def percentile_range(values: Array, counts: Array, percentile: float) -> tuple[float, float]:
    """The range that holds `percentile` per cent of the samples, the rest left out evenly at both ends."""
    total = counts.sum()
    if not total:
        return 0.0, 0.0
    cumulative = np.cumsum(counts) / total
    tail = (1 - percentile / 100) / 2
    low = values[int(np.searchsorted(cumulative, tail, side="right").clip(0, len(values) - 1))]
    high = values[int(np.searchsorted(cumulative, 1 - tail, side="left").clip(0, len(values) - 1))]
    return float(low), float(high)
