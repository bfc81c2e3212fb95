"""Affine integer grids: from a range to a scale and a zero point, and from numbers to codes and back.

    q = clamp(round(x / scale) + zero_point, low, high)        x̂ = (q − zero_point) · scale

Zero is always on the grid. Rounding is half to even and divides by the scale, as ONNX's QuantizeLinear does, so codes
computed here and there agree to the bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from effc.quant.scheme import Scheme

SMALLEST = 1e-12
"""A range below this is no range: the scale is 1 and every code is the zero point."""
SHRINK = torch.linspace(0.4, 1.0, 49, dtype=torch.float64)
"""Clip candidates of the `mse` weight range, as shares of the largest magnitude."""
_CHUNK = 1 << 22


def qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (the scheme's dtype) that cover [low, high] and zero."""
    low = torch.clamp(low.to(torch.float64), max=0.0)
    high = torch.clamp(high.to(torch.float64), min=0.0)
    if scheme.symmetric:
        scale = torch.maximum(-low, high) / scheme.high
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (scheme.high - scheme.low)
        zero = scheme.low - low / torch.clamp(scale, min=SMALLEST)
    empty = ~(scale > SMALLEST)
    scale = torch.where(empty, torch.ones_like(scale), scale)
    rest = float(max(scheme.low, min(0, scheme.high)))
    zero = torch.where(empty, torch.full_like(zero, rest), torch.round(zero))
    return scale.to(torch.float32), torch.clamp(zero, scheme.low, scheme.high).to(scheme.dtype)


def weight_qparams(
    weight: Tensor, scheme: Scheme, *, method: Literal["minmax", "mse"] = "minmax"
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight: one per index of `axis`, or `[out, in / group]`.

    `mse` tries narrower clips and keeps, per scale, the one with the least squared error. Raises ValueError where
    the last axis is not a whole number of groups.
    """
    rows = _rows(weight.detach(), scheme)
    low, high = rows.amin(-1), rows.amax(-1)
    if method == "mse":
        low, high = _least_squares(rows, low, high, scheme)
    return qparams(low, high, scheme)


def _rows(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight with everything that shares a scale along the last axis."""
    if scheme.group:
        if weight.dim() != 2 or weight.shape[-1] % scheme.group:
            raise ValueError(
                f"{list(weight.shape)} has no whole groups of {scheme.group} in its last axis"
            )
        return weight.reshape(weight.shape[0], -1, scheme.group)
    if scheme.axis is None:
        return weight.reshape(-1)
    return weight.movedim(scheme.axis, 0).flatten(1)


def _least_squares(
    rows: Tensor, low: Tensor, high: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Per row, the clip in `SHRINK` with the least squared error; memory stays at one chunk of rows."""
    shape = low.shape
    flat = rows.reshape(-1, rows.shape[-1])
    low, high = low.reshape(-1), high.reshape(-1)
    best = torch.ones(len(flat), dtype=torch.float64)
    step = max(1, _CHUNK // flat.shape[-1])
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        least = torch.full((len(flat[part]),), float("inf"), dtype=torch.float64)
        for share in SHRINK.tolist():
            scale, zero = qparams(low[part] * share, high[part] * share, scheme)
            codes = torch.clamp(
                torch.round(flat[part] / scale[:, None]) + zero[:, None], scheme.low, scheme.high
            )
            error = (
                ((codes - zero[:, None]) * scale[:, None] - flat[part]).double().square().sum(-1)
            )
            better = error < least
            least = torch.where(better, error, least)
            best[part] = torch.where(better, torch.full_like(least, share), best[part])
    return (low * best).reshape(shape), (high * best).reshape(shape)


def spread(parameter: Tensor, like: Tensor, scheme: Scheme) -> Tensor:
    """`parameter` in a shape that broadcasts against `like`."""
    if parameter.dim() == 0:
        return parameter
    if scheme.group:
        return parameter.repeat_interleave(scheme.group, dim=-1)
    shape = [1] * like.dim()
    shape[scheme.axis or 0] = -1
    return parameter.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Codes in the scheme's dtype, clamped to its bits."""
    zero = spread(zero_point, x, scheme).to(torch.float32)
    codes = torch.round(x.to(torch.float32) / spread(scale, x, scheme)) + zero
    return torch.clamp(codes, scheme.low, scheme.high).to(scheme.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    zero = spread(zero_point, codes, scheme).to(torch.float32)
    return (codes.to(torch.float32) - zero) * spread(scale, codes, scheme)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """What is left of `x` after it went through the grid."""
    return dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme)
