"""Brings the channels in front of linear layers to one middle and one size, in what lies before them (RepQ-ViT).

    W x + b  =  (W · diag(s)) ((x − z) / s) + (b + W z)        z, s [channels]  (Li et al. 2023, equations 5 to 8)

A grid for every channel would lose least where a norm gives channels that are unlike, and no kernel takes one. Here the
norm's gain and shift make them alike, the weights and biases undo it, and one grid serves all: no node more. How far
sizes are made alike, s_j = size_j^α, is chosen by the error that both sides are expected to make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx

from effc.calib.collectors import Channels
from effc.calib.probe import Probe
from effc.errors import PreconditionError
from effc.ir.edit import is_constant, lift, tensor_name, tensor_of
from effc.ir.program import Graph
from effc.ir.select import Select, op_name, site_names, value_key
from effc.passes.base import Pass, Stats
from effc.passes.quantize import Quantize
from effc.passes.scaling import Place, places, rescale
from effc.passes.shift import owner, shift
from effc.passes.smooth import expected_error
from effc.quant.affine import steady

STRENGTHS = tuple(i / 8 for i in range(9))
"""α: 0 leaves sizes as they are, 1 makes them alike."""
DEVIATIONS = 4.0
"""A channel ends this many deviations from its mean, or where its values end: few grids hold more."""
MANTISSA_BITS = 4
SMALLEST = 2.0**-10
"""Of the largest size; a smaller one counts as that."""


@dataclass(frozen=True, kw_only=True)
class Level(Pass):
    """Gives channels of what linear layers read one middle and one size, where what is in front takes it up.

    `bits` and `activation_bits` are those of what quantises behind it. `alike` makes all sizes the same, as the paper
    does, in the place of the choice by expected error.
    """

    name = "level"
    tolerance = 1e-4
    """Scales that are no powers of two are rounded, once a layer."""

    bits: Literal[3, 4, 5, 6, 7, 8] = 8
    activation_bits: Literal[3, 4, 5, 6, 7, 8] = 8
    alike: bool = False
    select: Select = field(default_factory=Select)

    @property
    def measures(self) -> bool:
        return True

    def agrees(self, behind: Sequence[Pass]) -> None:
        mine = (self.bits, self.activation_bits)
        found = [(p.bits, p.activation_bits) for p in behind if isinstance(p, Quantize)]
        if found and mine not in found:
            raise PreconditionError(
                f"level chooses sizes for {mine[0]} and {mine[1]} bits, and what quantises behind it has "
                f"{found[0][0]} and {found[0][1]}",
                hint="give level the bits and activation_bits of the quantize or noisyquant behind it",
            )

    def sites(self, graph: Graph) -> list[fx.Node]:
        """The layers whose input may be changed, in order of execution."""
        return [layer for place in self._places(graph) for layer in place.layers]

    def _places(self, graph: Graph) -> list[Place]:
        """Those with biases that take the middle back, behind a norm or layer that gives it."""
        linear = [node for node in self.select.sites(graph) if op_name(node) == "linear"]
        return [
            place
            for place in places(graph, linear)
            if place.owners
            and owner(graph, place.value) is not None
            and all(len(n.args) > 2 and is_constant(graph, n.args[2]) for n in place.layers)
        ]

    def probes(self, graph: Graph) -> Iterable[Probe]:
        names = site_names(graph)
        for place in self._places(graph):
            key = value_key(graph, names, place.value)
            yield Probe(key=key, node=place.value, collector=Channels())

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        names, changed = site_names(graph), 0
        for place in self._places(graph):
            key = value_key(graph, names, place.value)
            weights = [tensor_of(graph, layer.args[1]) for layer in place.layers]  # type: ignore[arg-type]
            found = stats.decide(key, partial(_levels, stats, key, weights, self))
            middles, sizes = (torch.tensor(part) for part in found)
            _shift(graph, key, place, middles)
            at = places(graph, place.layers)[0]
            rescale(graph, key, at, sizes, "level")
            changed += len(place.layers)
        return changed


def _levels(stats: Stats, key: str, weights: list[Tensor], options: Level) -> list[list[float]]:
    """Middle and size of every channel."""
    seen = stats[key]
    mean = torch.from_numpy(seen.mean())
    squares = torch.from_numpy(seen.squares / max(seen.count, 1))
    deviation = (squares - mean.square()).clamp(min=0).sqrt()
    low = torch.maximum(torch.from_numpy(seen.low), mean - DEVIATIONS * deviation)
    high = torch.minimum(torch.from_numpy(seen.high), mean + DEVIATIONS * deviation)
    middle = torch.tensor([steady(float(m)) for m in (low + high) / 2])
    size = (high - low) / 2
    size = size.clamp(min=max(float(size.max()) * SMALLEST, 1e-12)).log2()
    centred = squares - 2 * middle * mean + middle.square()

    def factors(strength: float) -> Tensor:
        powers = strength * (size - size.mean())
        return torch.tensor([steady(2.0 ** float(p), MANTISSA_BITS) for p in powers])

    def loss(strength: float) -> float:
        ends = low - middle, high - middle
        codes = tuple(2 ** (b - 1) - 1 for b in (options.activation_bits, options.bits))
        powers = factors(strength).double().log2()
        return expected_error(*ends, centred, weights, powers, codes)

    best = 1.0 if options.alike else min(STRENGTHS, key=loss)
    return [middle.tolist(), factors(best).tolist()]


def _shift(graph: Graph, key: str, place: Place, middles: Tensor) -> None:
    """Take the middle of every channel out of the activation, and give biases what it was worth."""
    shift(graph, key, place.value, -middles, owner(graph, place.value), place.layers[0])
    for layer in place.layers:
        weight, bias = (tensor_of(graph, part) for part in layer.args[1:3])  # type: ignore[arg-type]
        made = bias.double() + weight.double() @ middles.double()
        name = tensor_name(graph, layer.args[2]) or ""
        origin = graph.origins[name]
        origin = dataclasses.replace(origin, transforms=(*origin.transforms, "level"))
        layer.update_arg(2, lift(graph, f"{name}_level", made.to(bias.dtype), origin))
