"""What lies in front of a value and can take up a scaling of its channels, which then costs nothing at run time.

    relu(W x + b) / s  =  relu((W / s) x + b / s)        rows of W and b by channel, s > 0

Known as cross-layer equalisation (Nagel et al. 2019, section 4.1). Norms give their gain and shift, layers their rows;
between them and the value may lie what a positive factor passes through: a rectifier, pooling, a gate, attention.
"""

from __future__ import annotations

from typing import Any, cast

from torch import fx

from effc.ir.edit import is_constant
from effc.ir.program import Graph
from effc.ir.select import op_name

HOMOGENEOUS = ("relu", "relu_", "dropout", "contiguous", "clone")
"""f(x / s) = f(x) / s for every positive s, value by value."""
POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
RESHAPES = ("view", "reshape", "_unsafe_view")


def owners(graph: Graph, value: fx.Node, axis: int) -> list[fx.Node]:
    """Constants to divide by s along their first axis, so that `value` is divided by s along `axis`; none where
    nothing in front takes it up. Each is read by one node only. That nothing else reads `value` is the caller's care.
    """
    if axis < 0:
        axis += value.meta["val"].dim()
    last = value.meta["val"].dim() - 1
    args: Any = value.args
    match op_name(value):
        case "linear" if axis == last:
            return _own(graph, args[1:3])
        case "conv1d" | "conv2d" if axis == 1 and args[1].meta["val"].dim() == last + 1:
            return _own(graph, args[1:3])
        case "layer_norm" if axis == last and len(args[1]) == 1:
            return _own(graph, args[2:4])
        case "rms_norm" if axis == last and len(args[1]) == 1:
            return _own(graph, args[2:3])
        case word if word in HOMOGENEOUS:
            return _alone(graph, args[0], axis)
        case word if word in POOLS and axis == 1:
            return _alone(graph, args[0], axis)
        case "mul" if args[0] is not args[1] and all(_same_shape(value, side) for side in args):
            return _alone(graph, args[1], axis) or _alone(graph, args[0], axis)
        case word if word in RESHAPES and axis == last:
            made = values_of_attention(value)
            return [] if made is None else _alone(graph, made, made.meta["val"].dim() - 1)
    return []


def _alone(graph: Graph, value: fx.Node, axis: int) -> list[fx.Node]:
    return owners(graph, value, axis) if len(value.users) == 1 else []


def _own(graph: Graph, parts: tuple[Any, ...]) -> list[fx.Node]:
    found = [part for part in parts if part is not None]
    own = all(
        isinstance(part, fx.Node)
        and is_constant(graph, part)
        and len(part.users) == 1
        and part.meta["val"].is_floating_point()
        for part in found
    )
    return found if own and parts and parts[0] is not None else []


def _same_shape(value: fx.Node, side: Any) -> bool:
    return isinstance(side, fx.Node) and side.meta["val"].shape == value.meta["val"].shape


def values_of_attention(value: fx.Node) -> fx.Node | None:
    """What made the values, where `value` is attention with its heads side by side again, channel by channel alike."""
    attention = _turned(value.args[0])
    if attention is None or op_name(attention) != "scaled_dot_product_attention":
        return None
    query, key, values = cast("tuple[Any, ...]", attention.args[:3])
    if values in (query, key):
        return None
    split = _turned(values)
    if split is None or op_name(split) not in RESHAPES:
        return None
    made: Any = split.args[0]
    _, heads, _, size = values.meta["val"].shape
    rows = made.meta["val"].shape
    same = attention.meta["val"].shape[1] == heads and attention.meta["val"].shape[3] == size
    if not same or rows[-1] != heads * size or value.meta["val"].shape[-1] != rows[-1]:
        return None
    return made if isinstance(made, fx.Node) else None


def _turned(value: Any) -> fx.Node | None:
    """What `transpose(…, 1, 2)` reads, past what only copies; nothing else may read what lies between."""
    turns = 0
    while len(value.users) == 1 and value.meta["val"].dim() == 4:
        word, inner = op_name(value), value.args[0] if value.args else None
        if word == "transpose" and set(value.args[1:]) == {1, 2} and not turns:
            turns += 1
        elif word not in ("contiguous", "clone") and not (
            word in RESHAPES and _same_shape(value, inner)
        ):
            return value if turns else None
        value = inner
    return None
