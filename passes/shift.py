"""What lies in front of a value and can take up an offset of its channels, which then costs nothing at run time.

    layer norm (x) + n  =  layer norm with beta + n            linear (x) + n  =  linear with bias + n
    softmax (s) · (v + n)  =  softmax (s) · v + n              a row of softmax sums to 1: the values' bias takes it

Between them may lie what only moves rows about. A pad does not: what it writes is 0 and not n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.edit import insert, is_constant, lift, tensor_name, tensor_of
from effc.ir.program import Graph, Origin
from effc.ir.select import op_name
from effc.passes.absorb import RESHAPES, values_of_attention

aten = torch.ops.aten
KEEPS_ROWS = ("dropout", "contiguous", "clone", "unsqueeze", "roll")
MOVES_ROWS = ("slice", "select", "transpose", "permute", "index_select", "flip")


@dataclass(frozen=True)
class Owner:
    """A node whose argument `place` is a constant that takes up an offset, times `sign`; None may stand there yet."""

    node: fx.Node
    place: int
    sign: int = 1


def owner(graph: Graph, value: fx.Node) -> Owner | None:
    """Who takes up an offset of the last axis of `value`; None where nothing in front does.

    That nothing else reads `value` is the caller's care.
    """
    args: Any = value.args
    match op_name(value):
        case "linear" if len(args) > 2 and is_constant(graph, args[2]):
            return Owner(value, 2)
        case "layer_norm" if len(args[1]) == 1 and len(args) > 2 and args[2] is not None:
            free = len(args) < 4 or args[3] is None or is_constant(graph, args[3])
            return Owner(value, 3) if free else None
        case "add" | "sub" if not value.kwargs and _is_row(graph, args[1], value):
            return Owner(value, 1, -1 if op_name(value) == "sub" else 1)
        case "add" if not value.kwargs and _is_row(graph, args[0], value):
            return Owner(value, 0)
        case word if word in (*RESHAPES, *KEEPS_ROWS, *MOVES_ROWS, "flatten") and _has_rows(value):
            return _alone(graph, args[0])
        case word if word in RESHAPES:
            made = values_of_attention(value)
            return None if made is None else _alone(graph, made)
    return None


def _alone(graph: Graph, value: fx.Node) -> Owner | None:
    return owner(graph, value) if len(value.users) == 1 else None


def _is_row(graph: Graph, part: Any, value: fx.Node) -> bool:
    """Whether an operand is a constant with a value for every channel, or one for all."""
    if not isinstance(part, fx.Node) or not is_constant(graph, part):
        return False
    found = part.meta["val"]
    return bool(found.is_floating_point()) and found.dim() <= value.meta["val"].dim()


def _has_rows(value: fx.Node) -> bool:
    """Whether rows of the last axis are rows of what the node reads, in another order or fewer."""
    args: Any = value.args
    source = args[0].meta["val"]
    last, size = source.dim() - 1, source.shape[-1]
    if not last or not value.meta["val"].dim() or value.meta["val"].shape[-1] != size:
        return False

    def axes(found: Any) -> set[int]:
        each = found if isinstance(found, list | tuple) else (found,)
        return {int(axis) % source.dim() for axis in each}

    match op_name(value):
        case "slice" | "select" | "index_select":
            return last not in axes(args[1] if len(args) > 1 else 0)
        case "transpose":
            return last not in axes(args[1:3])
        case "permute":
            return bool(int(args[1][-1]) % source.dim() == last)
        case "roll":
            return len(args) > 2 and bool(args[2]) and last not in axes(args[2])
        case "flip":
            return last not in axes(args[1])
        case "unsqueeze":
            return bool(int(args[1]) % (source.dim() + 1) <= last)
        case _:
            return True


def shift(
    graph: Graph, key: str, value: fx.Node, offset: Tensor, at: Owner | None, before: fx.Node
) -> fx.Node:
    """Add `offset` [channels] to `value`: by its owner, or by a sum in front of `before`. Gives what is shifted.

    Constants are put anew beside the old ones, so what else reads those is left as it was.
    """
    stem = key.partition("/")[2].replace(":", ".")
    if at is None:
        name = lift(graph, f"{stem}_offset", offset, Origin(key, ("offset",)))
        return insert(graph, before, aten.add.Tensor, (value, name))
    args = list(at.node.args)
    args += [None] * (at.place + 1 - len(args))
    old: Any = args[at.place]
    if old is None:
        made, origin, stem = offset, Origin(key, ("offset",)), f"{stem}_beta"
    else:
        stem = tensor_name(graph, old) or ""
        made = tensor_of(graph, old) + at.sign * offset
        known = graph.origins[stem]
        origin = Origin(known.source, (*known.transforms, "offset"))
    args[at.place] = lift(graph, f"{stem}_shifted", made, origin)
    at.node.args = tuple(args)
    return value
