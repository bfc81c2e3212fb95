"""The ways to send a weight in codes: some of its codes, on the grid that it has; or all that changed of it.

    value = (code − zero) · scale

The new value is rounded to the old grid, and the codes that lower the error most go first. New scales for some of the
codes were tried and never lay on the hull: they cost what a good part of the codes does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from effc.delta import rate, weights
from effc.delta.codec import Array
from effc.delta.rate import Candidate, Unit
from effc.delta.weights import Coded, Weights

Contents = Mapping[str, bytes]


def unit(known: Weights, coded: Coded, old: Contents, new: Contents, weight: Array | float) -> Unit:
    """The ways to send a weight, `old` and `new` the bytes of its tensors by name; as it is where its type is not ours.

    `weight` has the importance of each code, in a shape that goes with theirs. Raises DeltaError where it has another.
    """
    name = coded.codes
    if old == new:
        return Unit(name=name, candidates=(Candidate(error=0.0),))
    every = tuple(
        rate.exact(known.tensors[n], old[n], new[n]) for n in coded.names if old[n] != new[n]
    )
    try:
        low, high = weights.code_range(known, coded)
        before, after = weights.grid(known, coded, old), weights.grid(known, coded, new)
    except KeyError:
        return Unit(name=name, candidates=(Candidate(error=0.0, parts=every),))
    moved = np.logical_or.reduce([a != b for a, b in zip(before, after, strict=True)])
    kind = np.float64 if before[0].itemsize > 1 else np.float32  # what has every code and scale

    def at(values: Array) -> Array:
        found: Array = values[moved].astype(kind)
        return found

    target = _value(*map(at, after))
    h = at(rate.weighed(name, weight, moved.shape))
    stays, scale, zero = map(at, before)
    near = np.divide(target, scale, where=scale != 0, out=np.zeros_like(target))
    near = np.clip(np.rint(near) + zero, low, high)
    gone, left = (h * (target - _value(each, scale, zero)) ** 2 for each in (stays, near))
    ways = [Candidate(error=_error(gone))]
    for error, places in _nested(np.where(near == stays, 0, gone - left), gone, left):
        codes = before[0].copy()
        codes.reshape(-1)[np.flatnonzero(moved)[places]] = near[places]
        content = weights.bytes_of(known, coded, codes)
        part = rate.exact(known.tensors[name], old[name], content)
        ways.append(Candidate(error=error, parts=(part,)))
    return Unit(name=name, candidates=(*ways, Candidate(error=0.0, parts=every)))


def _value(codes: Array, scale: Array, zero: Array) -> Array:
    value: Array = (codes - zero) * scale
    return value


def _error(each: Array) -> float:
    return float(each.sum(dtype=np.float64))


def _nested(gain: Array, gone: Array, left: Array) -> Iterator[tuple[float, Array]]:
    """Places of the largest gains, fewer and fewer of them, and the error that is left where those alone are sent."""
    places = np.flatnonzero(gain > 0)
    for count in rate.counts(places.size):
        places = places[rate.largest(gain[places], count)]
        rest = gone.copy()
        rest[places] = left[places]
        yield _error(rest), places
