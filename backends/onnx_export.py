"""From ATen to ONNX with torch's translations, without tracing the graph again.

`torch.onnx.export` runs a graph through its tracer twice before it translates it, to decompose operators and to
promote types, which takes longer than all the rest. A graph that was exported once seldom needs it: the few operators
that are no computation are settled in place, and a graph goes through torch's own passes only where an operator that is
left has no translation, or only one that torch never uses, or mixes types.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset21
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental import _config

from effc import quiet as loggers
from effc.backends.onnx_simplify import simplify
from effc.ir.edit import sizes_of
from effc.quant.ops import DEQUANTIZE, QUANTIZE
from effc.quant.scheme import FP8_MAX

op: Any = opset21
aten: Any = torch.ops.aten


def _quantize(
    x: Any, scale: Any, zero_point: Any, low: int, high: int, axis: int, group: int
) -> Any:
    if len(scale.shape) > 1 and not group:
        codes = op.Round(op.Div(x, scale))
        bounds = [op.Constant(value_float=float(v)) for v in (low, high)]
        return op.Cast(op.Clip(codes, *bounds), to=int(ir.DataType.INT8))
    codes = op.QuantizeLinear(x, scale, zero_point, axis=axis)
    if (low, high) in ((0, 255), (-128, 127), (-FP8_MAX, FP8_MAX)):
        return codes
    kind = ir.DataType.UINT8 if low >= 0 else ir.DataType.INT8
    bounds = [op.Cast(op.Constant(value_int=v), to=int(kind)) for v in (low, high)]
    return op.Clip(codes, *bounds)


def _dequantize(q: Any, scale: Any, zero_point: Any, axis: int, group: int) -> Any:
    if not group and len(scale.shape) > 1:
        return op.Mul(op.Cast(q, to=int(ir.DataType.FLOAT)), scale)
    if group:
        zeros = [zero_point] if len(zero_point.shape) else []
        return op.DequantizeLinear(q, scale, *zeros, axis=len(q.shape) - 1, block_size=group)
    if q.dtype == ir.DataType.INT32:
        return op.DequantizeLinear(q, scale, axis=axis)
    return op.DequantizeLinear(q, scale, zero_point, axis=axis)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _grouped_mm(
    x: Any, weight: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Rows in order of their groups, x [rows, in], times the matrix of each, [groups, in, out]; `offs` are ends."""
    if offs is None or bias is not None or len(x.shape) != 2 or len(weight.shape) != 3:
        raise NotImplementedError("only rows in groups, times one matrix for each, without a bias")
    first, ends = op.Constant(value_ints=[0]), op.Cast(offs, to=int(ir.DataType.INT64))
    parts, start = [], first
    for group in range(weight.shape[0]):
        place = op.Constant(value_ints=[group])
        end = op.Gather(ends, place, axis=0)
        matrix = op.Gather(weight, op.Constant(value_int=group), axis=0)
        parts.append(op.MatMul(op.Slice(x, start, end, first), matrix))
        start = end
    return op.Concat(*parts, axis=0)


def _reshape(x: Any, shape: Sequence[int]) -> Any:
    return op.Reshape(x, op.Constant(value_ints=shape))


def _expand(x: Any, shape: Sequence[int]) -> Any:
    return op.Expand(x, op.Constant(value_ints=shape))


def _cut(x: Any, axis: int, start: int, end: int, step: int) -> Any:
    bounds = [op.Constant(value_ints=[v]) for v in (start, end, axis, step)]
    return op.Slice(x, *bounds)


def _select(x: Any, dim: int, places: Any) -> Any:
    return op.Gather(x, places, axis=dim)


def cut(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """A slice whose bounds are numbers."""
    found: Tensor = aten.slice(x, axis, start, end, step)
    return found


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    """A reshape in ONNX's words: 0 is the size that stood there, −1 what is left."""
    return x.reshape([x.shape[place] if size == 0 else size for place, size in enumerate(shape)])


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    """An expansion in ONNX's words: 1 is the size that stood there."""
    return x.expand(torch.broadcast_shapes(x.shape, shape))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    cut: _cut,
    reshape: _reshape,
    expand: _expand,
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    aten.linear.default: _linear,
    aten.index_select.default: _select,
    aten._grouped_mm.default: _grouped_mm,
}

SAME: dict[Any, Any] = {
    aten.__and__: aten.bitwise_and,
    aten.__or__: aten.bitwise_or,
    aten.__xor__: aten.bitwise_xor,
}
"""Operators that are another one by another name; the overloads have the same names too."""

FOREIGN = {"transformers::grouped_mm_fallback": _grouped_mm}
"""Translations of operators of libraries, which are there once those were imported."""

ALIASING = {aten.reshape, aten.flatten}
"""Of the operators that torch decomposes because they may be a view, those whose own translation is right too."""


@functools.cache
def registry(opset: int, *, ours: bool) -> Any:
    """torch's translations for an opset, with `TRANSLATIONS` on top where they are ours to choose.

    `torch.onnx.export` reads a thousand of them from source at every call, which takes longer than a small model.
    """
    from torch.onnx._internal.exporter import _registration

    with quiet():
        registry = _registration.ONNXRegistry.from_torchlib(opset)
        for target, translation in TRANSLATIONS.items() if ours else ():
            registry.register_op(target, translation)
        (view,) = (t for t in registry.get_decomps(aten.view.default) if not t.is_complex)
        registry.register_op(aten.reshape.default, view.onnx_function)  # which keeps sizes of 0
    return registry


def settle(graph: fx.Graph) -> None:
    """Take out what computes nothing, and call operators by their usual names.

    Where a copy in order is taken out, a view behind it may find its values in no order: it becomes a reshape.
    """
    was_contiguous = False
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or packet is None:
            continue
        if packet in SAME:
            node.target = getattr(SAME[packet], node.target._overloadname)
        elif packet is aten.to and _dtype(node) != _dtype(node.args[0]):
            node.target, node.kwargs = aten._to_copy.default, {"dtype": _dtype(node)}
            node.args = node.args[:1]
        elif packet in (aten.to, aten.contiguous) or (packet is aten.dropout and not node.args[2]):
            was_contiguous |= packet is aten.contiguous
            _pass_by(node)
        elif node.target is aten.view.default and was_contiguous:
            node.target = aten.reshape.default
        elif node.target is aten.index.Tensor and (chosen := _chosen(node)) is not None:
            node.target, node.args = aten.index_select.default, (node.args[0], *chosen)
        elif node.target is aten.unflatten.int:
            node.target, node.args = aten.reshape.default, (node.args[0], _unflattened(node))
        elif node.meta.get("val") is None and not node.users:  # an assertion
            graph.erase_node(node)


def _chosen(node: fx.Node) -> tuple[int, fx.Node] | None:
    """The dimension that an indexing chooses along, and the places; None where it does more than that."""
    places: Any = node.args[1]
    given = [(dim, place) for dim, place in enumerate(places) if place is not None]
    if len(given) != 1:
        return None
    ((dim, place),) = given
    value = place.meta["val"]
    is_list = value.dim() == 1 and value.dtype in (torch.int64, torch.int32)
    return (dim, place) if is_list else None


def _unflattened(node: fx.Node) -> list[Any]:
    """The whole shape that a dimension in parts gives, sizes that are no numbers as nodes in front."""
    given: Any = node.args
    source, dim, parts = given
    shape = source.meta["val"].shape
    with node.graph.inserting_before(node):
        sizes: list[Any] = [
            size if isinstance(size, int) else _size(node.graph, source, place)
            for place, size in enumerate(shape)
        ]
    sizes[dim : dim + 1 if dim != -1 else None] = parts
    return sizes


def _size(graph: fx.Graph, source: fx.Node, dim: int) -> fx.Node:
    made = graph.call_function(aten.sym_size.int, (source, dim))
    made.meta["val"] = source.meta["val"].shape[dim]
    return made


def _pass_by(node: fx.Node) -> None:
    """Let the readers of a node read what it reads."""
    source: Any = node.args[0]
    if any(user.op == "output" for user in node.users):  # its name stands in the signature
        node.target, node.args, node.kwargs = aten.clone.default, (source,), {}
        return
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def untranslated(nodes: Iterable[fx.Node], known: Any) -> list[fx.Node]:
    """Nodes that compute something and have no translation."""
    return [
        n
        for n in nodes
        if isinstance(n.target, torch._ops.OpOverload)
        and n.meta.get("val") is not None  # an assertion computes nothing
        and not known.is_registered(n.target)
    ]


def decomposed(exported: ExportedProgram, known: Any) -> ExportedProgram:
    """A program of our own, settled; decomposed by torch where an operator has no translation but its parts may."""
    settle(exported.graph)
    _know_foreign(exported.graph.nodes, known)
    strange = untranslated(exported.graph.nodes, known)
    if any(map(_has_parts, strange)) or any(map(_may_be_view, exported.graph.nodes)):
        from torch.onnx._internal.exporter import _fx_passes

        with quiet(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            exported = _fx_passes.decompose_with_registry(exported, known)
        settle(exported.graph)
    return exported


def _know_foreign(nodes: Iterable[fx.Node], known: Any) -> None:
    for node in nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name in FOREIGN and not known.is_registered(node.target):
            known.register_op(node.target, FOREIGN[schema.name])


def _has_parts(node: fx.Node) -> bool:
    return node.target in torch._decomp.decomposition_table or _is_composite(node.target)


def _is_composite(target: Any) -> bool:
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(target.has_kernel_for_dispatch_key(composite))


def _may_be_view(node: fx.Node) -> bool:
    """Whether torch decomposes an operator although it has a translation, which then nobody ever used."""
    from torch._export.utils import _check_valid_to_preserve

    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.overloadpacket in ALIASING:
        return False
    return _is_composite(target) and not _check_valid_to_preserve(target)


def prepared(exported: ExportedProgram, opset: int, *, ours: bool = True) -> ExportedProgram:
    """A program of our own as it is translated: every value of it is in the file, under the node's name."""
    from torch.onnx._internal.fx import passes

    exported = decomposed(exported, registry(opset, ours=ours))
    if any(map(_mixes_types, exported.graph.nodes)):
        # attention that is run once more may lay its output out in another way
        for node in exported.graph.nodes:
            node.target = aten.reshape.default if node.target is aten.view.default else node.target
        with quiet(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            passes.InsertTypePromotion(exported.graph_module).run()
    if ours:
        for node in exported.graph.nodes:
            _say_in_numbers(node)
        exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported


def _say_in_numbers(node: fx.Node) -> None:
    """Give a shape or a slice as numbers where that can be: sizes taken from tensors are a dozen nodes to be folded."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in (aten.view, aten.reshape, aten.expand, aten.slice):
        return
    source: Any = node.args[0]
    if source.meta["val"].is_complex() or node.target is aten.view.dtype:
        return
    if packet is aten.slice:
        given: list[Any] = [*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :]]
        axis, start, end, step = given
        bounds = [axis, start or 0, sys.maxsize if end is None else end, step]
        if all(isinstance(b, int) for b in bounds) and not node.kwargs:
            node.target, node.args = cut, (source, *bounds)
        return
    old, new = (sizes_of(n.meta["val"].shape) for n in (source, node))
    if packet is aten.expand:
        target, shape = expand, _expanded(old, new)
    else:
        target, shape = reshape, _reshaped(old, new)
    if shape is not None:
        node.target, node.args, node.kwargs = target, (source, shape), {}


def _reshaped(old: Sequence[Any], new: Sequence[Any]) -> list[int] | None:
    """A shape for ONNX's Reshape; None where more than one size has neither a number nor a place."""
    shape = [
        size if isinstance(size, int) else 0 if place < len(old) and old[place] == size else -1
        for place, size in enumerate(new)
    ]
    return None if shape.count(-1) > 1 or (0 in new) else shape


def _expanded(old: Sequence[Any], new: Sequence[Any]) -> list[int] | None:
    """A shape for ONNX's Expand; None where a size that is new has no number."""
    padded = [1] * (len(new) - len(old)) + list(old)
    shape = [1 if a == b else b for a, b in zip(padded, new, strict=True)]
    return shape if all(isinstance(size, int) for size in shape) else None


@functools.cache
def _promotions() -> Any:
    from torch.onnx._internal.fx.passes import type_promotion

    return type_promotion.TypePromotionTable()


def _mixes_types(node: fx.Node) -> bool:
    """Whether torch promotes an argument of a node before it computes, which ONNX does not."""
    packet = getattr(node.target, "overloadpacket", None)
    rule = _promotions().get_rule(packet) if packet is not None else None
    if rule is None:
        return False
    places = getattr(rule, "promote_args_positions", (0,))  # a reduction has no others
    words = getattr(rule, "promote_kwargs_names", ())
    given = [node.args[i] for i in places if i < len(node.args)]
    given += [node.kwargs[word] for word in words if word in node.kwargs]
    kinds = {_dtype(a) for x in given for a in (x if isinstance(x, list | tuple) else [x])} - {None}
    out = node.meta["val"]
    if isinstance(out, Tensor) and out.dtype is not torch.bool:
        kinds.add(out.dtype)
    return len(kinds) > 1


def _dtype(argument: Any) -> torch.dtype | None:
    """Type of a tensor or number; None for what is neither."""
    from torch.onnx._internal.fx.type_utils import from_scalar_type_to_torch_dtype

    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    return (
        value.dtype if isinstance(value, Tensor) else from_scalar_type_to_torch_dtype(type(value))
    )


def translated(exported: ExportedProgram, opset: int, *, ours: bool) -> ir.Model:
    """A program of our own as an ONNX model whose constants are folded and whose nodes are all of use."""
    from torch.onnx._internal import _lazy_import
    from torch.onnx._internal.exporter import _core

    known = registry(opset, ours=ours)
    with quiet():
        program = prepared(exported, opset, ours=ours)
        made = _core._exported_program_to_onnx_program(program, registry=known)
        apis: Any = _lazy_import.onnxscript_apis  # type: ignore[attr-defined]
        model: ir.Model = apis.convert_version(made.model, opset)
        simplify(model, exported.state_dict)
    return model


LOUD = ("torch.onnx", "onnxscript", "onnx_ir", "torch.fx", "torch.export")


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxscript log, warn and print."""
    with loggers.quiet(*LOUD, level=logging.ERROR), redirect_stdout(StringIO()):
        yield
