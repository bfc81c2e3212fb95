"""Gated experts as an engine likes them: fewer, wider products; and for one kind of request none at all.

    batch-rank1     A and R of all layers that read one value are one product, their gates one softmax; what is a number
                    by now (w, v, c, γ and E) goes into B and two factors
    fold-static     g is its mean over the data:  W  →  W + γ σ(100 v) B Gᵀ A

The second is exact where the gates do not move over the data: they read no token, and every request is of one cluster.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from effc.calib.collectors import Channels
from effc.calib.probe import Probe
from effc.errors import CalibrationError, PreconditionError
from effc.experts import Kind
from effc.ir.edit import drop_input, replace, tensor_of
from effc.ir.program import Graph, Program
from effc.ir.select import op_name
from effc.ir.splice import small_graph, splice
from effc.nn import rank1
from effc.passes import lora
from effc.passes.base import Pass, Stats
from effc.passes.rank1 import WORD, Place, kind_of, places, score_of, stem_of
from effc.quant.ops import DEQUANTIZE

log = logging.getLogger(__name__)

SCORE = "score"
MOVES = 1e-6
"""Gates that differ by less than this over the data do not move."""


class Batched(nn.Module):
    """What the experts of several layers change, of x [batch, …, in] that all of them read and s [batch, experts].

    `rows` are every A and then every R, `outs` the layers' B with all factors in them; `share` and `weight` [layers, 1]
    are what of a gate is the token's and the request's.
    """

    rows: Tensor
    share: Tensor
    weight: Tensor

    def __init__(self, kind: Kind, tensors: Sequence[dict[str, Tensor]]) -> None:
        super().__init__()
        self.kind, self.count = kind, len(tensors)
        rows = [t[rank1.A] for t in tensors]
        rows += [t[rank1.ROUTER] for t in tensors if rank1.ROUTER in t]
        self.inner = sum(len(t[rank1.A]) for t in tensors)
        self.register_buffer("rows", torch.cat(rows))
        factors = [_factors(kind, t) for t in tensors]
        for name, place in (("share", 1), ("weight", 2)):
            made = torch.tensor([[f[place]] for f in factors], dtype=torch.float64)
            self.register_buffer(name, made.to(self.rows.dtype))
        for place, (held, (scale, _, _)) in enumerate(zip(tensors, factors, strict=True)):
            out = held[rank1.B].double() * scale
            if kind.gates == "uniform" and kind.form == "pairs":
                out = out.sum(-1, keepdim=True)
            self.register_buffer(f"out{place}", out.to(self.rows.dtype))

    def forward(self, x: Tensor, score: Tensor | None = None) -> tuple[Tensor, ...]:
        kind, k = self.kind, self.count
        found = functional.linear(x, self.rows)
        h = found[..., : self.inner].reshape(*x.shape[:-1], k, self.inner // k)
        gate = None
        if kind.gates in ("both", "router"):
            logits = found[..., self.inner :].reshape(*x.shape[:-1], k, kind.experts)
            gate = functional.softmax(logits, -1)
        if score is not None:
            for _ in range(x.dim() - 1):
                score = score.unsqueeze(1)
            gate = score if gate is None else gate * self.share + score * self.weight
        u = self.mixed(h, gate)
        return tuple(functional.linear(u.select(-2, i), getattr(self, f"out{i}")) for i in range(k))

    def mixed(self, h: Tensor, gate: Tensor | None) -> Tensor:
        """u [batch, …, layers, m]."""
        n, m = self.kind.sizes
        if gate is None:
            return h.sum(-1, keepdim=True) if self.kind.form == "pairs" else h
        if self.kind.form == "single":
            return h * gate
        if self.kind.form == "groups":
            parts = h.reshape(*h.shape[:-1], n, m) * gate.unsqueeze(-1)
            return parts.reshape(*h.shape)
        return (h.unsqueeze(-1) * gate.reshape(*gate.shape[:-1], n, m)).sum(-2)


def _small(module: Batched, inputs: Sequence[fx.Node], traced: dict[Any, Graph]) -> Graph:
    """The graph of a module behind values of such shapes; `traced` keeps it for the next group of the form."""
    values = [node.meta["val"] for node in inputs]
    held = [(name, tuple(buffer.shape), buffer.dtype) for name, buffer in module.named_buffers()]
    key = *held, *((str(tuple(v.shape)), v.dtype) for v in values)
    if key not in traced:
        traced[key] = small_graph(module, values)
    return traced[key]


def _factors(kind: Kind, tensors: dict[str, Tensor]) -> tuple[float, float, float]:
    """What B is multiplied by, and what the token's and the request's part of a gate are; the larger of these is 1."""
    scale = kind.gain * (_sigmoid(tensors[rank1.SIZE]) if rank1.SIZE in tensors else 1.0)
    count = 1 if kind.form == "groups" else kind.experts
    omega = _sigmoid(tensors[rank1.MIX]) if rank1.MIX in tensors else 1.0
    share, weight = {
        "both": (count * omega, kind.coefficient * (1 - omega)), "router": (float(count), 0.0),
        "intuition": (0.0, kind.coefficient), "uniform": (1.0, 0.0),
    }[kind.gates]  # fmt: skip
    most = max(share, weight)
    return scale * most, share / most, weight / most


def _sigmoid(value: Tensor) -> float:
    if value.is_meta:
        return 0.5
    return float(torch.sigmoid(value.double() * rank1.SLOPE))


@dataclass(frozen=True, kw_only=True)
class BatchRank1(Pass):
    """Writes the experts of layers that read one value with one product and one softmax, and folds their numbers."""

    name = "batch-rank1"

    def requires(self, program: Program) -> None:
        for graph in program:
            if self.takes(graph.role):
                places(graph)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        kind, found = kind_of(graph), places(graph)
        score = score_of(graph, kind)
        groups: dict[Any, list[Place]] = {}
        for place in found:
            groups.setdefault(lora.read_of(place.layer), []).append(place)
        traced: dict[Any, Graph] = {}
        for value, group in groups.items():
            tensors = [{n: tensor_of(graph, t) for n, t in p.tensors.items()} for p in group]
            inputs = [value, *([] if score is None else [score])]
            module, stem = Batched(kind, tensors), f"{stem_of(graph, group[0])}.{WORD}"
            first = group[0].output
            small = _small(module, inputs, traced)
            made = splice(graph, first, module, inputs, stem, like=small, scope=group[0].layer)
            for place, change in zip(group, made, strict=True):
                place.output.update_arg(1, change)
        del graph.pending[WORD]
        stats.notes["products"] = {"layers": len(found), "are": len(groups)}
        return len(found)


@dataclass(frozen=True, kw_only=True)
class FoldStatic(Pass):
    """Folds experts into the weights with their gates held at the mean over the data, for one kind of request.

    The graph then has the operators that it had without them. How far its outputs are from those of the experts on the
    same data stands in the record, and whether the gates moved at all in the notes.
    """

    name = "fold-static"
    effect = "lossy"
    renews = True

    @property
    def measures(self) -> bool:
        return True

    def requires(self, program: Program) -> None:
        for graph in program:
            if not self.takes(graph.role):
                continue
            places(graph)
            if any(node.target is DEQUANTIZE for node in graph.nodes):
                raise PreconditionError(
                    f"{self.name}: the weights beneath the experts are integers already",
                    where=f"graph {graph.role!r}",
                    hint="put it in front of `quantize`",
                )

    def probes(self, graph: Graph) -> Iterable[Probe]:
        kind = kind_of(graph)
        score = score_of(graph, kind)
        if score is not None:
            yield Probe(key=f"{graph.role}/{SCORE}", node=score, collector=Channels())
        for place in places(graph):
            if (share := _share(place)) is not None:
                key = _key(graph, place)
                yield Probe(key=key, node=share, collector=Channels())

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        kind, found = kind_of(graph), places(graph)
        moved = 0.0
        means: dict[str, Tensor] = {}

        def mean(key: str) -> Tensor:
            nonlocal moved
            if key not in means:
                made = stats.decide(key, lambda: _measured(stats, key))
                means[key] = _known(made, kind.experts, key)
                moved = max(moved, float(made["moves"]))
            return means[key]

        changes: dict[Any, tuple[Tensor, list[fx.Node]]] = {}
        for place in found:
            tensors = {n: tensor_of(graph, t) for n, t in place.tensors.items()}
            scale, share, weight = _factors(kind, tensors)
            gate = torch.full((kind.experts,), share, dtype=torch.float64)
            if _share(place) is not None:
                gate = share * mean(_key(graph, place))
            if kind.reads:
                gate = gate * (kind.gates == "both") + weight * mean(f"{graph.role}/{SCORE}")
            a, b = tensors[rank1.A], tensors[rank1.B]
            change = rank1.update(a, b, gate, kind.form, kind.sizes, scale)
            key = (place.layer.args[1], place.tensors[rank1.A])
            changes.setdefault(key, (change, []))[1].append(place.layer)
        for place in found:
            replace(graph, place.output, place.layer)
        graph.fx.eliminate_dead_code()
        for (weight_node, _), (change, readers) in changes.items():
            held = tensor_of(graph, weight_node)
            made = (held.double() + change).to(held.dtype)
            lora.put_weight(graph, weight_node, readers, made, self.name)
        name = graph.pending.pop(WORD).get("input")
        graph.fx.eliminate_dead_code()
        if name:
            drop_input(graph, name)
        stats.notes["gates"] = {"moved by": moved, "exact": moved < MOVES}
        return len(found)


def _share(place: Place) -> fx.Node | None:
    """The softmax of a place; None where its gates have none."""
    if rank1.ROUTER not in place.tensors:
        return None
    products = [
        u for u in place.tensors[rank1.ROUTER].users if u.args[0] is lora.read_of(place.layer)
    ]
    found = [u for product in products for u in product.users if op_name(u) == "softmax"]
    return found[0]


def _key(graph: Graph, place: Place) -> str:
    return f"{graph.role}/{stem_of(graph, place)}"


def _measured(stats: Stats, key: str) -> dict[str, Any]:
    """The mean of a gate's part over the data, and how far it moves, as plain JSON."""
    seen = stats[key]
    return {"mean": seen.mean().tolist(), "moves": float(np.max(seen.high - seen.low))}


def _known(made: Any, count: int, key: str) -> Tensor:
    """Raises CalibrationError where a record is none of so many gates."""
    found: Any = made.get("mean") if isinstance(made, dict) else None
    fits = isinstance(found, list) and len(found) == count
    if not fits or not all(type(v) in (int, float) and math.isfinite(v) for v in found):
        raise CalibrationError(
            f"the recorded gates of {key!r} are not {count} numbers",
            hint="the record is of another recipe or model; compile again without it",
        )
    return torch.tensor(found, dtype=torch.float64)
