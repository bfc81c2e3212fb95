"""Faults drawn at random: kind, place and strength come from a seed, the models from `coverage`.

Nothing in effc was chosen with these in view. A kind has `sites` in a graph, and a plant for a site and a draw.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from planted import (
    Plant,
    constant,
    gone,
    grid,
    inserted,
    literal,
    looked_up,
    one_further,
    regridded,
    replaced,
    rescaled,
    shifted,
    stale,
    swapped,
    times,
    turned,
    weight,
)
from torch import Tensor, fx

from effc.ir.align import is_weight
from effc.ir.edit import is_constant
from effc.ir.program import Graph
from effc.ir.select import op_name

aten = torch.ops.aten
MODELS = ("distilbert", "gpt2", "modernbert", "swin", "convnext", "unusual")
LAYERS = ("linear", "conv1d", "conv2d")
ACTIVATIONS = {
    "relu": aten.relu.default,
    "gelu": aten.gelu.default,
    "silu": aten.silu.default,
    "tanh": aten.tanh.default,
    "sigmoid": aten.sigmoid.default,
}
NORMS = {"layer_norm": 4, "rms_norm": 3}
"""The place of epsilon."""
TRUNCATE = ((aten.to.dtype, (torch.int32,)), (aten.to.dtype, (torch.float32,)))


@dataclass(frozen=True)
class Site:
    """A node by operator and number among its kind."""

    op: str
    number: int
    node: fx.Node


Kind = tuple[
    Callable[[Graph, Site], bool], Callable[[Graph, Graph, Site, random.Random], tuple[str, Plant]]
]


def sites(graph: Graph) -> Iterator[Site]:
    counts: dict[str, int] = {}
    for node in graph.nodes:
        op = op_name(node)
        yield Site(op, counts.get(op, 0), node)
        counts[op] = counts.get(op, 0) + 1


def draw(graph: Graph, exact: Graph, rng: random.Random) -> tuple[str, Plant] | None:
    """A fault for a graph made of `exact`; None where the kind that was drawn has no place in it."""
    kind = rng.choice(list(KINDS))
    fits, make = KINDS[kind]
    places = [site for site in sites(graph) if fits(graph, site)]
    if not places:
        return None
    site = rng.choice(places)
    strength, plant = make(graph, exact, site, rng)
    return f"{kind}{f', {strength}' if strength else ''}, at {site.op} {site.number}", plant


def _factor(rng: random.Random, low: float, high: float, *, either: bool = True) -> float:
    """Drawn evenly on a logarithmic scale; with `either`, as often a divisor."""
    found = round(float(low * (high / low) ** rng.random()), 3)
    return 1 / found if either and rng.random() < 0.5 else found


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _is_layer(graph: Graph, site: Site) -> bool:
    """Whether it is a layer with integers that no other node reads, so that a change of them has one place."""
    weight: Any = site.node.args[1] if site.op in LAYERS else None
    if weight is None or not is_weight(weight):
        return False
    return len(weight.users) == 1 and all(len(n.users) == 1 for n in weight.all_input_nodes)


def _is_square(graph: Graph, site: Site) -> bool:
    if not _is_layer(graph, site):
        return False
    shape = _shape(site.node.args[1])
    return shape[0] == shape[1]


def _others(graph: Graph, site: Site, place: int) -> list[Site]:
    """Calls of the same operator with an operand of the same shape there, but not the same."""
    mine = site.node.args[place] if len(site.node.args) > place else None
    if not isinstance(mine, fx.Node):
        return []
    return [
        other for other in sites(graph)
        if other.op == site.op and len(other.node.args) > place
        and isinstance(other.node.args[place], fx.Node) and other.node.args[place] is not mine
        and _shape(other.node.args[place]) == _shape(mine)
    ]  # fmt: skip


def _has_bias(graph: Graph, site: Site) -> bool:
    return site.op in LAYERS and len(site.node.args) > 2 and isinstance(site.node.args[2], fx.Node)


def _is_float(graph: Graph, site: Site) -> bool:
    """Whether a node computes floats from computed ones, and is no weight."""
    value = site.node.meta.get("val")
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() > 1
        and site.op not in ("quantize", "dequantize")
        and not is_weight(site.node)
        and any(not is_constant(graph, n) for n in site.node.all_input_nodes)
    )


def _computed_pair(graph: Graph, site: Site) -> bool:
    """Whether it has two computed inputs of one shape."""
    pair = site.node.args[:2]
    if len(pair) < 2 or not all(isinstance(n, fx.Node) and not is_constant(graph, n) for n in pair):
        return False
    return all(isinstance(n.meta.get("val"), Tensor) for n in pair) and _shape(pair[0]) == _shape(
        pair[1]
    )


def _named(plant: Plant, word: str = "") -> tuple[str, Plant]:
    return word, plant


def _times(
    make: Callable[[Site, float], Plant], low: float, high: float, *, either: bool = True
) -> Callable[..., tuple[str, Plant]]:
    def drawn(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
        factor = _factor(rng, low, high, either=either)
        return f"× {factor:.3g}", make(site, factor)

    return drawn


def _row(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
    row = rng.randrange(_shape(site.node.args[1])[0])
    factor = _factor(rng, 3, 10, either=False)

    def how(t: Tensor) -> Tensor:
        t[row] *= factor
        return t

    return f"× {factor:.3g}", weight(site.op, site.number, 1, how)


def _stale(place: int) -> Kind:
    def make(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
        other = rng.choice(_others(graph, site, place))
        return f"of {site.op} {other.number}", stale(site.op, site.number, other.number, place)

    return (
        lambda g, s: (
            (_is_layer(g, s) if place == 1 else _has_bias(g, s)) and bool(_others(g, s, place))
        ),
        make,
    )


def _other_activation(
    graph: Graph, exact: Graph, site: Site, rng: random.Random
) -> tuple[str, Plant]:
    word = rng.choice([name for name in ACTIVATIONS if name != site.op])
    return word, replaced(site.op, site.number, ACTIVATIONS[word])


def _other_axis(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
    rank = len(_shape(site.node))
    axis = rng.choice([i for i in range(rank) if i != site.node.args[1] % rank])  # type: ignore[operator]
    return f"{axis}", literal(site.op, site.number, 1, axis)


def _epsilon(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
    eps = _factor(rng, 0.02, 1, either=False)
    return f"{eps:.3g}", literal(site.op, site.number, NORMS[site.op], eps)


def _of_norm(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
    factor = _factor(rng, 1.1, 3)
    return f"× {factor:.3g}", constant(site.op, site.number, 2, times(factor))


def _shift(
    make: Callable[[Site, int], Plant], low: int, high: int
) -> Callable[..., tuple[str, Plant]]:
    def drawn(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
        by = rng.randint(low, high) * rng.choice((-1, 1))
        return f"{by:+d}", make(site, by)

    return drawn


def _dropped(graph: Graph, exact: Graph, site: Site, rng: random.Random) -> tuple[str, Plant]:
    kept = rng.randrange(2)
    return f"{kept} kept", gone(site.op, site.number, kept=kept)


def _quantize_of_one(graph: Graph, site: Site) -> bool:
    return site.op == "quantize"


KINDS: dict[str, Kind] = {
    "scale of a weight": (
        _is_layer,
        _times(lambda s, f: weight(s.op, s.number, 1, times(f)), 1.2, 5),
    ),
    "scale of one row": (_is_layer, _row),
    "zero point of a weight": (
        _is_layer,
        _shift(lambda s, by: weight(s.op, s.number, 2, shifted(by)), 3, 20),
    ),
    "weight on a grid of other steps": (
        _is_layer,
        lambda g, exact, s, rng: (lambda f: (f"× {f:.3g}", regridded(exact, s.op, s.number, f)))(
            _factor(rng, 4, 12)
        ),
    ),
    "square weight transposed": (
        _is_square,
        lambda g, e, s, r: _named(weight(s.op, s.number, 0, turned)),
    ),
    "rows of a weight off by one": (
        _is_layer,
        lambda g, e, s, r: _named(weight(s.op, s.number, 0, lambda t: t.roll(1, 0))),
    ),
    "weight of another layer": _stale(1),
    "bias of another layer": _stale(2),
    "bias dropped": (_has_bias, lambda g, e, s, r: _named(literal(s.op, s.number, 2, None))),
    "step of a grid": (_quantize_of_one, _times(lambda s, f: grid(s.number, 1, times(f)), 2, 8)),
    "zero point of a grid": (
        _quantize_of_one,
        _shift(lambda s, by: grid(s.number, 2, shifted(by)), 10, 60),
    ),
    "epsilon": (lambda g, s: s.op in NORMS, _epsilon),
    "weight of a norm": (
        lambda g, s: s.op == "layer_norm" and isinstance(s.node.args[2], fx.Node),
        _of_norm,
    ),
    "another activation": (lambda g, s: s.op in ACTIVATIONS, _other_activation),
    "summand dropped": (lambda g, s: s.op == "add" and _computed_pair(g, s), _dropped),
    "inputs swapped": (
        lambda g, s: s.op in ("sub", "div") and _computed_pair(g, s),
        lambda g, e, s, r: _named(swapped(s.op, s.number)),
    ),
    "another axis": (lambda g, s: s.op == "softmax", _other_axis),
    "scale of an attention": (
        lambda g, s: s.op == "scaled_dot_product_attention",
        _times(lambda s, f: rescaled(s.number, f), 1.5, 4),
    ),
    "truncated to integers": (
        _is_float,
        lambda g, e, s, r: _named(inserted(s.op, s.number, *TRUNCATE)),
    ),
    "negated": (
        _is_float,
        lambda g, e, s, r: _named(inserted(s.op, s.number, (aten.neg.default, ()))),
    ),
    "last axis off by one": (
        _is_float,
        lambda g, e, s, r: _named(inserted(s.op, s.number, (aten.roll.default, ([1], [-1])))),
    ),
    "slice off by one": (
        lambda g, s: s.op == "slice" and len(s.node.args) > 3 and isinstance(s.node.args[2], int),
        lambda g, e, s, r: _named(one_further(s.number)),
    ),
    "rows of a table off by one": (
        lambda g, s: (
            s.op == "embedding" and s.node.meta["val"].dtype == torch.int8 and not s.number
        ),
        lambda g, e, s, r: _named(looked_up(0, lambda t: t.roll(1, 0))),
    ),
}
