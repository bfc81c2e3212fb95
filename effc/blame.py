"""Where did it go wrong? Which nodes of a rewritten program its error comes from, and which of them are faulty.

    for node, share in effc.explain(reference, program):
        print(node, share)

Every node is fed with the reference's own values, so that what it is off by is its own doing. One that is off by more
than its grids and float rounding explain (`noise`) is a fault. Its share of the final error is tried out for faults
and for the largest ones, and estimated for the rest (`case`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.case import Case, made_up, tensors, unmatched
from effc.ir.align import computed
from effc.ir.differences import Differences
from effc.ir.edit import tensor_name
from effc.ir.gap import decibel
from effc.ir.program import Program
from effc.ir.select import op_name, site_names
from effc.ir.values import compared
from effc.noise import Local, Noise, measured
from effc.quant.ops import DEQUANTIZE, QUANTIZE

TINY = 1e-9
"""Squared relative error of the outputs that nobody sees."""
WORSE = 2.0
"""Where taking an error out makes that of the outputs so many times larger, other nodes make up for it."""


@dataclass(frozen=True, kw_only=True)
class Blame:
    """What one node has to do with the error of the outputs. Unpacks as `node, share`."""

    node: fx.Node
    site: str
    """Its name, which stays the same from trace to trace; a grid has that of the value that it is on."""
    op: str
    share: float
    """Its part of the squared error of the outputs, 0 … 1."""
    local_db: float
    """Signal to noise of the node on exact inputs."""
    expected_db: float
    """The same, as far as its grids explain it."""
    alone_db: float | None
    """Signal to noise of the outputs where only this node is off; None where it was not tried."""
    place: int
    """Its place in the order of execution."""
    is_fault: bool
    """Whether it is off by more than its grids and rounding explain."""
    reason: str

    def __iter__(self) -> Iterator[Any]:
        yield self.node
        yield self.share

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "node": self.node.name}


def explain(
    reference: Program,
    program: Program,
    feeds: Mapping[str, Any] | None = None,
    *,
    role: str | None = None,
    tried: int = 5,
) -> list[Blame]:
    """The nodes of `program` that are off from `reference`: faults first, then by share of the final error.

    `feeds` are inputs by name. Without them inputs are made up from the example that `reference` was traced on; real
    ones are better, since ranges are made for them. The effect on the outputs is tried out for every fault and the
    `tried` largest shares, and estimated for the rest.
    """
    left, right = (p[role] if role is not None else p.only() for p in (reference, program))
    inputs = made_up(left) if feeds is None else tensors(left, feeds)
    return Faults(left, right, inputs, is_made_up=feeds is None).blames(tried)


def first_fault(blames: Iterable[Blame]) -> Blame | None:
    """The fault that comes first in order of execution; None where no node is off by more than it may be."""
    return min((b for b in blames if b.is_fault), key=lambda b: b.place, default=None)


class Faults(Case):
    """Finds the nodes that are off by more than they may be."""

    def blames(self, tried: int) -> list[Blame]:
        """See `explain`."""
        self.exact = self.run(self.reference)
        self.total = self.off(self.run(self.graph))
        found = self._locals()
        for _ in range(3):
            undone = self._made_up_for([x for x in found if x.is_fault])
            if not undone:
                break
            self.alignment = unmatched(self.alignment, undone)
            found = self._locals()
        compare = Differences(reference=self.reference, graph=self.graph, alignment=self.alignment)
        found.sort(key=lambda x: (not x.is_fault, -x.share))
        for local in found[: max(tried, sum(x.is_fault for x in found))]:
            local.alone = self.alone(local)
            local.share = min(1.0, local.alone / self.total) if self.total else 0.0
            if local.is_fault and (not local.reason or local.is_grid):
                reason, local.cause = compare.of(local.node)
                local.reason = reason or local.reason
        _gather(found, compare)
        names, whole = site_names(self.graph), max(1.0, sum(x.share for x in found))
        return [self._blame(x, names, whole) for x in _ranked(found)]

    def compared(self) -> tuple[int, int]:
        """How many nodes have a counterpart that they are held to, of all that compute something."""
        nodes = [n for n in computed(self.graph) if n.target is not QUANTIZE]
        return sum(n in self.alignment.values for n in nodes), len(nodes)

    def _blame(self, local: Local, names: Mapping[fx.Node, str], whole: float) -> Blame:
        node, site = local.node, names[local.node]
        if node.target is DEQUANTIZE and node not in self.alignment.calls:
            name = tensor_name(self.graph, node.args[1])
            key = self.graph.origins[name].source if name is not None else site
            node, site = node.args[0], key.removeprefix(f"{self.graph.role}/")  # type: ignore[assignment]
        return Blame(
            node=node, site=site, op=op_name(node), share=local.share / whole, local_db=local.local_db,
            expected_db=decibel(local.signal, local.expected),
            alone_db=None if local.alone is None else decibel(1.0, local.alone),
            place=local.place, is_fault=local.is_fault, reason=local.reason,
        )  # fmt: skip

    def _locals(self) -> list[Local]:
        """Every node that is off on exact inputs, judged and with its share."""
        noise = Noise(
            reference=self.reference, graph=self.graph, alignment=self.alignment,
            padding=self.padding, is_made_up=self.is_made_up,
        )  # fmt: skip
        seen: dict[fx.Node, Tensor] = {}
        found = []
        with torch.enable_grad():
            theirs = self.theirs(seen)
            for place, item in enumerate(compared(theirs, self.graph, self.alignment, self.feeds)):
                if item.node not in self.alignment.beside and isinstance(item.theirs, Tensor):
                    seen[item.node] = item.theirs
                with torch.no_grad():
                    local = measured(place, item, self.padding)
                    noise.judge(local, item)
                if local.noise > 0:
                    found.append(local)
            self.estimate(found, seen, theirs.outputs())
        noise.allow_grids(found)
        return found

    def _made_up_for(self, faults: Sequence[Local]) -> list[fx.Node]:
        """Nodes that are off on purpose: their readers are off too, make up for it, and without it are worse."""
        off = {x.node for x in faults}
        return [
            x.node
            for x in faults
            if x.error is not None
            and math.isfinite(x.noise + self.total)
            and off & self._readers(x.node)
            and self.without([x]) > WORSE * self.total + TINY
        ]

    def _readers(self, node: fx.Node) -> set[fx.Node]:
        """The next nodes with a counterpart that are computed from a node."""
        found: set[fx.Node] = set()
        for user in node.users:
            found |= {user} if user in self.alignment.values else self._readers(user)
        return found


def _gather(found: Iterable[Local], compare: Differences) -> None:
    """Give faults of fused nodes the cause that others tell, where it lies in what they were fused from."""
    causes = {x.cause for x in found if x.cause is not None}
    for local in found:
        if not local.is_fault or local.cause is not None or not causes:
            continue
        behind = compare.behind(local.node)
        local.cause = next((c for c in causes if c[1] in behind), None)
        if local.cause is not None:
            local.reason = f"{local.cause[1].name} of the reference is not there before it"


def _ranked(found: Iterable[Local]) -> list[Local]:
    """Faults first, by share, those of one cause in order of execution; then the rest by share."""
    found = list(found)
    loudest: dict[Any, float] = {}
    for local in found:
        key = local.cause or local
        loudest[key] = max(local.share, loudest.get(key, 0.0))
    return sorted(found, key=lambda x: (not x.is_fault, -loudest[x.cause or x], x.place))
