"""Constants folded, dead nodes out: onnxscript's optimiser without the rule that takes most of its time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from torch import Tensor

LEFT_OUT = {"SlicesSplit"}
"""Two slices as one Split: it visits all readers of all slices, and the runtimes gain nothing."""
SMALL = 1024
"""Elements that a constant may have to be one with those that are equal."""


def simplify(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """The passes of `onnxscript.optimizer.optimize_ir` and the fusions behind it, in place.

    `weights` are the tensors that the model is saved with, by the names of initialisers.
    """
    from onnxscript.optimizer import _constant_folding
    from onnxscript.rewriter import onnx_fusions

    common.InlinePass()(model)
    steps = (
        _constant_folding.FoldConstantsPass(
            shape_inference=True,
            input_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=_constant_folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
            should_fold=lambda node: None,
        ),
        _rules(),
        common.RemoveUnusedNodesPass(),
    )
    for _ in range(2):
        if True not in [step(model).modified for step in steps]:
            break
    for tidy in (
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
    ):
        tidy(model)
    _merge(model, weights)
    common.CommonSubexpressionEliminationPass()(model)
    common.OutputFixPass()(model)
    common.NameFixPass()(model)
    onnx_fusions.fuse(model)
    common.CommonSubexpressionEliminationPass()(
        model
    )  # a rotation has a sine and a cosine of its own


def _merge(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Constants that are equal become one, and weights only where they are one tensor of the model.

    Else the graph would hang on values: biases are all 0 before the first step of a training, and differ behind it.
    Scalars are scales that a calibration chose, and integers zero points: one of each lets equal nodes be one too.
    """
    graph = model.graph
    alone: dict[tuple[Any, ...], ir.Value] = {}
    for name, tensor in weights.items():
        value = graph.initializers.get(name)
        if value is None or not tensor.is_floating_point() or not tensor.dim():
            continue
        if tensor.numel() > SMALL or value.is_graph_output():
            continue
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        one = alone.setdefault(place, value)
        if one is not value:
            value.replace_all_uses_with(one)
        del graph.initializers[name]
    common.DeduplicateInitializersPass(size_limit=SMALL)(model)
    for value in alone.values():
        graph.register_initializer(value)


@functools.cache
def _rules() -> Any:
    from onnxscript import rewriter

    chosen = (rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name not in LEFT_OUT)
    rules: Any = [_Rule(rule) for rule in chosen]
    return rewriter.RewritePass(rules)


class _Rule:
    """A rule that is tried only on nodes of the operator that its pattern ends with: most fit one node of a hundred."""

    def __init__(self, rule: Any) -> None:
        pattern = rule._target_pattern
        found = pattern.output_node.op_identifier() if pattern.has_single_output_node else None
        self._rule, self._last = rule, found and found[1]

    def try_rewrite(self, model: ir.Model, graph: Any, node: ir.Node, **options: Any) -> Any:
        if self._last not in (None, node.op_type):
            return None
        return self._rule.try_rewrite(model, graph, node, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)
