"""What every operator says about the dimensions that it reads and makes.

A rule gives the axes of what a call makes, unifies what must stay alike, stops what may lose no index, and notes the
numbers in the call that are sizes of axes. Removing indices is exact where a value that is 0 adds nothing: sums and
products with weights are such places; means, softmax, maxima and norms are not. What no rule knows is stopped whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir import axes
from effc.ir.axes import ONE, Axis, Stop, leaf, product, stop, total, unify
from effc.ir.select import op_name

Axes = list[Axis]
Path = tuple[Any, ...]
"""Where a number stands in a call: number or word of the argument, and its place in a list."""


@dataclass(frozen=True, kw_only=True)
class Literal:
    """A number in a call that is the size of axes laid end to end, and `plus` of what is not removed."""

    node: fx.Node
    path: Path
    axes: tuple[Axis, ...]
    plus: int = 0


@dataclass(frozen=True, kw_only=True)
class Use:
    """A call that multiplies with a weight, the axis that it writes and the one that it sums over."""

    node: fx.Node
    weight: fx.Node
    writes: Axis
    reads: Axis
    positions: int
    """How often the weight is used for one position of the free dimensions."""


@dataclass
class Reading:
    """What is known of a graph so far."""

    names: dict[fx.Node, str]
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    """Axes of every tensor, one a dimension; a list of them where a call makes several tensors."""
    inputs: list[fx.Node] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    cuts: list[tuple[fx.Node, Axes]] = field(default_factory=list)
    """Calls that cut a dimension into equal parts, which may become unequal."""
    norms: list[tuple[fx.Node, Axis]] = field(default_factory=list)
    """RMSNorms, whose gain and epsilon hang on how many there are."""
    scales: list[tuple[fx.Node, Axis]] = field(default_factory=list)
    """Attention that scales by the size of a head without saying so."""
    uses: list[Use] = field(default_factory=list)
    unspoken: list[tuple[Axis, Stop]] = field(default_factory=list)
    """Axes within a size that is computed from free dimensions."""

    def of(self, node: object) -> Axes:
        if not isinstance(node, fx.Node):
            return []
        found = self.dims.get(node, [])
        return found if not found or isinstance(found[0], Axis) else []

    def why(self, node: fx.Node, reason: str, hint: str = "", *, is_plain: bool = False) -> Stop:
        where = self.names.get(node, node.name)
        return Stop(reason=reason, node=where, hint=hint, is_plain=is_plain)

    def read(self, node: fx.Node) -> None:
        """Take up one call."""
        if not tensors_of(node.meta.get("val")):
            return
        by_value = torch.Tag.pointwise in getattr(node.target, "tags", ())
        rule = _elementwise if by_value else RULES.get(op_name(node))
        found = rule(self, node, Call(node)) if rule is not None else None
        self.dims[node] = found if found is not None else self.unknown(node)

    def unknown(self, node: fx.Node) -> Any:
        """Everything that a call reads and makes is stopped."""
        why = self.why(node, f"nothing is known of {op_name(node)}")
        for source in node.all_input_nodes:
            for axis in every(self.dims.get(source, [])):
                stop(axis, why)
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return fresh(value, why)
        return [fresh(v, why) if isinstance(v, Tensor) else [] for v in value]

    def literal(
        self, call: Call, name: str, place: int | None, *found: Axis, plus: int = 0
    ) -> None:
        path: Path = (call.places[name],) if place is None else (call.places[name], place)
        self.literals.append(Literal(node=call.node, path=path, axes=found, plus=plus))


class Call:
    """The arguments of a call by the names that its schema gives them, and where they stand."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.values: dict[str, Any] = {}
        self.places: dict[str, Any] = {}
        schema = getattr(node.target, "_schema", None)
        for number, argument in enumerate(schema.arguments if schema is not None else ()):
            if number < len(node.args):
                self.values[argument.name], place = node.args[number], number
            elif argument.name in node.kwargs:
                self.values[argument.name], place = node.kwargs[argument.name], argument.name
            else:
                self.values[argument.name], place = argument.default_value, None
            self.places[argument.name] = place

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def first(self, *names: str) -> Any:
        return next((self.values[name] for name in names if name in self.values), None)


def tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def every(found: Any) -> Iterable[Axis]:
    """The axes of a value, or of all the values of a call."""
    for item in found:
        if isinstance(item, Axis):
            yield item
        else:
            yield from item


def size(dimension: Any) -> Any:
    return dimension.node.expr if isinstance(dimension, torch.SymInt) else int(dimension)


def fresh(value: Tensor, why: Stop) -> Axes:
    return [made(d, why) for d in value.shape]


FREE = Stop(reason="it is a free dimension", is_plain=True)


def made(dimension: Any, why: Stop | None = None) -> Axis:
    """A new axis for a dimension; a free one is stopped."""
    found = size(dimension)
    return leaf(found, why if isinstance(found, int) else FREE)


def _value(call: Call) -> Tensor:
    value = call.node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def _position(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


# -- value by value


def _elementwise(r: Reading, node: fx.Node, call: Call) -> Axes:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return r.unknown(node)  # type: ignore[no-any-return]
    operands = [r.of(n) for n in node.all_input_nodes]
    return broadcast(r, node, [o for o in operands if o], value.shape)


def broadcast(r: Reading, node: fx.Node, operands: Sequence[Axes], shape: Sequence[Any]) -> Axes:
    """Axes of what operands give that are aligned at the right; those of one size are one."""
    why = r.why(node, "operands are grouped in unlike ways")
    found: Axes = []
    for place in range(len(shape)):
        back = len(shape) - place
        mine = [o[-back] for o in operands if len(o) >= back and not axes.is_one(o[-back].size)]
        for other in mine[1:]:
            unify(mine[0], other, why)
        found.append(mine[0] if mine else made(shape[place], FREE))
    return found


def _prelu(r: Reading, node: fx.Node, call: Call) -> Axes:
    found, (slope,) = list(r.of(call["self"])), r.of(call["weight"])
    if slope is not ONE:
        unify(found[min(1, len(found) - 1)], slope, r.why(node, "slopes are grouped otherwise"))
    return found


def _same(r: Reading, node: fx.Node, call: Call) -> Axes:
    return list(r.of(node.args[0]))


def _stops(reason: str, *names: str) -> Callable[[Reading, fx.Node, Call], Axes]:
    """Same shape, and the dimensions that the arguments name may lose nothing."""

    def rule(r: Reading, node: fx.Node, call: Call) -> Axes:
        found = list(r.of(node.args[0]))
        given = call.first(*names)
        dims = range(len(found)) if given is None else given if _is_list(given) else [given]
        for dim in dims or range(len(found)):
            stop(found[dim], r.why(node, reason))
        return found

    return rule


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _triangle(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    for axis in found[-2:]:
        stop(axis, r.why(node, "a triangle is cut by position"))
    return found


# -- sums with weights


def _linear(r: Reading, node: fx.Node, call: Call) -> Axes:
    x, weight, bias = (r.of(call[name]) for name in ("input", "weight", "bias"))
    unify(x[-1], weight[-1], r.why(node, "input and weight are grouped in unlike ways"))
    if len(weight) == 1:
        return x[:-1]
    if bias:
        unify(weight[0], bias[0], r.why(node, "weight and bias are grouped in unlike ways"))
    positions = _static(node.meta["val"].shape[:-1])
    r.uses.append(
        Use(
            node=node, weight=call["weight"], writes=weight[0], reads=weight[1], positions=positions
        )
    )
    return [*x[:-1], weight[0]]


def _static(shape: Iterable[Any]) -> int:
    return math.prod(s for s in map(size, shape) if isinstance(s, int))


def _matmul(r: Reading, node: fx.Node, call: Call) -> Axes:
    a, b = call.first("self", "input"), call.first("other", "mat2", "tensor2")
    return _product_of(r, node, a, b, _value(call).shape)


def _product_of(r: Reading, node: fx.Node, a: Any, b: Any, shape: Sequence[Any]) -> Axes:
    x, y = r.of(a), r.of(b)
    unify(x[-1], y[-2] if len(y) > 1 else y[0], r.why(node, "factors are grouped in unlike ways"))
    if a.op == "placeholder" and b.op == "placeholder":
        stop(x[-1], r.why(node, "both factors are given"))
    rows, columns = x[-2:-1], y[-1:] if len(y) > 1 else []
    batch = shape[: len(shape) - len(rows) - len(columns)]
    found = broadcast(r, node, [x[:-2], y[:-2]], batch)
    if len(y) == 2 and b.op == "placeholder":
        use = Use(node=node, weight=b, writes=y[1], reads=y[0], positions=_static(shape[:-1]))
        r.uses.append(use)
    return [*found, *rows, *columns]


def _added_matmul(r: Reading, node: fx.Node, call: Call) -> Axes:
    a, b = call.first("mat1", "batch1"), call.first("mat2", "batch2")
    found = _product_of(r, node, a, b, _value(call).shape)
    return broadcast(r, node, [found, r.of(call["self"])], _value(call).shape)


def _einsum(r: Reading, node: fx.Node, call: Call) -> Axes | None:
    text = str(call["equation"]).replace(" ", "")
    if "..." in text or "->" not in text:
        return None
    left, _, right = text.partition("->")
    known: dict[str, Axis] = {}
    why = r.why(node, "factors are grouped in unlike ways")
    for letters, operand in zip(left.split(","), call["tensors"], strict=True):
        for letter, axis in zip(letters, r.of(operand), strict=True):
            if (
                letter in known
                and not axes.is_one(axis.size)
                and not axes.is_one(known[letter].size)
            ):
                unify(known[letter], axis, why)
            elif letter not in known or not axes.is_one(axis.size):
                known[letter] = axis
    return [known[letter] for letter in right]


def _convolution(r: Reading, node: fx.Node, call: Call) -> Axes:
    x, weight, bias = (list(r.of(call[name])) for name in ("input", "weight", "bias"))
    turned = "transpose" in op_name(node)
    channel = len(x) - len(weight) + 1
    groups = call["groups"]
    why = r.why(node, "channels are grouped in unlike ways")
    into, out = weight[0 if turned else 1], weight[1 if turned else 0]
    if groups == 1:
        unify(x[channel], into, why)
    else:
        per_in, per_out = (axes.quotient(s.size, groups) for s in (x[channel], out))
        if turned:
            per_out = out.size
        of_groups = leaf(groups)
        inner, outer = leaf(per_in), leaf(per_out)
        unify(x[channel], product([of_groups, inner]), why)
        rows, columns = (into, out) if turned else (out, into)
        unify(rows, product([of_groups, inner if turned else outer]), why)
        if not axes.is_one(columns.size):
            unify(columns, outer if turned else inner, why)
        if turned:
            out = product([of_groups, outer])
        r.literal(call, "groups", None, of_groups)
    if bias:
        unify(out, bias[0], why)
    for axis in weight[2:]:
        stop(axis, r.why(node, "it is a side of a kernel", is_plain=True))
    wide = r.why(node, "it is a side of a picture", is_plain=True)
    for axis in x[channel + 1 :]:
        stop(axis, wide)
    shape = _value(call).shape
    use = Use(
        node=node,
        weight=call["weight"],
        writes=out,
        reads=into,
        positions=_static(shape[channel + 1 :]),
    )
    r.uses.append(use)
    return [*x[:channel], out, *(made(s, wide) for s in shape[channel + 1 :])]


def _embedding(r: Reading, node: fx.Node, call: Call) -> Axes:
    weight = r.of(call["weight"])
    stop(weight[0], r.why(node, "rows are looked up by number"))
    use = Use(node=node, weight=call["weight"], writes=weight[1], reads=weight[0], positions=0)
    r.uses.append(use)
    return [*r.of(call["indices"]), weight[1]]


def _attention(r: Reading, node: fx.Node, call: Call) -> Axes:
    q, k, v = (r.of(call[name]) for name in ("query", "key", "value"))
    why = r.why(node, "queries, keys and values are grouped in unlike ways")
    unify(q[-1], k[-1], why)
    if call["scale"] is None:
        r.scales.append((node, q[-1]))
    unify(k[-2], v[-2], why)
    stop(k[-2], r.why(node, "attention's softmax runs over it", is_plain=True))
    if call["is_causal"]:
        stop(q[-2], r.why(node, "attention's mask counts places", is_plain=True))
    lead = [q[:-2], k[:-2], v[:-2]]
    if call["enable_gqa"] and q[-3].size != k[-3].size:
        unify(k[-3], v[-3], why)
        unify(q[-3], product([k[-3], leaf(axes.quotient(q[-3].size, k[-3].size))]), why)
        lead = [q[:-2], [*k[:-3], ONE], [*v[:-3], ONE]]
    shape = _value(call).shape
    found = broadcast(r, node, lead, shape[:-2])
    mask = r.of(call["attn_mask"])
    if mask:
        broadcast(r, node, [mask, [*found, q[-2], k[-2]]], [*shape[:-1], k[-2].size])
    return [*found, q[-2], v[-1]]


# -- norms and reductions


def _layer_norm(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(call["input"]))
    hint = "put layernorm-to-rmsnorm first"
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
        dims = list(given) if _is_list(given) else [given] if given is not None else []
        over = {_position(d, len(x)) for d in dims} or set(range(len(x)))
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


# -- places of values


def _view(r: Reading, node: fx.Node, call: Call) -> Axes | None:
    sizes = call.first("size", "shape", "sizes")
    if op_name(node) != "flatten" and not _is_list(sizes):
        return None
    x = r.of(node.args[0])
    shape = _value(call).shape
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
    start = _position(call["dim"], len(x)) if op_name(node) == "unflatten" else 0
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
    pairs = [n if _is_list(n) else [n] for n in (call["source"], call["destination"])]
    source, goal = ([_position(d, len(x)) for d in dims] for dims in pairs)
    rest = iter(a for d, a in enumerate(x) if d not in source)
    at = dict(zip(goal, source, strict=True))
    return [x[at[d]] if d in at else next(rest) for d in range(len(x))]


def _reversed(r: Reading, node: fx.Node, call: Call) -> Axes:
    return list(r.of(node.args[0]))[::-1]


def _unsqueeze(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    found.insert(_position(call["dim"], len(found) + 1), ONE)
    return found


def _squeeze(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = r.of(node.args[0])
    given = call["dim"]
    dims = range(len(x)) if given is None else given if _is_list(given) else [given]
    over = {_position(d, len(x)) for d in dims}
    for dim in over:
        stop(x[dim], r.why(node, "it would be squeezed away at size 1"))
    return [a for d, a in enumerate(x) if d not in over or not axes.is_one(a.size)]


def _expand(r: Reading, node: fx.Node, call: Call) -> Axes:
    x, sizes = r.of(node.args[0]), call["size"]
    shape = _value(call).shape
    found: Axes = []
    for place, dimension in enumerate(shape):
        back = len(shape) - place
        old = x[-back] if len(x) >= back else ONE
        found.append(old if old.size == size(dimension) else made(dimension))
    if sizes is not None:
        _sizes(r, call, "size", sizes, found)
    else:
        other = r.of(call["other"])
        found = broadcast(r, node, [found, other], shape)
    return found


def _repeat(r: Reading, node: fx.Node, call: Call) -> Axes:
    x, times = r.of(node.args[0]), call["repeats"]
    found: Axes = []
    for place, count in enumerate(times):
        back = len(times) - place
        old = x[-back] if len(x) >= back else ONE
        if isinstance(count, fx.Node) or not isinstance(old.size, int):
            stop(old, r.why(node, "it is repeated a computed number of times"))
            found.append(old if count == 1 else made(_value(call).shape[place], FREE))
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


def _cat(r: Reading, node: fx.Node, call: Call) -> Axes | None:
    parts = [r.of(part) for part in call["tensors"]]
    parts = [p for p in parts if not (len(p) == 1 and p[0].size == 0)]
    dim = _position(call["dim"] or 0, len(parts[0]))
    shape = _value(call).shape
    rest = [[ONE if d == dim else a for d, a in enumerate(p)] for p in parts]
    found = broadcast(r, node, rest, [1 if d == dim else s for d, s in enumerate(shape)])
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
    shape = list(_value(call).shape)
    dim = _position(call["dim"] or 0, len(shape))
    number = shape.pop(dim)
    found = broadcast(r, node, parts, shape)
    found.insert(dim, made(number, r.why(node, "it counts what is stacked", is_plain=True)))
    return found


def _split(r: Reading, node: fx.Node, call: Call) -> list[Axes]:
    x = r.of(node.args[0])
    dim = _position(call["dim"] or 0, len(x))
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
    dim = _position(call["dim"] or 0, len(x))
    stop(x.pop(dim), r.why(node, "each of it has a place of its own", is_plain=True))
    return [list(x) for _ in node.meta["val"]]


def _getitem(r: Reading, node: fx.Node, call: Call) -> Any:
    return r.dims[node.args[0]][node.args[1]]  # type: ignore[index]


def _select(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = list(r.of(node.args[0]))
    gone = x.pop(_position(call["dim"], len(x)))
    stop(gone, r.why(node, "one of it is taken by its number", is_plain=True))
    return x


def _slice(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    dim = _position(call["dim"] or 0, len(found))
    whole, step = found[dim], call["step"] or 1
    start, end = call["start"] or 0, call["end"]
    why = r.why(node, "it is cut at computed places")
    numbers = all(isinstance(n, int | None) for n in (start, end, step))
    if not numbers or not isinstance(whole.size, int):
        stop(whole, why)
        found[dim] = made(_value(call).shape[dim], why)
        return found
    n = whole.size
    low = min(n, start + n if start < 0 else start)
    high = n if end is None else min(n, end + n if end < 0 else end)
    if step == 1:
        return _part(r, call, found, dim, low, high)
    if low >= step or high < n or n % step:
        stop(whole, why)
        found[dim] = made(_value(call).shape[dim], why)
        return found
    parts = axes.split(whole, n // step, step, why)
    if parts is None:
        stop(whole, why)
        found[dim] = made(_value(call).shape[dim], why)
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
    value = _value(call)
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
    return [*rest[:at], *broadcast(r, node, [r.of(i) for _, i in given], shape), *rest[at:]]


def _index_select(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    dim = _position(call["dim"], len(found))
    stop(found[dim], r.why(node, "it is looked up by number"))
    found[dim] = next(iter(r.of(call["index"])), ONE)
    return found


def _gather(r: Reading, node: fx.Node, call: Call) -> Axes:
    """Every index of the result picks along one dimension, and keeps to its place in the others."""
    x, index = r.of(node.args[0]), r.of(call["index"])
    for dim, (mine, axis) in enumerate(zip(index, x, strict=True)):
        if dim == _position(call["dim"], len(x)):
            stop(axis, r.why(node, "it is looked up by number"))
        elif not (axes.is_one(mine.size) and axes.is_one(axis.size)):
            unify(mine, axis, r.why(node, "part of it is looked up"))
    return list(index)


def _pad(r: Reading, node: fx.Node, call: Call) -> Axes:
    found, pads = list(r.of(node.args[0])), call["pad"]
    shape = _value(call).shape
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
        for v in tensors_of(values)
    ]
    return found[0] if isinstance(values, Tensor) else found


def _sides(node: fx.Node) -> int:
    word = op_name(node)
    return next((n for n in (1, 2, 3) if f"{n}d" in word), 0) or (1 if "linear1d" in word else 2)


def _pixel_shuffle(r: Reading, node: fx.Node, call: Call) -> Axes:
    x = list(r.of(node.args[0]))
    square = call["upscale_factor"] ** 2
    shape = _value(call).shape
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
    sides = [made(s, wide) for s in _value(call).shape[-2:]]
    return [*x[:-3], product([x[-3], square]), *sides]


def _glu(r: Reading, node: fx.Node, call: Call) -> Axes:
    found = list(r.of(node.args[0]))
    dim = _position(-1 if call["dim"] is None else call["dim"], len(found))
    why = r.why(node, "value and gate are grouped in unlike ways")
    a, b = axes.cut(found[dim], found[dim].size // 2, why)
    assert a is not None and b is not None
    unify(a, b, why)
    found[dim] = a
    return found


def _filled(r: Reading, node: fx.Node, call: Call) -> Axes:
    """A tensor of one number, of given sizes."""
    found = [made(s) for s in _value(call).shape]
    _sizes(r, call, "size", call["size"], found)
    return found


def _numbered(r: Reading, node: fx.Node, call: Call) -> Axes:
    return fresh(_value(call), r.why(node, "it counts places", is_plain=True))


Rule = Callable[[Reading, fx.Node, Call], Any]

_TABLE: dict[str, Rule] = {
    "to _to_copy clone contiguous dropout feature_dropout alpha_dropout alias detach lift_fresh_copy "
    "zeros_like ones_like full_like empty_like fill": _same,
    "where masked_fill hardswish log_sigmoid rsub type_as floor_divide": _elementwise,
    "prelu": _prelu,
    "softmax _softmax log_softmax _log_softmax softmin": _stops("a softmax runs over it", "dim"),
    "cumsum cumprod argsort logcumsumexp": _stops("the order along it counts", "dim"),
    "roll flip": _stops("places along it are moved", "dims"),
    "triu tril": _triangle,
    "linear": _linear,
    "matmul mm bmm mv": _matmul,
    "addmm baddbmm": _added_matmul,
    "einsum": _einsum,
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": _convolution,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
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
    "full zeros ones empty new_full new_zeros new_ones new_empty": _filled,
    "arange scalar_tensor linspace": _numbered,
}
RULES = {word: rule for words, rule in _TABLE.items() for word in words.split()}
