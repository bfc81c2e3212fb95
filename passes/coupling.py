"""Which dimensions of a graph move together: the groups of indices that can be removed, and why others cannot.

    q_proj [(kv · rep · pairs · 2), hidden]    k_proj [(kv · pairs · 2), hidden]    down_proj [hidden, width]

Every dimension of every tensor is an `Axis` (`effc.ir.axes`), which operators split, lay end to end and make equal
(`coupling_rules`). A group is a leaf that nothing stopped: its units can be removed from all of its members at once,
and the graph that is left has the same operators with smaller constants.

What that computes is the *masked* graph: the same graph where every value that holds the group is multiplied by a mask,
1 where a unit stays and 0 where it goes, right behind the node that made it (`masks`). So a removed unit counts as 0
behind every operator, whatever that makes of 0, and removal is exact where readers add nothing for 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from effc.ir import axes
from effc.ir.axes import Axis, Keep, Stop, leaves, stop, unify
from effc.ir.edit import rebind
from effc.ir.program import LIFTED, Graph, place_of
from effc.ir.select import site_names
from effc.ir.values import Change, Values
from effc.passes.coupling_reading import Axes, Reading, Use, every, made
from effc.passes.coupling_rules import read


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """A dimension of a lifted tensor that holds the group."""

    tensor: str
    dim: int
    axis: Axis = field(repr=False)
    unit: Axis = field(repr=False)

    @cached_property
    def places(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """For every index of the dimension the unit that it belongs to, −1 where it belongs to none."""
        return axes.places(self.axis, self.unit)

    def per_unit(self) -> int:
        """How many indices one unit takes."""
        return int((self.places == 0).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Indices that move together. Its name is made of the tensor that writes it first, and outlives the trace."""

    name: str
    size: int
    """How many units there are: channels, heads, groups of a norm."""
    unit: Axis = field(repr=False)
    members: tuple[Member, ...]
    writers: tuple[str, ...]
    """Layers whose output is the group, by site name."""
    readers: tuple[str, ...]
    rewritten: tuple[str, ...]
    """Calls in which a size stands that changes with the group, by site name."""
    parameters: int
    """How many numbers of the model one unit takes with it."""
    macs: int
    """How many multiplications one unit takes with it, for each position of the free dimensions."""
    stop: Stop | None = None
    """Why no unit may be removed; None where units may."""

    @property
    def is_prunable(self) -> bool:
        return self.stop is None


@dataclass(kw_only=True)
class Coupling:
    """The groups of a graph, and what `prune-dims` needs to remove units of them."""

    graph: Graph
    reading: Reading
    constants: dict[str, fx.Node]
    groups: dict[str, Group] = field(default_factory=dict)

    def prunable(self) -> list[Group]:
        return [group for group in self.groups.values() if group.is_prunable]

    def keep(self, chosen: Mapping[str, Sequence[int]]) -> Keep:
        """Keep-sets by group as flags by axis."""
        found = {}
        for name, units in chosen.items():
            group = self.groups[name]
            flags = np.zeros(group.size, bool)
            flags[list(units)] = True
            found[group.unit] = flags
        return found

    def share(self) -> float:
        """The part of the parameters that lies on a prunable group, in whatever dimension."""
        tensors = self.graph.tensors()
        units = {group.unit for group in self.prunable()}
        counted: dict[Any, int] = {}
        every_one: dict[Any, int] = {}
        for name, node in self.constants.items():
            tensor = tensors[name]
            if not tensor.is_floating_point():
                continue
            free = np.ones((), bool)
            for axis in self.reading.of(node):
                on = np.zeros(axis.size, bool)
                for unit in {x for x in leaves(axis) if x in units}:
                    on |= axes.places(axis, unit) >= 0
                free = np.logical_and.outer(free, ~on)
            counted[place_of(tensor)] = int((~free).sum())
            every_one[place_of(tensor)] = tensor.numel()
        return sum(counted.values()) / max(1, sum(every_one.values()))


def coupled_dims(graph: Graph, *, may_shrink: Sequence[str] = ()) -> Coupling:
    """The coupled dimensions of a graph. What reaches an input or an output is stopped.

    Outputs named in `may_shrink` are not held to their sizes.
    """
    reading = Reading(names=site_names(graph))
    constants = _placeholders(graph, reading)
    for node in graph.fx.nodes:
        if node.op == "call_function":
            read(reading, node)
        elif node.op == "get_attr":
            reading.dims[node] = []
        elif node.op == "output":
            for name, value in zip(graph.outputs, node.args[0], strict=True):
                if name in may_shrink:
                    continue
                for axis in every(reading.dims.get(value, [])):
                    stop(axis, Stop(reason=f"the output {name!r} has it"))
    for axis, why in reading.unspoken:
        stop(axis, why)
    coupling = Coupling(graph=graph, reading=reading, constants=constants)
    coupling.groups = _groups(coupling)
    return coupling


def _placeholders(graph: Graph, reading: Reading) -> dict[str, fx.Node]:
    """Axes of inputs and constants; gives the nodes of constants by name. Names of one tensor have the same axes."""
    nodes = graph.placeholders()
    tensors = graph.tensors()
    user = iter(graph.inputs)
    constants: dict[str, fx.Node] = {}
    twins: dict[Any, Axes] = {}
    for spec in graph.exported.graph_signature.input_specs:
        node = nodes[spec.arg.name]
        value = node.meta["val"]
        if spec.kind not in LIFTED or spec.target is None:
            name = next(user)
            why = Stop(reason=f"the input {name!r} has it")
            reading.dims[node] = [made(s, why) for s in value.shape]
            reading.inputs.append(node)
            continue
        constants[spec.target] = node
        found = reading.dims[node] = [made(s) for s in value.shape]
        tensor = tensors[spec.target]
        key = place_of(tensor)
        if not tensor.numel():
            continue
        for mine, other in zip(found, twins.setdefault(key, found), strict=True):
            unify(mine, other, Stop(reason="two names of one tensor are read in unlike ways"))
    return constants


def _groups(coupling: Coupling) -> dict[str, Group]:
    """Every leaf that a layer writes or reads, in order of execution."""
    reading = coupling.reading
    order = {node: number for number, node in enumerate(coupling.graph.fx.nodes)}
    first = {
        name: min((order[user] for user in node.users), default=len(order))
        for name, node in coupling.constants.items()
    }
    members: dict[Axis, list[Member]] = {}
    for name in sorted(first, key=first.__getitem__):
        for dim, axis in enumerate(reading.of(coupling.constants[name])):
            for unit in dict.fromkeys(leaves(axis)):
                member = Member(tensor=name, dim=dim, axis=axis, unit=unit)
                members.setdefault(unit, []).append(member)
    writers, readers = _sides(reading)
    macs = _macs(reading)
    sizes: dict[Axis, list[fx.Node]] = {}
    for literal in reading.literals:
        for unit in {x for axis in literal.axes for x in leaves(axis)}:
            sizes.setdefault(unit, []).append(literal.node)
    names = {node: name for name, node in coupling.constants.items()}
    origins = coupling.graph.origins
    found: dict[str, Group] = {}
    for unit, mine in members.items():
        uses = [*writers.get(unit, []), *readers.get(unit, [])]
        if unit.size == 1 or not uses or (unit.stop is not None and unit.stop.is_plain):
            continue
        name = _name(unit, writers.get(unit, []), mine, names, origins)
        while name in found:
            name += "+"
        found[name] = Group(
            name=name,
            size=unit.size,
            unit=unit,
            members=tuple(mine),
            writers=_sites(reading, writers.get(unit, [])),
            readers=_sites(reading, readers.get(unit, [])),
            rewritten=tuple(dict.fromkeys(reading.names[n] for n in sizes.get(unit, ()))),
            parameters=_parameters(coupling, unit, mine),
            macs=macs.get(unit, 0),
            stop=unit.stop,
        )
    return found


def _sides(reading: Reading) -> tuple[dict[Axis, list[Use]], dict[Axis, list[Use]]]:
    """By leaf, the uses of weights that write it and those that read it."""
    writers: dict[Axis, list[Use]] = {}
    readers: dict[Axis, list[Use]] = {}
    for use in reading.uses:
        for side, axis in ((writers, use.writes), (readers, use.reads)):
            for unit in dict.fromkeys(leaves(axis)):
                side.setdefault(unit, []).append(use)
    return writers, readers


def _sites(reading: Reading, uses: Sequence[Use]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(reading.names[use.node] for use in uses))


def _name(
    unit: Axis,
    writers: Sequence[Use],
    members: Sequence[Member],
    names: Mapping[fx.Node, str],
    origins: Mapping[str, Any],
) -> str:
    """The tensor that writes the group first: `fc1`, `embed@1` for another dimension than the first, and `q_proj:0`
    where the dimension holds several groups, outermost first.
    """
    written = next((names[use.weight] for use in writers if use.weight in names), None)
    member = next((m for m in members if m.tensor == written), members[0])
    source = origins[member.tensor].source if member.tensor in origins else member.tensor
    word = source.removesuffix(".weight") + (f"@{member.dim}" if member.dim else "")
    parts = list(dict.fromkeys(leaves(member.axis)))
    return f"{word}:{parts.index(unit)}" if len(parts) > 1 else word


def _parameters(coupling: Coupling, unit: Axis, members: Sequence[Member]) -> int:
    tensors = coupling.graph.tensors()
    fewer = {unit: unit.size - 1}
    seen: dict[Any, int] = {}
    for name in dict.fromkeys(member.tensor for member in members):
        tensor = tensors[name]
        if tensor.is_floating_point():
            left = [axes.size_of(a, fewer) for a in coupling.reading.of(coupling.constants[name])]
            seen[place_of(tensor)] = tensor.numel() - int(np.prod(left))
    return sum(seen.values())


def _macs(reading: Reading) -> dict[Axis, int]:
    """Multiplications with weights that one unit of a leaf takes with it."""
    found: dict[Axis, int] = {}
    for use in reading.uses:
        shape = reading.of(use.weight)
        if use.positions == 0 or not all(isinstance(a.size, int) for a in shape):
            continue
        whole = int(np.prod([a.size for a in shape]))
        for unit in {x for axis in shape for x in leaves(axis)}:
            fewer = {unit: unit.size - 1}
            left = int(np.prod([axes.size_of(a, fewer) for a in shape]))
            found[unit] = found.get(unit, 0) + (whole - left) * use.positions
    return found


# -- what masked means


def masked_run(
    coupling: Coupling, chosen: Mapping[str, Sequence[int]], feeds: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs of the masked graph, where `chosen` names the units that stay, by group."""
    keep = coupling.keep(chosen)
    graph = _masked_constants(coupling, keep)
    nodes = dict(zip(coupling.graph.fx.nodes, graph.fx.nodes, strict=True))
    changes = {nodes[node]: change for node, change in masks(coupling, keep).items()}
    with torch.no_grad():
        return Values(graph, feeds, changes=changes).outputs()


def masks(coupling: Coupling, keep: Keep) -> dict[fx.Node, Change]:
    """What the masked graph does to values behind every call, as `effc.ir.values.Values` takes `changes`."""
    found: dict[fx.Node, Change] = {}
    for node in coupling.graph.nodes:
        value, dims = node.meta.get("val"), coupling.reading.of(node)
        if isinstance(value, Tensor) and value.is_floating_point():
            factors = _factors(dims, keep)
            if factors:
                found[node] = _times(factors)
    return found


def _masked_constants(coupling: Coupling, keep: Keep) -> Graph:
    """A clone of the graph whose constants hold 0 for the removed units."""
    graph = coupling.graph.clone()
    for name, node in coupling.constants.items():
        tensor = graph.tensors()[name]
        factors = _factors(coupling.reading.of(node), keep)
        if factors and tensor.is_floating_point():
            rebind(graph, name, _times(factors)(tensor), "mask")
    return graph


def _factors(dims: Axes, keep: Keep) -> list[Tensor]:
    """Flags for every dimension that loses indices, shaped to broadcast over the tensor."""
    found = []
    for place, axis in enumerate(dims):
        if any(unit in keep for unit in leaves(axis)):
            flags = torch.from_numpy(axes.kept(axis, keep))
            found.append(flags.reshape(-1, *[1] * (len(dims) - 1 - place)))
    return found


def _times(factors: Sequence[Tensor]) -> Change:
    def change(value: Tensor) -> Tensor:
        for factor in factors:
            value = torch.where(factor, value, torch.zeros((), dtype=value.dtype))
        return value

    return change
