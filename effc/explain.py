"""Where did it go wrong? Which nodes of a rewritten program its error comes from, and which of them are faulty.

    for node, share in effc.explain(reference, program):
        print(node, share)

Every node is fed with the reference's own values, so that what it is off by is its own doing. One that is off by more
than its grids and float rounding explain (`noise`) is a fault. The share of a node in the final error is what the
outputs are off by where only its error is put on the reference. That is tried out for the nodes that matter, and
estimated for all at once by a few backward passes with random signs z (Hutchinson 1990); shares of honest nodes add up
to about 1:

    share = ‖J e‖² / ‖E‖² = mean of ⟨Jᵀ z, e⟩² / ‖E‖²        e, E: error of node and outputs, J: from one to the other
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.align import Alignment, align, is_weight
from effc.ir.differences import Differences
from effc.ir.edit import tensor_name
from effc.ir.gap import MASK, Padding, decibel, difference, power
from effc.ir.program import Graph, Program
from effc.ir.select import op_name, site_names
from effc.ir.show import shape_words
from effc.ir.values import Change, Edge, Values, compared, reads
from effc.noise import Local, Noise, measured
from effc.quant.ops import DEQUANTIZE
from effc.samples import LENGTHS

PROBES = 4
"""Backward passes at least; more where there are few rows, each of which is a draw of its own."""
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
    inputs = made_up(left) if feeds is None else _tensors(left, feeds)
    return Case(left, right, inputs, is_made_up=feeds is None).blames(tried)


def first(blames: Iterable[Blame]) -> Blame | None:
    """The fault that comes first in order of execution; None where no node is off by more than it may be."""
    return min((b for b in blames if b.is_fault), key=lambda b: b.place, default=None)


def layer_errors(reference: Graph, graph: Graph, feeds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every layer with an integer weight in order of execution, from one pass over (some rows of) one batch.

    `sqnr_db` is the signal to noise of its output with every error before it, `local_db` with its own alone: that of
    its weight and of the grids on its inputs. `share` is its part of the squared error of the graph's outputs.
    """
    case = Case(reference, graph, few(graph, _tensors(graph, feeds)))
    return case.rows(case.layers())


class Case:
    """A graph beside its reference, on one batch."""

    def __init__(
        self,
        reference: Graph,
        graph: Graph,
        feeds: Mapping[str, Tensor],
        *,
        is_made_up: bool = False,
    ) -> None:
        self.reference, self.graph, self.feeds = reference, graph, feeds
        self.is_made_up = is_made_up
        self.alignment = align(reference, graph)
        self.padding = Padding(graph, feeds)
        self.exact: dict[str, Tensor] = {}
        self.total = 0.0
        """Σ ‖error‖² / ‖output‖² over the outputs."""

    def blames(self, tried: int) -> list[Blame]:
        """See `explain`."""
        self.exact = self._run(self.reference)
        self.total = self.off(self._run(self.graph))
        found = self._locals()
        for _ in range(3):
            undone = self._made_up_for([x for x in found if x.is_fault])
            if not undone:
                break
            self.alignment = _without(self.alignment, undone)
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
            theirs = self._theirs(seen)
            for place, item in enumerate(compared(theirs, self.graph, self.alignment, self.feeds)):
                if item.node not in self.alignment.beside and isinstance(item.theirs, Tensor):
                    seen[item.node] = item.theirs
                with torch.no_grad():
                    local = measured(place, item, self.padding)
                    noise.judge(local, item)
                if local.noise > 0:
                    found.append(local)
            self._share(found, seen, theirs.outputs())
        noise.allow_grids(found)
        return found

    def layers(self) -> dict[Local, float]:
        """Every layer with an integer weight, and the grids on its inputs; with the signal to noise it has in all."""
        sites = [n for n in self.graph.nodes if self.is_layer(n)]
        grids = [
            n for n in self.graph.nodes if n.target is DEQUANTIZE and n.users.keys() <= set(sites)
        ]
        self.alignment = _without(self.alignment, grids)
        weights = [n for n in self.graph.nodes if is_weight(n)]
        mine = Values(self.graph, self.feeds, more=dict.fromkeys([*sites, *weights], 1))
        seen: dict[fx.Node, Tensor] = {}
        reached = {}
        with torch.enable_grad():
            theirs = self._theirs(seen)
            for place, item in enumerate(
                compared(theirs, self.graph, self.alignment, self.feeds, weights=mine)
            ):
                if item.node not in sites:
                    continue
                if item.node not in self.alignment.beside:
                    seen[item.node] = item.theirs
                with torch.no_grad():
                    local = measured(place, item, self.padding)
                    off = difference(mine(item.node), item.theirs.detach())
                    reached[local] = decibel(
                        local.signal, power(self.padding.zeroed(item.node, off))
                    )
            outputs = theirs.outputs()
            with torch.no_grad():
                self.exact = {name: value.detach() for name, value in outputs.items()}
                self.total = self.off(mine.outputs())
            self._share(reached, seen, outputs)
        return reached

    def rows(self, reached: Mapping[Local, float]) -> list[dict[str, Any]]:
        """Layers as `layer_errors` gives them."""
        names, whole = site_names(self.reference), max(1.0, sum(x.share for x in reached))
        calls = {x: self.call_of(x.node) for x in reached}
        return [
            {
                "site": names[calls[x]],
                "op": op_name(calls[x]),
                "sqnr_db": db,
                "local_db": x.local_db,
                "share": x.share / whole,
            }
            for x, db in reached.items()
        ]

    def call_of(self, node: fx.Node) -> fx.Node:
        """The call of the reference that became a node."""
        return self.alignment.calls.get(node, self.alignment.values[node])

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a layer whose weight is integers."""
        if any(is_weight(n) and n.meta["val"].dim() > 1 for n in node.all_input_nodes):
            return node in self.alignment.values
        other = self.alignment.values.get(node)
        return other is not None and op_name(other) == "embedding" and op_name(node) == "mul"

    def _theirs(self, seen: dict[fx.Node, Tensor]) -> Values:
        """Values of the reference; what is in `seen` afterwards can be differentiated by."""
        views = self._views(lambda node: _Seen(node, seen))
        asked = reads(self.graph, self.alignment)
        return Values(self.reference, self.feeds, more=asked, views=views)

    def _views(self, make: Callable[[fx.Node], Change | None]) -> dict[Edge, tuple[Change, ...]]:
        """Changes to what readers see of values that are several nodes' counterpart."""
        views: dict[Edge, tuple[Change, ...]] = {}
        for node in self.graph.nodes:
            change = make(node) if node in self.alignment.beside else None
            if change is None:
                continue
            for reader in self.alignment.readers(node):
                edge = reader, self.alignment.values[node]
                views[edge] = (*views.get(edge, ()), change)
        return views

    def _share(
        self, found: Iterable[Local], seen: Mapping[fx.Node, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """Give every node an estimate of its share."""
        felt = [
            (x, seen[x.node], x.error)
            for x in found
            if x.error is not None and math.isfinite(x.noise)
            and x.node in seen and seen[x.node].requires_grad
        ]  # fmt: skip
        ends = [name for name in self.exact if outputs[name].requires_grad]
        if not felt or not ends or not 0 < self.total < math.inf:
            return
        rows = min(len(v) if v.dim() else 1 for v in outputs.values())
        probes = max(PROBES, min(16, 32 // max(rows, 1)))
        draw = torch.Generator().manual_seed(0)
        for probe in range(probes):
            slopes = torch.autograd.grad(
                [outputs[name] for name in ends], [value for _, value, _ in felt],
                [self._signs(name, draw) for name in ends],
                allow_unused=True, retain_graph=probe + 1 < probes,
            )  # fmt: skip
            for (local, _, error), slope in zip(felt, slopes, strict=True):
                if slope is None:
                    continue
                shape = (rows, -1) if slope.dim() > 1 and len(slope) == rows else (1, -1)
                pull = torch.linalg.vecdot(slope.reshape(shape), error.reshape(shape))
                part = power(pull) / self.total / probes
                local.share += part if math.isfinite(part) else 0.0

    def _signs(self, name: str, draw: torch.Generator) -> Tensor:
        """Random signs for an output, scaled so that outputs of all sizes count alike."""
        exact = self.exact[name]
        signs = torch.randint(0, 2, exact.shape, generator=draw) * 2 - 1
        signs = self.padding.zeroed_output(name, signs.to(exact.dtype))
        return signs / math.sqrt(power(self.padding.zeroed_output(name, exact)) or 1.0)

    def _run(self, graph: Graph, **options: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return Values(graph, self.feeds, **options).outputs()

    def off(self, outputs: Mapping[str, Tensor]) -> float:
        """Σ ‖error‖² / ‖output‖², padded positions left out."""
        total = 0.0
        for name, exact in self.exact.items():
            if name not in outputs:
                continue
            if outputs[name].shape != exact.shape:
                return math.inf
            error = power(self.padding.zeroed_output(name, difference(outputs[name], exact)))
            total += error / (power(self.padding.zeroed_output(name, exact)) or 1.0)
        return total

    def alone(self, local: Local) -> float:
        """Error of the outputs where the reference is off by this node's error alone."""
        if local.node in self.alignment.beside:
            views = self._views(lambda n: local.change if n is local.node else None)
            return self._tried(self.reference, views=views)
        changes = {self.alignment.values[local.node]: local.change}
        return self._tried(self.reference, changes=changes)

    def without(self, found: Iterable[Local]) -> float:
        """Error of the outputs of the graph where the errors of nodes are taken out."""
        changes = {x.node: _minus(x.error) for x in found if x.error is not None}
        return self._tried(self.graph, changes=changes)

    def _tried(self, graph: Graph, **options: Any) -> float:
        try:
            return self.off(self._run(graph, **options))
        except Exception:  # a value of another shape breaks whatever reads it
            return math.inf

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


@dataclass(frozen=True, eq=False)
class _Seen:
    """Keeps what the readers of a node see, so that it can be differentiated by."""

    node: fx.Node
    kept: dict[fx.Node, Tensor]

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        seen = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        self.kept[self.node] = seen
        return seen


def _minus(error: Tensor) -> Change:
    return lambda value: value - error.to(value.dtype)


def _without(alignment: Alignment, nodes: Sequence[fx.Node]) -> Alignment:
    """The alignment where those nodes have no counterpart."""
    values = {n: o for n, o in alignment.values.items() if n not in nodes}
    return dataclasses.replace(alignment, values=values, beside=alignment.beside & values.keys())


def _tensors(graph: Graph, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(feeds[name]) for name in graph.inputs}


def made_up(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """Inputs drawn from the values of the example that a graph was traced on: two rows, the last padded at its end."""
    draw = torch.Generator().manual_seed(seed)
    given = graph.exported.example_inputs
    example = dict(given[1]) if given is not None else {}
    feeds = {}
    for name, node in zip(graph.inputs, _users(graph), strict=True):
        value = node.meta["val"]
        known = example.get(name, torch.ones(2 * value.dim() or 1, dtype=value.dtype)).reshape(-1)
        words = shape_words(graph, value.shape)
        shape = [_size(graph, word, axis, example.get(name)) for axis, word in enumerate(words)]
        feeds[name] = known[torch.randint(len(known), shape, generator=draw)]
    mask = feeds.get(MASK)
    if mask is not None and mask.dim() == 2 and mask.shape[1] > 2:
        mask[-1, 2 * mask.shape[1] // 3 :] = 0
    return feeds


def _size(graph: Graph, word: str, axis: int, example: Tensor | None) -> int:
    if word.isdecimal():
        return int(word)
    if word in LENGTHS:
        return min(16, graph.largest(word) or 16)
    return 2 if word == "batch" or example is None else example.shape[axis]


def few(graph: Graph, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As many rows of a batch as a backward pass has memory for: about a thousand tokens, or one large picture."""
    firsts = {tuple(shape_words(graph, n.meta["val"].shape[:1])) for n in _users(graph)}
    if firsts != {("batch",)}:
        return dict(feeds)
    cost = max(v[0].numel() * (1 if v.is_floating_point() else 64) for v in feeds.values())
    rows = max(1, (1 << 16) // max(1, cost))
    return {name: value[:rows] for name, value in feeds.items()}


def _users(graph: Graph) -> list[fx.Node]:
    places = graph.placeholders()
    return [places[str(name)] for name in graph.exported.graph_signature.user_inputs]


class _Callable(types.ModuleType):
    """`effc.explain` is both: the module, and the function in it that most callers want."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Blame]:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
