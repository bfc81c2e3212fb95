"""What a sweep tries: places of a recipe, the values they take, and a name for every choice of them.

    base: recipe.yaml
    space:
      targets: [[ort], [openvino]]
      passes.0.bits: [4, 8]
      passes.0.smooth: {low: 0.2, high: 0.8}
    search: tpe
    trials: 24

The base and the files in it count from the folder of the sweep's own file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Discriminator, Field, Tag

from effc import bounded, recipe, sizes
from effc.errors import RecipeError
from effc.table import unknown

Objective = Literal["accuracy", "latency", "size"]
MOST_TRIALS = 10_000
_FIXED = ("gate", "effc", "plugins")
"""What no place of a space may lie in: a sweep compares everything and refuses nothing by itself."""


class _Plain(pydantic.BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Range(_Plain):
    """Numbers between two; `whole` ones, or with `log` as many of every size."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @pydantic.model_validator(mode="after")
    def _order(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError("low is below high, and both are numbers")
        if self.log and self.low <= 0:
            raise ValueError("a logarithmic range begins above 0")
        return self


class Point(_Plain):
    """One trial that is named and written out."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._=+-]{0,79}$")]
    set: dict[str, Any]


class Spec(_Plain):
    """The file of a sweep. `cpus` and `memory` are what one trial asks of a machine."""

    base: str
    space: dict[
        str,
        Annotated[
            Annotated[list[Any], Field(min_length=1), Tag("values")]
            | Annotated[Range, Tag("range")],
            Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "values"),
        ],
    ] = {}
    points: tuple[Point, ...] = ()
    search: Literal["grid", "tpe"] = "grid"
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = None
    seed: int = 0
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = (
        "accuracy",
        "latency",
        "size",
    )
    cpus: Annotated[float, Field(gt=0)] = 1
    memory: str | None = None
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    keep: bool = True

    @property
    def memory_bytes(self) -> int | None:
        return sizes.parse_bytes(self.memory) if self.memory is not None else None


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A name that is also a file's, and values by place."""

    name: str
    settings: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        return [f"{place}={json.dumps(value)}" for place, value in self.settings.items()]


def read(file: Path) -> tuple[Spec, Path]:
    """A sweep's file, and the recipe that it begins with. Raises RecipeError with what is wrong where."""
    _, data = recipe.load_yaml(bounded.text_of(file, RecipeError), str(file))
    if not isinstance(data, dict):
        raise RecipeError(f"{file} is not a mapping", hint="base: recipe.yaml, and a space")
    for word in data:
        if word not in Spec.model_fields:
            raise RecipeError(
                unknown("word", str(word), Spec.model_fields), where=str(file), hint="docs/sweep.md has all of them"
            )  # fmt: skip
    try:
        spec = Spec.model_validate(data)
        _ = spec.memory_bytes
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part not in ("values", "range"))
        raise RecipeError(
            f"{place}: {first['msg'].removeprefix('Value error, ')}", where=str(file),
            hint="docs/sweep.md says what is allowed",
        ) from error  # fmt: skip
    except ValueError as error:
        raise RecipeError(f"memory: {error}", where=str(file), hint="memory: 4GB") from error
    _check(spec, file)
    return spec, (file.parent / spec.base).resolve()


def grid(spec: Spec) -> list[Trial]:
    """Every choice of values, and every point. Raises RecipeError where two trials are one."""
    places = [(place, values) for place, values in spec.space.items() if isinstance(values, list)]
    made = [Trial(name=point.name, settings=point.set) for point in spec.points]
    if places and spec.search == "grid":
        total = math.prod(len(values) for _, values in places)
        if total > MOST_TRIALS:
            raise RecipeError(
                f"the space has {total:,} choices, and a sweep at most {MOST_TRIALS:,}",
                hint="take fewer values, or search: tpe with a number of trials",
            )
        for chosen in itertools.product(*(values for _, values in places)):
            made.append(named(dict(zip((place for place, _ in places), chosen, strict=True))))
    _refuse_twins(made)
    return made if spec.trials is None or spec.search == "tpe" else made[: spec.trials]


def named(settings: Mapping[str, Any]) -> Trial:
    """A trial called by its own settings."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    words = "+".join(
        f"{place.rsplit('.', 1)[-1]}={_word(value)}" for place, value in settings.items()
    )
    plain = re.sub(r"[^A-Za-z0-9._=+-]", "", words)[:60].lstrip("._=+-")
    return Trial(
        name=f"{plain or 'trial'}-{hashlib.sha256(text.encode()).hexdigest()[:8]}", settings=dict(settings)
    )  # fmt: skip


def _word(value: Any) -> str:
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, float):
        return f"{value:.3g}"
    return "_".join(map(_word, value)) if isinstance(value, list) else json.dumps(value)


def _check(spec: Spec, file: Path) -> None:
    def refuse(what: str, hint: str) -> None:
        raise RecipeError(what, where=str(file), hint=hint)

    if not spec.space and not spec.points:
        refuse("there is nothing to try", "space: {targets: [[ort], [openvino]]}, or points")
    ranges = [place for place, values in spec.space.items() if isinstance(values, Range)]
    if spec.search == "grid" and ranges:
        refuse(
            f"{ranges[0]} is a range, of which a grid has no end",
            "search: tpe, or a list of values",
        )
    if spec.search == "tpe" and spec.trials is None:
        refuse("a search has no end of its own", "trials: 24")
    if spec.search == "tpe" and not spec.space:
        refuse("a search needs a space", "space: {passes.0.bits: [4, 8]}, or search: grid")
    for place in _places(spec):
        if place.split(".")[0] in _FIXED:
            refuse(
                f"{place}: a sweep compares trials itself and leaves that as it is",
                "compile the recipe that you choose with its gate",
            )


def _places(spec: Spec) -> Iterator[str]:
    yield from spec.space
    for point in spec.points:
        yield from point.set


def _refuse_twins(trials: Sequence[Trial]) -> None:
    names, known = set[str](), dict[str, str]()
    for trial in trials:
        text = json.dumps(trial.settings, sort_keys=True)
        if trial.name in names and known.get(text) != trial.name:
            raise RecipeError(
                f"two trials are called {trial.name}", hint="give each point a name of its own"
            )
        if text in known:
            raise RecipeError(
                f"{trial.name} and {known[text]} are one trial: {text}",
                hint="leave one of the two out",
            )
        names.add(trial.name)
        known[text] = trial.name
