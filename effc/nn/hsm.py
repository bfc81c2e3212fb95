"""Hybrid sparsification modules: a small change of basis behind a layer, and a mask over it (PAT, AAAI 2025).

    y = s ⊙ M ⊙ D x            D = I + U L            L [rank, width], U [width, rank], s [width]
    y = M ⊙ D x                D = I + U diag(v) L    the paper's form, v [rank]
    M = sigmoid(τ · m) + β     one mask for all of them, m [width]

As they are made (U or v 0, s 1, τ 0, β ½) they change nothing. A channel whose M is 0 is exactly 0 in y, and D and s go
into the layer in front: W' = diag(s) D W.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

WORD = "hsm"
"""What the modules stand under in `Graph.pending`, what the names of their tensors begin with, and the term's word."""
Mode = Literal["paper", "released", "effc"]
"""How the paper says it, how its authors' code does it, and ours where the two conflict."""
HARD = 1e6
"""τ of a gate that is 0 or 1, for masks of at least `LEAST` to either side."""
LEAST = 1e-3
EDGE = 0.05
"""A gate closer than this to 0 or 1 counts as one that has decided."""


class Gate(nn.Module):
    """The mask over channels, [width]: above 0 a channel stays. τ and β are what a training sets at every step."""

    mask: Tensor
    tau: Tensor
    beta: Tensor

    def __init__(self, mask: Tensor, *, is_trained: bool) -> None:
        super().__init__()
        if is_trained:
            self.mask = nn.Parameter(mask)
        else:
            self.register_buffer("mask", mask)
        self.register_buffer("tau", mask.new_zeros(()))
        self.register_buffer("beta", mask.new_full((), 0.5))

    def forward(self) -> Tensor:
        return gate(self.mask, self.tau, self.beta)


class Hybrid(nn.Module):
    """What stands behind one writer of a residual stream; of rank 0 it is the mask alone.

    The mask and the scale are one vector before they meet an activation, and the product of the two small factors
    takes them up: beside its input a step has nothing of that size to keep for the way back.
    """

    down: nn.Parameter
    up: nn.Parameter

    def __init__(
        self,
        width: int,
        rank: int,
        *,
        mode: Mode,
        identity: bool,
        draw: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.rank = rank
        self.scale: nn.Parameter | None = None
        self.values: nn.Parameter | None = None
        if not rank:
            return
        down, up = _begun(width, rank, mode, identity, draw)
        self.down, self.up = nn.Parameter(down.to(dtype)), nn.Parameter(up.to(dtype))
        if identity and mode == "paper":
            self.values = nn.Parameter(torch.zeros(rank, dtype=dtype))
        elif identity:
            self.scale = nn.Parameter(torch.ones(width, dtype=dtype))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        factor = gate if self.scale is None else self.scale * gate
        if not self.rank:
            return x * factor
        up = self.up if self.values is None else self.up * self.values
        inner = functional.linear(functional.linear(x, self.down), factor[:, None] * up)
        return torch.addcmul(inner, x, factor)


def _begun(
    width: int, rank: int, mode: Mode, identity: bool, draw: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """L and U as they are at first, in float64."""
    down = torch.empty(rank, width, dtype=torch.float64)
    up = torch.zeros(width, rank, dtype=torch.float64)
    if mode == "released":
        nn.init.kaiming_uniform_(down, a=5**0.5, generator=draw)
        return down, up
    nn.init.orthogonal_(down, generator=draw)
    if mode == "paper" and identity:
        nn.init.orthogonal_(up, generator=draw)  # v is 0
    return down, up


def gate(mask: Tensor, tau: Tensor, beta: Tensor) -> Tensor:
    """M [width]."""
    return torch.sigmoid(tau * mask) + beta


def ranked(mask: Tensor) -> Tensor:
    """Channels from the largest mask to the least, of equal ones the first."""
    return torch.sort(mask.detach().to(torch.float64), descending=True, stable=True).indices


def kept(mask: Tensor, count: int) -> Tensor:
    """The channels that stay, in order: those of the largest mask, of equal ones the first."""
    return ranked(mask)[:count].sort().values


def hard(mask: Tensor, count: int) -> Tensor:
    """A mask of the same order whose gate at `HARD` is 1 for exactly `count` channels, and 0 for the others."""
    found = torch.full_like(mask.detach(), -LEAST)
    found[kept(mask, count)] = LEAST
    return found


def centred(mask: Tensor, count: int) -> Tensor:
    """The mask with its 0 between the channels that stay and those that go; what it is moved by has no gradient."""
    if not 0 < count < len(mask):
        return mask
    values = mask.detach()[ranked(mask)]
    return mask - (values[count - 1] + values[count]) / 2


def matrix(
    down: Tensor | None,
    up: Tensor | None,
    values: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    width: int,
) -> Tensor:
    """diag(s) D in float64, [width, width]."""
    found = torch.eye(width, dtype=torch.float64)
    if down is not None and up is not None:
        up = up.to(torch.float64)
        found += (up if values is None else up * values.to(torch.float64)) @ down.to(torch.float64)
    return found if scale is None else scale.to(torch.float64)[:, None] * found
