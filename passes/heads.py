"""Outputs that served training alone, taken off a graph with all that only they needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from effc.errors import PreconditionError
from effc.ir.edit import keep_outputs
from effc.ir.program import Graph, Program
from effc.passes.base import Pass, Stats


@dataclass(frozen=True, kw_only=True)
class DropHead(Pass):
    """Removes `outputs`, and the nodes and tensors that nothing else is made of; the other outputs stay as they are.

    What an output shares with another one stays. The inputs do too: a port is what callers know.
    """

    name = "drop-head"

    outputs: tuple[str, ...] = ()

    def requires(self, program: Program) -> None:
        if not self.outputs:
            raise PreconditionError("drop-head: no output is named", hint="outputs: [speaker]")
        for graph in program:
            if not self.takes(graph.role):
                continue
            if strange := sorted(set(self.outputs) - set(graph.outputs)):
                raise PreconditionError(
                    f"drop-head: graph {graph.role!r} has no output {strange[0]!r}",
                    hint=f"outputs: {', '.join(graph.outputs)}",
                )
            if set(graph.outputs) <= set(self.outputs):
                raise PreconditionError(
                    f"drop-head: no output of graph {graph.role!r} would be left",
                    hint=f"keep one of {', '.join(graph.outputs)}",
                )

    def gives(self, outputs: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in outputs if name not in self.outputs)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        keep_outputs(graph, self.gives(graph.outputs))
        return len(self.outputs)
