"""Affine grids: from a range to a scale and a zero point, and from numbers to codes and back.

    q = clamp(round(x / scale) + zero_point, low, high)        x̂ = (q − zero_point) · scale

Zero is always on the grid. Rounding is half to even and divides by the scale, as ONNX's QuantizeLinear does, so codes
computed here and there agree to the bit.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from effc.quant.ops import nearest, spread
from effc.quant.scheme import Scheme

SMALLEST = 1e-12
"""A range with a smaller scale is no range: the scale is 1, and a product of two scales still is a float32."""
SHRINK = torch.linspace(0.4, 1.0, 49, dtype=torch.float64)
"""Clip candidates of the `mse` weight range, as shares of the largest magnitude."""
_CHUNK = 1 << 18
"""Numbers that are looked at together: they stay in the cache of a core from one candidate to the next."""


def qparams(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (the scheme's dtype) that cover [low, high] and zero.

    A range of nothing but zero has scale 1. Raises ValueError where an end is not a finite number.
    """
    if not low.is_meta and not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise ValueError("a range has an end that is not a finite number")
    low = torch.clamp(low.to(torch.float64), max=0.0)
    high = torch.clamp(high.to(torch.float64), min=0.0)
    if scheme.symmetric:
        scale = torch.maximum(-low, high) / scheme.high
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (scheme.high - scheme.low)
        zero = torch.round(scheme.low - low / torch.clamp(scale, min=SMALLEST))
    empty = scale <= SMALLEST
    scale, zero = torch.where(empty, 1.0, scale), torch.where(empty, 0.0, zero)
    return scale.to(torch.float32), torch.clamp(zero, scheme.low, scheme.high).to(scheme.dtype)


def steady(end: float, bits: int = 9) -> float:
    """An end of a measured range to few bits, so that the last bits of float arithmetic do not reach an engine.

    Products of float matrices differ in their last bits from processor to processor, and with some libraries from run
    to run. A range that is rounded to nine bits, by at most 1/1024, costs nothing and comes out the same.
    """
    mantissa, exponent = math.frexp(end)
    return math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)


def weight_qparams(
    weight: Tensor,
    scheme: Scheme,
    *,
    method: Literal["minmax", "mse"] = "minmax",
    pair_limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight: one per index of `axis`, or `[out, in / group]`.

    `mse` tries narrower clips and keeps, per scale, the one with the least squared error. `pair_limit` is for
    symmetric schemes along axis 0 and widens scales as `pair_scale` says. Raises ValueError where the last axis is
    not a whole number of groups, or the weight is empty.
    """
    rows = _rows(weight.detach(), scheme)
    low, high = rows.amin(-1), rows.amax(-1)
    if method == "mse" and not rows.is_meta:  # of a shape alone there is nothing to clip
        low, high = _least_squares(rows, low, high, scheme)
    scale, zero = qparams(low, high, scheme)
    if pair_limit is not None:
        scale = torch.maximum(scale, pair_scale(weight.detach(), pair_limit))
    return scale, zero


def pair_scale(weight: Tensor, limit: int) -> Tensor:
    """Least scale [out] at which two neighbouring codes of a row never add up to more than ±`limit`.

    Neighbours are weights 2i and 2i + 1 of `weight` [out, in], or of [out, in, height, width] read with the channels
    last, as convolution kernels do. Processors with AVX2 or AVX-512 but without VNNI add the products of two
    neighbours in 16 bit and saturate; at 255 · `limit` < 2¹⁵ that cannot happen, and every processor gives the same
    sums. It costs about a quarter of a bit on trained weights (benchmarks/overflow.py); 7-bit weights cost one.
    """
    rows = (weight.movedim(1, -1) if weight.dim() > 2 else weight).flatten(1).to(torch.float64)
    pairs = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2)).unflatten(1, (-1, 2))
    sums = torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1))
    return (sums.amax(-1) / (limit - 1)).to(
        torch.float32
    )  # − 1: rounding may add half a step to each


def _rows(weight: Tensor, scheme: Scheme) -> Tensor:
    """The weight with everything that shares a scale along the last axis."""
    if not weight.numel():
        raise ValueError(f"a weight of shape {list(weight.shape)} has nothing to quantise")
    if scheme.group:
        if weight.dim() != 2:
            raise ValueError(f"groups need a weight [out, in], not one of {list(weight.shape)}")
        if weight.shape[-1] % scheme.group:
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
    """Per row, the clip in `SHRINK` with the least squared error; memory stays at one chunk."""
    shape = low.shape
    flat = rows.reshape(-1, rows.shape[-1])
    low, high = low.reshape(-1).double(), high.reshape(-1).double()
    best = torch.ones_like(low)
    step = max(1, _CHUNK // flat.shape[-1])
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        least = torch.full_like(low[part], float("inf"))
        for share in SHRINK:
            scale, zero = qparams(low[part] * share, high[part] * share, scheme)
            error = _squared_error(flat[part], scale[:, None], zero[:, None], scheme)
            better = error <= least  # of two equals the wider
            least = torch.where(better, error, least)
            best[part] = torch.where(better, share, best[part])
    return (low * best).reshape(shape), (high * best).reshape(shape)


def _squared_error(rows: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """Per row, what quantising costs; a row longer than a chunk is taken in pieces."""
    total = torch.zeros(len(rows), dtype=torch.float64)
    zero = zero.to(torch.float32)
    for piece in rows.split(_CHUNK, dim=-1):
        x = piece.to(torch.float32)
        codes = nearest(x, scale, zero, scheme.low, scheme.high, scheme.dtype)
        if not scheme.symmetric:
            codes.sub_(zero)
        total += codes.mul_(scale).sub_(x).square_().sum(-1, dtype=torch.float64)
    return total


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Codes in the scheme's dtype, clamped to its bits."""
    zero = _spread(zero_point.to(torch.float32), x, scheme)
    step = _spread(scale, x, scheme)
    return nearest(x, step, zero, scheme.low, scheme.high, scheme.dtype).to(scheme.dtype)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    zero = _spread(zero_point.to(torch.float32), codes, scheme)
    return (codes.to(torch.float32) - zero) * _spread(scale, codes, scheme)


def _spread(parameter: Tensor, like: Tensor, scheme: Scheme) -> Tensor:
    return spread(parameter, like, scheme.axis or 0, scheme.group or 0)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """What is left of `x` after it went through the grid."""
    return dequantize(quantize(x, scale, zero_point, scheme), scale, zero_point, scheme)
