"""Patterns become one operator where every part of them is there, and stay where one is missing."""

import pytest
import torch
from graphs import (
    Attention,
    Call,
    LlamaNorm,
    Projections,
    Tied,
    assert_graph,
    batches,
    distance,
    engine,
    normal,
    ops,
    quantize,
)
from torch import nn

import effc
from effc.ir.program import Origin
from effc.passes.cleanup import FoldConstants
from effc.passes.coupling import coupled_dims
from effc.passes.fuse import FoldBatchNorm, FuseProjections, FuseRMSNorm


def fused(module, x, pass_=None):
    program = effc.trace(module.eval(), {"x": x})
    record = effc.apply(pass_ or FuseRMSNorm(), program, probes={"main": [{"x": x}]})
    return record, program


def test_rmsnorm_as_llama_spells_it_becomes_one_operator():
    record, program = fused(LlamaNorm(8), normal(2, 8))
    assert record.sites == 1
    assert_graph(
        program,
        """
        %x: f32[batch, 8] = input
        %rms_norm_default: f32[batch, 8] = rms_norm(%x, [8], @weight, 1e-06)
        return output=%rms_norm_default
        """,
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w,
        lambda w, x: w * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x),
    ],
)
def test_the_order_of_factors_does_not_matter(function):
    weight = nn.Parameter(torch.rand(8))
    record, program = fused(Call(lambda self, x: function(self.w, x), w=weight), normal(2, 8))
    assert record.sites == 1
    assert ops(program) == ["rms_norm"]


def test_a_gain_that_is_computed_from_the_weight_is_one_too():
    def gemma(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.w)

    record, program = fused(Call(gemma, w=nn.Parameter(torch.rand(8))), normal(2, 8))
    assert record.sites == 1 and ops(program) == ["add", "rms_norm"]
    effc.apply(FoldConstants(), program)
    assert ops(program) == ["rms_norm"]
    (norm,) = coupled_dims(program.only()).reading.norms  # its width may lose channels
    assert norm[0].target is torch.ops.aten.rms_norm.default


def test_a_gain_that_is_computed_from_the_input_is_none():
    def gated(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.w + x[0])

    record, _ = fused(Call(gated, w=nn.Parameter(torch.rand(8))), normal(2, 8))
    assert record.sites == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda w, x: w * (x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True).abs() + 1e-6)),
        lambda w, x: w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)),
        lambda w, x: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6)),
        lambda w, x: w * ((x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
        lambda w, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
        lambda w, x: w[0] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)),
    ],
    ids=["cube", "other axis", "sum", "other value", "no weight", "scalar weight"],
)
def test_a_near_miss_stays_as_it_is(function):
    weight = nn.Parameter(torch.rand(8))
    record, program = fused(Call(lambda self, x: function(self.w, x), w=weight), normal(3, 8))
    assert record.sites == 0
    assert "rsqrt" in ops(program)


def test_one_gain_for_all_channels_stays_as_it_is():
    def scale_norm(self, x):
        return self.g * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    record, _ = fused(Call(scale_norm, g=nn.Parameter(torch.ones(1))), normal(2, 8))
    assert record.sites == 0


def test_a_gain_may_be_computed_from_a_weight_but_not_from_an_input():
    def gemma(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (normed * (1.0 + self.w)).type_as(x)

    record, program = fused(Call(gemma, w=nn.Parameter(torch.rand(8))), normal(2, 8))
    assert record.sites == 1 and ops(program) == ["add", "rms_norm", "type_as"]

    def gated(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * (self.w + x[0])

    record, _ = fused(Call(gated, w=nn.Parameter(torch.rand(8))), normal(2, 8))
    assert record.sites == 0


def test_a_norm_whose_inner_value_is_read_elsewhere_stays():
    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.w * normed, normed

    record, _ = fused(Call(forward, w=nn.Parameter(torch.rand(8))), normal(2, 8))
    assert record.sites == 0


def with_statistics(norm):
    """A batch norm that has seen something."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(norm.num_features, generator=draw) + 0.5)
        norm.bias.copy_(torch.randn(norm.num_features, generator=draw))
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=draw))
        norm.running_var.copy_(torch.rand(norm.num_features, generator=draw) + 0.1)
    return norm


LAYERS = {
    "conv2d": (lambda: nn.Conv2d(3, 5, 3), lambda: nn.BatchNorm2d(5), (2, 3, 8, 8)),
    "conv2d without bias": (
        lambda: nn.Conv2d(3, 5, 3, bias=False),
        lambda: nn.BatchNorm2d(5),
        (2, 3, 8, 8),
    ),
    "grouped conv2d": (
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        lambda: nn.BatchNorm2d(8),
        (2, 4, 8, 8),
    ),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), lambda: nn.BatchNorm1d(5), (2, 3, 8)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (3, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_batch_norm_is_folded_as_float64_would_compute_it(layer):
    make, norm, shape = LAYERS[layer]
    torch.manual_seed(0)
    model = nn.Sequential(make(), with_statistics(norm())).eval()
    x = normal(*shape)
    program = effc.trace(model, x)
    record = effc.apply(FoldBatchNorm(), program, probes={"main": [{"input": x}]})
    assert record.sites == 1
    assert len(ops(program)) == 1
    wanted = model.double()(x.double()).detach()
    assert distance(program.run(input=x)["output"], wanted) < 1e-6


def test_the_folded_tensors_remember_where_they_come_from():
    model = nn.Sequential(
        nn.Conv2d(3, 5, 1, bias=False), with_statistics(nn.BatchNorm2d(5)), nn.ReLU()
    )
    x = normal(2, 3, 4, 4)
    program = effc.trace(model.eval(), x)
    effc.apply(FoldBatchNorm(), program, probes={"main": [{"input": x}]})
    origins = program.only().origins
    assert len(origins) == 2
    assert Origin("0.weight", ("fold-batchnorm",)) in origins.values()
    assert ops(program) == ["conv2d", "relu"]


def test_a_convolution_that_others_read_keeps_its_batch_norm():
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y

    module = Call(forward, conv=nn.Conv2d(3, 5, 1), norm=with_statistics(nn.BatchNorm2d(5)))
    record, program = fused(module, normal(2, 3, 4, 4), FoldBatchNorm())
    assert record.sites == 0
    assert "batch_norm" in ops(program)


def test_a_weight_that_two_layers_share_is_folded_for_one_of_them():
    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(x * 2)

    module = Call(forward, conv=nn.Conv2d(3, 5, 1), norm=with_statistics(nn.BatchNorm2d(5)))
    x = normal(2, 3, 4, 4)
    record, program = fused(module, x, FoldBatchNorm())
    assert record.sites == 1
    assert distance(program.run(x=x)["output"], module(x).detach()) < 1e-6


def test_a_batch_norm_with_nothing_in_front_stays():
    module = Call(lambda self, x: self.norm(x), norm=with_statistics(nn.BatchNorm2d(3)))
    record, _ = fused(module, normal(2, 3, 4, 4), FoldBatchNorm())
    assert record.sites == 0


# Projections of one value


def test_queries_keys_and_values_become_one_layer_and_a_split(tmp_path):
    x = normal(3, 6, 32)
    record, program = fused(Attention(), x, FuseProjections())
    assert record.sites == 3
    assert ops(program).count("linear") == 2
    assert ops(program).count("split_with_sizes") == 1
    shapes = [tuple(t.shape) for t in program.only().tensors().values()]
    assert (96, 32) in shapes and (96,) in shapes
    assert len(shapes) == 4  # those that were joined are gone
    assert Origin("q.weight+k.weight+v.weight", ("concatenate",)) in program.only().origins.values()
    with engine(program, tmp_path) as made:
        found = made({"x": x.numpy()})
    assert all(distance(v, found[k]) < 1e-5 for k, v in program.run({"x": x}).items())


def test_integers_of_fused_projections_are_those_of_each():
    plain = effc.trace(Projections().eval(), {"x": normal(2, 4, 8)})
    joined = plain.clone()
    effc.apply(FuseProjections(), joined)
    for program in (plain, joined):
        quantize(program, batches("x", 2, 4, 8))
    x = {"x": normal(2, 4, 8, seed=3)}
    assert distance(plain.run(x)["output"], joined.run(x)["output"]) < 1e-6


def test_layers_that_share_a_weight_or_have_an_input_of_their_own_stay():
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
    chain = Call(lambda self, x: self.layers[1](self.layers[0](x)), layers=layers)
    record, _ = fused(chain, normal(2, 8), FuseProjections())
    assert record.sites == 0
    twice = Call(lambda self, x: self.layer(x) + self.layer(x), layer=nn.Linear(8, 8))
    record, _ = fused(twice, normal(2, 8), FuseProjections())
    assert record.sites == 0
    uneven = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4, bias=False)])
    other = Call(lambda self, x: (self.layers[0](x), self.layers[1](x)), layers=uneven)
    record, _ = fused(other, normal(2, 8), FuseProjections())
    assert record.sites == 0
    record, _ = fused(
        Call(lambda self, x: self.body(x), body=Tied()),
        torch.arange(6).reshape(2, 3),
        FuseProjections(),
    )
    assert record.sites == 0
