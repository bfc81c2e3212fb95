"""What outputs make of the units of a value: (Σ x · ∂L/∂x)², the squared first term of removing a unit, by sample.

    L = −log p(y),  y drawn from what the model itself says      of logits: the mean is the Fisher information of a mask
    L = ⟨z, output⟩ / ‖output‖,  z of random signs                 of any other output: that of its Gauss-Newton matrix

No labels are needed, and the loss of the model's own answers, whose slope is zero, is not asked (Molchanov et al. 2019,
with the labels of Theis et al. 2018). One batch is in memory with all its values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, fx

from effc.calib.collectors import Rows
from effc.calib.probe import Probe, fitting
from effc.errors import CalibrationError
from effc.ir.program import Graph
from effc.ir.values import Change, Values
from effc.quant.scheme import Scheme

LOGITS = "logits"


class Slopes:
    """Σ over samples of (Σ x · ∂L/∂x)² for every unit; nodes that hold the same units are summed before the square."""

    def __init__(self, units: int) -> None:
        self.squares = torch.zeros(units, dtype=torch.float64)
        self.count = 0
        self._open: Tensor | None = None

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        raise NotImplementedError("slopes are of values with a gradient")

    def add(
        self, x: Tensor, slope: Tensor, dim: int, places: Tensor, mask: Tensor | None = None
    ) -> None:
        """`places` [indices of `dim`] is the unit of each, −1 for none."""
        pull = (x * slope).detach().movedim(dim, -1)
        pull = pull.reshape(len(x), -1, len(places)).sum(1).to(torch.float64)
        found = torch.zeros(len(x), len(self.squares), dtype=torch.float64)
        found.index_add_(1, places[places >= 0], pull[:, places >= 0])
        self._open = found if self._open is None else self._open + found

    def close(self) -> None:
        """Square what came of one batch."""
        if self._open is None:
            return
        if not bool(torch.isfinite(self._open).all()):
            raise CalibrationError(
                "a slope is not a number", hint="check the calibration data and the weights"
            )
        self.squares += self._open.square().sum(0)
        self.count += len(self._open)
        self._open = None

    def mean(self) -> Tensor:
        """[units]"""
        return self.squares / max(self.count, 1)

    def merge(self, other: Self) -> Self:
        made = type(self)(len(self.squares))
        made.squares, made.count = self.squares + other.squares, self.count + other.count
        return made

    def range(self, scheme: Scheme) -> tuple[float, float]:
        return 0.0, 0.0

    def held_bytes(self, shape: Sequence[int]) -> int:
        return self.squares.nbytes


class RowSlopes(Rows):
    """Slopes of the rows that `Rows` of the same draw keeps, where both see values of as many rows."""

    def add(
        self, x: Tensor, slope: Tensor, dim: int, places: Tensor, mask: Tensor | None = None
    ) -> None:
        self.update(slope, mask)

    def close(self) -> None:
        """Nothing is open between batches."""


@dataclass(frozen=True, kw_only=True)
class SlopeProbe(Probe):
    """Watch the slope of a value; `places` is the unit of every index of its dimension `dim`."""

    dim: int
    places: Tensor


class SlopeWatcher:
    """Runs a graph forth and back, and lets collectors see values with their slopes."""

    def __init__(self, graph: Graph, probes: Iterable[SlopeProbe]) -> None:
        self.graph, self.probes = graph, list(probes)
        self._draw = torch.Generator().manual_seed(0)

    def run(self, feeds: Mapping[str, Tensor], mask: Tensor | None) -> None:
        seen: dict[fx.Node, Tensor] = {}
        changes: dict[fx.Node, Change] = {p.node: partial(_seen, seen, p.node) for p in self.probes}
        with torch.enable_grad():
            outputs = Values(self.graph, feeds, changes=changes).outputs()
            loss = self._loss(outputs, mask)
            nodes = list(seen)
            slopes = torch.autograd.grad(loss, [seen[n] for n in nodes], allow_unused=True)
        found = dict(zip(nodes, slopes, strict=True))
        for probe in self.probes:
            slope = found.get(probe.node)
            if slope is not None:
                value = seen[probe.node]
                probe.collector.add(value, slope, probe.dim, probe.places, fitting(mask, value))
        for collector in {id(p.collector): p.collector for p in self.probes}.values():
            collector.close()

    def _loss(self, outputs: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
        """The loss of all samples of a batch, summed."""
        named = {n: v for n, v in outputs.items() if v.requires_grad}
        if not named:
            raise CalibrationError(
                "no output hangs on what is watched", hint="another importance needs no slopes"
            )
        if (
            LOGITS in named and named[LOGITS].dim() < 4
        ):  # of more axes nobody knows which are classes
            logits = named[LOGITS]
            if mask is not None and logits.shape[:2] == mask.shape:
                logits = logits[mask.bool()]
            rows = torch.log_softmax(logits.flatten(0, -2), -1)
            drawn = torch.multinomial(rows.detach().exp(), 1, generator=self._draw)
            return -rows.gather(1, drawn).sum()
        terms = []
        for value in named.values():
            if mask is not None and value.dim() > 2 and value.shape[:2] == mask.shape:
                value = value * mask.reshape(*mask.shape, *[1] * (value.dim() - 2)).to(value.dtype)
            signs = torch.randint(0, 2, value.shape, generator=self._draw) * 2 - 1
            size = value.detach().square().sum().sqrt().clamp_min(1e-12)
            terms.append((value * signs.to(value.dtype)).sum() / size)
        return torch.stack(terms).sum()


def _seen(seen: dict[fx.Node, Tensor], node: fx.Node, value: Any) -> Any:
    """Keeps a value as its readers see it, so that it can be differentiated by."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    kept = value if value.requires_grad else value.detach().requires_grad_()
    seen[node] = kept
    return kept
