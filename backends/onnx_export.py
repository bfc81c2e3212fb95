"""From ATen to ONNX with torch's translations, one node at a time, in time linear in the number of nodes.

`torch.onnx.export` runs a graph through its tracer twice more before it translates it, to decompose operators and to
promote types, and afterwards tries every rewrite rule on every node. That takes ten times as long as the translation.
A graph that was exported once needs little of it: the few operators that are no computation are settled in place,
and only what then has no translation, or mixes types, is left to torch's own passes.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset21
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental import _config

from effc.quant.ops import DEQUANTIZE, QUANTIZE

op: Any = opset21
aten: Any = torch.ops.aten


def _quantize(
    x: Any, scale: Any, zero_point: Any, low: int, high: int, axis: int, group: int
) -> Any:
    codes = op.QuantizeLinear(x, scale, zero_point, axis=axis)
    if (low, high) in ((0, 255), (-128, 127)):
        return codes
    kind = ir.DataType.UINT8 if low >= 0 else ir.DataType.INT8
    bounds = [op.Cast(op.Constant(value_int=v), to=int(kind)) for v in (low, high)]
    return op.Clip(codes, *bounds)


def _dequantize(q: Any, scale: Any, zero_point: Any, axis: int, group: int) -> Any:
    if group:
        return op.DequantizeLinear(q, scale, zero_point, axis=1, block_size=group)
    if q.dtype == ir.DataType.INT32:
        return op.DequantizeLinear(q, scale, axis=axis)
    return op.DequantizeLinear(q, scale, zero_point, axis=axis)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    aten.linear.default: _linear,
}

SAME = {
    aten.__and__: aten.bitwise_and,
    aten.__or__: aten.bitwise_or,
    aten.__xor__: aten.bitwise_xor,
}
"""Operators that are another one by another name; the overloads have the same names too."""


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
    return registry


def settle(graph: fx.Graph) -> None:
    """Take out assertions and conversions that convert nothing, and call operators by their usual names."""
    for node in list(graph.nodes):
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or packet is None:
            continue
        if packet in SAME:
            node.target = getattr(SAME[packet], node.target._overloadname)
        elif packet is aten.to:
            _settle_conversion(node)
        elif packet._qualified_op_name.startswith("aten::_assert") and not node.users:
            graph.erase_node(node)


def _settle_conversion(node: fx.Node) -> None:
    source: Any = node.args[0]
    dtype = node.meta["val"].dtype
    if dtype != source.meta["val"].dtype:
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
    elif any(user.op == "output" for user in node.users):  # whose name stands in the signature
        node.target, node.args, node.kwargs = aten.clone.default, (source,), {}
    else:
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
    if any(map(_has_parts, untranslated(exported.graph.nodes, known))):
        from torch.onnx._internal.exporter import _fx_passes

        with quiet(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            exported = _fx_passes.decompose_with_registry(exported, known)
        settle(exported.graph)
    return exported


def _has_parts(node: fx.Node) -> bool:
    target: Any = node.target
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return target in torch._decomp.decomposition_table or target.has_kernel_for_dispatch_key(
        composite
    )


def prepared(exported: ExportedProgram, opset: int, *, ours: bool = True) -> ExportedProgram:
    """A program of our own as it is translated: every value of it is in the file, under the node's name."""
    from torch.onnx._internal.fx import passes

    exported = decomposed(exported, registry(opset, ours=ours))
    if any(map(_mixes_types, exported.graph.nodes)):
        with quiet(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            passes.InsertTypePromotion(exported.graph_module).run()
    exported.graph_module.recompile()
    return exported


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


_SCALARS = {int: torch.int64, float: torch.float32, torch.SymInt: torch.int64}


def _dtype(argument: Any) -> torch.dtype | None:
    value = argument.meta.get("val") if isinstance(argument, fx.Node) else argument
    return value.dtype if isinstance(value, Tensor) else _SCALARS.get(type(value))


def translated(exported: ExportedProgram, opset: int, *, ours: bool) -> ir.Model:
    """A program of our own as an ONNX model whose constants are folded and whose nodes are all of use."""
    from torch.onnx._internal.exporter import _core

    known = registry(opset, ours=ours)
    with quiet():
        program = prepared(exported, opset, ours=ours)
        model: ir.Model = _core._exported_program_to_onnx_program(program, registry=known).model
        from onnxscript._framework_apis.torch_2_8 import convert_version

        model = convert_version(model, opset)
        _simplify(model)
    return model


def _simplify(model: ir.Model) -> None:
    """What onnxscript's optimiser does, but for one rule that takes most of its time and never fires here."""
    from onnxscript.optimizer import _constant_folding

    common.InlinePass()(model)
    for _ in range(2):
        _constant_folding.FoldConstantsPass(
            shape_inference=True,
            input_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
            should_fold=lambda node: None,
        )(model)
        changed = _rules()(model).modified
        common.RemoveUnusedNodesPass()(model)
        if not changed:
            break
    for tidy in (
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)


@functools.cache
def _rules() -> Any:
    from onnxscript import rewriter

    return rewriter.RewritePass(
        [r for r in rewriter._DEFAULT_REWRITE_RULES if r.name != "SlicesSplit"]
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxscript log, warn and print."""
    loggers = ["torch.onnx", "onnxscript", "onnx_ir", "torch.fx", "torch.export"]
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
