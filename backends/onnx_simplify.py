"""Constants folded, dead nodes out: onnxscript's optimiser without the rule that takes most of its time."""

from __future__ import annotations

import functools
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

LEFT_OUT = {"SlicesSplit"}
"""Two slices as one Split: it visits all readers of all slices, and the runtimes gain nothing."""


def simplify(model: ir.Model) -> None:
    """The passes of `onnxscript.optimizer.optimize_ir` and the fusions behind it, in place."""
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
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)
    onnx_fusions.fuse(model)
    common.CommonSubexpressionEliminationPass()(
        model
    )  # a rotation has a sine and a cosine of its own


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
