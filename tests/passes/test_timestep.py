"""The time path as a table: exact for the times of the sampler, and no number for any other."""

import numpy as np
import pytest
import torch
from pipelines import FACTORY
from torch import nn

import effc
from effc.backends.eager import GraphEngine
from effc.calib.collectors import Distinct
from effc.calib.data import Batch
from effc.errors import CalibrationError, PreconditionError
from effc.ir.select import op_name
from effc.ir.trace import trace
from effc.passes.timestep import TimestepTable

TIMES = (0.0, 250.0, 979.5)


class Net(nn.Module):
    """A sinus of the time, two layers, and an addition to channels, as a UNet has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.conv = (
            nn.Linear(8, 16),
            nn.Linear(16, 4),
            nn.Conv2d(4, 4, 3, padding=1),
        )

    def forward(self, sample, timestep):
        rate = torch.exp(-torch.arange(4) / 2.0)
        angle = (timestep * torch.ones(sample.shape[0]))[:, None] * rate[None]
        time = self.b(nn.functional.silu(self.a(torch.cat([angle.sin(), angle.cos()], -1))))
        return {"out_sample": self.conv(sample + time[:, :, None, None])}


def traced(module=None, time=None):
    sample = torch.randn(2, 4, 6, 6)
    time = torch.tensor([250.0]) if time is None else time
    dims = {"sample": {0: "batch"}, "timestep": {0: "batch"} if len(time) > 1 else {}}
    return trace(module or Net(), {"sample": sample, "timestep": time}, dims=dims)


def run(program, sample, time):
    return GraphEngine(program.only())({"sample": sample, "timestep": np.array(time, np.float32)})[
        "out_sample"
    ]


SAMPLE = np.random.default_rng(0).standard_normal((3, 4, 6, 6)).astype(np.float32)


def test_a_table_gives_what_the_time_path_gives_bit_for_bit():
    program = traced()
    before = program.clone()
    assert effc.apply(TimestepTable(at=TIMES), program).sites == 1
    ops = {op_name(node) for node in program.only().nodes}
    assert "linear" not in ops and {"index_select", "argmax"} <= ops
    for time in TIMES:  # of one row, since a product of many rows is summed in another order
        assert np.array_equal(run(program, SAMPLE[:1], [time]), run(before, SAMPLE[:1], [time]))
        assert np.allclose(run(program, SAMPLE, [time]), run(before, SAMPLE, [time]), atol=1e-6)


def test_a_time_for_every_row_finds_a_row_each():
    class Rows(Net):
        def forward(self, sample, timestep):
            angle = timestep[:, None] * torch.exp(-torch.arange(4) / 2.0)[None]
            time = self.b(torch.relu(self.a(torch.cat([angle.sin(), angle.cos()], -1))))
            return {"out_sample": self.conv(sample + time[:, :, None, None])}

    program = traced(Rows(), torch.tensor([0.0, 250.0]))
    before = program.clone()
    assert effc.apply(TimestepTable(at=TIMES), program).sites == 1
    found, wanted = (run(p, SAMPLE, [979.5, 0.0, 250.0]) for p in (program, before))
    assert np.allclose(found, wanted, atol=1e-6)


def test_a_time_that_is_not_in_the_table_is_no_number():
    program = traced()
    effc.apply(TimestepTable(at=TIMES), program)
    assert np.isnan(run(program, SAMPLE, [251.0])).all()


def test_the_times_are_those_that_calibration_shows_and_are_recorded():
    program, again = traced(), traced()
    data = [
        Batch(inputs={"sample": SAMPLE, "timestep": np.array([t], np.float32)})
        for t in (7.0, 3.0, 7.0)
    ]
    record = effc.apply(TimestepTable(), program, data)
    assert record.decisions == {"main/times": [3.0, 7.0]}
    effc.apply(TimestepTable(), again, recorded=record.decisions)
    assert np.array_equal(run(program, SAMPLE, [3.0]), run(again, SAMPLE, [3.0]))
    with pytest.raises(CalibrationError, match="no calibration data"):
        effc.apply(TimestepTable(), traced(), [])


def test_what_hangs_on_more_than_the_time_stays():
    class Mixed(Net):
        def forward(self, sample, timestep):
            time = self.b(torch.relu(self.a(timestep.reshape(1, 1).expand(1, 8) * sample.mean())))
            return {"out_sample": self.conv(sample + time[:, :, None, None])}

    program = traced(Mixed())
    assert effc.apply(TimestepTable(at=TIMES), program).sites == 1  # where the sample comes in
    assert "linear" in {op_name(node) for node in program.only().nodes}


def test_a_graph_without_a_time_is_left_and_one_that_was_meant_is_refused():
    program = trace(nn.Linear(4, 2), {"input": torch.randn(2, 4)})
    assert effc.apply(TimestepTable(at=TIMES), program).sites == 0
    with pytest.raises(PreconditionError, match="no input 'timestep'"):
        effc.apply(TimestepTable(at=TIMES, graphs=("main",)), program)


def test_values_are_collected_in_any_order_and_not_without_end():
    a, b = Distinct(), Distinct()
    a.update(torch.tensor([3, 1, 3]))
    b.update(torch.tensor([2.5]))
    assert a.merge(b).values() == [1.0, 2.5, 3.0]
    with pytest.raises(CalibrationError, match="more than 10000"):
        a.update(torch.arange(20_000))


@pytest.mark.slow
@pytest.mark.parametrize("word", ["timestep-table", "step-gain"])
def test_an_engine_with_a_table_paints_and_says_which_steps_it_knows(tmp_path, monkeypatch, word):
    import json

    from kit import assert_letter, cli

    monkeypatch.setattr("effc.passes.step_gain.LEAST_GAIN", 0)  # whatever it is worth

    (tmp_path / "mine.py").write_text(FACTORY)
    recipe = {
        "source": {"python": f"{tmp_path / 'mine.py'}:make"}, "bench": False,
        "calib": {"trajectories": 2, "steps": 7}, "passes": [word],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert cli("run", tmp_path / "out", "--steps", 7, "-o", tmp_path / "a.png").code == 0
    ran = cli("run", tmp_path / "out", "--steps", 9, "-o", tmp_path / "b.png")
    assert_letter(ran, "UsageError", 2, "knows 7 times", "111 is none of them")
    assert not (tmp_path / "b.png").exists()
