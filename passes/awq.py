"""Scales channels of weights by the size of their inputs, before weights alone are quantised (AWQ, Lin et al. 2024).

    W x  =  (W · diag(s)) (x / s)        s_j = mean|x_j|^α                               (equations 4 and 5)
    α    =  argmin  ‖Q(W · diag(s)) diag(s)⁻¹ X − W X‖²  =  tr(E G Eᵀ),   G = X Xᵀ

A weight whose input is large costs more when it is rounded. Scaled up it is cut finer, and what is in front, a norm or
a layer, takes up the 1 / s, so nothing is computed more (`absorb`). The error is that of all layers which read one
value, and needs no samples but their Gram matrix. Weights are rounded to the nearest, over their whole range.

Each s_j has four bits of mantissa. Eight bits are worth no more, and powers of two, with which the graph would compute
the very same numbers, lose most of what is gained (a Llama of 260 K parameters).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.collectors import Gram
from effc.calib.probe import Probe
from effc.errors import PreconditionError
from effc.ir.edit import tensor_of
from effc.ir.program import Graph
from effc.ir.select import Select, op_name, site_names, value_key
from effc.passes.base import Pass, Stats
from effc.passes.quantize import Quantize, weight_scheme
from effc.passes.scaling import Place, places, rescale
from effc.quant.affine import fake_quantize, steady, weight_qparams
from effc.quant.gptq import output_error

STRENGTHS = tuple(step / 20 for step in range(21))
"""α: 0 leaves the weights as they are."""
MANTISSA_BITS = 4
Grid = dict[str, int | bool | str | None]
"""The options of a quantize that say how weights are cut."""
SMALLEST = 2.0**-12
"""Of the largest channel's magnitude; a smaller one counts as that."""


@dataclass(frozen=True, kw_only=True)
class Awq(Pass):
    """Scales channels of the inputs of linear layers where that lowers the error of rounding their weights.

    `bits`, `group` and `weight_symmetric` are those of the `quantize` behind it; a recipe says the same in both places.
    """

    name = "awq"
    tolerance = 1e-4
    """Scales that are no powers of two are rounded, once a layer: in thirty layers to 1.1e-5."""

    bits: Literal[4, 6, 8] = 4
    group: Annotated[int, Field(ge=1)] | None = 32
    weight_symmetric: bool = True
    select: Select = field(default_factory=Select)

    @property
    def measures(self) -> bool:
        return True

    @property
    def _grid(self) -> Grid:
        return {"bits": self.bits, "group": self.group, "weight_symmetric": self.weight_symmetric}

    def agrees(self, behind: Sequence[Pass]) -> None:
        found = [_grid_of(p) for p in behind if isinstance(p, Quantize) and self._meets(p)]
        if not found or self._grid in found:
            return
        other = {name: value for name, value in found[0].items() if value != self._grid.get(name)}
        raise PreconditionError(
            f"awq chooses scales for {_words(self._grid)}, and the quantize behind it has {_words(other)}",
            hint="give awq the bits, group and weight_symmetric of the quantize behind it",
        )

    def _meets(self, other: Pass) -> bool:
        """Whether another pass works on a graph that this one works on."""
        return not self.graphs or not other.graphs or bool({*self.graphs} & {*other.graphs})

    def sites(self, graph: Graph) -> list[fx.Node]:
        """The layers whose input may be scaled, in order of execution."""
        return [layer for place in self._places(graph) for layer in place.layers]

    def _places(self, graph: Graph) -> list[Place]:
        linear = [node for node in self.select.sites(graph) if op_name(node) == "linear"]
        return [place for place in places(graph, linear) if place.owners]

    def probes(self, graph: Graph) -> Iterable[Probe]:
        names = site_names(graph)
        for place in self._places(graph):
            key = value_key(graph, names, place.value)
            yield Probe(key=key, node=place.value, collector=Gram())

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        names, changed = site_names(graph), 0
        for place in self._places(graph):
            weights = [tensor_of(graph, layer.args[1]) for layer in place.layers]  # type: ignore[arg-type]
            key = value_key(graph, names, place.value)
            factors = stats.decide(key, partial(self._factors, stats, key, weights))
            if not factors:
                continue
            rescale(graph, key, place, torch.tensor(factors, dtype=torch.float32), "awq")
            changed += len(place.layers)
        return changed

    def _factors(self, stats: Stats, key: str, weights: Sequence[Tensor]) -> list[float]:
        """s of every channel; empty where none is better."""
        gram, sizes = stats[key].matrix(), stats[key].magnitudes()
        best: list[float] = []
        least = float("inf")
        for strength in STRENGTHS:
            factors = scales(sizes, strength)
            error = sum(self._error(weight, factors, gram) for weight in weights)
            if error < least:
                least, best = error, factors.tolist() if strength else []
        return best

    def _error(self, weight: Tensor, factors: Tensor, gram: Tensor) -> float:
        scheme = weight_scheme(weight.shape, self.bits, self.group, symmetric=self.weight_symmetric)
        scaled = weight * factors
        rounded = fake_quantize(scaled, *weight_qparams(scaled, scheme), scheme)
        return output_error(rounded / factors - weight, gram)


def _grid_of(pass_: Quantize) -> Grid:
    made: Grid = {
        "bits": pass_.bits,
        "group": pass_.group,
        "weight_symmetric": pass_.weight_symmetric,
    }
    return made if pass_.dtype == "int" else {**made, "dtype": pass_.dtype}


def _words(grid: Grid) -> str:
    return ", ".join(f"{name}: {json.dumps(value)}" for name, value in grid.items())


def scales(sizes: Tensor, strength: float) -> Tensor:
    """mean|x|^α, [channels], around one, with few bits; one for a channel that is always zero."""
    seen = sizes > 0
    if not bool(seen.any()):
        return torch.ones(len(sizes))
    powers = strength * sizes.clamp(min=float(sizes.max()) * SMALLEST).log2()
    powers = torch.where(seen, powers - powers[seen].mean(), 0.0)
    return torch.tensor([steady(2.0 ** float(p), MANTISSA_BITS) for p in powers])
