"""How much a unit of a group is worth: what `prune-dims` ranks by where it is given a ratio.

An importance says what it wants measured, and then gives a number for every unit; the units with the least are removed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from effc.calib.probe import Probe
from effc.errors import RecipeError
from effc.passes.base import Stats
from effc.passes.coupling import Coupling, Group
from effc.table import Table


class Importance(Protocol):
    """One way to rank units."""

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        """What is to be measured before units of the group can be ranked."""
        ...

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        """What every unit is worth, [units], in float64."""
        ...


class Magnitude:
    """√ Σ w², over every weight that a unit takes with it (Li et al., ICLR 2017, over all members of a group)."""

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        return ()

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        tensors = coupling.graph.tensors()
        found = torch.zeros(group.size, dtype=torch.float64)
        for member in group.members:
            tensor = tensors[member.tensor]
            if tensor.dim() < 2 or not tensor.is_floating_point():
                continue  # gains and shifts are of another scale
            others = [d for d in range(tensor.dim()) if d != member.dim]
            squares = tensor.to(torch.float64).pow(2).sum(others)
            places = torch.from_numpy(member.places)
            on = places >= 0
            found.index_add_(0, places[on], squares[on])
        return found.sqrt()


class First:
    """The first units are worth most: what stays of a width that pca-rotate sorted by variance."""

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        return ()

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        return torch.arange(group.size, 0, -1, dtype=torch.float64)


IMPORTANCES = Table(
    "importance",
    {
        "first": "effc.passes.importance:First",
        "magnitude": "effc.passes.importance:Magnitude",
    },
    error=RecipeError,
)
