"""Scaling channels by the size of their inputs: the same numbers, and less lost when weights are rounded."""

import json

import numpy as np
import pytest
import torch
from graphs import Attention, Call, LlamaNorm, Tied, batches, distance, engine, normal
from torch import nn

import effc
from effc.backends.dialect import DIALECTS, ORT
from effc.calib.data import Batch
from effc.errors import CalibrationError
from effc.passes.awq import STRENGTHS, Awq, scales
from effc.passes.fuse import FuseRMSNorm
from effc.passes.quantize import Quantize

SIZE, GROUP = 32, 16


def feed_forward(seed=0):
    """A norm with a few large channels, a gate, and a layer behind it, as in a Llama."""
    torch.manual_seed(seed)
    parts = {
        "norm": LlamaNorm(SIZE), "gate": nn.Linear(SIZE, 64, bias=False),
        "up": nn.Linear(SIZE, 64, bias=False), "down": nn.Linear(64, SIZE, bias=False),
    }  # fmt: skip
    parts["norm"].weight.data[::11] *= 30

    def forward(self, x):
        y = self.norm(x)
        return self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))

    program = effc.trace(
        Call(forward, **parts).eval(), {"x": normal(4, SIZE)}, dims={"x": {0: "batch"}}
    )
    effc.apply(FuseRMSNorm(), program, probes={"main": [{"x": normal(4, SIZE)}]})
    return program


def scaled(program=None, data=None, **options):
    program = program or feed_forward()
    data = data or batches("x", 64, SIZE)
    record = effc.apply(Awq(**{"group": GROUP, **options}), program, data, dialect=ORT)
    return program, record


def test_the_graph_computes_the_same_but_for_rounding_and_no_node_more():
    before, (after, record) = feed_forward(), scaled()
    x = normal(64, SIZE, seed=9)
    assert record.effect == "exact" and record.sites == 3
    assert record.nodes[0] == record.nodes[1]
    assert distance(before.run(x=x)["output"], after.run(x=x)["output"]) < 1e-6


@pytest.mark.parametrize("symmetric", [True, False])
def test_less_is_lost_than_by_nearest_rounding_alone(symmetric):
    x, lost = normal(256, SIZE, seed=9), []
    wanted = feed_forward().run(x=x)["output"]
    options = {"bits": 4, "group": GROUP, "weight_symmetric": symmetric}
    for program in (feed_forward(), scaled(weight_symmetric=symmetric)[0]):
        effc.apply(Quantize(activation_bits=16, **options), program, dialect=ORT)
        lost.append(distance(wanted, program.run(x=x)["output"]))
    assert lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_the_engine_is_what_the_graph_says(target, tmp_path):
    program, x = scaled()[0], normal(16, SIZE, seed=9)
    pass_ = Quantize(bits=4, activation_bits=16, group=GROUP)
    effc.apply(pass_, program, dialect=DIALECTS[target])
    with engine(program, tmp_path, target) as opened:
        found = opened({"x": x.numpy()})["output"]
    assert distance(program.run(x=x)["output"], found) < 2e-2


def test_values_of_attention_take_up_what_its_output_layer_is_scaled_by():
    torch.manual_seed(0)
    module = Attention(SIZE)
    module.v.weight.data[::5] *= 20
    program = effc.trace(module.eval(), {"x": normal(2, 6, SIZE)}, dims={"x": {0: "batch"}})
    before = program.clone()
    _, record = scaled(program, batches("x", 4, 6, SIZE))
    assert record.sites == 1
    x = normal(3, 6, SIZE, seed=9)
    assert distance(before.run(x=x)["output"], program.run(x=x)["output"]) < 1e-6


def test_a_layer_with_nothing_in_front_or_a_shared_weight_is_left_alone():
    alone = effc.trace(nn.Linear(SIZE, 8), normal(2, SIZE))
    tied = effc.trace(Tied(), torch.ones(2, 6, dtype=torch.int64))
    assert Awq().sites(alone.only()) == Awq().sites(tied.only()) == []


def test_decisions_are_numbers_of_few_bits_and_can_be_replayed():
    first, record = scaled()
    decided = json.loads(json.dumps(record.decisions))
    for factors in decided.values():
        assert all(float(np.frexp(f)[0] * 16).is_integer() for f in factors)
    again = feed_forward()
    effc.apply(Awq(group=GROUP), again, recorded=decided, dialect=ORT)
    for name, tensor in first.only().tensors().items():
        assert torch.equal(tensor, again.only().tensors()[name])


def test_scales_go_with_the_size_of_the_input_and_are_one_where_it_is_always_zero():
    sizes = torch.tensor([0.0, 1.0, 4.0, 16.0]).double()
    assert scales(sizes, 0.0).tolist() == [1.0] * 4
    assert scales(sizes, 1.0).tolist() == [1.0, 0.25, 1.0, 4.0]
    assert scales(torch.zeros(3).double(), 0.5).tolist() == [1.0] * 3
    assert STRENGTHS[0] == 0.0 and STRENGTHS[-1] == 1.0 and len(STRENGTHS) == 21


def test_inputs_that_are_always_zero_are_left_as_they_are():
    _, record = scaled(data=[Batch(inputs={"x": np.zeros((8, SIZE), np.float32)})])
    assert record.sites == 0 and set(map(str, record.decisions.values())) == {"[]"}


def test_one_row_of_data_still_gives_an_exact_graph():
    before, (after, _) = feed_forward(), scaled(data=batches("x", 1, SIZE, count=1))
    x = normal(8, SIZE, seed=9)
    assert distance(before.run(x=x)["output"], after.run(x=x)["output"]) < 1e-6


def test_a_value_that_is_no_number_is_refused():
    bad = [Batch(inputs={"x": np.full((2, SIZE), np.nan, np.float32)})]
    with pytest.raises(CalibrationError, match="not a number"):
        scaled(data=bad)


def test_noise_in_the_last_bits_does_not_reach_the_scales():
    noisy = [
        Batch(inputs={"x": b.inputs["x"] * np.float32(1 + 1e-6 * (-1) ** i)})
        for i, b in enumerate(batches("x", 64, SIZE))
    ]
    assert scaled()[1].decisions == scaled(data=noisy)[1].decisions
