"""Scalings that a layer or a norm in front takes up: the same numbers, no node more, and less lost in integers."""

import pytest
import torch
from graphs import Call, distance, normal
from torch import nn
from torch.nn import functional as F

import effc
from effc.backends.dialect import ONNX
from effc.calib.data import Batch
from effc.passes.quantize import Quantize
from effc.passes.smooth import Smooth

SIZE = 12


def uneven_rows(layer):
    """Every fifth row of a layer or norm fifty times as large as the others."""
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            if tensor is not None:
                tensor[::5] *= 50
    return layer


def convs(groups=1, between=F.relu):
    parts = {
        "a": uneven_rows(nn.Conv2d(3, SIZE, 3, padding=1)),
        "b": nn.Conv2d(SIZE, SIZE, 3, groups=groups, padding=1),
    }
    return Call(lambda self, x: self.b(between(self.a(x))), **parts), (2, 3, 8, 8)


def rectified():
    parts = {"a": uneven_rows(nn.Linear(8, SIZE)), "b": nn.Linear(SIZE, 4)}
    return Call(lambda self, x: self.b(F.relu(self.a(x))), **parts), (4, 8)


def normed(kind=nn.LayerNorm):
    parts = {"n": kind(SIZE), "b": nn.Linear(SIZE, 4), "c": nn.Linear(SIZE, 5)}
    if kind is nn.LayerNorm:
        nn.init.normal_(parts["n"].bias)
        uneven_rows(parts["n"])
    else:
        parts["n"].weight.data[::5] *= 50

    def run(self, x):
        value = self.n(x)
        return self.b(value), self.c(value)

    return Call(run, **parts), (4, SIZE)


def gated():
    parts = {"gate": nn.Linear(8, SIZE), "up": uneven_rows(nn.Linear(8, SIZE)), "down": nn.Linear(SIZE, 8)}  # fmt: skip
    return Call(lambda self, x: self.down(F.silu(self.gate(x)) * self.up(x)), **parts), (2, 3, 8)


def attention():
    parts = {"qkv"[i]: nn.Linear(8, SIZE) for i in range(3)} | {"o": nn.Linear(SIZE, 8)}
    uneven_rows(parts["v"])

    def run(self, x):
        q, k, v = (f(x).view(*x.shape[:2], 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.o(mixed.reshape(*x.shape[:2], SIZE))

    return Call(run, **parts), (2, 5, 8)


MODELS = {
    "conv": convs,
    "grouped": lambda: convs(groups=3),
    "depthwise": lambda: convs(groups=SIZE),
    "pooled": lambda: convs(between=lambda x: F.max_pool2d(F.relu(x), 2)),
    "rectified": rectified,
    "layer norm": normed,
    "rms norm": lambda: normed(nn.RMSNorm),
    "gated": gated,
    "attention": attention,
}


def traced(name):
    torch.manual_seed(0)
    module, shape = MODELS[name]()
    program = effc.trace(module.eval(), {"x": normal(*shape)}, dims={"x": {0: "batch"}})
    return program, shape


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_without_a_node_more_and_less_to_lose(name):
    program, shape = traced(name)
    rows = (64, *shape[1:])  # enough of them, see FEW
    data = [Batch(inputs={"x": normal(*rows, seed=seed).numpy()}) for seed in range(4)]
    smoothed = program.clone()
    record = effc.apply(Smooth(), smoothed, data, dialect=ONNX)
    x = normal(*shape, seed=9)
    wanted = program.run(x=x)
    assert record.sites and record.nodes[0] == record.nodes[1]
    assert all(torch.equal(wanted[n], v) for n, v in smoothed.run(x=x).items())
    lost = []
    for each in (program, smoothed):
        effc.apply(Quantize(), each, data, dialect=ONNX)
        found = each.run(x=x)
        lost.append(max(distance(wanted[n], found[n]) for n in wanted))
    assert lost[1] < lost[0]


def _both_read(self, x):
    value = F.relu(self.a(x))
    return self.b(value) + value


def _not_homogeneous(self, x):
    return self.b(F.gelu(self.a(x)))


def _shared(self, x):
    return self.b(F.relu(F.linear(self.a(x), self.a.weight, self.a.bias)))


def _squared(self, x):
    value = F.relu(self.a(x))
    return self.b(value * value)


def _is_key_too(self, x):
    value = self.a(x).view(x.shape[0], 1, 3, 4).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(value, value, value)
    return self.b(mixed.transpose(1, 2).reshape(x.shape[0], 1, SIZE).squeeze(1))


@pytest.mark.parametrize("run", [_both_read, _not_homogeneous, _shared, _squared, _is_key_too])
def test_nothing_takes_it_up_where_something_else_would_see_it(run):
    parts = {"a": uneven_rows(nn.Linear(SIZE, SIZE)), "b": nn.Linear(SIZE, SIZE)}
    program = effc.trace(Call(run, **parts).eval(), {"x": normal(4, SIZE)})
    data = [Batch(inputs={"x": normal(4, SIZE).numpy()})]
    assert Smooth().resolve(ONNX).sites(program.only()) == []
    assert effc.apply(Smooth(), program, data, dialect=ONNX).sites == 0


def test_rows_of_a_convolution_without_a_batch_are_no_channels():
    parts = {"a": uneven_rows(nn.Conv1d(SIZE, SIZE, 1)), "b": nn.Linear(SIZE, 4)}
    module = Call(lambda self, x: self.b(F.relu(self.a(x))), **parts)
    program = effc.trace(module.eval(), {"x": normal(SIZE, SIZE)})
    assert Smooth().resolve(ONNX).sites(program.only()) == []


def test_a_picture_without_a_batch_is_left_alone():
    module, _ = convs()
    program = effc.trace(module.eval(), {"x": normal(3, 8, 8)})
    assert Smooth().resolve(ONNX).sites(program.only()) == []
