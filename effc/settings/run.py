"""Settings of another tool in; a recipe that effc's own reader takes out, with what became of every key beside it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from effc import peers, recipe
from effc.backends import TARGETS
from effc.backends.dialect import DIALECTS
from effc.errors import RecipeError, UsageError
from effc.paths import word
from effc.settings import modelopt, olive, optimum, transformers_js
from effc.settings import read as files
from effc.settings.keys import Keys, Note, Wish
from effc.source import guess
from effc.table import unknown

READERS: dict[str, Callable[..., None]] = {
    "optimum": optimum.read,
    "modelopt": modelopt.read,
    "olive": olive.read,
    "transformers.js": transformers_js.read,
}
COLUMNS = re.compile(r"\.(csv|tsv)(\.gz)?$")
MODEL = "--model MODEL names a directory, model.onnx or module:factory"


@dataclass(frozen=True, kw_only=True)
class Migrated:
    """A recipe made of somebody's settings, and what became of their keys."""

    kind: str
    text: str
    notes: tuple[Note, ...]

    @property
    def lost(self) -> tuple[Note, ...]:
        return tuple(note for note in self.notes if note.is_lost)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "recipe": self.text,
            "notes": [asdict(note) for note in self.notes],
        }

    def lines(self) -> list[str]:
        """What was carried over, and what was not, a line each."""
        kept = [note for note in self.notes if not note.is_lost]
        return [
            f"settings of {self.kind}: {len(kept)} carried over, {len(self.lost)} not",
            *(f"    carried over: {_line(note)}" for note in kept),
            *(f"    not carried over: {_line(note)}" for note in self.lost),
        ]


def migrate(
    file: Path,
    *,
    kind: str | None = None,
    model: str | None = None,
    calib: str | None = None,
    target: str | None = None,
    mode: str | None = None,
    base: Path | None = None,
) -> Migrated:
    """The recipe that a file of settings stands for; paths in it are for one that lies in `base`.

    Raises RecipeError for settings that are none, or of which nothing can be carried over; UsageError where they name
    no model, no samples though they measure, or are of nobody that is known. Nothing is written, loaded or run.
    """
    if target is not None and target not in TARGETS:
        known = f"one of {', '.join(TARGETS)}"
        raise UsageError(unknown("--target", target, TARGETS), hint=peers.hint(target) or known)
    values = files.values_of(file)
    chosen = files.checked(kind) if kind is not None else files.kind_of(values)
    wish = Wish()
    keys = Keys(values, wish)
    READERS[chosen](keys, wish, target=target, mode=mode)
    keys.close()
    if target is not None and wish.target not in (None, target):
        wish.became("--target", f"targets: [{target}], where the settings are for {wish.target}")
    _without_halves(wish, target or wish.target or "ort")
    _refuse_nothing(file, wish)
    data = _data(file, wish, model, calib, target, base or Path())
    text = _text(file, chosen, data, wish.notes)
    made = recipe.parse(text, name=f"the recipe of {file}", base=base)
    for pass_ in made.passes:  # a target that has no kernels for it says so here
        pass_.resolve(DIALECTS[made.targets[0]])
    return Migrated(kind=chosen, text=text, notes=tuple(wish.notes))


def _without_halves(wish: Wish, target: str) -> None:
    """ONNX Runtime's kernel for weights that are quantised alone wants its scales and activations in one type."""
    alone = any(p["pass"] == "quantize" and p.get("activation_bits") == 16 for p in wish.passes)
    if target == "ort" and alone and any(p["pass"] == "mixed-precision" for p in wish.passes):
        wish.passes = [p for p in wish.passes if p["pass"] != "mixed-precision"]
        wish.lost(
            "mixed-precision",
            "beside weights that are quantised alone, ort computes in float32 here",
        )


def _refuse_nothing(file: Path, wish: Wish) -> None:
    """A recipe in float, where settings asked for less, would be another model."""
    if not wish.rounds or any(p["pass"] in ("quantize", "mixed-precision") for p in wish.passes):
        return
    lost = [note for note in wish.notes if note.is_lost]
    why = _line(lost[0]) if lost else "no layer is quantised"
    raise RecipeError(
        f"nothing of what {file} quantises can be carried over: {why}",
        hint="keep the tool that it was written for; effc doctor --for says which serves what",
    )


def _data(
    file: Path, wish: Wish, model: str | None, calib: str | None, target: str | None, base: Path
) -> dict[str, Any]:
    named = model or _there(wish.model, file)
    if named is None:
        told = f"names {word(wish.model)}, which is not here" if wish.model else "names no model"
        raise UsageError(f"{file} {told}", hint=MODEL)
    source = {key: _placed(value, base) for key, value in guess(named).items()}
    data: dict[str, Any] = {"source": source, "targets": [target or wish.target or "ort"]}
    samples = calib or _there(wish.calib.get("file"), file)
    if samples is not None:
        if "column" in wish.calib and not COLUMNS.search(samples):
            wish.lost("calib.column", f"{word(samples)} has no columns")
            del wish.calib["column"]
        data["calib"] = {**wish.calib, "file": _placed(samples, base)}
    elif wish.calib:
        wish.lost([f"calib.{key}" for key in wish.calib], "there are no samples: --calib FILE")
    if wish.passes:
        data["passes"] = copy.deepcopy(wish.passes)
    _refuse_unmeasured(file, data)
    return data


def _refuse_unmeasured(file: Path, data: dict[str, Any]) -> None:
    if "calib" in data or "python" in data["source"]:
        return
    parsed = recipe.build({**data, "bench": False}, replayed=True)
    if measuring := next((p.name for p in parsed.passes if p.measures), None):
        raise UsageError(
            f"{file} asks for {measuring}, which measures on samples, and names none that are here",
            hint="--calib FILE: .txt, .csv#column, .npz or a folder",
        )


def _there(place: str | None, file: Path) -> str | None:
    """A path of the settings that is there, from where effc runs or from beside the settings."""
    if not place or "\0" in place:
        return None
    for one in (Path(place), file.parent / place):
        if os.path.exists(one):
            return str(one)
    return None


def _placed(path: str, base: Path) -> str:
    """A path as a recipe in `base` says it: below it relative, else absolute; a word that is none stays."""
    plain, mark, column = path.partition("#")
    if not os.path.exists(plain):
        return path
    whole, home = os.path.abspath(plain), os.path.abspath(base)
    inside = os.path.commonpath([whole, home]) == home and whole != home
    return (os.path.relpath(whole, home) if inside else whole) + mark + column


def _text(file: Path, kind: str, data: dict[str, Any], notes: list[Note]) -> str:
    """The recipe as YAML, what was lost on top of it as comments."""
    head = [f"# made by effc migrate-config of {word(file.name)}, settings of {kind}"]
    head += [f"# not carried over: {_line(note)}" for note in notes if note.is_lost]
    return "\n".join(head) + "\n" + recipe.canonical(data)


def _line(note: Note) -> str:
    shown = ", ".join(note.keys[:4]) + (
        f" and {len(note.keys) - 4} more" if len(note.keys) > 4 else ""
    )
    became = note.became if note.became.isprintable() else ascii(note.became)[1:-1]
    return f"{shown}: {became}"
