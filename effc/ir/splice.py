"""Attach a small `nn.Module` to a graph: traced, grafted, its parameters lifted.

Adapters, sparsification modules, side outputs all come in this way. What is grafted is ordinary graph: it trains
through `program.module()`, and later passes fold it or keep it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from effc.ir.edit import COPIED_META, fake_run, lift
from effc.ir.program import LIFTED, Graph, Origin
from effc.ir.trace import trace


def splice(
    graph: Graph, before: fx.Node, module: nn.Module, inputs: Sequence[fx.Node], name: str
) -> tuple[fx.Node, ...]:
    """Graft `module(*inputs)` in front of `before`; gives the nodes of its outputs.

    Parameters are lifted as `name.…` and keep `requires_grad`. The caller wires the outputs and then refreshes.
    """
    examples = [_example(node.meta["val"]) for node in inputs]
    dims = {
        word: {
            a: f"d{a}" for a, size in enumerate(node.meta["val"].shape) if not isinstance(size, int)
        }
        for word, node in zip(_input_names(len(inputs)), inputs, strict=True)
    }
    wrapped = _Positional(copy.deepcopy(module))
    small = trace(wrapped, dict(zip(dims, examples, strict=True)), dims=dims).only()
    table: dict[fx.Node, fx.Node] = {}
    user = iter(inputs)
    placeholders = small.placeholders()
    for spec in small.exported.graph_signature.input_specs:
        assert isinstance(spec.arg, TensorArgument)
        node = placeholders[spec.arg.name]
        if spec.kind in LIFTED and spec.target is not None:
            full = f"{name}.{spec.target.removeprefix('inner.')}"
            tensor = small.exported.state_dict.get(spec.target)
            if tensor is None:
                tensor = small.exported.constants[spec.target]
            table[node] = lift(graph, full, tensor, Origin(full, ("spliced",)))
            _keep_parameter(graph, table[node], spec)
        else:
            table[node] = next(user)
    for node in small.nodes:
        with graph.fx.inserting_before(before):
            table[node] = graph.fx.node_copy(node, lambda n: table[n])
        table[node].meta = {k: before.meta[k] for k in COPIED_META if k in before.meta}
        table[node].meta["val"] = fake_run(graph, table[node])
    (output,) = [n for n in small.fx.nodes if n.op == "output"]
    results: Any = output.args[0]
    return tuple(table[node] for node in results)


class _Positional(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self,
        a: Tensor | None = None,
        b: Tensor | None = None,
        c: Tensor | None = None,
        d: Tensor | None = None,
    ) -> Any:
        return self.inner(*[x for x in (a, b, c, d) if x is not None])


def _input_names(count: int) -> list[str]:
    if count > 4:
        raise ValueError(f"splice takes up to four inputs, not {count}")
    return list("abcd")[:count]


def _example(value: Tensor) -> Tensor:
    sizes = [size if isinstance(size, int) else 2 + axis for axis, size in enumerate(value.shape)]
    return torch.zeros(sizes, dtype=value.dtype)


def _keep_parameter(graph: Graph, node: fx.Node, spec: InputSpec) -> None:
    """A lifted parameter stays one, so that training finds it."""
    if spec.kind is not InputKind.PARAMETER:
        return
    for mine in graph.exported.graph_signature.input_specs:
        if isinstance(mine.arg, TensorArgument) and mine.arg.name == node.name:
            mine.kind, mine.persistent = InputKind.PARAMETER, None
