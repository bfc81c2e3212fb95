"""Channels brought to one middle and one size by what lies in front: the same numbers, and less lost on a grid."""

import pytest
import torch
from graphs import Call, batches, distance, normal, ops
from torch import nn

import effc
from effc.backends.dialect import TENSORRT
from effc.errors import PreconditionError
from effc.ir.edit import tensor_of
from effc.passes.level import Level
from effc.passes.quantize import Quantize

SIZE = 24


def uneven(bias=True):
    """A norm whose channels have middles and sizes of their own, and two layers behind it."""
    torch.manual_seed(0)
    parts = {
        "norm": nn.LayerNorm(SIZE), "a": nn.Linear(SIZE, 8, bias=bias), "b": nn.Linear(SIZE, 6, bias=bias),
    }  # fmt: skip
    nn.init.normal_(parts["norm"].bias, std=3.0)
    parts["norm"].weight.data[::5] *= 12
    for layer in (parts["a"], parts["b"]):
        layer.weight.data[:, ::5] /= 12

    def forward(self, x):
        y = self.norm(x)
        return torch.cat([self.a(y), self.b(y)], -1)

    return effc.trace(Call(forward, **parts).eval(), {"x": normal(4, SIZE)})


def levelled(program, **options):
    return effc.apply(Level(**options), program, batches("x", 4, SIZE, count=32), dialect=TENSORRT)


@pytest.mark.parametrize("alike", [False, True])
def test_the_graph_computes_the_same_with_no_node_more(alike):
    before, after = uneven(), uneven()
    record = levelled(after, alike=alike)
    x = normal(4, SIZE, seed=9)
    assert record.sites == 2 and record.effect == "exact"
    assert ops(before) == ops(after)
    assert distance(before.run(x=x)["output"], after.run(x=x)["output"]) < 1e-5


def test_less_is_lost_on_one_grid():
    options, lost = {"bits": 6, "activation_bits": 6}, []
    for level in (False, True):
        program = uneven()
        if level:
            levelled(program, **options)
        effc.apply(Quantize(**options), program, batches("x", 4, SIZE, count=32), dialect=TENSORRT)
        xs = [normal(4, SIZE, seed=s) for s in range(50, 60)]
        pairs = [(uneven().run(x=x)["output"], program.run(x=x)["output"]) for x in xs]
        lost.append(distance(*(torch.cat(side) for side in zip(*pairs, strict=True))))
    assert lost[1] < 0.7 * lost[0]


def test_alike_channels_end_alike():
    program = uneven()
    record = levelled(program, alike=True)
    (middles, sizes), = record.decisions.values()  # fmt: skip
    assert len(middles) == len(sizes) == SIZE
    (norm,) = effc.Select(op="layer_norm").sites(program.only())
    gains = tensor_of(program.only(), norm.args[2])
    assert float(gains.max() / gains.min()) < 1.5


def test_layers_without_a_bias_are_left_alone():
    program = uneven(bias=False)
    assert levelled(program).sites == 0


def test_decisions_are_replayed_without_data():
    first, again = uneven(), uneven()
    record = levelled(first)
    effc.apply(Level(), again, recorded=record.decisions, dialect=TENSORRT)
    x = normal(4, SIZE, seed=9)
    assert torch.equal(first.run(x=x)["output"], again.run(x=x)["output"])


def test_other_bits_than_those_behind_it_are_refused():
    Level(bits=6, activation_bits=6).agrees([Quantize(bits=6, activation_bits=6)])
    with pytest.raises(PreconditionError, match=r"4 and 8 bits.* 6 and 6") as caught:
        Level(bits=4).agrees([Quantize(bits=6, activation_bits=6)])
    assert caught.value.hint
