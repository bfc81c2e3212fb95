"""What `effc tune` writes: the tensors of every step of a recipe that trains, and what the steps before decided.

    CKPT/tune.json                  what it was made from, the curves, and the sha256 of every file
    CKPT/STEP.ROLE.safetensors      tensors by the names that the graph has for them
    CKPT/recipe.yaml
    CKPT/adapter/…                  what passes have for others, such as an adapter in the form of PEFT
    CKPT/config.json, …             of the model of a task all that it is: the checkpoint is a source itself

`effc compile RECIPE --tuned CKPT` takes them, and refuses a checkpoint of another model or of other steps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from effc import bounded, paths, scratch
from effc.cache import sha256
from effc.errors import TuneError
from effc.passes.base import Pass
from effc.passes.pipeline import options_of
from effc.source import Source

Json = dict[str, Any]
Made = tuple[dict[str, Tensor], list[Json]]
"""Tensors by name, and the curve of their training."""
SCHEMA, RECORD = 1, "tune.json"
MOST_RECORD = 1 << 28
AGAIN = "run `effc tune` on this recipe again"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose files are what its record says; `read` makes one."""

    place: Path
    content: Json

    def tensors(self, index: int, role: str) -> Made:
        """Tensors and curve of a step. Raises TuneError where it has none."""
        key = f"{index}.{role}"
        if f"{key}.safetensors" not in self.content["files"] or key not in self.content["curves"]:
            raise TuneError(f"{self.place} has no tensors of step {index} for {role}", hint=AGAIN)
        return load_file(self.place / f"{key}.safetensors"), self.content["curves"][key]

    def decision(self, key: str) -> Any:
        """What a step decided, by target, role, place and name: `ort/main/0:smooth`; None where it decided nothing."""
        return self.content["decisions"].get(key)


def read(place: Path, source: Source, passes: Sequence[Pass]) -> Checkpoint:
    """Raises TuneError where it is no checkpoint, not whole, or of another model or other passes."""
    content = whole(place, passes)
    if content.get("source") != source.digest:
        raise TuneError(f"{place} was trained from another model", hint=AGAIN)
    return Checkpoint(place=place, content=content)


def whole(place: Path, passes: Sequence[Pass]) -> Json:
    """The record of a checkpoint whose files are what it says. Raises TuneError as `read` does, whatever the model."""
    content = check_steps(place, passes)
    check_files(place, content)
    return content


def check_files(place: Path, content: Json) -> None:
    """Raise TuneError where a file of a checkpoint is not what its record says."""
    for name, digest in content["files"].items():
        paths.parts(name)
        with paths.plain(place / name, TuneError) as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:  # type: ignore[arg-type]
                raise TuneError(f"{place / name} is not what it was written as", hint=AGAIN)


def check_steps(place: Path, passes: Sequence[Pass]) -> Json:
    """The record of a checkpoint. Raises TuneError where it is none, or of other passes."""
    content = record(place)
    if content["steps"] != steps_of(passes):
        raise TuneError(f"{place} was trained by other passes than the recipe has", hint=AGAIN)
    return content


def record(place: Path) -> Json:
    """The record of a checkpoint, whatever made it. Raises TuneError where it is none."""
    if not (place / RECORD).is_file():
        raise TuneError(
            f"{place} is no checkpoint: it has no {RECORD}",
            hint="effc tune RECIPE -o CKPT writes one",
        )
    content = bounded.read_json(place / RECORD, TuneError, MOST_RECORD)
    parts = {"decisions": dict, "curves": dict, "files": dict, "steps": list}
    if (
        not isinstance(content, dict) or content.get("schema") != SCHEMA
        or not all(isinstance(content.get(name), kind) for name, kind in parts.items())
    ):  # fmt: skip
        raise TuneError(f"{place / RECORD} is not one that this effc reads", hint=AGAIN)
    return content


def write(
    out: Path,
    source: Source,
    passes: Sequence[Pass],
    *,
    decisions: Mapping[str, Any],
    made: Mapping[str, Made],
    recipe: str,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Write a checkpoint in one piece; `made` is by step and role, as `1.main`. Raises TuneError.

    `more` are files by name, for others than effc.
    """
    refuse(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch.held(out.parent, f".{out.name}.") as stage:
        place = stage / "made"
        place.mkdir()
        for key, (tensors, _) in made.items():
            (place / f"{key}.safetensors").write_bytes(save(apart(tensors)))
        (place / "recipe.yaml").write_text(recipe, encoding="utf-8")
        for name, data in (more or {}).items():
            file = place.joinpath(*paths.parts(name))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        content = {
            "schema": SCHEMA, "source": source.digest, "steps": steps_of(passes),
            "decisions": dict(decisions), "curves": {key: curve for key, (_, curve) in made.items()},
            "files": {name: sha256(place / name) for name in sorted(paths.below(place))},
        }  # fmt: skip
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
        (place / RECORD).write_text(text + "\n", encoding="utf-8")
        if out.exists():
            os.rename(out, stage / "old")
        os.rename(place, out)


def refuse(out: Path) -> None:
    """Raise TuneError where something else than a checkpoint stands in the way."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir() or _strangers(out):
        raise TuneError(
            f"{out} holds something else than a checkpoint",
            hint="name a directory that is not there yet",
        )


def _strangers(out: Path) -> bool:
    """Whether a directory is no checkpoint, or has something in it that its record does not list."""
    try:
        content = bounded.read_json(out / RECORD, TuneError, MOST_RECORD)
    except TuneError:
        return True
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return True
    files = content.get("files")
    known = {RECORD, *files} if isinstance(files, dict) else set()
    folders = {
        "/".join(name.split("/")[:end]) for name in known for end in range(name.count("/") + 1)
    }
    return any(
        found.relative_to(out).as_posix()
        not in (folders if found.is_dir() and not found.is_symlink() else known)
        for found in out.rglob("*")
    )


def steps_of(passes: Sequence[Pass]) -> list[Json]:
    """The passes up to the last that trains, as a record names them: without folders of this machine."""
    last = max((i for i, pass_ in enumerate(passes) if pass_.trains), default=-1)
    return [
        json.loads(json.dumps({"pass": pass_.name, **options_of(pass_)}))
        for pass_ in passes[: last + 1]
    ]


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies, since a file holds no tensor twice."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
