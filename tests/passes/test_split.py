"""Halves of a concatenation with grids of their own: exact by itself, and one integer convolution behind `quantize`."""

import numpy as np
import pytest
import torch
from torch import nn

import effc
from effc.backends.dialect import DIALECTS
from effc.backends.eager import GraphEngine
from effc.backends.ort import Ort
from effc.calib.data import Batch
from effc.ir.select import op_name
from effc.ir.trace import trace
from effc.passes.quantize import Quantize
from effc.passes.split import SplitConcat


class Shortcut(nn.Module):
    """A 1 x 1 convolution over what comes from below and what was kept, beside another reader of both."""

    def __init__(self, groups=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(12, 6, 1, groups=groups)
        self.norm = nn.GroupNorm(3, 12)

    def forward(self, deep, skip):
        both = torch.cat([deep, skip], 1)
        return self.conv(both), self.norm(both)


def drawn(ratio, seed=0, count=16):
    draw = torch.Generator().manual_seed(seed)
    deep, skip = (
        torch.randn(count, 8, 6, 6, generator=draw),
        torch.randn(count, 4, 6, 6, generator=draw),
    )
    return {"deep": deep, "skip": skip * ratio}


def traced(module=None, ratio=0.01):
    return trace(module or Shortcut(), drawn(ratio, count=2))


def batches(ratio):
    return [
        Batch(inputs={n: v.numpy() for n, v in drawn(ratio, seed).items()}) for seed in range(3)
    ]


def run(program, ratio):
    feeds = {n: v.numpy() for n, v in drawn(ratio, 9).items()}
    return list(GraphEngine(program.only())(feeds).values())


def error(ratio, split, bits=8, dialect="ort"):
    """Relative L2 of the convolution in integers, with halves whose weights even out their sizes."""
    module = Shortcut()
    with torch.no_grad():
        module.conv.weight[:, 8:] /= ratio
    program = traced(module, ratio)
    wanted = run(program, ratio)[0]
    if split:
        effc.apply(SplitConcat(bits=bits), program, batches(ratio))
    effc.apply(Quantize(bits=bits), program, batches(ratio), dialect=DIALECTS[dialect])
    return np.linalg.norm(run(program, ratio)[0] - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("ratio", [0.01, 0.3, 50.0])
def test_a_split_computes_the_same_numbers(ratio):
    program = traced(ratio=ratio)
    before = run(program, ratio)
    record = effc.apply(SplitConcat(), program, batches(ratio))
    assert record.sites == 1
    ((_, power),) = record.decisions.items()
    assert np.sign(power) == (1 if ratio < 1 else -1)
    for found, wanted in zip(run(program, ratio), before, strict=True):
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_halves_of_one_size_are_left():
    program = traced(ratio=1.0)
    assert effc.apply(SplitConcat(), program, batches(1.0)).sites == 0


@pytest.mark.parametrize("ratio", [0.005, 200.0])
@pytest.mark.parametrize("dialect", ["ort", "openvino"])
def test_the_smaller_half_has_codes_of_its_own(ratio, dialect):
    assert error(ratio, True, dialect=dialect) < 0.1 * error(ratio, False, dialect=dialect)


def test_codes_are_joined_and_no_multiplication_is_left():
    program = traced()
    effc.apply(SplitConcat(), program, batches(0.01))
    joined, scaled = program.clone(), program.clone()
    effc.apply(Quantize(), joined, batches(0.01), dialect=DIALECTS["ort"])
    effc.apply(Quantize(joins_codes=False), scaled, batches(0.01), dialect=DIALECTS["ort"])
    assert "mul" not in {op_name(n) for n in joined.only().nodes}
    assert "mul" in {op_name(n) for n in scaled.only().nodes}
    for found, wanted in zip(run(joined, 0.01), run(scaled, 0.01), strict=True):
        assert np.array_equal(found, wanted)


def test_it_is_one_integer_convolution_on_onnxruntime(tmp_path):
    class Next(Shortcut):
        def forward(self, deep, skip):
            return torch.relu(self.conv(torch.cat([deep, skip], 1))).mean((2, 3))

    program = traced(Next())
    effc.apply(SplitConcat(), program, batches(0.01))
    effc.apply(Quantize(), program, batches(0.01), dialect=DIALECTS["ort"])
    lowered = Ort().lower(program.only(), tmp_path)
    (site,) = lowered.sites
    assert site.int8 and site.kernel == "QLinearConv"
    feeds = {n: v.numpy() for n, v in drawn(0.01, 9).items()}
    with Ort().open(lowered, threads=1) as engine:
        (found,), (wanted,) = engine(feeds).values(), run(program, 0.01)
        assert np.abs(found - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_groups_and_other_concatenations_are_left():
    class Other(Shortcut):
        def forward(self, deep, skip):
            return self.conv(torch.cat([deep, skip[:, :2], skip[:, 2:]], 1))

    assert effc.apply(SplitConcat(), traced(Shortcut(groups=2)), batches(0.01)).sites == 0
    assert effc.apply(SplitConcat(), traced(Other()), batches(0.01)).sites == 0
