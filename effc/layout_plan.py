"""What every layout of `effc package` is: a copy that is filled in one go, and what of a package goes into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from effc import bounded, package
from effc.errors import PackageError, UsageError

Json = dict[str, Any]

TARGET = "ort"
"""The target whose engines are ONNX files that the tools of layouts open as they are."""
JS_SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
"""What is behind `model` in the name of a file, by the dtype that transformers.js is asked for."""
RECORDS = ("recipe.yaml",)
"""Files of a package that say how it was made."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What of a copy is the user's choice: the name that it is served by, the one of several targets that it is of, and
    an engine that was built elsewhere."""

    name: str | None = None
    target: str | None = None
    plan: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`fill` writes a copy into an empty directory; without the file `last` it is none."""

    last: str
    fill: Callable[[Path], None]


def beside(manifest: package.Manifest, *, of_roles: bool = False) -> list[str]:
    """Files of the model that travel with an engine, whatever runs it; with `of_roles` those of single roles too."""
    others = [e for e in manifest.engines if not (of_roles and e.target == TARGET)]
    engines = {str(PurePosixPath(entry.path).parent) for entry in others} - {"."}
    records = {manifest.decisions, manifest.origins, *RECORDS}
    return [
        name
        for name in manifest.files
        if name not in records
        and not name.endswith((".onnx", ".data", ".engine"))
        and not any(name.startswith(f"{folder}/") for folder in engines)
    ]


def own_entries(out: Path, manifest: package.Manifest) -> list[package.EngineEntry]:
    """Engines for ONNX Runtime. Raises UsageError where there are none."""
    own = [entry for entry in manifest.engines if entry.target == TARGET]
    if own:
        return own
    targets = ", ".join(sorted({entry.target for entry in manifest.engines}))
    raise UsageError(
        f"{out} has no engine for {TARGET}, which these tools run; it has {targets}",
        hint=f"compile with --target {TARGET}",
    )


def settings(file: Path) -> Json:
    """JSON of a file that need not be there. Raises PackageError where it is none."""
    if not file.exists():
        return {}
    found = bounded.read_json(file, PackageError)
    if not isinstance(found, dict):
        raise PackageError(f"{file} holds no settings", hint=bounded.HINT)
    return found


def write_json(place: Path, content: Any) -> None:
    """Settings as they stand in every package."""
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(package.dump(content), encoding="utf-8")
