"""Is the graph sound, and does it still compute the same? Numbers first, words after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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


def drift(a: Mapping[str, Tensor], b: Mapping[str, Tensor], mask: Tensor | None = None) -> Drift:
    """The worst drift over outputs of the same name. A NaN on one side only counts as infinite.

    `mask` [batch, length] leaves out padded positions of outputs that have these two axes: nobody reads them.
    """
    worst = Drift()
    for name, left in a.items():
        x, y = left.to(torch.float64), b[name].to(torch.float64)
        if x.shape != y.shape or not torch.equal(x.isnan(), y.isnan()):
            return Drift(max_abs=float("inf"), rel_l2=float("inf"))
        if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
            x, y = x[mask.bool()], y[mask.bool()]
        x, y = torch.nan_to_num(x), torch.nan_to_num(y)
        gap = x - y
        if not gap.numel():
            continue
        norm = float(x.norm())
        rel = float(gap.norm()) / norm if norm else float(gap.norm())
        worst = worst.worst(Drift(max_abs=float(gap.abs().max()), rel_l2=rel))
    return worst


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
