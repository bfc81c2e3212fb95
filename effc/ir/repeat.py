"""Layers of one kind traced once: a transformer of 30 equal layers has one layer to trace, and 29 to copy.

torch.export spends its time on every operator of every layer. While a module is traced here, a layer that is like one
before it, called with tensors of the same shapes, is one opaque node; afterwards the node becomes a copy of that
layer's nodes, which read its own weights. Layers are alike where they are entries of one `ModuleList` or `Sequential`,
of the same class, with equal attributes and parts, and parameters of the same names, shapes and types. Wherever that
cannot be told (a tensor, a hook or an object as an attribute) every layer is traced.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

FEWEST = 3
"""Fewer layers alike are not worth it."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)

_shapes: dict[int, list[Tensor]] = {}
"""What the calls being traced return, by number: an opaque node has shapes like the call that it repeats."""


@torch.library.custom_op("effc::layer", mutates_args=())
def _layer(tensors: list[Tensor], place: str, call: int, like: int) -> list[Tensor]:
    """Marks where a call of a layer begins (`enter`), ends (`leave`), or stands as a whole (`again`)."""
    raise NotImplementedError("it stands in a graph only while that is traced")


@_layer.register_fake
def _(tensors: list[Tensor], place: str, call: int, like: int) -> list[Tensor]:
    return [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
        for t in (_shapes[like] if place == "again" else tensors)
    ]


LAYER = torch.ops.effc.layer.default


class Unlike(Exception):
    """A call that looked like one before it does not repeat it."""


@dataclass
class Repeats:
    """The calls of one trace: `calls` names each layer, `like` the call that it repeats, itself where traced."""

    calls: list[str] = field(default_factory=list)
    like: list[int] = field(default_factory=list)
    _first: dict[Any, tuple[int, pytree.TreeSpec, list[Any]]] = field(default_factory=dict)

    @property
    def are_copied(self) -> bool:
        return any(like != call for call, like in enumerate(self.like))

    def traced(self, path: str, kind: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of the layer at `path` that is traced where it is the first call of its kind, and else one node."""

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            key = _call_key(kind, leaves, spec)
            if key is None:
                return forward(layer, *args, **kwargs)
            given = [x for x in leaves if isinstance(x, Tensor)]
            number = len(self.calls)
            self.calls.append(path)
            if key in self._first:
                like, returned, others = self._first[key]
                self.like.append(like)
                made = LAYER(given, "again", number, like)
                return _filled(made, others, returned)
            self.like.append(number)
            inner, inner_kwargs = _filled(LAYER(given, "enter", number, number), leaves, spec)
            found, returned = pytree.tree_flatten(forward(layer, *inner, **inner_kwargs))
            if not all(isinstance(x, Tensor | None) for x in found):
                raise Unlike(path)
            tensors = [x for x in found if isinstance(x, Tensor)]
            made = LAYER(tensors, "leave", number, number)
            _shapes[number] = made
            self._first[key] = number, returned, [None if x is None else ... for x in found]
            return _filled(made, found, returned)

        return call


def _filled(tensors: list[Tensor], leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """A structure whose tensors are `tensors`, in order, and everything else as in `leaves`."""
    new = iter(tensors)
    filled = [next(new) if isinstance(x, Tensor) or x is ... else x for x in leaves]
    return pytree.tree_unflatten(filled, spec)


def _call_key(kind: int, leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """What two calls must have in common; None where an argument is neither a tensor nor a plain value."""
    parts: list[Any] = [kind, str(spec)]
    for x in leaves:
        if isinstance(x, Tensor):
            sizes = tuple(str(s) for s in (*x.shape, *x.stride()))
            parts.append((sizes, x.dtype, x.device, x.requires_grad))
        elif isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool):
            return None
        elif isinstance(x, _PLAIN):
            parts.append((type(x), x))
        else:
            return None
    return tuple(parts)


@contextmanager
def marked(module: nn.Module) -> Iterator[Repeats | None]:
    """While this is open, layers that are alike are traced once; see `expand`. None where `module` has none."""
    repeats, changed = Repeats(), []
    alike = list(_alike(module))
    _shapes.clear()
    try:
        for path, layer, kind in alike:
            changed.append((layer, type(layer)))
            layer.__class__ = _patched(type(layer), repeats.traced(path, kind, type(layer).forward))
        yield repeats if changed else None
    finally:
        for layer, own in changed:
            layer.__class__ = own
        _shapes.clear()


def _patched(own: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """A class with another forward; module and name are kept, since the graph says of each node what class it is of."""
    members = {"forward": forward, "__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (own,), members)


def _alike(module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Layers that stand beside enough others of their kind, and the number of the kind; none within another."""
    kinds: dict[Any, int] = {}
    inside: set[int] = set()
    for path, part in module.named_modules():
        if id(part) in inside or not isinstance(part, nn.ModuleList | nn.Sequential):
            continue
        entries = [(name, layer, _kind(layer)) for name, layer in part.named_children()]
        numbers = Counter(kind for _, _, kind in entries if kind is not None)
        for name, layer, kind in entries:
            if kind is None or numbers[kind] < FEWEST or id(layer) in inside:
                continue
            inside.update(map(id, layer.modules()))
            yield f"{path}.{name}" if path else name, layer, kinds.setdefault(kind, len(kinds))


def _kind(layer: nn.Module) -> Any:
    """Equal for layers that compute the same but for the values of their tensors; None where that cannot be told."""
    if isinstance(layer, nn.ModuleList | nn.ModuleDict):  # never called itself
        return None
    parts: list[Any] = []
    for path, part in layer.named_modules(remove_duplicate=False):
        own = part.__dict__
        if "forward" in own or any(own[hooks] for hooks in own if hooks.endswith("hooks")):
            return None
        described = _plain(
            {k: v for k, v in own.items() if k not in _BASE and not _only_numbers(part, k)}
        )
        if described is None:
            return None
        parts.append((path, type(part), described))
    tensors = (
        *layer.named_parameters(remove_duplicate=False),
        *layer.named_buffers(remove_duplicate=False),
    )
    names = {id(t): name for name, t in reversed(tensors)}
    for name, t in tensors:
        parts.append(
            (name, names[id(t)], tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad)
        )
    return tuple(parts) if sum(1 for _ in layer.modules()) > 1 else None


_BASE = set(nn.Module().__dict__)
NUMBER = {"layer_idx", "layer_id", "layer_index", "layer_number"}
"""Attributes that number a layer, for a cache to know it by."""


def _only_numbers(part: nn.Module, name: str) -> bool:
    """Whether an attribute numbers a layer and its class reads it to update a cache at most."""
    kind: Any = type(part)
    return name in NUMBER and _is_cache_key(kind, name)


@functools.cache
def _is_cache_key(kind: Any, name: str) -> bool:
    try:
        text = inspect.getsource(kind)
    except (OSError, TypeError):
        return False
    text = re.sub(r"\.update\([^()]*\)", "", text)
    return f"self.{name}" not in re.sub(rf"self\.{name} = {name}\b", "", text)


def _plain(value: Any) -> Any:
    """A value that can be compared; None where it cannot be."""
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        value = sorted(value.items(), key=lambda item: str(item[0]))
    if isinstance(value, list | tuple):
        found = [_plain(v) for v in value]
        return None if None in found else (type(value), *found)
    if (
        callable(value)
        and not isinstance(value, nn.Module)
        and not getattr(value, "__dict__", None)
    ):
        return (
            "function",
            id(getattr(value, "__func__", value)),
            id(getattr(value, "__self__", None)),
        )
    if dataclasses.is_dataclass(value) or hasattr(value, "to_dict"):
        return "shared", id(value)
    return None


def expand(exported: ExportedProgram, repeats: Repeats) -> None:
    """Put a copy of the layer that it repeats in the place of every opaque node. Raises Unlike where that cannot be.

    Where there is one, nothing in the graph writes into tensors or holds a graph of its own.
    """
    graph = exported.graph
    marks: dict[tuple[str, int], fx.Node] = {}
    for node in graph.nodes:
        if node.target is LAYER:
            marks[node.args[1], node.args[2]] = node
    order = {node: place for place, node in enumerate(graph.nodes)}
    lifted = _Lifted(exported)
    for call, like in enumerate(repeats.like):
        if call != like:
            lifted.check(repeats.calls[like], repeats.calls[call])
    bodies: dict[int, list[fx.Node]] = {}
    for like in {like for call, like in enumerate(repeats.like) if call != like}:
        enter, leave = marks["enter", like], marks.get(("leave", like))
        if leave is None:  # nobody reads what the layer returns
            raise Unlike(repeats.calls[like])
        bodies[like] = [n for n in graph.nodes if order[enter] < order[n] < order[leave]]
        if any(free_unbacked_symbols(n.meta.get("val")) for n in bodies[like]):
            raise Unlike(repeats.calls[like])  # values decide sizes
    for (place, call), again in marks.items():
        if place == "again":
            like = repeats.like[call]
            copier = _Copier(lifted, repeats.calls[like], repeats.calls[call])
            copier.copy(marks["enter", like], bodies[like], marks["leave", like], again)
    for node in marks.values():
        if node.args[1] != "again":
            _replace(node, node.args[0])  # type: ignore[arg-type]
    _name_outputs(exported)
    exported.graph_module.recompile()
    exported.validate()


def _replace(mark: fx.Node, values: list[fx.Node]) -> None:
    """Let what reads a mark's results read `values`, and take it out."""
    for user in list(mark.users):
        user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
        mark.graph.erase_node(user)
    mark.graph.erase_node(mark)


def _name_outputs(exported: ExportedProgram) -> None:
    """Say in the signatures what the outputs are called now."""
    (output,) = [n for n in exported.graph.nodes if n.op == "output"]
    specs = exported.graph_signature.output_specs
    names = {}
    for spec, node in zip(specs, output.args[0], strict=True):
        if isinstance(spec.arg, TensorArgument):
            names[spec.arg.name] = node.name
            spec.arg = TensorArgument(node.name)
    for entry in exported.module_call_graph:
        for argument in entry.signature.outputs if entry.signature is not None else ():
            if isinstance(argument, TensorArgument):
                argument.name = names.get(argument.name, argument.name)


class _Lifted:
    """Placeholders of a program's own tensors, by name."""

    def __init__(self, exported: ExportedProgram) -> None:
        nodes = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
        self.by_name: dict[str, fx.Node] = {}
        self.name: dict[fx.Node, str] = {}
        for spec in exported.graph_signature.input_specs:
            if spec.target is not None:
                node = nodes[spec.arg.name]
                self.by_name[spec.target], self.name[node] = node, spec.target

    def check(self, old: str, new: str) -> None:
        """Raise Unlike where a tensor of one layer has no counterpart in the other."""
        for name in self.by_name:
            if name.startswith(f"{old}.") and new + name.removeprefix(old) not in self.by_name:
                raise Unlike(new)

    def moved(self, node: fx.Node, old: str, new: str) -> fx.Node:
        """The tensor of the layer `new` that is what `node` is of the layer `old`; other tensors are shared."""
        name = self.name.get(node, "")
        return self.by_name[new + name.removeprefix(old)] if name.startswith(f"{old}.") else node


class _Copier:
    """Copies the nodes of the layer `old` to the place of a call of the layer `new`."""

    def __init__(self, lifted: _Lifted, old: str, new: str) -> None:
        self._lifted, self._old, self._new = lifted, old, new
        self._made: dict[fx.Node, fx.Node] = {}

    def copy(self, enter: fx.Node, body: list[fx.Node], leave: fx.Node, again: fx.Node) -> None:
        given: Any = again.args[0]
        self._made |= {user: given[user.args[1]] for user in enter.users}
        for node in body:
            if node in self._made or _is_size(node):
                continue
            with again.graph.inserting_before(again):
                self._made[node] = again.graph.node_copy(node, self._value)
            self._made[node].meta = self._meta(node)
        ends: Any = leave.args[0]
        _replace(again, [self._value(n) for n in ends])

    def _value(self, node: fx.Node) -> fx.Node:
        if node in self._made:
            return self._made[node]
        if node.op == "placeholder":
            return self._lifted.moved(node, self._old, self._new)
        if _is_size(node):
            return node
        raise Unlike(
            self._new
        )  # a tensor from elsewhere, which another layer may take from yet elsewhere

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        meta = dict(node.meta)
        stack: Mapping[str, tuple[str, Any]] = meta.get("nn_module_stack") or {}
        meta["nn_module_stack"] = {
            key: (self._moved(path), kind) for key, (path, kind) in stack.items()
        }
        return meta

    def _moved(self, path: str) -> str:
        """A path within the old layer as one of the new."""
        inside = path == self._old or path.startswith(f"{self._old}.")
        return self._new + path.removeprefix(self._old) if inside else path


def _is_size(node: fx.Node) -> bool:
    """Whether a node is a number that only shapes decide, the same for every layer, or an assertion."""
    value = node.meta.get("val")
    return value is None or isinstance(value, int | torch.SymInt | torch.SymBool | torch.SymFloat)
