"""The file of somebody else's settings as plain values, and whose they are by what stands in it.

JSON or YAML, at most as long as a recipe may be, no tags, no key twice, no aliases that grow. Nothing that it names is
loaded or run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from effc import bounded, recipe
from effc.errors import RecipeError, UsageError
from effc.table import unknown

KINDS = ("optimum", "modelopt", "olive", "transformers.js")
TRANSFORMERS_JS = (
    "modes", "per_channel", "reduce_range", "per_model_config", "block_size", "is_symmetric", "accuracy_level",
    "quant_type", "op_block_list",
)  # fmt: skip
HINT = "it is ort_config.json of optimum, a recipe of ModelOpt, a workflow of Olive or quantize_config.json"


def values_of(file: Path) -> dict[str, Any]:
    """The settings of a file. Raises RecipeError for what is none."""
    text = bounded.text_of(file, RecipeError, recipe.MOST_BYTES)
    if text.lstrip("\ufeff \t\r\n")[:1] in ("{", "["):
        found = _json(text.lstrip("\ufeff"), file)
    else:
        _, found = recipe.load_yaml(text, str(file))
        if bounded.is_deep(found):
            raise RecipeError(
                f"{file} is nested more than {bounded.MOST_DEPTH} deep", hint=bounded.HINT
            )
    if not isinstance(found, dict) or not found:
        raise RecipeError(f"{file} is not a mapping of settings", hint=HINT)
    return found


def _json(text: str, file: Path) -> Any:
    """JSON whose keys are said once. Raises RecipeError."""
    found = bounded.json_of(text.encode(), str(file), RecipeError)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise RecipeError(
                    f"{file}: {key[:60]!r} stands there twice", hint="keep one of the two"
                )
            made[key] = value
        return made

    def odd(text: str) -> None:
        raise RecipeError(f"{file}: {text} is no number", hint=bounded.HINT)

    json.loads(text, object_pairs_hook=once, parse_constant=odd)
    return found


def kind_of(values: Mapping[str, Any]) -> str:
    """Whose settings they are. Raises UsageError where that cannot be told."""
    fitting = [kind for kind, fits in FITS.items() if fits(values)]
    if len(fitting) == 1:
        return fitting[0]
    which = f"of {' and of '.join(fitting)}" if fitting else f"of none of {', '.join(KINDS)}"
    raise UsageError(
        f"the settings look like those {which}", hint=f"say whose they are: --kind {KINDS[0]}"
    )


def checked(kind: str) -> str:
    if kind not in KINDS:
        raise UsageError(unknown("--kind", kind, KINDS), hint=f"one of {', '.join(KINDS)}")
    return kind


def _is_optimum(values: Mapping[str, Any]) -> bool:
    section = values.get("quantization")
    is_whole = isinstance(section, dict) and (
        "is_static" in section or "one_external_file" in values
    )
    is_plain = "optimization" in values and "one_external_file" in values
    return is_whole or is_plain or ("is_static" in values and "format" in values)


def _is_modelopt(values: Mapping[str, Any]) -> bool:
    section, about = values.get("quantize"), values.get("metadata")
    is_inner = isinstance(section, dict) and "quant_cfg" in section
    return "quant_cfg" in values or is_inner or (isinstance(about, dict) and "recipe_type" in about)


def _is_olive(values: Mapping[str, Any]) -> bool:
    return "input_model" in values or (
        "passes" in values and bool({"systems", "data_configs", "engine", "evaluators"} & {*values})
    )


def _is_transformers_js(values: Mapping[str, Any]) -> bool:
    telling = {"modes", "per_model_config", "per_channel", "block_size"} & {*values}
    return bool(telling) and not {*values} - {*TRANSFORMERS_JS}


FITS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "optimum": _is_optimum,
    "modelopt": _is_modelopt,
    "olive": _is_olive,
    "transformers.js": _is_transformers_js,
}
