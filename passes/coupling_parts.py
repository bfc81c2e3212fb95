"""Parts laid end to end, cut off, looked up and padded, and the sides of pictures.

A `cat` makes a sum of axes, and a cut takes one apart where parts met; what is taken by its place or its number may
lose nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effc.ir import axes
from effc.ir.axes import ONE, Axis, leaf, product, stop, total, unify
from effc.ir.select import op_name
from effc.passes.coupling_reading import FREE, Axes, Call, Reading, Rule, made, position, size


def _cat(r: Reading, node: fx.Node, call: Call) -> Axes | None:
    parts = [r.of(part) for part in call["tensors"]]
    parts = [p for p in parts if not (len(p) == 1 and p[0].size == 0)]
    dim = position(call["dim"] or 0, len(parts[0]))
    shape = call.result.shape
    rest = [[ONE if d == dim else a for d, a in enumerate(p)] for p in parts]
    found = r.broadcast(node, rest, [1 if d == dim else s for d, s in enumerate(shape)])
    ends = [p[dim] for p in parts]
    if all(isinstance(e.size, int) for e in ends):
        found[dim] = total([Axis(1, stop=ONE.stop) if e is ONE else e for e in ends])
        return found
    for end in ends:
        stop(end, r.why(node, "it is laid beside a free dimension"))
    found[dim] = made(shape[dim], FREE)
    return found


def _stack(r: Reading, node: fx.Node, call: Call) -> Axes:
    parts = [r.of(part) for part in call["tensors"]]
    shape = list(call.result.shape)
    dim = position(call["dim"] or 0, len(shape))
    number = shape.pop(dim)
    found = r.broadcast(node, parts, shape)
    found.insert(dim, made(number, r.why(node, "it counts what is stacked", is_plain=True)))
    return found


def _split(r: Reading, node: fx.Node, call: Call) -> list[Axes]:
    x = r.of(node.args[0])
    dim = position(call["dim"] or 0, len(x))
    values = node.meta["val"]
    sizes = [size(v.shape[dim]) for v in values]
    if not isinstance(x[dim].size, int):
        stop(x[dim], r.why(node, "it is cut at computed places"))
        return [[*x[:dim], made(v.shape[dim], FREE), *x[dim + 1 :]] for v in values]
    ends: Axes = []
    rest: Axis | None = x[dim]
    why = r.why(node, "it is cut inside a group")
    for each in sizes:
        assert rest is not None
        end, rest = axes.cut(rest, each, why)
        ends.append(end if end is not None else ONE)
    r.cuts.append((node, ends))
    return [[*x[:dim], ONE if axes.is_one(e.size) else e, *x[dim + 1 :]] for e in ends]


def _unbind(r: Reading, node: fx.Node, call: Call) -> list[Axes]:
    x = list(r.of(node.args[0]))
    dim = position(call["dim"] or 0, len(x))
    stop(x.pop(dim), r.why(node, "each of it has a place of its own", is_plain=True))
    return [list(x) for _ in node.meta["val"]]


def _getitem(r: Reading, node: fx.Node, call: Call) -> Any:
    return r.dims[node.args[0]][node.args[1]]  # type: ignore[index]


def _select(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = list(r.of(node.args[0]))
    gone = x.pop(position(call["dim"], len(x)))
    stop(gone, r.why(node, "one of it is taken by its number", is_plain=True))
    return x


def _slice(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    dim = position(call["dim"] or 0, len(found))
    whole, step = found[dim], call["step"] or 1
    start, end = call["start"] or 0, call["end"]
    why = r.why(node, "it is cut at computed places")
    numbers = all(isinstance(n, int | None) for n in (start, end, step))
    if not numbers or not isinstance(whole.size, int):
        stop(whole, why)
        found[dim] = made(call.result.shape[dim], why)
        return found
    n = whole.size
    low = min(n, start + n if start < 0 else start)
    high = n if end is None else min(n, end + n if end < 0 else end)
    if step == 1:
        return _part(r, call, found, dim, low, high)
    if low >= step or high < n or n % step:
        stop(whole, why)
        found[dim] = made(call.result.shape[dim], why)
        return found
    parts = axes.split(whole, n // step, step, why)
    if parts is None:
        stop(whole, why)
        found[dim] = made(call.result.shape[dim], why)
        return found
    stop(parts[1], r.why(node, "every second or third of it is taken", is_plain=True))
    found[dim] = parts[0]
    return found


def _part(r: Reading, call: Call, found: Axes, dim: int, low: int, high: int) -> Axes:
    """Indices from `low` to `high` of a dimension."""
    why = r.why(call.node, "it is cut inside a group")
    before, rest = axes.cut(found[dim], low, why)
    middle, behind = axes.cut(rest, high - low, why) if rest is not None else (None, None)
    if before is not None:
        r.literal(call, "start", None, before)
    if behind is not None and middle is not None:
        ends = (before, middle) if before is not None else (middle,)
        r.literal(call, "end", None, *ends)
    if middle is None:
        found[dim] = leaf(0, FREE)
    else:
        found[dim] = ONE if axes.is_one(middle.size) else middle
    return found


def _index(r: Reading, node: fx.Node, call: Call) -> Axes | None:
    x, indices = r.of(node.args[0]), list(call["indices"])
    value = call.result
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if any(i.meta["val"].dtype in (torch.bool, torch.uint8) for _, i in given):
        return None
    for dim, _ in given:
        stop(x[dim], r.why(node, "it is looked up by number"))
    places = [d for d, _ in given]
    at = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    rest = [a for d, a in enumerate(x) if d not in places]
    wide = len(value.shape) - len(rest)
    shape = value.shape[at : at + wide]
    return [*rest[:at], *r.broadcast(node, [r.of(i) for _, i in given], shape), *rest[at:]]


def _index_select(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    dim = position(call["dim"], len(found))
    stop(found[dim], r.why(node, "it is looked up by number"))
    found[dim] = next(iter(r.of(call["index"])), ONE)
    return found


def _gather(r: Reading, node: fx.Node, call: Call) -> Axes:
    """Every index of the result picks along one dimension, and keeps to its place in the others."""
    x, index = r.of(node.args[0]), r.of(call["index"])
    for dim, (mine, axis) in enumerate(zip(index, x, strict=True)):
        if dim == position(call["dim"], len(x)):
            stop(axis, r.why(node, "it is looked up by number"))
        elif not (axes.is_one(mine.size) and axes.is_one(axis.size)):
            unify(mine, axis, r.why(node, "part of it is looked up"))
    return list(index)


def _pad(r: Reading, node: fx.Node, call: Call) -> Axes:
    found, pads = list(r.of(node.args[0])), call["pad"]
    shape = call.result.shape
    constant = call["mode"] in (None, "constant")
    for number in range(len(pads) // 2):
        dim = len(found) - 1 - number
        low, high = pads[2 * number : 2 * number + 2]
        if low == high == 0:
            continue
        old = found[dim]
        simple = all(isinstance(n, int) and n >= 0 for n in (low, high, old.size))
        if not constant or not simple:
            why = r.why(node, "it is padded from itself or cut", is_plain=True)
            stop(old, why)
            found[dim] = made(shape[dim], why)
            continue
        ends = [leaf(n) if n > 1 else Axis(n, stop=ONE.stop) for n in (low, high)]
        found[dim] = total([ends[0], old, ends[1]])
        for place, end in zip((2 * number, 2 * number + 1), ends, strict=True):
            if end.size:
                r.literal(call, "pad", place, end)
    return found


def _spatial(r: Reading, node: fx.Node, call: Call) -> Any:
    """Batch and channels pass; what lies behind them is a picture, or a line of samples."""
    x = r.of(node.args[0])
    wide = r.why(node, "it is a side of a picture", is_plain=True)
    values = node.meta["val"]
    count = _sides(node)
    for axis in x[len(x) - count :]:
        stop(axis, wide)
    found = [
        [*x[: len(x) - count], *(made(s, wide) for s in v.shape[len(x) - count :])]
        for v in call.results
    ]
    return found[0] if isinstance(values, Tensor) else found


def _sides(node: fx.Node) -> int:
    word = op_name(node)
    return next((n for n in (1, 2, 3) if f"{n}d" in word), 0) or (1 if "linear1d" in word else 2)


def _pixel_shuffle(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = list(r.of(node.args[0]))
    square = call["upscale_factor"] ** 2
    shape = call.result.shape
    wide = r.why(node, "it is a side of a picture", is_plain=True)
    channels = leaf(x[-3].size // square)
    unify(x[-3], product([channels, leaf(square, wide)]), wide)
    for axis in x[-2:]:
        stop(axis, wide)
    return [*x[:-3], channels, *(made(s, wide) for s in shape[-2:])]


def _pixel_unshuffle(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = list(r.of(node.args[0]))
    wide = r.why(node, "it is a side of a picture", is_plain=True)
    for axis in x[-2:]:
        stop(axis, wide)
    square = leaf(call["downscale_factor"] ** 2, wide)
    sides = [made(s, wide) for s in call.result.shape[-2:]]
    return [*x[:-3], product([x[-3], square]), *sides]


def _glu(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    dim = position(-1 if call["dim"] is None else call["dim"], len(found))
    why = r.why(node, "value and gate are grouped in unlike ways")
    a, b = axes.cut(found[dim], found[dim].size // 2, why)
    assert a is not None and b is not None
    unify(a, b, why)
    found[dim] = a
    return found


TABLE: dict[str, Rule] = {
    "cat concat concatenate": _cat,
    "stack": _stack,
    "split split_with_sizes chunk": _split,
    "unbind": _unbind,
    "getitem": _getitem,
    "select": _select,
    "slice": _slice,
    "index": _index,
    "index_select": _index_select,
    "gather": _gather,
    "pad constant_pad_nd": _pad,
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool2d max_pool2d_with_indices upsample_nearest1d upsample_nearest2d "
    "upsample_bilinear2d upsample_bicubic2d upsample_linear1d _upsample_nearest_exact2d": _spatial,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "glu": _glu,
}
