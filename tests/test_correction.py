"""What a sampler puts right: what its model is off by on average, and in proportion."""

import json

import numpy as np
import pytest

from effc import correction, painting
from effc.correction import Correction, measured
from effc.errors import PackageError
from effc.sampling import predicted
from kit import cli

FACTORY = """
import torch
from torch import nn
import effc

class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, sample, timestep):
        told = self.time(timestep[:, None].float() / 1000)[:, :, None, None]
        return {"out_sample": self.b(torch.nn.functional.silu(self.a(sample) + told))}

def make():
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([500])}
    return effc.Source(
        modules={"unet": Denoiser()}, inputs={"unet": inputs},
        dims={"unet": {"sample": {0: "batch"}, "timestep": {}}},
        scheduler={"_class_name": "DDPMScheduler"}, name="small",
    )
"""


def feeds(count=40, rows=8):
    draw = np.random.default_rng(0)
    for number in range(count):
        x = draw.standard_normal((rows, 2, 4, 4)).astype(np.float32)
        yield {"sample": x, "timestep": np.array([100 * (number % 2)])}


def model(given):
    return given["sample"]


def spoilt(given):
    """Half as large in one channel and off by as much as the time says in the other, with noise of its own."""
    x = given["sample"].copy()
    x[:, 0] *= 0.5
    x[:, 1] += given["timestep"][0] / 100
    return x + 0.01 * np.sin(1000 * x)


def test_gain_and_offset_of_every_time_and_channel_are_found():
    found = measured(model, spoilt, feeds())
    assert found.times.tolist() == [0.0, 100.0]
    assert np.allclose(found.gain, [[2, 1], [2, 1]], atol=0.02)
    assert np.allclose(found.offset, [[0, 0], [0, -1]], atol=0.02)
    (given,) = list(feeds(2))[1:]
    lost = [
        np.square(x - model(given)).mean() for x in (spoilt(given), found(100.0, spoilt(given)))
    ]
    assert lost[1] < 0.01 * lost[0]


def test_a_mean_alone_is_put_right_where_that_is_asked_for():
    found = measured(model, spoilt, feeds(), mean_only=True)
    assert (found.gain == 1).all()
    assert np.allclose(found.offset, [[0, 0], [0, -1]], atol=0.02)


def test_an_engine_that_is_right_is_left_as_it_is():
    found = measured(model, model, feeds())
    assert np.allclose(found.gain, 1) and np.allclose(found.offset, 0, atol=1e-9)


def test_no_correction_is_worse_than_none_where_it_was_measured():
    given = list(feeds())
    found = measured(model, spoilt, given)
    for time in (0.0, 100.0):
        at = [each for each in given if each["timestep"][0] == time]
        before = sum(np.square(spoilt(each) - model(each)).sum() for each in at)
        after = sum(np.square(found(time, spoilt(each)) - model(each)).sum() for each in at)
        assert after <= before


def test_between_two_times_it_changes_evenly_and_beyond_them_it_stays():
    found = measured(model, spoilt, feeds())
    ones = np.ones((1, 2, 1, 1), np.float32)
    at = [float(found(time, ones)[0, 1, 0, 0]) for time in (0.0, 50.0, 100.0, 900.0)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2, abs=1e-6) and at[3] == at[2]


def test_a_table_comes_back_as_it_was_written():
    found = Correction.from_json(json.loads(json.dumps(measured(model, spoilt, feeds()).to_json())))
    assert found.to_json() == measured(model, spoilt, feeds()).to_json()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([], "no table"),
        ({"times": [0.0], "gain": [[1.0]]}, "no table"),
        ({"times": [0.0, 1.0], "gain": [[1.0]], "offset": [[0.0]]}, "not as many"),
        ({"times": [0.0], "gain": [[1.0]], "offset": [[float("nan")]]}, "numbers are none"),
        ({"times": [1.0, 0.0], "gain": [[1.0]] * 2, "offset": [[0.0]] * 2}, "do not rise"),
    ],
)
def test_a_broken_table_is_a_letter(content, part):
    with pytest.raises(PackageError, match=part) as caught:
        Correction.from_json(content)
    assert caught.value.hint


def test_a_package_carries_it_and_its_sampler_applies_it(tmp_path):
    (tmp_path / "model.py").write_text(FACTORY)
    recipe = {
        "source": {"python": f"{tmp_path / 'model.py'}:make"}, "bench": False, "gate": False,
        "passes": [{"pass": "quantize", "bits": 3}],
        "calib": {"trajectories": 4, "steps": 5, "batch": 4, "correct": True},
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    table = correction.read(tmp_path / "out", "ort")
    assert table is not None and table.times.tolist() == [0.0, 200.0, 400.0, 600.0, 800.0]
    assert correction.read(tmp_path / "out", "openvino") is None
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    with painting.opened(tmp_path / "out") as pipeline:
        assert pipeline.correction is not None
        plain = predicted(pipeline.run("unet", {"sample": x, "timestep": np.array([400])}))
        right = pipeline.correction(400.0, plain)
    assert not np.allclose(plain, right)
    assert cli("verify", tmp_path / "out").code == 0


def test_it_is_for_trajectories_alone(tmp_path):
    recipe = {"source": {"python": "x.py:make"}, "calib": {"file": "x.npz", "correct": True}}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    ran = cli("compile", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert ran.code == 3 and "is for trajectories" in ran.err
