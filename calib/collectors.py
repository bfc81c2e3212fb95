"""Fixed-size statistics of a stream of tensors.

Each has an exact `merge`: two collectors that saw half the data each become the one that saw it all, in any order, so
results do not depend on how work was divided. Sums are integers, or float64 in a fixed order.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from effc.errors import CalibrationError
from effc.quant.ranges import mse_range, percentile_range
from effc.quant.scheme import Scheme
from effc.table import Table

Array = np.ndarray[Any, np.dtype[Any]]

COLLECTORS = Table(
    "range method",
    {
        "minmax": "effc.calib.collectors:MinMax",
        "mse": "effc.calib.collectors:LeastSquares",
        "percentile": "effc.calib.collectors:Percentile",
    },
    error=CalibrationError,
)

MANTISSA_BITS = 5
"""Bins per power of two, as bits: 32 bins, so a bin's ends differ by at most 1/32 of its value."""
_SHIFT = 23 - MANTISSA_BITS
_BINS = 1 << (8 + MANTISSA_BITS)


def _values(x: Tensor, mask: Tensor | None) -> Tensor:
    """The values to count as one float32 vector. Raises CalibrationError where one is not a number."""
    if mask is not None:
        x = x[mask]
    flat = x.detach().reshape(-1).to(torch.float32)
    if flat.numel() and not bool(torch.isfinite(flat).all()):
        raise CalibrationError(
            "a value that is not a number was met in calibration",
            hint="check the calibration data and the weights",
        )
    return flat


class MinMax:
    """The smallest and the largest value."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        values = _values(x, mask)
        if values.numel():
            low, high = torch.aminmax(values)
            self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def merge(self, other: Self) -> Self:
        made = type(self)()
        made.low, made.high = min(self.low, other.low), max(self.high, other.high)
        return made

    def state(self) -> dict[str, Array]:
        return {"ends": np.array([self.low, self.high])}

    @classmethod
    def from_state(cls, state: dict[str, Array]) -> Self:
        made = cls()
        made.low, made.high = (float(v) for v in state["ends"])
        return made

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return (0.0, 0.0) if self.low > self.high else (self.low, self.high)


class LogHistogram:
    """Counts of values in bins that grow with the value: 32 bins a power of two and sign, and the exact ends.

    The bin is read from the bits of the float itself, so counting is a shift and a bincount. A percentile read from
    it is within 1/32 of the true value, whatever the scale of the data.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * _BINS, np.int64)
        self.ends = MinMax()

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        values = _values(x, mask)
        if not values.numel():
            return
        self.ends.update(values)
        bits = values.contiguous().view(torch.int32)
        bins = ((bits & 0x7FFFFFFF) >> _SHIFT) + (bits < 0).to(torch.int32) * _BINS
        self.counts += torch.bincount(bins, minlength=2 * _BINS).numpy()

    def merge(self, other: Self) -> Self:
        made = self._empty()
        made.counts = self.counts + other.counts
        made.ends = self.ends.merge(other.ends)
        return made

    def _empty(self) -> Self:
        return type(self)()

    def state(self) -> dict[str, Array]:
        return {"counts": self.counts, **self.ends.state()}

    @classmethod
    def from_state(cls, state: dict[str, Array]) -> Self:
        made = cls()
        made.counts = state["counts"].copy()
        made.ends = MinMax.from_state(state)
        return made

    def histogram(self) -> tuple[Array, Array]:
        """Bin centres, ascending, and counts; centres lie within the exact ends."""
        centres = _centres()
        values = np.concatenate([-centres[::-1], centres])
        counts = np.concatenate([self.counts[_BINS:][::-1], self.counts[:_BINS]])
        kept = counts > 0
        values, counts = values[kept], counts[kept]
        if len(values):
            values = np.clip(values, self.ends.low, self.ends.high)
            values[0], values[-1] = self.ends.low, self.ends.high
        return values, counts

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return self.ends.range(scheme)


def _centres() -> Array:
    starts = (np.arange(_BINS, dtype=np.int64) << _SHIFT).astype(np.int32).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        lows = starts.astype(np.float64)
        middle = np.concatenate([(lows[:-1] + lows[1:]) / 2, lows[-1:]])
    middle[0] = 0.0
    return np.where(np.isfinite(middle), middle, np.finfo(np.float32).max)


class LeastSquares(LogHistogram):
    """The range with the least expected squared error."""

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return mse_range(*self.histogram(), scheme)


class Percentile(LogHistogram):
    """The range that holds a share of the values."""

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile

    def _empty(self) -> Self:
        return type(self)(self.percentile)

    def state(self) -> dict[str, Array]:
        return {**super().state(), "percentile": np.array(self.percentile)}

    @classmethod
    def from_state(cls, state: dict[str, Array]) -> Self:
        made = super().from_state(state)
        made.percentile = float(state["percentile"])
        return made

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return percentile_range(*self.histogram(), self.percentile)


class Moments:
    """Count, mean and variance per index of the last axis, and its ends (Chan, Golub and LeVeque 1983).

    Merging adds rows in float64; it is exact up to the last bits, unlike the counts of a histogram.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Array = np.zeros(0)
        self.squares: Array = np.zeros(0)
        self.low: Array = np.zeros(0)
        self.high: Array = np.zeros(0)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        size = x.shape[-1]
        rows = _values(x, mask).reshape(-1, size).to(torch.float64).numpy()
        if not len(rows):
            return
        fresh = type(self)()
        fresh.count = len(rows)
        fresh.mean = rows.mean(axis=0)
        fresh.squares = ((rows - fresh.mean) ** 2).sum(axis=0)
        fresh.low, fresh.high = rows.min(axis=0), rows.max(axis=0)
        both = self.merge(fresh)
        self.__dict__.update(both.__dict__)

    def merge(self, other: Self) -> Self:
        if not self.count or not other.count:
            return self if self.count else other
        made = type(self)()
        made.count = self.count + other.count
        gap = other.mean - self.mean
        made.mean = (self.count * self.mean + other.count * other.mean) / made.count
        made.squares = self.squares + other.squares + gap**2 * self.count * other.count / made.count
        made.low, made.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return made

    @property
    def variance(self) -> Array:
        return self.squares / max(self.count, 1)

    def state(self) -> dict[str, Array]:
        names = ("mean", "squares", "low", "high")
        return {"count": np.array(self.count), **{n: getattr(self, n) for n in names}}

    @classmethod
    def from_state(cls, state: dict[str, Array]) -> Self:
        made = cls()
        made.count = int(state["count"])
        for name in ("mean", "squares", "low", "high"):
            setattr(made, name, state[name].copy())
        return made
