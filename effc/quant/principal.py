"""Principal components of a matrix Σ x xᵀ, the same for the same matrix.

An eigenvector is one up to its sign, and eigenvalues that are alike have a space of them and no vectors of their own.
Signs are chosen by the largest entry, and such a space is given the axes that it lies nearest to, first ones first.
"""

from __future__ import annotations

from itertools import pairwise

import scipy.linalg
import torch
from torch import Tensor

ALIKE = 1e-10
"""Neighbouring eigenvalues that are no further apart than this part of the largest count as one."""


def principal(gram: Tensor) -> Tensor:
    """Orthonormal eigenvectors of a symmetric matrix [n, n] as columns [n, n] in float64, largest eigenvalue first."""
    values, vectors = torch.linalg.eigh(gram.to(torch.float64))
    values, vectors = values.flip(0), vectors.flip(1)
    apart = values[:-1] - values[1:] > ALIKE * values[0]
    ends = [0, *(1 + int(i) for i in apart.nonzero()), len(values)]
    parts = [_axes(vectors[:, a:b]) for a, b in pairwise(ends)]
    return torch.cat(parts, 1).contiguous()


def _axes(space: Tensor) -> Tensor:
    """A basis [n, k] of the space that columns [n, k] span, which hangs on the space alone."""
    if space.shape[1] > 1:
        basis, _, _ = scipy.linalg.qr((space @ space.T).numpy(), pivoting=True)
        space = torch.from_numpy(basis)[:, : space.shape[1]]
    sizes = space.abs()
    largest = (sizes >= (1 - 1e-9) * sizes.amax(0)).to(torch.int8).argmax(0)
    return space * torch.sign(space[largest, torch.arange(space.shape[1])])
