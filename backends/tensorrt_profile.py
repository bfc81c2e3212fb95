"""The sizes that an engine is for: least, usual and largest of every free dimension, by name."""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping, Sequence

from effc.backends.eager import ports
from effc.errors import RecipeError
from effc.ir.program import Graph

Sizes = tuple[int, int, int]
"""Of a free dimension: the least, the usual, for which kernels are chosen, and the largest."""

USUAL = {"batch": 8}
USUAL_SIZE, MOST_BATCH, MOST_SIZE = 128, 32, 512
"""Sizes of free dimensions where a recipe does not say: the usual one, and the largest."""

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def profile_of(graph: Graph, asked: Mapping[str, Sequence[int]]) -> dict[str, Sizes]:
    """Sizes by name. Raises RecipeError where what is asked does not fit."""
    sizes = [size for port in ports(graph)[0] for size in port.shape if isinstance(size, str)]
    words = list(dict.fromkeys(word for size in sizes for word in names_in(size)))
    if strange := [word for word in asked if word not in words]:
        raise RecipeError(
            f"targets.tensorrt.profile names {', '.join(strange)}, which is no free dimension of graph {graph.role!r}",
            hint=f"free dimensions: {', '.join(words) or 'none'}",
        )
    return {word: _sizes(graph, word, asked.get(word)) for word in words}


def _sizes(graph: Graph, word: str, asked: Sequence[int] | None) -> Sizes:
    top = graph.largest(word)
    most = MOST_BATCH if word == "batch" else MOST_SIZE
    most = min(most, top) if top is not None else most
    least, usual, most = asked or (1, min(USUAL.get(word, USUAL_SIZE), most), most)
    if not 0 <= least <= usual <= most or most < 1 or (top is not None and most > top):
        bound = f", at most {top}" if top is not None else ""
        raise RecipeError(
            f"targets.tensorrt.profile.{word}: {least}, {usual}, {most} are not sizes that ascend{bound}",
            hint=f"profile: {{{word}: [1, 8, 32]}} is the least, the usual and the largest",
        )
    return least, usual, most


def names_in(size: str) -> list[str]:
    """The free dimensions that a size is made of: `past + length` of two."""
    try:
        tree = ast.parse(size, mode="eval")
        _value(tree.body, dict.fromkeys(_names(tree), 1))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return [size]
    return _names(tree)


def _names(tree: ast.AST) -> list[str]:
    return list(dict.fromkeys(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)))


def _value(node: ast.AST, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Name(id=word):
            return sizes[word]
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return int(_OPERATORS[type(op)](_value(left, sizes), _value(right, sizes)))
    raise ValueError("no sum, product or quotient of sizes")


def shapes_of(shape: Sequence[int | str], profile: Mapping[str, Sizes]) -> list[tuple[int, ...]]:
    """The least, usual and largest shape of an input."""
    sides = [{word: sizes[k] for word, sizes in profile.items()} for k in range(3)]
    return [tuple(_size(size, side) for size in shape) for side in sides]


def _size(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    return sizes[size] if size in sizes else _value(ast.parse(size, mode="eval").body, sizes)


def written(profile: Mapping[str, Sizes]) -> str:
    """As it stands in the manifest: `batch=1,8,32;length=1,128,512`."""
    return ";".join(f"{name}={','.join(map(str, sizes))}" for name, sizes in profile.items())
