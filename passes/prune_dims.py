"""Removes units of coupled dimensions: channels, heads, the width of a residual stream.

    rms_norm(x) over n of N:   √(n/N) · x / √(Σx²/N + ε)  =  x / √(Σx²/n + ε·N/n),   so   g' = √(N/n)·g,   ε' = ε·N/n

What is left has the same operators with smaller constants, and computes what the masked graph does (`coupling`): no
gather, no mask. Sizes that stand in calls are written anew, RMSNorms get the gain and the epsilon that make up for the
shorter mean, and attention that takes its scale from the size of a head is told the one that it had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.probe import Probe
from effc.errors import CalibrationError, PreconditionError
from effc.ir import axes
from effc.ir.axes import Axis, Keep
from effc.ir.edit import rebind, refresh
from effc.ir.program import Graph, Program, place_of
from effc.ir.select import Words, op_name
from effc.passes import sizes
from effc.passes.base import Pass, Stats
from effc.passes.coupling import Coupling, Group, coupled_dims
from effc.passes.coupling_reading import Call, Path
from effc.passes.importance import IMPORTANCES
from effc.table import unknown

Scores = Mapping[str, Tensor]
"""What every unit is worth, [units], by group."""


@dataclass(frozen=True, kw_only=True)
class PruneDims(Pass):
    """Removes channels, heads or residual width from every tensor; `effc inspect MODEL --coupling` lists them.

    `keep` names the units that stay, by group. With a `ratio` that part of every group of `groups` goes, the least
    important units first; with the `budget` global that part of the multiplications of all of them together, wherever
    they are worth least, and no group loses more than nine tenths. `align` rounds what stays to multiples of a number,
    or to sizes that are faster on the target (`auto`); with a `latency_budget` as much goes as brings the time down to
    that share.
    """

    name = "prune-dims"
    effect = "lossy"
    renews: ClassVar[bool] = True
    shrinks: ClassVar[bool] = True
    is_shared: ClassVar[bool] = True

    keep: dict[str, tuple[int, ...]] | None = None
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    latency_budget: Annotated[float, Field(gt=0, lt=1)] | None = None
    align: Literal["auto"] | Annotated[int, Field(ge=1)] | None = None
    groups: Words = "*"
    importance: str = "magnitude"
    budget: Literal["group", "global"] = "group"

    @property
    def measures(self) -> bool:
        return self.keep is None and bool(IMPORTANCES[self.importance].measures)

    def requires(self, program: Program) -> None:
        if [self.keep, self.ratio, self.latency_budget].count(None) != 2:
            raise PreconditionError(
                f"{self.name} needs either a keep-set or a ratio or a latency budget",
                hint="ratio: 0.25, latency_budget: 0.7, or keep: {GROUP: [0, 1, 3]}; `effc inspect MODEL --coupling` "
                "names the groups",
            )
        told = [
            name
            for name, usual in (
                ("align", None), ("groups", "*"), ("importance", "magnitude"), ("budget", "group"),
            )
            if getattr(self, name) != usual
        ]  # fmt: skip
        if self.keep is not None and told:
            raise PreconditionError(
                f"{self.name}: a keep-set says which units stay, and leaves nothing to {' and '.join(told)}",
                hint=f"leave `{'`, `'.join(told)}` out",
            )
        if self.keep is not None and not self.keep:
            raise PreconditionError(
                f"{self.name}: the keep-sets name no group",
                hint="keep: {GROUP: [0, 1, 3]}; `effc inspect MODEL --coupling` names the groups",
            )
        if self.budget == "global" and (self.ratio or 0) > 1 - LEAST:
            raise PreconditionError(
                f"a global budget leaves a tenth of every group, and a ratio of {self.ratio} asks for less",
                hint=f"ratio: {1 - LEAST:g} or less, or budget: group",
            )
        IMPORTANCES[self.importance]  # a word that nobody knows is refused before any work
        couplings = [coupled_dims(graph) for graph in program if self.takes(graph.role)]
        for word, units in (self.keep or {}).items():
            _hold(word, units, couplings)
        if self.multiple > 1:
            for coupling in couplings:
                sizes.refuse_unaligned(self._matching(coupling), self.multiple)
        if self.keep is None and not any(self._chosen(c) for c in couplings):
            if found := [group for c in couplings for group in self._matching(c)]:
                raise self._whole(found)
            raise PreconditionError(
                f"no group of {self.groups!r} can lose a unit",
                hint=_refusals(couplings, self.groups),
            )

    def probes(self, graph: Graph) -> Iterable[Probe]:
        if self.keep is not None:
            return
        coupling = coupled_dims(graph)
        for group in self._chosen(coupling):
            yield from IMPORTANCES[self.importance]().probes(coupling, group)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        coupling = coupled_dims(graph)
        groups, chosen = self._chosen(coupling), {}
        scores = cache(partial(self._scores, coupling, groups, stats))
        counts = cache(partial(self._counts, coupling, groups, stats, scores))
        if self.times:
            counts()  # what was measured is told of a replay too
        for group in groups:
            key = f"{graph.role}/{group.name}"
            units = stats.decide(key, partial(self._units, group, scores, counts))
            if not units or not _fits(units, group):
                raise CalibrationError(
                    f"the recorded units of {key!r} are none of this model's {group.size}",
                    hint="the record is of another model; prune again without it",
                )
            if len(units) < group.size:
                chosen[group.name] = units
        if groups and not chosen and self.ratio is not None and not self.times:
            raise self._whole(groups, f"graph {graph.role!r}")
        if chosen:
            remove(coupling, coupling.keep(chosen))
        whole = [group for group in self._matching(coupling) if group.name not in chosen]
        if whole and self.multiple > 1 and not self.times:
            stats.notes["whole"] = {
                "groups": {group.name: group.size for group in whole}, "align": self.multiple,
            }  # fmt: skip
        return len(chosen)

    @property
    def multiple(self) -> int:
        """Of what the units that stay are a multiple, where no clock says it."""
        return self.align if isinstance(self.align, int) else 1

    @property
    def times(self) -> bool:
        return self.align == "auto" or self.latency_budget is not None

    def untimed(self) -> Self:
        ratio = self.ratio if self.latency_budget is None else 1 - self.latency_budget
        align = None if self.align == "auto" else self.align
        return replace(self, ratio=ratio, latency_budget=None, align=align)

    def _chosen(self, coupling: Coupling) -> list[Group]:
        """The groups that lose units."""
        if self.keep is not None:
            return [coupling.groups[word] for word in self.keep if word in coupling.groups]
        found = self._matching(coupling)
        if self.ratio is None or self.budget == "global":
            return found
        counts = self._wanted(found, self.ratio)
        return [group for group in found if counts[group.name] < group.size]

    def _matching(self, coupling: Coupling) -> list[Group]:
        words = (self.groups,) if isinstance(self.groups, str) else self.groups
        return [
            group
            for group in coupling.prunable()
            if any(fnmatchcase(group.name, word) for word in words)
        ]

    def _whole(self, groups: Sequence[Group], where: str | None = None) -> PreconditionError:
        """Why a ratio takes no unit of any of these groups."""
        most = max(group.size for group in groups)
        if self.multiple > 1:
            return PreconditionError(
                f"a ratio of {self.ratio} in multiples of {self.multiple} leaves every group whole; the largest "
                f"has {most} units",
                where=where,
                hint="a larger ratio, or a smaller `align`",
            )
        return PreconditionError(
            f"a ratio of {self.ratio} is less than one unit of every group; the largest has {most}",
            where=where,
            hint=f"ratio: {1 / most:.2g} or more",
        )

    def _scores(self, coupling: Coupling, groups: list[Group], stats: Stats) -> Scores:
        importance = IMPORTANCES[self.importance]()
        return {group.name: importance.scores(coupling, group, stats) for group in groups}

    def _wanted(
        self, groups: list[Group], ratio: float, scores: Callable[[], Scores] | None = None
    ) -> dict[str, int]:
        """How many units stay where no time is measured."""
        counts = {group.name: max(1, round(group.size * (1 - ratio))) for group in groups}
        if self.budget == "global" and scores is not None:
            is_of_loss = bool(IMPORTANCES[self.importance].is_of_loss)
            counts = spread(groups, scores(), ratio, is_of_loss=is_of_loss)
        found = {}
        for group in groups:
            count = counts[group.name]
            found[group.name] = sizes.aligned(group, count, sizes.step_of(group, self.multiple))
        return found

    def _counts(
        self, coupling: Coupling, groups: list[Group], stats: Stats, scores: Callable[[], Scores]
    ) -> dict[str, int]:
        """How many units stay."""
        if not self.times:
            assert self.ratio is not None
            return self._wanted(groups, self.ratio, scores)
        made = stats.decide(
            f"{coupling.graph.role}/sizes", partial(self._timed, coupling, groups, stats, scores)
        )
        found = sizes.read(made, groups)
        stats.notes["sizes"] = found.to_json()
        return found.counts

    def _timed(
        self, coupling: Coupling, groups: list[Group], stats: Stats, scores: Callable[[], Scores]
    ) -> dict[str, Any]:
        shrink = partial(shrunk, coupling.graph)
        chooser = sizes.Chooser(coupling=coupling, shrink=shrink, clock=stats.clock)
        share = self.latency_budget
        if share is None:
            assert self.ratio is not None
            return chooser.near(self._wanted(groups, self.ratio, scores)).to_json()
        near = self._wanted(groups, 1 - share, scores)
        steps = chooser.steps(near) if self.align == "auto" else {}

        def counts_at(ratio: float) -> dict[str, int]:
            wanted = self._wanted(groups, ratio, scores)
            return {g.name: sizes.aligned(g, wanted[g.name], steps.get(g.name, 1)) for g in groups}

        return chooser.within(share, counts_at).to_json()

    def _units(
        self, group: Group, scores: Callable[[], Scores], counts: Callable[[], dict[str, int]]
    ) -> list[int]:
        if self.keep is not None:
            return sorted(self.keep[group.name])
        best = torch.sort(scores()[group.name], descending=True, stable=True).indices
        return sorted(best[: counts()[group.name]].tolist())


LEAST = 0.1
"""The part of a group that a global budget leaves of it at least."""


def spread(
    groups: Sequence[Group], scores: Scores, ratio: float, *, is_of_loss: bool
) -> dict[str, int]:
    """How many units of every group stay where that part of all multiplications goes, the cheapest loss first.

    Scores that are of another scale in every group are first divided by their mean there.
    """
    in_macs = all(g.macs for g in groups)  # else some have no weight that is multiplied with
    costs = {g.name: max(1, g.macs if in_macs else g.parameters) for g in groups}
    left = {g.name: g.size for g in groups}
    least = {g.name: max(1, math.ceil(LEAST * g.size)) for g in groups}
    wanted = ratio * sum(costs[g.name] * g.size for g in groups)
    order = []
    for group in groups:
        values = scores[group.name]
        if not is_of_loss:
            values = values / values.mean().clamp_min(1e-300)
        order += [(float(v) / costs[group.name], group.name) for v in values]
    for _, name in sorted(order):
        if wanted <= 0:
            break
        if left[name] > least[name]:
            left[name] -= 1
            wanted -= costs[name]
    return left


def _fits(units: Any, group: Group) -> bool:
    if not isinstance(units, list | tuple) or not all(type(u) is int for u in units):
        return False
    return len(set(units)) == len(units) and all(0 <= u < group.size for u in units)


def _hold(word: str, units: tuple[int, ...], couplings: list[Coupling]) -> None:
    """Raise PreconditionError where a keep-set does not fit the groups of that name."""
    found = [c.groups[word] for c in couplings if word in c.groups]
    known = [name for c in couplings for name in c.groups]
    if not found:
        raise PreconditionError(
            unknown("group", word, known), hint="`effc inspect MODEL --coupling` lists the groups"
        )
    for group in found:
        if group.stop is not None:
            raise PreconditionError(
                f"{word} cannot lose a unit: {group.stop}",
                hint=group.stop.hint or "leave it out of the keep-sets",
            )
        if not units:
            raise PreconditionError(
                f"the keep-set of {word} is empty", hint="at least one unit must stay"
            )
        if not _fits(units, group):
            raise PreconditionError(
                f"the keep-set of {word} is of another model: it has {group.size} units",
                hint=f"numbers from 0 to {group.size - 1}, each once",
            )


def _refusals(couplings: list[Coupling], words: Words) -> str:
    """Why the groups that were meant cannot be pruned, in a line."""
    patterns = (words,) if isinstance(words, str) else words
    found = [
        f"{group.name}: {group.stop}" + (f" ({group.stop.hint})" if group.stop.hint else "")
        for coupling in couplings
        for group in coupling.groups.values()
        if group.stop is not None and any(fnmatchcase(group.name, word) for word in patterns)
    ]
    return "; ".join(found[:3]) or "`effc inspect MODEL --coupling` lists the groups"


# -- removal


def shrunk(graph: Graph, counts: Mapping[str, int]) -> Graph:
    """A copy of a graph with the first units of some groups alone: what it takes does not hang on which they are."""
    smaller = graph.clone()
    coupling = coupled_dims(smaller)
    remove(coupling, coupling.keep({name: range(count) for name, count in counts.items()}))
    refresh(smaller)
    return smaller


def remove(coupling: Coupling, keep: Keep) -> None:
    """Take out of the graph what `keep` does not keep; the caller refreshes."""
    sizes = {axis: int(flags.sum()) for axis, flags in keep.items()}
    _constants(coupling, keep, _gains(coupling, sizes))
    for node, axis in coupling.reading.norms:
        _norm(node, axis, sizes)
    for node, axis in coupling.reading.scales:
        if axes.size_of(axis, sizes) != axes.size_of(axis, {}):
            node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(axes.size_of(axis, {}))}
    for literal in coupling.reading.literals:
        old, new = (sum(axes.size_of(a, s) for a in literal.axes) for s in ({}, sizes))
        if old != new:
            write(literal.node, literal.path, new + literal.plus)
    for node, ends in coupling.reading.cuts:
        _cut(node, ends, sizes)
    for node in coupling.graph.nodes:
        if op_name(node) in VIEWS and any(axis in keep for axis in _leaves(coupling, node)):
            _make_reshape(node)


VIEWS = ("view", "_unsafe_view")


def _leaves(coupling: Coupling, node: fx.Node) -> set[Axis]:
    return {x for axis in coupling.reading.of(node) for x in axes.leaves(axis)}


MOVES = ("reshape", "unsqueeze", "squeeze", "alias", "detach", "slice", "select", *VIEWS)
"""What may leave its values where they lie."""


def _make_reshape(node: fx.Node) -> None:
    """A view of what was turned hangs on strides, which kernels of attention choose by the sizes they get."""
    source = node.args[0]
    while isinstance(source, fx.Node) and op_name(source) in MOVES:
        source = source.args[0]
    if isinstance(source, fx.Node) and op_name(source) in ("transpose", "permute"):
        node.target = torch.ops.aten.reshape.default


def _gains(coupling: Coupling, sizes: Mapping[Axis, int]) -> dict[fx.Node, float]:
    """By gain of an RMSNorm, what it is multiplied by."""
    found = {}
    for node, axis in coupling.reading.norms:
        old, new = axes.size_of(axis, {}), axes.size_of(axis, sizes)
        if old != new:
            found[Call(node)["weight"]] = math.sqrt(old / new)
    return found


def _norm(node: fx.Node, axis: Axis, sizes: Mapping[Axis, int]) -> None:
    old, new = axes.size_of(axis, {}), axes.size_of(axis, sizes)
    if old == new:
        return
    call = Call(node)
    eps = call["eps"]
    if eps is None:
        eps = torch.finfo(node.meta["val"].dtype).eps
    assert call.places["weight"] is not None  # else the axis is stopped
    place = call.places["eps"]
    write(node, (3 if place is None and len(node.args) == 3 else place or "eps",), eps * old / new)


def _constants(coupling: Coupling, keep: Keep, gains: Mapping[fx.Node, float]) -> None:
    """Slice every tensor; names of one tensor stay names of one tensor."""
    tensors = coupling.graph.tensors()
    made: dict[Any, Tensor] = {}
    for name, node in coupling.constants.items():
        dims = coupling.reading.of(node)
        flags = [axes.kept(axis, keep) for axis in dims]
        if all(f.all() for f in flags):
            continue
        tensor, factor = tensors[name], gains.get(node, 1.0)
        key = (*place_of(tensor), factor)
        if key not in made:
            made[key] = _sliced(tensor, flags, factor)
        rebind(coupling.graph, name, made[key], "prune-dims")


def _sliced(tensor: Tensor, flags: list[Any], factor: float) -> Tensor:
    for dim, stay in enumerate(flags):
        if not stay.all():
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(stay)))
    if factor != 1:
        tensor = (tensor.to(torch.float64) * factor).to(tensor.dtype)
    return tensor.contiguous()


def _cut(node: fx.Node, ends: list[Axis], sizes: Mapping[Axis, int]) -> None:
    """A call that cuts into parts says their sizes where they are others now."""
    old, new = ([axes.size_of(end, s) for end in ends] for s in ({}, sizes))
    if old == new:
        return
    if op_name(node) == "chunk" and len(set(new)) == 1:
        return
    dim = Call(node)["dim"] or 0
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (node.args[0], new, dim), {}


def write(node: fx.Node, path: Path, value: Any) -> None:
    """Put a literal into a call."""
    first, *rest = path
    if isinstance(first, str):
        node.kwargs = {**node.kwargs, first: _put(node.kwargs.get(first), rest, value)}
        return
    args = list(node.args) + [None] * (first + 1 - len(node.args))
    args[first] = _put(args[first], rest, value)
    node.args = tuple(args)


def _put(old: Any, path: list[Any], value: Any) -> Any:
    if not path:
        return value
    found = list(old)
    found[path[0]] = _put(found[path[0]], path[1:], value)
    return found
