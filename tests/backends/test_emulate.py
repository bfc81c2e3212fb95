"""Sums of integers, held to what kernels of ONNX Runtime whose arithmetic is known give."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from graphs import Attention, Call, batches, distance, normal, quantize
from torch import nn

import effc
from effc.backends.dialect import ORT, TENSORRT
from effc.backends.emulate import emulated, integer_products
from effc.errors import LoweringError
from effc.quant.ops import QUANTIZE


def traced(module, *shape):
    torch.manual_seed(0)
    call = Call(lambda self, x: self.f(x), f=module)
    return effc.trace(call.eval(), {"x": normal(*shape)})


def codes_read_by(graph, node, feeds):
    """Integer input, weight and zero points of a layer, as the graph has them."""
    seen = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            seen[n] = super().run_node(n)
            return seen[n]

    with torch.no_grad():
        Watch(graph.exported.graph_module).run(*graph.arguments(feeds))
    return [seen[part] for pair in node.args[:2] for part in (pair.args[0], pair.args[2])]


@pytest.mark.parametrize("dialect", [ORT, TENSORRT], ids=lambda d: d.name)
def test_sums_are_those_of_matmul_integer(dialect):
    program = traced(nn.Linear(48, 20), 6, 48)
    quantize(program, batches("x", 6, 48), dialect=dialect)
    graph, feeds = program.only(), {"x": normal(6, 48, seed=7)}
    (node,) = integer_products(graph)
    x, x_zero, weight, w_zero = (t.numpy() for t in codes_read_by(graph, node, feeds))
    kinds = [ir.DataType.from_numpy(a.dtype) for a in (x, weight)]
    names = ("x", "w", "xz", "wz")
    values = [
        ir.Value(name=n, type=ir.TensorType(kinds[i % 2]), shape=ir.Shape(s))
        for i, (n, s) in enumerate(zip(names, (x.shape, weight.T.shape, (), (20,)), strict=True))
    ]
    made = ir.node("MatMulInteger", values)
    made.outputs[0].name = "y"
    made.outputs[0].type = ir.TensorType(ir.DataType.INT32)
    model = ir.Model(
        ir.Graph(values, made.outputs, nodes=[made], opset_imports={"": 21}), ir_version=10
    )
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    given = {"x": x, "w": np.ascontiguousarray(weight.T), "xz": x_zero, "wz": w_zero}
    (wanted,) = session.run(None, given)
    sums = {}
    emulated(graph, feeds, sums)
    assert np.array_equal(sums[node.name].numpy(), wanted)
    assert np.abs(wanted).max() > 1000


def test_a_whole_model_is_close_to_its_graph_and_no_further_than_rounding():
    program = traced(Attention(32, 4), 2, 5, 32)
    quantize(program, batches("x", 2, 5, 32), dialect=TENSORRT)
    x = {"x": normal(2, 5, 32, seed=3)}
    (wanted,), (found,) = program.run(x).values(), emulated(program.only(), x).values()
    assert len(integer_products(program.only())) == 4
    assert distance(wanted, found) < 2e-2  # codes flip at borders of rounding


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_convolutions_in_groups_and_integer_biases(groups):
    program = traced(nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups), 2, 8, 9, 9)
    quantize(program, batches("x", 2, 8, 9, 9), dialect=ORT, conv_output=False)
    x = {"x": normal(2, 8, 9, 9, seed=3)}
    (wanted,), (found,) = program.run(x).values(), emulated(program.only(), x).values()
    assert distance(wanted, found) < 1e-6


def test_a_graph_without_integers_is_itself():
    program = traced(Attention(32, 4), 2, 5, 32)
    x = {"x": normal(2, 5, 32)}
    assert torch.equal(program.run(x)["output"], emulated(program.only(), x)["output"])


def test_weights_alone_are_no_integer_products():
    program = traced(nn.Linear(32, 8), 4, 32)
    quantize(program, dialect=TENSORRT, activation_bits=16)
    assert integer_products(program.only()) == []


def test_a_sum_beyond_32_bit_is_refused():
    program = traced(nn.Linear(300_000, 1, bias=False), 1, 300_000)
    data = [effc.Batch(inputs={"x": np.ones((1, 300_000), np.float32)})]
    for tensor in program.only().tensors().values():
        tensor.fill_(1.0)
    quantize(program, data, dialect=TENSORRT, range="minmax")
    assert any(n.target is QUANTIZE for n in program.only().nodes)
    with pytest.raises(LoweringError, match="32 bit"):
        emulated(program.only(), {"x": torch.ones(1, 300_000)})
