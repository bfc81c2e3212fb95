"""A graph whose tensors are parameters: trained where they stand, while the graph's own are left as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.ir.program import Graph, place_of
from effc.ir.select import op_name
from effc.quant.ops import DEQUANTIZE, QUANTIZE

ATTENTION = "scaled_dot_product_attention"


class InGraph(nn.Module):
    """A graph as a module of feeds by name; the tensors of those `names` are its parameters, a shared one once.

    Tensors in `instead` stand in the place of the graph's own, and of its parameters. With `dropout` that share of what
    linear layers read is left out wherever a gradient is asked for, and the rest is scaled up. Attention is computed in
    float32 whatever products are of: on a processor its gradient in bfloat16 takes more than twice as long. What is
    rounded has the gradient of what is not (straight through, Bengio et al. 2013).
    """

    def __init__(self, graph: Graph, names: Sequence[str], dropout: float = 0.0) -> None:
        super().__init__()
        self.graph = graph
        self.plain = [_differentiable(graph.exported.graph_module)]
        self.noisy = [_with_dropout(self.plain[0], dropout)] if dropout else self.plain
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
        (run,) = self.noisy if torch.is_grad_enabled() else self.plain
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


def _differentiable(module: fx.GraphModule) -> fx.GraphModule:
    """The graph, or a copy where it has attention or rounds values."""
    if not any(op_name(node) == ATTENTION or is_rounding(node) for node in module.graph.nodes):
        return module
    found = _copied(module)
    for node in list(found.graph.nodes):
        if op_name(node) == ATTENTION:
            node.target = _attention
        if is_rounding(node):
            with found.graph.inserting_after(node):
                through = found.graph.call_function(_straight, (node.args[0].args[0], node))
            node.replace_all_uses_with(
                through, delete_user_cb=lambda user, made=through: user is not made
            )
    found.recompile()
    return found


def is_rounding(node: fx.Node) -> bool:
    """Whether a node gives what is left of values that were rounded to codes as the graph ran."""
    codes = node.args[0] if node.target is DEQUANTIZE else None
    return isinstance(codes, fx.Node) and codes.target is QUANTIZE


def _straight(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, to the last bit, with the gradient of `x`."""
    return rounded.detach() + (x - x.detach())


def _attention(*given: Any, **more: Any) -> Tensor:
    """aten's attention, of float32 inside autocast too."""
    inputs = list(given)
    if torch.is_autocast_enabled("cpu"):
        inputs = [x.float() if _is_half(x) else x for x in given]
    with torch.autocast("cpu", enabled=False):
        found: Tensor = torch.ops.aten.scaled_dot_product_attention.default(*inputs, **more)
    return found


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    return fx.GraphModule(copy.copy(module), copy.deepcopy(module.graph))


def _with_dropout(module: fx.GraphModule, share: float) -> fx.GraphModule:
    """A copy of the graph with something left out of what linear layers read."""
    found = _copied(module)
    for node in [n for n in found.graph.nodes if op_name(n) == "linear"]:
        with found.graph.inserting_before(node):
            read = found.graph.call_function(_dropped, (node.args[0], share))
        node.replace_input_with(node.args[0], read)
    found.recompile()
    return found


def _dropped(x: Tensor, share: float) -> Tensor:
    """Dropout; torch's own takes twice as long to draw on a processor."""
    kept = torch.rand(x.shape).ge_(share).mul_(1 / (1 - share))
    return x * kept.to(x.dtype)


def mask_of(feeds: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of padded positions of feeds, where they have one."""
    mask = feeds.get("attention_mask")
    return mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
