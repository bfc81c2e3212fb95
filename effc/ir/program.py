"""What is compiled: exported graphs by role, and where every tensor in them came from.

The graphs are torch's own `ExportedProgram`s with un-decomposed ATen in them. A `Graph` adds to one the names that
the outside world uses: inputs, outputs, free dimensions, and the origin of each tensor.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph as FxGraph
from torch.fx import Node

LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


@dataclass(frozen=True)
class Origin:
    """The name a tensor had in the source model, and what was done to it since, oldest first."""

    source: str
    transforms: tuple[str, ...] = ()


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common: where its values lie, their shape and their strides."""
    storage = tensor.untyped_storage()
    where = storage.data_ptr() or storage._cdata  # tensors of shapes alone lie nowhere
    return where, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


@dataclass
class Graph:
    """One exported graph under its role. Edit it through `effc.ir.edit` alone."""

    role: str
    exported: ExportedProgram
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: dict[str, str] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    """Inputs and outputs that are codes of numbers, with the name of the tensor that is the size of a code."""
    pending: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What passes put in to be taken out again, by word: what those behind them must know, as plain JSON."""

    @property
    def fx(self) -> FxGraph:
        graph: FxGraph = self.exported.graph
        return graph

    @property
    def nodes(self) -> Iterator[Node]:
        """Call nodes in order of execution; safe against edits made while walking."""
        return iter([n for n in self.fx.nodes if n.op == "call_function"])

    @property
    def is_of_shapes(self) -> bool:
        """Whether the tensors are shapes alone, on torch's device `meta`: such a graph cannot run."""
        return any(tensor.is_meta for tensor in self.exported.state_dict.values())

    def placeholders(self) -> dict[str, Node]:
        return {n.name: n for n in self.fx.nodes if n.op == "placeholder"}

    def input_nodes(self) -> dict[str, Node]:
        """The placeholder of every input by its name, in their order."""
        known, users = self.placeholders(), self.exported.graph_signature.user_inputs
        return {name: known[str(user)] for name, user in zip(self.inputs, users, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """Every lifted tensor by its name. Aliases of one tensor are one object."""
        found: dict[str, Tensor] = {}
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind in LIFTED and spec.target is not None:
                found[spec.target] = self._tensor(spec.target)
        return found

    def _tensor(self, name: str) -> Tensor:
        state = self.exported.state_dict
        value = state[name] if name in state else self.exported.constants[name]
        assert isinstance(value, Tensor)
        return value.detach()

    def arguments(
        self, feeds: Mapping[str, Tensor], instead: Mapping[str, Tensor] | None = None
    ) -> list[Any]:
        """All inputs of the lifted graph, tensors first, then `feeds` in the order of `inputs`.

        Tensors that stand in `instead` go before the graph's own of that name.
        """
        instead = instead or {}
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise KeyError(f"{self.role} needs the inputs {', '.join(missing)}")
        user = iter(self.inputs)
        values: list[Any] = []
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind in LIFTED and spec.target is not None:
                own = instead.get(spec.target)
                values.append(self._tensor(spec.target) if own is None else own)
            else:
                name = next(user)
                values.append(self.coded(name, feeds[name]))
        return values

    def coded(self, name: str, value: Tensor) -> Tensor:
        """An input as the graph takes it: numbers for one that takes codes rounded to them, all else as it is."""
        if name not in self.codes or not value.is_floating_point():
            return value
        scale = self._tensor(self.codes[name])
        return torch.clamp(torch.round(value / scale), -128, 127).to(torch.int8)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph in eager torch. Raises KeyError where an input is missing."""
        with torch.no_grad():
            values = self.exported.graph_module(*self.arguments(feeds))
        return dict(zip(self.outputs, values, strict=True))

    def largest(self, word: str) -> int | None:
        """The largest size that the free dimension `word` may have, as export found it; None where it found none."""
        tops = [
            int(bounds.upper)
            for symbol, bounds in self.exported.range_constraints.items()
            if self.dims.get(str(symbol)) == word and str(bounds.upper).isdecimal()
        ]
        return min(tops, default=None)

    def weight_bytes(self) -> int:
        """Bytes of all lifted tensors, each storage counted once."""
        seen = {id(t): t for t in self._unique()}
        return sum(t.numel() * t.element_size() for t in seen.values())

    def _unique(self) -> list[Tensor]:
        return list({place_of(t)[:-1]: t for t in self.tensors().values()}.values())

    def clone(self) -> Graph:
        """A graph of its own over the same tensors: the copy costs no weight memory."""
        old = self.exported
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch copies its own deprecated types
            calls = copy.deepcopy(old.module_call_graph)
        graph = copy.deepcopy(old.graph)
        for mine, theirs in zip(graph.nodes, old.graph.nodes, strict=True):
            if mine.name != theirs.name:
                mine.name = theirs.name  # fx renames nodes that shadow builtins, such as `input`
        exported = ExportedProgram(
            root=old.graph_module,
            graph=graph,
            graph_signature=copy.deepcopy(old.graph_signature),
            state_dict=dict(old.state_dict),
            range_constraints=copy.copy(old.range_constraints),
            module_call_graph=calls,
            example_inputs=old.example_inputs,
            constants=dict(old.constants),
            verifiers=old.verifiers,
        )
        return Graph(
            self.role, exported, self.inputs, self.outputs, dict(self.dims), dict(self.origins),
            dict(self.codes), dict(self.pending),
        )  # fmt: skip


@dataclass
class Program:
    """A system of graphs, one per role; most have one, called `main`."""

    graphs: dict[str, Graph]

    def __getitem__(self, role: str) -> Graph:
        return self.graphs[role]

    def __iter__(self) -> Iterator[Graph]:
        return iter(self.graphs.values())

    def clone(self) -> Program:
        return Program({role: graph.clone() for role, graph in self.graphs.items()})

    def only(self) -> Graph:
        """The single graph of a program that has one."""
        (graph,) = self.graphs.values()
        return graph

    def run(
        self, feeds: Mapping[str, Tensor] | None = None, *, role: str | None = None, **named: Tensor
    ) -> dict[str, Tensor]:
        """Run one graph in eager torch: `program.run(input_ids=…, attention_mask=…)`."""
        graph = self.graphs[role] if role is not None else self.only()
        return graph.run({**(feeds or {}), **named})

    def module(self, role: str | None = None) -> torch.nn.Module:
        """One graph as an `nn.Module`, for training in the graph."""
        graph = self.graphs[role] if role is not None else self.only()
        return graph.exported.module()

    def weight_bytes(self) -> int:
        return sum(graph.weight_bytes() for graph in self)
