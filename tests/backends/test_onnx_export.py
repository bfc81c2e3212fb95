"""Operators that torch's exporter decomposes or casts by tracing again mean the same when it does not."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graphs import Call, normal
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.fx import passes

import effc
from effc.backends.onnx import to_onnx
from effc.backends.onnx_export import settle

X = normal(3, 4)
WHOLE = torch.arange(12).reshape(3, 4)


def computed(module, feeds):
    """What a file of the graph gives, run node by node, and what torch gives."""
    program = effc.trace(module, {name: value.clone() for name, value in feeds.items()})
    model = ir.serde.serialize_model(to_onnx(program.only(), 21))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {name: value.numpy() for name, value in feeds.items()})
    wanted = [value.numpy() for value in program.run(**feeds).values()]
    return found, wanted


def agrees(module, feeds):
    found, wanted = computed(module, feeds)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


ALONE = {
    "to its own type": lambda self, x: x.to(torch.float32) + 1,
    "to another type": lambda self, x: x.to(torch.int32),
    "to another and back": lambda self, x: x.double().to(x.dtype) * 2,
    "output is a conversion": lambda self, x: (x * 2).to(torch.float32),
    "output is the input converted": lambda self, x: (x.to(torch.float32), x + 1),
    "and": lambda self, x: ((x > 0) & (x < 1)).float(),
    "or, xor": lambda self, x: (((x > 0) | (x < -1)) ^ (x > 1)).float(),
    "an integer factor": lambda self, x: x * 2 - 1,
    "power": lambda self, x: x**2 + x.abs().pow(1.5),
    "mean over axes": lambda self, x: x.mean([0, 1], keepdim=True),
    "cat of types": lambda self, x: torch.cat([x, (x > 0).long(), x.to(torch.int32)]),
    "where of types": lambda self, x: torch.where(x > 0, x, 0),
    "parts of it are known": lambda self, x: torch.nn.functional.softplus(x).addcdiv(x, x.exp()),
    "halves": lambda self, x: torch.cat([-x[..., 2:], x[..., :2]], -1),
}


@pytest.mark.parametrize("forward", ALONE.values(), ids=ALONE)
def test_it_computes_what_torch_computes(forward):
    agrees(Call(forward), {"x": X})


WHOLES = {
    "times a float": lambda self, n: n * 0.5,
    "true division": lambda self, n: n / 4,
    "plus floats": lambda self, n: n + n.float() * 1.5,
    "root": lambda self, n: torch.sqrt(n),
    "sum of booleans": lambda self, n: (n > 3).sum(-1),
    "mean": lambda self, n: n.float().mean(-1),
    "bits": lambda self, n: (n & 3) | 8,
    "int32 with int64": lambda self, n: n.to(torch.int32) + n,
    "shape": lambda self, n: n + n.shape[0],
    "shape with floats": lambda self, n: n.float() * n.shape[0],
}


@pytest.mark.parametrize("forward", WHOLES.values(), ids=WHOLES)
def test_whole_numbers_become_what_torch_makes_of_them(forward):
    agrees(Call(forward), {"x": WHOLE})


def test_nothing_is_traced_again_where_every_operator_is_known(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("traced again")

    monkeypatch.setattr(_fx_passes, "decompose_with_registry", never)
    monkeypatch.setattr(passes, "InsertTypePromotion", never)
    module = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        agrees(module, {"src": normal(2, 5, 16)})
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_settling_leaves_a_graph_that_computes_the_same():
    forward = ALONE["output is the input converted"]
    program = effc.trace(Call(forward), X)
    exported = program.only().clone().exported
    settle(exported.graph)
    exported.graph.lint()
    assert not [n for n in exported.graph.nodes if "aten.to." in str(n.target)]
    for mine, theirs in zip(exported.module()(x=X), forward(None, X), strict=True):
        assert torch.equal(mine, theirs)
