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


@functools.cache
def _rules() -> Any:
    from onnxscript import rewriter

    return rewriter.RewritePass(
        [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name not in LEFT_OUT]
    )
