"""A graph whose tensors are parameters: trained where they stand, while the graph's own are left as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.ir.program import Graph, place_of
from effc.ir.select import op_name


class InGraph(nn.Module):
    """A graph as a module of feeds by name; the tensors of those `names` are its parameters, a shared one once.

    Tensors in `instead` stand in the place of the graph's own, and of its parameters. With `dropout` that share of what
    linear layers read is left out wherever a gradient is asked for, and the rest is scaled up.
    """

    def __init__(self, graph: Graph, names: Sequence[str], dropout: float = 0.0) -> None:
        super().__init__()
        self.graph = graph
        self.noisy = [_with_dropout(graph, dropout)] if dropout else []
        self.places: dict[str, int] = {}
        by_place: dict[Any, int] = {}
        weights: list[nn.Parameter] = []
        for name, tensor in graph.tensors().items():
            key = place_of(tensor)
            if name in names and key not in by_place:
                by_place[key] = len(weights)
                weights.append(nn.Parameter(tensor.detach().clone()))
        for name, tensor in graph.tensors().items():
            if (place := by_place.get(place_of(tensor))) is not None:
                self.places[name] = place
        self.weights = nn.ParameterList(weights)
        self.instead: dict[str, Tensor] = {}

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        arguments = self.graph.arguments(feeds, {**self.live(), **self.instead})
        run = self.graph.exported.graph_module
        if self.noisy and torch.is_grad_enabled():
            run = self.noisy[0]
        values = run(*arguments)
        return dict(zip(self.graph.outputs, values, strict=True))

    def live(self) -> dict[str, Tensor]:
        """The parameters by the names of the graph's tensors."""
        return {name: self.weights[place] for name, place in self.places.items()}

    def tensors(self) -> dict[str, Tensor]:
        """What stands in the graph of trained tensors, by name; one object for those that are shared."""
        held = [weight.detach() for weight in self.weights]
        found = {name: held[place] for name, place in self.places.items()}
        return found | {name: tensor.detach() for name, tensor in self.instead.items()}


def _with_dropout(graph: Graph, share: float) -> fx.GraphModule:
    """The graph with something left out of what linear layers read."""
    made = copy.copy(graph.exported.graph_module)
    found = fx.GraphModule(made, copy.deepcopy(made.graph))
    for node in [n for n in found.graph.nodes if op_name(n) == "linear"]:
        with found.graph.inserting_before(node):
            read = found.graph.call_function(
                torch.ops.aten.dropout.default, (node.args[0], share, True)
            )
        node.replace_input_with(node.args[0], read)
    found.recompile()
    return found


def mask_of(feeds: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of padded positions of feeds, where they have one."""
    mask = feeds.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
