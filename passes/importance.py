"""How much a unit of a group is worth: what `prune-dims` ranks by where it is given a ratio.

An importance says what it wants measured, and then gives a number for every unit; the units with the least are removed.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, fx

from effc.calib.collectors import Channels
from effc.calib.probe import Probe
from effc.calib.slopes import SlopeProbe, Slopes
from effc.errors import RecipeError
from effc.ir import axes
from effc.ir.axes import leaves
from effc.passes.base import Stats
from effc.passes.coupling import Coupling, Group
from effc.passes.coupling_reading import Use
from effc.table import Table


class Importance(Protocol):
    """One way to rank units."""

    measures: ClassVar[bool]
    """Whether it needs calibration data."""
    is_of_loss: ClassVar[bool]
    """Whether its numbers are of one scale in all groups: what the outputs lose."""

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        """What is to be measured before units of the group can be ranked."""
        ...

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        """What every unit is worth, [units], in float64."""
        ...


class Magnitude:
    """√ Σ w², over every weight that a unit takes with it (Li et al., ICLR 2017, over all members of a group)."""

    measures, is_of_loss = False, False

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


class Activation:
    """E[x²], summed over what every reader of a unit sees of it."""

    measures, is_of_loss = True, False

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        for place in read(coupling, group):
            yield Probe(key=place.key, node=place.node, collector=Channels(place.dim))

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        found = torch.zeros(group.size, dtype=torch.float64)
        for place in read(coupling, group):
            seen = stats[place.key]
            found += _by_unit(torch.from_numpy(seen.squares / max(seen.count, 1)), place, group)
        return found


class Wanda:
    """√ Σ E[x²] w² over the weights that read a unit (Sun et al. 2024, squares summed over outputs); else E[x²]."""

    measures, is_of_loss = True, False

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        return Activation().probes(coupling, group)

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        tensors = coupling.graph.tensors()
        names = {node: name for name, node in coupling.constants.items()}
        found = torch.zeros(group.size, dtype=torch.float64)
        for place in read(coupling, group):
            seen = stats[place.key]
            squares = torch.from_numpy(seen.squares / max(seen.count, 1))
            if not place.uses:
                found += _by_unit(squares, place, group)
            for use in place.uses:
                dims = coupling.reading.of(use.weight)
                if use.weight not in names or use.reads not in dims:
                    found += _by_unit(squares, place, group)  # a weight that is computed
                    continue
                weight = tensors[names[use.weight]].to(torch.float64)
                read_ = _read_squares(weight, dims.index(use.reads), len(squares))
                found += _by_unit(squares * read_, place, group)
        return found.sqrt()


def _read_squares(weight: Tensor, dim: int, channels: int) -> Tensor:
    """Σ w² by channel that a weight reads along `dim`, [channels]; a convolution in groups reads a part in each."""
    inputs = weight.shape[dim]
    if inputs == channels:
        return weight.square().sum([d for d in range(weight.dim()) if d != dim])
    if dim == 1 and channels % inputs == 0 and len(weight) % (channels // inputs) == 0:
        parts = weight.square().reshape(channels // inputs, -1, inputs, *weight.shape[2:])
        return parts.sum([d for d in range(parts.dim()) if d not in (0, 2)]).reshape(-1)
    return torch.ones(channels, dtype=torch.float64)


class Taylor:
    """E[(Σ x · ∂L/∂x)²] of what readers see of a unit: the squared first term of removing it (`effc.calib.slopes`)."""

    measures, is_of_loss = True, True

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        collector = Slopes(group.size)
        for place in read(coupling, group):
            yield SlopeProbe(
                key=_key(coupling, group), node=place.node, collector=collector, dim=place.dim,
                places=torch.from_numpy(place.units),
            )  # fmt: skip

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        found: Tensor = stats[_key(coupling, group)].mean()
        return found


class First:
    """The first units are worth most: what stays of a width that pca-rotate sorted by variance."""

    measures, is_of_loss = False, True

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        return ()

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        return torch.arange(group.size, 0, -1, dtype=torch.float64)


class Random:
    """Units in an order that hangs on nothing but the name of the group: what every other ranking is to be above."""

    measures, is_of_loss = False, True

    def probes(self, coupling: Coupling, group: Group) -> Iterable[Probe]:
        return ()

    def scores(self, coupling: Coupling, group: Group, stats: Stats) -> Tensor:
        seed = zlib.crc32(group.name.encode())
        return torch.from_numpy(np.random.default_rng(seed).random(group.size))


@dataclass(frozen=True, kw_only=True)
class Place:
    """A value that layers read units from, the dimension that they lie on, and the unit of every index, −1 for none."""

    key: str
    node: fx.Node
    dim: int
    units: np.ndarray[Any, np.dtype[np.int64]]
    uses: tuple[Use, ...]


def read(coupling: Coupling, group: Group) -> list[Place]:
    """The values that hold a group where layers read it, each once; of what no layer reads, where layers write it.

    Queries and keys are read by attention alone.
    """
    by: dict[tuple[fx.Node, int], list[Use]] = {}
    made: dict[tuple[fx.Node, int], list[Use]] = {}
    for use in coupling.reading.uses:
        for found, axis, value, mine in (
            (by, use.reads, use.node.args[0], [use]), (made, use.writes, use.node, []),
        ):  # fmt: skip
            dims = coupling.reading.of(value)
            dim = next((d for d, held in enumerate(dims) if group.unit in leaves(held)), None)
            if group.unit in leaves(axis) and isinstance(value, fx.Node) and dim is not None:
                found.setdefault((value, dim), []).extend(mine)
    names = coupling.reading.names
    return [
        Place(
            key=f"{coupling.graph.role}/{names.get(node, node.name)}:{dim}", node=node, dim=dim,
            units=axes.places(coupling.reading.of(node)[dim], group.unit), uses=tuple(uses),
        )
        for (node, dim), uses in (by or made).items()
    ]  # fmt: skip


def _key(coupling: Coupling, group: Group) -> str:
    return f"{coupling.graph.role}/{group.name}:slope"


def _by_unit(values: Tensor, place: Place, group: Group) -> Tensor:
    """Numbers of indices, summed by unit."""
    units = torch.from_numpy(place.units)
    found = torch.zeros(group.size, dtype=torch.float64)
    return found.index_add_(0, units[units >= 0], values.to(torch.float64)[units >= 0])


IMPORTANCES = Table(
    "importance",
    {
        "magnitude": "effc.passes.importance:Magnitude",
        "activation": "effc.passes.importance:Activation",
        "wanda": "effc.passes.importance:Wanda",
        "taylor": "effc.passes.importance:Taylor",
        "first": "effc.passes.importance:First",
        "random": "effc.passes.importance:Random",
    },
    error=RecipeError,
)
