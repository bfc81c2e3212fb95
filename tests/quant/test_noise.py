"""Offsets before a quantiser: what noise is worth, against sums by hand, and biases that take offsets out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.quant import noise
from effc.quant.affine import fake_quantize, weight_qparams
from effc.quant.noise import Grid
from effc.quant.scheme import Scheme

GRID = Grid(scale=0.1, zero_point=0, scheme=Scheme(bits=6, narrow=False))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(st.floats(-3, 3), st.floats(0.01, 2.5), st.sampled_from([1, 2]))
def test_the_closed_form_is_the_mean_over_many_draws(distance, amplitude, power):
    half, count = 0.7, 20_000
    total = 0.0
    for i in range(count):
        y = distance + amplitude * ((2 * i + 1) / count - 1)
        y -= 2 * half * round(y / (2 * half))
        total += (half - abs(y)) ** power
    found = float(noise.expected(torch.tensor(distance), amplitude, half, power=power))
    assert found == pytest.approx(total / count, abs=1e-4)


def test_near_a_border_noise_gains_what_the_theorem_says_and_on_a_code_it_loses():
    half = 0.5
    for x, n in [(0.0, 0.25), (0.1, 0.3), (0.2, 0.2)]:
        change = noise.expected(torch.tensor(x), n, half) - noise.expected(torch.tensor(x), 0, half)
        assert float(change) == pytest.approx(-((n - x) ** 2) / (2 * n), abs=1e-6)
    on_code = torch.tensor(half)
    assert noise.expected(on_code, 0.3, half) > noise.expected(on_code, 0, half) == 0


def test_predicted_and_measured_errors_agree_on_values_that_lie_near_borders():
    x = (normal(4000, 64) * 0.6).clamp(-2, 2)
    x = torch.where(normal(4000, 64, seed=2) > 0, 0.55 + 0.01 * normal(4000, 64, seed=3), x)
    before = noise.lost(x, torch.zeros(64), GRID).abs().mean()
    n = 0.3 * GRID.scale * noise.uniform(64, seed=5)
    measured = noise.lost(x, n, GRID).abs().mean() - before
    distance = noise.to_border(x, GRID)
    half = GRID.scale / 2
    predicted = noise.expected(distance, 0.3 * GRID.scale, half).mean() - before
    assert predicted < -0.01 * before
    assert float(measured) == pytest.approx(float(predicted), rel=0.25)


def test_no_offset_changes_nothing_and_whole_steps_change_nothing_either():
    x = normal(50, 8)
    plain = noise.lost(x, torch.zeros(8), GRID)
    assert torch.equal(plain, GRID.round(x) - x)
    small = x * 0.5
    steps = torch.arange(8) % 3 * GRID.scale
    moved = noise.lost(small, steps, GRID)
    assert torch.allclose(moved, noise.lost(small, torch.zeros(8), GRID), atol=1e-6)


def test_taking_the_offset_out_by_the_bias_is_taking_it_out_in_front():
    x, weight, bias = normal(40, 8), normal(5, 8, seed=1), normal(5, seed=2)
    scheme = Scheme(bits=4, axis=0)
    rounded = fake_quantize(weight, *weight_qparams(weight, scheme), scheme)
    n = 0.05 * noise.uniform(8, seed=3)
    by_bias = GRID.round(x + n) @ rounded.T + noise.denoised(bias, rounded, n)
    in_front = (GRID.round(x + n) - n) @ rounded.T + bias
    assert torch.allclose(by_bias, in_front, atol=1e-5)


def test_compensation_keeps_the_mean_of_the_output():
    x, weight, bias = normal(400, 8) + 1, normal(5, 8, seed=1), normal(5, seed=2)
    scheme = Scheme(bits=3, axis=0)
    rounded = fake_quantize(weight, *weight_qparams(weight, scheme), scheme)
    seen = GRID.round(x - 0.3)
    made = noise.compensated(bias, weight, rounded, x.double().mean(0), seen.double().mean(0))
    wanted, found = x @ weight.T + bias, seen @ rounded.T + made
    assert torch.allclose(wanted.mean(0), found.mean(0), atol=1e-4)


def test_the_best_offset_of_a_channel_is_never_worse_than_the_one_that_it_starts_from():
    x = normal(300, 16).abs() * 0.07
    start = torch.full((16,), 0.013)
    best = noise.best_offsets(x, start, GRID)
    old, new = (noise.lost(x, n, GRID).var(0, correction=0) for n in (start, best))
    assert bool((new <= old + 1e-12).all()) and float(new.sum()) < 0.9 * float(old.sum())


def test_a_refitted_weight_loses_less_on_rows_that_were_not_seen():
    mix = normal(12, 12, seed=9)
    x, unseen = normal(2000, 12) @ mix, normal(500, 12, seed=4) @ mix
    coarse = Grid(scale=2.0, zero_point=0, scheme=Scheme(bits=4, narrow=False))
    weight = normal(6, 12, seed=1)
    made = noise.refit(weight, x, coarse.round(x))

    def loss(candidate):
        gap = unseen @ weight.T - coarse.round(unseen) @ candidate.T
        return float((gap - gap.mean(0)).square().mean())

    assert loss(made) < 0.95 * loss(weight)
    assert torch.allclose(noise.refit(weight, x, x), weight)


def test_constant_inputs_are_no_trouble():
    x = torch.full((20, 4), 0.3)
    weight = normal(3, 4)
    assert torch.isfinite(noise.best_offsets(x, torch.zeros(4), GRID)).all()
    assert torch.isfinite(noise.refit(weight, x, GRID.round(x))).all()


def test_both_kinds_of_noise_are_what_they_say_and_the_same_for_a_seed():
    flat, odd = noise.uniform(50_000, 0), noise.lopsided(50_000, 0)
    assert flat.abs().max() <= 1 and abs(float(flat.std()) - 1 / math.sqrt(3)) < 0.01
    assert abs(float(odd.mean()) + 1) < 0.03 and abs(float(odd.std()) - 2) < 0.03
    assert torch.equal(flat, noise.uniform(50_000, 0))
