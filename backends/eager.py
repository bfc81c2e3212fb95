"""Torch itself as an engine: the reference that every other engine is compared with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from effc.backends.base import Array, BackendBase, EngineBase, Lowered, Port, Unsupported
from effc.errors import VerifyError
from effc.ir.program import Graph
from effc.ir.show import shape_words
from effc.ir.trace import evaluating, output_names
from effc.progress import Step, silent


def numpy_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ports(graph: Graph) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """The inputs and outputs of a graph, free dimensions by name."""
    users = list(graph.input_nodes().values())
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    sides = []
    for names, nodes in ((graph.inputs, users), (graph.outputs, output.args[0])):
        sides.append(
            tuple(
                Port(
                    name=name,
                    dtype=numpy_dtype(node.meta["val"].dtype),
                    shape=tuple(_size(w) for w in shape_words(graph, node.meta["val"].shape)),
                    grid=_grid(graph, name),
                )
                for name, node in zip(names, nodes, strict=True)
            )
        )
    return sides[0], sides[1]


def ports_beside(
    graph: Graph, beside: Sequence[Port] | None
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """`ports`, of the outputs only what an engine `beside` the graph has too. Raises VerifyError where that is none."""
    inputs, outputs = ports(graph)
    if beside is None:
        return inputs, outputs
    names = {port.name for port in beside}
    outputs = tuple(port for port in outputs if port.name in names)
    if not outputs:
        raise VerifyError(
            f"the engine has no output {graph.outputs[0]!r}",
            hint="it was made from another model",
        )
    return inputs, outputs


def described(
    graph: Graph, target: str, directory: Path, files: tuple[str, ...], opset: int, **more: Any
) -> Lowered:
    """Files of a graph as they are `Lowered` for a target, with its own inputs and outputs."""
    inputs, outputs = ports(graph)
    return Lowered(
        role=graph.role, target=target, directory=directory, files=files, opset=opset,
        inputs=inputs, outputs=outputs, **more,
    )  # fmt: skip


def _grid(graph: Graph, name: str) -> str:
    if name not in graph.codes:
        return ""
    scale = graph.tensors()[graph.codes[name]]
    return hashlib.sha256(scale.contiguous().numpy().tobytes()).hexdigest()


def _size(word: str) -> int | str:
    return int(word) if word.isdigit() else word


class GraphEngine(EngineBase):
    """A graph, run node by node."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.inputs, self.outputs = ports(graph)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {
            p.name: torch.from_numpy(np.ascontiguousarray(feeds[p.name])) for p in self.inputs
        }
        return {name: value.numpy() for name, value in self.graph.run(tensors).items()}


class ModuleEngine(EngineBase):
    """The user's own module in evaluation mode: what they run today.

    Its outputs are those of the graph, and of these only what an engine `beside` it has. Raises VerifyError where the
    engine has none of them.
    """

    def __init__(
        self, module: nn.Module, graph: Graph, beside: Sequence[Port] | None = None
    ) -> None:
        self.module, self._mode = module, ExitStack()
        self.inputs, self.outputs = ports_beside(graph, beside)
        self._mode.enter_context(evaluating(module))

    def close(self) -> None:
        self._mode.close()

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {
            p.name: torch.from_numpy(np.ascontiguousarray(feeds[p.name])) for p in self.inputs
        }
        with torch.no_grad():
            result = self.module(**tensors)
        leaves, spec = pytree.tree_flatten(result)
        found = dict(zip(output_names(spec), leaves, strict=True))
        return {p.name: found[p.name].numpy() for p in self.outputs}


class Eager(BackendBase):
    """Runs the rewritten graph in torch, for looking at a pass without any engine."""

    name: ClassVar[str] = "eager"

    def supports(self, graph: Graph) -> list[Unsupported]:
        return []

    def lower(self, graph: Graph, directory: Path, step: Step = silent) -> Lowered:
        return described(graph, self.name, directory, (), 0, options={"graph": graph})

    def open(self, lowered: Lowered, *, threads: int | None = None) -> GraphEngine:
        if threads is not None:
            torch.set_num_threads(threads)
        return GraphEngine(lowered.options["graph"])
