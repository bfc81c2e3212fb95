"""A gain for every time in front of a convolution, which changes no number and makes activations of one width."""

import numpy as np
import pytest
import torch
from torch import nn

import effc
from effc.backends.dialect import ORT
from effc.calib.collectors import WidthByTime
from effc.calib.data import Batch
from effc.errors import PreconditionError
from effc.ir.select import op_name
from effc.ir.trace import trace
from effc.passes.quantize import Quantize
from effc.passes.step_gain import StepGain, gains

TIMES = (0, 100, 500, 900)


class Net(nn.Module):
    """What its convolution reads is twenty times wider at time 0 than at the others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, sample, timestep):
        width = torch.where(timestep == 0, 20.0, 1.0)[:, None, None, None]
        return {"out_sample": torch.tanh(self.conv(sample * width))}


def traced():
    given = {"sample": torch.randn(2, 2, 6, 6), "timestep": torch.tensor([500])}
    return trace(Net(), given, dims={"sample": {0: "batch"}, "timestep": {}})


def data():
    draw = np.random.default_rng(0)
    return [
        Batch(
            inputs={
                "sample": draw.standard_normal((8, 2, 6, 6)).astype(np.float32),
                "timestep": np.array([t]),
            }
        )
        for t in TIMES
        for _ in range(2)
    ]


def lost(program, whole, times):
    """Relative L2 of outputs at some times."""
    found = []
    for batch in data():
        if batch.inputs["timestep"][0] in times:
            feeds = {n: torch.from_numpy(v) for n, v in batch.inputs.items()}
            a, b = (p.run(feeds)["out_sample"] for p in (program, whole))
            found.append(float((a - b).norm() / b.norm()))
    return np.mean(found)


def test_gains_change_no_number_and_narrow_times_are_rounded_finer():
    whole, plain, gained = traced(), traced(), traced()
    record = effc.apply(StepGain(), gained, data(), dialect=ORT)
    assert record.sites == 1
    assert lost(gained, whole, TIMES) < 1e-6
    (found,) = record.decisions.values()
    assert list(found) == ["0", "100", "500", "900"]
    assert found["0"] == 1 and all(10 < found[t] < 40 for t in ("100", "500", "900"))
    for program in (plain, gained):
        effc.apply(Quantize(), program, data(), dialect=ORT)
    narrow = TIMES[1:]
    assert lost(gained, whole, narrow) < 0.3 * lost(plain, whole, narrow)
    assert lost(gained, whole, (0,)) < 1.5 * lost(plain, whole, (0,))


def test_biases_stay_what_quantisation_puts_right():
    gained = traced()
    effc.apply(StepGain(), gained, data(), dialect=ORT)
    (site,) = [n for n in gained.only().nodes if op_name(n) == "conv2d"]
    assert site.args[2] is not None
    name = next(n for n in gained.only().tensors() if n.endswith("_none"))
    assert not gained.only().tensors()[name].any()


def test_a_time_that_was_not_shown_gives_no_number():
    gained = traced()
    effc.apply(StepGain(), gained, data(), dialect=ORT)
    feeds = {"sample": torch.randn(2, 2, 6, 6), "timestep": torch.tensor([101])}
    assert gained.run(feeds)["out_sample"].isnan().all()


def test_widths_that_do_not_change_are_left():
    weight = torch.ones(4, 2, 3, 3)
    flat = {0.0: 2.0, 100.0: 2.1, 900.0: 1.9}
    assert gains(weight, flat, flat) == {}
    steep = {0.0: 8.0, 100.0: 2.0, 900.0: 2.0}
    assert gains(weight, steep, steep) == pytest.approx({0.0: 1, 100.0: 4, 900.0: 4})
    assert gains(weight, {0.0: 1.0}, {0.0: 1.0}) == {}
    assert gains(weight, {**steep, 900.0: 0.0}, steep) == {}


def test_a_graph_without_a_time_is_left_unless_it_is_named():
    program = effc.trace(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.randn(2, 1, 6, 6))
    batches = [Batch(inputs={"input": torch.randn(2, 1, 6, 6).numpy()})]
    assert effc.apply(StepGain(), program, batches, dialect=ORT).sites == 0
    with pytest.raises(PreconditionError, match="has no input 'timestep'") as caught:
        effc.apply(StepGain(graphs=("main",)), program, batches, dialect=ORT)
    assert caught.value.hint


def test_widths_of_halves_are_those_of_the_whole():
    halves, whole = [WidthByTime(), WidthByTime()], WidthByTime()
    for number in range(6):
        for seen in (halves[number % 2], whole):
            seen.update(torch.tensor([100.0 * (number % 3)]))
            seen.update(torch.tensor([-1.0, 1.0 + number]))
    assert (
        halves[0].merge(halves[1]).widths() == whole.widths() == {0.0: 3.5, 100.0: 4.5, 200.0: 5.5}
    )
