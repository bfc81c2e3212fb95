"""Sums of products with weights: who writes an axis and who reads it.

A unit that is 0 adds nothing to such a sum, so both sides may lose it. Convolutions in groups split their channels,
attention has heads, and queries may share those of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from effc.ir import axes
from effc.ir.axes import ONE, Axis, leaf, product, stop, unify
from effc.ir.select import op_name
from effc.passes.coupling_reading import Axes, Call, Reading, Rule, Use, made, size


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
    return _product_of(r, node, a, b, call.result.shape)


def _product_of(r: Reading, node: fx.Node, a: Any, b: Any, shape: Sequence[Any]) -> Axes:
    x, y = r.of(a), r.of(b)
    unify(x[-1], y[-2] if len(y) > 1 else y[0], r.why(node, "factors are grouped in unlike ways"))
    if a.op == "placeholder" and b.op == "placeholder":
        stop(x[-1], r.why(node, "both factors are given"))
    rows, columns = x[-2:-1], y[-1:] if len(y) > 1 else []
    batch = shape[: len(shape) - len(rows) - len(columns)]
    found = r.broadcast(node, [x[:-2], y[:-2]], batch)
    if len(y) == 2 and b.op == "placeholder":
        use = Use(node=node, weight=b, writes=y[1], reads=y[0], positions=_static(shape[:-1]))
        r.uses.append(use)
    return [*found, *rows, *columns]


def _added_matmul(r: Reading, node: fx.Node, call: Call) -> Axes:
    a, b = call.first("mat1", "batch1"), call.first("mat2", "batch2")
    found = _product_of(r, node, a, b, call.result.shape)
    return r.broadcast(node, [found, r.of(call["self"])], call.result.shape)


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
    shape = call.result.shape
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
    shape = call.result.shape
    found = r.broadcast(node, lead, shape[:-2])
    mask = r.of(call["attn_mask"])
    if mask:
        r.broadcast(node, [mask, [*found, q[-2], k[-2]]], [*shape[:-1], k[-2].size])
    return [*found, q[-2], v[-1]]


TABLE: dict[str, Rule] = {
    "linear": _linear,
    "matmul mm bmm mv": _matmul,
    "addmm baddbmm": _added_matmul,
    "einsum": _einsum,
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d": _convolution,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
}
