"""What rounding weights takes from the mean of a layer's output goes back into its bias."""

import pytest
import torch
from graphs import Call, distance, normal
from torch import nn

import effc
from effc.backends.dialect import ONNX, ORT
from effc.calib.data import Batch
from effc.passes.quantize import Quantize

SIZE = 24


def inputs(*shape, seed=0):
    """Numbers around three, as behind a rectifier: their mean matters."""
    return normal(*shape, seed=seed) + 3


def linear():
    return nn.Linear(SIZE, 16), (64, SIZE)


def conv(groups=1):
    return nn.Conv2d(SIZE, 2 * SIZE, 3, groups=groups), (4, SIZE, 8, 8)


def chained():
    parts = {"a": nn.Conv2d(4, 8, 3), "b": nn.Conv2d(8, 6, 3)}
    return Call(lambda self, x: self.b(torch.relu(self.a(x))), **parts), (4, 4, 9, 9)


MODELS = {
    "linear": linear,
    "conv": conv,
    "grouped": lambda: conv(4),
    "depthwise": lambda: conv(SIZE),
    "chained": chained,
}


def traced(make):
    torch.manual_seed(0)
    module, shape = make()
    data = [Batch(inputs={"x": inputs(*shape, seed=seed).numpy()}) for seed in range(4)]
    program = effc.trace(Call(lambda self, x: self.f(x), f=module).eval(), {"x": inputs(*shape)})
    return program, data, inputs(*shape, seed=9)


def quantised(program, data, dialect=ORT, **options):
    made = program.clone()
    record = effc.apply(Quantize(bits=4, **options), made, data, dialect=dialect)
    return made, record


def mean_gap(program, made, x):
    (wanted,), (found,) = program.run(x=x).values(), made.run(x=x).values()
    axes = [0, *range(2, wanted.dim())]
    return float((wanted - found).mean(axes).abs().mean())


@pytest.mark.slow
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("name", MODELS)
def test_the_mean_is_kept_and_less_is_lost(name, activation_bits):
    program, data, x = traced(MODELS[name])
    options = {"activation_bits": activation_bits}
    plain, _ = quantised(program, data, **options)
    corrected, _ = quantised(program, data, bias_correction=True, **options)
    assert mean_gap(program, corrected, x) < mean_gap(program, plain, x) / 3
    (wanted,), (was,), (now,) = (p.run(x=x).values() for p in (program, plain, corrected))
    assert distance(wanted, now) < distance(wanted, was)


def test_no_node_more():
    program, data, _ = traced(chained)
    plain, _ = quantised(program, data)
    corrected, _ = quantised(program, data, bias_correction=True)
    ops = [[str(n.target) for n in p.only().nodes] for p in (plain, corrected)]
    assert ops[0] == ops[1]


def test_a_layer_without_a_bias_stays_as_it_is():
    program, data, x = traced(lambda: (nn.Linear(SIZE, 16, bias=False), (64, SIZE)))
    plain, _ = quantised(program, data)
    corrected, record = quantised(program, data, bias_correction=True)
    assert not any(key.endswith(":mean") for key in record.decisions)
    assert torch.equal(plain.run(x=x)["output"], corrected.run(x=x)["output"])


def test_a_bias_that_two_layers_share_is_corrected_for_each():
    shared = nn.Parameter(normal(SIZE))

    def run(self, x):
        first = nn.functional.linear(x, self.a, self.bias)
        return nn.functional.linear(first, self.b, self.bias)

    parts = {"a": nn.Parameter(normal(SIZE, SIZE)), "b": nn.Parameter(normal(SIZE, SIZE, seed=1))}
    program, data, x = traced(lambda: (Call(run, bias=shared, **parts), (64, SIZE)))
    plain, _ = quantised(program, data)
    corrected, _ = quantised(program, data, bias_correction=True)
    assert mean_gap(program, corrected, x) < mean_gap(program, plain, x)


def test_a_value_that_a_convolution_and_a_linear_layer_read_has_means_along_both_axes():
    parts = {"a": nn.Conv1d(8, 8, 1), "b": nn.Linear(8, 6)}
    program, data, x = traced(
        lambda: (Call(lambda self, x: (self.a(x).mean(-1), self.b(x).mean(1)), **parts), (4, 8, 8))
    )
    made, record = quantised(program, data, bias_correction=True)
    assert len([key for key in record.decisions if ":mean" in key]) == 2
    plain, _ = quantised(program, data)
    for name, wanted in program.run(x=x).items():
        was, now = (float((wanted - p.run(x=x)[name]).mean(0).abs().mean()) for p in (plain, made))
        assert now < was / 2


def test_means_are_recorded_and_replayed():
    program, data, x = traced(conv)
    options = {"bits": 4, "bias_correction": True}
    made, record = quantised(program, data, bias_correction=True, dialect=ONNX)
    again = program.clone()
    effc.apply(Quantize(**options), again, recorded=record.decisions, dialect=ONNX)
    assert torch.equal(made.run(x=x)["output"], again.run(x=x)["output"])


def test_weight_only_asks_for_data_only_to_correct():
    assert not Quantize(activation_bits=16).measures
    assert Quantize(activation_bits=16, bias_correction=True).measures
