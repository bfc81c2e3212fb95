"""Moves what is uneven between channels of an activation into the weights behind it (SmoothQuant, Xiao et al. 2023).

    W x  =  (W · diag(s)) (x / s)        s_j = max|x_j|^α / max_i|W_ij|^(1 − α)        (equations 3 and 4)

One grid for a whole activation gives a channel that is small beside the others few codes. Divided by `s` the channels
are alike, and the weights, which have a scale per output, take it up. Here every s_j is a power of two: nothing is
rounded, so the graph computes the same numbers, and the few decisions are small integers. α is chosen for each
activation by the error that quantisation is expected to make.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.collectors import Channels
from effc.calib.probe import Probe
from effc.dialect import Dialect
from effc.ir.edit import insert, is_constant, lift, rebind, tensor_name, tensor_of
from effc.ir.program import Graph, Origin
from effc.ir.select import Select, op_name, site_names, value_key
from effc.passes.base import Pass, Stats

aten = torch.ops.aten

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""α: how much of the unevenness goes into the weights."""
MOST_POWER = 12
"""No channel is scaled by more than 2¹² or less than 2⁻¹²."""
CODES = 127
"""Steps of a symmetric 8-bit grid on either side of zero."""


@dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """Scales channels of the inputs of linear layers by powers of two, and the weights by their inverse.

    An activation is left as it is where that is not expected to lower the error of quantisation by `gain_db`. Where
    that is not given it is the target's: little where the scaling costs nothing, more where it is a node of its own;
    a target that has none is left alone.
    """

    name = "smooth"
    tolerance = 1e-6

    gain_db: Annotated[float, Field(ge=0)] | None = None
    select: Select = field(default_factory=Select)

    def resolve(self, dialect: Dialect) -> Self:
        if self.gain_db is not None:
            return self
        return dataclasses.replace(self, gain_db=dialect.smooth_gain_db)

    @property
    def measures(self) -> bool:
        return True

    def sites(self, graph: Graph) -> list[fx.Node]:
        """The linear layers whose input may be scaled, in order of execution."""
        return [layer for layers in self._readers(graph).values() for layer in layers]

    def _readers(self, graph: Graph) -> dict[fx.Node, list[fx.Node]]:
        """By activation, the layers that read it, each with a weight of its own."""
        if self.gain_db is None:
            return {}
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.select.sites(graph):
            if op_name(node) != "linear" or not _has_own_weight(graph, node):
                continue
            value = node.args[0]
            assert isinstance(value, fx.Node)
            found.setdefault(value, []).append(node)
        return found

    def probes(self, graph: Graph) -> Iterable[Probe]:
        names = site_names(graph)
        for value in self._readers(graph):
            yield Probe(key=value_key(graph, names, value), node=value, collector=Channels())

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        names, changed = site_names(graph), 0
        for value, layers in self._readers(graph).items():
            weights = [tensor_of(graph, layer.args[1]) for layer in layers]  # type: ignore[arg-type]
            key = value_key(graph, names, value)
            powers = stats.decide(key, partial(self._powers, stats, key, weights))
            if not powers:
                continue
            self._scale(graph, key, value, layers, torch.tensor(powers, dtype=torch.float32))
            changed += len(layers)
        return changed

    def _powers(self, stats: Stats, key: str, weights: Sequence[Tensor]) -> list[int]:
        """The exponent of every channel's s; empty where it is not worth it."""
        assert self.gain_db is not None
        low, high, squares = (torch.from_numpy(v) for v in stats[key].steady())
        plain = torch.zeros_like(low)
        least, best = expected_error(low, high, squares, weights, plain), plain
        bound = least * 10 ** (-self.gain_db / 10)
        sizes = torch.maximum(high, -low).clamp(min=1e-5)
        columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0).double().clamp(min=1e-5)
        for strength in STRENGTHS:
            wanted = strength * sizes.log2() - (1 - strength) * columns.log2()
            powers = (wanted - wanted.mean()).round().clamp(-MOST_POWER, MOST_POWER)
            error = expected_error(low, high, squares, weights, powers)
            if error < least:
                least, best = error, powers
        return [int(p) for p in best] if least < bound else []

    def _scale(
        self, graph: Graph, key: str, value: fx.Node, layers: Sequence[fx.Node], powers: Tensor
    ) -> None:
        name = key.partition("/")[2].replace(":", ".")
        inverse = lift(graph, f"{name}_smooth", torch.exp2(-powers), Origin(key, ("smooth",)))
        scaled = insert(graph, layers[0], aten.mul.Tensor, (value, inverse))
        for layer in layers:
            weight: Any = layer.args[1]
            made = tensor_of(graph, weight) * torch.exp2(powers)
            rebind(graph, tensor_name(graph, weight) or "", made, "smooth")
            layer.update_arg(0, scaled)


def expected_error(
    low: Tensor, high: Tensor, squares: Tensor, weights: Sequence[Tensor], powers: Tensor
) -> float:
    """Expected squared error of layers over an activation of channels [C] within `low` … `high`, mean square `squares`.

    step²/12 a value, for the grid of x / s and that of every row of W · s:

        Σ_ij (step_x · W_ij s_j)² / 12  +  Σ_i step_i² / 12 · Σ_j E[x_j²] / s_j²
    """
    scale = torch.exp2(powers)
    step = float(torch.maximum((high / scale).amax(), -(low / scale).amin())) / CODES
    noise = 0.0
    for weight in weights:
        scaled = weight.double() * scale
        steps = scaled.abs().amax(1) / CODES
        noise += step**2 / 12 * float(scaled.square().sum())
        noise += float(steps.square().sum()) / 12 * float((squares / scale.square()).sum())
    return noise


def _has_own_weight(graph: Graph, layer: fx.Node) -> bool:
    weight = layer.args[1]
    if not isinstance(weight, fx.Node) or not is_constant(graph, weight):
        return False
    return len(weight.users) == 1 and bool(weight.meta["val"].is_floating_point())
