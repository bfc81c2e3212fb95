"""What is said to help a layer does: two layers of which one has an ill that is known."""

import pytest
import torch
from graphs import normal, quantize
from torch import nn

import effc
from effc.calib.data import Batch
from effc.ir.edit import rebind, tensor_name, tensor_of
from effc.ir.select import op_name
from effc.layers import Layers
from effc.quant.affine import quantize as quantized
from effc.quant.affine import weight_qparams
from effc.quant.scheme import Scheme
from effc.remedy import remedies

pytestmark = pytest.mark.slow


class Two(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def model(size=32):
    torch.manual_seed(0)
    return effc.trace(Two(size).eval(), {"x": normal(64, size)})


def compiled(original, data, **options):
    program = original.clone()
    quantize(program, [Batch(inputs={"x": x.numpy()}) for x in data], **options)
    return program


def advice(original, program, x, site="a"):
    """What is said of a layer, and what becomes of the outputs' error without it."""
    layers = Layers(original.only(), program.only(), {"x": x})
    (found,) = [r for r in remedies(layers, list(layers.measured()), 2) if r.site == site]
    return found, layers.total**0.5


def decibels(text):
    return float(text.partition(" dB")[0].rpartition(" ")[2])


def drift(original, program, x):
    a, b = (next(iter(p.run({"x": x}).values())) for p in (original, program))
    return float((a - b).norm() / a.norm())


def said(found, word):
    texts = [text for text in found.advice if word in text]
    assert len(texts) <= 1
    return texts[0] if texts else None


def outlier():
    """An input with one channel a hundred times as large as the others."""
    x = normal(64, 32)
    return torch.cat([100 * x[:, :1], x[:, 1:]], 1)


def quiet_outlier():
    """A model whose weight makes little of that channel."""
    original = model()
    weight = original.only().tensors()["a.weight"].clone()
    weight[:, 0] /= 100
    rebind(original.only(), "a.weight", weight, "test")
    return original


def test_an_outlier_among_the_channels_of_its_input_asks_for_16_bit():
    original, x = quiet_outlier(), outlier()
    program = compiled(original, [x], range="minmax")
    found, _ = advice(original, program, x)
    assert found.activations > 0.9
    assert decibels(said(found, "activation_bits: 16")) > 10
    wide = compiled(original, [x], activation_bits=16)
    assert drift(original, wide, x) < drift(original, program, x) / 3


def test_values_that_pile_up_near_zero_may_be_helped_by_noise_which_is_not_tried_out():
    original, x = quiet_outlier(), outlier()
    found, _ = advice(original, compiled(original, [x], range="minmax"), x)
    assert "may help" in said(found, "not tried out")
    found, _ = advice(model(), compiled(model(), [normal(64, 32)]), normal(64, 32))
    assert said(found, "not tried out") is None


def test_a_range_that_clips_asks_for_another():
    original, x = model(), normal(64, 32)
    program = compiled(original, [x], range="percentile", percentile=80)
    found, _ = advice(original, program, x)
    text = said(found, "another range")
    assert "`range: mse`" in text or "`range: minmax`" in text
    assert "of the input is clipped" in text and decibels(text) > 6
    better = compiled(original, [x], range="mse")
    assert drift(original, better, x) < drift(original, program, x) / 3


def test_a_range_of_a_few_large_values_asks_for_one_that_cuts_them_off():
    original, x = model(), normal(64, 32)
    far = torch.cat([x, torch.full((1, 32), 60.0)])
    found, _ = advice(original, compiled(original, [far], range="minmax"), x)
    assert said(found, "another range")


def test_weights_of_4_bit_ask_for_8_and_for_the_least_squared_error():
    original, x = model(512), normal(64, 512)
    rebind(original.only(), "a.weight", 0.03 * normal(512, 512, seed=1), "test")
    program = compiled(original, [x], bits=4)
    found, _ = advice(original, program, x)
    assert found.activations < 0.1
    gain = decibels(said(found, "`bits: 8`"))
    assert gain > 15
    assert drift(original, compiled(original, [x], bits=8), x) < drift(original, program, x) / 3
    assert said(found, "weight_range: mse")
    found, _ = advice(original, compiled(original, [x], bits=4, weight_range="mse"), x)
    assert said(found, "`bits: 8`") and not said(found, "weight_range: mse")


def test_room_for_pairs_is_offered_back_where_an_8_bit_weight_has_it():
    original, x = (
        model(),
        (normal(64, 32) > 0).float(),
    )  # on its grid, so that all noise is the weight's
    found = {
        word: said(
            advice(original, compiled(original, [x], **options), x)[0], "overflow_fix: false"
        )
        for word, options in (
            ("widened", {}),
            ("tight", {"overflow_fix": False}),
            ("of 4 bit", {"bits": 4}),
            ("beside float", {"activation_bits": 16}),
        )
    }
    assert decibels(found.pop("widened")) > 1
    assert set(found.values()) == {None}


def test_one_scale_for_rows_of_unlike_size_asks_for_one_per_channel():
    original, x = model(), normal(64, 32)
    weight = original.only().tensors()["a.weight"].clone()
    weight[0] *= 50
    rebind(original.only(), "a.weight", weight, "test")
    program = compiled(original, [x], activation_bits=16)
    graph = program.only()
    node = next(n for n in graph.nodes if op_name(n) == "linear")
    scheme = Scheme(bits=8)
    scale, zero = weight_qparams(weight, scheme)
    made = quantized(weight, scale, zero, scheme), scale, zero
    for place, value in zip(node.args[1].args[:3], made, strict=True):
        name = tensor_name(graph, place)
        assert tensor_of(graph, place).dtype == value.dtype
        rebind(graph, name, value, "test")
    found, _ = advice(original, program, x)
    assert decibels(said(found, "a scale per channel")) > 10
    found, _ = advice(original, compiled(original, [x], activation_bits=16), x)
    assert said(found, "a scale per channel") is None


def test_a_layer_that_makes_the_error_is_better_left_in_float_and_by_how_much_is_an_estimate():
    original, x = quiet_outlier(), outlier()
    program = compiled(original, [x], range="minmax")
    found, total = advice(original, program, x)
    text = said(found, "leave it in float")
    assert text == found.advice[0] and "would be about" in text
    without = compiled(original, [x], range="minmax", select=effc.Select(exclude=(found.module,)))
    assert drift(original, without, x) < total / 3
    assert 0.3 < found.rel_l2 / drift(original, without, x) < 3
