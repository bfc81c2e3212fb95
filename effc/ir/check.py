"""Is the graph sound, and does it still compute the same? Numbers first, words after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import TensorArgument

from effc.ir.program import LIFTED, Graph


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How far `b` is from `a`: largest difference, and ‖a − b‖ / ‖a‖."""

    max_abs: float = 0.0
    rel_l2: float = 0.0

    def worst(self, other: Drift) -> Drift:
        return Drift(
            max_abs=max(self.max_abs, other.max_abs), rel_l2=max(self.rel_l2, other.rel_l2)
        )


INFINITE = Drift(max_abs=float("inf"), rel_l2=float("inf"))
AT_ONCE = 1 << 20
"""Values that are compared at once."""


def drift(a: Mapping[str, Tensor], b: Mapping[str, Tensor], mask: Tensor | None = None) -> Drift:
    """The worst drift over outputs of the same name. A NaN on one side only counts as infinite.

    `mask` [batch, length] leaves out padded positions of outputs that have these two axes: nobody reads them.
    """
    worst = Drift()
    for name, left in a.items():
        right = b[name]
        if left.shape != right.shape:
            return INFINITE
        masked = mask is not None and left.dim() > 2 and left.shape[:2] == mask.shape
        most = gaps = norms = 0.0
        for x, y, kept in _pieces(left, right, mask if masked else None):
            if not torch.equal(x.isnan(), y.isnan()):
                return INFINITE
            x, y = torch.nan_to_num(x[kept]), torch.nan_to_num(y[kept])
            gap = x - y
            if gap.numel():
                most = max(most, float(gap.abs().max()))
            gaps, norms = gaps + float(gap.square().sum()), norms + float(x.square().sum())
        worst = worst.worst(Drift(max_abs=most, rel_l2=math.sqrt(gaps / norms if norms else gaps)))
    return worst


def _pieces(
    left: Tensor, right: Tensor, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Rows of two tensors in float64 and which of them count, not many at a time: logits are large."""
    kept = None if mask is None else mask.flatten().bool()
    rows = [torch.atleast_1d(t if mask is None else t.flatten(0, 1)) for t in (left, right)]
    step = max(1, AT_ONCE // max(1, rows[0][:1].numel()))
    for start in range(0, len(rows[0]), step):
        part = slice(start, start + step)
        x, y = (t[part].to(torch.float64) for t in rows)
        yield x, y, slice(None) if kept is None else kept[part]


def problems(graph: Graph) -> list[str]:
    """Every rule of a sound graph that this one breaks, in words; an empty list where it is sound."""
    found: list[str] = []
    exported = graph.exported
    placeholders = graph.placeholders()
    specs = exported.graph_signature.input_specs
    named = [s.arg.name for s in specs if isinstance(s.arg, TensorArgument)]
    found += [f"input {n} has no place in the signature" for n in placeholders if n not in named]
    found += [
        f"signature names {n}, which is not in the graph" for n in named if n not in placeholders
    ]
    for spec in specs:
        if spec.kind not in LIFTED:
            continue
        known = spec.target in exported.state_dict or spec.target in exported.constants
        if not known:
            found.append(f"{spec.target} has no tensor")
        elif spec.target not in graph.origins:
            found.append(f"{spec.target} has no origin")
    users = exported.graph_signature.user_inputs
    if len(users) != len(graph.inputs):
        found.append(f"{len(graph.inputs)} inputs are named but the graph has {len(users)}")
    if len(exported.graph_signature.output_specs) != len(graph.outputs):
        found.append("outputs and their names differ in number")
    found += [f"{n.name} has no shape" for n in graph.nodes if "val" not in n.meta]
    return found
