"""Folds hybrid sparsification modules into the layers in front of them, and removes the width that their mask drops.

    W' = (diag(s) D W)[S, :]       b' = (diag(s) D b)[S]       E' = (E Dᵀ diag(s))[:, S]

Computed in float64, S the channels that stay. An adapter that is still beside a writer, W x + B A x, is part of what it
writes: B becomes (diag(s) D B)[S, :]. What reads the stream loses the same columns, A and a router among it, and norms
get the gain and the epsilon of the shorter mean (`passes/prune_dims.py`). What is left has the operators of the graph
as it was before `insert-hsm`, with smaller constants: no mask, no gather, no small products.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, fx

from effc.errors import PostconditionError, PreconditionError
from effc.ir.axes import Stop, of
from effc.ir.edit import is_constant, refresh, replace, tensor_name, tensor_of
from effc.ir.program import Graph, Program
from effc.ir.select import op_name
from effc.ir.splice import attached, is_spliced, matched, small_graph
from effc.nn.hsm import WORD, Hybrid, Mode, matrix
from effc.passes.base import Pass, Stats
from effc.passes.coupling import Coupling, coupled_dims
from effc.passes.coupling_reading import Call
from effc.passes.hsm import inserted
from effc.passes.layernorm import put
from effc.passes.prune_dims import remove
from effc.passes.writers import Stream, sources, stream_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Module:
    """One module in the graph: what it reads and gives, and where its tensors are, None where it is the mask alone."""

    value: fx.Node
    out: fx.Node
    name: str | None


@dataclass(frozen=True, kw_only=True)
class FoldHsm(Pass):
    """Folds hybrid sparsification modules with a hard mask into the layers in front of them, and removes width."""

    name = "fold-hsm"
    chain = "hsm"
    renews = True
    shrinks = True

    def requires(self, program: Program) -> None:
        for graph in program:
            if not self.takes(graph.role):
                continue
            if not inserted(graph, self.name).get("is_hard"):
                raise PreconditionError(
                    f"{self.name}: the mask is soft yet, and no channel is exactly 0",
                    where=f"graph {graph.role!r}",
                    hint="put harden-hsm in front",
                )
            for _ in _plan(graph):
                pass

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        tensors = graph.tensors()
        keep = tensors[f"{WORD}.keep"] > 0
        if graph.is_of_shapes:  # some stay
            keep = torch.arange(len(keep)) < graph.pending[WORD]["kept"]
        found = list(_plan(graph))
        before = graph.weight_bytes() - sum(
            t.numel() * t.element_size() for n, t in tensors.items() if n.startswith(f"{WORD}.")
        )
        for module, made in found:
            if module.name is not None:
                _fold(graph, made, _matrix(tensors, module.name, keep))
        for module, _ in found:
            replace(graph, module.out, module.value)
        refresh(graph)
        if grown := graph.weight_bytes() - before:
            stats.notes["untied"] = {"bytes": grown}
            log.info("tables that others read too are two tensors now: %.1f MB more", grown / 1e6)
        coupling = coupled_dims(graph)
        unit = of(coupling.reading.of(found[0][0].value)[-1])
        if unit.stop is not None:
            raise PreconditionError(
                f"{self.name}: the width cannot be removed: {unit.stop}",
                hint=unit.stop.hint or "a pass behind insert-hsm made something else of the stream",
            )
        remove(coupling, {unit: np.asarray(keep)})
        del graph.pending[WORD]
        return len(found)

    def ensures(self, program: Program) -> None:
        for graph in program:
            left = [name for name in graph.tensors() if name.startswith(f"{WORD}.")]
            if self.takes(graph.role) and (left or WORD in graph.pending):
                raise PostconditionError(
                    f"{self.name} left {', '.join(left)} in the graph",
                    hint="something else reads them; leave out the passes behind insert-hsm one by one",
                )


def _plan(graph: Graph) -> Iterator[tuple[Module, list[tuple[fx.Node, int, list[fx.Node]]]]]:
    """Modules, and the tensors that take each up: with their dimension of the width, and who reads them.

    Raises PreconditionError where what writes the stream is no layer with a constant weight.
    """
    coupling = coupled_dims(graph)
    stream: Stream | None = None
    for module in _modules(graph):
        unit = of(coupling.reading.of(module.value)[-1])
        if stream is None or stream.unit is not unit:
            stream = stream_of(coupling, unit)
        made = sources(stream, module.value)
        if isinstance(made, Stop):
            others = any(not name.startswith(f"{WORD}.") for name in attached(graph))
            raise _refusal(str(made), MERGE if others else LINEAR)
        parts = [part for node in made for part in _parts(coupling, stream, node, module)]
        yield module, parts


def _parts(
    coupling: Coupling, stream: Stream, node: fx.Node, module: Module
) -> Iterator[tuple[fx.Node, int, list[fx.Node]]]:
    graph, reading = coupling.graph, coupling.reading

    def dim(tensor: fx.Node) -> int:
        return next(d for d, axis in enumerate(reading.of(tensor)) if of(axis) is stream.unit)

    if node in stream.writes:
        weight, bias = stream.writes[node].weight, Call(node)["bias"]
        name = reading.names[node]
        if not is_constant(graph, weight):
            raise _refusal(
                f"the weight of {name} is computed", "put merge-lora in front, and quantize behind"
            )
        yield weight, dim(weight), [node]
        if isinstance(bias, fx.Node):
            yield bias, dim(bias), [node]
        return
    if not is_constant(graph, node):
        raise _refusal(f"the constant {node.name} is computed", "put fold-constants in front")
    inside = {module.value}
    todo = [module.value]
    while todo:
        for operand in todo.pop().all_input_nodes:
            if operand in stream.given and operand not in inside and stream.has(operand):
                inside.add(operand)
                todo += [] if operand in stream.writes else [operand]
    readers = [user for user in node.users if user in inside or user is module.out]
    yield node, dim(node), readers


MERGE = "put merge-lora in front"
LINEAR = "what stands between insert-hsm and fold-hsm must leave the stream linear in its layers"


def _refusal(why: str, hint: str = LINEAR) -> PreconditionError:
    return PreconditionError(f"fold-hsm: a module cannot be folded: {why}", hint=hint)


def _modules(graph: Graph) -> Iterator[Module]:
    """The modules of a graph whose mask is hard."""
    (keep,) = [n for n in graph.placeholders().values() if tensor_name(graph, n) == f"{WORD}.keep"]
    for node in graph.nodes:
        hits = (matched(small, node) for small in _smalls() if op_name(node) in ("addcmul", "mul"))
        hit = next((h for h in hits if h is not None and h["b"] is keep), None)
        if hit is None or is_spliced(graph, tensor_name(graph, hit["a"]) or ""):
            continue  # no module, or the scale of one
        down = tensor_name(graph, hit.get("down"))
        yield Module(value=hit["a"], out=node, name=down and down.removesuffix(".down"))


@cache
def _smalls() -> tuple[Graph, ...]:
    """The graphs of all forms of a module, which nobody edits."""
    value, gate = torch.zeros(2, 4), torch.zeros(4)
    forms: list[tuple[int, Mode, bool]] = [
        (2, "effc", True), (2, "paper", True), (2, "effc", False), (0, "effc", False),
    ]  # fmt: skip
    return tuple(
        small_graph(Hybrid(4, rank, mode=mode, identity=identity), [value, gate])
        for rank, mode, identity in forms
    )


def _matrix(tensors: dict[str, Tensor], name: str, keep: Tensor) -> Tensor:
    """What a module multiplies by, with the rows of channels that go at 0."""
    down, up, values, scale = (
        tensors.get(f"{name}.{part}") for part in ("down", "up", "values", "scale")
    )
    if any(part is not None and part.is_meta for part in (down, up, values, scale)):
        return torch.empty(len(keep), len(keep), dtype=torch.float64, device="meta")
    return matrix(down, up, values, scale, width=len(keep)) * keep[:, None]


def _fold(graph: Graph, parts: list[tuple[fx.Node, int, list[fx.Node]]], by: Tensor) -> None:
    for constant, dim, readers in parts:
        tensor = tensor_of(graph, constant)
        exact = torch.tensordot(tensor.to(torch.float64), by, dims=([dim], [1])).movedim(-1, dim)
        put(graph, constant, readers, exact.to(tensor.dtype).contiguous(), "hsm")
