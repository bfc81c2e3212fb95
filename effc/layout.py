"""`effc package`: a copy of a package in the layout that another tool opens.

    onnxruntime-genai        causal language models                    layout_causal
    transformers.js          these, encoders and classifiers           layout_causal, layout_encoder
    sentence-transformers    encoders of sentences                     layout_encoder
    diffusers                pipelines                                 layout_pipeline
    triton                   any package: a model repository           layout_triton
    ort-model-package        any package: ONNX Runtime's own format    layout_ort
    peft                     adapters of low rank                      layout_peft

What was copied is the tool's; effc does not read it back.
"""

from __future__ import annotations

from pathlib import Path

from effc import layout_causal, layout_encoder, layout_triton, package, paths
from effc.engine import refuse
from effc.errors import UsageError
from effc.layout_plan import Asked, Plan
from effc.table import Table, unknown

LAYOUTS = Table(
    "layout",
    {
        "diffusers": "effc.layout_pipeline:plan",
        "onnxruntime-genai": "effc.layout_causal:genai",
        "ort-model-package": "effc.layout_ort:plan",
        "peft": "effc.layout_peft:plan",
        "sentence-transformers": "effc.layout_encoder:sentence_transformers",
        "transformers.js": "effc.layout:transformers_js",
        "triton": "effc.layout_triton:plan",
    },
    UsageError,
)
"""What plans a copy of a package, by layout; loaded when asked for, for one of them wants torch."""
CHECKPOINTS = "peft"
"""The layout that takes what `effc tune` writes as well."""


def write(out: Path, layout: str, place: Path, asked: Asked | None = None) -> list[str]:
    """Write the copy, whole or not at all, and give the names of its files.

    Raises UsageError where the layout is none or not for what the package holds, VerifyError where the package is not
    whole, TuneError where a checkpoint is not, PackageError where `place` has something in it.
    """
    asked = asked or Asked()
    if layout not in LAYOUTS:
        raise UsageError(unknown("layout", layout, LAYOUTS), hint=f"one of {', '.join(LAYOUTS)}")
    if asked != Asked() and layout != layout_triton.NAME:
        raise UsageError(
            f"--name, --target and --plan are for --layout {layout_triton.NAME}",
            hint="leave them out",
        )
    is_checkpoint = _is_checkpoint(out, layout)
    plan = _of_checkpoint(out) if is_checkpoint else _of_package(out, layout, asked)
    if place.resolve().is_relative_to(out.resolve()):
        raise UsageError(
            f"{place} lies in {out}, which holds only what was written there",
            hint=f"name a place beside it, e.g. -o {out.name}-{layout}",
        )
    package.check_output(place, package.check_empty)
    if not is_checkpoint:
        refuse(out, package.check(out))
    with package.staged(place, check=package.check_empty, last=plan.last) as stage:
        plan.fill(stage.package)
        return sorted(paths.below(stage.package))


def _is_checkpoint(out: Path, layout: str) -> bool:
    if layout != CHECKPOINTS:
        return False
    from effc import checkpoint

    return (out / checkpoint.RECORD).is_file()


def _of_checkpoint(out: Path) -> Plan:
    from effc import layout_peft

    return layout_peft.of_checkpoint(out)


def _of_package(out: Path, layout: str, asked: Asked) -> Plan:
    manifest = package.read(out)
    if layout == layout_triton.NAME:
        return layout_triton.plan(out, manifest, asked)
    plan: Plan = LAYOUTS[layout](out, manifest)
    return plan


def transformers_js(out: Path, manifest: package.Manifest) -> Plan:
    """Raises UsageError where the package holds nothing that transformers.js has a class for."""
    if manifest.kind == layout_causal.KIND:
        return layout_causal.transformers_js(out, manifest)
    if manifest.kind in layout_encoder.KINDS:
        return layout_encoder.transformers_js(out, manifest)
    raise UsageError(
        f"{out} holds a model of kind {manifest.kind}, and this layout is for causal language models, encoders and "
        "classifiers",
        hint="its model.onnx is all that a tool needs: docs/deploy.md",
    )
