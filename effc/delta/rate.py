"""Which tensors of a delta are sent, and in how many bytes: what lowers the error most for a byte goes first.

    error = Σ hᵢ (targetᵢ − decodedᵢ)²        h = 1, or what the caller gives: Fisher information, moments of inputs

Of every unit (a tensor, or the codes of a quantised weight with their scales) all encodings are made and decoded, so
bytes and error are what they will be. The candidates on the lower convex hull of bytes and error are steps; taken in
the order of error per byte they are the best that can be had for any number of bytes, but for the last step. What that
leaves of the budget is filled with what fits, on the hull or not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from effc.delta import codec
from effc.delta.codec import Array, Tensor
from effc.errors import DeltaError

MOST_SHARE = 0.04
"""Of elements that `topk` is tried with."""
FEWEST = 16
"""Elements that are worth the bytes of naming their tensor."""
RANKS = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor and how it is sent; `is_tight` where its payload has no fewer bytes to be found."""

    tensor: Tensor
    encoding: str
    payload: bytes
    is_tight: bool = False

    def tightened(self) -> Part:
        if self.is_tight:
            return self
        return replace(self, payload=codec.tightened(self.encoding, self.payload), is_tight=True)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to send a unit: nothing where there are no parts."""

    error: float
    parts: tuple[Part, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(len(part.payload) + ENTRY_BYTES for part in self.parts)


ENTRY_BYTES = 32
"""About what naming an entry takes in a packed header; the file as it is decides in the end."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What is sent or left together, and the ways to do it; the first is to send nothing."""

    name: str
    candidates: tuple[Candidate, ...]


def tightened(unit: Unit, chosen: Candidate) -> Unit:
    """The unit with the payloads of one of its ways as they are sent in the end."""
    tight = replace(chosen, parts=tuple(part.tightened() for part in chosen.parts))
    return replace(
        unit, candidates=tuple(tight if way is chosen else way for way in unit.candidates)
    )


def lossy(tensor: Tensor, change: Array, weight: Array) -> Iterator[tuple[str, bytes]]:
    """Every lossy encoding of `change` [n], as its word and payload."""
    for bits in (8, 4, 2):
        yield f"q{bits}", codec.grouped(change, bits)
    yield "sign", codec.signs(change, tensor)
    for count in counts(int(change.size * MOST_SHARE)):
        yield "topk", codec.few(change, weight, count)
    rows, columns = tensor.rows
    if min(rows, columns) < 16:
        return
    left, right = _factors(change.reshape(rows, columns), min(max(RANKS), min(rows, columns) // 4))
    for rank in RANKS:
        if rank <= len(left):
            yield "lowrank", codec.product([*left[:rank]], [*right[:rank]])


def counts(most: int) -> list[int]:
    """Numbers of elements to try, each half of the one before, so that any budget has one near."""
    found = [most] if most else []
    while found and found[-1] >= 2 * FEWEST:
        found.append(found[-1] // 2)
    return found


def largest(values: Array, count: int) -> Array:
    """Places of the `count` largest [n]; of equal ones the first, as neighbours are named in fewer bytes."""
    edge = np.partition(values, values.size - count)[values.size - count]
    found = values > edge
    found[np.flatnonzero(values == edge)[: count - int(found.sum())]] = True
    return np.flatnonzero(found)


def _factors(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Its first singular vectors [rank, rows] and [rank, columns], sizes shared between them (randomised, seeded)."""
    start = np.random.default_rng(0).normal(size=(matrix.shape[1], rank + 4))
    basis = np.linalg.qr(matrix.astype(np.float64) @ start)[0]
    for _ in range(2):
        basis = np.linalg.qr(matrix @ (matrix.T @ basis))[0]
    u, s, vt = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    size = np.sqrt(s[:rank])[:, None]
    return (basis @ u[:, :rank]).T * size, vt[:rank] * size


def floats(tensor: Tensor, old: bytes, new: bytes, weight: Array | float = 1.0) -> Unit:
    """The ways to send a tensor of floats."""
    kind = codec.FLOATS[tensor.dtype]
    target = np.frombuffer(new, kind).astype(np.float64)
    change = (target - np.frombuffer(old, kind)).astype(np.float32)
    h = weighed(tensor.name, weight, tensor.shape).astype(np.float64).reshape(-1)
    ways = [Candidate(error=float((h * change.astype(np.float64) ** 2).sum()))]
    for encoding, payload in lossy(tensor, change, h):
        made = np.frombuffer(codec.decode(tensor, encoding, payload, old), kind)
        part = Part(tensor=tensor, encoding=encoding, payload=payload)
        ways.append(Candidate(error=float((h * (target - made) ** 2).sum()), parts=(part,)))
    ways.append(Candidate(error=0.0, parts=(exact(tensor, old, new),)))
    return Unit(name=tensor.name, candidates=tuple(ways))


def weighed(name: str, weight: Array | float, shape: tuple[int, ...]) -> Array:
    """The importance of each element. Raises DeltaError where it was given in another shape."""
    given = np.asarray(weight)
    if not np.isfinite(given).all() or (given < 0).any():
        raise DeltaError(
            f"the importance of {name!r} is not all numbers from 0 on",
            hint="give what an error counts, such as the diagonal of the Fisher information",
        )
    try:
        return np.broadcast_to(given, shape)
    except ValueError as error:
        raise DeltaError(
            f"the importance of {name!r} is {list(given.shape)}, which does not go with {list(shape)}",
            hint="give one number, or an array of that shape",
        ) from error


def exact(tensor: Tensor, old: bytes, new: bytes) -> Part:
    encoding, payload = codec.exact(tensor, old, new)
    return Part(tensor=tensor, encoding=encoding, payload=payload)


def hull(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those on the lower convex hull of bytes and error, fewest bytes first; the first candidate is always one."""
    best = [candidates[0]]
    for way in sorted(candidates[1:], key=lambda way: (way.bytes, way.error)):
        if way.error >= best[-1].error:
            continue
        while len(best) > 1 and slope(best[-2], best[-1]) <= slope(best[-1], way):
            best.pop()
        best.append(way)
    return best


def slope(before: Candidate, after: Candidate) -> float:
    """Error that goes for a byte more."""
    return (before.error - after.error) / max(1, after.bytes - before.bytes)


def allocate(
    units: Sequence[Unit], *, most_bytes: float = np.inf, most_error: float = 0.0
) -> list[Candidate]:
    """A candidate for each unit: within `most_bytes`, and no more of them than `most_error` (a sum) takes."""
    hulls = [hull(unit.candidates) for unit in units]
    chosen = [ways[0] for ways in hulls]
    steps: list[tuple[float, int, int]] = [
        (-slope(a, b), i, j)
        for i, ways in enumerate(hulls)
        for j, (a, b) in enumerate(pairwise(ways), 1)
    ]
    spent = sum(way.bytes for way in chosen)
    error = sum(way.error for way in chosen)
    reached = [0] * len(hulls)
    for _, i, j in sorted(steps):
        if error <= most_error:
            break
        way = hulls[i][j]
        more = way.bytes - chosen[i].bytes
        if j != reached[i] + 1 or spent + more > most_bytes:
            continue  # a later step of a unit whose earlier one was too large is never smaller
        spent, error, reached[i] = spent + more, error + way.error - chosen[i].error, j
        chosen[i] = way
    if error > most_error:
        _fill(units, chosen, most_bytes - spent)
    return chosen


def _fill(units: Sequence[Unit], chosen: list[Candidate], room: float) -> None:
    """Put what lowers the error most for a byte in the place of what is chosen, as long as there is room."""
    while True:
        fitting = [
            (slope(chosen[i], way), i, way)
            for i, unit in enumerate(units)
            for way in unit.candidates
            if way.error < chosen[i].error and way.bytes - chosen[i].bytes <= room
        ]
        if not fitting:
            return
        _, i, way = max(fitting, key=lambda each: each[0])
        room -= way.bytes - chosen[i].bytes
        chosen[i] = way
