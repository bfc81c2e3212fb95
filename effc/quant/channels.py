"""Which channel of its input every part of a layer's weight multiplies; linear layers and convolutions alike."""

from __future__ import annotations

import torch
from torch import Tensor


def columns(weight: Tensor) -> Tensor:
    """A weight [out, in / groups, …] as [out, in / groups, places of the kernel]."""
    return weight.flatten(2) if weight.dim() > 2 else weight[..., None]


def channels(weight: Tensor, count: int) -> Tensor:
    """Which of `count` input channels a weight [out, in / groups, …] multiplies: [out, in / groups]."""
    rows, width = weight.shape[:2]
    group = torch.arange(rows) // (rows * width // count)
    return group[:, None] * width + torch.arange(width)
