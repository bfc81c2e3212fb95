"""LayerNorms of a pre-LN stream become RMSNorms, and the width can be pruned; others stay and say why."""

import random

import architectures
import pytest
import torch
from graphs import Call, assert_graph, normal, ops
from torch import nn

import effc
from effc.errors import PreconditionError
from effc.ir.check import drift
from effc.passes.coupling import coupled_dims, masked_run
from effc.passes.layernorm import LayerNormToRMSNorm
from effc.passes.prune_dims import PruneDims

X = normal(3, 8)


class Block(nn.Module):
    """A pre-LN residual block with a head, or a post-LN one."""

    def __init__(self, *, post=False):
        super().__init__()
        self.embed, self.up, self.down = nn.Linear(8, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm, self.last, self.head = (
            nn.LayerNorm(6),
            nn.LayerNorm(6),
            nn.Linear(6, 4, bias=False),
        )
        self.post = post

    def forward(self, x):
        y = self.embed(x)
        if self.post:
            y = self.norm(y + self.down(torch.relu(self.up(y))))
            return self.head(self.last(y + self.down(torch.relu(self.up(y)))))
        y = y + self.down(torch.relu(self.up(self.norm(y))))
        return self.head(self.last(y))


def converted(module, x=X, dtype=torch.float64):
    module, x = architectures.shaken(module).to(dtype), x.to(dtype)
    program = effc.trace(module, x)
    before = program.clone()
    feeds = {program.only().inputs[0]: x}
    record = effc.apply(LayerNormToRMSNorm(), program, probes={"main": [feeds]})
    return record, program, drift(before.run(feeds), program.run(feeds)).rel_l2, feeds


def test_a_stream_of_two_norms_is_converted():
    record, program, gap, _ = converted(Block())
    assert record.sites == 2 and record.effect == "exact" and gap < 1e-13
    assert_graph(
        program,
        """
        %x: f64[batch, 8] = input
        %linear: f64[batch, 6] = linear(%x, @embed.weight, @embed.bias)
        %rms_norm_default: f64[batch, 6] = rms_norm(%linear, [6], @norm.weight, 1e-05)
        %linear_1: f64[batch, 12] = linear(%rms_norm_default, @up.weight, @up.bias)
        %relu: f64[batch, 12] = relu(%linear_1)
        %linear_2: f64[batch, 6] = linear(%relu, @down.weight, @down.bias)
        %add: f64[batch, 6] = add(%linear, %linear_2)
        %rms_norm_default_1: f64[batch, 6] = rms_norm(%add, [6], @last.weight, 1e-05)
        %linear_3: f64[batch, 4] = linear(%rms_norm_default_1, @head.weight, @head.bias)
        return output=%linear_3
        """,
    )


def test_then_its_width_can_be_pruned():
    _, program, _, feeds = converted(Block())
    coupling = coupled_dims(program.only())
    wanted = masked_run(coupling, {"embed": (0, 2, 5)}, feeds)
    effc.apply(PruneDims(keep={"embed": (0, 2, 5)}), program)
    assert drift(wanted, program.run(feeds)).rel_l2 < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("family", architectures.CONVERTED)
def test_real_models_compute_the_same(family):
    torch.manual_seed(0)
    program, feeds = architectures.program_of(architectures.FAMILIES[family](random.Random(0)))
    before = coupled_dims(program.only()).share()
    record = effc.apply(LayerNormToRMSNorm(), program, probes={"main": [feeds]})
    assert record.sites == 5 and record.drift.rel_l2 < 1e-6
    assert coupled_dims(program.only()).share() > 0.97 > 0.9 > before


@pytest.mark.slow
def test_a_stage_that_a_norm_writes_stays_beside_one_that_is_converted():
    torch.manual_seed(0)
    program, _ = architectures.program_of(architectures.swin(random.Random(0)))
    effc.apply(LayerNormToRMSNorm(), program)
    found = ops(program)
    assert (found.count("rms_norm"), found.count("layer_norm")) == (5, 6)
    names = {g.name for g in coupled_dims(program.only()).prunable()}
    assert "body.swin.encoder.layers.0.downsample.reduction" in names


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "convnext"])
def test_what_cannot_be_converted_is_refused(family):
    program, _ = architectures.program_of(architectures.FAMILIES[family](random.Random(0)))
    before = effc.show(program)
    reason = {"bert": "post-LN", "convnext": "convolution"}[family]
    with pytest.raises(PreconditionError, match=reason) as error:
        effc.apply(LayerNormToRMSNorm(), program)
    assert "at body." in str(error.value) and error.value.hint
    assert effc.show(program) == before


def test_post_norm_is_refused():
    with pytest.raises(PreconditionError, match="written by a norm"):
        converted(Block(post=True))


def test_a_graph_without_norms_is_left_as_it_is():
    program = effc.trace(nn.Linear(8, 4).eval(), X)
    assert effc.apply(LayerNormToRMSNorm(), program).sites == 0


def _reads(function, **parts):
    parts = {"a": nn.Linear(8, 6), "norm": nn.LayerNorm(6), "b": nn.Linear(6, 2), **parts}
    return Call(function, **parts)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda s, x: s.b(s.norm(torch.relu(s.a(x)))), "written by relu"),
        (lambda s, x: s.b(s.norm(s.a(x) + 1)), "written by add"),
        (lambda s, x: s.b(s.norm(s.a(x) + x[:, :1])), "written by add"),
        (lambda s, x: s.b(s.norm(y := s.a(x)) + torch.tanh(y)), "read by tanh"),
        (lambda s, x: (s.b(s.norm(y := s.a(x))), y), "read by output"),
        (lambda s, x: s.b(s.norm(x)), "an input of the graph"),
        (lambda s, x: s.b(s.norm(s.a(x) * s.a(x))), "written by mul"),
        (lambda s, x: s.b(s.norm(s.a(x).softmax(-1))), "written by softmax"),
        (lambda s, x: s.b(s.norm(torch.cat([s.c(x), s.c(x)], -1))), "written by cat"),
    ],
    ids=["relu", "number", "column", "tanh", "output", "input", "square", "softmax", "beside"],
)
def test_a_stream_that_has_no_mean_to_take_out_stays(function, reason):
    with pytest.raises(PreconditionError, match=reason):
        converted(_reads(function, c=nn.Linear(8, 3)), X if "input" not in reason else X[:, :6])


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.b(s.norm(s.a(x) * s.scale)),
        lambda s, x: s.b(s.norm(s.a(x) + s.scale)),
        lambda s, x: s.b(s.norm(2 * s.a(x) - s.c(x))),
        lambda s, x: s.b(s.norm(s.a(x) * x[:, :1])),
        lambda s, x: s.b(torch.relu(s.norm(s.a(x)))),
        lambda s, x: s.b(s.norm(torch.cat([s.a(x), s.c(x)])[None].transpose(0, 1)[:, 0])),
        lambda s, x: s.b(s.norm(s.a(x)) @ s.a.weight @ s.a.weight.T),
    ],
    ids=["layer scale", "position", "sum", "factor", "activation", "moved", "tied"],
)
def test_what_keeps_a_mean_of_nothing_is_followed(function):
    parts = {
        "c": nn.Linear(8, 6, bias=False),
        "scale": nn.Parameter(torch.rand(6)),
    }
    record, program, gap, _ = converted(_reads(function, **parts))
    assert record.sites == 1 and gap < 1e-12
    assert "layer_norm" not in ops(program)


def test_a_norm_without_gain_gets_one():
    module = nn.Sequential(
        nn.Linear(8, 6), nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 2)
    )
    _, program, gap, _ = converted(module)
    assert gap < 1e-13
    assert coupled_dims(program.only()).groups["0"].is_prunable
