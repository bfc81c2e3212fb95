"""What runs along an axis: norms, means, sums, softmax, orders.

A sum does not see a unit that is 0; a mean does, as it counts them, and so do a softmax and a maximum. An RMSNorm can
be told what it misses, and a group norm can lose whole groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from effc.ir import axes
from effc.ir.axes import ONE, Axis, stop, unify
from effc.ir.select import op_name
from effc.passes.coupling_reading import FREE, Axes, Call, Reading, Rule, fresh, is_list, position


def _stops(reason: str, *names: str) -> Callable[[Reading, fx.Node, Call], Axes]:
    """Same shape, and the dimensions that the arguments name may lose nothing."""

    def rule(r: Reading, node: fx.Node, call: Call) -> Axes:
        found = list(r.of(node.args[0]))
        given = call.first(*names)
        dims = range(len(found)) if given is None else given if is_list(given) else [given]
        for dim in dims or range(len(found)):
            stop(found[dim], r.why(node, reason))
        return found

    return rule


def _triangle(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    for axis in found[-2:]:
        stop(axis, r.why(node, "a triangle is cut by position"))
    return found


def _layer_norm(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(call["input"]))
    hint = "put layernorm-to-rmsnorm first, which takes the norms of a pre-LN model"
    count = len(call["normalized_shape"])
    _with_parts(r, node, found[-count:], call)
    for axis in found[-count:]:
        stop(axis, r.why(node, "layer_norm takes mean and variance over it", hint))
    return found


def _rms_norm(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(call["input"]))
    count = len(call["normalized_shape"])
    _with_parts(r, node, found[-count:], call)
    gain = call["weight"]
    alone = isinstance(gain, fx.Node) and gain.op == "placeholder"
    if count > 1 or not alone or any(op_name(user) != "rms_norm" for user in gain.users):
        for axis in found[-count:]:
            reason = "rms_norm has no gain of its own to correct"
            stop(axis, r.why(node, reason, "put fold-constants first"))
        return found
    r.literal(call, "normalized_shape", 0, found[-1])
    r.norms.append((node, found[-1]))
    return found


def _with_parts(r: Reading, node: fx.Node, found: Axes, call: Call) -> None:
    for name in ("weight", "bias"):
        for axis, mine in zip(found, r.of(call[name]), strict=False):
            unify(axis, mine, r.why(node, "gain and value are grouped in unlike ways"))


def _batch_norm(r: Reading, node: fx.Node, call: Call) -> Any:
    found = list(r.of(call["input"]))
    channel = min(1, len(found) - 1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        for mine in r.of(call[name]):
            unify(found[channel], mine, r.why(node, "channels are grouped in unlike ways"))
    values = node.meta["val"]
    if isinstance(values, Tensor):
        return found
    return [found, *(fresh(v, FREE) for v in values[1:])]


def _group_norm(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(call["input"]))
    channels, count = found[1], call["num_groups"]
    for axis in found[2:]:
        stop(axis, r.why(node, "group_norm takes mean and variance over it", is_plain=True))
    why = r.why(node, "it is part of a group that group_norm takes mean and variance over")
    for name in ("weight", "bias"):
        for mine in r.of(call[name]):
            unify(channels, mine, why)
    inner = channels.size // count
    parts = axes.split(channels, count, inner, why)
    if parts is not None:
        stop(parts[1], replace(why, is_plain=True))  # its whole groups are what can be removed
        r.literal(call, "num_groups", None, parts[0])
        return found
    groups, whole = _whole_groups(r, node, channels, inner)
    r.literal(call, "num_groups", None, *groups, plus=count - whole)
    return found


def _whole_groups(r: Reading, node: fx.Node, channels: Axis, inner: int) -> tuple[Axes, int]:
    """Groups of a norm that lie within one part of a sum, and their number; what is in others is stopped.

    Parts that a `cat` laid end to end need not hold whole groups.
    """
    why = r.why(node, "it shares a group of group_norm with what is laid beside it")
    ends, start = [], 0
    for part in axes.segments(channels):
        first, last = -(-start // inner) * inner, (start + part.size) // inner * inner
        start += part.size
        if last > first:
            ends.append((first, last))
    groups, whole = [], 0
    for first, last in ends:
        rest = axes.cut(channels, first, why)[1]
        middle = axes.cut(rest, last - first, why)[0] if rest is not None else None
        if middle is None:
            continue
        parts = axes.split(middle, (last - first) // inner, inner, why)
        if parts is None:
            continue
        stop(parts[1], replace(why, is_plain=True))
        groups.append(parts[0])
        whole += (last - first) // inner
    inside = {x for g in groups for x in axes.leaves(g)}
    for axis in axes.leaves(channels):
        if axis not in inside:
            stop(axis, why)
    return groups, whole


def _reduces(reason: str | None, hint: str = "") -> Callable[[Reading, fx.Node, Call], Any]:
    """Dimensions go, or become 1; with a `reason` they may lose nothing."""

    def rule(r: Reading, node: fx.Node, call: Call) -> Any:
        x = r.of(node.args[0])
        given = call["dim"]
        dims = list(given) if is_list(given) else [given] if given is not None else []
        over = {position(d, len(x)) for d in dims} or set(range(len(x)))
        if reason is not None:
            for dim in over:
                stop(x[dim], r.why(node, reason, hint))
        kept = [ONE if d in over else axis for d, axis in enumerate(x)]
        found = kept if call["keepdim"] else [a for d, a in enumerate(kept) if d not in over]
        values = node.meta["val"]
        return found if isinstance(values, Tensor) else [list(found) for _ in values]

    return rule


def _vector_norm(r: Reading, node: fx.Node, call: Call) -> Any:
    order = call["ord"]
    adds_nothing = isinstance(order, int | float) and order > 0
    return _reduces(None if adds_nothing else "zeros count in this norm")(r, node, call)


TABLE: dict[str, Rule] = {
    "softmax _softmax log_softmax _log_softmax softmin": _stops("a softmax runs over it", "dim"),
    "cumsum cumprod argsort logcumsumexp": _stops("the order along it counts", "dim"),
    "roll flip": _stops("places along it are moved", "dims"),
    "triu tril": _triangle,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm _native_batch_norm_legit_no_training": _batch_norm,
    "mean": _reduces(
        "a mean is taken over it", "put fuse-rmsnorm first if it is one of an RMSNorm"
    ),
    "sum": _reduces(None),
    "linalg_vector_norm": _vector_norm,
    "amax amin max min argmax argmin prod any all var std var_mean std_mean logsumexp norm": (
        _reduces("what is taken over it hangs on how many there are")
    ),
}
