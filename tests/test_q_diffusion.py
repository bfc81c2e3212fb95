"""What the example of a diffusion model measures with: distances between sets of pictures, and places of an engine."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import effc
from effc.backends.dialect import ORT
from effc.backends.ort import Ort
from effc.calib.data import Batch
from effc.passes.quantize import Quantize
from kit import example_modules

PLACE = Path(__file__).resolve().parent.parent / "examples" / "q_diffusion"


@pytest.fixture
def example(monkeypatch):
    yield from example_modules(monkeypatch, PLACE)


def drawn(count, seed, width=4):
    return np.random.default_rng(seed).standard_normal((count, width))


def test_a_frechet_distance_is_that_of_the_two_normal_laws(example):
    """Means (0, 0) and (3, 4), deviations (1, 1) and (2, 3): 25 + (2 − 1)² + (3 − 1)²."""
    frechet = example("distances").frechet
    x = drawn(200_000, 0, 2)
    assert frechet(x, x * [2, 3] + [3, 4]) == pytest.approx(30, rel=0.02)
    assert frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_a_kid_of_one_law_is_around_zero_and_of_another_is_not(example):
    kid = example("distances").kid
    same = [kid(drawn(60, i), drawn(60, 100 + i)) for i in range(40)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0 < max(same)
    assert kid(drawn(60, 0), drawn(60, 1) + 1) > max(same)


def test_a_null_is_taken_off_and_pairs_stay_together(example):
    """Features that are those of the float model have no distance but the null's; a shift of all has its square."""
    beside_null, wanted = example("distances").beside_null, drawn(400, 0)
    none = beside_null(wanted, wanted, draws=20)
    assert none["frechet_minus_null"]["mean"] == 0 and none["frechet_minus_null"]["null"] > 0
    assert none["precision"] == none["recall"] == 1
    moved = beside_null(wanted + 1, wanted, draws=40)["frechet_minus_null"]
    assert moved["mean"] == pytest.approx(4, rel=0.2)
    assert moved["low"] < moved["mean"] < moved["high"]
    assert beside_null(wanted + 9, wanted, draws=20)["precision"] == 0


def test_a_classifier_learns_what_it_is_shown(example):
    distances, draw = example("distances"), np.random.default_rng(0)
    labels = draw.integers(0, 2, 400)
    pictures = draw.standard_normal((400, 1, 28, 28)).astype(np.float32) * 0.1 - 0.5
    pictures[labels == 1, :, 10:18, 10:18] = 1
    model = distances.trained(pictures, labels)
    features = model.features(pictures)
    assert features.shape == (400, distances.WIDTH)
    with torch.no_grad():
        said = model(torch.from_numpy(pictures)).argmax(1).numpy()
    assert (said == labels).mean() > 0.98
    again = distances.trained(pictures, labels)
    assert np.array_equal(features, again.features(pictures))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.end = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return self.end(nn.functional.silu(self.b(nn.functional.silu(self.a(x)))))


@pytest.fixture
def engine(tmp_path):
    torch.manual_seed(0)
    program = effc.trace(Two(), {"x": torch.randn(2, 3, 8, 8)})
    data = [Batch(inputs={"x": torch.randn(4, 3, 8, 8).numpy()}) for _ in range(4)]
    effc.apply(Quantize(bits=4, weight_range="mse"), program, data, dialect=ORT)
    return Ort().lower(program.only(), tmp_path).path, data[0].inputs


def test_every_place_of_an_engine_is_within_a_step_of_its_file(example, engine):
    found = example("sites").steps_off(*engine)
    assert len(found) == 5  # what each layer reads, and the grids behind two of them
    assert max(found.values()) <= 1


def test_a_place_that_is_wrong_is_seen_there_and_nowhere_else(example, engine, monkeypatch):
    """The engine adds something else behind one layer, as a kernel that is wrong would."""
    sites, (path, feeds) = example("sites"), engine
    right, ran = sites.steps_off(path, feeds), sites._ran

    def spoilt(model, given, names, *, whole):
        if whole:
            bias = next(v for v in model.graph.initializer if v.name == "a.bias_int32")
            bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 2000, bias.name))
        return ran(model, given, names, whole=whole)

    monkeypatch.setattr(sites, "_ran", spoilt)
    wrong = sites.steps_off(path, feeds)
    far = [name for name in wrong if wrong[name] > right[name] + 1]
    assert len(far) == 1 and wrong[far[0]] > 5


def test_codes_of_four_bit_lie_on_disk_in_four(engine):
    path, _ = engine
    kinds = {v.name: v.data_type for v in onnx.load(path).graph.initializer}
    assert kinds["b.weight_int8.int4"] == onnx.TensorProto.INT4
    assert kinds["a.weight_int8"] == onnx.TensorProto.INT8  # a node would take more than it saves
    packed = next(v for v in onnx.load(path).graph.initializer if v.name.endswith(".int4"))
    assert len(packed.raw_data) == 16 * 8 * 9 // 2
    assert numpy_helper.to_array(packed).astype(np.int8).min() >= -8
