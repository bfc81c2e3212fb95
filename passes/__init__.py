"""Rewrites of a program, by the word that a recipe uses."""

from typing import TypeVar

from effc.errors import RecipeError
from effc.table import Table

PASSES = Table(
    "pass",
    {
        "attach-lora": "effc.passes.lora:AttachLora",
        "attach-rank1": "effc.passes.rank1:AttachRank1",
        "awq": "effc.passes.awq:Awq",
        "batch-rank1": "effc.passes.rank1_fold:BatchRank1",
        "drop-head": "effc.passes.heads:DropHead",
        "drop-noops": "effc.passes.cleanup:DropNoops",
        "simplify-mask": "effc.passes.cleanup:SimplifyMask",
        "fold-constants": "effc.passes.cleanup:FoldConstants",
        "fuse-linear": "effc.passes.fuse:FuseLinear",
        "fuse-rmsnorm": "effc.passes.fuse:FuseRMSNorm",
        "fold-batchnorm": "effc.passes.fuse:FoldBatchNorm",
        "fold-hsm": "effc.passes.hsm_fold:FoldHsm",
        "fold-static": "effc.passes.rank1_fold:FoldStatic",
        "fuse-projections": "effc.passes.fuse:FuseProjections",
        "harden-hsm": "effc.passes.hsm:HardenHsm",
        "insert-hsm": "effc.passes.hsm:InsertHsm",
        "level": "effc.passes.level:Level",
        "layernorm-to-rmsnorm": "effc.passes.layernorm:LayerNormToRMSNorm",
        "merge-lora": "effc.passes.lora:MergeLora",
        "mixed-precision": "effc.passes.mixed_precision:MixedPrecision",
        "noisyquant": "effc.passes.noisyquant:NoisyQuant",
        "pca-rotate": "effc.passes.pca_rotate:PCARotate",
        "prune-dims": "effc.passes.prune_dims:PruneDims",
        "quantize-cache": "effc.passes.quantize_cache:QuantizeCache",
        "reconstruct": "effc.passes.reconstruct:Reconstruct",
        "quantize": "effc.passes.quantize:Quantize",
        "smooth": "effc.passes.smooth:Smooth",
        "split-concat": "effc.passes.split:SplitConcat",
        "step-gain": "effc.passes.step_gain:StepGain",
        "timestep-table": "effc.passes.timestep:TimestepTable",
        "stack-lora": "effc.passes.lora_stack:StackLora",
        "swap-lora": "effc.passes.lora_swap:SwapLora",
        "tune": "effc.passes.tune:Tune",
        "uncertain-tokens": "effc.passes.uncertain:UncertainTokens",
    },
    error=RecipeError,
)

CANONICAL = (
    "drop-noops",
    "simplify-mask",
    "fuse-linear",
    "fuse-rmsnorm",
    "fold-batchnorm",
    "fold-constants",
)
"""Exact passes that every compile runs first."""


P = TypeVar("P")


def register(kind: type[P]) -> type[P]:
    """Make a pass of your own known to recipes under its `name`; use it as a decorator.

    The same class defined anew, as by running a cell again, takes the place of the old one.
    """
    PASSES.add(kind.name, kind, again=True)  # type: ignore[attr-defined]
    return kind
