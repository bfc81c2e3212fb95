"""Writes the LayerNorms of a residual stream as RMSNorms, so that its width can be pruned (SliceGPT, section 3.1).

    LayerNorm(x) = g · (x − mean x) / √(var x + ε) + b  =  RMSNorm_g(x) + b        where mean x = 0

A stream is what layers, tables and constants write by sums. Where each of them has the mean over the width taken off
its output once and for all, in its weights, so has the stream. Norms do not see the difference, and so nothing but
norms may read a stream. Shifts b go into the biases of the layers behind the norm.

A stream that a norm writes (post-LN) has that norm's gain and shift in it, which no weights can make up for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from effc.errors import PreconditionError
from effc.ir.axes import Axis, Stop, leaves, of
from effc.ir.edit import insert, is_constant, lift, rebind, replace, tensor_name, tensor_of
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import op_name
from effc.passes.base import Pass, Stats
from effc.passes.coupling import coupled_dims
from effc.passes.coupling_reading import Call, Reading, tensors_of

log = logging.getLogger(__name__)
aten = torch.ops.aten

SUMS = ("add", "sub")
FACTORS = ("mul", "div")
MOVES = (
    *("to", "_to_copy", "clone", "contiguous", "dropout", "alias", "detach", "neg"),
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "unsqueeze", "squeeze"),
    *("expand", "slice", "select", "index", "roll", "cat", "mean", "sum"),
)
"""What keeps a mean of 0 over the width, as long as the width stays a dimension of its own."""


@dataclass
class Stream:
    """A residual stream: what is added up in it, who writes it, who reads it, and what stands in the way."""

    values: dict[fx.Node, int] = field(default_factory=dict)
    """The dimension of the width in every value."""
    writers: dict[fx.Node, int] = field(default_factory=dict)
    """Layers and tables, and the dimension of their weight that is the width."""
    scaled: dict[fx.Node, tuple[fx.Node, fx.Node]] = field(default_factory=dict)
    """Products of a layer with a constant along the width: the layer and the constant."""
    constants: dict[fx.Node, int] = field(default_factory=dict)
    norms: list[fx.Node] = field(default_factory=list)
    obstacle: Stop | None = None
    """Why its norms must stay: who writes it is told before who reads it."""
    is_read: bool = False
    """Whether a reader is what stands in the way."""


@dataclass(frozen=True, kw_only=True)
class LayerNormToRMSNorm(Pass):
    """Writes LayerNorms over a residual stream as RMSNorms, whose width prune-dims can remove. Pre-LN models alone."""

    name = "layernorm-to-rmsnorm"

    def requires(self, program: Program) -> None:
        graphs = [graph for graph in program if self.takes(graph.role)]
        plans = [plan(graph) for graph in graphs]
        refusals = [why for _, found in plans for why in found]
        if refusals and not any(streams for streams, _ in plans):
            name, why = refusals[0]
            raise PreconditionError(
                f"no LayerNorm can become an RMSNorm; {name}: {why}",
                hint="leave the pass out, and the width of the stream as it is: other groups can be pruned",
            )

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        streams, refusals = plan(graph)
        for name, why in refusals:
            log.info("%s stays a LayerNorm: %s", name, why)
        changed = 0
        for stream in streams:
            _center(graph, stream)
            for norm in stream.norms:
                _convert(graph, norm)
                changed += 1
        return changed


def plan(graph: Graph) -> tuple[list[Stream], list[tuple[str, Stop]]]:
    """Streams whose norms can all be converted, and the norms that cannot, with the reason.

    A width over which one norm must stay is left alone: it could not be pruned anyway.
    """
    reading = coupled_dims(graph).reading
    norms = [n for n in graph.nodes if op_name(n) == "layer_norm"]
    found: dict[fx.Node, Stream] = {}
    for norm in norms:
        if norm in found:
            continue
        stream = _stream(reading, norm)
        for mine in (*stream.norms, norm):
            found[mine] = stream
    blocked: dict[Axis, Stop] = {}
    for norm in sorted(norms, key=lambda n: found[n].is_read):
        why = found[norm].obstacle
        if why is not None:
            for axis in _width(reading, norm):
                blocked.setdefault(axis, why)
    refusals = []
    streams: list[Stream] = []
    for norm in norms:
        why = next((blocked[a] for a in _width(reading, norm) if a in blocked), None)
        if why is not None:
            refusals.append((reading.names[norm], why))
        elif found[norm] not in streams:
            streams.append(found[norm])
    return streams, refusals


def _width(reading: Reading, norm: fx.Node) -> list[Axis]:
    count = len(Call(norm)["normalized_shape"])
    return [x for axis in reading.of(norm)[-count:] for x in leaves(axis)]


# -- where a stream goes


def _stream(reading: Reading, norm: fx.Node) -> Stream:
    """The stream that a norm reads."""
    stream = Stream()
    call = Call(norm)
    value: fx.Node = call["input"]
    if len(call["normalized_shape"]) != 1:
        stream.obstacle = reading.why(norm, "it normalises several dimensions at once")
        return stream
    todo = [(value, value.meta["val"].dim() - 1)]
    read: Stop | None = None
    while todo and stream.obstacle is None:
        node, dim = todo.pop()
        if node in stream.values or node in stream.constants:
            continue
        behind = _behind(reading, node, dim, stream)
        if isinstance(behind, Stop):
            stream.obstacle = behind
            return stream
        todo += behind
        if node in stream.constants:
            continue  # who else reads it reads what it was
        stream.values[node] = dim
        ahead = _ahead(reading, node, dim, stream)
        read = read or (ahead if isinstance(ahead, Stop) else None)
        todo += ahead if isinstance(ahead, list) else []
    stream.obstacle, stream.is_read = read, read is not None
    return stream


Found = list[tuple[fx.Node, int]]


def _behind(reading: Reading, node: fx.Node, dim: int, stream: Stream) -> Found | Stop:
    """What a value of the stream is made of, with the width's dimension in each."""
    if node in reading.inputs:
        return reading.why(node, "the stream is an input of the graph")
    if node.op == "placeholder":
        stream.constants[node] = dim
        return []
    word, call = op_name(node), Call(node)
    written = _written(node, call, dim)
    if written is not None:
        stream.writers[node] = written
        return []
    if word in SUMS and len(call.values) >= 2 and _all_carry(node, dim):
        return [(o, _place(node, o, dim)) for o in node.all_input_nodes]
    if word in FACTORS:
        carrying = [o for o in node.all_input_nodes if _carries(node, o, dim)]
        if len(carrying) == 1:
            return [(carrying[0], _place(node, carrying[0], dim))]
        scaled = scaled_layer(node, carrying, dim)
        if scaled is not None:
            stream.scaled[node] = scaled
            return []
    if word in MOVES:
        found = [(o, _same(reading, node, dim, o)) for o in _moved(node)]
        if all(d is not None for _, d in found):
            return [(o, d) for o, d in found if d is not None]
    if word == "layer_norm":
        return reading.why(
            node, "the stream is written by a norm (post-LN, or one behind the embedding)"
        )
    if word.startswith("conv"):
        return reading.why(node, "the stream is written by a convolution in groups")
    return reading.why(node, f"the stream is written by {word}")


def _ahead(reading: Reading, node: fx.Node, dim: int, stream: Stream) -> Found | Stop:
    """Values that the stream flows on into; norms are its readers."""
    found: Found = []
    for user in node.users:
        word = op_name(user) if user.op == "call_function" else user.op
        if user.op == "call_function" and not tensors_of(user.meta.get("val")):
            continue  # a size
        last = dim == node.meta["val"].dim() - 1
        if word == "layer_norm" and last and len(Call(user)["normalized_shape"]) == 1:
            stream.norms.append(user)
            continue
        place = None
        if word in (*SUMS, *FACTORS):
            place = dim + user.meta["val"].dim() - node.meta["val"].dim()
        elif word in MOVES and node in _moved(user):
            place = _same(reading, node, dim, user)
        if place is None:
            return reading.why(user, f"the stream is read by {word}, which no norm stands before")
        found.append((user, place))
    return found


def _written(node: fx.Node, call: Call, dim: int) -> int | None:
    """For a layer or table whose output dimension is the width: the dimension of its weight that is."""
    rank = node.meta["val"].dim()
    weight = call["weight"]
    if not isinstance(weight, fx.Node) or weight.op != "placeholder":
        return None
    match op_name(node):
        case "linear" if dim == rank - 1:
            return 0
        case "embedding" if dim == rank - 1:
            return 1
        case "conv1d" | "conv2d" | "conv3d" if dim == rank - weight.meta["val"].dim() + 1:
            return 0 if call["groups"] == 1 else None
    return None


def _place(node: fx.Node, operand: fx.Node, dim: int) -> int:
    """The dimension of an operand that is aligned with `dim` of the result."""
    return int(dim - node.meta["val"].dim() + operand.meta["val"].dim())


def _carries(node: fx.Node, operand: fx.Node, dim: int) -> bool:
    place = _place(node, operand, dim)
    return place >= 0 and bool(operand.meta["val"].shape[place] == node.meta["val"].shape[dim])


def _all_carry(node: fx.Node, dim: int) -> bool:
    """Whether a sum adds nothing that is alike along the width, which would be a mean."""
    given = node.args[:2]
    return all(isinstance(o, fx.Node) and _carries(node, o, dim) for o in given)


def scaled_layer(
    node: fx.Node, carrying: list[fx.Node], dim: int
) -> tuple[fx.Node, fx.Node] | None:
    """A layer that nothing else reads, and the constant along the width that it is multiplied with."""
    if op_name(node) != "mul" or len(carrying) != 2:
        return None
    for layer, factor in (carrying, carrying[::-1]):
        along = (
            factor.op == "placeholder" and factor.meta["val"].numel() == node.meta["val"].shape[dim]
        )
        own = layer.op == "call_function" and len(layer.users) == 1
        if along and own and _written(layer, Call(layer), _place(node, layer, dim)) == 0:
            return layer, factor
    return None


def _moved(node: fx.Node) -> list[fx.Node]:
    """The values that a call moves around, without its indices."""
    first = node.args[0]
    values = first if isinstance(first, list | tuple) else [first]
    return [n for n in values if isinstance(n, fx.Node)]


def _same(reading: Reading, node: fx.Node, dim: int, other: fx.Node) -> int | None:
    """The dimension of `other` that is the same as `dim` of `node`.

    None where the width is part of a longer one: a norm of several widths side by side sees their means apart.
    """
    axis = of(reading.of(node)[dim])
    found = [d for d, a in enumerate(reading.of(other)) if of(a) is axis]
    return found[0] if len(found) == 1 else None


# -- what becomes of it


def _center(graph: Graph, stream: Stream) -> None:
    """Take the mean over the width out of everything that writes the stream."""
    for product, (layer, factor) in stream.scaled.items():
        fold_scale(graph, layer, tensor_of(graph, factor).flatten())
        replace(graph, product, layer)
        stream.writers[layer] = 0
    parts: dict[tuple[fx.Node, int], list[fx.Node]] = {}
    for node, dim in stream.writers.items():
        call = Call(node)
        parts.setdefault((call["weight"], dim), []).append(node)
        if isinstance(call["bias"], fx.Node):
            parts.setdefault((call["bias"], 0), []).append(node)
    for constant, dim in stream.constants.items():
        parts[constant, dim] = [user for user in constant.users if user in stream.values]
    for (constant, dim), readers in parts.items():
        tensor = tensor_of(graph, constant)
        exact = tensor.to(torch.float64)
        made = (exact - exact.mean(dim, keepdim=True)).to(tensor.dtype)
        put(graph, constant, readers, made, "center")


def put(
    graph: Graph, constant: fx.Node, readers: Iterable[fx.Node], tensor: Tensor, word: str
) -> None:
    """Let `readers` read another tensor in the place of a constant; who else reads it keeps the old one."""
    name = tensor_name(graph, constant) or ""
    if set(constant.users) == set(readers):
        rebind(graph, name, tensor, word)
        return
    origin = graph.origins[name]
    made = lift(graph, name, tensor, Origin(origin.source, (*origin.transforms, word)))
    for reader in readers:
        reader.replace_input_with(constant, made)


def fold_scale(graph: Graph, layer: fx.Node, factor: Tensor) -> None:
    call = Call(layer)
    for part in (call["weight"], call["bias"]):
        if isinstance(part, fx.Node):
            tensor = tensor_of(graph, part)
            shape = (-1, *[1] * (tensor.dim() - 1))
            put(graph, part, [layer], tensor * factor.reshape(shape), "layer-scale")


def _convert(graph: Graph, norm: fx.Node) -> None:
    call = Call(norm)
    gain, shift = call["weight"], call["bias"]
    value: Tensor = norm.meta["val"]
    size = value.shape[-1]
    if not isinstance(gain, fx.Node):
        name = f"{norm.name}.weight"
        gain = lift(graph, name, torch.ones(size, dtype=value.dtype), Origin(name, ("gain",)))
    eps = call["eps"]
    new = insert(graph, norm, aten.rms_norm.default, (call["input"], [size], gain, eps))
    if isinstance(shift, fx.Node):
        readers = _layers_behind(graph, norm) if is_constant(graph, shift) else None
        if readers is not None:
            for reader in readers:
                _fold_shift(graph, reader, tensor_of(graph, shift))
        else:
            new = insert(graph, norm, aten.add.Tensor, (new, shift))
    replace(graph, norm, new)


ROWS = ("view", "reshape", "slice", "select", "contiguous", "clone", "alias")


def _layers_behind(graph: Graph, value: fx.Node) -> list[fx.Node] | None:
    """The linear layers that read a value, rows moved or not; None where something else does."""
    found: list[fx.Node] = []
    for user in value.users:
        word = op_name(user) if user.op == "call_function" else user.op
        if word == "linear" and user.args[0] is value:
            call = Call(user)
            parts = [p for p in (call["weight"], call["bias"]) if p is not None]
            if not all(is_constant(graph, part) for part in parts):
                return None
            found.append(user)
        elif word in ROWS and user.meta["val"].shape[-1] == value.meta["val"].shape[-1]:
            more = _layers_behind(graph, user)
            if more is None:
                return None
            found += more
        elif tensors_of(user.meta.get("val")) or word == "output":
            return None
    return found


def _fold_shift(graph: Graph, reader: fx.Node, shift: Tensor) -> None:
    """W (x + b) + c  =  W x + (W b + c)"""
    call = Call(reader)
    weight = tensor_of(graph, call["weight"])
    more = weight.to(torch.float64) @ shift.to(torch.float64)
    if isinstance(call["bias"], fx.Node):
        old = tensor_of(graph, call["bias"])
        put(graph, call["bias"], [reader], (old.to(torch.float64) + more).to(old.dtype), "shift")
        return
    name = tensor_name(graph, call["weight"]) or ""
    origin = Origin(graph.origins[name].source, ("shift",))
    bias = lift(graph, f"{name.removesuffix('.weight')}.bias", more.to(weight.dtype), origin)
    reader.args = (*reader.args[:2], bias)
