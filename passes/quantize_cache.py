"""The cache of keys and values of a language model as integers of 8 bit: a quarter of its memory and of its traffic.

    present = [past, quantize(new)]        codes [batch, heads, positions, size], in the ports
    attention reads dequantize(present)

The size of a code is a constant of its head and channel: keys have few channels with large values, the same for every
token (Liu et al. 2024, KIVI, section 3), and nothing that is in the cache is ever rounded again. Rotary embedding turns
two channels into each other as positions go on, further than calibration data is long; both have the size that the
longest vector of the two asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import fx

from effc.calib.collectors import Heads
from effc.calib.probe import Probe
from effc.causal import PAST, PRESENT
from effc.dialect import Dialect
from effc.errors import CalibrationError, PreconditionError
from effc.ir.edit import give, insert, lift, replace, retype
from effc.ir.program import Graph, Origin, Program
from effc.passes.base import Pass, Stats
from effc.quant.affine import SMALLEST, steady
from effc.quant.ops import DEQUANTIZE, QUANTIZE
from effc.quant.scheme import Scheme

aten = torch.ops.aten
GRID = Scheme(narrow=False)
HEADROOM = 1.25
"""How much further than calibration data a code reaches: a key that is cut off costs far more than coarser steps do.
On SmolLM2-135M perplexity rises by 0.52 % at 1 and by 0.08 % at 1.5; it does not at 1.25."""
NO_CACHE = "compile a directory of a causal language model, without `cache: false`"


@dataclass(frozen=True, kw_only=True)
class QuantizeCache(Pass):
    """Makes integers of 8 bit of the cache that a causal language model takes and gives.

    It goes in front of what rounds weights or activations, so that engines of one model, of other bits each, come to
    the same scales and can read each other's cache.
    """

    name = "quantize-cache"
    effect = "lossy"
    is_shared: ClassVar[bool] = True

    @property
    def measures(self) -> bool:
        return True

    def resolve(self, dialect: Dialect) -> Self:
        if not dialect.cache_codes:
            raise PreconditionError(
                f"quantize-cache: target {dialect.name} takes no cache of integers",
                hint="leave the pass out; ort, openvino and onnx take one",
            )
        return self

    def requires(self, program: Program) -> None:
        for graph in program:
            if not self.takes(graph.role):
                continue
            where = f"graph {graph.role!r}"
            wanted = [name for name in graph.inputs if name.startswith(f"{PAST}.")]
            if not wanted:
                raise PreconditionError(
                    "quantize-cache: the model takes no cache of keys and values",
                    where=where,
                    hint=NO_CACHE,
                )
            if graph.codes or any(n.target in (QUANTIZE, DEQUANTIZE) for n in graph.nodes):
                raise PreconditionError(
                    "quantize-cache measures keys and values of the model, and something is rounded already",
                    where=where,
                    hint="put `quantize-cache` in front of all that quantises",
                )
            if missing := set(wanted) - {place.port for place in places(graph)}:
                raise PreconditionError(
                    f"quantize-cache does not see what the model puts behind {min(missing)}",
                    where=where,
                    hint="leave the pass out, and report the model that shows this",
                )

    def probes(self, graph: Graph) -> Iterable[Probe]:
        for place in places(graph):
            collector = Heads(turned=turned(place.new))
            yield Probe(key=f"{graph.role}/{place.port}", node=place.new, collector=collector)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        found = places(graph)
        for place in found:
            key = f"{graph.role}/{place.port}"
            steps = stats.decide(key, partial(_decided, stats, key))
            _round(graph, place, _sizes(steps, place))
        return len(found)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Keys or values of a layer: the names of their ports, the new ones, and where they are put behind the others."""

    port: str
    output: str
    new: fx.Node
    joined: fx.Node


def places(graph: Graph) -> list[Place]:
    """Where a graph puts new keys and values [batch, heads, positions, size] behind those that it takes."""
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    made = dict(zip(graph.outputs, output.args[0], strict=True))
    found = []
    for port, past in graph.input_nodes().items():
        given = f"{PRESENT}{port.removeprefix(PAST)}"
        if not port.startswith(f"{PAST}.") or given not in made:
            continue
        joined = made[given]
        if isinstance(joined, fx.Node) and (new := _behind(past, joined)) is not None:
            found.append(Place(port=port, output=given, new=new, joined=joined))
    return found


def _behind(past: fx.Node, joined: fx.Node) -> fx.Node | None:
    """What is put behind the positions of `past`, which nothing else reads."""
    if joined.target is not aten.cat.default or len(joined.args) < 2:
        return None
    parts, axis = joined.args
    others = {n.target for n in past.users if n is not joined} - {aten.sym_size.int}
    if not isinstance(parts, list | tuple) or len(parts) != 2 or axis not in (-2, 2) or others:
        return None
    first, new = parts
    return new if first is past and isinstance(new, fx.Node) else None


def turned(keys: fx.Node) -> int:
    """How many channels of a head are turned into those half as many further: x cos + [−x₂, x₁] sin, or a part so."""
    if keys.target is aten.cat.default and isinstance(keys.args[0], list | tuple):
        parts = [part for part in keys.args[0] if isinstance(part, fx.Node)]
        return turned(parts[0]) if parts and parts[0].target is not aten.cat.default else 0
    if keys.target is not aten.add.Tensor:
        return 0
    for product in keys.all_input_nodes:
        for half in product.all_input_nodes if product.target is aten.mul.Tensor else ():
            parts = half.args[0] if half.target is aten.cat.default else ()  # type: ignore[assignment]
            if isinstance(parts, list | tuple) and any(
                isinstance(p, fx.Node) and p.target is aten.neg.default for p in parts
            ):
                return int(keys.meta["val"].shape[-1])
    return 0


def _sizes(steps: Any, place: Place) -> torch.Tensor:
    """A decision as [heads, size]. Raises CalibrationError where a record holds something else."""
    try:
        found = torch.tensor(steps, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        found = torch.zeros(0)
    _, heads, _, size = place.new.meta["val"].shape
    if found.shape != (heads, size) or not bool((torch.isfinite(found) & (found > 0)).all()):
        raise CalibrationError(
            f"the recorded sizes of {place.port} are not those of its {heads} heads of {size}",
            hint="the record is of another model; compile again without --decisions",
        )
    return found


def _decided(stats: Stats, key: str) -> list[list[float]]:
    """The size of a code by head and channel."""
    most = HEADROOM / GRID.high
    return [[max(steady(float(v)) * most, SMALLEST) for v in head] for head in stats[key].most]


def _round(graph: Graph, place: Place, steps: torch.Tensor) -> None:
    """`steps` is the size of a code, [heads, size]."""
    name, joined = place.port, place.joined
    scale = lift(
        graph, f"{name}.scale", steps[None, :, None, :].contiguous(), Origin(name, ("scale",))
    )
    zero = lift(graph, f"{name}.zero", torch.zeros((), dtype=GRID.dtype), Origin(name, ("zero",)))
    past = retype(graph, name, GRID.dtype)
    new = insert(graph, joined, QUANTIZE, (place.new, scale, zero, GRID.low, GRID.high, -1, 0))
    codes = insert(graph, joined, aten.cat.default, ([past, new], 2))
    values = insert(graph, joined, DEQUANTIZE, (codes, scale, zero, -1, 0))
    replace(graph, joined, values)
    give(graph, place.output, codes)
    graph.codes |= {name: f"{name}.scale", place.output: f"{name}.scale"}
