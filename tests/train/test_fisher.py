"""What a weight matters to what a model answers is what the definition says, and needs samples."""

import pytest
import torch

from effc.errors import TuneError
from effc.train.fisher import information


def test_information_of_a_softmax_is_that_of_the_book():
    """Of logits W x: E (1[y = c] − p_c)² x_j² = p_c (1 − p_c) x_j²."""
    draw = torch.Generator().manual_seed(0)
    weight = (0.3 * torch.randn(3, 4, generator=draw)).requires_grad_()
    unused = torch.ones(2, requires_grad=True)
    x = torch.randn(1, 4, generator=draw)
    samples = [{"x": x}] * 4000
    found = information(
        lambda f: {"logits": f["x"] @ weight.T}, {"w": weight, "u": unused}, samples
    )
    p = (x @ weight.T).softmax(-1)[0].detach()
    torch.testing.assert_close(found["w"], (p * (1 - p))[:, None] * x**2, rtol=0.1, atol=1e-3)
    assert not found["u"].any() and not found["w"].requires_grad


def test_rows_of_one_answer_are_draws_of_their_own():
    weight = torch.zeros(2, 1, requires_grad=True)
    found = information(
        lambda f: {"logits": f["x"] @ weight.T}, {"w": weight}, [{"x": torch.ones(1, 50, 1)}] * 200
    )
    assert found["w"][0].item() == pytest.approx(50 / 4, rel=0.25)  # and not 50² / 4, nor 1 / 4


@pytest.mark.parametrize(
    ("samples", "value", "what"),
    [([], 1.0, "nothing to see"), ([{"x": torch.ones(1, 1)}], float("nan"), "no numbers")],
)
def test_what_has_no_information_is_refused(samples, value, what):
    weight = torch.full((2, 1), value, requires_grad=True)
    with pytest.raises(TuneError, match=what) as refused:
        information(lambda f: {"logits": f["x"] @ weight.T}, {"w": weight}, samples)
    assert refused.value.hint
