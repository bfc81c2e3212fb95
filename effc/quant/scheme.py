"""How numbers become integers: bits, sign, symmetry, and what shares one scale.

q = clamp(round(x / scale) + zero_point, low, high)        x̂ = (q − zero_point) · scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One integer grid. `axis` None is one scale for the whole tensor; `group` splits the last axis into blocks.

    A `narrow` symmetric signed grid leaves out the lowest code (−127 … 127), so that a weight and its negative have
    codes of equal size; activations have all codes, which no node has to cut. Codes are stored in 8 bit whatever `bits`
    is; a grid of fewer bits is really clamped.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool = True
    axis: int | None = None
    group: int | None = None

    @property
    def low(self) -> int:
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric and self.narrow else 0)

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.signed else torch.uint8
