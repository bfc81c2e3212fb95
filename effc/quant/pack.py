"""Two 4-bit codes a byte, the first in the low nibble, as ONNX stores INT4 and UINT4.

A row of odd length is filled up with a zero code, so rows stay apart: packed [..., n] has shape [..., (n + 1) // 2].
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(codes: Tensor) -> Tensor:
    """`codes` (int8 −8 … 7 or uint8 0 … 15) as bytes, two along the last axis in each.

    Raises ValueError where a code does not fit in 4 bit.
    """
    if codes.dtype not in (torch.int8, torch.uint8) or not codes.dim():
        raise ValueError(f"4-bit codes are int8 or uint8 with an axis, not {codes.dtype}")
    low, high = (-8, 7) if codes.dtype == torch.int8 else (0, 15)
    if codes.numel() and not bool(((codes >= low) & (codes <= high)).all()):
        raise ValueError(f"a code does not fit in 4 bit ({low} … {high})")
    nibbles = codes.view(torch.uint8) & 0xF
    if codes.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor, size: int, *, signed: bool) -> Tensor:
    """The codes behind `pack`; `size` is the length of their last axis.

    Raises ValueError where that many codes do not have this many bytes.
    """
    if packed.dtype != torch.uint8 or not packed.dim() or packed.shape[-1] != (size + 1) // 2:
        raise ValueError(
            f"{packed.dtype} {list(packed.shape)} does not hold rows of {size} 4-bit codes"
        )
    nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :size]
    if not signed:
        return nibbles.contiguous()
    return ((nibbles ^ 8).to(torch.int8) - 8).contiguous()
