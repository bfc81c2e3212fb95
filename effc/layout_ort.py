"""`effc package --layout ort-model-package`: ONNX Runtime's own format, from which it chooses what fits a machine.

    manifest.json               components, each with variants: which provider, which file
    ROLE/cpu/model.onnx         an engine, its data beside it
    assets/                     tokenizer, settings, licence

One component for each role. `onnxruntime.ModelPackageContext(DIR)` opens it, from version 1.32 on.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from effc import package, paths
from effc.layout_plan import Json, Plan, beside, own_entries, write_json

MANIFEST = "manifest.json"
SCHEMA = "1.0"
ENGINE = "model.onnx"
PROVIDER, VARIANT = "CPUExecutionProvider", "cpu"
"""What effc compiles for and what the variant is called; both are the words of ONNX Runtime."""


def plan(out: Path, manifest: package.Manifest) -> Plan:
    """Raises UsageError where the package has no engine for ONNX Runtime."""
    entries = own_entries(out, manifest)

    def fill(place: Path) -> None:
        for entry in entries:
            folder = f"{entry.role}/{VARIANT}"
            for name in (entry.path, f"{entry.path}.data"):
                if name in manifest.files:
                    rest = name.removeprefix(entry.path)
                    package.copy_file(paths.inside(out, name), place, f"{folder}/{ENGINE}{rest}")
        for name in beside(manifest, of_roles=True):
            target = PurePosixPath("assets", name).as_posix()
            package.copy_file(paths.inside(out, name), place, target)
        write_json(place / MANIFEST, _manifest(manifest, entries))

    return Plan(last=MANIFEST, fill=fill)


def _manifest(manifest: package.Manifest, entries: list[package.EngineEntry]) -> Json:
    components = {
        entry.role: {
            "variants": {
                VARIANT: {
                    "variant_directory": f"{entry.role}/{VARIANT}",
                    "ep": PROVIDER,
                    "device": "cpu",
                    "executor_info": {"ort": {"model_file": ENGINE}},
                }
            },
            "additional_metadata": {"sha256": entry.sha256, "requires": list(entry.requires)},
        }
        for entry in entries
    }
    return {
        "schema_version": SCHEMA,
        "package_name": str(manifest.source.get("name", "")) or "model",
        "layout": "portable",
        "components": components,
    }
