"""Floating point codes of 8 bit: the grid, the graph, the ONNX, and who may ask for them."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graphs import Attention, batches, distance, engine, normal, quantize
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import effc
from effc.backends.dialect import ONNX, OPENVINO, ORT, TENSORRT
from effc.backends.emulate import integer_products
from effc.errors import PreconditionError
from effc.passes.quantize import Quantize
from effc.quant import affine
from effc.quant.scheme import FP8_MAX, Scheme

pytestmark = pytest.mark.slow

FP8 = Scheme(fp8=True, axis=0)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=40))
def test_a_number_becomes_the_nearest_of_the_grid(numbers):
    x = torch.tensor([numbers])
    scale, zero = affine.weight_qparams(x, FP8)
    codes = affine.quantize(x, scale, zero, FP8)
    assert codes.dtype == zero.dtype == torch.float8_e4m3fn
    assert float(codes.float().abs().max()) <= FP8_MAX
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()] * scale
    nearest = (x[0, :, None] - grid).abs().amin(1)
    made = affine.dequantize(codes, scale, zero, FP8)[0]
    assert torch.allclose((x[0] - made).abs(), nearest, rtol=1e-5, atol=1e-6 * float(scale))


def test_the_largest_magnitude_is_the_last_code():
    scale, zero = affine.qparams(torch.tensor(-7.0), torch.tensor(3.5), Scheme(fp8=True))
    assert float(scale) == pytest.approx(7 / FP8_MAX)
    assert float(affine.quantize(torch.tensor([-7.0]), scale, zero, Scheme(fp8=True))) == -FP8_MAX


def made(module=None, **options):
    torch.manual_seed(0)
    program = effc.trace((module or Attention()).eval(), normal(2, 6, 32))
    exact = program.clone()
    quantize(program, batches("x", 2, 6, 32), dialect=TENSORRT, dtype="fp8", **options)
    return exact, program


def test_weights_and_activations_are_codes_of_8_bit_and_little_is_lost():
    exact, program = made()
    types = [t.dtype for t in program.only().tensors().values()]
    assert (
        types.count(torch.float8_e4m3fn) == 4 + 4 + 2
    )  # weights and their zero points, and those of two values
    x = normal(2, 6, 32, seed=7)
    gap = distance(exact.run(x=x)["output"], program.run(x=x)["output"])
    assert 1e-4 < gap < 0.06
    assert integer_products(program.only()) == []


def test_a_wide_range_costs_less_than_in_integers():
    """A grid with exponents is as fine for small numbers beside a large one; 255 even steps are not."""
    layer = nn.Linear(32, 8)
    x = normal(64, 32)
    x[:, 0] *= 300
    layer.weight.data[:, 0] /= 300
    gaps = {}
    for dtype in ("int", "fp8"):
        program = effc.trace(layer, x)
        quantize(
            program, [effc.Batch(inputs={"input": x.numpy()})], dialect=TENSORRT, dtype=dtype,
            range="minmax",
        )  # fmt: skip
        gaps[dtype] = distance(layer(x).detach(), program.run(input=x)["output"])
    assert gaps["fp8"] < gaps["int"] / 3


def test_onnx_computes_the_same(tmp_path):
    _, program = made()
    x = normal(2, 6, 32, seed=7)
    with engine(program, tmp_path, "onnx") as opened:
        found = opened({"x": x.numpy()})["output"]
    assert distance(program.run(x=x)["output"], found) < 1e-2
    model = ir.load(tmp_path / "model.onnx")
    kinds = [t.dtype for t in model.graph.initializers.values()]
    assert kinds.count(ir.DataType.FLOAT8E4M3FN) >= 4
    assert not any(n.op_type == "Clip" for n in model.graph)


@pytest.mark.parametrize("options", [{"bits": 4}, {"activation_bits": 16}, {"group": 8}])
def test_what_fp8_does_not_have_is_refused(options):
    with pytest.raises(PreconditionError, match="fp8"):
        made(**options)


@pytest.mark.parametrize("dialect", [ORT, OPENVINO])
def test_processors_have_no_kernels_for_it(dialect):
    with pytest.raises(PreconditionError, match=f"{dialect.name} has no kernels for dtype fp8"):
        Quantize(dtype="fp8").resolve(dialect)
    assert Quantize(dtype="fp8").resolve(ONNX).dtype == "fp8"


def test_replaying_decisions_gives_the_same_codes():
    _, program = made()
    torch.manual_seed(0)
    again = effc.trace(Attention().eval(), normal(2, 6, 32))
    record = quantize(again, batches("x", 2, 6, 32), dialect=TENSORRT, dtype="fp8")
    assert record.decisions
    x = normal(2, 6, 32, seed=7)
    assert np.array_equal(program.run(x=x)["output"], again.run(x=x)["output"])


def test_a_rectifier_in_front_of_a_quantise_node_stays(tmp_path):
    """onnxruntime takes it for superfluous there, as it would be in front of uint8."""
    from effc.backends.onnx import save, to_onnx
    from effc.backends.onnx_widen import open_widened

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = normal(8, 32)
    program = effc.trace(module, x)
    data = [effc.Batch(inputs={"input": x.numpy()})]
    quantize(program, data, dialect=TENSORRT, dtype="fp8")
    (file, *_) = save(to_onnx(program.only(), 21), tmp_path)
    with open_widened(tmp_path / file, 1) as engine:
        found = engine({"input": x.numpy()})["output"]
    assert distance(program.run(input=x)["output"], found) < 1e-3
