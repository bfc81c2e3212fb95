"""What a sequence has of detail at doubling scales: Daubechies' wavelet of six vanishing moments, as convolutions.

    a₀ = x    aⱼ[k] = Σₙ h[n] aⱼ₋₁[2k + 1 − n]    dⱼ[k] = Σₙ g[n] aⱼ₋₁[2k + 1 − n]    g[n] = (−1)ⁿ⁺¹ h[11 − n]

Beyond its ends a sequence is 0. A level of L positions has ⌊(L + 11) / 2⌋ (Daubechies, Comm. Pure Appl. Math. 1988,
table 1). A polynomial of degree five has no detail; a sequence has the energy of its details and of the last a.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LOW = (
    -0.00107730108499558, 0.004777257511010651, 0.0005538422009938016, -0.031582039318031156,
    0.02752286553001629, 0.09750160558707936, -0.12976686756709563, -0.22626469396516913,
    0.3152503517092432, 0.7511339080215775, 0.4946238903983854, 0.11154074335008017,
)  # fmt: skip
TAPS = len(LOW)


def details(x: Tensor, levels: int) -> list[Tensor]:
    """The details of each level, finest first, of a sequence [batch, positions, channels] along its positions."""
    return _levels(x, levels)[0]


def _levels(x: Tensor, levels: int) -> tuple[list[Tensor], Tensor]:
    """Details, and what is left below them."""
    low = x.new_tensor(LOW)
    signs = x.new_tensor([(-1.0) ** (n + 1) for n in range(TAPS)])
    bank = torch.stack([low.flip(0), signs.flip(0) * low])[:, None]  # as correlated: last tap first
    found, rest = [], x
    for _ in range(levels):
        batch, length, channels = rest.shape
        rows = rest.transpose(1, 2).reshape(batch * channels, 1, length)
        wide = functional.pad(rows, (TAPS - 2, TAPS - 1))
        made = functional.conv1d(wide, bank, stride=2)[..., : (length + TAPS - 1) // 2]
        both = made.view(batch, channels, 2, -1).permute(2, 0, 3, 1)
        rest = both[0]
        found.append(both[1])
    return found, rest
