"""`effc package --layout diffusers`: engines of a pipeline as diffusers keeps its ONNX files, one folder for each part.

model_index.json, scheduler/, tokenizer/, text_encoder/model.onnx, unet/model.onnx, vae_decoder/model.onnx, …
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from effc import bounded, correction, diffusion, package, paths
from effc.errors import PackageError, UsageError
from effc.layout_plan import TARGET, Json, Plan

NAME = "diffusers"
PART = ["diffusers", "OnnxRuntimeModel"]
"""What model_index.json calls an ONNX file."""
CLASSES = {"StableDiffusionPipeline": "OnnxStableDiffusionPipeline"}
"""Pipelines of diffusers that have a twin for ONNX files."""
LEFT_OUT = ("feature_extractor", "safety_checker", "image_encoder")
ENGINE = "model.onnx"


def plan(out: Path, manifest: package.Manifest) -> Plan:
    """Raises UsageError for a package that was made of anything but a pipeline directory."""
    entries = [entry for entry in manifest.engines if entry.target == TARGET]
    if manifest.kind != diffusion.KIND or diffusion.INDEX not in manifest.files:
        raise UsageError(
            f"{out} was not made of a pipeline directory, which the layout {NAME} is for",
            hint="effc compile PIPELINE_DIR -o OUT",
        )
    if not entries:
        raise UsageError(
            f"{out} has no engine for {TARGET}", hint=f"compile with --target {TARGET}"
        )
    if correction.read(out, TARGET) is not None:
        raise UsageError(
            f"{out} has a table by which effc's sampler puts its predictions right, and diffusers has no such thing",
            hint="compile without `correct: true` for this layout",
        )
    where: dict[str, list[str]] = {}
    for entry in entries:
        for name in (entry.path, f"{entry.path}.data"):
            if name in manifest.files:
                rest = name.removeprefix(entry.path)
                where[name] = [f"{entry.role}/{ENGINE}{rest}"]
        settings = diffusion.VAE if entry.role.startswith("vae_") else f"{entry.role}/config.json"
        if settings in manifest.files:
            where.setdefault(settings, []).append(f"{entry.role}/config.json")
    for name in manifest.files:
        top = PurePosixPath(name).parts[0]
        is_text = top in ("scheduler", "tokenizer", "tokenizer_2")
        if is_text or name.startswith(("README", "LICENSE", "LICENCE", "NOTICE")):
            where[name] = [name]

    def fill(place: Path) -> None:
        for name, targets in where.items():
            for target in targets:
                package.copy_file(paths.inside(out, name), place, target)
        index = bounded.read_json(out / diffusion.INDEX, PackageError)
        text = package.dump(_index(index, [entry.role for entry in entries]))
        (place / diffusion.INDEX).write_text(text, encoding="utf-8")

    return Plan(last=diffusion.INDEX, fill=fill)


def _index(index: Mapping[str, Any], roles: list[str]) -> Json:
    kept = {
        k: v for k, v in index.items() if k not in ("vae", *diffusion.TEXTS, *diffusion.DENOISERS)
    }
    kept |= {name: [None, None] for name in LEFT_OUT if name in index}
    name = index.get("_class_name")
    return {**kept, "_class_name": CLASSES.get(name, name), **dict.fromkeys(roles, PART)}  # type: ignore[arg-type]
