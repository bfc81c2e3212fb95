"""The time path of a diffusion model as a table: one row for each time that its sampler asks for.

    f(t)  →  table[argmax(times = t)]

A denoiser works out from the time alone what it adds to its channels, at every step and for every row the same. A
sampler visits a known set of times, so all of that is computed once. The rows are what the model itself computes, in
float, however few bits the rest has. A time that is not among them finds the last row, which is no number, so asking
for it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effc.calib.collectors import Distinct
from effc.calib.probe import Probe
from effc.errors import PreconditionError
from effc.ir.edit import insert, is_constant, lift, redirect, tensor_of
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import op_name
from effc.passes.base import Pass, Stats

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class TimestepTable(Pass):
    """Computes what depends on the time alone once, for every time of the sampler, and looks it up by the time.

    The times are those that calibration shows (trajectories with all of their steps), or those of `at`. An engine gives
    no numbers for a time that is not among them. `input` is the time's name.
    """

    name = "timestep-table"

    at: tuple[float, ...] = ()
    input: str = "timestep"

    @property
    def measures(self) -> bool:
        return not self.at

    def requires(self, program: Program) -> None:
        for graph in program:
            if not self.takes(graph.role):
                continue
            if self.input not in graph.inputs:
                if not self.graphs:
                    continue  # a text encoder, a decoder
                raise PreconditionError(
                    f"timestep-table: graph {graph.role!r} has no input {self.input!r}",
                    hint=f"input: one of {', '.join(graph.inputs)}",
                )
            if self._time(graph).meta["val"].dim() != 1:
                raise PreconditionError(
                    f"timestep-table: {self.input!r} of graph {graph.role!r} is not one number, or one for each row",
                    hint="let the module take it as [1] or [batch]",
                )

    def probes(self, graph: Graph) -> Iterable[Probe]:
        if self.input in graph.inputs and not self.at:
            yield Probe(key=_key(graph), node=self._time(graph), collector=Distinct())

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        if self.input not in graph.inputs:
            return 0
        time = self._time(graph)
        path = _path(graph, time)
        ends = _ends(graph, time, path)
        if not ends:
            return 0
        times = stats.decide(
            _key(graph), lambda: sorted(set(self.at)) or stats[_key(graph)].values()
        )
        given = torch.tensor(times, dtype=torch.float64).to(time.meta["val"].dtype)
        rows = _computed(graph, time, path, ends, given)
        index = row_of(graph, time, given, ends[0])
        batch = _batch(graph, time)
        for number, end in enumerate(ends):
            # an origin of its own, as it is no tensor of the source any more
            origin = Origin(f"{self.input}:{number}", ("timestep-table",))
            table = lift(graph, f"{self.input}_table_{number}", rows[end], origin)
            found = insert(graph, end, aten.index_select.default, (table, 0, index))
            if _is_wide(end) and batch is not None and not _is_wide(found):
                shape = [batch(end), *rows[end].shape[1:]]
                found = insert(graph, end, aten.expand.default, (found, shape))
            redirect(graph, end, found, [user for user in end.users if user is not found])
        return len(ends)

    def _time(self, graph: Graph) -> fx.Node:
        return graph.input_nodes()[self.input]


def _key(graph: Graph) -> str:
    return f"{graph.role}/times"


def _is_wide(node: fx.Node) -> bool:
    """Whether its first size is free."""
    shape = node.meta["val"].shape
    return bool(shape) and not isinstance(shape[0], int)


@dataclass(frozen=True)
class _Path:
    """What hangs on the time: nodes of its `own` with a row for each, and all that is computed for them."""

    own: set[fx.Node]
    needed: list[fx.Node]


FILLED = ("ones", "zeros", "full")
"""Operators that give as many equal rows as they are told."""


def _path(graph: Graph, time: fx.Node) -> _Path:
    """Nodes that hang on the time, on tensors of the model and on how many rows there are, and on nothing else."""
    own, fixed, sizes = {time}, set[fx.Node](), set[fx.Node]()
    first = time.meta["val"].shape[0]
    for node in graph.nodes:
        inputs, value = node.all_input_nodes, node.meta.get("val")
        if op_name(node).startswith("sym_size"):
            sizes.add(node)
        if not isinstance(value, Tensor) or not _is_pure(node):
            continue
        is_filled = op_name(node) in FILLED and all(n in sizes for n in inputs)
        if is_filled or all(n in fixed or is_constant(graph, n) for n in inputs):
            fixed.add(node)
        elif all(n in own or n in fixed or n in sizes or is_constant(graph, n) for n in inputs):
            has_rows = bool(value.dim()) and (value.shape[0] == first or _is_wide(node))
            if has_rows and any(n in own for n in inputs):
                own.add(node)
    return _Path(own, [n for n in graph.nodes if (n in own or n in fixed) and n is not time])


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    is_drawn = torch.Tag.nondeterministic_seeded in target.tags
    return not is_drawn and not target._schema.is_mutable


def _ends(graph: Graph, time: fx.Node, path: _Path) -> list[fx.Node]:
    """Where the time path meets the rest, in order."""
    own = path.own
    return [
        node
        for node in graph.nodes
        if node in own and node is not time and any(user not in own for user in node.users)
    ]


def _computed(
    graph: Graph, time: fx.Node, path: _Path, ends: list[fx.Node], times: Tensor
) -> dict[fx.Node, Tensor]:
    """Rows [times + 1, …] of every end, as the graph itself computes them for one row; the last is no number."""
    found: dict[fx.Node, list[Tensor]] = {end: [] for end in ends}
    for value in times:
        known: dict[fx.Node, Any] = {time: value[None]}

        def of(node: fx.Node, known: dict[fx.Node, Any] = known) -> Any:
            if node not in known:
                is_size = op_name(node).startswith("sym_size")
                known[node] = 1 if is_size else tensor_of(graph, node)
            return known[node]

        with torch.no_grad():
            for node in path.needed:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), of)
                assert callable(node.target)
                known[node] = node.target(*args, **kwargs)
        for end, rows in found.items():
            rows.append(known[end].clone())
    return {
        end: torch.cat([*rows, torch.full_like(rows[0], torch.nan)]) for end, rows in found.items()
    }


def row_of(graph: Graph, time: fx.Node, times: Tensor, before: fx.Node) -> fx.Node:
    """The row of every time [n]: the first that is equal, else the last."""

    def put(target: Callable[..., Any], *args: Any) -> fx.Node:
        return insert(graph, before, target, args)

    known = torch.cat([times, times[:1]])
    last = torch.zeros(len(known), dtype=torch.bool)
    last[-1] = True
    origin = Origin("times", ("timestep-table",))
    equal = put(
        aten.eq.Tensor, put(aten.view.default, time, [-1, 1]), lift(graph, "times", known, origin)
    )
    found = put(aten.logical_or.default, equal, lift(graph, "times_end", last, origin))
    return put(aten.argmax.default, put(aten.to.dtype, found, torch.int32), 1)


def _batch(graph: Graph, time: fx.Node) -> Callable[[fx.Node], fx.Node] | None:
    """What gives the number of rows in front of a node, as the first size of an input that has one."""
    wide = [n for n in graph.input_nodes().values() if n is not time and _is_wide(n)]
    if not wide:
        return None
    return lambda before: insert(graph, before, aten.sym_size.int, (wide[0], 0))
