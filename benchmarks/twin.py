"""Twin-uniform grids behind GELUs (PTQ4ViT, Yuan et al. 2022): fine steps below zero and coarse ones above.

    x̂ = Δ₂·clamp(round(x⁺ / Δ₂)) − Δ₁·clamp(round(x⁻ / Δ₁))        Δ₂ = 2ᵐ Δ₁, half of the codes on either side

A bit of every code says which side it is of. No kernel of the engines here multiplies such codes; in the graph they are
two grids and a difference, and the layer behind computes in float: it is measured, and it is no engine. What the paper
does to the products of attention has no place here, where attention stays in float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effc.calib.calibrator import collect
from effc.calib.collectors import Rows
from effc.calib.probe import Probe
from effc.ir.edit import insert, lift, refresh, tensor_of
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import op_name
from effc.passes.noisyquant import AMPLITUDES
from effc.quant.noise import FRACTIONS, denoised, uniform
from effc.quant.ops import DEQUANTIZE, QUANTIZE

aten = torch.ops.aten
POWERS = range(11)


def put(
    program: Program, data: Any, bits: int, *, noise: bool, seed: int, offsets: bool = False
) -> None:
    """Give every layer behind a GELU twin grids in the place of the one it has; `noise` as NoisyQuant draws it.

    `offsets` takes the best fraction of a step by channel where that leaves less of the outputs, and moves the mean of
    the output, which the layer's bias has put right for the grid before, along.
    """
    graph = program.only()
    for gelu in [n for n in graph.nodes if op_name(n) == "gelu"]:
        (pair,) = [n for n in graph.nodes if n.target is DEQUANTIZE and _source(n.args[0]) is gelu]
        (layer,) = pair.users
        rows = collect(graph, [Probe(key="x", node=gelu, collector=Rows())], data)["x"]
        x, _ = rows.parts()
        weight = DEQUANTIZE(*(_value(graph, a) for a in layer.args[1].args))
        negative, positive = _steps(x, weight, bits)
        offset = torch.zeros(x.shape[1])
        if noise:
            pattern = positive * uniform(x.shape[1], seed)
            tried = [offset, *(a * pattern for a in AMPLITUDES)]
            offset = min(tried, key=lambda n: _error(x, n, negative, positive, bits))
        moved = None
        if offsets:
            offset = _best(x, weight, negative, positive, bits)
            moved = _behind(graph, pair, x) - twin(x + offset, negative, positive, bits).mean(0)
        _edit(graph, gelu, layer, weight, offset, (negative, positive), bits, moved)
    refresh(graph)


def _source(codes: Any) -> Any:
    """What a quantise node reads, without a sum in front of it."""
    if codes.target is not QUANTIZE:
        return None
    value = codes.args[0]
    return value.args[0] if op_name(value) == "add" else value


def _value(graph: Graph, part: Any) -> Any:
    return tensor_of(graph, part) if isinstance(part, torch.fx.Node) else part


def _side(x: Tensor, step: float, bits: int) -> Tensor:
    return (x.clamp(min=0) / step).round().clamp(max=2 ** (bits - 1) - 1) * step


def twin(x: Tensor, negative: float, positive: float, bits: int) -> Tensor:
    return _side(x, positive, bits) - _side(-x, negative, bits)


def _error(x: Tensor, offset: Tensor, negative: float, positive: float, bits: int) -> float:
    shifted = x + offset
    return float((twin(shifted, negative, positive, bits) - shifted).square().mean())


def _best(x: Tensor, weight: Tensor, negative: float, positive: float, bits: int) -> Tensor:
    """No offset, one for all channels or one each, of some eighths of the coarser step; the mean is the bias's."""

    def left(offset: Tensor) -> Tensor:
        shifted = x + offset
        errors = twin(shifted, negative, positive, bits) - shifted
        return errors - errors.mean(0)

    flat = [torch.full((x.shape[1],), f * positive) for f in FRACTIONS]
    spread = torch.stack([left(one).var(0) for one in flat])
    each = torch.stack(flat).gather(0, spread.argmin(0)[None])[0]
    tried = [torch.zeros(x.shape[1]), *flat, each]
    return min(tried, key=lambda n: float((left(n) @ weight.T).square().mean()))


def _behind(graph: Graph, pair: Any, x: Tensor) -> Tensor:
    """The mean of every channel behind the grid that is there, [channels]."""
    codes = pair.args[0]
    if op_name(codes.args[0]) == "add":
        x = x + tensor_of(graph, codes.args[0].args[1])
    grid = [_value(graph, a) for a in codes.args[1:]]
    return DEQUANTIZE(QUANTIZE(x, *grid), *(_value(graph, a) for a in pair.args[1:])).mean(0)


def _steps(x: Tensor, weight: Tensor, bits: int) -> tuple[float, float]:
    """Δ₁, which just covers what is negative, and the Δ₂ that loses least at the outputs."""
    negative = max(float(-x.min()), 1e-6) / (2 ** (bits - 1) - 1)

    def lost(positive: float) -> float:
        return float(((twin(x, negative, positive, bits) - x) @ weight.T).square().mean())

    return negative, min((negative * 2.0**m for m in POWERS), key=lost)


def _edit(
    graph: Graph, gelu: Any, layer: Any, weight: Tensor, offset: Tensor,
    steps: tuple[float, float], bits: int, moved: Tensor | None,
) -> None:  # fmt: skip
    """`moved` [channels] is the mean behind the grid before less that behind the new ones; None leaves biases alone."""
    stem, origin = f"{gelu.name}_twin", Origin(gelu.name, ("twin",))
    value, earlier = gelu, layer.args[0].args[0].args[0]
    bias = tensor_of(graph, layer.args[2])
    if moved is not None:
        made = bias.double() + weight.double() @ moved.double()
        bias = denoised(made.to(bias.dtype), weight, -offset)  # which is taken out again below
    elif earlier is not gelu:  # the noise of the grid that was there
        bias = denoised(bias, weight, -tensor_of(graph, earlier.args[1]))
    if bool(offset.any()):
        value = insert(
            graph, layer, aten.add.Tensor, (gelu, lift(graph, f"{stem}_offset", offset, origin))
        )
    layer.update_arg(2, lift(graph, f"{stem}_bias", denoised(bias, weight, offset), origin))
    zero = lift(graph, f"{stem}_zero", torch.tensor(0, dtype=torch.uint8), origin)
    sides = []
    for word, step in zip(("negative", "positive"), steps, strict=True):
        turned = insert(graph, layer, aten.neg.default, (value,)) if word == "negative" else value
        cut = insert(graph, layer, aten.relu.default, (turned,))
        scale = lift(graph, f"{stem}_{word}", torch.tensor(step), origin)
        codes = insert(graph, layer, QUANTIZE, (cut, scale, zero, 0, 2 ** (bits - 1) - 1, 0, 0))
        sides.append(insert(graph, layer, DEQUANTIZE, (codes, scale, zero, 0, 0)))
    layer.update_arg(0, insert(graph, layer, aten.sub.Tensor, (sides[1], sides[0])))
