"""How far apart two sets of outputs are, without room for copies of them."""

import math

import pytest
import torch
from graphs import normal
from torch.utils._python_dispatch import TorchDispatchMode

from effc.ir.check import AT_ONCE, Drift, drift

FAR = Drift(max_abs=math.inf, rel_l2=math.inf)


def test_drift_is_the_largest_difference_and_the_relative_norm():
    a = normal(3, 5, 4)
    b = a + 0.1 * normal(3, 5, 4, seed=1)
    found = drift({"y": a}, {"y": b})
    assert found.max_abs == pytest.approx(float((a - b).abs().max()))
    assert found.rel_l2 == pytest.approx(float((a - b).norm() / a.norm()))


def test_padded_positions_do_not_count():
    a, mask = normal(2, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]])
    b = a.clone()
    b[0, 2] += 100
    assert drift({"y": a}, {"y": b}, mask).max_abs == 0
    b[1, 2, 0] += 0.5
    assert drift({"y": a}, {"y": b}, mask).max_abs == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3, 0, 4), (7,)])
def test_outputs_of_any_rank_and_empty_ones_are_compared(shape):
    a = torch.ones(shape)
    found = drift({"y": a}, {"y": 2 * a}, torch.ones(2, 3))
    assert found == (Drift(max_abs=1.0, rel_l2=1.0) if a.numel() else Drift())


def test_a_value_that_is_no_number_on_one_side_and_another_shape_are_infinitely_far():
    a = normal(3, 4)
    b = a.clone()
    b[2, 1] = math.nan
    assert drift({"y": a}, {"y": b}) == FAR
    assert drift({"y": b}, {"y": b}) == Drift()
    assert drift({"y": a}, {"y": a[:2]}) == FAR


def test_large_outputs_are_compared_a_few_rows_at_a_time():
    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                self.values = max(self.values, made.numel())
            return made

    a = torch.ones(4, 3, AT_ONCE // 4)
    with Largest() as largest:
        assert drift({"y": a}, {"y": a * 2}, torch.ones(4, 3)) == Drift(max_abs=1.0, rel_l2=1.0)
    assert AT_ONCE // 4 <= largest.values <= AT_ONCE
