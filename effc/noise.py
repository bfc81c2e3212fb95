"""What quantised nodes may be off by, so that one which is off by more can be told.

    E‖Δ(W x)‖² = Σ x² · step² / 12        a layer whose weights were rounded
    |Δx| ≤ step / 2                       a value inside the range of its grid

A range was chosen on other data, so a grid is compared with the best one for the very values that went through it, and
with how much worse than theirs the other grids of the graph are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.calib.collectors import COLLECTORS
from effc.errors import first_line
from effc.ir.align import Alignment, arguments, is_weight, operands
from effc.ir.differences import Differences
from effc.ir.edit import is_constant, tensor_name, tensor_of
from effc.ir.gap import Padding, decibel, difference, power
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.ir.values import Compared
from effc.quant.affine import fake_quantize, qparams, weight_qparams
from effc.quant.ops import DEQUANTIZE, spread
from effc.quant.scheme import Scheme

ROUNDING = 256
"""Float steps that a node may be off by, relative to its values, where nothing is quantised."""
LAYERS = 4.0
"""Noise of a layer, over what is expected of its steps."""
GRIDS = 3.0
"""Noise of a grid, over that of the best grid for the same values."""
FEW = 0.0002
"""A share of values outside of a range that ranges are meant to leave there: 99.99 % of them are held at least."""
FEW_MADE_UP = 0.05
"""The same where the data is made up."""
COARSE, FINE = 1.25, 0.75
"""What the scale of a weight may be of the widest, and of the narrowest, that a range method gives it."""
PAIR = 128
"""What two neighbouring codes add up to at most beside 8-bit activations without a sign; see `pair_scale`."""
SEVERAL = 3
"""Grids that cut off a few values, from which on that is how ranges were chosen."""


@dataclass(eq=False, kw_only=True)
class Local:
    """What one node is off by on exact inputs, and what it may be. `noise`, `signal` and so on are sums of squares."""

    node: fx.Node
    place: int
    noise: float
    signal: float = 0.0
    expected: float = 0.0
    allowed: float = 0.0
    error: Tensor | None = None
    change: Callable[[Any], Any] = lambda value: value
    """Puts the error on the reference's value."""
    reason: str = ""
    is_grid: bool = False
    is_cut: bool = False
    """Whether a few values outside of its range make most of its error."""
    cause: Any = None
    """What several nodes have in common that show one fault."""
    share: float = 0.0
    alone: float | None = None
    """Error of the outputs where only this node is off."""

    @property
    def is_fault(self) -> bool:
        return not self.noise <= self.allowed

    @property
    def local_db(self) -> float:
        return decibel(self.signal, self.noise)


def measured(place: int, item: Compared, padding: Padding) -> Local:
    """The error of a node; rounding of floats is all that it may be."""
    node, mine, theirs = item.node, item.mine, item.theirs
    if item.error is not None:
        reason = f"it does not run on the reference's values: {first_line(item.error)}"
        return Local(node=node, place=place, noise=math.inf, reason=reason)
    if not isinstance(theirs, Tensor) or not isinstance(mine, Tensor):
        noise = 0.0 if _is_same(mine, theirs) else math.inf
        return Local(node=node, place=place, noise=noise, change=lambda _: mine)
    theirs = theirs.detach()
    if mine.shape != theirs.shape:
        reason = f"it is {list(mine.shape)} where the reference is {list(theirs.shape)}"
        return Local(node=node, place=place, noise=math.inf, reason=reason)
    signal = power(padding.zeroed(node, theirs))
    if torch.equal(mine, theirs):
        return Local(node=node, place=place, noise=0.0, signal=signal)
    error = padding.zeroed(node, difference(mine, theirs))
    local = Local(node=node, place=place, noise=power(error), signal=signal)
    if not (theirs.is_floating_point() and mine.is_floating_point()):
        local.change = lambda _: mine
        return local
    local.error, local.change = error, lambda value: value + error.to(value.dtype)
    eps = max(torch.finfo(t.dtype).eps for t in (mine, theirs))
    local.allowed = signal * (ROUNDING * eps) ** 2
    return local


def _is_same(mine: Any, theirs: Any) -> bool:
    """Whether sizes, or the pieces that a tensor was split into, are the same but for rounding."""
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(map(_is_same, mine, theirs))
    if not isinstance(mine, Tensor) or not isinstance(theirs, Tensor):
        return bool(mine == theirs)
    if mine.shape != theirs.shape or not theirs.is_floating_point():
        return torch.equal(mine, theirs)
    most = ROUNDING * torch.finfo(theirs.dtype).eps
    return power(difference(mine, theirs)) <= power(theirs) * most**2


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Judges the nodes of a graph; `is_made_up` says that the data is."""

    reference: Graph
    graph: Graph
    alignment: Alignment
    padding: Padding
    is_made_up: bool

    def judge(self, local: Local, item: Compared) -> None:
        """Allow a node what its grids may cost."""
        if local.error is None or not local.is_fault or not math.isfinite(local.noise):
            return
        node = item.node
        if node.target is DEQUANTIZE:
            if node not in self.alignment.calls:  # else the reference has the same grid
                self._judge_grid(local, item)
            return
        local.expected, rows = self._expected(item)
        local.allowed += LAYERS * (1 + 4 / rows) * local.expected
        if local.is_fault and self._is_rounded(node):
            local.allowed = math.inf

    def _expected(self, item: Compared) -> tuple[float, int]:
        """The noise that the quantised operands of a node must make, and how many rows of weights make it."""
        node, theirs = item.node, item.theirs.detach()
        region = region_of(node, self.alignment)
        if not any(_is_quantised(self.graph, n) for n in region):
            return 0.0, 1
        if op_name(node) in ("linear", "conv1d", "conv2d"):
            weight = item.inputs[node.args[1]]  # type: ignore[index]
            return sum(self._spread(item, m) for m in node.all_input_nodes), len(weight)
        if any(op_name(n) == "embedding" for n in region):
            steps = theirs.abs().amax(-1) / 127
            return power(steps) * theirs.shape[-1] / 12, theirs.shape[-1]
        # An operator that no pass quantises: as if its value had been rounded on a grid of that many bits.
        bits = min((bits_of(self.graph, n) for n in region if is_weight(n)), default=8)
        step = float(theirs.abs().max()) / (2 ** (bits - 1) - 1)
        return step**2 / 12 * theirs.numel(), 1

    def _spread(self, item: Compared, operand: fx.Node) -> float:
        """Noise of a linear operator from rounding one operand: step² / 12 goes where squares go."""
        node = item.node
        if operand.target is not DEQUANTIZE or operand in self.alignment.values:
            return 0.0
        if self._is_alike(node, operand):
            return 0.0
        value = item.inputs[operand]
        if is_weight(operand) and value.dim() < 2:
            return 0.0  # a bias: its grid is far finer than what it is added to
        squares = {n: v.square() if isinstance(v, Tensor) else v for n, v in item.inputs.items()}
        squares[operand] = (self._steps(node, operand).square() / 12).expand(value.shape)
        without_bias = (*node.args[:2], None, *node.args[3:])
        args, kwargs = fx.node.map_arg((without_bias, node.kwargs), lambda n: squares[n])
        assert callable(node.target)
        return float(self.padding.zeroed(node, node.target(*args, **kwargs)).double().sum())

    def _is_alike(self, node: fx.Node, operand: fx.Node) -> bool:
        """Whether the reference reads a quantised weight in the place of an operand too."""
        return any(is_weight(n) for n in self._theirs(node, operand))

    def _theirs(self, node: fx.Node, operand: fx.Node) -> list[fx.Node]:
        """What the reference reads in the places of an operand."""
        other = self.alignment.calls.get(node)
        theirs = operands(other) if other is not None else {}
        places = [place for place, n in operands(node).items() if n is operand]
        return [theirs[place] for place in places if place in theirs]

    def _steps(self, node: fx.Node, operand: fx.Node) -> Tensor:
        """The step of every value of an operand; of a weight at most the widest that a range method gives it."""
        codes, scale, axis, group = (operand.args[i] for i in (0, 1, 3, 4))
        step = tensor_of(self.graph, scale)  # type: ignore[arg-type]
        if not is_weight(operand):
            return step
        held = tensor_of(self.graph, codes)  # type: ignore[arg-type]
        exact = self._exact(node, operand)
        if exact is not None and exact.shape == held.shape:
            least = COARSE * self._widest(operand, exact)
        else:  # a weight that something was folded into: twice what its codes make use of
            most = _rows(held.int().abs().float(), self._scheme(operand)).amax(-1)
            least = 2 * step * most.reshape(step.shape) / self._scheme(operand).high
        return spread(torch.minimum(step, least), held, axis, group)  # type: ignore[arg-type]

    def _exact(self, node: fx.Node, operand: fx.Node) -> Tensor | None:
        """The reference's weight in the place of an operand."""
        theirs = (n for n in self._theirs(node, operand) if is_constant(self.reference, n))
        return next((tensor_of(self.reference, n) for n in theirs), None)

    def _scheme(self, node: fx.Node) -> Scheme:
        """The grid that a stored weight was meant for."""
        _, scale, zero, axis, group = node.args
        is_one = tensor_of(self.graph, scale).dim() == 0  # type: ignore[arg-type]
        return Scheme(
            bits=bits_of(self.graph, node),
            axis=None if is_one else axis,  # type: ignore[arg-type]
            group=group or None,  # type: ignore[arg-type]
            symmetric=not bool(tensor_of(self.graph, zero).any()),  # type: ignore[arg-type]
        )

    def _widest(self, node: fx.Node, exact: Tensor) -> Tensor:
        """The widest scale that a range method gives a weight on a grid of a node's bits."""
        scheme = self._scheme(node)
        wide, _ = weight_qparams(
            exact, scheme, pair_limit=PAIR if scheme.axis == 0 and not scheme.group else None
        )
        return wide

    def _is_rounded(self, node: fx.Node) -> bool:
        """Whether a layer is the reference's with its weight rounded, on a grid no coarser than need be.

        A weight that was clipped makes more noise than its step says where activations are large.
        """
        other = self.alignment.calls.get(node)
        if other is not self.alignment.values[node] or other.target is not node.target:
            return False
        compare = Differences(reference=self.reference, graph=self.graph, alignment=self.alignment)
        mine, theirs = arguments(node), arguments(other)
        for place in mine.keys() | theirs.keys():
            a, b = mine.get(place), theirs.get(place)
            if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
                if a != b:
                    return False
            elif is_weight(a):
                if not is_constant(self.reference, b) or not self._is_rounding(
                    a, tensor_of(self.reference, b)
                ):
                    return False
            elif compare.of_operands("", a, b):
                return False
        return True

    def _is_rounding(self, node: fx.Node, exact: Tensor) -> bool:
        """Whether the codes of a weight are those of `exact` on their grid, and the grid is one for its range.

        Codes that were made with a wrong scale agree with it, so they cannot tell.
        """
        codes, scale, zero, axis, group = node.args
        held = tensor_of(self.graph, codes)  # type: ignore[arg-type]
        if held.shape != exact.shape:
            return False
        steps = tensor_of(self.graph, scale)  # type: ignore[arg-type]
        step, middle = (
            spread(t, held, axis, group)  # type: ignore[arg-type]
            for t in (steps, tensor_of(self.graph, zero))  # type: ignore[arg-type]
        )
        if held.dtype == torch.int32:
            return float((held * step - exact).abs().max()) <= float(step.max())
        narrowest, _ = weight_qparams(exact, self._scheme(node), method="mse")
        widest = COARSE * self._widest(node, exact)
        if bool((steps < FINE * narrowest).any() or (steps > widest).any()):
            return False
        low, high = int(held.min()), int(held.max())
        same = ((exact / step + middle).clamp(low, high) - held).abs() <= 0.51
        return float(same.double().mean()) > 0.999

    def _judge_grid(self, local: Local, item: Compared) -> None:
        x = self.padding.without(item.node, item.theirs.detach())
        codes, scale, zero = (item.node.args[i] for i in range(3))
        scale, zero = item.inputs[scale], item.inputs[zero]  # type: ignore[index]
        assert isinstance(codes, fx.Node)
        if scale.numel() != 1:  # by channel, or by row as the graph runs
            local.expected = power(scale) / scale.numel() / 12 * x.numel()
            local.allowed += LAYERS * local.expected + self._cut(item, scale)
            return
        low, high = (int(codes.args[i]) for i in (3, 4))  # type: ignore[arg-type]
        step, middle = float(scale), int(zero)
        outside = (x < (low - middle - 0.5) * step) | (x > (high - middle + 0.5) * step)
        off = self.padding.without(item.node, difference(item.mine, item.theirs.detach()))
        inside = float(off[~outside].abs().max()) if not bool(outside.all()) else 0.0
        if inside > 0.51 * step:
            local.reason = f"values inside its range are off by {inside / step:.2g} steps; rounding is half of one"
            return
        clipped = power(off[outside]) / max(local.noise, 1e-300)
        share = float(outside.double().mean())
        local.is_grid, local.expected = True, best_noise(x, low, high, middle)
        local.is_cut = clipped > 0.5 and share < (FEW_MADE_UP if self.is_made_up else FEW)
        need = (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / (high - low)
        local.reason = (
            f"{100 * share:.2g} % of the values lie outside its range and make {100 * clipped:.3g} % of its error"
            if clipped > 0.5
            else f"its step is {step / max(need, 1e-300):.3g} times what holds all values"
        )

    def _cut(self, item: Compared, scale: Tensor) -> float:
        """The noise of values that lie outside of a grid of many scales, where they are as few as may be."""
        exact, error = item.theirs.detach(), difference(item.mine, item.theirs.detach())
        steps = spread(scale, exact, *item.node.args[3:])  # type: ignore[arg-type]
        outside = exact.abs() > 127.5 * steps
        few = FEW_MADE_UP if self.is_made_up else FEW
        return power(error[outside]) if float(outside.double().mean()) < few else 0.0

    def allow_grids(self, found: Sequence[Local]) -> None:
        """Allow every grid some multiple of the least noise: more where grids of this graph usually make more.

        Where several cut off few values each, that is how their ranges were chosen.
        """
        grids = [x for x in found if x.is_grid and x.expected]
        ratios = sorted(x.noise / x.expected for x in grids)
        usual, high = 1.0, 1.0
        if len(ratios) > 4:
            usual, high = (
                ratios[min(len(ratios) * tenths // 10, len(ratios) - 2)] for tenths in (5, 8)
            )
        factor = max(GRIDS, GRIDS * usual, 2 * high) * (3 if self.is_made_up else 1)
        cut = [x for x in grids if x.is_cut and x.noise > factor * x.expected]
        for local in grids:
            is_chosen = local.is_cut and (self.is_made_up or len(cut) >= SEVERAL)
            local.allowed = math.inf if is_chosen else local.allowed + factor * local.expected


def region_of(node: fx.Node, alignment: Alignment) -> set[fx.Node]:
    """A node and what it is computed from, up to nodes with a counterpart."""
    region, todo = {node}, [node]
    while todo:
        for n in todo.pop().all_input_nodes:
            if n not in region and n not in alignment.values:
                region.add(n)
                todo.append(n)
    return region


def _rows(codes: Tensor, scheme: Scheme) -> Tensor:
    """Codes with everything that shares a scale along the last axis."""
    if scheme.group:
        return codes.reshape(*codes.shape[:-1], -1, scheme.group)
    return codes.reshape(-1) if scheme.axis is None else codes.movedim(scheme.axis, 0).flatten(1)


def bits_of(graph: Graph, weight: fx.Node) -> int:
    """The bits of a stored weight: those that its quantiser noted, or else the fewest that hold its codes."""
    codes = weight.args[0]
    assert isinstance(codes, fx.Node)
    name = tensor_name(graph, codes)
    noted = graph.origins[name].transforms if name is not None else ()
    for word in reversed(noted):
        if found := re.match(r"quantize bits=(\d+)", word):
            return int(found[1])
    most = int(tensor_of(graph, codes).int().abs().max())
    return next((bits for bits in (4, 6) if most < 2 ** (bits - 1)), 8)


def _is_quantised(graph: Graph, node: fx.Node) -> bool:
    if node.target is DEQUANTIZE:
        return True
    return is_constant(graph, node) and node.meta["val"].dtype in (torch.int8, torch.uint8)


def best_noise(x: Tensor, low: int, high: int, middle: int) -> float:
    """What the range with the least squared error costs on `x`, on the codes of a grid whose zero is at `middle`."""
    scheme = Scheme(
        bits=(high - low).bit_length(), signed=low < 0,
        symmetric=middle == 0 and low in (-high, -high - 1), narrow=low == -high,
    )  # fmt: skip
    return power(fake_quantize(x, *grid_for(x, "mse", scheme), scheme) - x)


def grid_for(x: Tensor, method: str, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point that a range method chooses for `x`."""
    watch = COLLECTORS[method]()
    watch.update(x)
    low, high = watch.range(scheme)
    return qparams(torch.tensor(low), torch.tensor(high), scheme)
