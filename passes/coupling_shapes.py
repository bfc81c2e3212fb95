"""The same values in another shape: views, turns, dimensions of size 1, repetitions, and tensors of given sizes.

Sizes that stand in such a call are sizes of axes, and are written anew where those lose units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from effc.ir import axes
from effc.ir.axes import ONE, leaf, product, stop
from effc.ir.select import op_name
from effc.passes.coupling_reading import (
    FREE,
    Axes,
    Call,
    Reading,
    Rule,
    fresh,
    is_list,
    made,
    position,
    size,
)


def _view(r: Reading, node: fx.Node, call: Call) -> Axes | None:
    sizes = call.first("size", "shape", "sizes")
    if op_name(node) != "flatten" and not is_list(sizes):
        return None
    x = r.of(node.args[0])
    shape = call.result.shape
    why = r.why(node, "dimensions are merged and split in unlike ways")
    # a dimension that stays where it is needs no new axis, nor does what lies outside of a change
    same = 0
    while same < min(len(x), len(shape)) and x[same].size == size(shape[same]):
        same += 1
    behind = 0
    limit = min(len(x), len(shape)) - same
    while behind < limit and x[-1 - behind].size == size(shape[len(shape) - 1 - behind]):
        behind += 1
    middle = [made(s) for s in shape[same : len(shape) - behind]]
    axes.align(x[same : len(x) - behind], middle, why)
    found = [*x[:same], *middle, *x[len(x) - behind :]]
    if op_name(node) == "flatten":
        return found
    name = next(n for n in ("size", "shape", "sizes") if n in call.values)
    start = position(call["dim"], len(x)) if op_name(node) == "unflatten" else 0
    _sizes(r, call, name, sizes, found[start : start + len(sizes)])
    return found


def _view_as(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(call["other"]))
    why = r.why(node, "dimensions are merged and split in unlike ways")
    axes.align(r.of(node.args[0]), found, why)
    return found


def _sizes(r: Reading, call: Call, name: str, sizes: Sequence[Any], found: Axes) -> None:
    """Sizes that a call is given; a computed one cannot be changed, and −1 need not be."""
    for place, (given, axis) in enumerate(zip(sizes, found, strict=True)):
        if isinstance(given, fx.Node):
            why = r.why(call.node, "it is part of a size that is computed from free dimensions")
            r.unspoken.append((axis, why))
        elif given != -1 and axis is not ONE:
            r.literal(call, name, place, axis)


def _permute(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = r.of(node.args[0])
    return [x[d] for d in call["dims"]]


def _transpose(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    a, b = (call.first(n, f"axis{n[-1]}") for n in ("dim0", "dim1"))
    found[a], found[b] = found[b], found[a]
    return found


def _movedim(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = r.of(node.args[0])
    pairs = [n if is_list(n) else [n] for n in (call["source"], call["destination"])]
    source, goal = ([position(d, len(x)) for d in dims] for dims in pairs)
    rest = iter(a for d, a in enumerate(x) if d not in source)
    at = dict(zip(goal, source, strict=True))
    return [x[at[d]] if d in at else next(rest) for d in range(len(x))]


def _reversed(r: Reading, node: fx.Node, call: Call) -> Axes:
    return list(r.of(node.args[0]))[::-1]


def _unsqueeze(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    found.insert(position(call["dim"], len(found) + 1), ONE)
    return found


def _squeeze(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = r.of(node.args[0])
    given = call["dim"]
    dims = range(len(x)) if given is None else given if is_list(given) else [given]
    over = {position(d, len(x)) for d in dims}
    for dim in over:
        stop(x[dim], r.why(node, "it would be squeezed away at size 1"))
    return [a for d, a in enumerate(x) if d not in over or not axes.is_one(a.size)]


def _expand(r: Reading, node: fx.Node, call: Call) -> Axes:
    x, sizes = r.of(node.args[0]), call["size"]
    shape = call.result.shape
    found: Axes = []
    for place, dimension in enumerate(shape):
        back = len(shape) - place
        old = x[-back] if len(x) >= back else ONE
        found.append(old if old.size == size(dimension) else made(dimension))
    if sizes is not None:
        _sizes(r, call, "size", sizes, found)
    else:
        other = r.of(call["other"])
        found = r.broadcast(node, [found, other], shape)
    return found


def _repeat(r: Reading, node: fx.Node, call: Call) -> Axes:
    x, times = r.of(node.args[0]), call["repeats"]
    found: Axes = []
    for place, count in enumerate(times):
        back = len(times) - place
        old = x[-back] if len(x) >= back else ONE
        if isinstance(count, fx.Node) or not isinstance(old.size, int):
            stop(old, r.why(node, "it is repeated a computed number of times"))
            found.append(old if count == 1 else made(call.result.shape[place], FREE))
            continue
        again = leaf(count)
        found.append(product([again, old]))
        if count > 1:
            r.literal(call, "repeats", place, again)
    return found


def _repeat_interleave(r: Reading, node: fx.Node, call: Call) -> Axes | None:
    if not isinstance(call["repeats"], int) or call["dim"] is None:
        return None
    found = list(r.of(node.args[0]))
    again = leaf(call["repeats"])
    dim = call["dim"]
    if not isinstance(found[dim].size, int):
        return None
    found[dim] = product([found[dim], again])
    r.literal(call, "repeats", None, again)
    return found


def _filled(r: Reading, node: fx.Node, call: Call) -> Axes:
    """A tensor of one number, of given sizes."""
    found = [made(s) for s in call.result.shape]
    _sizes(r, call, "size", call["size"], found)
    return found


def _numbered(r: Reading, node: fx.Node, call: Call) -> Axes:
    return fresh(call.result, r.why(node, "it counts places", is_plain=True))


TABLE: dict[str, Rule] = {
    "view reshape _unsafe_view flatten unflatten": _view,
    "view_as reshape_as": _view_as,
    "permute": _permute,
    "transpose swapaxes swapdims": _transpose,
    "movedim moveaxis": _movedim,
    "t numpy_T": _reversed,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand expand_as broadcast_to": _expand,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "full zeros ones empty new_full new_zeros new_ones new_empty": _filled,
    "arange scalar_tensor linspace": _numbered,
}
