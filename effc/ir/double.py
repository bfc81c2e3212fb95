"""A graph in float64: what is still different there is no rounding of float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effc.ir.edit import rebind, refresh
from effc.ir.program import Graph


def in_double(graph: Graph) -> Graph:
    """A copy that computes in float64 what the graph computes in float32, from inputs of float64; twice as large."""
    made = graph.clone()
    for name, tensor in made.tensors().items():
        if tensor.dtype == torch.float32:
            rebind(made, name, tensor.double(), "in float64")
    for node in made.fx.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == torch.float32:
            node.meta["val"] = value.double()
        node.args, node.kwargs = (torch.fx.node.map_aggregate(a, _wider) for a in (node.args, node.kwargs))  # fmt: skip
    refresh(made)
    return made


def doubled(feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs as such a graph takes them."""
    return {n: v.double() if v.dtype == torch.float32 else v for n, v in feeds.items()}


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
