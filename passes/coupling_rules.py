"""What every operator says about the dimensions that it reads and makes.

A rule gives the axes of what a call makes, unifies what must stay alike, stops what may lose no index, and notes the
numbers in the call that are sizes of axes. Removing indices is exact where a value that is 0 adds nothing: sums and
products with weights are such places; means, softmax, maxima and norms are not. What no rule knows is stopped whole.

Rules lie in files by what they are about: `coupling_products`, `coupling_norms`, `coupling_shapes`, `coupling_parts`.
Those here go value by value.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from effc.ir.axes import ONE, unify
from effc.ir.select import op_name
from effc.passes import coupling_norms, coupling_parts, coupling_products, coupling_shapes
from effc.passes.coupling_reading import Axes, Call, Reading, Rule, tensors_of


def read(r: Reading, node: fx.Node) -> None:
    """Take up one call."""
    if not tensors_of(node.meta.get("val")):
        return
    by_value = torch.Tag.pointwise in getattr(node.target, "tags", ())
    rule = _elementwise if by_value else RULES.get(op_name(node))
    found = rule(r, node, Call(node)) if rule is not None else None
    r.dims[node] = found if found is not None else r.unknown(node)


def _elementwise(r: Reading, node: fx.Node, call: Call) -> Axes:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return r.unknown(node)  # type: ignore[no-any-return]
    operands = [r.of(n) for n in node.all_input_nodes]
    return r.broadcast(node, [o for o in operands if o], value.shape)


def _prelu(r: Reading, node: fx.Node, call: Call) -> Axes:
    found, (slope,) = list(r.of(call["self"])), r.of(call["weight"])
    if slope is not ONE:
        unify(found[min(1, len(found) - 1)], slope, r.why(node, "slopes are grouped otherwise"))
    return found


def _same(r: Reading, node: fx.Node, call: Call) -> Axes:
    return list(r.of(node.args[0]))


TABLE: dict[str, Rule] = {
    "to _to_copy clone contiguous dropout feature_dropout alpha_dropout alias detach lift_fresh_copy "
    "zeros_like ones_like full_like empty_like fill": _same,
    "where masked_fill hardswish log_sigmoid rsub type_as floor_divide": _elementwise,
    "prelu": _prelu,
}
RULES = {
    word: rule
    for table in (
        TABLE, coupling_products.TABLE, coupling_norms.TABLE, coupling_shapes.TABLE, coupling_parts.TABLE,
    )
    for words, rule in table.items()
    for word in words.split()
}  # fmt: skip
