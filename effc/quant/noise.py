"""Offsets in front of a quantiser that are taken out behind it (NoisyQuant, Liu et al. 2023, CVPR).

    y = Ŵ·Q(x + n) + (b − Ŵ·n)        n [channels] is chosen once: at run time the only cost is one sum, or none

Noise that is uniform is dither with a frozen pattern. A value at distance x from the border between two codes, which
are 2b apart, is rounded wrong by err(x) = b − |x|, and noise within ±n makes of it on the average

    E err(x + N)  =  1 / 2n · ∫ err    over x − n … x + n        E|err| − |err| = −(n − x)² / 2n    for x ≤ n, x + n ≤ b

so it gains where values lie near borders and loses where they lie on codes. An offset that is chosen, by the mean error
of each channel or of all, needs no luck, and what is left of the mean goes into the bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effc.quant.affine import fake_quantize
from effc.quant.scheme import Scheme

DAMPING = 0.01
"""λ of `refit` as a share of the mean square of an input."""
FRACTIONS = tuple(i / 8 for i in range(-4, 5))
"""Offsets of a channel that are tried, in steps of the grid: one step further all is as it was."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid for a whole activation."""

    scale: float
    zero_point: int
    scheme: Scheme

    def round(self, x: Tensor) -> Tensor:
        """What is left of `x`."""
        zero = torch.tensor(self.zero_point, dtype=self.scheme.dtype)
        return fake_quantize(x, torch.tensor(self.scale), zero, self.scheme)


def uniform(channels: int, seed: int) -> Tensor:
    """Noise in ±1, [channels]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=draw) * 2 - 1


def lopsided(channels: int, seed: int) -> Tensor:
    """What the published code draws, [channels]: normal, of mean −1 and deviation 2, where the paper has ±1."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(channels, generator=draw) * 2 - 1


def input_error(x: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """Q(x + n) − n − x, the error of every value of `x` [rows, channels]."""
    shifted = x + offset
    return grid.round(shifted).sub_(shifted)


def to_border(x: Tensor, grid: Grid) -> Tensor:
    """How far every value lies from the nearest border between two codes, with a sign; for values within the grid."""
    steps = x.double() / grid.scale
    return (steps - torch.floor(steps) - 0.5) * grid.scale


def expected(distance: Tensor, amplitude: float, half: float, *, power: int = 1) -> Tensor:
    """E |err|ᵖ of values at `distance` from a border under uniform noise within ±`amplitude`; codes are 2·`half` apart.

    p is 1 or 2. Without noise it is |err|ᵖ itself. No value is cut off.
    """
    if amplitude == 0:
        plain: Tensor = (half - _wrapped(distance, half)[1].abs()) ** power
        return plain
    above = _integral(distance + amplitude, half, power)
    mean: Tensor = (above - _integral(distance - amplitude, half, power)) / (2 * amplitude)
    return mean


def _wrapped(y: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """How many periods of 2·`half` lie below, and what is left, in ±`half`."""
    periods = torch.round(y.double() / (2 * half))
    return periods, y - periods * (2 * half)


def _integral(y: Tensor, half: float, power: int) -> Tensor:
    """∫ errᵖ from −half to y; one period has 2·halfᵖ⁺¹ / (p + 1)."""
    periods, rest = _wrapped(y, half)
    higher = power + 1
    left = (rest.clamp(max=0) + half) ** higher
    right = half**higher - (half - rest.clamp(min=0)) ** higher
    whole: Tensor = (2 * periods * half**higher + left + right) / higher
    return whole


def best_offsets(x: Tensor, offset: Tensor, grid: Grid) -> Tensor:
    """For every channel of `x` [rows, channels] the offset within half a step of `offset` with the least variance left.

    The mean is left out: the bias takes it.
    """
    tried = offset + torch.tensor(FRACTIONS)[:, None] * grid.scale  # [candidates, channels]
    left = torch.stack([input_error(x, one, grid).var(0, correction=0) for one in tried])
    least = left[len(FRACTIONS) // 2]
    place = torch.where(left.amin(0) < least, left.argmin(0), len(FRACTIONS) // 2)
    return tried.gather(0, place[None])[0]


def output_loss(
    errors: Tensor, weight: Tensor, mean: Tensor, slopes: Tensor | None = None
) -> float:
    """Mean ‖W (e − mean)‖² over rows of `errors` [rows, in], for W [out, in]; `mean` [in] is what the bias takes.

    `slopes` [rows, out] weigh the square of every output, as the squared slope of a loss does.
    """
    squares = ((errors - mean) @ weight.T).square()
    if slopes is not None:
        squares = squares * slopes
    return float(squares.sum(-1, dtype=torch.float64).mean())


def angle(wanted: Tensor, found: Tensor, dim: int | None = None) -> Tensor:
    """1 − the cosine between two tensors, over `dim` or all of them."""
    dims = tuple(range(wanted.dim())) if dim is None else (dim,)
    product, *sizes = (
        (a.double() * b).sum(dims)
        for a, b in ((wanted, found), (wanted, wanted), (found, found.double()))
    )
    made: Tensor = 1 - product / (sizes[0] * sizes[1]).sqrt().clamp(
        min=torch.finfo(torch.float64).tiny
    )
    return made


def denoised(bias: Tensor, rounded: Tensor, offset: Tensor) -> Tensor:
    """b − Ŵ n, [out]: with the weight [out, in] that the engine multiplies by, not the one it was rounded from."""
    return (bias.double() - rounded.double() @ offset.double()).to(torch.float32)


def compensated(
    bias: Tensor, weight: Tensor, rounded: Tensor, before: Tensor, behind: Tensor
) -> Tensor:
    """b + W E[x] − Ŵ E[Q(x + n)], [out]: the mean of the output is what it was, and the offset is out too.

    `before` and `behind` [in] are the means of x and of Q(x + n).
    """
    wanted = weight.double() @ before.double() - rounded.double() @ behind.double()
    return (bias.double() + wanted).to(torch.float32)


def refit(weight: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """The weight [out, in] that is best for inputs `seen` [rows, in] in the place of `x`: ridge regression.

    W* = argmin ‖W X − W* X̂‖² + λ‖W* − W‖²        both without their means, which are the bias's
    """
    x, seen = (part.double() - part.double().mean(0) for part in (x, seen))
    gram = seen.T @ seen
    eye = torch.eye(len(gram), dtype=torch.float64)
    damping = DAMPING * (float(gram.diagonal().mean()) or 1.0)
    gain = torch.linalg.solve(gram + damping * eye, seen.T @ (x - seen))
    made: Tensor = (weight.double() + weight.double() @ gain.T).to(torch.float32)
    return made
