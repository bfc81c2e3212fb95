"""Where did it go wrong? Which nodes of a rewritten program its error comes from, and which of them are faulty.

    for node, share in effc.explain(reference, program):
        print(node, share)

Every node is fed with the reference's own values, so that what it gets wrong is its own doing. An honest node is off
by float rounding, or by what its grid must cost:

    E‖Δ(W x)‖² = Σ x² · step² / 12          |Δx| ≤ step / 2 inside a range

A node that is off by more is a fault. The share of a node in the final error is what the outputs are off by where only
its error is put on the reference. That is tried out for those that matter, and estimated for all at once by a few
backward passes with random signs z (Hutchinson 1990); shares of honest nodes add up to about 1:

    share = ‖J e‖² / ‖E‖² = mean of ⟨Jᵀ z, e⟩² / ‖E‖²        e, E: error of node and outputs, J: from one to the other
"""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from effc.calib.calibrator import MASK
from effc.calib.collectors import LeastSquares
from effc.errors import first_line
from effc.ir.align import Alignment, align, arguments, is_weight
from effc.ir.edit import is_constant, tensor_name, tensor_of
from effc.ir.program import Graph, Program
from effc.ir.select import op_name, site_names
from effc.ir.show import shape_words
from effc.ir.values import Change, Compared, Edge, Values, call, compared, reads
from effc.quant.affine import fake_quantize, qparams
from effc.quant.ops import DEQUANTIZE, QUANTIZE, spread
from effc.quant.scheme import Scheme

ROUNDING = 256
"""Float steps that a node may be off by, relative to its values, where nothing is quantised."""
PROBES = 2
"""Backward passes at least."""
LOUDEST = 4.0
"""Noise of a layer, over what its grid is expected to make."""
GRIDS = 3.0
"""Noise of a grid, over that of the best grid for the same values."""
TINY = 1e-9
"""Squared relative error of the outputs that nobody sees."""
WORSE = 2.0
"""Where taking out an error doubles that of the outputs, other nodes make up for it, and it is none."""


@dataclass(frozen=True, kw_only=True)
class Blame:
    """What one node has to do with the error of the outputs. Unpacks as `node, share`."""

    node: fx.Node
    site: str
    """Its name, which stays the same from trace to trace."""
    op: str
    share: float
    """Its part of the squared error of the outputs."""
    local_db: float
    """Signal to noise of the node on exact inputs."""
    expected_db: float
    """The same, as far as its grid explains it."""
    alone_db: float | None
    """Signal to noise of the outputs where only this node is off; None where it was not tried."""
    place: int
    """The how manieth node it is."""
    is_fault: bool
    """Whether it is off by more than its grid and rounding can explain."""
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
    tried: int = 8,
) -> list[Blame]:
    """The nodes of `program` that are off from `reference`: faults first, then by share of the final error.

    `feeds` are inputs by name, synthetic ones where none are given; real ones are better, since ranges are made for
    them. The effect on the outputs is measured for each fault and the `tried` largest shares, and estimated for the rest.
    """
    graphs = [p[role] if role is not None else p.only() for p in (reference, program)]
    case = _Case(*graphs, _tensors(graphs[0], feeds), synthetic=feeds is None)
    return case.blames(tried)


def layer_errors(reference: Graph, graph: Graph, feeds: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every quantised layer of a graph in order of execution, from one pass over (some rows of) one batch.

    `sqnr_db` is the signal to noise of its output with all errors before it, `local_db` with its own alone: that of its
    weight, and of the grids on its inputs. `share` is its part of the squared error of the graph's outputs.
    """
    return _Case(reference, graph, _few(graph, _tensors(graph, feeds)), run=False).layers()


def first(blames: Sequence[Blame]) -> Blame | None:
    """The fault that comes first in order of execution; None where every node is off by no more than it may be."""
    return min((b for b in blames if b.is_fault), key=lambda b: b.place, default=None)


@dataclass(eq=False)
class _Local:
    """One node's own error, and what it may be."""

    node: fx.Node
    place: int
    noise: float
    signal: float
    expected: float = 0.0
    allowed: float = 0.0
    change: Change = field(default=lambda v: v)
    """Puts the error on the reference's value."""
    error: Tensor | None = None
    reason: str = ""
    is_grid: bool = False
    is_excused: bool = False
    """Few values outside of a range are what ranges are for, more so where the data is made up."""
    cause: Any = None
    """What the same fault has in common in all nodes that show it."""
    share: float = 0.0
    alone: float | None = None

    @property
    def is_fault(self) -> bool:
        return not self.noise <= self.allowed


class _Case:
    """Two graphs on one batch."""

    def __init__(
        self,
        reference: Graph,
        graph: Graph,
        feeds: Mapping[str, Tensor],
        *,
        synthetic: bool = False,
        run: bool = True,
    ) -> None:
        self.reference, self.graph, self.feeds, self.synthetic = reference, graph, feeds, synthetic
        self.alignment = align(reference, graph)
        self.mask = _Mask(graph, feeds)
        if run:
            self.exact = self.run(reference)
            self.errors, self.total = self.off(self.run(graph))

    def layers(self) -> list[dict[str, Any]]:
        """See `layer_errors`."""
        sites = [n for n in self.graph.nodes if self.is_layer(n)]
        inner = [
            n
            for n in self.graph.nodes
            if n.target is DEQUANTIZE and all(self.is_layer(user) for user in n.users)
        ]
        self.alignment = _without(self.alignment, inner)
        seen: dict[fx.Node, Tensor] = {}
        views = self.views(lambda n: _Seen(n, seen))
        weights = [n for n in self.graph.nodes if is_weight(n)]
        whole = Values(self.graph, self.feeds, more=dict.fromkeys([*sites, *weights], 1))
        theirs = Values(
            self.reference, self.feeds, more=reads(self.graph, self.alignment), views=views
        )
        found, reached = [], {}
        with torch.enable_grad():
            items = compared(theirs, self.graph, self.alignment, self.feeds, whole)
            for place, item in enumerate(items):
                if item.node not in sites or item.error is not None:
                    continue
                if item.node not in self.alignment.beside:
                    seen[item.node] = item.theirs
                with torch.no_grad():
                    local = self.measured(place, item)
                    off = _difference(whole(item.node), item.theirs.detach())
                    reached[item.node] = _db(local.signal, _power(self.mask.of(item.node, off)))
                found.append(local)
            outputs = theirs.outputs()
        self.exact = {n: v.detach() for n, v in outputs.items()}
        with torch.no_grad():
            self.errors, self.total = self.off(whole.outputs())
        self.share(found, seen, outputs)
        names, whole_share = site_names(self.reference), max(1.0, sum(x.share for x in found))
        calls = {
            x: self.alignment.calls.get(x.node) or self.alignment.values[x.node] for x in found
        }
        return [
            {
                "site": names[calls[x]],
                "op": op_name(calls[x]),
                "sqnr_db": reached[x.node],
                "local_db": _db(x.signal, x.noise),
                "share": x.share / whole_share,
            }
            for x in found
        ]

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a layer whose weight is integers."""
        if any(is_weight(n) and n.meta["val"].dim() > 1 for n in node.all_input_nodes):
            return True
        other = self.alignment.values.get(node)
        return other is not None and op_name(other) == "embedding" and op_name(node) == "mul"

    def run(self, graph: Graph, **options: Any) -> dict[str, Tensor]:
        with torch.no_grad():
            return Values(graph, self.feeds, **options).outputs()

    def off(self, outputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Error of every output, and Σ ‖error‖² / ‖output‖²; padded positions are left out."""
        errors, total = {}, 0.0
        for name, exact in self.exact.items():
            if name in outputs and exact.is_floating_point():
                errors[name] = self.mask.of_output(name, _difference(outputs[name], exact))
                power = _power(self.mask.of_output(name, exact))
                total += _power(errors[name]) / power if power else _power(errors[name])
        return errors, total

    def blames(self, tried: int) -> list[Blame]:
        locals_ = self.locals()
        for _ in range(3):
            if not (undone := self.undone([x for x in locals_ if x.is_fault])):
                break
            self.alignment = _without(self.alignment, undone)
            locals_ = self.locals()
        ranked = sorted(locals_, key=lambda x: (not x.is_fault, -x.share))
        for local in ranked[: max(tried, sum(x.is_fault for x in ranked))]:
            local.alone = self.alone(local)
            if local.is_fault and self.total:
                local.share = min(1.0, local.alone / self.total)
        rest = sum(x.share for x in ranked)
        for local in ranked:
            if local.is_fault and not local.reason:
                local.reason, local.cause = self.differences(local)
        loudest: dict[Any, float] = {}
        for local in ranked:
            loudest[local.cause or local] = max(local.share, loudest.get(local.cause or local, 0.0))
        ranked.sort(key=lambda x: (not x.is_fault, -loudest[x.cause or x], x.place))
        names = site_names(self.graph)
        return [self.blame(x, names, max(rest, 1.0)) for x in ranked]

    def blame(self, local: _Local, names: Mapping[fx.Node, str], whole: float) -> Blame:
        node = local.node
        site = names[node]
        if node.target is DEQUANTIZE:
            codes, key = (
                node.args[0],
                self.graph.origins.get(tensor_name(self.graph, node.args[1]) or ""),
            )
            node, site = codes, key.source.removeprefix(f"{self.graph.role}/") if key else site
        return Blame(
            node=node, site=site, op=op_name(node), share=local.share / whole,
            local_db=_db(local.signal, local.noise), expected_db=_db(local.signal, local.expected),
            alone_db=None if local.alone is None else _db(1.0, local.alone),
            place=local.place, is_fault=local.is_fault,
            reason=local.reason,
        )  # fmt: skip

    def locals(self) -> list[_Local]:
        """Every node that is off on exact inputs, with its share."""
        seen: dict[fx.Node, Tensor] = {}
        views = self.views(lambda n: _Seen(n, seen))
        found = []
        with torch.enable_grad():
            theirs = Values(
                self.reference, self.feeds, more=reads(self.graph, self.alignment), views=views
            )
            for place, item in enumerate(compared(theirs, self.graph, self.alignment, self.feeds)):
                if item.node not in self.alignment.beside and isinstance(item.theirs, Tensor):
                    seen[item.node] = item.theirs
                with torch.no_grad():
                    local = self.local(place, item)
                if local.noise > 0:
                    found.append(local)
            outputs = theirs.outputs()
            self.allow_grids(found)
            self.share(found, seen, outputs)
        return found

    def views(self, make: Callable[[fx.Node], Change]) -> dict[Edge, tuple[Change, ...]]:
        """Changes to what the readers see of nodes that are not the only ones with their counterpart."""
        views: dict[Edge, tuple[Change, ...]] = {}
        for node in self.graph.nodes:
            if node not in self.alignment.beside:
                continue
            change = make(node)
            for reader in self.alignment.readers(node):
                edge = reader, self.alignment.values[node]
                views[edge] = (*views.get(edge, ()), change)
        return views

    def local(self, place: int, item: Compared) -> _Local:
        """What a node itself is off by, judged."""
        local = self.measured(place, item)
        if local.error is not None and local.noise > local.allowed:
            self.judge(local, item)
        return local

    def measured(self, place: int, item: Compared) -> _Local:
        node, mine, theirs = item.node, item.mine, item.theirs
        if item.error is not None:
            reason = f"it does not run on the reference's values: {first_line(item.error)}"
            return _Local(node, place, math.inf, 0.0, reason=reason)
        if not isinstance(theirs, Tensor) or not isinstance(mine, Tensor):
            noise = 0.0 if mine == theirs else math.inf
            return _Local(node, place, noise, 0.0, change=lambda _: mine)
        theirs = theirs.detach()
        if mine.shape != theirs.shape:
            reason = f"it is {list(mine.shape)} where the reference is {list(theirs.shape)}"
            return _Local(node, place, math.inf, 0.0, reason=reason)
        if torch.equal(mine, theirs):
            return _Local(node, place, 0.0, _power(self.mask.of(node, theirs)))
        error = self.mask.of(node, _difference(mine, theirs))
        local = _Local(node, place, _power(error), _power(self.mask.of(node, theirs)))
        if not (theirs.is_floating_point() and mine.is_floating_point()):
            local.change = lambda _: mine
            return local
        local.error, local.change = error, lambda v: v + error.to(v.dtype)
        eps = max(torch.finfo(t.dtype).eps for t in (mine, theirs))
        local.allowed = local.signal * (ROUNDING * eps) ** 2
        return local

    def judge(self, local: _Local, item: Compared) -> None:
        """What the grids in a node may cost."""
        node, theirs = item.node, item.theirs.detach()
        if node.target is DEQUANTIZE and not is_weight(node):
            self.judge_grid(local, item, self.mask.kept(node, theirs))
            return
        local.expected, rows = self.expected(item, theirs)
        local.allowed += LOUDEST * (1 + 4 / rows) * local.expected
        if local.is_fault and self.is_rounded(node):
            local.allowed = math.inf

    def is_rounded(self, node: fx.Node) -> bool:
        """Whether a layer is the reference's, its weight rounded to a grid that is no coarser than need be.

        A weight that was clipped makes more noise than its step says where activations are large.
        """
        other = self.alignment.calls.get(node)
        if other is None or other.target is not node.target:
            return False
        mine, theirs = arguments(node), arguments(other)
        for place in mine.keys() | theirs.keys():
            a, b = mine.get(place), theirs.get(place)
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                if a != b:
                    return False
            elif is_weight(a):
                if not (is_constant(self.reference, b) and self.is_rounding(a, tensor_of(self.reference, b))):
                    return False
            elif self.difference_of_inputs("", a, b):
                return False
        return True

    def is_rounding(self, node: fx.Node, exact: Tensor) -> bool:
        """Whether the codes of a weight are those of `exact` on their grid."""
        codes, scale, zero, axis, group = node.args
        held, step = tensor_of(self.graph, codes), tensor_of(self.graph, scale)
        if held.shape != exact.shape:
            return False
        step, zero = (spread(t, held, axis, group) for t in (step, tensor_of(self.graph, zero)))
        if held.dtype == torch.int32:
            return float((held * step - exact).abs().max()) <= float(step.max())
        ideal = exact / step + zero
        low, high = int(held.min()), int(held.max())
        same = (ideal.clamp(low, high) - held).abs() <= 0.51
        needed = exact.abs().max() / max(-low, high)
        return bool(same.double().mean() > 0.999) and float(step.min()) <= 4 * float(needed)

    def expected(self, item: Compared, theirs: Tensor) -> tuple[float, int]:
        """The noise that quantised operands of a node must make, and how many independent rows it has."""
        node = item.node
        region = _region(node, self.alignment)
        if not any(_is_quantised(self.graph, n) for n in region):
            return 0.0, 1
        if op_name(node) in ("linear", "conv1d", "conv2d"):
            weight = item.inputs[node.args[1]]
            return sum(
                self.spread_noise(node, item, m) for m in node.all_input_nodes
            ), weight.shape[0]
        if any(op_name(n) == "embedding" for n in region):
            steps = theirs.abs().amax(-1) / 127
            return float(steps.double().square().sum()) * theirs.shape[-1] / 12, theirs.shape[-1]
        return float(theirs.double().square().sum()) * 1e-3, 1

    def spread_noise(self, node: fx.Node, item: Compared, operand: fx.Node) -> float:
        """Noise of a linear operator from rounding in one of its operands: steps² / 12 goes where squares go."""
        if operand.target is not DEQUANTIZE or operand in self.alignment.values:
            return 0.0
        value = item.inputs[operand]
        if is_weight(operand) and value.dim() < 2:
            return 0.0
        step = self.steps(operand)
        squares = {n: v.square() if isinstance(v, Tensor) else v for n, v in item.inputs.items()}
        squares[operand] = (step.square() / 12).expand(value.shape)
        args = list(node.args)
        args[2:3] = [None]
        args, kwargs = fx.node.map_arg((tuple(args), node.kwargs), lambda n: squares[n])
        return float(self.mask.of(node, node.target(*args, **kwargs)).double().sum())

    def steps(self, node: fx.Node) -> Tensor:
        """The step of every value that a node dequantises; that of a weight at most twice what its codes ask for."""
        codes, scale, _, axis, group = node.args
        step = tensor_of(self.graph, scale)
        if not is_weight(node):
            return step
        held = tensor_of(self.graph, codes)
        step = spread(step, held, axis, group)
        most = held.abs().float().reshape(-1).max() if step.numel() == 1 else None
        if most is None:
            rows = held.float().abs()
            most = rows.flatten(1).amax(1) if not group else rows.unflatten(1, (-1, group)).amax(-1)
            most = spread(most, held, axis, group)
        high = _highest(int(held.abs().float().max()))
        return torch.minimum(step, 2 * step * most / high)

    def judge_grid(self, local: _Local, item: Compared, x: Tensor) -> None:
        """A grid on computed values, beside the one that is best for these very values."""
        codes = item.node.args[0]
        scale, zero = (tensor_of(self.graph, codes.args[i]) for i in (1, 2))
        low, high = codes.args[3:5]
        if scale.numel() != 1:
            local.expected = float(scale.double().square().mean() / 12) * x.numel()
            local.allowed += LOUDEST * local.expected
            return
        step, middle = float(scale), int(zero)
        outside = (x < (low - middle - 0.5) * step) | (x > (high - middle + 0.5) * step)
        off = self.mask.kept(item.node, _difference(item.mine, item.theirs.detach()))
        inside = float(off[~outside].abs().max()) if not bool(outside.all()) else 0.0
        if inside > 0.51 * step:
            local.reason = f"values inside its range are off by {inside / step:.2g} steps; rounding is half of one"
            return
        best = _best_noise(x, low, high)
        clipped = _power(off[outside]) / max(local.noise, 1e-300)
        share = float(outside.double().mean())
        local.expected, local.is_grid = best, True
        local.is_excused = clipped > 0.5 and share < (0.05 if self.synthetic else 0.001)
        if clipped > 0.5:
            local.reason = f"{100 * share:.2g} % of the values lie outside its range and make {100 * clipped:.3g} % of its error"
        else:
            need = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / (high - low)
            local.reason = (
                f"its step is {step / need:.3g} times what holds all values" if need else ""
            )

    def allow_grids(self, found: Sequence[_Local]) -> None:
        """Ranges come from other data: a grid may be noisier than the best one, but not much more so than the rest."""
        grids = [x for x in found if x.is_grid and x.expected]
        ratios = sorted(x.noise / x.expected for x in grids)
        usual = [ratios[len(ratios) * part // 10] for part in (5, 8)] if len(ratios) > 4 else [1, 1]
        factor = max(GRIDS, GRIDS * usual[0], 2 * usual[1]) * (3 if self.synthetic else 1)
        for local in grids:
            local.allowed = math.inf if local.is_excused else local.allowed + factor * local.expected

    def share(
        self, found: list[_Local], seen: Mapping[fx.Node, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """Give every node an estimate of its share of the final error."""
        felt = [
            x
            for x in found
            if x.error is not None and math.isfinite(x.noise)
            and x.node in seen and seen[x.node].requires_grad
        ]  # fmt: skip
        ends = [name for name in self.errors if outputs[name].requires_grad]
        if not felt or not ends or not 0 < self.total < math.inf:
            return
        rows = min(len(v) for v in outputs.values())
        probes = max(PROBES, min(16, 32 // max(rows, 1)))
        draw = torch.Generator().manual_seed(0)
        for probe in range(probes):
            signs = [self.signs(name, draw) for name in ends]
            slopes = torch.autograd.grad(
                [outputs[name] for name in ends], [seen[x.node] for x in felt], signs,
                allow_unused=True, retain_graph=probe + 1 < probes,
            )  # fmt: skip
            for local, slope in zip(felt, slopes, strict=True):
                if slope is None or local.error is None:
                    continue
                # rows of a batch do not meet, so each is a draw of its own
                shape = (rows, -1) if slope.dim() > 1 and len(slope) == rows else (1, -1)
                pull = torch.linalg.vecdot(slope.reshape(shape), local.error.reshape(shape))
                power = _power(pull) / self.total / probes
                local.share += power if math.isfinite(power) else 0.0

    def signs(self, name: str, draw: torch.Generator) -> Tensor:
        exact = self.exact[name]
        kept = self.mask.of_output(name, torch.ones_like(exact))
        signs = torch.randint(0, 2, exact.shape, generator=draw) * 2 - 1
        power = _power(self.mask.of_output(name, exact)) or 1.0
        return (signs * kept / math.sqrt(power)).to(exact.dtype)

    def alone(self, local: _Local) -> float:
        """Error of the outputs where the reference is off by this node's error alone."""
        other = self.alignment.values[local.node]
        if local.node in self.alignment.beside:
            views = self.views(lambda n: local.change if n is local.node else _same)
            outputs = self.attempt(self.reference, views=views)
        else:
            outputs = self.attempt(self.reference, changes={other: local.change})
        return math.inf if outputs is None else self.off(outputs)[1]

    def without(self, local: _Local) -> float:
        """Error of the outputs of the graph where this node's error is taken out."""

        def repair(value: Any) -> Any:
            return value - local.error.to(value.dtype) if local.error is not None else value

        outputs = self.attempt(self.graph, changes={local.node: repair})
        return math.inf if outputs is None else self.off(outputs)[1]

    def attempt(self, graph: Graph, **options: Any) -> dict[str, Tensor] | None:
        try:
            return self.run(graph, **options)
        except Exception:  # a change of shape may break what follows
            return None

    def undone(self, faults: Sequence[_Local]) -> list[fx.Node]:
        """Nodes that are off on purpose: their readers are off too, make up for it, and without it are worse."""
        off = {x.node for x in faults}
        return [
            x.node
            for x in faults
            if x.error is not None
            and math.isfinite(x.noise + self.total)
            and off & self.readers(x.node)
            and self.without(x) > WORSE * self.total + TINY
        ]

    def readers(self, node: fx.Node) -> set[fx.Node]:
        """The next nodes with a counterpart that are computed from a node."""
        found = set()
        for user in node.users:
            found |= {user} if user in self.alignment.values else self.readers(user)
        return found

    def differences(self, local: _Local) -> tuple[str, Any]:
        """What is not as it is in the reference, and what it has in common with others of the same fault."""
        node, other = local.node, self.alignment.calls.get(local.node)
        stood = self.alignment.values[node]
        if other is None:
            return f"the reference has no such {op_name(node)} in place of {stood.name}", None
        if stood is not other and (gone := self.missing([stood])):
            return f"{', '.join(gone)} of the reference is not there behind it", None
        if node.target is not other.target:
            return f"it is {op_name(node)} where the reference has {op_name(other)}", None
        mine, theirs = arguments(node), arguments(other)
        found, cause = [], None
        for place in sorted(mine.keys() | theirs.keys(), key=str):
            a, b = mine.get(place), theirs.get(place)
            if isinstance(a, fx.Node) and isinstance(b, fx.Node):
                found.append(self.difference_of_inputs(_word(node, place), a, b))
                cause = (a, b) if found[-1] and self.missing([b]) else cause
            elif a != b:
                found.append(f"{_word(node, place)} is {_shown(a)}, not {_shown(b)}")
        if gone := self.missing(other.all_input_nodes):
            found.append(f"{', '.join(gone)} of the reference is not there")
        return "; ".join(text for text in found if text) or "what stands before it differs", cause

    def difference_of_inputs(self, word: str, mine: fx.Node, theirs: fx.Node) -> str:
        a, b = self.constant(self.graph, mine), self.constant(self.reference, theirs)
        if a is not None and b is not None:
            if a.shape != b.shape:
                return f"{word} is {list(a.shape)}, not {list(b.shape)}"
            gap = math.sqrt(_power(_difference(a, b)) / max(_power(b), 1e-300))
            return f"{word} is {gap:.2g} from the reference's" if gap else ""
        if a is not None or b is not None:
            return f"{word} is {mine}, not {theirs}"
        value = self.alignment.values.get(mine, mine)
        if value is theirs or (value.op == "placeholder" and value.name == theirs.name):
            return ""
        return f"{word} is {mine}, not {theirs}" if mine in self.alignment.values else ""

    def constant(self, graph: Graph, node: fx.Node) -> Tensor | None:
        """The tensor behind a constant, or behind a quantised weight."""
        if is_constant(graph, node):
            return tensor_of(graph, node)
        if not is_weight(node):
            return None
        parts = {n: tensor_of(graph, n) for n in node.all_input_nodes}
        return call(node, parts)  # type: ignore[no-any-return]

    def missing(self, nodes: Iterable[fx.Node]) -> list[str]:
        """Those nodes of the reference that no node of the graph is a rewriting of."""
        there = set(self.alignment.calls.values())
        there |= {o for n, o in self.alignment.values.items() if n not in self.alignment.calls}
        return [
            n.name for n in nodes if n.op == "call_function" and n not in there and not is_weight(n)
        ]


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, eq=False)
class _Seen:
    """Keeps what the readers of a node see, so that a gradient can be asked for."""

    node: fx.Node
    kept: dict[fx.Node, Tensor]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.requires_grad:
            self.kept[self.node] = value = value.view_as(value)
        return value


def _without(alignment: Alignment, nodes: Sequence[fx.Node]) -> Alignment:
    """The alignment where those nodes have no counterpart."""
    values = {n: o for n, o in alignment.values.items() if n not in nodes}
    return dataclasses.replace(alignment, values=values, beside=alignment.beside & values.keys())


def _region(node: fx.Node, alignment: Alignment) -> set[fx.Node]:
    """A node and what it is computed from, up to nodes with a counterpart."""
    region, todo = {node}, [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n not in region and n not in alignment.values:
                region.add(n)
                todo.append(n)
    return region


def _is_quantised(graph: Graph, node: fx.Node) -> bool:
    return node.target is DEQUANTIZE or (
        is_constant(graph, node) and node.meta["val"].dtype in (torch.int8, torch.uint8)
    )


def _highest(code: int) -> int:
    """The highest code of the narrowest usual grid that holds a code."""
    return next((high for high in (7, 31, 127) if code <= high), 255)


def _word(node: fx.Node, place: Any) -> str:
    """The name of an argument."""
    schema = getattr(node.target, "_schema", None)
    if (
        place
        and isinstance(place[0], int)
        and schema is not None
        and place[0] < len(schema.arguments)
    ):
        return str(schema.arguments[place[0]].name) + "".join(f"[{i}]" for i in place[1:])
    return ".".join(map(str, place))


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


class _Mask:
    """Leaves out padded positions [batch, length, …], which nobody reads."""

    def __init__(self, graph: Graph, feeds: Mapping[str, Tensor]) -> None:
        self.graph, self.keep = graph, None
        if MASK in graph.inputs and feeds[MASK].dim() == 2 and not bool(feeds[MASK].all()):
            self.keep = feeds[MASK].bool()
            name = graph.exported.graph_signature.user_inputs[graph.inputs.index(MASK)]
            self.sizes = shape_words(graph, graph.placeholders()[str(name)].meta["val"].shape)
        (output,) = [n for n in graph.fx.nodes if n.op == "output"]
        self.ends = dict(zip(graph.outputs, output.args[0], strict=True))

    def fits(self, node: fx.Node, value: Tensor) -> bool:
        shape = getattr(node.meta.get("val"), "shape", ())
        return (
            self.keep is not None
            and value.dim() > 2
            and value.shape[:2] == self.keep.shape
            and shape_words(self.graph, shape[:2]) == self.sizes
        )

    def of(self, node: fx.Node, value: Tensor) -> Tensor:
        """The value with zeros in padded positions."""
        if not self.fits(node, value):
            return value
        keep = self.keep.reshape(*self.keep.shape, *[1] * (value.dim() - 2))
        return torch.where(keep, value, torch.zeros((), dtype=value.dtype))

    def kept(self, node: fx.Node, value: Tensor) -> Tensor:
        return value[self.keep] if self.fits(node, value) else value

    def of_output(self, name: str, value: Tensor) -> Tensor:
        return self.of(self.ends[name], value) if name in self.ends else value


def _difference(a: Tensor, b: Tensor) -> Tensor:
    """a − b, zero where both are the same infinity or no number, infinite where only one is."""
    if a.dtype in (torch.bool, torch.uint8):
        a, b = a.float(), b.float()
    gap = a - b
    if not gap.is_floating_point() or math.isfinite(_norm(gap)):
        return gap
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, torch.zeros((), dtype=gap.dtype), gap)
    return torch.where(gap.isnan(), math.inf, gap)


def _norm(x: Tensor) -> float:
    x = x if x.is_floating_point() else x.to(torch.float64)
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


def _power(x: Tensor) -> float:
    """Σ x², values that are no numbers left out."""
    norm = _norm(x)
    return norm**2 if not math.isnan(norm) else _norm(x[~x.isnan()]) ** 2


def _db(signal: float, noise: float) -> float:
    if not noise:
        return math.inf
    if not signal or math.isinf(noise):
        return -math.inf
    return 10 * math.log10(signal / noise)


def _best_noise(x: Tensor, low: int, high: int) -> float:
    """What the range with the least squared error costs on `x`."""
    scheme = Scheme(bits=(high - low).bit_length(), signed=low < 0, symmetric=low == -high)
    watch = LeastSquares()
    watch.update(x)
    scale, zero = qparams(*(torch.tensor(end) for end in watch.range(scheme)), scheme)
    return _power(fake_quantize(x, scale, zero, scheme) - x)


def _tensors(graph: Graph, feeds: Mapping[str, Any] | None) -> dict[str, Tensor]:
    if feeds is None:
        return synthetic(graph)
    return {n: torch.as_tensor(feeds[n]) for n in graph.inputs}


def synthetic(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """Inputs drawn from the values of the example that a graph was traced on: two rows, the second padded at its end."""
    draw = torch.Generator().manual_seed(seed)
    example = graph.exported.example_inputs[1]
    placeholders = graph.placeholders()
    feeds = {}
    for name, user in zip(graph.inputs, graph.exported.graph_signature.user_inputs, strict=True):
        given = example[name]
        shape = [
            n if isinstance(n, int) else _size(graph, str(n), given.shape[axis])
            for axis, n in enumerate(placeholders[str(user)].meta["val"].shape)
        ]
        picked = torch.randint(given.numel(), shape, generator=draw)
        feeds[name] = given.reshape(-1)[picked]
    if MASK in feeds and feeds[MASK].dim() == 2 and feeds[MASK].shape[1] > 2:
        feeds[MASK][-1, 2 * feeds[MASK].shape[1] // 3 :] = 0
    return feeds


def _few(graph: Graph, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As many rows of a batch as a backward pass has memory for: about a thousand tokens, or one large picture."""
    firsts = {_word_of(graph, node) for node in _users(graph)}
    if firsts != {"batch"}:
        return dict(feeds)
    cost = max(v[0].numel() * (1 if v.is_floating_point() else 64) for v in feeds.values())
    rows = max(1, (1 << 16) // max(1, cost))
    return {name: value[:rows] for name, value in feeds.items()}


def _users(graph: Graph) -> list[fx.Node]:
    places = graph.placeholders()
    return [places[str(name)] for name in graph.exported.graph_signature.user_inputs]


def _word_of(graph: Graph, node: fx.Node) -> str | None:
    """The name of a node's first dimension."""
    shape = node.meta["val"].shape
    return shape_words(graph, shape[:1])[0] if len(shape) else None


LENGTHS = ("sequence", "length", "time")


def _size(graph: Graph, symbol: str, example: int) -> int:
    word = graph.dims.get(symbol, symbol)
    if word == "batch":
        return 2
    if word in LENGTHS:
        return min(16, graph.largest(word) or 16)
    return example


class _Callable(types.ModuleType):
    """`effc.explain` is this module and the function in it: `effc.explain(…)`, `effc.explain.layer_errors(…)`."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Blame]:
        return explain(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
