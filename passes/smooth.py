"""Moves what is uneven between channels of an activation into the weights behind it (SmoothQuant, Xiao et al. 2023).

    W x  =  (W · diag(s)) (x / s)        s_j = max|x_j|^α / max_i|W_ij|^(1 − α)        (equations 3 and 4)

One grid for a whole activation gives a channel that is small beside the others few codes. Divided by `s` the channels
are alike, and the weights, which have a scale per output, take it up. Here every s_j is a power of two: nothing is
rounded, so the graph computes the same numbers, and the few decisions are small integers. α is chosen for each
activation by the error that quantisation is expected to make.

Where a norm or a layer in front can take up the 1 / s, it does, and nothing is computed more (`absorb`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.collectors import Channels
from effc.calib.probe import Probe
from effc.dialect import Dialect
from effc.ir.edit import tensor_of
from effc.ir.program import Graph
from effc.ir.select import Select, site_names, value_key
from effc.passes.base import Pass, Stats
from effc.passes.scaling import Place, places, rescale
from effc.quant.channels import channels, columns

STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""α: how much of the unevenness goes into the weights."""
MOST_POWER = 12
"""No channel is scaled by more than 2¹² or less than 2⁻¹²."""
CODES = 127
"""Steps of a symmetric 8-bit grid on either side of zero."""
FREE_GAIN_DB = 1.0
"""What a scaling that costs nothing is to gain at least; for less the weights are left as they are."""
SURE_GAIN_DB = 8.0
"""What it is to gain where few rows were seen. Channels that are brought to one size all end where the grid ends, so
that a row that was not seen is clipped in one of them: a gain that is expected from few rows is none."""
FEW = 16
"""Rows a channel that are few for a scaling that costs nothing; one is few for any."""


@dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """Scales channels of the inputs of linear layers and convolutions by powers of two, and weights by the inverse.

    It costs nothing where the norm or the layer in front takes it up (cross-layer equalisation); else it is a
    multiplication, for linear layers only. That is left out where it is not expected to lower the error of
    quantisation by `gain_db`. Where that is not given it is the target's: little where the runtime fuses the
    multiplication, more where it does not; a target that has none gets no multiplication.
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
        """The layers whose input may be scaled, in order of execution."""
        return [layer for place in self._places(graph) for layer in place.layers]

    def _places(self, graph: Graph) -> list[Place]:
        found = places(graph, self.select.sites(graph))
        return [p for p in found if p.owners or (p.axis == -1 and self.gain_db is not None)]

    def probes(self, graph: Graph) -> Iterable[Probe]:
        names = site_names(graph)
        for place in self._places(graph):
            key = value_key(graph, names, place.value)
            yield Probe(key=key, node=place.value, collector=Channels(place.axis))

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        names, changed = site_names(graph), 0
        for place in self._places(graph):
            weights = [tensor_of(graph, layer.args[1]) for layer in place.layers]  # type: ignore[arg-type]
            key = value_key(graph, names, place.value)
            gain = self.gain_db if self.gain_db is not None else FREE_GAIN_DB
            if place.owners:
                gain = min(gain, FREE_GAIN_DB)
            rows = FEW if place.owners else 1
            powers = stats.decide(key, partial(_powers, stats, key, weights, gain, rows))
            if not powers:
                continue
            factors = torch.exp2(torch.tensor(powers, dtype=torch.float32))
            rescale(graph, key, place, factors, "smooth")
            changed += len(place.layers)
        return changed


def _powers(
    stats: Stats, key: str, weights: Sequence[Tensor], gain_db: float, rows: int
) -> list[int]:
    """The exponent of every channel's s; empty where it is not worth it, or `rows` a channel were not seen."""
    if stats[key].count <= rows * len(stats[key].low):
        gain_db = max(gain_db, SURE_GAIN_DB)
    low, high, squares = (torch.from_numpy(v) for v in stats[key].steady())
    plain = torch.zeros_like(low)
    least, best = expected_error(low, high, squares, weights, plain), plain
    bound = least * 10 ** (-gain_db / 10)
    sizes = torch.maximum(high, -low).clamp(min=1e-5)
    largest = torch.zeros_like(low)
    for weight in weights:
        index, found = channels(weight, len(low)), columns(weight).abs().amax(2).double()
        largest.scatter_reduce_(0, index.reshape(-1), found.reshape(-1), "amax")
    largest = largest.clamp(min=1e-5)
    for strength in STRENGTHS:
        wanted = strength * sizes.log2() - (1 - strength) * largest.log2()
        powers = (wanted - wanted.mean()).round().clamp(-MOST_POWER, MOST_POWER)
        error = expected_error(low, high, squares, weights, powers)
        if error < least:
            least, best = error, powers
    return [int(p) for p in best] if least < bound else []


def expected_error(
    low: Tensor,
    high: Tensor,
    squares: Tensor,
    weights: Sequence[Tensor],
    powers: Tensor,
    codes: tuple[int, int] = (CODES, CODES),
) -> float:
    """Expected squared error of layers over an activation of channels [C] within `low` … `high`, mean square `squares`.

    step²/12 a value, for the grid of x / s and that of every row of W · s, with `codes` on either side of zero:

        Σ_ij (step_x · W_ij s_j)² / 12  +  Σ_i step_i² / 12 · Σ_j E[x_j²] / s_j²

    Weights are [out, in / groups, …]; of a convolution every place of the kernel is one more column.
    """
    scale = torch.exp2(powers)
    inner = squares / scale.square()
    step = float(torch.maximum((high / scale).amax(), -(low / scale).amin())) / codes[0]
    noise = 0.0
    for weight in weights:
        index, parts = channels(weight, len(scale)), columns(weight).double()
        scaled = parts * scale[index][..., None]
        steps = scaled.abs().amax((1, 2)) / codes[1]
        noise += step**2 / 12 * float(scaled.square().sum())
        noise += float((steps.square() * inner[index].sum(1)).sum()) / 12 * parts.shape[2]
    return noise
