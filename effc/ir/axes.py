"""What an index along a dimension is made of, and which dimensions are made of the same.

    [batch, heads · size]        a product: index = head · size + position, as `view` splits and merges it
    [batch, left + right]        a sum: `cat` lays parts end to end, `split` and slices cut them again

An `Axis` is a leaf, a product of axes (outer first) or a sum of axes. `unify` says that two dimensions have the same
indices: leaves become one, products and sums are cut into the finest parts that both can be said in. What has no such
parts is stopped, that is, its indices may not be removed. Nothing here knows an operator. Sizes are numbers, or sympy
expressions where a dimension is free; axes of size 1 are left out of products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Size = Any
"""An int, or a sympy expression for a free dimension."""
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why indices of an axis may not be removed, and the node that says so."""

    reason: str
    node: str = ""
    hint: str = ""
    is_plain: bool = False
    """Nobody would expect to remove it: a kernel's height, a picture's width, a free dimension."""

    def __str__(self) -> str:
        return f"{self.reason} at {self.node}" if self.node else self.reason


class Axis:
    """A leaf, a product or a sum; `of` gives what it has become since it was made."""

    __slots__ = ("kind", "link", "parts", "size", "stop")

    def __init__(
        self,
        size: Size,
        kind: Literal["leaf", "product", "sum"] = "leaf",
        parts: Iterable[Axis] = (),
        stop: Stop | None = None,
    ) -> None:
        self.size, self.kind, self.parts, self.stop = size, kind, list(parts), stop
        self.link: Axis | None = None


ONE = Axis(1, stop=Stop(reason="there is only one", is_plain=True))
"""The axis of every dimension of size 1: it couples nothing, since it broadcasts."""


def leaf(size: Size, stop: Stop | None = None) -> Axis:
    return ONE if is_one(size) else Axis(size, stop=stop)


def is_one(size: Size) -> bool:
    return isinstance(size, int) and size == 1


def product(parts: Iterable[Axis]) -> Axis:
    """Outer parts first."""
    found = [f for part in parts for f in factors(part)]
    if len(found) < 2:
        return found[0] if found else ONE
    return Axis(math.prod(f.size for f in found), "product", found)


def total(parts: Sequence[Axis]) -> Axis:
    """Parts end to end; those of size 0 are none."""
    found = [part for part in parts if part.size != 0]
    if len(found) == 1:
        return found[0]
    return Axis(sum(part.size for part in found), "sum", found)


def of(axis: Axis) -> Axis:
    """What an axis is now; paths are shortened on the way."""
    last = axis
    while last.link is not None:
        last = last.link
    while axis.link is not None:
        axis.link, axis = last, axis.link
    return last


def factors(axis: Axis) -> list[Axis]:
    """The axis as a product of leaves and sums."""
    axis = of(axis)
    if axis.kind == "product":
        return [f for part in axis.parts for f in factors(part)]
    return [] if is_one(axis.size) else [axis]


def segments(axis: Axis) -> list[Axis]:
    """The axis as a sum of leaves and products."""
    axis = of(axis)
    if axis.kind == "sum":
        return [s for part in axis.parts for s in segments(part)]
    if axis.kind == "product":
        first, *rest = factors(axis)
        if of(first).kind == "sum":
            return [product([s, *rest]) for s in segments(first)]
    return [axis]


def leaves(axis: Axis) -> list[Axis]:
    """Every leaf in order, one that stands in several places in each."""
    axis = of(axis)
    return [axis] if axis.kind == "leaf" else [x for part in axis.parts for x in leaves(part)]


def stop(axis: Axis, why: Stop) -> None:
    """No index of the axis may be removed any more; the first reason stands."""
    for found in leaves(axis):
        if found.stop is None:
            found.stop = why


def unify(a: Axis, b: Axis, why: Stop) -> None:
    """The two have the same indices. `why` is the reason of what cannot be said in common parts."""
    a, b = of(a), of(b)
    if a is b:
        return
    if a.size != b.size:
        stop(a, why)
        stop(b, why)
        return
    if is_one(a.size):
        return
    if b.kind == "leaf":
        a, b = b, a
    if a.kind == "leaf":
        if a.stop is not None:
            stop(b, a.stop)
    elif a.kind == b.kind == "product":
        align([a], [b], why)
    else:
        _lay(a, b, why)
    a, b = of(a), of(b)
    if a is not b:
        a.link = b


def align(left: Sequence[Axis], right: Sequence[Axis], why: Stop) -> None:
    """Two lists of dimensions hold the same elements in the same order, as before and after `view`.

    Goes in from both ends, and stops what is left in the middle.
    """
    a = [f for axis in left for f in factors(axis)]
    b = [f for axis in right for f in factors(axis)]
    _from_left(a, b, why)
    a.reverse()
    b.reverse()
    _from_right(a, b, why)
    for axis in (*a, *b):
        stop(axis, why)


def _from_left(a: list[Axis], b: list[Axis], why: Stop) -> None:
    """Unify factors from the outermost on and take them off the lists, as far as it goes."""
    while a and b:
        a[:1], b[:1] = factors(a[0]), factors(b[0])  # what was unified before may have split them
        parts = _common(a[0], b[0], why, outermost=True)
        if parts is None:
            return
        xs, ys = parts
        a[:1], b[:1] = xs[1:], ys[1:]
        unify(xs[0], ys[0], why)


def _from_right(a: list[Axis], b: list[Axis], why: Stop) -> None:
    """The same from the innermost on; the lists are innermost first."""
    while a and b:
        a[:1], b[:1] = factors(a[0])[::-1], factors(b[0])[::-1]
        parts = _common(a[0], b[0], why, outermost=False)
        if parts is None:
            return
        xs, ys = parts
        a[:1], b[:1] = xs[-2::-1], ys[-2::-1]
        unify(xs[-1], ys[-1], why)


def _common(
    x: Axis, y: Axis, why: Stop, *, outermost: bool
) -> tuple[list[Axis], list[Axis]] | None:
    """Both in two parts, or whole, so that their outermost (or innermost) parts have one size."""
    shared = x.size if x.size == y.size else _shared(x.size, y.size)
    if shared is None:
        return None
    found = []
    for axis in (x, y):
        rest = quotient(axis.size, shared)
        if is_one(rest):
            found.append([axis])
            continue
        outer, inner = (shared, rest) if outermost else (rest, shared)
        made = split(axis, outer, inner, why)
        if made is None:
            return None
        found.append(list(made))
    return found[0], found[1]


def _shared(x: Size, y: Size) -> Size | None:
    """The size that both can be split off; None where there is none but 1."""
    if isinstance(x, int) and isinstance(y, int):
        common = math.gcd(x, y)
        return common if common > 1 else None
    for small, large in ((x, y), (y, x)):
        if not is_one(small) and quotient(large, small) is not None:
            return small
    return None


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where it is whole."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    found = a / b  # an expression, as one of them is
    if found.is_Integer:
        return int(found)
    return found if found.as_numer_denom()[1] == 1 else None


def split(axis: Axis, outer: Size, inner: Size, why: Stop) -> tuple[Axis, Axis] | None:
    """The axis as a product of two; None where a part of a sum is no multiple of `inner`, and then nothing changes."""
    axis = of(axis)
    if axis.kind == "leaf":
        parts = leaf(outer, axis.stop), leaf(inner, axis.stop)
        axis.kind, axis.parts = "product", [p for p in parts if p is not ONE]
        return parts
    if axis.kind == "product":
        parts = leaf(outer), leaf(inner)
        align([axis], parts, why)
        return parts
    found = segments(axis)
    rest = [quotient(s.size, inner) for s in found]
    if None in rest:
        return None
    pairs = [split(s, r, inner, why) for s, r in zip(found, rest, strict=True)]
    outers, inners = zip(*(pair for pair in pairs if pair is not None), strict=True)
    for other in inners[1:]:
        unify(inners[0], other, why)
    made = total(outers)
    axis.kind, axis.parts = "product", [p for p in (made, inners[0]) if p is not ONE]
    return made, inners[0]


def cut(axis: Axis, at: int, why: Stop) -> tuple[Axis | None, Axis | None]:
    """The first `at` indices and the rest, None for nothing; a product is stopped where it is cut inside a part."""
    axis = of(axis)
    if at in (0, axis.size):
        return (axis, None) if at else (None, axis)
    if axis.kind == "leaf":
        parts = Axis(at, stop=axis.stop), Axis(axis.size - at, stop=axis.stop)
        axis.kind, axis.parts = "sum", list(parts)
        return parts
    found = segments(axis)
    if len(found) > 1:
        first: list[Axis] = []
        for number, part in enumerate(found):
            if at < part.size:
                low, high = cut(part, at, why)
                return total([*first, *_some(low)]), total([*_some(high), *found[number + 1 :]])
            first.append(part)
            at -= part.size
            if not at:
                return total(first), total(found[number + 1 :])
    return _cut_product(axis, at, why)


def _some(part: Axis | None) -> list[Axis]:
    return [] if part is None else [part]


def _cut_product(axis: Axis, at: int, why: Stop) -> tuple[Axis, Axis]:
    outer, *rest = factors(axis)
    inner = product(rest)
    whole, over = divmod(at, inner.size)
    low, high = cut(outer, whole, why)
    if not over:
        return product([*_some(low), inner]), product([*_some(high), inner])
    stop(inner, why)
    assert high is not None
    middle, high = cut(high, 1, why)
    assert middle is not None
    stop(middle, why)
    ends = Axis(over, stop=why), Axis(inner.size - over, stop=why)
    left = [product([low, inner])] if low is not None else []
    right = [product([high, inner])] if high is not None else []
    return total([*left, ends[0]]), total([ends[1], *right])


def _lay(a: Axis, b: Axis, why: Stop) -> None:
    """Unify two of which one at least is a sum, from cut to cut."""
    rest_a: Axis | None = a
    rest_b: Axis | None = b
    while rest_a is not None and rest_b is not None:
        size = min(segments(rest_a)[0].size, segments(rest_b)[0].size)
        first_a, rest_a = cut(rest_a, size, why)
        first_b, rest_b = cut(rest_b, size, why)
        assert first_a is not None and first_b is not None
        unify(first_a, first_b, why)


Keep = Mapping[Axis, Flags]
"""For leaves that lose indices: which stay."""


def kept(axis: Axis, keep: Keep) -> Flags:
    """Which indices of an axis stay."""
    axis = of(axis)
    if axis.kind == "leaf":
        return keep[axis] if axis in keep else np.ones(axis.size, bool)
    if axis.kind == "sum":
        return np.concatenate([kept(part, keep) for part in axis.parts])
    found = np.ones(1, bool)
    for part in axis.parts:
        found = np.logical_and.outer(found, kept(part, keep)).ravel()
    return found


def size_of(axis: Axis, sizes: Mapping[Axis, int]) -> Size:
    """The size of an axis where leaves have other sizes."""
    axis = of(axis)
    if axis.kind == "leaf":
        return sizes.get(axis, axis.size)
    found = [size_of(part, sizes) for part in axis.parts]
    return sum(found) if axis.kind == "sum" else math.prod(found)


def places(axis: Axis, unit: Axis) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For every index of an axis, which index of the leaf `unit` it belongs to; −1 for none.

    An index that belongs to several, as in a product of an axis with itself, has the last of them.
    """
    axis = of(axis)
    if axis.kind == "leaf":
        return np.arange(axis.size) if axis is unit else np.full(axis.size, -1)
    parts = [places(part, unit) for part in axis.parts]
    if axis.kind == "sum":
        return np.concatenate(parts)
    found = np.full(1, -1)
    for part in parts:
        a, b = np.repeat(found, len(part)), np.tile(part, len(found))
        found = np.where(b >= 0, b, a)
    return found
