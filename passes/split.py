"""Halves of a concatenation on grids of their own (shortcut splitting, Q-Diffusion, Li et al. 2023, section 4.2).

    W · (x₁ ⊕ x₂)  =  (W₁ ⊕ W₂ / r) · (x₁ ⊕ r · x₂)

In a UNet the shortcut of a block reads what comes from below beside what was kept on the way down, and one is many
times larger than the other: one grid for both leaves the smaller few codes. Scaled by r they share a grid, and x₂ has
steps r times finer. Here r is a power of two, so nothing is rounded. It is the one that lowers what is expected of the
rounding, of activations and weights together: the weights of the two halves share the scale of their output. Where the
target puts integers together, the halves are rounded each by its own step, and the multiplication is none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from effc.calib.collectors import Channels
from effc.calib.probe import Probe
from effc.ir.edit import insert, rebind, tensor_name, tensor_of
from effc.ir.program import Graph
from effc.ir.select import Select, op_name, site_names, value_key
from effc.passes.base import Pass, Stats
from effc.passes.scaling import places

aten = torch.ops.aten

MOST_POWER = 12
"""A half is scaled by 2¹² at most."""
LEAST_GAIN = 1.12
"""How many times less error a factor must promise: half a decibel, below which ranges say too little."""


@dataclass(frozen=True, kw_only=True)
class SplitConcat(Pass):
    """Gives the two halves of a concatenation that a convolution reads grids of their own, to be quantised behind.

    `bits` are those of the weights and `activation_bits` those of the activations that the pass behind it will have. A
    convolution of which no factor promises less error is left as it is.
    """

    name = "split-concat"

    bits: Literal[3, 4, 5, 6, 7, 8] = 8
    activation_bits: Literal[4, 5, 6, 7, 8] = 8
    select: Select = field(default_factory=Select)

    @property
    def measures(self) -> bool:
        return True

    def sites(self, graph: Graph) -> list[fx.Node]:
        """Convolutions that read a concatenation of two, and whose weight is their own."""
        found = []
        for place in places(graph, self.select.sites(graph)):
            parts = halves(place.value) if place.axis == 1 else None
            if parts is None:
                continue
            whole = place.value.meta["val"].shape[1]
            found += [n for n in place.layers if n.args[1].meta["val"].shape[1] == whole]  # type: ignore[union-attr]
        return found

    def probes(self, graph: Graph) -> Iterable[Probe]:
        names = site_names(graph)
        for site in self.sites(graph):
            for part in halves(site.args[0]) or ():
                key = f"{value_key(graph, names, part)}:half"
                yield Probe(key=key, node=part, collector=Channels(1))

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        changed, names = 0, site_names(graph)
        for site in self.sites(graph):
            parts = halves(site.args[0])
            assert parts is not None
            keys = [f"{value_key(graph, names, part)}:half" for part in parts]
            node: Any = site.args[1]
            weight = tensor_of(graph, node)

            def power(keys: list[str] = keys, weight: Tensor = weight) -> int:
                return self._power(weight, [stats[key] for key in keys])

            chosen = stats.decide(f"{value_key(graph, names, site)}:split", power)
            if not chosen:
                continue
            first, second = parts
            width, r = first.meta["val"].shape[1], 2.0**chosen
            scaled = insert(graph, site, aten.mul.Tensor, (second, r))
            site.update_arg(0, insert(graph, site, aten.cat.default, ([first, scaled], 1)))
            made = torch.cat([weight[:, :width], weight[:, width:] / r], dim=1)
            rebind(graph, tensor_name(graph, node) or "", made, "split")
            changed += 1
        return changed

    def _power(self, weight: Tensor, seen: list[Channels]) -> int:
        """The power of two whose expected error is least; 0 where none gains."""
        errors = {
            power: self._error(weight, seen, 2.0**power)
            for power in range(-MOST_POWER, MOST_POWER + 1)
        }
        best = min(errors, key=lambda power: (errors[power], abs(power)))
        return best if errors[best] * LEAST_GAIN < errors[0] else 0

    def _error(self, weight: Tensor, seen: list[Channels], r: float) -> float:
        """Σ W² · step_x² / 12  +  Σ E[x²] · step_w² / 12, summed over outputs."""
        width = len(seen[0].low)
        halves_ = [weight[:, :width].double(), weight[:, width:].double() / r]
        ends = [max(np.abs(s.low).max(), np.abs(s.high).max()) for s in seen]
        step = 2 * max(ends[0], r * ends[1]) / (2**self.activation_bits - 1)
        rows = torch.cat(halves_, dim=1).flatten(1).abs().amax(1) / (2 ** (self.bits - 1) - 1)
        power = [float((s.squares / max(s.count, 1)).sum()) for s in seen]
        taps = weight[0, 0].numel()
        energy = taps * (power[0] + r**2 * power[1])
        rounded = sum(float(half.square().sum()) for half in halves_) * step**2
        return float(rounded + float(rows.square().sum()) * energy) / 12


def halves(value: Any) -> tuple[fx.Node, fx.Node] | None:
    """What a value is the concatenation of, along the channels of a picture, where it is of two."""
    if not isinstance(value, fx.Node) or op_name(value) != "cat" or value.meta["val"].dim() < 3:
        return None
    parts: Any = value.args[0]
    axis = value.args[1] if len(value.args) > 1 else 0
    if axis not in (1, 1 - value.meta["val"].dim()) or len(parts) != 2:
        return None
    return (parts[0], parts[1]) if parts[0] is not parts[1] else None


def power_of_two(part: fx.Node) -> tuple[fx.Node, float]:
    """A part and the power of two that it is multiplied by, as the pass above writes it; 1 for any other."""
    factor = part.args[1] if op_name(part) == "mul" else None
    if isinstance(factor, float) and factor > 0 and float(np.log2(factor)).is_integer():
        return part.args[0], factor  # type: ignore[return-value]
    return part, 1.0
