"""A gain for every step of a sampler in front of a convolution, taken off behind it: activations then fit one grid.

    y  =  (W · (r_t x)) / r_t  +  b

A denoiser's activations are wide at a few of its times and narrow at most, and a grid for all of them has few codes for
the narrow ones. Engines want scales that are constant, so x is multiplied by a gain r_t that is looked up by the time,
which makes all times as wide as the widest, and the output divided by it. Nothing else changes: a convolution is
linear. `quantize` behind it finds one range that fits every time, in front of the convolution and behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from effc.calib.collectors import WidthByTime
from effc.calib.probe import Probe
from effc.errors import PreconditionError
from effc.ir.edit import insert, insert_after, is_constant, lift, redirect, tensor_of
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import Select, op_name, site_names, value_key
from effc.passes.base import Pass, Stats
from effc.passes.quantize import constant_bias, end_of
from effc.passes.timestep import row_of
from effc.quant.affine import steady

aten = torch.ops.aten

LEAST_GAIN = 1.26
"""How many times less rounding noise a site must promise: a decibel, since its gains are two multiplications."""
POWERS = (0.5, 1.0)
"""How far gains go from none to what makes all times equally wide."""


@dataclass(frozen=True, kw_only=True)
class StepGain(Pass):
    """Gives convolutions whose activations change their width over the times of calibration a gain for each of them.

    It stands in front of what quantises, and goes with `timestep-table` in either order. An engine gives no numbers for
    a time that calibration did not show. `input` is the time's name.
    """

    name = "step-gain"

    input: str = "timestep"
    select: Select = field(default_factory=Select)

    @property
    def measures(self) -> bool:
        return True

    def requires(self, program: Program) -> None:
        for graph in program:
            if self.takes(graph.role) and self.graphs and self.input not in graph.inputs:
                raise PreconditionError(
                    f"step-gain: graph {graph.role!r} has no input {self.input!r}",
                    hint=f"input: one of {', '.join(graph.inputs)}",
                )

    def sites(self, graph: Graph) -> list[fx.Node]:
        """Convolutions of pictures with constants of their own and no activation that goes with their grid."""
        if self.input not in graph.inputs:
            return []
        time = graph.input_nodes()[self.input]
        if time.meta["val"].dim() != 1:
            return []
        return [
            n for n in self.select.sites(graph)
            if op_name(n) == "conv2d" and isinstance(n.args[0], fx.Node) and n.args[0].meta["val"].dim() == 4
            and is_constant(graph, n.args[1])
            and (_has_no_bias(n) or constant_bias(graph, n) is not None) and end_of(n) is n
        ]  # fmt: skip

    def probes(self, graph: Graph) -> Iterable[Probe]:
        names = site_names(graph)
        for site in self.sites(graph):
            for word, node in (("in", site.args[0]), ("out", site)):
                collector, key = WidthByTime(), _key(graph, names, site, word)
                yield Probe(
                    key=f"{key}:time", node=graph.input_nodes()[self.input], collector=collector
                )
                yield Probe(key=key, node=node, collector=collector)  # type: ignore[arg-type]

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        names, changed, row = site_names(graph), 0, None
        sites = self.sites(graph)
        for site in sites:

            def chosen(site: fx.Node = site) -> dict[str, float]:
                seen = [stats[_key(graph, names, site, word)].widths() for word in ("in", "out")]
                weight = tensor_of(graph, site.args[1])  # type: ignore[arg-type]
                return {f"{time:g}": gain for time, gain in gains(weight, *seen).items()}

            found = stats.decide(f"{value_key(graph, names, site)}:gain", chosen)
            if not found:
                continue
            if row is None:
                time = graph.input_nodes()[self.input]
                times = torch.tensor([float(word) for word in found], dtype=torch.float64)
                row = row_of(graph, time, times.to(time.meta["val"].dtype), sites[0])
            self._put(graph, site, torch.tensor([*found.values(), torch.nan]), row)
            changed += 1
        return changed

    def _put(self, graph: Graph, site: fx.Node, table: Tensor, row: fx.Node) -> None:
        value, bias = site.args[0], constant_bias(graph, site)
        stem = f"{site.name}_gain"

        def looked_up(word: str, rows: Tensor) -> fx.Node:
            held = lift(graph, f"{stem}_{word}", rows, Origin(stem, ("step-gain",)))
            found = insert(graph, site, aten.index_select.default, (held, 0, row))
            return insert(graph, site, aten.view.default, (found, [-1, 1, 1, 1]))

        gain, inverse = looked_up("gain", table), looked_up("inverse", 1 / table)
        site.update_arg(0, insert(graph, site, aten.mul.Tensor, (value, gain)))
        readers = list(site.users)
        made = insert_after(graph, site, aten.mul.Tensor, (site, inverse))
        if bias is not None:
            tensor = tensor_of(graph, bias)
            origin = Origin(stem, ("step-gain",))
            column = lift(graph, f"{stem}_bias", tensor[:, None, None].clone(), origin)
            none = lift(graph, f"{stem}_none", torch.zeros_like(tensor), origin)
            site.update_arg(2, none)  # a place for what quantisation puts right
            made = insert_after(graph, made, aten.add.Tensor, (made, column))
        redirect(graph, site, made, readers)


def _has_no_bias(site: fx.Node) -> bool:
    return len(site.args) < 3 or site.args[2] is None


def _key(graph: Graph, names: dict[fx.Node, str], site: fx.Node, word: str) -> str:
    return f"{value_key(graph, names, site)}:{word} by time"


def gains(
    weight: Tensor, before: Mapping[float, float], behind: Mapping[float, float]
) -> dict[float, float]:
    """By time what the input of a convolution is to be multiplied by; none where that gains little.

    `before` and `behind` are widths of its input and output by time. Rounding noise of a time, before the division:
    |w|² · step_x² + step_y², with steps for the widest time.
    """
    if before.keys() != behind.keys() or len(before) < 2:
        return {}
    power = float(weight.double().flatten(1).square().sum(1).mean())
    sides = [list(before.values()), list(behind.values())]
    if not all(min(side) > 0 for side in sides):
        return {}

    def noise(r: list[float]) -> float:
        steps = [max(a * b for a, b in zip(r, side, strict=True)) for side in sides]
        return (power * steps[0] ** 2 + steps[1] ** 2) * sum(1 / a**2 for a in r)

    ways = [[(max(side) / w) ** p for w in side] for side in sides for p in POWERS]
    ways.append([min(pair) for pair in zip(ways[1], ways[3], strict=True)])
    best, none = min(ways, key=noise), noise([1.0] * len(before))
    if noise(best) * LEAST_GAIN > none:
        return {}
    return {time: steady(r, 5) for time, r in zip(before, best, strict=True)}
