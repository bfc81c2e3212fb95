"""How numbers become codes: bits, sign, symmetry, and what shares one scale.

integers    q = clamp(round(x / scale) + zero_point, low, high)        x̂ = (q − zero_point) · scale
fp8         q = float8_e4m3(clamp(x / scale, −448, 448))               x̂ = q · scale
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8_MAX = 448
"""The largest number of float8_e4m3fn."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One grid. `axis` None is one scale for the whole tensor; `group` splits the last axis into blocks.

    A `narrow` symmetric signed grid leaves out the lowest code (−127 … 127), so that a weight and its negative have
    codes of equal size; activations have all codes, which no node has to cut. Codes are stored in 8 bit whatever `bits`
    is; a grid of fewer bits is really clamped. `fp8` is the grid of a number with 4 bits of exponent and 3 of mantissa,
    e4m3 without infinities (Micikevicius et al. 2022), which has a sign and no zero point.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool = True
    axis: int | None = None
    group: int | None = None
    fp8: bool = False

    @property
    def low(self) -> int:
        if self.fp8:
            return -FP8_MAX
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric and self.narrow else 0)

    @property
    def high(self) -> int:
        if self.fp8:
            return FP8_MAX
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> torch.dtype:
        if self.fp8:
            return torch.float8_e4m3fn
        return torch.int8 if self.signed else torch.uint8
