"""Eigenvectors that are the same for the same matrix, whatever their signs and spaces were found as."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effc.quant.principal import principal


def drawn(seed, *shape):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=draw, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), n=st.integers(1, 12), rank=st.integers(0, 12))
def test_they_are_orthonormal_and_sorted_by_variance(seed, n, rank):
    rows = drawn(seed, rank, n)
    gram = rows.T @ rows
    found = principal(gram)
    assert torch.allclose(found.T @ found, torch.eye(n, dtype=torch.float64), atol=1e-12)
    turned = found.T @ gram @ found
    size = 1 + float(gram.abs().max())
    assert torch.allclose(turned, torch.diag(turned.diag()), atol=1e-9 * size)
    assert bool((turned.diag()[:-1] - turned.diag()[1:] >= -1e-9 * size).all())


def test_the_largest_entry_of_each_is_positive():
    rows = drawn(0, 50, 7)
    found = principal(rows.T @ rows)
    assert bool((found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all())


def test_channels_that_are_alike_stay_in_order():
    assert torch.equal(principal(torch.eye(5)), torch.eye(5, dtype=torch.float64))
    assert torch.equal(principal(torch.zeros(3, 3)), torch.eye(3, dtype=torch.float64))
    found = principal(torch.diag(torch.tensor([1.0, 4.0, 1.0, 4.0])))
    assert torch.equal(found, torch.eye(4, dtype=torch.float64)[:, [1, 3, 0, 2]])


def test_a_space_without_variance_has_one_basis():
    """The same matrix but for its last bits, which turn the vectors that LAPACK finds in the empty space."""
    rows = drawn(3, 4, 9)
    gram = rows.T @ rows
    noise = 1e-14 * drawn(4, 9, 9)
    other = gram + (noise + noise.T)
    plain = [torch.linalg.eigh(g).eigenvectors for g in (gram, other)]
    assert float((plain[0][:, :5].abs() - plain[1][:, :5].abs()).abs().max()) > 1e-2
    assert torch.allclose(principal(gram), principal(other), atol=1e-10)
