"""Scaling channels by powers of two: the same numbers, and less to lose in integers."""

import json

import numpy as np
import pytest
import torch
from graphs import Call, Tied, distance, normal
from torch import nn

import effc
from effc.backends.dialect import ONNX, OPENVINO, ORT
from effc.calib.collectors import Channels
from effc.calib.data import Batch
from effc.errors import CalibrationError
from effc.passes.quantize import Quantize
from effc.passes.smooth import MOST_POWER, Smooth, expected_error

SIZE = 32


def uneven(seed=0, *shape):
    """Normal numbers, a few channels of which are thirty times as large."""
    x = normal(*(shape or (64, SIZE)), seed=seed)
    x[..., ::11] *= 30
    return x


def data(count=4):
    return [Batch(inputs={"x": uneven(seed).numpy()}) for seed in range(count)]


def layers():
    torch.manual_seed(0)
    parts = {"q": nn.Linear(SIZE, 16), "k": nn.Linear(SIZE, 8)}
    module = Call(lambda self, x: (self.q(x), self.k(x)), **parts)
    return effc.trace(module.eval(), {"x": uneven()}, dims={"x": {0: "batch"}})


def smoothed(program=None, **options):
    program = program or layers()
    record = effc.apply(Smooth(**options), program, data(), dialect=OPENVINO)
    return program, record


def test_the_graph_computes_the_same_numbers():
    before, (after, record) = layers(), smoothed()
    x = uneven(9)
    wanted, found = before.run(x=x), after.run(x=x)
    assert record.sites == 2
    assert record.effect == "exact"
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_layers_that_read_one_value_share_its_scaling():
    program, record = smoothed()
    assert [n.target for n in program.only().nodes].count(torch.ops.aten.mul.Tensor) == 1
    assert len(record.decisions) == 1


def test_integers_lose_less():
    lost = []
    for program in (layers(), smoothed()[0]):
        wanted = program.run(x=uneven(9))
        effc.apply(Quantize(), program, data(), dialect=OPENVINO)
        found = program.run(x=uneven(9))
        lost.append(max(distance(wanted[name], found[name]) for name in wanted))
    assert lost[1] < lost[0] / 2


def test_the_expected_error_is_the_one_that_is_made():
    program = layers()
    seen = Channels()
    for batch in data():
        seen.update(torch.from_numpy(batch.inputs["x"]))
    low, high, squares = (torch.from_numpy(v) for v in seen.steady())
    weights = [t for n, t in program.only().tensors().items() if n.endswith("weight")]
    expected = expected_error(low, high, squares, weights, torch.zeros(SIZE))
    x = torch.cat([torch.from_numpy(b.inputs["x"]) for b in data()])
    wanted = program.run(x=x)
    effc.apply(Quantize(range="minmax", overflow_fix=False), program, data(), dialect=OPENVINO)
    found = program.run(x=x)
    made = sum(float((wanted[n] - found[n]).double().square().sum()) for n in wanted) / len(x)
    assert expected == pytest.approx(made, rel=0.2)


def test_nothing_is_scaled_where_nothing_is_gained():
    program = layers()
    even = [Batch(inputs={"x": normal(64, SIZE, seed=seed).numpy()}) for seed in range(2)]
    record = effc.apply(Smooth(), program, even, dialect=OPENVINO)
    assert record.sites == 0
    assert list(record.decisions.values()) == [[]]


def test_a_target_that_pays_for_it_asks_for_more_or_is_left_alone():
    program = layers()
    assert effc.apply(Smooth(), program, data(), dialect=ONNX).sites == 0
    assert effc.apply(Smooth(), program.clone(), data(), dialect=ORT).sites == 2
    assert effc.apply(Smooth(gain_db=40.0), program, data(), dialect=ORT).sites == 0


def test_a_weight_that_others_read_is_left_alone():
    program = effc.trace(Tied().eval(), {"ids": torch.arange(6).reshape(2, 3)})
    assert Smooth(gain_db=0.0).sites(program.only()) == []


def test_decisions_are_small_and_can_be_replayed():
    _, record = smoothed()
    (powers,) = json.loads(json.dumps(list(record.decisions.values())))
    assert len(powers) == SIZE and all(isinstance(p, int) and abs(p) <= MOST_POWER for p in powers)
    again = layers()
    effc.apply(Smooth(), again, recorded=record.decisions, dialect=OPENVINO)
    x = uneven(9)
    assert all(torch.equal(v, again.run(x=x)[n]) for n, v in smoothed()[0].run(x=x).items())


def test_a_value_that_is_no_number_is_refused():
    bad = [Batch(inputs={"x": np.full((2, SIZE), np.nan, np.float32)})]
    with pytest.raises(CalibrationError, match="not a number"):
        effc.apply(Smooth(), layers(), bad, dialect=OPENVINO)


def test_channels_seen_in_any_order_are_the_same():
    parts = [uneven(seed) for seed in range(4)]
    one, other = Channels(), Channels()
    for part in parts:
        one.update(part)
    for part in reversed(parts):
        fresh = Channels()
        fresh.update(part)
        other = other.merge(fresh)
    for a, b in zip(one.steady(), other.steady(), strict=True):
        assert np.array_equal(a, b)
    whole = torch.cat(parts).double()
    assert np.allclose(one.low, whole.amin(0)) and np.allclose(one.high, whole.amax(0))
    assert np.allclose(one.squares / one.count, whole.square().mean(0))


def test_padded_positions_are_left_out():
    x = uneven(0, 2, 3, SIZE)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    masked, real = Channels(), Channels()
    masked.update(x, mask)
    real.update(x[mask.bool()])
    assert masked.count == real.count == 3
    assert np.array_equal(masked.high, real.high)


def test_little_is_not_expected_of_few_rows():
    """What a rectifier lets through is uneven by chance; brought to one size, unseen rows are clipped."""

    def run(rows):
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        module = Call(lambda self, x: self.body(x), body=body)
        program = effc.trace(module.eval(), {"x": normal(4, 32)}, dims={"x": {0: "batch"}})
        seen = [Batch(inputs={"x": normal(rows, 32).numpy()})]
        lost, wanted = [], program.run(x=normal(256, 32, seed=9))["output"]
        for passes in ((Quantize(),), (Smooth(), Quantize())):
            made = program.clone()
            for pass_ in passes:
                effc.apply(pass_, made, seen, dialect=OPENVINO)
            lost.append(distance(wanted, made.run(x=normal(256, 32, seed=9))["output"]))
        return lost

    for rows in (16, 64, 256):
        plain, smoothed = run(rows)
        assert smoothed < 1.1 * plain
