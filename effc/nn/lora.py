"""A linear layer and a change of low rank beside it, as modules that a pass splices in, and the maths that folds it.

    lora      y = W x + b + s B A x                                 s = α / r          (Hu et al. 2022)
    rslora    the same                                              s = α / √r         (Kalajdzievski 2023)
    dora      y = m ⊙ V x / ‖V‖ + b,   V = W + s B A                s = α / r          (Liu et al. 2024)

W is [out, in], A [r, in], B [out, r], m [out]; ‖V‖ is the norm of every row, and gives no gradient (section 4.3 of the
last). With B = 0 and m = ‖W‖ each is the layer itself, to the last bit: it adds 0, or (m / ‖V‖ − 1) of what the layer
gives, which is 0.
"""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

FORMS = Literal["lora", "rslora", "dora"]
A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
"""Names of the tensors, behind that of the layer."""
SWAP, SWAP_A, SWAP_B = "swap", "swap_A", "swap_B"
"""What adapters that are left open stand under in `Graph.pending`, and the names of their tensors, as multiplied."""
LEAST_NORM = 1e-12
"""A row of zeros has no direction: it is divided by this, and stays one of zeros."""


def scale_of(alpha: float, rank: int, *, rooted: bool) -> float:
    """s, by which B A is multiplied; α by the root of the rank where it is `rooted`."""
    return alpha / (math.sqrt(rank) if rooted else rank)


def alpha_of(scale: float, rank: int, *, rooted: bool) -> float:
    """The α of a scale; a whole number where it is one but for rounding."""
    alpha = scale * (math.sqrt(rank) if rooted else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


class Lora(nn.Module):
    """What a layer gives and the change beside it, of its input x […, in] and what it gave, `base` […, out]."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.scale = scale

    def change(self, x: Tensor) -> Tensor:
        """s B A x; scaled where it is narrow."""
        return functional.linear(functional.linear(x, self.lora_A) * self.scale, self.lora_B)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        return base + self.change(x)


class Dora(Lora):
    """The same with the size of every row of W + s B A apart from its direction; the layer's own tensors are inputs."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> None:
        super().__init__(a, b, scale)
        self.lora_magnitude = nn.Parameter(magnitude)

    def forward(  # type: ignore[override]
        self, x: Tensor, base: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        size = norms(weight + (self.lora_B @ self.lora_A) * self.scale).detach()
        share = self.lora_magnitude / size
        turned = base if bias is None else base - bias
        return base + (share - 1) * turned + share * self.change(x)


def norms(weight: Tensor) -> Tensor:
    """The norm of every row of a weight [out, in]."""
    found: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return found.clamp_min(LEAST_NORM)


def fresh(name: str, weight: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A [rank, in], uniform within ± 1/√in, and B [out, rank] of zeros, for a weight [out, in].

    A is Kaiming's with a = √5. It hangs on seed and name alone, so that a layer has the same whatever others have one.
    """
    out, inner = weight.shape
    a, b = weight.new_empty(rank, inner), weight.new_zeros(out, rank)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    if not a.is_meta:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=draw)
    return a, b


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None) -> Tensor:
    """The weight of one layer that gives what the layer and its adapter give; worked out in float64.

    W + s B A, and with a magnitude m of every row m ⊙ V / ‖V‖ of that.
    """
    made = weight.double() + scale * (b.double() @ a.double())
    if magnitude is not None:
        made = made * (magnitude.double() / norms(made))[:, None]
    return made.to(weight.dtype)
