"""Sums over products that are a product of matrices, written as one: ONNX Runtime computes an Einsum one by one.

    einsum("bmcd,bncd->bmnc", x, y) = T(matmul(T(x) [b, c, m, d], T(y) [b, c, d, n]) [b, c, m, n]) [b, m, n, c]

An Einsum lays its factors out anew for itself. Transposes that stand in the graph are made once for all products that
read a value, and the runtime moves them to where they cost least. Of tables of [N, N] pairs with a few classes each,
N 241, products took 3.4 ms each as Einsum and 1.3 ms so (onnxruntime 1.32).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from effc.backends.onnx_match import swap


@dataclass(frozen=True, kw_only=True)
class Letters:
    """The letters of an equation of two factors, by what they are in the product of matrices."""

    left: str
    right: str
    out: str
    batch: str
    row: str
    inner: str
    column: str


def products_of_matrices(graph: ir.Graph) -> None:
    """Every Einsum that is a product of matrices, row by row of what both factors have → MatMul."""
    made: dict[tuple[ir.Value, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        if node.op_type != "Einsum" or len(node.inputs) != 2:
            continue
        left, right = node.inputs
        letters = read(node.attributes["equation"].as_string())
        if (
            left is None
            or right is None
            or letters is None
            or not _is_one_size(left, right, letters)
        ):
            continue
        of = (
            letters.batch + letters.row + letters.inner,
            letters.batch + letters.inner + letters.column,
        )
        factors = [
            _turned(graph, node, value, _places(letter, wanted), made)
            for value, letter, wanted in (
                (left, letters.left, of[0]),
                (right, letters.right, of[1]),
            )
        ]
        product = ir.Node("", "MatMul", factors, name=node.name)
        back = _places(letters.batch + letters.row + letters.column, letters.out)
        if back == tuple(range(len(back))):
            swap(node, product, graph, [node])
            continue
        product.outputs[0].name = f"{node.outputs[0].name}_product"
        graph.insert_before(node, product)
        swap(node, _transpose(product.outputs[0], back), graph, [node])


def read(equation: str) -> Letters | None:
    """The letters of an equation that is a product of matrices; None for any other."""
    factors, arrow, out = equation.replace(" ", "").partition("->")
    left, _, right = factors.partition(",")
    if not arrow or not (left + right + out).isalpha():
        return None
    if any(len(set(word)) != len(word) for word in (left, right, out)):
        return None
    both = [x for x in left if x in right]
    inner = "".join(x for x in both if x not in out)
    row, column = (
        "".join(x for x in left if x not in both),
        "".join(x for x in right if x not in both),
    )
    if len(inner) != 1 or len(row) != 1 or len(column) != 1 or not {row, column} <= set(out):
        return None
    batch = "".join(x for x in out if x in both)
    return Letters(
        left=left, right=right, out=out, batch=batch, row=row, inner=inner, column=column
    )


def _is_one_size(left: ir.Value, right: ir.Value, letters: Letters) -> bool:
    """Whether what is summed over has one size in both factors: an Einsum would repeat a single one."""
    if left.shape is None or right.shape is None:
        return False
    return bool(
        left.shape[letters.left.index(letters.inner)]
        == right.shape[letters.right.index(letters.inner)]
    )


def _places(letters: str, wanted: str) -> tuple[int, ...]:
    return tuple(letters.index(x) for x in wanted)


def _turned(
    graph: ir.Graph,
    before: ir.Node,
    value: ir.Value,
    places: tuple[int, ...],
    made: dict[tuple[ir.Value, tuple[int, ...]], ir.Value],
) -> ir.Value:
    """A value with its axes in other places, as it was made for an earlier reader where there is one."""
    if places == tuple(range(len(places))):
        return value
    if (value, places) not in made:
        node = _transpose(value, places)
        node.outputs[0].name = f"{value.name}_{''.join(map(str, places))}"
        graph.insert_before(before, node)
        made[value, places] = node.outputs[0]
    return made[value, places]


def _transpose(value: ir.Value, places: Sequence[int]) -> ir.Node:
    return ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", places)])
