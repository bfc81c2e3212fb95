"""Options of ONNX Runtime's own quantiser, which optimum, Olive and transformers.js each say in words of their own.

What it does and effc does too is carried over; its choices of a type are not: effc takes the type that the target's
kernels are fast in, and every 8-bit type has as many codes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from effc.backends.dialect import DIALECTS
from effc.settings.keys import Keys

TYPES = {
    "qint8": "int8", "quint8": "uint8", "qint16": "int16", "quint16": "uint16", "qint4": "int4", "quint4": "uint4",
    "qfloat8e4m3fn": "fp8",
}  # fmt: skip
BITS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4}
OPS = {
    "matmul": ("linear",),
    "gemm": ("linear",),
    "conv": ("conv1d", "conv2d"),
    "gather": ("embedding",),
}
"""What layers are called in ONNX, in small letters, and in effc."""
RANGES = {"minmax": "minmax", "percentile": "percentile"}
OWN_RANGE = "effc chooses ranges by the least squared error (range: mse) where it is not told how"
QDQ = "quantise and dequantise nodes, which the runtime fuses into the same kernels"
EXACT = "exact ends over all samples, which need no such setting"
HISTOGRAM = "effc's histograms choose their own bins"


@dataclass(frozen=True, kw_only=True)
class Names:
    """How somebody calls the options; an empty name is one that they have not."""

    weights: str
    per_channel: str = "per_channel"
    reduce_range: str = "reduce_range"
    activations: str = ""
    activations_symmetric: str = ""
    weights_symmetric: str = ""
    format: str = ""
    ops: str = ""
    ops_out: str = ""
    nodes: str = ""
    nodes_out: str = ""


def quantize(keys: Keys, names: Names, *, is_static: bool, target: str) -> dict[str, Any] | None:
    """The options of a `quantize` pass, or None where there is none for what is asked. Keys of ranges are left."""
    made: dict[str, Any] = {"pass": "quantize"}
    if not _weights(keys, names, made, target):
        return None
    _activations(keys, names, made, is_static=is_static, target=target)
    if names.format and names.format in keys.left:
        keys.told(names.format, str, QDQ)
    if not _places(keys, names, made, is_static=is_static):
        return None
    return made


def _weights(keys: Keys, names: Names, made: dict[str, Any], target: str) -> bool:
    wish, path = keys.wish, keys.there(names.weights)
    word = type_of(keys.take(names.weights, str, "int8"))
    if word == "fp8" and DIALECTS[target].fp8:
        made["dtype"] = "fp8"
        wish.became(path, "dtype: fp8")
    elif word in BITS:
        made["bits"] = BITS[word]
        around = " around 0, the codes of uint moved by half" if word[0] == "u" else " around 0"
        wish.became(path, f"bits: {BITS[word]}, integers{around}")
    else:
        wish.lost(path, f"effc has no weights of {word} for {target}")
        keys.drop("there are no weights to be quantised", *_known(keys, names), lost=True)
        return False
    if names.weights_symmetric:
        _weight_zero(keys, names.weights_symmetric)
    if names.per_channel in keys.left:
        wanted = keys.take(names.per_channel, bool)
        more = "" if wanted else ", which is finer"
        wish.became(
            keys.path(names.per_channel), f"every output channel has a scale of its own{more}"
        )
    if names.reduce_range in keys.left:
        wanted = keys.take(names.reduce_range, bool)
        became = "overflow_fix, on by itself: scales so wide that no kernel overflows in 16 bit"
        wish.became(
            keys.path(names.reduce_range),
            became if wanted else "nothing: weights have all their bits",
        )
    return True


def _known(keys: Keys, names: Names) -> list[str]:
    return [name for name in vars(names).values() if name and name in keys.left]


def _weight_zero(keys: Keys, key: str) -> None:
    if key not in keys.left:
        return
    if keys.take(key, bool) is False:
        why = "integer kernels take no zero point of weights beside integer activations; a grid around 0"
        keys.wish.lost(keys.path(key), why)
    else:
        keys.wish.became(keys.path(key), "a grid around 0")


def _activations(
    keys: Keys, names: Names, made: dict[str, Any], *, is_static: bool, target: str
) -> None:
    wish, dialect = keys.wish, DIALECTS[target]
    word = type_of(keys.take(names.activations, str, "uint8")) if names.activations else "uint8"
    path = keys.path(names.activations) if names.activations else ""
    if word not in ("int8", "uint8", "fp8"):
        wish.lost(path, f"effc has no kernels for activations of {word}: they stay in float")
        made.update({"activation_bits": 16, "group": 32})
        keys.drop("activations stay in float", names.activations_symmetric, lost=True)
        return
    if "dtype" in made:
        keys.drop("dtype: fp8 on both sides of a product", names.activations_symmetric)
        wish.became(path or [], "dtype: fp8 on both sides of a product")
        return
    grid = dialect.activation
    own = f"{'int8' if grid.signed else 'uint8'} {'without' if grid.symmetric else 'with'} a zero point"
    if path:
        differs = word != ("int8" if grid.signed else "uint8")
        wish.became(path, f"8 bit: {own}, as {target} has kernels for", is_lost=differs)
    if names.activations_symmetric in keys.left:
        wanted = keys.take(names.activations_symmetric, bool)
        differs = wanted != grid.symmetric
        wish.became(
            keys.path(names.activations_symmetric),
            f"{own}, as {target} has kernels for",
            is_lost=differs,
        )
    if not is_static and dialect.token_scales:
        made["activation_scale"] = "token"


def _places(keys: Keys, names: Names, made: dict[str, Any], *, is_static: bool) -> bool:
    """Which layers: operators and names of nodes. False where none of the operators is one of effc's."""
    given = keys.words(names.ops) if names.ops else None
    out = keys.words(names.ops_out) if names.ops_out else None
    known = ["linear", "conv1d", "conv2d", "embedding"]
    chosen = list(known)
    if given:
        chosen, others = _ops(given)
        path = keys.path(names.ops)
        keys.wish.became(path, f"ops: {', '.join(chosen) or 'none'}")
        if others:
            why = "are not quantised: effc quantises products, convolutions and tables, and grids elsewhere cost time"
            keys.wish.lost(path, f"{', '.join(others)} {why}")
    if out:
        gone, others = _ops(out)
        chosen = [op for op in chosen if op not in gone]
        keys.wish.became(keys.path(names.ops_out), f"without {', '.join(gone) or 'anything'}")
        if others:
            keys.wish.became(keys.path(names.ops_out), f"{', '.join(others)}: never quantised")
    if not is_static and made.get("activation_scale") == "token":
        if given and set(chosen) & {"conv1d", "conv2d"}:
            why = "a convolution has no rows to find a range of as it runs, and stays in float"
            keys.wish.lost(keys.path(names.ops), why)
        chosen = [op for op in chosen if not op.startswith("conv")]
    if not chosen:
        return False
    without_convs = [op for op in known if not op.startswith("conv")]
    is_all = chosen == known or (not is_static and chosen == without_convs)
    if not is_all:
        made["ops"] = chosen
    asked = bool(names.nodes and keys.left.get(names.nodes))
    inside = modules(keys, names.nodes) if names.nodes else []
    outside = modules(keys, names.nodes_out) if names.nodes_out else []
    select: dict[str, Any] = {}
    if names.nodes and asked and not inside:
        raise keys.error(
            names.nodes, "names nodes alone, none of them with the path of a module in it"
        )
    if inside:
        select["module"] = inside
    if outside:
        select["exclude"] = outside
    if select:
        made["select"] = select
    return True


def _ops(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """Operators of effc, and names that are none of its."""
    found = {op for word in words for op in OPS.get(word.lower(), ())}
    others = sorted({word for word in words if word.lower() not in OPS})
    return [op for op in ("linear", "conv1d", "conv2d", "embedding") if op in found], others


def modules(keys: Keys, key: str) -> list[str]:
    """Paths of modules from names of nodes as exporters make them, `/encoder/layer.0/output/dense/MatMul`."""
    names = keys.words(key) or []
    found, others = [], []
    for name in names:
        steps = name.strip("/").split("/")
        is_path = name.startswith("/") and len(steps) > 1 and all(steps)
        if is_path and all(re.fullmatch(r"[\w.]+", step) for step in steps):
            found.append(".".join(steps[:-1]))
        else:
            others.append(name)
    found = list(dict.fromkeys(found))
    if found:
        keys.wish.became(
            keys.path(key),
            "modules by the path that the exporter wrote into the name; `effc inspect MODEL` has them",
        )
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        why = f"names of nodes without a path of a module in them: {', '.join(others[:3])}{more}"
        keys.wish.lost(keys.path(key), f"{why}; name modules in select")
    return found


def ranges(keys: Keys, made: dict[str, Any], *, method: str, percentile: str = "") -> None:
    """How ranges are chosen: by a calibration method and its settings."""
    word = keys.take(method, str)
    if word is not None:
        chosen = RANGES.get(word.lower())
        if chosen is None:
            keys.wish.lost(keys.path(method), f"effc has no {word}; {OWN_RANGE}")
        else:
            made["range"] = chosen
            keys.wish.became(keys.path(method), f"range: {chosen}")
    if percentile and percentile in keys.left:
        share = keys.take(percentile, float)
        if share is not None and made.get("range") == "percentile":
            if not 0 < share <= 100:
                raise keys.error(percentile, f"{share:g} is no share in per cent")
            made["percentile"] = share
            keys.wish.became(keys.path(percentile), f"percentile: {share:g}")
        else:
            keys.wish.became(keys.path(percentile), "nothing: the method has none")


def type_of(word: str) -> str:
    """`int8` for QInt8, `QuantType.QInt8` and int8."""
    small = word.rpartition(".")[2].lower()
    return TYPES.get(small, small)
