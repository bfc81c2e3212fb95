"""What is known of the axes of a graph while it is read, and the pieces that rules of operators are made of.

A rule gives the axes of what a call makes: one a dimension, a list of those where it makes several tensors, and None
where nothing is known of such a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir import axes
from effc.ir.axes import Axis, Stop, leaf, stop, unify
from effc.ir.select import op_name

Axes = list[Axis]
Path = tuple[Any, ...]
"""Where a number stands in a call: number or word of the argument, and its place in a list."""


@dataclass(frozen=True, kw_only=True)
class Literal:
    """A number in a call that is the size of axes laid end to end, and `plus` of what is not removed."""

    node: fx.Node
    path: Path
    axes: tuple[Axis, ...]
    plus: int = 0


@dataclass(frozen=True, kw_only=True)
class Use:
    """A call that multiplies with a weight, the axis that it writes and the one that it sums over."""

    node: fx.Node
    weight: fx.Node
    writes: Axis
    reads: Axis
    positions: int
    """How often the weight is used for one position of the free dimensions."""


@dataclass
class Reading:
    """What is known of a graph so far."""

    names: dict[fx.Node, str]
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    """Axes of every tensor, one a dimension; a list of them where a call makes several tensors."""
    inputs: list[fx.Node] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    cuts: list[tuple[fx.Node, Axes]] = field(default_factory=list)
    """Calls that cut a dimension into equal parts, which may become unequal."""
    norms: list[tuple[fx.Node, Axis]] = field(default_factory=list)
    """RMSNorms, whose gain and epsilon hang on how many there are."""
    scales: list[tuple[fx.Node, Axis]] = field(default_factory=list)
    """Attention that scales by the size of a head without saying so."""
    uses: list[Use] = field(default_factory=list)
    unspoken: list[tuple[Axis, Stop]] = field(default_factory=list)
    """Axes within a size that is computed from free dimensions."""

    def of(self, node: object) -> Axes:
        if not isinstance(node, fx.Node):
            return []
        found = self.dims.get(node, [])
        return found if not found or isinstance(found[0], Axis) else []

    def why(self, node: fx.Node, reason: str, hint: str = "", *, is_plain: bool = False) -> Stop:
        where = self.names.get(node, node.name)
        return Stop(reason=reason, node=where, hint=hint, is_plain=is_plain)

    def unknown(self, node: fx.Node) -> Any:
        """Everything that a call reads and makes is stopped."""
        why = self.why(node, f"nothing is known of {op_name(node)}")
        for source in node.all_input_nodes:
            for axis in every(self.dims.get(source, [])):
                stop(axis, why)
        value = node.meta["val"]
        if isinstance(value, Tensor):
            return fresh(value, why)
        return [fresh(v, why) if isinstance(v, Tensor) else [] for v in value]

    def literal(
        self, call: Call, name: str, place: int | None, *found: Axis, plus: int = 0
    ) -> None:
        path: Path = (call.places[name],) if place is None else (call.places[name], place)
        self.literals.append(Literal(node=call.node, path=path, axes=found, plus=plus))

    def broadcast(self, node: fx.Node, operands: Sequence[Axes], shape: Sequence[Any]) -> Axes:
        """Axes of what operands give that are aligned at the right; those of one size are one."""
        why = self.why(node, "operands are grouped in unlike ways")
        found: Axes = []
        for place in range(len(shape)):
            back = len(shape) - place
            mine = [o[-back] for o in operands if len(o) >= back and not axes.is_one(o[-back].size)]
            for other in mine[1:]:
                unify(mine[0], other, why)
            found.append(mine[0] if mine else made(shape[place], FREE))
        return found


class Call:
    """The arguments of a call by the names that its schema gives them, and where they stand."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.values: dict[str, Any] = {}
        self.places: dict[str, Any] = {}
        schema = getattr(node.target, "_schema", None)
        for number, argument in enumerate(schema.arguments if schema is not None else ()):
            if number < len(node.args):
                self.values[argument.name], place = node.args[number], number
            elif argument.name in node.kwargs:
                self.values[argument.name], place = node.kwargs[argument.name], argument.name
            else:
                self.values[argument.name], place = argument.default_value, None
            self.places[argument.name] = place

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def first(self, *names: str) -> Any:
        return next((self.values[name] for name in names if name in self.values), None)

    @property
    def results(self) -> list[Tensor]:
        return tensors_of(self.node.meta["val"])

    @property
    def result(self) -> Tensor:
        (value,) = self.results
        return value


def tensors_of(value: Any) -> list[Tensor]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, Tensor)]


def every(found: Any) -> Iterable[Axis]:
    """The axes of a value, or of all the values of a call."""
    for item in found:
        if isinstance(item, Axis):
            yield item
        else:
            yield from item


def size(dimension: Any) -> Any:
    return dimension.node.expr if isinstance(dimension, torch.SymInt) else int(dimension)


def fresh(value: Tensor, why: Stop) -> Axes:
    return [made(d, why) for d in value.shape]


FREE = Stop(reason="it is a free dimension", is_plain=True)


def made(dimension: Any, why: Stop | None = None) -> Axis:
    """A new axis for a dimension; a free one is stopped."""
    found = size(dimension)
    return leaf(found, why if isinstance(found, int) else FREE)


def position(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


Rule = Callable[[Reading, fx.Node, Call], Any]
"""What an operator says of a call, as `coupling_rules` has them by name."""
