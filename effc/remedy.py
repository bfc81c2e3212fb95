"""What would help a quantised layer, other grids being tried out on the values that it sees.

A layer is run on the reference's input with its weight or its activations on another grid. What is better by a decibel
or more is said, in words that a recipe knows. What the outputs would be without a layer's error is an estimate: the
error is that on exact inputs. NoisyQuant is not run: where values pile up near zero it may help, and that is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.align import align, is_weight
from effc.ir.edit import is_constant, tensor_of
from effc.ir.gap import Padding, decibel, difference, power
from effc.ir.program import Graph
from effc.ir.select import module_path, op_name, site_names
from effc.ir.values import Compared, Values, call, compared, reads
from effc.layers import Layers
from effc.noise import PAIR, Local, bits_of, grid_for
from effc.quant.affine import fake_quantize, pair_scale, weight_qparams
from effc.quant.ops import DEQUANTIZE, QUANTIZE
from effc.quant.scheme import Scheme

WORTH_DB = 1.0
"""What a change must gain at a layer to be said."""
LESS = 0.99
"""What is left of the outputs' squared error without a layer's, where that is worth saying."""
NEAR = 0.25
"""Share of values within half a step of zero, above which noise before rounding may help."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """What would help one layer."""

    site: str
    module: str
    """Its path, for `select: {exclude: …}`."""
    share: float
    local_db: float
    alone_db: float
    """Signal to noise of the outputs where only this layer is quantised."""
    rel_l2: float
    """Estimated error of the outputs where this layer alone is left in float."""
    activations: float | None
    """The part of its noise that the grids on its inputs make; None where it has none."""
    advice: tuple[str, ...]


def remedies(case: Layers, layers: Sequence[Local], top: int) -> list[Remedy]:
    """What would help the `top` layers with the largest shares; `layers` are those of `case.measured()`."""
    loudest = sorted(layers, key=lambda x: -x.share)[:top]
    trials = _trials(case.reference, case.graph, case.feeds, [x.node for x in loudest])
    names, total = site_names(case.reference), case.total
    found = []
    for local in loudest:
        alone, left = case.alone(local), case.without([local])
        activations, advice = trials.get(local.node, (None, []))
        path = module_path(local.node)
        if left < LESS * total:
            error = f"{100 * total**0.5:.3g} % of error would be about {100 * left**0.5:.3g} %"
            advice = [f"leave it in float, `select: {{exclude: ['{path}']}}`: {error}", *advice]
        found.append(
            Remedy(
                site=names[case.call_of(local.node)], module=path,
                share=min(1.0, alone / total) if total else 0.0, local_db=local.local_db,
                alone_db=decibel(1.0, alone), rel_l2=left**0.5, activations=activations,
                advice=tuple(advice),
            )
        )  # fmt: skip
    return sorted(found, key=lambda r: -r.share)


def _trials(
    reference: Graph, graph: Graph, feeds: Mapping[str, Tensor], nodes: Iterable[fx.Node]
) -> dict[fx.Node, tuple[float | None, list[str]]]:
    """By layer, the part of its noise that its activations make, and what other grids would gain."""
    alignment, wanted = align(reference, graph), set(nodes)
    padding = Padding(graph, feeds)
    found = {}
    with torch.no_grad():
        theirs = Values(reference, feeds, more=reads(graph, alignment))
        for item in compared(theirs, graph, alignment, feeds):
            if item.node in wanted and op_name(item.node) in ("linear", "conv1d", "conv2d"):
                other = alignment.calls.get(item.node)
                found[item.node] = _Trial(graph, item, padding).run(
                    _exact_weight(reference, other, item.node)
                )
    return found


def _exact_weight(reference: Graph, other: fx.Node | None, node: fx.Node) -> Tensor | None:
    if (
        other is None
        or other.target is not node.target
        or not is_constant(reference, other.args[1])
    ):
        return None
    return tensor_of(reference, other.args[1])  # type: ignore[arg-type]


class _Trial:
    """One layer on exact inputs, with other grids."""

    def __init__(self, graph: Graph, item: Compared, padding: Padding) -> None:
        self.graph, self.item, self.padding = graph, item, padding
        value, weight = item.node.args[:2]
        assert isinstance(value, fx.Node) and isinstance(weight, fx.Node)
        self.value, self.weight = value, weight

    def noise(self, x: Tensor | None = None, weight: Tensor | None = None) -> float:
        """Noise of the layer's output with its input or its weight changed."""
        inputs = dict(self.item.inputs)
        if x is not None:
            inputs[self.value] = x
        if weight is not None:
            inputs[self.weight] = weight
        off = difference(call(self.item.node, inputs), self.item.theirs)
        return power(self.padding.zeroed(self.item.node, off))

    def run(self, exact: Tensor | None) -> tuple[float | None, list[str]]:
        grid = self._grid()
        of_weight = self.noise()
        if grid is None:
            return None, self._weights(exact, of_weight)
        x = self.item.inputs[self.value]
        scheme, scale, zero = grid
        total = self.noise(fake_quantize(x, scale, zero, scheme))
        activations = max(0.0, 1 - of_weight / total) if total else 0.0
        advice = []
        if activations > 0.5:
            advice.append(
                f"16-bit activations, `activation_bits: 16`: the grid on its input makes {100 * activations:.2g} % "
                f"of its noise, {_gain(total, of_weight):.1f} dB"
            )
            advice += self._ranges(x, scheme, scale, zero, total)
            near = float((self.padding.without(self.value, x).abs() < scale / 2).double().mean())
            if near > NEAR:
                advice.append(
                    f"`pass: noisyquant` may help: {100 * near:.2g} % of its input lies within half a step of "
                    "zero; not tried out"
                )
        else:
            advice += self._weights(exact, of_weight)
        return activations, advice

    def _grid(self) -> tuple[Scheme, Tensor, Tensor] | None:
        """The grid on the layer's input, where there is one for the whole tensor."""
        codes = self.value.args[0] if self.value.target is DEQUANTIZE else None
        if not isinstance(codes, fx.Node) or codes.target is not QUANTIZE:
            return None
        if not is_constant(self.graph, codes.args[1]):
            return None
        scale, zero = (tensor_of(self.graph, codes.args[i]) for i in (1, 2))  # type: ignore[arg-type]
        low, high = (int(codes.args[i]) for i in (3, 4))  # type: ignore[arg-type]
        if scale.numel() != 1:
            return None
        bits = (high - low).bit_length()
        return Scheme(bits=bits, signed=low < 0, symmetric=low == -high), scale, zero

    def _ranges(
        self, x: Tensor, scheme: Scheme, scale: Tensor, zero: Tensor, total: float
    ) -> list[str]:
        """The best other way to choose the range of the input."""
        kept = self.padding.without(self.value, x)
        best, word = total, ""
        for name in ("mse", "percentile", "minmax"):
            noise = self.noise(fake_quantize(x, *grid_for(kept, name, scheme), scheme))
            if noise < best:
                best, word = noise, name
        if not word or _gain(total, best) < WORTH_DB:
            return []
        off = fake_quantize(kept, scale, zero, scheme) - kept
        outside = off.abs() > 0.51 * scale
        share = 100 * float(outside.double().mean())
        clipped = 100 * power(off[outside]) / max(power(off), 1e-300)
        return [
            f"another range, `range: {word}`: {_gain(total, best):.1f} dB less noise "
            f"({share:.2g} % of the input is clipped, which makes {clipped:.2g} % of its error)"
        ]

    def _weights(self, exact: Tensor | None, noise: float) -> list[str]:
        """What other grids for the weight would gain."""
        if exact is None or not is_weight(self.weight):
            return []
        scale = self._scale
        is_one = scale.dim() == 0
        group: Any = self.weight.args[4]
        bits = bits_of(self.graph, self.weight)
        kept = Scheme(bits=bits, axis=None if is_one else 0, group=group or None)
        least, _ = weight_qparams(exact, kept)
        if scale.shape != least.shape:
            return []
        is_mse = bool((scale < 0.99 * least).any())
        method: Any = "mse" if is_mse else "minmax"
        limit = PAIR if self._is_widened(exact, kept) else None
        tried: list[tuple[str, Scheme, Any, int | None]] = []
        if is_one:
            per_channel = dataclasses.replace(kept, axis=0)
            tried.append(("a scale per channel instead of one", per_channel, method, limit))
        if not is_mse:
            tried.append(("the least squared error, `weight_range: mse`", kept, "mse", limit))
        if limit is not None:
            word = "scales as small as they can be, `overflow_fix: false`"
            tried.append((word, kept, method, None))
        if kept.bits < 8:
            wide = dataclasses.replace(kept, bits=8)
            has_pairs = self._grid() is not None and kept.axis == 0 and not kept.group
            tried.append(("`bits: 8`", wide, method, PAIR if has_pairs else None))
        found = []
        for word, scheme, how, pairs in tried:
            grid = weight_qparams(exact, scheme, method=how, pair_limit=pairs)
            gain = _gain(noise, self.noise(weight=fake_quantize(exact, *grid, scheme)))
            if gain >= WORTH_DB:
                found.append((gain, f"{word}: {gain:.1f} dB less noise of its weight"))
        return [text for _, text in sorted(found, reverse=True)]

    @property
    def _scale(self) -> Tensor:
        return tensor_of(self.graph, self.weight.args[1])  # type: ignore[arg-type]

    def _is_widened(self, exact: Tensor, scheme: Scheme) -> bool:
        """Whether room for pairs of neighbours has made scales of an 8-bit weight wider than they need be."""
        if scheme.bits != 8 or scheme.axis != 0 or scheme.group:
            return False
        pairs = pair_scale(exact, PAIR)
        return bool((torch.isclose(self._scale, pairs, rtol=1e-3) & (pairs > 0)).any())


def _gain(before: float, after: float) -> float:
    return decibel(before, after) if before else 0.0
