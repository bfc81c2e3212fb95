"""A linear layer and gated experts of low rank beside it, as a module that a pass splices in, and what folds it.

    y = W x + b + γ σ(100 v) B u          h = A x,   A [n, in],  B [out, m],  a gate for every expert in g

    pairs     u_j = Σ_i h_i g_ij          every row of A with every column of B is an expert: n · m of them
    single    u_i = h_i g_i               a row and a column of its own for every expert (n = m)
    groups    u_ik = h_ik g_i             experts of several ranks, a mixture of LoRA; without σ(100 v)

    g = E ω softmax(R x) + c (1 − ω) s    ω = σ(100 w),  R [experts, in],  s [batch, experts]

s says how near a request is to each of as many clusters of requests, and is the same for all of its tokens. E is the
number of experts, 1 in groups; c is 4. This is Intuition-MoR1E as its authors released it (arXiv 2404.08985, its later
version T-REX). It begins with B = 0, R = 0 and v = w = 0, and adds 0 to what the layer gives. One token's change of W
is γ σ(100 v) B Gᵀ A, G [n, m], so that its rank is at most min(n, m) however many experts there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Form = Literal["pairs", "single", "groups"]
Gates = Literal["both", "router", "intuition", "uniform"]
A, B, ROUTER, MIX, SIZE = "rank1_A", "rank1_B", "rank1_R", "rank1_w", "rank1_v"
"""Names of the tensors, behind that of the layer."""
SLOPE = 100.0
"""What w and v are multiplied by, so that they learn faster than the matrices do."""
COEFFICIENT = 4.0
"""c."""


class Rank1(nn.Module):
    """What a layer gives and the change beside it: of x [batch, …, in], what the layer gave and s [batch, experts].

    `sizes` are rows of A and columns of B for pairs, whose product is the number of experts of single; experts and the
    rank of each for groups. s is left out where the gates do not read it.
    """

    rank1_A: nn.Parameter
    rank1_B: nn.Parameter
    rank1_R: nn.Parameter
    rank1_w: nn.Parameter
    rank1_v: nn.Parameter

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        sizes: tuple[int, int],
        *,
        form: Form = "pairs",
        gates: Gates = "both",
        coefficient: float = COEFFICIENT,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.form, self.gates, self.sizes = form, gates, sizes
        self.coefficient, self.gain = coefficient, gain
        for name in names(form, gates):
            setattr(self, name, nn.Parameter(tensors[name]))

    def gate(self, x: Tensor, intuition: Tensor | None = None) -> Tensor:
        """g [batch, …, experts]; with `intuition` alone [batch, 1 …, experts]."""
        count = 1 if self.form == "groups" else experts(self.form, self.sizes)
        if self.gates == "router":
            return functional.softmax(functional.linear(x, self.rank1_R), -1) * count
        assert intuition is not None
        score = intuition
        for _ in range(x.dim() - 2):
            score = score.unsqueeze(1)
        if self.gates == "intuition":
            return score * self.coefficient
        share = functional.softmax(functional.linear(x, self.rank1_R), -1)
        omega = torch.sigmoid(self.rank1_w * SLOPE)
        return share * (omega * count) + score * ((1 - omega) * self.coefficient)

    def mixed(self, h: Tensor, gate: Tensor) -> Tensor:
        """u [batch, …, m] of h [batch, …, n] and g."""
        n, m = self.sizes
        if self.form == "single":
            return h * gate
        if self.form == "groups":
            parts = h.reshape(*h.shape[:-1], n, m) * gate.unsqueeze(-1)
            return parts.reshape(*h.shape[:-1], n * m)
        parts = h.unsqueeze(-1) * gate.reshape(*gate.shape[:-1], n, m)
        return parts.sum(-2)

    def forward(self, x: Tensor, base: Tensor, intuition: Tensor | None = None) -> Tensor:
        h = functional.linear(x, self.rank1_A)
        out: Tensor = self.rank1_B
        if self.gates != "uniform":
            u = self.mixed(h, self.gate(x, intuition))
        elif self.form == "pairs":  # every column of B gets the sum of h
            u, out = h.sum(-1, keepdim=True), out.sum(-1, keepdim=True)
        else:
            u = h
        scale = self.gain
        if self.form == "groups":
            return base + functional.linear(u * scale, out)
        return base + functional.linear(u * (torch.sigmoid(self.rank1_v * SLOPE) * scale), out)


def names(form: Form, gates: Gates) -> tuple[str, ...]:
    """The tensors that an adapter has."""
    found = [A, B]
    found += [ROUTER] * (gates in ("both", "router"))
    found += [MIX] * (gates == "both")
    found += [SIZE] * (form != "groups")
    return tuple(found)


def experts(form: Form, sizes: tuple[int, int]) -> int:
    """How many gates there are for one token."""
    return sizes[0] if form == "groups" else sizes[0] * sizes[1]


def shapes(
    form: Form, gates: Gates, sizes: tuple[int, int], layer: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors beside a layer of so many outputs and inputs."""
    out, inner = layer
    count, whole = experts(form, sizes), sizes[0] * sizes[1]
    n, m = sizes if form == "pairs" else (whole, whole)
    every = {A: (n, inner), B: (out, m), ROUTER: (count, inner), MIX: (), SIZE: ()}
    return {name: every[name] for name in names(form, gates)}


def begun_gain(
    form: Form, gates: Gates, score: float, *, coefficient: float = COEFFICIENT
) -> float:
    """What γ is multiplied by in a fresh adapter, of every expert, where s is `score`: g σ(100 v).

    Of groups it is that of one of their ranks, 1 ÷ the number of experts; the caller divides.
    """
    half = 1.0 if form == "groups" else 0.5
    gate = {
        "router": 1.0, "uniform": 1.0, "intuition": coefficient * score,
        "both": 0.5 + 0.5 * coefficient * score,
    }  # fmt: skip
    return half * gate[gates]


def update(
    a: Tensor, b: Tensor, gate: Tensor, form: Form, sizes: tuple[int, int], scale: float
) -> Tensor:
    """The change of a weight [out, in] for gates [experts] that do not move: scale · B Gᵀ A, in float64."""
    a, b, gate = a.double(), b.double(), gate.double()
    if form == "pairs":
        return scale * (b @ gate.reshape(sizes).T @ a)
    each = gate.repeat_interleave(sizes[1]) if form == "groups" else gate
    return scale * ((b * each) @ a)
