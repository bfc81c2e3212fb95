"""Codes that are learned: every weight goes up or down, whichever its layer's output wants (AdaRound).

    ŵ = s · (clamp(⌊w / s⌋ + z + h(a), low, high) − z)        h(a) = clamp(1.2 · σ(a) − 0.1, 0, 1)
    pull = Σ 1 − |2 h − 1|^β                                  β falls from 20 to 2

h is a sigmoid stretched beyond 0 and 1 and cut there, so that it can reach both (Nagel et al. 2020, equations 21 to
24). It begins as the fraction of w / s, with which ŵ is w itself. The pull is flat near ½ while β is large, and then
drives every h to the end that it is nearer to. What is used in the end is 0 or 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effc.quant.affine import quantize
from effc.quant.ops import spread
from effc.quant.scheme import Scheme

LOW, HIGH = -0.1, 1.1
"""What the sigmoid is stretched to before it is cut."""
FIRST_BETA, LAST_BETA = 20.0, 2.0
QUIET = 0.2
"""Share of the steps in which nothing pulls yet."""


def begin(weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """a, of the shape of `weight`, with which `soft` gives the fraction of w / s."""
    steps = weight / spread(scale, weight, scheme.axis or 0, scheme.group or 0)
    share = (steps - steps.floor()).double()
    return torch.logit((share - LOW) / (HIGH - LOW)).to(torch.float32)


def soft(a: Tensor) -> Tensor:
    """h(a), in 0 … 1."""
    return torch.clamp(torch.sigmoid(a) * (HIGH - LOW) + LOW, 0, 1)


def between(weight: Tensor, h: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """ŵ for an `h` that is soft or hard; a gradient reaches `h` where the code is on the grid."""
    step = spread(scale, weight, scheme.axis or 0, scheme.group or 0)
    zero = spread(zero_point.to(torch.float32), weight, scheme.axis or 0, scheme.group or 0)
    codes = torch.clamp((weight / step).floor() + zero + h, scheme.low, scheme.high)
    return (codes - zero) * step


def hard(
    weight: Tensor,
    a: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: Scheme,
    *,
    pair_limit: int | None = None,
) -> Tensor:
    """Codes of `weight` where h is 0 or 1, whichever is nearer.

    With `pair_limit`, neighbours that would add up to more than that in either direction are rounded to nearest, for
    which their scale was made (`effc.quant.affine.pair_scale`).
    """
    step = spread(scale, weight, scheme.axis or 0, scheme.group or 0)
    zero = spread(zero_point.to(torch.float32), weight, scheme.axis or 0, scheme.group or 0)
    codes = (weight / step).floor() + zero + (a >= 0)
    codes = torch.clamp(codes, scheme.low, scheme.high).to(scheme.dtype)
    if pair_limit is None:
        return codes
    over = _over(codes, pair_limit)
    return torch.where(over, quantize(weight, scale, zero_point, scheme), codes)


def _over(codes: Tensor, limit: int) -> Tensor:
    """Which codes are of a pair that adds up to too much; neighbours are those of `pair_scale`."""
    last = codes.movedim(1, -1) if codes.dim() > 2 else codes
    rows = last.flatten(1).to(torch.int32)
    pairs = torch.nn.functional.pad(rows, (0, rows.shape[1] % 2)).unflatten(1, (-1, 2))
    most = torch.maximum(pairs.clamp(min=0).sum(-1), -pairs.clamp(max=0).sum(-1))
    over = (most > limit)[..., None].expand(-1, -1, 2).flatten(1)[:, : rows.shape[1]]
    shaped = over.reshape(last.shape)
    return shaped.movedim(-1, 1) if codes.dim() > 2 else shaped


def beta(step: int, steps: int) -> float | None:
    """β of a step, counted from 0; None as long as nothing pulls."""
    share = (step / max(1, steps - 1) - QUIET) / (1 - QUIET)
    return None if share < 0 else FIRST_BETA + (LAST_BETA - FIRST_BETA) * share


def pull(a: Tensor, power: float) -> Tensor:
    """Σ 1 − |2 h − 1|^β, 0 where every h is 0 or 1."""
    return (1 - (2 * soft(a) - 1).abs().pow(power)).sum()
