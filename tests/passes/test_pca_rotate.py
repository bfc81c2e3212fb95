"""A stream in the basis of its principal components computes the same, and its last directions matter least."""

import random

import architectures
import pytest
import torch
from graphs import Call, assert_graph, normal, ops
from torch import nn

import effc
from effc.calib.collectors import Directions, Gram
from effc.calib.data import Batch
from effc.calib.probe import Probe, held_bytes
from effc.errors import CalibrationError, PreconditionError
from effc.ir.check import drift
from effc.passes.layernorm import LayerNormToRMSNorm
from effc.passes.pca_rotate import PCARotate, plan
from effc.passes.prune_dims import PruneDims

X = normal(40, 8)


class Block(nn.Module):
    """A residual stream under RMSNorm."""

    def __init__(self, width=6):
        super().__init__()
        self.embed, self.head = nn.Linear(8, width), nn.Linear(width, 4, bias=False)
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.norm, self.last = nn.RMSNorm(width, 1e-2), nn.RMSNorm(width, 1e-2)

    def forward(self, x):
        y = self.embed(x)
        y = y + self.down(torch.relu(self.up(self.norm(y))))
        return self.head(self.last(y))


def batches(feeds):
    return [Batch(inputs={name: value.numpy() for name, value in feeds.items()})]


def traced(module, x=X, dtype=torch.float64):
    program = effc.trace(architectures.shaken(module).to(dtype), x.to(dtype))
    return program, {program.only().inputs[0]: x.to(dtype)}


def rotated(program, feeds, **options):
    """The record, and how far the outputs have moved."""
    before = program.clone()
    record = effc.apply(PCARotate(**options), program, batches(feeds))
    return record, drift(before.run(feeds), program.run(feeds)).rel_l2


def test_no_node_is_added_and_nothing_moves():
    program, feeds = traced(Block())
    before = effc.show(program)
    record, gap = rotated(program, feeds)
    assert record.effect == "exact" and gap < 1e-13
    assert record.sites == 6  # weight and bias of two writers, weights of two readers
    assert effc.show(program) == before
    assert_graph(
        program,
        """
        %x: f64[batch, 8] = input
        %linear: f64[batch, 6] = linear(%x, @embed.weight, @embed.bias)
        %rms_norm: f64[batch, 6] = rms_norm(%linear, [6], @norm.weight, 0.01)
        %linear_1: f64[batch, 12] = linear(%rms_norm, @up.weight, @up.bias)
        %relu: f64[batch, 12] = relu(%linear_1)
        %linear_2: f64[batch, 6] = linear(%relu, @down.weight, @down.bias)
        %add: f64[batch, 6] = add(%linear, %linear_2)
        %rms_norm_1: f64[batch, 6] = rms_norm(%add, [6], @last.weight, 0.01)
        %linear_3: f64[batch, 4] = linear(%rms_norm_1, @head.weight)
        return output=%linear_3
        """,
    )
    tensors = program.only().tensors()
    assert bool((tensors["norm.weight"] == 1).all() and (tensors["last.weight"] == 1).all())


@pytest.mark.parametrize("normed", [True, False])
def test_what_the_norms_give_or_read_is_uncorrelated_and_sorted(normed):
    program, feeds = traced(Block())
    rotated(program, feeds, normed=normed)
    seen = Directions() if normed else Gram()
    values = effc.ir.values.Values(
        program.only(), feeds, more=dict.fromkeys(program.only().nodes, 1)
    )
    for norm in [n for n in program.only().nodes if ops_of(n) == "rms_norm"]:
        seen.update(values(norm.args[0]))
    found = seen.matrix()
    assert torch.allclose(found, torch.diag(found.diag()), atol=1e-9 * float(found.max()))
    assert bool((found.diag()[:-1] > found.diag()[1:]).all())


def ops_of(node):
    return effc.ir.select.op_name(node)


def llama(tied):
    built = architectures.llama(random.Random(1))
    body = built[0].body
    table = body.model.embed_tokens.weight
    body.lm_head.weight = table if tied else nn.Parameter(torch.randn_like(table) / 5)
    return architectures.program_of(built)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_computes_the_same(tied):
    program, feeds = llama(tied)
    record, gap = rotated(program, feeds)
    assert gap < 1e-6 and record.sites > 10


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_models_with_layer_norms_compute_the_same_after_their_conversion(family):
    torch.manual_seed(0)
    module, feeds, dims = architectures.FAMILIES[family](random.Random(0))
    feeds = {k: v.double() if v.is_floating_point() else v for k, v in feeds.items()}
    program, _ = architectures.program_of((module.double(), feeds, dims))
    effc.apply(LayerNormToRMSNorm(), program, probes={"main": [feeds]})
    record, gap = rotated(program, feeds)
    assert gap < 1e-13 and record.sites > 10


class Tied(nn.Module):
    """A table that is the output layer's weight too."""

    def __init__(self, gain):
        super().__init__()
        self.table, self.norm = nn.Embedding(9, 6), nn.RMSNorm(6, 1e-3)
        self.mix = nn.Linear(6, 6)
        with torch.no_grad():
            self.norm.weight.copy_(gain)

    def forward(self, ids):
        y = self.table(ids)
        return nn.functional.linear(self.norm(y + self.mix(y)), self.table.weight)


@pytest.mark.parametrize("uneven", [False, True])
def test_a_tied_table_becomes_two_tensors_only_where_a_gain_goes_into_one(uneven):
    gain = torch.arange(1.0, 7) if uneven else torch.full((6,), 1.5)
    ids = torch.randint(0, 9, (2, 7), generator=torch.Generator().manual_seed(0))
    program = effc.trace(Tied(gain).eval().double(), {"ids": ids})
    record, gap = rotated(program, {"ids": ids})
    assert gap < 1e-13
    assert record.bytes[1] - record.bytes[0] == (9 * 6 * 8 if uneven else 0)


def _reads(function, **parts):
    parts = {"a": nn.Linear(8, 6), "norm": nn.RMSNorm(6, 1e-3), "b": nn.Linear(6, 2), **parts}
    return Call(function, **parts)


@pytest.mark.parametrize(
    "function",
    [
        lambda s, x: s.b(s.norm(s.a(x) * s.scale)),
        lambda s, x: s.b(s.norm(s.a(x) + s.scale)),
        lambda s, x: s.b(s.norm(2 * s.a(x) - s.c(x))),
        lambda s, x: s.b(s.norm(s.a(x) * x[:, :1])),
        lambda s, x: s.b(s.norm((y := s.a(x)) + s.d(y))),
        lambda s, x: s.b(s.norm(torch.cat([s.a(x), s.c(x)])[None].transpose(0, 1)[:, 0])),
        lambda s, x: s.b(s.norm(torch.cat([s.a(x)[None], s.cls], 1)).mean(1)),
        lambda s, x: s.b(s.norm(torch.add(*torch.stack([s.a(x), s.c(x)], 1).unbind(1)))),
        lambda s, x: s.b(s.norm(s.a(x))) + s.b(s.other(s.c(x) + s.a(x))),
    ],
    ids=["scale", "position", "sum", "factor", "square", "moved", "class", "parts", "shared"],
)
def test_what_is_linear_in_the_stream_is_followed(function):
    parts = {
        "c": nn.Linear(8, 6, bias=False),
        "d": nn.Linear(6, 6),
        "other": nn.RMSNorm(6, 1e-2),
        "scale": nn.Parameter(torch.rand(6)),
        "cls": nn.Parameter(torch.rand(1, 1, 6)),
    }
    program, feeds = traced(_reads(function, **parts))
    record, gap = rotated(program, feeds)
    assert record.sites > 2 and gap < 1e-12


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda s, x: s.b(s.norm(torch.relu(s.a(x)))), "goes through relu, which is not linear"),
        (lambda s, x: s.b(s.norm(s.a(x) + 1)), "add adds what is no stream"),
        (lambda s, x: s.b(s.norm(s.a(x) + x[:, :1])), "add adds what is no stream"),
        (lambda s, x: s.b(s.norm(s.a(x) * s.c(x))), "multiplied channel by channel by mul"),
        (lambda s, x: s.b(s.norm(x[:, :1] / s.a(x))), "multiplied channel by channel by div"),
        (lambda s, x: s.b(s.norm(y := s.a(x))) + s.b(torch.tanh(y)), "goes through tanh"),
        (lambda s, x: s.norm(s.a(x)) @ s.b.weight.T, "gain of norm:rms_norm .* matmul reads"),
        (lambda s, x: s.b(torch.tanh(s.norm(s.a(x)))), "gain of norm:rms_norm .* tanh reads it"),
        (lambda s, x: s.norm(s.norm(s.a(x)) + s.a(x)), "the output 'output' has it"),
        (lambda s, x: s.b(s.norm(s.norm(s.a(x)) + s.a(x))), "gain of norm:rms_norm .* add reads"),
        (lambda s, x: s.b(s.norm(x[:, :6])), "the input 'x' has it"),
        (lambda s, x: s.b(s.norm(torch.cat([s.d(x), s.d(x)], -1))), "lie side by side"),
        (lambda s, x: s.b(s.norm(s.a(x).masked_fill(x[:, :1] > 0, 2.0))), "through masked_fill"),
        (lambda s, x: s.b(s.norm(y := s.a(x))) + y.sum(-1, keepdim=True), "goes through sum"),
        (lambda s, x: s.b(s.norm(s.a(x).softmax(-1))), "a softmax runs over it"),
    ],
)  # fmt: skip
def test_what_hangs_on_single_channels_is_refused(function, reason):
    program, feeds = traced(_reads(function, c=nn.Linear(8, 6), d=nn.Linear(8, 3)))
    before = effc.show(program)
    with pytest.raises(PreconditionError, match=reason) as error:
        rotated(program, feeds)
    assert error.value.hint and effc.show(program) == before


def _across(s, x):
    y = torch.stack([s.a(x), s.c(x)], 1)
    return s.b(s.norm(s.pair(y.transpose(1, 2)).transpose(1, 2)))


def _outer(s, x):
    return s.d(s.b(s.norm(s.a(x)[:, :, None] @ s.a(x)[:, None])).transpose(1, 2))


@pytest.mark.parametrize(
    ("function", "reason"), [(_across, "goes through rms_norm"), (_outer, "has the width twice")]
)
def test_a_norm_or_a_product_across_the_stream_is_refused(function, reason):
    parts = {"c": nn.Linear(8, 6), "d": nn.Linear(6, 3), "pair": nn.RMSNorm(2)}
    program, _ = traced(_reads(function, **parts))
    streams, refusals = plan(program.only())
    assert not streams and reason in str(dict(refusals)["a"])


def test_stages_that_are_merged_from_patches_are_refused_with_the_node_that_merges():
    def merging(s, x):
        y = s.a(x)
        y = y + s.d(s.norm(y))
        return s.e(s.wide(torch.cat([y[:, ::2], y[:, 1::2]], -1)))

    parts = {"d": nn.Linear(6, 6), "wide": nn.RMSNorm(12), "e": nn.Linear(12, 2)}
    program, feeds = traced(_reads(merging, **parts), normal(3, 4, 8))
    with pytest.raises(PreconditionError) as error:
        rotated(program, feeds)
    assert "a: the width is part of a longer dimension, or in integers at cat" in str(error.value)
    assert "wide:rms_norm: it normalises parts that lie side by side" in str(error.value)


@pytest.mark.slow
def test_swin_is_refused_with_a_node_for_every_stage():
    program, feeds = architectures.program_of(architectures.swin(random.Random(0)))
    effc.apply(LayerNormToRMSNorm(), program)
    before = effc.show(program)
    with pytest.raises(PreconditionError) as error:
        rotated(program, feeds)
    for stage, node in (
        ("embeddings.patch_embeddings.projection", "embeddings.norm:layer_norm"),
        ("encoder.layers.0.downsample.reduction", "blocks.0.layernorm_before:add"),
    ):
        told = str(error.value).partition(f"body.swin.{stage}: ")[2].partition(";")[0]
        assert node in told
    assert effc.show(program) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "reason"), [("bert", "layer_norm takes mean"), ("resnet", "no norm reads")]
)
def test_models_without_such_a_stream_are_refused(family, reason):
    program, feeds = architectures.program_of(architectures.FAMILIES[family](random.Random(0)))
    with pytest.raises(PreconditionError, match=reason) as error:
        rotated(program, feeds)
    assert error.value.hint


def test_groups_are_chosen_by_pattern():
    program, feeds = traced(nn.Sequential(Block(), nn.Linear(4, 8), Block()))
    record, _ = rotated(program, feeds, groups="2.*")
    assert list(record.decisions) == ["main/2.embed"]
    with pytest.raises(PreconditionError, match="of 'nowhere'"):
        rotated(program, feeds, groups="nowhere")


def test_the_record_holds_the_basis_by_its_sha256():
    program, feeds = traced(Block())
    whole = program.clone()
    record, _ = rotated(program, feeds)
    assert [len(v) for v in record.decisions.values()] == [64]
    again, other = whole.clone(), whole.clone()
    effc.apply(PCARotate(), again, batches(feeds), recorded=record.decisions)
    assert drift(program.run(feeds), again.run(feeds)).rel_l2 == 0
    few = {name: value[:9] for name, value in feeds.items()}
    with pytest.raises(CalibrationError, match="comes out differently"):
        effc.apply(PCARotate(), other, batches(few), recorded=record.decisions)


def test_without_data_nothing_is_known_of_the_stream():
    program, _ = traced(Block())
    with pytest.raises(CalibrationError, match="no calibration data"):
        effc.apply(PCARotate(), program)


def test_one_matrix_serves_all_norms():
    program, _ = traced(Block())
    probes = list(PCARotate().probes(program.only()))
    assert len(probes) == 2 and len({id(p.collector) for p in probes}) == 1
    assert held_bytes(probes) == 2 * Gram().held_bytes((6,))
    apart = [Probe(key=p.key, node=p.node, collector=Gram()) for p in probes]
    assert held_bytes(apart) == 3 * Gram().held_bytes((6,))


def test_the_first_directions_stay():
    program, feeds = traced(Block())
    rotated(program, feeds)
    options = {"ratio": 0.5, "groups": "embed", "importance": "first"}
    record = effc.apply(PruneDims(**options), program, batches(feeds))
    assert record.decisions == {"main/embed": [0, 1, 2]}
    assert ops(program).count("rms_norm") == 2


class Narrow(Block):
    """A stream of 24 channels in which 8 directions carry something, with a little noise in the others."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        super().__init__(24)
        with torch.no_grad():
            self.embed.bias.zero_()
            self.down.bias.zero_()
            self.down.weight.copy_(self.embed.weight @ torch.randn(8, 12) / 3)
            self.down.weight.add_(0.01 * torch.randn(24, 12))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kept", [16, 8, 6])
def test_slicing_moves_outputs_less_after_the_rotation(seed, kept):
    program = effc.trace(Narrow(seed).eval(), X)
    feeds = {"x": X}
    whole, turned = program.clone(), program.clone()
    rotated(turned, feeds)
    options = {"ratio": 1 - kept / 24, "groups": "embed"}
    effc.apply(PruneDims(**options), program)
    effc.apply(PruneDims(importance="first", **options), turned)
    raw, sliced = (drift(whole.run(feeds), p.run(feeds)).rel_l2 for p in (program, turned))
    assert sliced < raw / 2
    assert sliced < 0.03 or kept < 8
