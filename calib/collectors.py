"""Fixed-size statistics of a stream of tensors.

Each has an exact `merge`: two collectors that saw half the data each become the one that saw it all, in any order, so
results do not depend on how work was divided. Sums are integers, or float64 in a fixed order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from effc.errors import CalibrationError
from effc.quant.affine import steady
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
_FINITE = _BINS - (1 << MANTISSA_BITS)
_CHUNK = 1 << 20
FLOAT64 = 8
"""Bytes of one."""


def _values(x: Tensor, mask: Tensor | None) -> Tensor:
    """The values to count as one float32 vector; `mask` says over leading axes which are real."""
    if mask is not None:
        x = x[mask.bool()]
    return x.detach().reshape(-1).to(torch.float32)


def _ends(values: Tensor) -> tuple[float, float]:
    """Smallest and largest. Raises CalibrationError where a value is not a finite number."""
    low, high = (float(end) for end in torch.aminmax(values))  # a NaN would be one of the two
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CalibrationError(
            "a value that is not a number was met in calibration",
            hint="check the calibration data and the weights",
        )
    return low, high


class MinMax:
    """The smallest and the largest value."""

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        values = _values(x, mask)
        if values.numel():
            self._widen(*_ends(values))

    def _widen(self, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)

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

    def held_bytes(self, shape: Sequence[int]) -> int:
        return 2 * FLOAT64


class Distinct:
    """Every value that is met, of those that are few. Raises CalibrationError where they are many."""

    most = 10_000

    def __init__(self) -> None:
        self._seen: set[float] = set()

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        self._seen |= set(x.detach().reshape(-1).double().tolist())
        if len(self._seen) > self.most:
            raise CalibrationError(
                f"more than {self.most} different values were met",
                hint="calibrate on the steps of a sampler: calib: {trajectories: 16, steps: 20}",
            )

    def merge(self, other: Self) -> Self:
        made = type(self)()
        made._seen = self._seen | other._seen
        return made

    def values(self) -> list[float]:
        """Rising."""
        return sorted(self._seen)

    def held_bytes(self, shape: Sequence[int]) -> int:
        return self.most * FLOAT64


class WidthByTime:
    """How wide the range of a value is at each time, as the mean over batches: it watches a time, and then the value.

    Zero is in every range. A batch whose rows have times of their own counts for the first of them.
    """

    def __init__(self) -> None:
        self._time: float | None = None
        self._seen: dict[float, tuple[float, int]] = {}

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        if self._time is None:
            self._time = float(x.detach().reshape(-1)[0])
            return
        time, self._time = self._time, None
        width = max(float(x.max()), 0.0) - min(float(x.min()), 0.0)
        total, count = self._seen.get(time, (0.0, 0))
        self._seen[time] = (total + width, count + 1)

    def merge(self, other: Self) -> Self:
        made = type(self)()
        for time in self._seen.keys() | other._seen.keys():
            pairs = [part._seen.get(time, (0.0, 0)) for part in (self, other)]
            made._seen[time] = (pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1])
        return made

    def widths(self) -> dict[float, float]:
        """By time, rising."""
        return {time: total / count for time, (total, count) in sorted(self._seen.items())}

    def held_bytes(self, shape: Sequence[int]) -> int:
        return Distinct.most * 3 * FLOAT64


class Channels:
    """Smallest, largest, mean and mean square of every channel, which is the last axis where no other is named."""

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.low = self.high = self.sums = self.squares = np.zeros(0)
        self.count = 0

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        axis = (
            self.axis - x.dim() if self.axis > 0 else self.axis
        )  # a mask takes axes in front of it away
        if mask is not None:
            x = x[mask.bool()]
        x = x.detach().movedim(axis, -1)
        rows = x.reshape(-1, x.shape[-1]).to(torch.float64)
        if not len(rows):
            return
        _ends(rows.reshape(-1))
        seen = Channels()
        seen.low, seen.high = rows.amin(0).numpy(), rows.amax(0).numpy()
        seen.sums, seen.squares = rows.sum(0).numpy(), rows.square().sum(0).numpy()
        seen.count = len(rows)
        made = self.merge(seen)
        self.low, self.high, self.count = made.low, made.high, made.count
        self.sums, self.squares = made.sums, made.squares

    def merge(self, other: Channels) -> Channels:
        if not self.count or not other.count:
            return other if other.count else self
        made = Channels()
        made.low, made.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        made.sums, made.squares = self.sums + other.sums, self.squares + other.squares
        made.count = self.count + other.count
        return made

    def steady(self) -> tuple[Array, Array, Array]:
        """Smallest, largest and mean square, each [channels], to nine bits (`steady`)."""
        values = (self.low, self.high, self.squares / max(self.count, 1))
        low, high, squares = (np.array([steady(float(v)) for v in each]) for each in values)
        return low, high, squares

    def mean(self) -> Array:
        """The mean of every channel, [channels]."""
        found: Array = self.sums / max(self.count, 1)
        return found

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return (float(self.low.min()), float(self.high.max())) if self.count else (0.0, 0.0)

    def held_bytes(self, shape: Sequence[int]) -> int:
        return 4 * shape[self.axis] * FLOAT64


class Heads:
    """The largest magnitude of every channel of every head of keys or values [batch, heads, positions, size].

    Of the first `turned` channels it is the longest that a channel and the one half as many further, which rotary
    embedding turns into each other, were together, for both: √(x² + y²).
    """

    positions = 2

    def __init__(self, *, turned: int = 0) -> None:
        self.turned = turned
        self.most: Array = np.zeros((0, 0))

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        rows = x.detach().movedim(2, 1)
        rows = (rows[mask.bool()] if mask is not None else rows.flatten(0, 1)).to(torch.float32)
        if not rows.numel():
            return
        _ends(rows.reshape(-1))
        if self.turned:
            length = torch.hypot(*rows[..., : self.turned].chunk(2, -1))
            rows = torch.cat([length, length, rows[..., self.turned :]], -1)
        seen = Heads(turned=self.turned)
        seen.most = rows.abs().amax(0).to(torch.float64).numpy()
        self.most = self.merge(seen).most

    def merge(self, other: Heads) -> Heads:
        made = Heads(turned=self.turned)
        sides = [side.most for side in (self, other) if side.most.size]
        made.most = np.maximum.reduce(sides) if sides else self.most
        return made

    def range(self, scheme: Scheme) -> tuple[float, float]:
        most = float(self.most.max()) if self.most.size else 0.0
        return -most, most

    def held_bytes(self, shape: Sequence[int]) -> int:
        return shape[1] * shape[3] * FLOAT64


class Gram:
    """Σ x xᵀ over rows x of the last axis, and the mean magnitude of every channel; memory is channels² float64.

    Sums are in float64 and of many rows, so noise in the last bits of activations all but averages out. To round the
    sums to few bits as well, as `steady` does with ranges, was tried: of so many numbers some always lie at an edge,
    and one that goes to the other side changes more codes than the noise would.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(0, 0, dtype=torch.float64)
        self.sizes = torch.zeros(0, dtype=torch.float64)
        self.count = 0

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        if mask is not None:
            x = x[mask.bool()]
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float64)
        if not len(rows):
            return
        _ends(rows.reshape(-1))
        sums, sizes = rows.T @ rows, rows.abs().sum(0)
        if self.count:  # in the memory of the new ones
            sums, sizes = sums.add_(self.sums), sizes.add_(self.sizes)
        self.sums, self.sizes, self.count = sums, sizes, self.count + len(rows)

    def merge(self, other: Gram) -> Gram:
        if not self.count or not other.count:
            return other if other.count else self
        made = Gram()
        made.sums, made.sizes = self.sums + other.sums, self.sizes + other.sizes
        made.count = self.count + other.count
        return made

    def matrix(self) -> Tensor:
        """Σ x xᵀ, [channels, channels]. Raises CalibrationError where no row was seen."""
        if not self.count:
            raise CalibrationError(
                "the calibration data is nothing but padding",
                hint="give samples that the model reads",
            )
        return self.sums

    def magnitudes(self) -> Tensor:
        """The mean of |x| of every channel, [channels]."""
        return self.sizes / max(self.count, 1)

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return 0.0, 0.0

    def held_bytes(self, shape: Sequence[int]) -> int:
        return (shape[-1] + 1) * shape[-1] * FLOAT64


class Directions(Gram):
    """`Gram` of rows that are brought to a mean square of 1 first, as an RMSNorm does: long ones count alike."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        exact = x.detach().to(torch.float64)
        sizes = exact.square().mean(-1, keepdim=True).sqrt()
        super().update(exact / sizes.clamp(min=torch.finfo(torch.float64).tiny), mask)


class Rows:
    """A sample of rows of the last axis: `most` of them, every row as likely as any other.

    Half of the samples that a batch is of are held out: rows of every second one, so that what is chosen by the others
    can be told from luck. Which rows are kept is drawn; merging keeps those drawn first.
    """

    def __init__(self, most: int = 2048, seed: int = 0) -> None:
        self.most, self.samples, self.count = most, 0, 0
        self._draw = torch.Generator().manual_seed(seed)
        self.rows = torch.zeros(0, 0)
        self.places = torch.zeros(0, dtype=torch.float64)
        """What every row drew; the lowest stay."""
        self.held = torch.zeros(0, dtype=torch.bool)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        sample = (torch.arange(len(x)) + self.samples).reshape(-1, *[1] * (x.dim() - 2))
        held = (sample % 2 == 1).expand(x.shape[:-1])
        self.samples += len(x)
        rows, held = (x, held) if mask is None else (x[mask.bool()], held[mask.bool()])
        rows, held = rows.detach().reshape(-1, x.shape[-1]).to(torch.float32), held.reshape(-1)
        if not len(rows):
            return
        _ends(rows.reshape(-1))
        seen = Rows(self.most)
        places = torch.rand(len(rows), generator=self._draw, dtype=torch.float64)
        first = places.argsort()[: self.most]
        seen.rows, seen.held, seen.places = rows[first], held[first], places[first]
        made = self.merge(seen)
        self.rows, self.held, self.places = made.rows, made.held, made.places
        self.count += len(rows)

    def merge(self, other: Rows) -> Rows:
        made = Rows(self.most)
        made.samples, made.count = self.samples + other.samples, self.count + other.count
        sides = [side for side in (self, other) if len(side.places)]
        if not sides:
            return made
        places = torch.cat([side.places for side in sides])
        first = places.argsort(stable=True)[: self.most]
        made.places = places[first]
        made.rows = torch.cat([side.rows for side in sides])[first]
        made.held = torch.cat([side.held for side in sides])[first]
        return made

    def parts(self) -> tuple[Tensor, Tensor]:
        """Rows to choose by and rows held out, each [rows, channels]; both are all where one would be none.

        Raises CalibrationError where no row was seen.
        """
        if not len(self.rows):
            raise CalibrationError(
                "the calibration data is nothing but padding",
                hint="give samples that the model reads",
            )
        if not bool(self.held.any()) or bool(self.held.all()):
            return self.rows, self.rows
        return self.rows[~self.held], self.rows[self.held]

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return (float(self.rows.min()), float(self.rows.max())) if len(self.rows) else (0.0, 0.0)

    def held_bytes(self, shape: Sequence[int]) -> int:
        return self.most * (shape[-1] * 4 + FLOAT64 + 1)


class Feeds:
    """Whole inputs of a graph, of so many rows that are drawn evenly from all: what it can be run on again.

    One collector watches all inputs, in their order. `wide` says which of them have a row for each sample; of the
    others a row keeps what stood beside it.
    """

    def __init__(
        self, names: Sequence[str], wide: Sequence[bool], most: int, seed: int = 0
    ) -> None:
        self.names, self.wide, self.most, self.count = tuple(names), tuple(wide), most, 0
        self._draw = torch.Generator().manual_seed(seed)
        self._batch: list[Tensor] = []
        self._rows: list[tuple[float, int, tuple[Tensor, ...]]] = []

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        self._batch.append(x.detach())
        if len(self._batch) < len(self.names):
            return
        batch, self._batch = self._batch, []
        sizes = [len(x) for x, is_wide in zip(batch, self.wide, strict=True) if is_wide]
        rows = min(sizes, default=1)
        for row, place in enumerate(torch.rand(rows, generator=self._draw).tolist()):
            worst = self._rows[-1][0] if len(self._rows) == self.most else math.inf
            if place >= worst:
                continue
            held = tuple(
                x[row : row + 1].clone() if is_wide else x
                for x, is_wide in zip(batch, self.wide, strict=True)
            )
            self._rows = sorted([*self._rows, (place, self.count + row, held)], key=lambda r: r[:2])
            del self._rows[self.most :]
        self.count += rows

    def merge(self, other: Self) -> Self:
        made = type(self)(self.names, self.wide, self.most)
        later = [(place, self.count + row, held) for place, row, held in other._rows]
        made._rows = sorted([*self._rows, *later], key=lambda r: r[:2])[: self.most]
        made.count = self.count + other.count
        return made

    def groups(self, batch: int) -> list[dict[str, Tensor]]:
        """Feeds of at most `batch` rows each, of rows with equal shapes and equal values that are not theirs alone."""
        found: dict[tuple[Any, ...], list[tuple[Tensor, ...]]] = {}
        for _, _, held in sorted(self._rows, key=lambda r: r[1]):
            key = tuple(
                tuple(x.shape) if is_wide else (tuple(x.shape), x.numpy().tobytes())
                for x, is_wide in zip(held, self.wide, strict=True)
            )
            found.setdefault(key, []).append(held)
        return [
            {
                name: torch.cat(parts) if is_wide else parts[0]
                for name, is_wide, parts in zip(
                    self.names,
                    self.wide,
                    zip(*rows[start : start + batch], strict=True),
                    strict=True,
                )
            }
            for rows in found.values()
            for start in range(0, len(rows), batch)
        ]

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return 0.0, 0.0

    def held_bytes(self, shape: Sequence[int]) -> int:
        return (
            self.most * math.prod(int(size) if isinstance(size, int) else 1 for size in shape) * 4
        )


class LogHistogram:
    """Counts of values in bins that grow with the value: 32 bins a power of two and sign, and the exact ends.

    The bin is the leading bits of the float itself (sign, exponent, mantissa), so counting is a shift and a bincount.
    A bin is at most 1/32 of its value wide; a percentile read from its centre is within 1/64 of the true value,
    whatever the scale of the data. What is below the normal numbers (1e-38) counts as zero, and is off by that much.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(2 * _BINS, np.int64)
        self.ends = MinMax()

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        values = _values(x, mask)
        if not values.numel():
            return
        self.ends._widen(*_ends(values))
        bits = np.ascontiguousarray(values.numpy()).view(np.uint32)
        for start in range(0, len(bits), _CHUNK):
            bins = (bits[start : start + _CHUNK] >> _SHIFT).astype(np.intp)
            self.counts += np.bincount(bins, minlength=2 * _BINS)

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

    def bins(self) -> tuple[Array, Array, Array]:
        """Start, stop and count of every bin that holds something, ascending, cut at the exact ends."""
        counts = np.concatenate([self.counts[_BINS:][::-1], self.counts[:_BINS]])
        kept = counts > 0
        edges = _edges()
        starts = np.concatenate([-edges[1:][::-1], edges[:-1]])[kept]
        stops = np.concatenate([-edges[:-1][::-1], edges[1:]])[kept]
        if not len(starts):
            return starts, stops, counts[kept]
        low, high = self.ends.low, self.ends.high
        return np.clip(starts, low, high), np.clip(stops, low, high), counts[kept]

    def histogram(self) -> tuple[Array, Array]:
        """Bin centres, ascending, and counts; the first and the last are the exact ends."""
        starts, stops, counts = self.bins()
        values = (starts + stops) / 2
        if len(values):
            values[0], values[-1] = self.ends.low, self.ends.high
        return values, counts

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return self.ends.range(scheme)

    def held_bytes(self, shape: Sequence[int]) -> int:
        return self.counts.nbytes + self.ends.held_bytes(shape)


@functools.cache
def _edges() -> Array:
    """Where the bins of one sign start, and where the last one stops; the first holds zero and nothing else."""
    bits = np.arange(_FINITE + 1, dtype=np.uint32) << np.uint32(_SHIFT)
    starts = bits.view(np.float32).astype(np.float64)
    starts[: 1 << MANTISSA_BITS] = 0.0  # below the normal numbers: zero
    starts[_FINITE] = float(np.finfo(np.float32).max)
    return np.concatenate([starts, np.full(_BINS - _FINITE, starts[-1])])


class LeastSquares(LogHistogram):
    """The range with the least expected squared error."""

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return mse_range(*self.bins(), scheme)


class Percentile(LogHistogram):
    """The range that holds a share of the values."""

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 0 < percentile <= 100:
            raise ValueError(f"a percentile is above 0 and at most 100, not {percentile}")
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
        size = x.shape[-1] if x.dim() else 1
        values = _values(x, mask)
        if not values.numel():
            return
        _ends(values)
        rows = values.reshape(-1, size).to(torch.float64).numpy()
        fresh = type(self)()
        fresh.count = len(rows)
        fresh.mean = rows.mean(axis=0)
        fresh.squares = ((rows - fresh.mean) ** 2).sum(axis=0)
        fresh.low, fresh.high = rows.min(axis=0), rows.max(axis=0)
        self.__dict__.update(self.merge(fresh).__dict__)

    def merge(self, other: Self) -> Self:
        if not self.count or not other.count:
            return self.from_state((self if self.count else other).state())
        if len(self.mean) != len(other.mean):
            raise CalibrationError(
                f"the last axis had {len(self.mean)} channels, and now has {len(other.mean)}",
                hint="statistics by channel want batches that agree in it",
            )
        made = type(self)()
        made.count = self.count + other.count
        gap = other.mean - self.mean
        made.mean = (self.count * self.mean + other.count * other.mean) / made.count
        made.squares = self.squares + other.squares + gap**2 * self.count * other.count / made.count
        made.low, made.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)
        return made

    def whole(self) -> Self:
        """The same of all channels together."""
        made = type(self)()
        if self.count:
            made.count = self.count * len(self.mean)
            made.mean = self.mean.mean(keepdims=True)
            between = self.count * ((self.mean - made.mean) ** 2).sum(keepdims=True)
            made.squares = self.squares.sum(keepdims=True) + between
            made.low, made.high = self.low.min(keepdims=True), self.high.max(keepdims=True)
        return made

    def held_bytes(self, shape: Sequence[int]) -> int:
        return 4 * (shape[-1] if shape else 1) * FLOAT64

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
