"""The only code that touches graph signatures: lift, rebind, insert, replace, drop, refresh.

Graphs are edited in place; tensors never are. `rebind` puts a new tensor under an old name, so a clone made
before it still sees the old one. Everything that changes a tensor says what it did, and the origin map keeps it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import rebind_unbacked
from torch.utils import _pytree as pytree

from effc.ir.program import LIFTED, Graph, Origin

COPIED_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn")


def tensor_name(graph: Graph, node: object) -> str | None:
    """The name of the lifted tensor that `node` stands for, or None where it is computed or an input."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    for spec in graph.exported.graph_signature.input_specs:
        if isinstance(spec.arg, TensorArgument) and spec.arg.name == node.name:
            return spec.target if spec.kind in LIFTED else None
    return None


def is_constant(graph: Graph, node: object) -> bool:
    return tensor_name(graph, node) is not None


def tensor_of(graph: Graph, node: fx.Node) -> Tensor:
    """The tensor behind a lifted placeholder. Raises ValueError for any other node."""
    name = tensor_name(graph, node)
    if name is None:
        raise ValueError(f"{node} is not a constant")
    return graph.tensors()[name]


def fake_mode(graph: Graph) -> FakeTensorMode:
    for node in graph.fx.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            assert isinstance(mode, FakeTensorMode)
            return mode
    return FakeTensorMode()


def lift(graph: Graph, name: str, tensor: Tensor, origin: Origin) -> fx.Node:
    """Add a constant under a new `name`; a name already taken by another tensor gets a number behind it."""
    tensor = _as_shape(graph, tensor)
    state, signature = graph.exported.state_dict, graph.exported.graph_signature
    taken = {s.target for s in signature.input_specs} | set(state) | set(graph.exported.constants)
    unique, count = name, 1
    while unique in taken:
        unique, count = f"{name}_{count}", count + 1
    users = [n for n in graph.fx.nodes if n.op == "placeholder"]
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    place = sum(spec.kind in kinds for spec in signature.input_specs)
    before = users[place] if place < len(users) else next(iter(graph.nodes))
    with graph.fx.inserting_before(before):
        node = graph.fx.placeholder("b_" + re.sub(r"\W", "_", unique))
    node.meta["val"] = fake_mode(graph).from_tensor(tensor, static_shapes=True)
    argument = TensorArgument(node.name)
    signature.input_specs.insert(
        place, InputSpec(InputKind.BUFFER, argument, unique, persistent=True)
    )
    state[unique] = tensor
    graph.origins[unique] = origin
    return node


def rebind(graph: Graph, name: str, tensor: Tensor, transform: str) -> None:
    """Put `tensor` under the name of an existing constant; `transform` says what was done to get it."""
    exported, tensor = graph.exported, _as_shape(graph, tensor)
    for spec in exported.graph_signature.input_specs:
        if spec.target != name:
            continue
        home: dict[str, Any] = (
            exported.state_dict if name in exported.state_dict else exported.constants
        )
        if isinstance(home[name], torch.nn.Parameter) and tensor.is_floating_point():
            tensor = torch.nn.Parameter(tensor.detach(), requires_grad=home[name].requires_grad)
        home[name] = tensor
        assert isinstance(spec.arg, TensorArgument)
        node = graph.placeholders()[spec.arg.name]
        node.meta["val"] = fake_mode(graph).from_tensor(tensor, static_shapes=True)
        old = graph.origins.get(name, Origin(name))
        graph.origins[name] = Origin(old.source, (*old.transforms, transform))
        return
    raise KeyError(f"{graph.role} has no tensor {name!r}")


def _as_shape(graph: Graph, tensor: Tensor) -> Tensor:
    """The tensor; in a graph of shapes alone its shape."""
    first = next(iter(graph.exported.state_dict.values()), None)
    if first is None or not first.is_meta or tensor.is_meta:
        return tensor
    made = tensor.detach().to("meta")
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made


def insert(
    graph: Graph,
    before: fx.Node,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """A new call in front of `before`, in the same module scope, its shape already known."""
    with graph.fx.inserting_before(before):
        node = graph.fx.call_function(target, tuple(args), kwargs or {})
    node.meta = {key: before.meta[key] for key in COPIED_META if key in before.meta}
    node.meta["val"] = fake_run(graph, node)
    return node


def fake_run(graph: Graph, node: fx.Node) -> Any:
    """What a call gives for the shapes of what it reads."""

    def value(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument.op == "get_attr":  # the graph of a branch
            return operator.attrgetter(str(argument.target))(graph.exported.graph_module)
        return argument.meta["val"]

    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value)
    assert callable(node.target)
    mode = fake_mode(graph)
    with mode, enable_python_dispatcher(), _no_new_guards(mode), torch.no_grad():
        return node.target(*args, **kwargs)


def insert_after(
    graph: Graph, after: fx.Node, target: Callable[..., Any], args: Sequence[Any]
) -> fx.Node:
    """A new call behind `after`, in the module scope of `after`."""
    node = insert(graph, after.next, target, args)
    node.meta.update({key: after.meta[key] for key in COPIED_META if key in after.meta})
    return node


def replace(graph: Graph, old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old` read `new`, outputs included, and take `old` out."""
    redirect(graph, old, new, [user for user in old.users if user is not new])
    graph.fx.erase_node(old)


def redirect(graph: Graph, old: fx.Node, new: fx.Node, users: Sequence[fx.Node]) -> None:
    """Let those `users` of `old` read `new`, outputs included."""
    for user in users:
        user.replace_input_with(old, new)
    if not any(user.op == "output" for user in users):
        return
    for spec in graph.exported.graph_signature.output_specs:
        if isinstance(spec.arg, TensorArgument) and spec.arg.name == old.name:
            spec.arg = TensorArgument(new.name)


def add_input(graph: Graph, name: str, like: fx.Node, example: Tensor) -> fx.Node:
    """A new input behind the others, with the rows of the input `like` and the other sizes of an `example`.

    Raises KeyError where the graph has an input of that name.
    """
    if name in graph.inputs:
        raise KeyError(f"{graph.role} has an input {name!r} already")
    exported = graph.exported
    last = [n for n in graph.fx.nodes if n.op == "placeholder"][-1]
    with graph.fx.inserting_after(last):
        node = graph.fx.placeholder(name)
    node.meta["val"] = example
    match_rows(graph, node, like)
    argument = TensorArgument(node.name)
    exported.graph_signature.input_specs.append(InputSpec(InputKind.USER_INPUT, argument, None))
    graph.inputs = (*graph.inputs, name)
    entry = exported.module_call_graph[0]
    assert entry.signature is not None
    entry.signature.inputs = [*entry.signature.inputs, argument]
    args, kwargs = exported.example_inputs or ((), {})
    if entry.signature.forward_arg_names is not None:
        entry.signature.forward_arg_names = [*entry.signature.forward_arg_names, node.name]
    given = (args, {**kwargs, node.name: example})
    entry.signature.in_spec = pytree.tree_structure(given)
    exported.example_inputs = given
    return node


def drop_input(graph: Graph, name: str) -> None:
    """Take out an input that nothing reads, as `add_input` puts one in."""
    exported, node = graph.exported, graph.input_nodes()[name]
    graph.fx.erase_node(node)
    specs = exported.graph_signature.input_specs
    specs[:] = [s for s in specs if getattr(s.arg, "name", "") != node.name]
    graph.inputs = tuple(word for word in graph.inputs if word != name)
    entry = exported.module_call_graph[0]
    assert entry.signature is not None
    entry.signature.inputs = [a for a in entry.signature.inputs if a.name != node.name]
    args, kwargs = exported.example_inputs or ((), {})
    if entry.signature.forward_arg_names is not None:
        words = entry.signature.forward_arg_names
        entry.signature.forward_arg_names = [word for word in words if word != node.name]
    given = (args, {word: value for word, value in kwargs.items() if word != node.name})
    entry.signature.in_spec = pytree.tree_structure(given)
    exported.example_inputs = given


def match_rows(graph: Graph, node: fx.Node, like: fx.Node) -> None:
    """Let an input that nothing reads yet have as many rows as another."""
    value = node.meta["val"]
    with fake_mode(graph):
        other = like.meta["val"]
        shape = (other.shape[0], *value.shape[1:])
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device=other.device)


def retype(graph: Graph, name: str, dtype: torch.dtype) -> fx.Node:
    """Let an input take values of another type. Raises KeyError where there is none of that name."""
    if name not in graph.inputs:
        raise KeyError(f"{graph.role} has no input {name!r}")
    node = graph.input_nodes()[name]
    with fake_mode(graph):
        node.meta["val"] = torch.empty_like(node.meta["val"], dtype=dtype)
    return node


def give(graph: Graph, name: str, node: fx.Node) -> None:
    """Let the output of that name be the value of another node."""
    place = graph.outputs.index(name)
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    values = output.args[0]
    assert isinstance(values, tuple | list)
    output.args = ((*values[:place], node, *values[place + 1 :]),)
    graph.exported.graph_signature.output_specs[place].arg = TensorArgument(node.name)


def add_output(graph: Graph, name: str, node: fx.Node) -> None:
    """A new last output of that name. Raises KeyError where there is one already."""
    if name in graph.outputs:
        raise KeyError(f"{graph.role} has an output {name!r} already")
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    values = output.args[0]
    assert isinstance(values, tuple | list)
    output.args = ((*values, node),)
    argument = TensorArgument(node.name)
    specs = graph.exported.graph_signature.output_specs
    specs.append(OutputSpec(OutputKind.USER_OUTPUT, argument, None))
    graph.outputs = (*graph.outputs, name)
    _forget_call_tree(graph)


def keep_outputs(graph: Graph, names: Sequence[str]) -> None:
    """Drop all outputs but `names`, and with them what only they needed."""
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    kept = [i for i, name in enumerate(graph.outputs) if name in names]
    values = output.args[0]
    assert isinstance(values, tuple | list)
    output.args = (tuple(values[i] for i in kept),)
    signature = graph.exported.graph_signature
    signature.output_specs[:] = [signature.output_specs[i] for i in kept]
    graph.outputs = tuple(graph.outputs[i] for i in kept)
    _forget_call_tree(graph)
    refresh(graph)


def _forget_call_tree(graph: Graph) -> None:
    """Make the recorded return value of the whole module a plain tuple of the outputs."""
    entry = graph.exported.module_call_graph[0]
    assert entry.signature is not None
    specs: list[OutputSpec] = graph.exported.graph_signature.output_specs
    entry.signature.outputs = [spec.arg for spec in specs]
    entry.signature.out_spec = pytree.tree_structure(tuple(range(len(specs))))


def refresh(graph: Graph) -> None:
    """Make the graph honest after an edit: dead code out, unused tensors out, shapes anew, all validated.

    Shapes are worked out where a call, or the shape of something that it reads, is not what it was; the rest stands.
    """
    graph.fx.eliminate_dead_code()
    _drop_unused(graph)
    mode = fake_mode(graph)
    shapes = _Shapes()
    found: dict[Any, Any] = {}  # equal calls give equal shapes, and layers repeat
    for node in graph.fx.nodes:
        if node.op != "call_function" or _is_known(node):
            continue
        call = shapes.of_call(node)
        if call not in found or "unbacked_bindings" in node.meta:
            found[call] = _shaped(graph, node)
            if mode.shape_env is not None:
                rebind_unbacked(mode.shape_env, node, found[call])
        old = node.meta.get("val")
        node.meta["val"] = old if shapes.of(old) == shapes.of(found[call]) else found[call]
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            _loosen(node)
        know(node)
    graph.fx.lint()
    graph.exported.graph_module.recompile()
    graph.exported.validate()


def _shaped(graph: Graph, node: fx.Node) -> Any:
    """The shape of a call; a view of values that now lie in another order becomes a reshape, which copies them."""
    try:
        return fake_run(graph, node)
    except (RuntimeError, ValueError):
        if node.target is not torch.ops.aten.view.default:
            raise
    node.target = torch.ops.aten.reshape.default
    return fake_run(graph, node)


def _loosen(attention: fx.Node) -> None:
    """Let views of attention that is called anew copy where they must: it may lay its output out in another way."""
    aten = torch.ops.aten
    for user in attention.users:
        if user.target is aten.view.default:
            user.target = aten.reshape.default
        elif user.target in (aten.transpose.int, aten.permute.default):
            _loosen(user)


_KNOWN = "effc_known"
_LITERALS = {bool, int, float, str}


def know(node: fx.Node) -> None:
    """Remember that the shape of a node is right for the call that it is now."""
    node.meta[_KNOWN] = _call(node)


def _is_known(node: fx.Node) -> bool:
    old, new = node.meta.get(_KNOWN), _call(node)
    return (
        old is not None
        and "val" in node.meta
        and len(old) == len(new)
        and all(
            a is b or (type(a) is type(b) and type(a) in _LITERALS and a == b)
            for a, b in zip(old, new, strict=True)
        )
    )


def _call(node: fx.Node) -> list[Any]:
    """What decides the shape of a node: its operator, the shapes that it reads, its literals and their places."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    read = [x.meta.get("val") if isinstance(x, fx.Node) else x for x in leaves]
    return [node.target, str(spec), *read]


class _Shapes:
    """Shapes, strides and types of the tensors in values, to be compared; those of one value are found once."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any) -> Any:
        if id(value) not in self._seen:
            self._seen[id(value)] = value, self._found(value)
        return self._seen[id(value)][1]

    def of_call(self, node: fx.Node) -> Any:
        if any(x.op == "get_attr" for x in node.all_input_nodes):  # the graph of a branch
            return node
        target, spec, *read = _call(node)
        return target, spec, *map(self.of, read)

    def _found(self, value: Any) -> Any:
        leaves, spec = pytree.tree_flatten(value)
        return str(spec), *(
            (sizes_of(x.shape), sizes_of(x.stride()), x.dtype, x.device)
            if isinstance(x, Tensor)
            else (type(x), str(x))
            for x in leaves
        )


def sizes_of(sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes to compare: numbers, and an expression of symbols for every one that is free."""
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes)


def _no_new_guards(mode: FakeTensorMode) -> AbstractContextManager[None]:
    """Shapes are worked out again, never decided again: a guard met here would fix a free dimension for good."""
    return mode.shape_env.suppress_guards() if mode.shape_env is not None else nullcontext()


def _drop_unused(graph: Graph) -> None:
    exported = graph.exported
    signature = exported.graph_signature
    placeholders = graph.placeholders()
    kept: list[InputSpec] = []
    for spec in signature.input_specs:
        assert isinstance(spec.arg, TensorArgument) or spec.kind not in LIFTED
        node = placeholders.get(getattr(spec.arg, "name", ""))
        if spec.kind in LIFTED and node is not None and not node.users:
            graph.fx.erase_node(node)
            continue
        kept.append(spec)
    signature.input_specs[:] = kept
    used = {spec.target for spec in kept if spec.target is not None}
    for home in (exported.state_dict, exported.constants):
        for name in [key for key in home if key not in used]:
            del home[name]
    for name in [key for key in graph.origins if key not in used]:
        del graph.origins[name]
