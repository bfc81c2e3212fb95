"""Roundings that are learned begin at the weight itself and end on its grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.quant import rounding
from effc.quant.affine import dequantize, quantize, weight_qparams
from effc.quant.scheme import Scheme


def gridded(bits=4, shape=(6, 5, 3, 3), seed=0, **options):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    scheme = Scheme(bits=bits, axis=0)
    return weight, *weight_qparams(weight, scheme, **options), scheme


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from((3, 4, 8)), seed=st.integers(0, 1000))
def test_it_begins_at_the_weight_itself(bits, seed):
    weight, scale, zero, scheme = gridded(bits, seed=seed)
    a = rounding.begin(weight, scale, scheme)
    made = rounding.between(weight, rounding.soft(a), scale, zero, scheme)
    assert torch.allclose(made, weight, atol=2e-5 * float(scale.max()))


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from((3, 4, 8)), seed=st.integers(0, 1000))
def test_what_is_chosen_is_a_neighbour_on_the_grid_and_what_nearest_has_where_nothing_moved(
    bits, seed
):
    weight, scale, zero, scheme = gridded(bits, seed=seed)
    a = rounding.begin(weight, scale, scheme)
    nearest = quantize(weight, scale, zero, scheme)
    kept = rounding.hard(weight, a, scale, zero, scheme)
    tied = ((weight / scale.reshape(-1, 1, 1, 1)).remainder(1) - 0.5).abs() < 1e-4
    assert torch.equal(kept[~tied], nearest[~tied])
    draw = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    moved = rounding.hard(weight, draw, scale, zero, scheme)
    assert int((moved.int() - nearest.int()).abs().max()) <= 1
    assert scheme.low <= int(moved.min()) and int(moved.max()) <= scheme.high


@pytest.mark.parametrize("shape", [(8, 7), (4, 6, 3, 3)])
def test_neighbours_never_add_up_to_more_than_their_limit(shape):
    weight, scale, zero, scheme = gridded(8, shape, pair_limit=128)
    up = torch.where(weight > 0, 1.0, -1.0)  # all of them away from zero
    rows = rounding.hard(weight, up, scale, zero, scheme, pair_limit=128)
    rows = (rows.movedim(1, -1) if rows.dim() > 2 else rows).flatten(1).int()
    pairs = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2)).unflatten(1, (-1, 2))
    most = torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1))
    assert int(most.max()) <= 128


def test_the_pull_begins_late_and_ends_where_every_rounding_is_decided():
    assert rounding.beta(0, 100) is None and rounding.beta(19, 100) is None
    assert rounding.beta(20, 100) == pytest.approx(20, abs=0.2) and rounding.beta(99, 100) == 2
    assert float(rounding.pull(torch.zeros(5), 2.0)) == pytest.approx(5)
    assert float(rounding.pull(torch.tensor([-9.0, 9.0]), 2.0)) == 0


def test_learning_lowers_the_error_of_the_output_and_raises_that_of_the_weight():
    """The paper's claim, on inputs whose channels go together (Nagel et al. 2020, section 3)."""
    draw = torch.Generator().manual_seed(0)
    weight, scale, zero, scheme = gridded(3, (8, 16))
    x = torch.randn(256, 4, generator=draw) @ torch.randn(4, 16, generator=draw)
    a = rounding.begin(weight, scale, scheme).requires_grad_()
    nearest = quantize(weight, scale, zero, scheme)
    least = (x @ (dequantize(nearest, scale, zero, scheme) - weight).T).square().mean()
    optimizer = torch.optim.Adam([a], lr=3e-2)
    for step in range(300):
        made = rounding.between(weight, rounding.soft(a), scale, zero, scheme)
        loss = (x @ (made - weight).T).square().mean() / least
        if (power := rounding.beta(step, 300)) is not None:
            loss = loss + 2 * rounding.pull(a, power) / a.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen = rounding.hard(weight, a.detach(), scale, zero, scheme)
    lost = [dequantize(codes, scale, zero, scheme) - weight for codes in (nearest, chosen)]
    outputs = [float((x @ e.T).square().mean()) for e in lost]
    assert outputs[1] < 0.6 * outputs[0]
    assert float(lost[1].norm()) > float(lost[0].norm())
