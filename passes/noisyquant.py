"""Quantisation with an offset in front of every activation's grid, taken out by the bias behind it.

    y = Ŵ·Q(x + n) + b'        b' = b + W E[x] − Ŵ E[Q(x + n)]        (without compensation: b − Ŵ n)

The offset is fixed, one number a channel. A norm or a layer in front takes it up where it can (`shift`), the bias takes
it out, and the engine is that of plain quantisation; elsewhere it is one sum. Noise is one way to choose it (Liu et al.
2023, NoisyQuant). The search here has others: one offset for all channels, which is a zero point that need not be an
integer; the middle of every channel; the best fraction of a step by channel. No offset is among them too, and all are
scored at the layers' outputs, on samples that they were not chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.collectors import Gram, Rows
from effc.calib.probe import Probe
from effc.calib.slopes import RowSlopes, SlopeProbe
from effc.errors import PreconditionError
from effc.ir.edit import lift, tensor_name, tensor_of
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import op_name, site_names, value_key
from effc.passes.base import Stats
from effc.passes.quantize import (
    Quantize,
    Quantized,
    Work,
    constant_bias,
    end_of,
    weight_of,
    weight_scheme,
)
from effc.passes.shift import Owner, owner, shift
from effc.quant import noise
from effc.quant.affine import (
    dequantize,
    fake_quantize,
    pair_scale,
    qparams,
    steady,
    weight_qparams,
)
from effc.quant.noise import Grid
from effc.quant.scheme import Scheme

AMPLITUDES = tuple(i / 20 for i in range(1, 41))
"""Of noise, in steps of the grid."""
SEEDS = 4
"""Patterns of noise that the search draws."""
CLIPS = tuple(i / 10 for i in range(2, 12))
"""Ends of a grid that are tried, as shares of those that the range method gives."""
FINER = tuple(i / 40 for i in (-3, -2, -1, 1, 2, 3))
"""What is tried around the best of them."""
FRACTIONS = tuple(i / 16 for i in range(-8, 9) if i)
"""Offsets for all channels, in steps of the grid."""
CENTRED = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way to the middle of all values."""
TAIL = 0.001
"""Share of the rows that may lie beyond what counts as an end of a channel, on either side."""
FINENESS = 64
"""Offsets are whole multiples of a step over this."""
SHARES = tuple(i / 64 for i in range(16, 71, 2))
"""Ends of a row of a weight that are tried, as shares of those that its range method gives."""
ROUNDS = 3
"""How often ends of activations and of weights are searched in turn."""


@dataclass(frozen=True, kw_only=True)
class NoisyQuant(Quantize):
    """Quantises as `quantize` does, and shifts what linear layers read so that less is lost.

    `mode` paper draws uniform noise for every channel, its size by the error of the activation; released is what the
    published code does: clips by the error of the output, one offset for all channels, noise that is not uniform; effc
    tries all kinds of offsets with the mean put right by the bias, and keeps what is best on held-out samples; none has
    no offset, for the grids that the other options choose. `clip` output searches the ends of every grid by the error
    at the layer's output in the place of `range`'s alone, and cosine by the angle between outputs (EasyQuant, Wu et al.
    2020); `weight_clip` output does the same for every row of the weights, in turn. `slopes` weighs the error of every
    output by the squared slope of a loss (PTQ4ViT, Yuan et al. 2022). `refit` rounds the weights that are best for
    rounded inputs (ridge regression). A sum of its own is added only for a gain of `gain_db`; `add` false leaves such
    places without an offset.
    """

    name = "noisyquant"

    mode: Literal["paper", "released", "effc", "none"] = "effc"
    clip: Literal["range", "output", "cosine"] | None = None
    weight_clip: Literal["range", "output"] = "range"
    slopes: bool = False
    bias_correction: bool | None = None  # type: ignore[assignment]
    """As the mode has it where nothing is said."""
    refit: bool = False
    add: bool = True
    gain_db: Annotated[float, Field(ge=0)] = 1.0
    rows: Annotated[int, Field(ge=16)] = 2048
    """Rows of every activation that are kept to choose by."""
    seed: int = 0

    @property
    def measures(self) -> bool:
        return True

    @property
    def measures_again(self) -> bool:
        return self.refit or super().measures_again

    @property
    def compensates(self) -> bool:
        """Whether biases put the mean of outputs right."""
        return self.mode == "effc" if self.bias_correction is None else self.bias_correction

    @property
    def searches_clip(self) -> bool:
        """Whether ends of grids are searched by the layers' outputs."""
        return (
            self.mode == "released" or self.mode == "effc"
            if self.clip is None
            else self.clip != "range"
        )

    def without_offset(self) -> NoisyQuant:
        """The same grids, chosen as they are."""
        clip = self.clip or ("output" if self.searches_clip else "range")
        return replace(self, mode="none", clip=clip, bias_correction=self.compensates)

    def requires(self, program: Program) -> None:
        if self._is_fp8 or not self._static or self._of_tokens:
            raise PreconditionError(
                "noisyquant: an offset is for integer activations with one scale each",
                hint="set activation_bits to 3 … 8, and leave dtype and activation_scale out",
            )
        if self.slopes and self.clip == "cosine":
            raise PreconditionError(
                "noisyquant: an angle between outputs has no error to weigh by slopes",
                hint="set clip: output, or leave slopes out",
            )
        if self.weight_clip == "output" and not self.searches_clip:
            raise PreconditionError(
                "noisyquant: ends of weights are searched in turn with those of activations",
                hint="set clip: output or clip: cosine, or leave weight_clip out",
            )
        super().requires(program)

    def places(self, graph: Graph) -> list[Place]:
        """The activations that may be shifted, in order of execution."""
        sites = self.sites(graph)
        on_grid = {end_of(n) for n in sites if op_name(n).startswith("conv") and self.conv_output}
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in sites:
            value = node.args[0]
            if op_name(node) == "linear" and isinstance(value, fx.Node) and value not in on_grid:
                found.setdefault(value, []).append(node)
        return [
            Place(v, layers, owner(graph, v) if set(v.users) == set(layers) else None)
            for v, layers in found.items()
        ]

    def probes(self, graph: Graph) -> Iterable[Probe]:
        yield from (p for p in super().probes(graph) if not isinstance(p.collector, Gram))
        names = site_names(graph)
        for place in self.places(graph):
            key = _rows_key(graph, names, place.value)
            yield Probe(key=key, node=place.value, collector=Rows(self.rows, self.seed))
            for layer in place.layers if self.slopes else ():
                outputs = torch.arange(layer.meta["val"].shape[-1])
                yield SlopeProbe(
                    key=_slopes_key(graph, names, layer), node=layer, dim=-1, places=outputs,
                    collector=RowSlopes(self.rows, self.seed),
                )  # fmt: skip

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        sites = self.sites(graph)
        return self._quantised(_Work(self, graph, stats, site_names(graph)), sites) if sites else 0


def _rows_key(graph: Graph, names: dict[fx.Node, str], value: fx.Node) -> str:
    return f"{value_key(graph, names, value)}:rows"


def _slopes_key(graph: Graph, names: dict[fx.Node, str], layer: fx.Node) -> str:
    return f"{value_key(graph, names, layer)}:slopes"


@dataclass(frozen=True)
class Place:
    """An activation, the linear layers that read it, and who takes up an offset."""

    value: fx.Node
    layers: list[fx.Node]
    owner: Owner | None


@dataclass(frozen=True)
class _Choice:
    """A grid and an offset [channels], with what is lost at the outputs."""

    grid: Grid
    offset: Tensor
    loss: float = math.inf
    shares: Tensor | None = None
    """Of the ends of rows of the weights behind it, [out], where those are searched too."""

    @property
    def is_shifted(self) -> bool:
        return bool(self.offset.any())


@dataclass(frozen=True)
class Weights:
    """Weights [out, in] of the layers behind an activation, and the scale [out] of their rows."""

    exact: Tensor
    scale: Tensor
    scheme: Scheme

    def rounded(self, shares: Tensor | float = 1.0) -> Tensor:
        """What grids whose ends are those shares leave of them."""
        zero = torch.zeros(len(self.scale), dtype=self.scheme.dtype)
        return fake_quantize(self.exact, self.scale * shares, zero, self.scheme)


@dataclass
class _Search:
    """Choices for one activation: `x` rows to choose by and `held` ones, `behind` the weights that read it."""

    options: NoisyQuant
    x: Tensor
    held: Tensor
    behind: Weights
    plain: Grid
    """The grid without an offset."""
    scheme: Scheme
    """Of the grid with one."""
    slopes: tuple[Tensor, Tensor] | None = None
    """Squared, of every output of the rows to choose by and of those held out, [rows, out]."""
    shares: Tensor = field(init=False)
    """Of the ends of rows of weights, [out]."""
    rounded: Tensor = field(init=False)
    root: Tensor = field(init=False)
    """Ŵ, or where it has more rows than channels the R of Ŵ = Q R: ‖R e‖ is ‖Ŵ e‖, and costs less."""

    def __post_init__(self) -> None:
        self._take(torch.ones(len(self.behind.scale)))

    def _take(self, shares: Tensor) -> None:
        self.shares, self.rounded = shares, self.behind.rounded(shares)
        rows, channels = self.rounded.shape
        small = rows <= channels or self.slopes is not None
        self.root = self.rounded if small else torch.linalg.qr(self.rounded, mode="r").R

    def best(self, dearer_db: float) -> _Choice:
        """The choice of the options' mode; one with an offset is to gain `dearer_db` where it is a node."""
        base = self._base()
        made = self._offset(base, dearer_db)
        return replace(made, shares=self.shares) if self.options.weight_clip == "output" else made

    def _base(self) -> Grid:
        """The grid without an offset, and what `weight_clip` makes of the weights' grids."""
        if not self.options.searches_clip:
            return self.plain
        zero = torch.zeros(self.x.shape[1])
        base = self._clipped(self.plain, zero)
        for _ in range(ROUNDS if self.options.weight_clip == "output" else 0):
            self._take(self._row_shares(base.round(self.x)))
            base = self._clipped(self.plain, zero)
        return base

    def _row_shares(self, seen: Tensor) -> Tensor:
        """Shares of the ends of rows that lose least at the outputs for inputs `seen` [rows, in]."""
        wanted = self.x @ self.behind.exact.T
        lost = []
        for share in SHARES:
            found = seen @ self.behind.rounded(share).T
            if self.options.clip == "cosine":
                lost.append(noise.angle(wanted, found, 0))
                continue
            squares = (found - wanted).square()
            squares = squares * self.slopes[0] if self.slopes is not None else squares
            lost.append(squares.sum(0, dtype=torch.float64))
        return torch.tensor(SHARES)[torch.stack(lost).argmin(0)]

    def _offset(self, base: Grid, dearer_db: float) -> _Choice:
        zero = torch.zeros(self.x.shape[1])
        match self.options.mode:
            case "none":
                return _Choice(base, zero)
            case "paper":
                return self._by_input(base)
            case "released":
                return self._by_output(base)
        none = self._scored(base, zero, self.held)
        kinds = [min(kind, key=lambda c: c.loss) for kind in self._kinds(base)]
        best = min((self._scored(c.grid, c.offset, self.held) for c in kinds), key=lambda c: c.loss)
        return best if best.loss < none.loss * 10 ** (-dearer_db / 10) else none

    def _kinds(self, base: Grid) -> Iterator[list[_Choice]]:
        """Offsets of each kind, scored by the rows to choose by."""
        channels = self.x.shape[1]
        middles = (self.x.quantile(TAIL, 0) + self.x.quantile(1 - TAIL, 0)) / 2
        flat = [torch.full((channels,), f * base.scale) for f in FRACTIONS]
        grid = self._shifted_grid(base)
        flat_choices = [self._scored(grid, n, self.x) for n in flat]
        centre = (self.x.amin() + self.x.amax()) / 2
        wide = [self._choice(torch.full((channels,), float(-centre * t))) for t in CENTRED]
        yield [*flat_choices, *wide]
        yield [
            self._scored(grid, a * grid.scale * pattern, self.x)
            for seed in range(SEEDS)
            for pattern in [noise.uniform(channels, self.options.seed + seed)]
            for a in (0.25, 0.5, 1.0)
        ]
        start = min([*flat_choices, *wide], key=lambda c: c.loss)
        centred = [self._choice(-n) for n in (self.x.mean(0), middles)]
        zero = _Choice(grid, torch.zeros(channels))
        yield [
            *centred,
            *(
                self._scored(c.grid, noise.best_offsets(self.x, c.offset, c.grid), self.x)
                for c in (zero, start, *centred)
            ),
        ]

    def _shifted_grid(self, base: Grid) -> Grid:
        """A grid of the same step for values of either sign."""
        if base.scheme == self.scheme:
            return base
        return self._grid(self.x)

    def _choice(self, offset: Tensor) -> _Choice:
        """An offset with a grid of its own."""
        grid = self._grid(self.x + offset)
        if self.options.searches_clip:
            grid = self._clipped(grid, offset)
        return self._scored(grid, offset, self.x)

    def _grid(self, shifted: Tensor) -> Grid:
        collector = self.options._collector()
        collector.update(shifted)
        low, high = collector.range(self.scheme)
        return grid_of(low, high, self.scheme)

    def _clipped(self, grid: Grid, offset: Tensor) -> Grid:
        """The grid whose ends lose least at the outputs."""
        ends = [(end - grid.zero_point) * grid.scale for end in (grid.scheme.low, grid.scheme.high)]
        wanted = self.x @ self.behind.exact.T if self.options.clip == "cosine" else None

        def lost(one: Grid) -> float:
            if wanted is None:
                return self._scored(one, offset, self.x).loss
            seen = one.round(self.x + offset) - offset
            return float(noise.angle(wanted, seen @ self.rounded.T))

        def tried(shares: Sequence[float]) -> list[tuple[float, float, Grid]]:
            grids = [(c, grid_of(ends[0] * c, ends[1] * c, grid.scheme)) for c in shares]
            return [(lost(one), c, one) for c, one in grids]

        def least(found: list[tuple[float, float, Grid]]) -> tuple[float, float, Grid]:
            return min(found, key=lambda each: each[0])

        best = least([(lost(grid), 1.0, grid), *tried(CLIPS)])
        return least([best, *tried([best[1] + f for f in FINER])])[2]

    def _by_input(self, base: Grid) -> _Choice:
        """Uniform noise by the error of the activation."""
        grid = self._shifted_grid(base)
        pattern = noise.uniform(self.x.shape[1], self.options.seed)
        best = _Choice(base, torch.zeros_like(pattern), self._input_loss(base, 0 * pattern))
        for amplitude in AMPLITUDES:
            offset = self._fine(amplitude * grid.scale * pattern, grid)
            loss = self._input_loss(grid, offset)
            if loss < best.loss:
                best = _Choice(grid, offset, loss)
        return best

    def _input_loss(self, grid: Grid, offset: Tensor) -> float:
        return float(noise.input_error(self.x, offset, grid).square().mean(dtype=torch.float64))

    def _by_output(self, base: Grid) -> _Choice:
        """One offset for all channels, and then what the published code draws, by the error of the output."""
        channels = self.x.shape[1]
        grid = self._shifted_grid(base)
        best = self._scored(base, torch.zeros(channels), self.x)
        steps = [i / 20 * grid.scale for i in range(-20, 20)]
        flat = [self._scored(grid, torch.full((channels,), mu), self.x) for mu in steps]
        best = min([best, *flat], key=lambda c: c.loss)
        pattern = grid.scale * noise.lopsided(channels, self.options.seed)
        drawn = [self._scored(grid, best.offset + a * pattern, self.x) for a in AMPLITUDES[:20]]
        return min([best, *drawn], key=lambda c: c.loss)

    def _fine(self, offset: Tensor, grid: Grid) -> Tensor:
        """An offset that is recorded and computed alike everywhere."""
        unit = grid.scale / FINENESS
        return (offset.double() / unit).round().mul(unit).to(torch.float32)

    def _scored(self, grid: Grid, offset: Tensor, rows: Tensor) -> _Choice:
        offset = self._fine(offset, grid)
        errors = noise.input_error(rows, offset, grid)
        mean = torch.zeros(rows.shape[1])
        if self.options.compensates:
            mean = (errors if rows is self.x else noise.input_error(self.x, offset, grid)).mean(0)
        slopes = None if self.slopes is None else self.slopes[rows is not self.x]
        return _Choice(grid, offset, noise.output_loss(errors, self.root, mean, slopes))


def grid_of(low: float, high: float, scheme: Scheme) -> Grid:
    ends = torch.tensor(steady(low)), torch.tensor(steady(high))
    scale, zero = qparams(*ends, scheme)
    return Grid(scale=float(scale), zero_point=int(zero), scheme=scheme)


class _Work(Work):
    """The edits of `quantize`, with offsets in front of grids and biases that take them out."""

    options: NoisyQuant

    def __init__(
        self, pass_: NoisyQuant, graph: Graph, stats: Stats, names: dict[fx.Node, str]
    ) -> None:
        super().__init__(pass_, graph, stats, names)
        self.shares: dict[fx.Node, Tensor] = {}
        """By weight, of the ends of its rows."""
        self.chosen: dict[fx.Node, _Choice] = {}
        """By layer."""
        self.read: dict[fx.Node, tuple[str, Place]] = {}
        """By layer, the key of what it read before anything was edited, and its place."""
        for place in pass_.places(graph):
            key = value_key(graph, names, place.value)
            choice = self._decided(key, place)
            for layer in place.layers:
                self.chosen[layer], self.read[layer] = choice, (key, place)

    def _decided(self, key: str, place: Place) -> _Choice:
        shifted, own = self.options._activation, self.scheme(place.value)

        def search() -> _Choice:
            x, held = self.stats[f"{key}:rows"].parts()
            low, high = self.stats[key].range(own)
            plain = grid_of(low, high, own)
            options = self.options
            if place.owner is None and not options.add:
                options = options.without_offset()
            weights = self._weights(place.layers)
            slopes = self._slopes(place.layers) if options.slopes else None
            asked = _Search(options, x, held, weights, plain, shifted, slopes)
            has_biases = all(constant_bias(self.graph, layer) for layer in place.layers)
            return asked.best(0.0 if place.owner is not None and has_biases else options.gain_db)

        made: list[_Choice] = []

        def once() -> _Choice:
            if not made:
                made.append(search())
            return made[0]

        offset = self.stats.decide(f"{key}:offset", lambda: _listed(once().offset))
        scheme = shifted if offset else own
        step, zero = self.stats.decide(key, lambda: [once().grid.scale, once().grid.zero_point])
        shares = None
        if self.options.weight_clip == "output":
            listed = self.stats.decide(f"{key}:shares", lambda: _numbers(once().shares))
            shares = torch.tensor(listed)
            for layer, part in zip(place.layers, shares.split(_rows(place.layers)), strict=True):
                self.shares.setdefault(weight_of(layer), part)
        channels = place.value.meta["val"].shape[-1]
        found = torch.tensor(offset) if offset else torch.zeros(int(channels))
        return _Choice(Grid(scale=step, zero_point=zero, scheme=scheme), found, shares=shares)

    def _weights(self, layers: Sequence[fx.Node]) -> Weights:
        exact = [tensor_of(self.graph, weight_of(layer)).float() for layer in layers]
        scheme, method = (
            weight_scheme(exact[0].shape, self.options.bits, None),
            self.options.weight_range,
        )
        scales = [weight_qparams(weight, scheme, method=method)[0] for weight in exact]
        return Weights(torch.cat(exact), torch.cat(scales), scheme)

    def _slopes(self, layers: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
        """Squared slopes at the outputs of layers, beside the rows to choose by and those held out; 1 on average."""
        keys = [_slopes_key(self.graph, self.names, layer) for layer in layers]
        chosen, held = (
            torch.cat(parts, -1).square()
            for parts in zip(*(self.stats[key].parts() for key in keys), strict=True)
        )
        mean = float(chosen.mean()) or 1.0
        return chosen / mean, held / mean

    def weight_grid(
        self, node: fx.Node, tensor: Tensor, scheme: Scheme, limit: int | None
    ) -> tuple[Tensor, Tensor]:
        if node not in self.shares:
            return super().weight_grid(node, tensor, scheme, limit)
        scale, zero = super().weight_grid(node, tensor, scheme, None)
        scale = scale * self.shares[node]
        return scale if limit is None else torch.maximum(scale, pair_scale(tensor, limit)), zero

    def grid(self, value: fx.Node, key: str, scheme: Scheme) -> tuple[float, int]:
        for layer, (known, _) in self.read.items():
            if known == key:
                grid = self.chosen[layer].grid
                return grid.scale, grid.zero_point
        return super().grid(value, key, scheme)

    def input(self, site: fx.Node) -> None:
        choice, value = self.chosen.get(site), site.args[0]
        assert isinstance(value, fx.Node)
        if choice is not None and choice.is_shifted and value not in self.values:
            key, place = self.read[site]
            made = shift(self.graph, key, value, choice.offset, place.owner, site)
            if made is not value:
                self.names[made] = self.names.get(value, value.name)
                for layer in place.layers:
                    layer.update_arg(0, made)
        super().input(site)

    def _sample(self, weight: fx.Node) -> tuple[Tensor, Tensor]:
        """Rows that layers with a weight read, and what their grids leave of them."""
        pairs = []
        for layer in weight.users:
            if layer not in self.read:
                continue
            key, _ = self.read[layer]
            x, choice = self.stats[f"{key}:rows"].rows, self.chosen[layer]
            pairs.append((x, choice.grid.round(x + choice.offset) - choice.offset))
        x, seen = (torch.cat(part) for part in zip(*pairs, strict=True))
        return x, seen

    def target(self, node: fx.Node) -> Tensor:
        weight = super().target(node)
        readers: Sequence[fx.Node] = list(node.users)
        if not self.options.refit or any(layer not in self.read for layer in readers):
            return weight
        key = f"{self.graph.role}/{tensor_name(self.graph, node)}:refit"
        return self.stats.decide_tensor(key, lambda: noise.refit(weight, *self._sample(node)))

    def gram(self, node: fx.Node) -> tuple[Tensor, int]:
        _, seen = self._sample(node)
        rows = seen.double()
        if self.options.compensates:
            rows = rows - rows.mean(0)
        return rows.T @ rows, len(rows)

    def correct_bias(self, site: fx.Node, weight: Quantized) -> None:
        choice = self.chosen.get(site)
        if choice is None:
            super().correct_bias(site, weight)
            return
        bias, original = constant_bias(self.graph, site), tensor_of(self.graph, weight_of(site))
        if bias is None and not choice.is_shifted:
            return  # a bias would be a sum more
        codes, zero = (tensor_of(self.graph, part) for part in (weight.codes, weight.zero_point))
        rounded = dequantize(codes, weight.scales, zero, weight.scheme)
        old = tensor_of(self.graph, bias) if bias is not None else torch.zeros(len(original))
        if self.options.compensates:
            key, _ = self.read[site]
            before, behind = self.stats.decide(f"{key}:means", partial(self._means, key, choice))
            parts = torch.tensor(before), torch.tensor(behind)
            made = noise.compensated(old, original, rounded, *parts)
        elif choice.is_shifted:
            made = noise.denoised(old, rounded, choice.offset)
        else:
            return
        if bias is None:
            stem = self.names[site]
            name = lift(self.graph, f"{stem}.bias", made, Origin(stem, ("offset",)))
            site.args = (*site.args[:2], name)
            return
        self.correct(site, bias, made)

    def _means(self, key: str, choice: _Choice) -> list[list[float]]:
        x = self.stats[f"{key}:rows"].rows
        behind = choice.grid.round(x + choice.offset)
        return [[steady(float(m), 16) for m in part.double().mean(0)] for part in (x, behind)]


def _listed(offset: Tensor) -> list[float]:
    return _numbers(offset) if bool(offset.any()) else []


def _numbers(values: Tensor | None) -> list[float]:
    return [] if values is None else [float(n) for n in values]


def _rows(layers: Sequence[fx.Node]) -> list[int]:
    """Outputs of every layer."""
    return [int(layer.meta["val"].shape[-1]) for layer in layers]
