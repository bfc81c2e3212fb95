"""Sums over products in an engine of ONNX Runtime: which are products of matrices, and that they give the same."""

import onnx
import pytest
import torch
from graphs import distance, engine, normal
from torch import nn

import effc
from effc.backends.ort_products import read


class Summed(nn.Module):
    def __init__(self, equation):
        super().__init__()
        self.equation = equation

    def forward(self, x, y):
        return torch.einsum(self.equation, x, y)


def kinds(folder):
    return [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]


def traced(module, *shapes, dims=None):
    feeds = dict(zip("xy", (normal(*shape, seed=i) for i, shape in enumerate(shapes)), strict=True))
    return effc.trace(module, feeds, dims=dims or {}), feeds


@pytest.mark.parametrize(
    ("equation", "shapes", "transposes"),
    [
        ("bmcd,bncd->bmnc", ((2, 5, 3, 4), (2, 6, 3, 4)), 3),
        ("bmd,bdn->bmn", ((2, 5, 4), (2, 4, 6)), 0),
        ("bmd,bnd->bnm", ((2, 5, 4), (2, 6, 4)), 2),
        ("md,dn->mn", ((5, 4), (4, 6)), 0),
    ],
)
def test_a_product_of_matrices_is_one(equation, shapes, transposes, tmp_path):
    program, feeds = traced(Summed(equation), *shapes)
    with engine(program, tmp_path) as run:
        found = run({name: x.numpy() for name, x in feeds.items()})["output"]
    assert distance(program.run(feeds)["output"], found) < 1e-6
    assert "Einsum" not in kinds(tmp_path) and kinds(tmp_path).count("Transpose") <= transposes


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bmd,bnd->bmnd", ((2, 5, 4), (2, 6, 4))),
        ("mde,nde->mn", ((5, 4, 2), (6, 4, 2))),
        ("md,nd->n", ((5, 4), (6, 4))),
        ("md,nd->mn", ((5, 1), (6, 4))),
    ],
)
def test_any_other_sum_stays_as_it_was_and_gives_the_same(equation, shapes, tmp_path):
    program, feeds = traced(Summed(equation), *shapes)
    with engine(program, tmp_path) as run:
        found = run({name: x.numpy() for name, x in feeds.items()})["output"]
    assert distance(program.run(feeds)["output"], found) < 1e-6
    if shapes[0][-1] == shapes[1][-1]:
        assert read(equation) is None


@pytest.mark.parametrize(
    "equation", ["...md,nd->...mn", "mm,mn->mn", "md,dn", "md,dn,nk->mk", "mb,bn->mbn"]
)
def test_what_is_no_product_of_matrices(equation):
    assert read(equation) is None


def test_a_value_that_several_products_read_is_turned_once(tmp_path):
    class Twice(nn.Module):
        def forward(self, x, y):
            a = torch.einsum("bmcd,bncd->bmnc", x, y)
            b = torch.einsum("bmcd,bncd->bmnc", -x, y)
            return torch.where(a > 0, a, b + 1)

    dims = {name: {0: "batch", 1: side} for name, side in (("x", "rows"), ("y", "columns"))}
    program, _ = traced(Twice(), (2, 5, 3, 4), (2, 6, 3, 4), dims=dims)
    feeds = {"x": normal(3, 7, 3, 4, seed=5), "y": normal(3, 2, 3, 4, seed=6)}
    with engine(program, tmp_path) as run:
        found = run({name: x.numpy() for name, x in feeds.items()})["output"]
    assert distance(program.run(feeds)["output"], found) < 1e-6
    assert kinds(tmp_path).count("MatMul") == 2
    assert kinds(tmp_path).count("Transpose") == 5  # of x, of −x, of y once, and of both tables
