"""`quantize_config.json`, which the scripts of transformers.js write beside the files that they have quantised.

Its files are many, one for each mode, and a recipe is of one engine: the mode says which.
"""

from __future__ import annotations

from typing import Any

from effc.backends.dialect import DIALECTS
from effc.errors import RecipeError, UsageError
from effc.settings import ort
from effc.settings.keys import HINT, Keys, Wish

MODES = ("fp16", "q8", "int8", "uint8", "q4", "q4f16", "bnb4")
NAMES = ort.Names(weights="weight_type", ops_out="op_block_list")
BLOCK = 32
"""Weights that share a scale where nothing is said, as in the script."""


def read(keys: Keys, wish: Wish, *, target: str | None, mode: str | None) -> None:
    """Read settings into a wish. Raises UsageError where they have several modes and none is chosen."""
    wish.target = "ort"
    chosen = _mode(keys, wish, mode)
    where = target or wish.target
    if chosen in ("q8", "int8", "uint8"):
        _eight(keys, wish, chosen, where)
        keys.drop(
            f"is of other modes than {chosen}",
            "block_size",
            "is_symmetric",
            "accuracy_level",
            "quant_type",
        )
    elif chosen in ("q4", "q4f16"):
        _four(keys, wish)
        keys.drop(
            f"is of other modes than {chosen}",
            "per_channel",
            "reduce_range",
            "quant_type",
            "per_model_config",
        )
    elif chosen == "bnb4":
        raise RecipeError(
            "mode bnb4: effc has no codes of 4 bit that are no integers (NF4, FP4)",
            hint="--mode q4",
        )
    if chosen in ("fp16", "q4f16"):
        wish.passes.append({"pass": "mixed-precision", "dtype": "fp16"})
        wish.became(
            keys.path("modes"),
            f"{chosen}: mixed-precision, which is smaller, and on a CPU not faster",
        )
        keys.drop("effc keeps norms, sums and powers in float32 itself", "op_block_list", lost=True)
    if chosen == "fp16":
        keys.drop("is of other modes than fp16", *keys.left)
    keys.drop("nothing: 4 bit is of products alone", "op_block_list")
    keys.close()


def _mode(keys: Keys, wish: Wish, mode: str | None) -> str:
    modes = keys.words("modes") if "modes" in keys.left else None
    if isinstance(modes, list) and not modes:
        raise keys.error("modes", "names none")
    known = modes or ["q8"]
    if mode is None and len(known) > 1:
        raise UsageError(
            f"the settings have {len(known)} modes, and a recipe makes one engine",
            hint=f"--mode {known[0]}, or another of {', '.join(known)}",
        )
    chosen = mode or known[0]
    if chosen not in known or chosen not in MODES:
        raise UsageError(
            f"the settings have no mode {chosen[:40]!r}", hint=f"one of {', '.join(known)}"
        )
    if modes is not None:
        wish.became(keys.path("modes"), f"the mode {chosen}")
        if others := [one for one in known if one != chosen]:
            wish.lost(
                keys.path("modes"),
                f"{', '.join(others)}: a recipe makes one engine; --mode names another",
            )
    return chosen


def _eight(keys: Keys, wish: Wish, mode: str, target: str) -> None:
    wish.rounds = True
    is_token = DIALECTS[target].token_scales
    told = "activation_scale: token, a scale for every row as it runs, where the script has one for all"
    other = f"{target} finds no ranges as it runs: they are measured on samples"
    wish.became(keys.path("modes"), told if is_token else other, is_lost=not is_token)
    section: Keys | None = keys.inner("per_model_config")
    if section is not None:
        inner = _first_model(section, wish)
        keys.adopt(inner, "weight_type")
        has_convs = "Conv" in (inner.left.get("op_types") or ())
        convs = "; a convolution has no rows to find a range of as it runs, and stays in float"
        became = f"the operators of that model, which effc finds itself{convs if has_convs else ''}"
        inner.drop(became, "op_types", lost=has_convs)
        inner.close()
    if "weight_type" not in keys.left and mode != "q8":
        keys.left["weight_type"] = mode  # which the mode says, so that no key is to be answered for
    made = ort.quantize(keys, NAMES, is_static=False, target=target)
    if made is not None:
        wish.passes.append(made)


def _first_model(section: Keys, wish: Wish) -> Keys:
    """The settings of the first file; of others what differs is named."""
    names = list(section.left)
    first = section.inner(names[0])
    if first is None:
        raise section.error(names[0], f"is empty; {HINT}")
    for name in names[1:]:
        same = section.left[name] == {**first.left}
        became = (
            "as the first file"
            if same
            else "another file with settings of its own: a recipe is of one"
        )
        section.drop(became, name, lost=not same)
    return first


def _four(keys: Keys, wish: Wish) -> None:
    wish.rounds = True
    made: dict[str, Any] = {"pass": "quantize", "bits": 4, "activation_bits": 16, "group": BLOCK}
    made["ops"] = ["linear"]  # its 4 bit are of products alone
    if "block_size" in keys.left:
        size = keys.take("block_size", int, BLOCK)
        if size < 1:
            raise keys.error("block_size", f"{size} is no size")
        made["group"] = size
        wish.became(keys.path("block_size"), f"group: {size}")
    if "is_symmetric" in keys.left:
        symmetric = keys.take("is_symmetric", bool, True)
        if not symmetric:
            made["weight_symmetric"] = False
        wish.became(keys.path("is_symmetric"), f"weight_symmetric: {str(symmetric).lower()}")
    if keys.left.get("accuracy_level") not in (None, 4):
        why = "effc multiplies with activations rounded to 8 bit in blocks, which is level 4"
        keys.drop(why, "accuracy_level", lost=True)
    keys.drop("level 4: activations are rounded to 8 bit in blocks as it runs", "accuracy_level")
    wish.passes.append(made)
