"""Two operators that say where a tensor is codes of 8 bit: `effc::quantize` and `effc::dequantize`.

They are graph citizens: traced, interpreted, differentiated and exported whole, so that a backend reads the grid
from the graph instead of guessing it from arithmetic.

    quantize    q = clamp(round(x / scale) + zero_point, low, high)
    dequantize  x̂ = (q − zero_point) · scale                                   in the type of `scale`

`scale` and `zero_point` are tensors: one element, one per index of `axis`, one per row of the last axis as `[…, 1]`
(which is computed as the graph runs), or `[out, in / group]` where `group` > 0.
Rounding is half to even and divides by the scale, as ONNX's QuantizeLinear does. Codes have the type of `zero_point`:
integers, or float8_e4m3fn, which is its own rounding and whose zero point is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def spread(parameter: Tensor, like: Tensor, axis: int, group: int) -> Tensor:
    """`parameter` in a shape that broadcasts against `like`."""
    if parameter.dim() == 0:
        return parameter
    if group > 0:
        return parameter.repeat_interleave(group, dim=-1)
    if is_of_rows(parameter, like):
        return parameter
    shape = [1] * like.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def is_of_rows(parameter: Tensor, like: Tensor) -> bool:
    """Whether a parameter has a value for every row of the last axis."""
    return 1 < parameter.dim() == like.dim()


def nearest(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, dtype: torch.dtype
) -> Tensor:
    """The code of every number, in float32; the parameters broadcast against `x`."""
    steps = x.to(torch.float32) / scale
    if dtype.is_floating_point:
        return torch.clamp(steps, low, high).to(dtype).to(torch.float32)
    return steps.round_().add_(zero_point).clamp_(low, high)


@torch.library.custom_op("effc::quantize", mutates_args=())
def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int, group: int
) -> Tensor:
    scale = spread(scale, x, axis, group)
    zero = spread(zero_point.to(torch.float32), x, axis, group)
    return nearest(x, scale, zero, low, high, zero_point.dtype).to(zero_point.dtype)


@quantize.register_fake
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, axis: int, group: int
) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("effc::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int) -> Tensor:
    scale = spread(scale, q, axis, group)
    zero = spread(zero_point.to(torch.float32), q, axis, group)
    made = (q.to(torch.float32) - zero) * scale.to(torch.float32)
    return made.to(scale.dtype)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)


QUANTIZE = torch.ops.effc.quantize.default
DEQUANTIZE = torch.ops.effc.dequantize.default
