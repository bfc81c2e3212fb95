"""Codes that make up for each other: what the paper claims, an oracle, and inputs that are no good."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.calib.collectors import Gram
from effc.quant.affine import dequantize, fake_quantize, quantize, weight_qparams
from effc.quant.gptq import DAMPING, factor, gptq, output_error
from effc.quant.scheme import Scheme

SCHEMES = [
    Scheme(bits=4, axis=0),
    Scheme(bits=4, axis=0, group=16),
    Scheme(bits=4, axis=0, group=16, symmetric=False),
    Scheme(bits=8, axis=0, symmetric=False),
]


def correlated(rows, size, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=torch.Generator().manual_seed(99))
    return torch.randn(rows, size, generator=draw) @ mix


def gram_of(x):
    seen = Gram()
    seen.update(x)
    return seen.matrix()


def made(weight, gram, scheme, **options):
    scale, zero = weight_qparams(weight, scheme)
    codes = gptq(weight, gram, scale, zero, scheme, **options)
    return codes, dequantize(codes, scale, zero, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_weight_error_rises_and_the_output_error_falls(scheme):
    """On rows that were not calibrated on."""
    weight = correlated(24, 64, seed=1) / 8
    _, chosen = made(weight, gram_of(correlated(512, 64)), scheme)
    nearest = fake_quantize(weight, *weight_qparams(weight, scheme), scheme)
    unseen = gram_of(correlated(512, 64, seed=2))
    assert (chosen - weight).norm() > (nearest - weight).norm()
    assert output_error(chosen - weight, unseen) < 0.6 * output_error(nearest - weight, unseen)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 200), st.integers(0, 99))
def test_blocks_change_nothing_but_the_order_of_sums(rows, size, seed):
    """The oracle: algorithm 1 without blocks, and with the inverse that the paper writes down."""
    weight, scheme = correlated(rows, size, seed), Scheme(bits=4, axis=0)
    gram = gram_of(correlated(2 * size + 5, size, seed + 1))
    codes, _ = made(weight, gram, scheme)
    scale, _ = weight_qparams(weight, scheme)
    order = gram.diagonal().argsort(descending=True, stable=True)
    h = (gram + DAMPING * gram.diagonal().mean() * torch.eye(size).double())[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    left, wanted = weight.double()[:, order], torch.zeros(rows, size, dtype=torch.float64)
    for j in range(size):
        wanted[:, j] = (left[:, j] / scale).round().clamp(scheme.low, scheme.high)
        error = (left[:, j] - wanted[:, j] * scale) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    assert float((codes[:, order] == wanted).double().mean()) > 0.99


def test_the_factor_is_that_of_the_damped_inverse():
    gram = gram_of(correlated(64, 16))
    upper = factor(gram)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(16).double()
    assert torch.equal(upper, upper.triu())
    assert torch.allclose(upper.T @ upper @ damped, torch.eye(16, dtype=torch.float64), atol=1e-9)


def test_inputs_that_are_alike_in_nothing_give_nearest_rounding():
    weight, scheme = correlated(8, 32), Scheme(bits=4, axis=0)
    scale, zero = weight_qparams(weight, scheme)
    nearest = quantize(weight, scale, zero, scheme)
    for gram in (torch.eye(32).double(), torch.zeros(32, 32).double()):
        assert torch.equal(gptq(weight, gram, scale, zero, scheme), nearest)


def test_a_channel_that_is_always_zero_is_rounded_to_the_nearest():
    x, weight, scheme = correlated(128, 32), correlated(8, 32, seed=1), Scheme(bits=4, axis=0)
    x[:, 5] = 0
    codes, _ = made(weight, gram_of(x), scheme)
    nearest = quantize(weight, *weight_qparams(weight, scheme), scheme)
    assert torch.equal(codes[:, 5], nearest[:, 5])


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_give_a_singular_matrix_and_codes_all_the_same(rows):
    weight, scheme = correlated(8, 32), Scheme(bits=4, axis=0)
    seen, unseen = correlated(rows, 32, seed=1), gram_of(correlated(512, 32, seed=2))
    _, chosen = made(weight, gram_of(seen), scheme)
    nearest = fake_quantize(weight, *weight_qparams(weight, scheme), scheme)
    assert output_error(chosen - weight, unseen) < 1.5 * output_error(nearest - weight, unseen)


def test_a_matrix_that_is_not_positive_definite_is_damped_until_it_is():
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).double()
    assert bool(torch.isfinite(factor(gram)).all())


@pytest.mark.parametrize("size", [16, 17])
def test_two_neighbouring_codes_stay_within_their_sum(size):
    weight, scheme = correlated(64, size).abs(), Scheme(bits=8, axis=0)
    scale = weight_qparams(weight, scheme)[0] * 1.2
    gram, zero = gram_of(correlated(64, size, seed=1)), torch.zeros(64, dtype=torch.int8)
    codes = gptq(weight, gram, scale, zero, scheme, pair_limit=128).int()
    pairs = torch.nn.functional.pad(codes, (0, size % 2)).unflatten(1, (-1, 2))
    assert int(pairs.clamp(min=0).sum(-1).max()) == 128
    assert int(pairs.clamp(max=0).sum(-1).min()) >= -128


def test_noise_in_the_last_bits_of_activations_changes_nearly_no_codes():
    differing = 0.0
    for seed in range(10):
        x, weight = correlated(1000, 64, seed), correlated(64, 64, seed + 100)
        noise = 1e-6 * correlated(1000, 64, seed + 200).sign()
        found = [made(weight, gram_of(v), SCHEMES[1])[0] for v in (x, x * (1 + noise))]
        differing += float((found[0] != found[1]).double().mean()) / 10
    assert differing < 1e-3
