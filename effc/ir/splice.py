"""Attach a small `nn.Module` to a graph: traced, grafted, its parameters lifted.

Adapters, sparsification modules, side outputs all come in this way. What is grafted is ordinary graph: it trains
through `program.module()`, and later passes fold it or keep it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree

from effc.ir.edit import COPIED_META, fake_run, lift, tensor_name
from effc.ir.program import LIFTED, Graph, Origin
from effc.ir.trace import trace

SPLICED = "spliced"
"""What the origin of a tensor says first that came in this way."""


def splice(
    graph: Graph,
    before: fx.Node,
    module: nn.Module,
    inputs: Sequence[fx.Node],
    name: str,
    *,
    like: Graph | None = None,
    scope: fx.Node | None = None,
    shared: Mapping[str, fx.Node] | None = None,
) -> tuple[fx.Node, ...]:
    """Graft `module(*inputs)` in front of `before`; gives the nodes of its outputs.

    Parameters are lifted as `name.…` and keep `requires_grad`. The caller wires the outputs and then refreshes.
    `like` is the `small_graph` of a module that differs from this one in the values of its parameters alone, so that
    one trace serves many sites. What is grafted stands in the module of `scope`, that of `before` where None. `shared`
    are tensors that the graph has already, which stand for parameters of those names.
    """
    module = copy.deepcopy(module)
    small = small_graph(module, [node.meta["val"] for node in inputs]) if like is None else like
    state = module.state_dict(keep_vars=True)
    table: dict[fx.Node, fx.Node] = {}
    user = iter(inputs)
    placeholders = small.placeholders()
    for spec in small.exported.graph_signature.input_specs:
        assert isinstance(spec.arg, TensorArgument)
        node, word = placeholders[spec.arg.name], (spec.target or "").removeprefix("inner.")
        if spec.kind not in LIFTED or spec.target is None:
            table[node] = next(user)
        elif shared and word in shared:
            table[node] = shared[word]
        else:
            full = f"{name}.{word}"
            tensor = state[word] if word in state else small.exported.constants[spec.target]
            table[node] = lift(graph, full, tensor, Origin(full, (SPLICED,)))
            _keep_parameter(graph, table[node], spec)
    place = scope or before
    for node in small.nodes:
        with graph.fx.inserting_before(before):
            table[node] = graph.fx.node_copy(node, lambda n: table[n])
        table[node].meta = {k: place.meta[k] for k in COPIED_META if k in place.meta}
        table[node].meta["val"] = fake_run(graph, table[node])
    (output,) = [n for n in small.fx.nodes if n.op == "output"]
    results: Any = output.args[0]
    return tuple(table[node] for node in results)


def small_graph(module: nn.Module, inputs: Sequence[Tensor]) -> Graph:
    """The graph of a module that is to be spliced behind values of such shapes."""
    words = _input_names(len(inputs))
    examples = {word: _example(value) for word, value in zip(words, inputs, strict=True)}
    dims = {
        word: {a: f"d{a}" for a, size in enumerate(value.shape) if not isinstance(size, int)}
        for word, value in zip(words, inputs, strict=True)
    }
    return trace(_Positional(module), examples, dims=dims).only()


def matched(small: Graph, node: fx.Node, free: float | None = None) -> dict[str, Any] | None:
    """What stands for the inputs (`a`, `b` …) and tensors of a small graph where `node` is its one output.

    The inverse of `splice`; None where the graph at `node` is another. A literal that is `free` in the small graph may
    be any other, and is found under that word.
    """
    (output,) = [n for n in small.fx.nodes if n.op == "output"]
    words = dict(zip(small.exported.graph_signature.user_inputs, "abcd", strict=False))
    found: dict[str, Any] = {}

    def is_one(word: str, value: Any) -> bool:
        return bool(found.setdefault(word, value) == value)

    def fits(mine: Any, theirs: Any) -> bool:
        if isinstance(mine, fx.Node):
            if not isinstance(theirs, fx.Node):
                return False
            if mine.op == "placeholder":
                name = tensor_name(small, mine) or ""
                return is_one(words.get(mine.name) or name.removeprefix("inner."), theirs)
            (a, shape), (b, other) = (
                pytree.tree_flatten((n.args, n.kwargs)) for n in (mine, theirs)
            )
            return mine.target is theirs.target and shape == other and all(map(fits, a, b))
        if free is not None and mine == free and isinstance(theirs, float | int):
            return is_one("free", theirs)
        return type(mine) is type(theirs) and mine == theirs

    results: Any = output.args[0]
    return found if fits(results[0], node) else None


def is_spliced(graph: Graph, name: str) -> bool:
    """Whether a tensor came into the graph by `splice`."""
    return name in graph.origins and graph.origins[name].transforms[:1] == (SPLICED,)


def attached(graph: Graph) -> list[str]:
    """Names of the tensors that passes attached to be trained."""
    state = graph.exported.state_dict
    return [
        name
        for name in graph.tensors()
        if is_spliced(graph, name) and isinstance(state.get(name), nn.Parameter)
        and state[name].requires_grad
    ]  # fmt: skip


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
    return torch.zeros(sizes, dtype=value.dtype, device=value.device)


def _keep_parameter(graph: Graph, node: fx.Node, spec: InputSpec) -> None:
    """A lifted parameter stays one, so that training finds it."""
    if spec.kind is not InputKind.PARAMETER:
        return
    for mine in graph.exported.graph_signature.input_specs:
        if isinstance(mine.arg, TensorArgument) and mine.arg.name == node.name:
            mine.kind, mine.persistent = InputKind.PARAMETER, None
