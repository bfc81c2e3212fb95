"""Who writes a residual stream, and where a mask must stand so that what it drops is 0 in every value of the stream.

    h₀ = embed(ids) + position          one place, behind the sum
    h₁ = h₀ + o_proj(…)                 one place, behind o_proj

A place is the largest value that is linear in one layer at most, beside tables and constants, and that only the stream
reads. Behind the places whatever has the width must give 0 for channels that are 0: sums, norms without a mean, moves,
and functions through the origin. The first call that does not is what stands in the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from effc.ir.axes import Axis, Stop, leaves, of
from effc.ir.edit import tensor_name
from effc.ir.select import op_name
from effc.ir.splice import is_spliced
from effc.passes.coupling import Coupling
from effc.passes.coupling_reading import Call, Reading, Use, every, tensors_of
from effc.passes.layernorm import FACTORS, MOVES, SUMS

PARTS = ("stack", "split", "split_with_sizes", "chunk", "unbind", "getitem", "repeat", "flip")
"""What only moves places, beside `MOVES`."""
THROUGH_ZERO = (
    *("relu", "relu6", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "mish", "prelu"),
    *("abs", "sin", "sinh", "erf", "sign", "sqrt", "square", "neg", "expm1", "log1p"),
)
"""Functions that give 0 for 0."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A value that is written into the stream, the width its last dimension."""

    value: fx.Node
    name: str
    """The layer that writes it first, or the constant where none does; it outlives the trace."""
    is_table: bool
    """Whether a table is looked up for it."""
    readers: tuple[fx.Node, ...]


@dataclass(kw_only=True)
class Stream:
    """The values that have a width, as far as the graph was read."""

    coupling: Coupling
    unit: Axis
    weights: dict[fx.Node, fx.Node]
    """Calls that multiply with a weight, and the weight."""
    writes: dict[fx.Node, Use]
    """Those whose weight writes the width."""
    layers: dict[fx.Node, int] = field(default_factory=dict)
    """Values that no mask stands behind yet, and how many layers of the model they are linear in."""
    zero: set[fx.Node] = field(default_factory=set)
    """Values that are 0 in a dropped channel."""
    places: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    """Values that a mask goes behind, and who reads them then."""
    given: set[fx.Node] = field(default_factory=set)
    """Values that depend on an input; all others are constants."""

    @property
    def reading(self) -> Reading:
        return self.coupling.reading

    def has(self, node: fx.Node) -> bool:
        return any(self.unit in leaves(axis) for axis in every(self.reading.dims.get(node, [])))

    def carried(self, node: fx.Node) -> list[fx.Node]:
        """What a call reads that has the width, but for its own weights."""
        own: list[object] = []
        if node in self.weights or op_name(node) in ("rms_norm", "prelu"):
            call = Call(node)
            own = [self.weights.get(node), call["weight"], call["bias"]]
        return [n for n in node.all_input_nodes if n not in own and self.has(n)]

    def is_zero(self, value: fx.Node, reader: fx.Node) -> bool:
        return value in self.zero or reader in self.places.get(value, ())

    def is_alone(self, value: fx.Node) -> bool:
        """Whether one call alone reads a value; of constants every reader has its own."""
        readers = [u for u in value.users if u.op == "output" or tensors_of(u.meta.get("val"))]
        return value not in self.given or len(readers) == 1

    def close(self, value: fx.Node, reader: fx.Node) -> None:
        """Put a mask behind a value: for all who read it, but for a constant, which may be a weight elsewhere."""
        if not self.is_zero(value, reader):
            readers = list(value.users) if value in self.given else [reader]
            self.places.setdefault(value, []).extend(readers)
            self.layers.pop(value, None)


def stream_of(coupling: Coupling, unit: Axis) -> Stream:
    """The stream of a width, of which nothing is read yet."""
    reading = coupling.reading
    writes = {use.node: use for use in reading.uses if of(use.writes) is unit}
    weights = {use.node: use.weight for use in reading.uses}
    stream = Stream(
        coupling=coupling, unit=unit, weights=weights, writes=writes, given=set(reading.inputs)
    )
    for node in coupling.graph.nodes:
        if any(n in stream.given for n in node.all_input_nodes):
            stream.given.add(node)
    return stream


def places(coupling: Coupling, unit: Axis) -> list[Place] | Stop:
    """Where a mask over a width goes, in order of execution; why none can, where that is so."""
    stream = stream_of(coupling, unit)
    for node in coupling.graph.nodes:
        why = _meet(stream, node) if node in stream.given else None
        if why is not None:
            return stream.reading.why(node, why)
    found = []
    for value, readers in stream.places.items():
        dims = stream.reading.of(value)
        if not dims or of(dims[-1]) is not unit or any(unit in leaves(a) for a in dims[:-1]):
            why = f"{op_name(value)} gives the width in another dimension than the last"
            return stream.reading.why(value, why)
        made = sources(stream, value)
        if isinstance(made, Stop):
            return made
        layers = [n for n in made if n in stream.writes]
        if layers and all(is_later(coupling, stream.writes[n].weight) for n in layers):
            why = "what was attached beside a layer writes the stream by itself"
            hint = "put insert-hsm in front of attach-lora"
            return stream.reading.why(layers[0], why, hint)
        name = stream.reading.names[layers[0]] if layers else _constant_name(stream, made[0])
        is_table = any(op_name(n) == "embedding" for n in layers)
        found.append(Place(value=value, name=name, is_table=is_table, readers=tuple(readers)))
    return found


def sources(stream: Stream, value: fx.Node) -> list[fx.Node] | Stop:
    """The layers, tables and constants that a value is a linear combination of, in order of execution."""
    found = []
    todo = [value]
    while todo:
        node = todo.pop()
        if node in stream.writes or node not in stream.given:
            found.append(node)
            continue
        operands = stream.carried(node)
        word = op_name(node)
        is_scaled = word in FACTORS and len(operands) == 1
        if not operands or not (is_scaled or word in (*SUMS, *MOVES, *PARTS)):
            return stream.reading.why(node, f"{word} is not linear in what writes the stream")
        todo += operands
    order = {node: place for place, node in enumerate(stream.coupling.graph.fx.nodes)}
    return sorted(set(found), key=order.__getitem__)


def is_later(coupling: Coupling, weight: fx.Node) -> bool:
    """Whether a weight is one that a pass put there to be trained."""
    return is_spliced(coupling.graph, tensor_name(coupling.graph, weight) or "")


def _constant_name(stream: Stream, node: fx.Node) -> str:
    return tensor_name(stream.coupling.graph, node) or node.name


def _meet(stream: Stream, node: fx.Node) -> str | None:
    """Take up one call; why it stands in the way, where it does."""
    if not tensors_of(node.meta.get("val")):
        return None  # a size
    operands, word = stream.carried(node), op_name(node)
    if node in stream.writes or not stream.has(node):
        for value in operands:
            stream.close(value, node)
        if node in stream.writes:
            later = is_later(stream.coupling, stream.writes[node].weight)
            stream.layers[node] = 0 if word == "embedding" or later else 1
        return None
    if word in (*SUMS, *FACTORS) and len(operands) == 2 and operands[0] is operands[1]:
        operands = operands[:1]
    if word in SUMS:
        both = {n for n in node.args[:2] if isinstance(n, fx.Node)}
        if not all(isinstance(n, fx.Node) for n in node.args[:2]) or both != set(operands):
            return f"{word} adds something that has not the width, and is 0 in no channel"
        _join(stream, node, operands)
        return None
    if word in FACTORS and len(operands) == 1:
        if word == "div" and node.args[0] is not operands[0]:
            return "something is divided by the stream"
        _join(stream, node, operands)
        return None
    if word == "mul":
        if not any(stream.is_zero(n, node) for n in operands):
            stream.close(next((n for n in operands if n in stream.given), operands[0]), node)
        stream.zero.add(node)
        return None
    if word == "rms_norm" or word in THROUGH_ZERO:
        for value in operands:
            stream.close(value, node)
        stream.zero.add(node)
        return None
    if word in (*MOVES, *PARTS):
        _join(stream, node, operands)
        return None
    return f"nobody knows whether {word} keeps channels at 0"


def _join(stream: Stream, node: fx.Node, operands: list[fx.Node]) -> None:
    """A call that is linear: a mask behind it is put off where it may be, else what it reads is masked."""
    opened = [n for n in operands if not stream.is_zero(n, node)]
    layers = sum(stream.layers.get(n, 0) for n in opened)
    if (
        opened
        and len(opened) == len(operands)
        and layers <= 1
        and all(map(stream.is_alone, opened))
    ):
        stream.layers[node] = layers
        return
    for value in opened:
        stream.close(value, node)
    stream.zero.add(node)
