"""Where the channels of an activation can be scaled, and the scaling itself: what `smooth` and `awq` share.

    W x  =  (W · diag(s)) (x / s)

What is in front of the activation takes up the 1 / s where it can (`absorb`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.edit import insert, is_constant, lift, rebind, tensor_name, tensor_of
from effc.ir.program import Graph, Origin
from effc.ir.select import op_name
from effc.passes.absorb import owners
from effc.quant.channels import channels

LAYERS = ("linear", "conv1d", "conv2d")


@dataclass(frozen=True)
class Place:
    """An activation, the axis of its channels, the layers that read it, and the constants that take up 1 / s."""

    value: fx.Node
    axis: int
    layers: list[fx.Node]
    owners: list[fx.Node]


def places(graph: Graph, sites: Iterable[fx.Node]) -> list[Place]:
    """The activations that may be scaled, with the layers that read them, each of which has a weight of its own."""
    found: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    for node in sites:
        value = node.args[0] if node.args else None
        if op_name(node) not in LAYERS or not isinstance(value, fx.Node):
            continue
        if _has_own_weight(graph, node) and _has_batch(node):
            axis = 1 if op_name(node).startswith("conv") else -1
            found.setdefault((value, axis), []).append(node)
    return [
        Place(v, axis, layers, owners(graph, v, axis) if set(v.users) == set(layers) else [])
        for (v, axis), layers in found.items()
    ]


def rescale(graph: Graph, key: str, place: Place, factors: Tensor, word: str) -> None:
    """Multiply the weights of a place by `factors` s, one a channel, and divide its owners, or else the activation."""
    for layer in place.layers:
        weight: Any = layer.args[1]
        tensor = tensor_of(graph, weight)
        spread = factors[channels(tensor, len(factors))]
        made = tensor * spread.reshape(*spread.shape, *[1] * (tensor.dim() - 2))
        rebind(graph, tensor_name(graph, weight) or "", made, word)
    for owner in place.owners:
        tensor = tensor_of(graph, owner)
        made = tensor / factors.reshape(-1, *[1] * (tensor.dim() - 1))
        rebind(graph, tensor_name(graph, owner) or "", made, word)
    if not place.owners:
        name = key.partition("/")[2].replace(":", ".")
        inverse = lift(graph, f"{name}_{word}", 1 / factors, Origin(key, (word,)))
        scaled = insert(graph, place.layers[0], torch.ops.aten.mul.Tensor, (place.value, inverse))
        for layer in place.layers:
            layer.update_arg(0, scaled)


def _has_batch(layer: fx.Node) -> bool:
    """Whether the channels of a convolution's input are its second axis: one picture may come without a batch."""
    ranks = [part.meta["val"].dim() for part in layer.args[:2]]  # type: ignore[union-attr]
    return op_name(layer) == "linear" or ranks[0] == ranks[1]


def _has_own_weight(graph: Graph, layer: fx.Node) -> bool:
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or not is_constant(graph, weight):
        return False
    return len(weight.users) == 1 and bool(weight.meta["val"].is_floating_point())
