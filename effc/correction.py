"""What a sampler puts right of its model's rounding: a gain and an offset for every time and channel.

    ε ≈ gain(t, c) · ε̂ + offset(t, c)        gain = cov(ε, ε̂) / var(ε̂),  offset = E ε − gain · E ε̂

A quantised denoiser is off by a mean, and by a part that goes with what it predicts (He et al. 2023, PTQD).
Both are the same for all pictures at one time, and a sampler adds them up step by step. Here they are what least
squares finds between engine and model on the steps of the float sampler, and a package carries them as a small table.
What is left, noise that goes with nothing, stays: it is not taken out of the noise that a sampler draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effc import bounded
from effc.diffusion import TIMESTEP
from effc.errors import PackageError

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]
Json = dict[str, Any]

FILE = "correction.json"
DIGITS = 4
"""Of every number, so that the last bits of float arithmetic do not reach a package."""
MOST = 1 << 22
"""Numbers of a table at most."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """`gain` and `offset` [times, channels] at rising `times`; between two of them they change evenly."""

    times: Array
    gain: Array
    offset: Array

    def __call__(self, time: float, predicted: Array) -> Array:
        """A prediction [rows, channels, …] put right."""
        shape = (1, -1, *[1] * (predicted.ndim - 2))
        gain, offset = (self._at(time, table).reshape(shape) for table in (self.gain, self.offset))
        return np.asarray(predicted * gain + offset, np.float32)

    def _at(self, time: float, table: Array) -> Array:
        return np.array([np.interp(time, self.times, column) for column in table.T])

    def to_json(self) -> Json:
        return {
            name: [[float(f"{v:.{DIGITS - 1}e}") for v in row] for row in table]
            for name, table in (("gain", self.gain), ("offset", self.offset))
        } | {"times": self.times.tolist()}

    @classmethod
    def from_json(cls, content: Any) -> Correction:
        """Raises PackageError where it is no such table."""
        try:
            parts = [np.array(content[name], np.float64) for name in ("times", "gain", "offset")]
        except (KeyError, TypeError, ValueError) as error:
            raise _odd("it is no table of gains and offsets by time") from error
        times, gain, offset = parts
        sizes = times.shape + gain.shape[1:] if gain.ndim == 2 else ()
        if times.ndim != 1 or not len(times) or gain.shape != sizes or offset.shape != sizes:
            raise _odd("its rows are not as many as its times")
        if gain.size > MOST or not all(np.isfinite(part).all() for part in parts):
            raise _odd("its numbers are none")
        if (np.diff(times) <= 0).any():
            raise _odd("its times do not rise")
        return cls(times=times, gain=gain, offset=offset)


def read(out: Path, target: str) -> Correction | None:
    """The correction that a package has for a target; None where it has none. Raises PackageError for a broken one."""
    if not (out / FILE).is_file():
        return None
    content = bounded.read_json(out / FILE, PackageError)
    if not isinstance(content, dict):
        raise _odd("it is no table of targets")
    return Correction.from_json(content[target]) if target in content else None


def measured(
    model: Callable[[Feeds], Array],
    engine: Callable[[Feeds], Array],
    batches: Iterable[Feeds],
    *,
    mean_only: bool = False,
) -> Correction:
    """What puts right what an `engine` predicts for what a `model` does, on batches of one time each.

    With `mean_only` every gain is 1, and the offset is what the mean is off by.
    """
    sums: dict[float, list[Array]] = {}
    for feeds in batches:
        wanted, found = (_channels(ask(feeds)) for ask in (model, engine))
        time = float(np.ravel(feeds[TIMESTEP])[0])
        new = [
            np.full(wanted.shape[1], len(wanted), np.float64),
            wanted.sum(0), found.sum(0), (wanted * found).sum(0), (found**2).sum(0),
        ]  # fmt: skip
        sums[time] = [a + b for a, b in zip(sums[time], new, strict=True)] if time in sums else new
    times = sorted(sums)
    gains, offsets = [], []
    for time in times:
        count, wanted, found, product, square = sums[time]
        spread = square / count - (found / count) ** 2
        shared = product / count - wanted * found / count**2
        gain = np.where(spread > 0, shared / np.where(spread > 0, spread, 1.0), 1.0)
        if mean_only:
            gain = np.ones_like(gain)
        gains.append(gain)
        offsets.append((wanted - gain * found) / count)
    return Correction(times=np.array(times), gain=np.array(gains), offset=np.array(offsets))


def _channels(x: Array) -> Array:
    """[rows, channels, …] as [places, channels]."""
    return np.moveaxis(np.asarray(x, np.float64), 1, -1).reshape(-1, x.shape[1])


def _odd(what: str) -> PackageError:
    return PackageError(f"{FILE}: {what}", hint="compile the package again")
