"""What a model computes of small tables of its own, once and for all: a grid of patches, the lengths of sequences.

torch.export knows the values of a tensor of one number at most, and then cannot tell sizes that hang on a table which
stands in the model's code. While `numbers` is open it knows those of small tensors, and `folded` puts what was computed
of them into the graph, where nobody who runs the graph again has to know them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses import fake_tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch

SMALL = 4096
"""Values of a tensor that is known."""


@contextmanager
def numbers() -> Iterator[None]:
    """While this is open, sizes may hang on small tensors of numbers that stand in a model's code."""
    parts: tuple[Any, ...] = (fake_tensor, proxy_tensor)
    limits = [part.CONSTANT_NUMEL_LIMIT for part in parts]
    for part in parts:
        part.CONSTANT_NUMEL_LIMIT = SMALL
    try:
        yield
    finally:
        for part, limit in zip(parts, limits, strict=True):
            part.CONSTANT_NUMEL_LIMIT = limit


class Tables(TorchFunctionMode):
    """While this is open, what is made of numbers alone (`arange(4)`) stands in the graph as its numbers."""

    _MAKERS: ClassVar = {torch.arange, torch.zeros, torch.ones, torch.full}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if func not in self._MAKERS or any(isinstance(x, Tensor | torch.SymInt) for x in leaves):
            return func(*args, **kwargs)
        with no_dispatch():
            made = func(*args, **kwargs)
        if made.is_floating_point() or made.numel() > SMALL:
            return func(*args, **kwargs)
        return torch.tensor(made.tolist(), dtype=made.dtype)


def folded(exported: ExportedProgram) -> ExportedProgram:
    """The program with what hangs on its own numbers as constants, where sizes hang on them; else as it is."""
    values = _values(exported)
    if not any(map(_decides_sizes, values)):
        return exported
    graph = exported.graph
    for node, value in values.items():
        readers = [user for user in node.users if user not in values]
        if node.op == "placeholder" or not readers or isinstance(value, list | tuple):
            continue
        if not isinstance(value, Tensor):
            node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in values)
        else:
            constant = _constant(exported, f"known_{node.name}", value, node.meta["val"])
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and (node in values or _asserts(node)):
            graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def _values(exported: ExportedProgram) -> dict[fx.Node, Any]:
    """Nodes that hang on whole numbers of the model alone, with their values."""
    constants = {
        s.arg.name: exported.constants[s.target]
        for s in exported.graph_signature.input_specs
        if s.kind is InputKind.CONSTANT_TENSOR and s.target in exported.constants
    }
    found: dict[fx.Node, Any] = {}
    for node in exported.graph.nodes:
        value = constants.get(node.name) if node.op == "placeholder" else None
        if isinstance(value, Tensor) and value.numel() <= SMALL and not value.is_floating_point():
            found[node] = value
        elif _is_computed(node) and all(source in found for source in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if not isinstance(value, Tensor) or value.numel() <= SMALL:
                found[node] = value
    return found


def _is_computed(node: fx.Node) -> bool:
    """Whether a call gives the same for the same, and writes nothing."""
    if node.op != "call_function" or node.meta.get("val") is None:
        return False
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return bool(node.all_input_nodes) and getattr(target, "__module__", "") == "_operator"
    if target is torch.ops.aten.detach_.default:  # of a table that was just made
        return True
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def _decides_sizes(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if getattr(node.target, "overloadpacket", None) is torch.ops.aten.repeat_interleave:
        return True  # which has no tag
    return torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags


def _asserts(node: fx.Node) -> bool:
    return node.meta.get("val") is None and not node.all_input_nodes


def _constant(exported: ExportedProgram, name: str, value: Tensor, shape: Any) -> fx.Node:
    """A new constant of the program, in front of what the user gives."""
    specs = exported.graph_signature.input_specs
    place = next((i for i, s in enumerate(specs) if s.kind is InputKind.USER_INPUT), len(specs))
    given = [n for n in exported.graph.nodes if n.op == "placeholder"]
    before = given[place] if place < len(given) else next(iter(exported.graph.nodes))
    with exported.graph.inserting_before(before):
        node: fx.Node = exported.graph.placeholder(f"c_{name}")
    node.meta["val"] = shape
    argument = TensorArgument(node.name)
    specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, argument, name))
    exported.constants[name] = value
    return node
