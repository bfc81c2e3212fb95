"""Recipes of NVIDIA's ModelOpt: quantisers by shell patterns, each with bits, axis or blocks, and a calibration.

    quant_cfg                      quantizer_name: "*mlp*weight_quantizer", cfg: {num_bits: 4, block_sizes: {-1: 128}}
    algorithm                      max, mse, smoothquant, awq_lite, gptq, …

Later entries win. Those for everything become one `quantize`; a pattern with another format becomes one of its own in
front of it, and one that turns weights off is excluded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from effc.errors import RecipeError
from effc.paths import shown
from effc.settings.keys import HINT, Keys, Wish

LAYERS = {
    "nn.Linear": "linear",
    "nn.Conv1d": "conv1d",
    "nn.Conv2d": "conv2d",
    "nn.Embedding": "embedding",
}
NEVER = "effc quantises no such layer"
NUMERICS: dict[str, dict[Any, Any]] = {
    "int8": {"num_bits": 8, "axis": None},
    "int8_per_channel": {"num_bits": 8, "axis": 0},
    "int4_per_block": {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}},
    "fp8": {"num_bits": "e4m3", "axis": None},
}
"""What ModelOpt's own `configs/numerics/NAME` say; others of them are formats that effc has not."""
NO_FORMAT = "effc has no such format: integers of 3 to 8 bit and fp8 (e4m3)"
NO_IMPORT = "effc does not know what it imports"
OTHERS = ("nvfp4", "mxfp4", "mxfp6", "mxfp8", "mxint8")
UNITS: dict[str, list[dict[str, Any]]] = {
    "base_disable_all": [{"quantizer_name": "*", "enable": False}],
    "w8a8_fp8_fp8": [
        {"quantizer_name": "*weight_quantizer", "cfg": NUMERICS["fp8"]},
        {"quantizer_name": "*input_quantizer", "cfg": NUMERICS["fp8"]},
    ],
    "kv_fp8": [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": NUMERICS["fp8"]}],
    "kv_fp8_cast": [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": NUMERICS["fp8"]}],
    "default_disabled_quantizers": [
        *(
            {"quantizer_name": name, "enable": False}
            for name in (
                "*block_sparse_moe.gate*", "*lm_head*", "*mlp.gate.*", "*mlp.shared_expert_gate.*", "*output_layer*",
                "*proj_out.*", "*router*", "mtp.*", "output.*", "*embed_vision*", "*vision_tower*", "*visual*",
                "*vision_model*", "*multi_modal_projector*", "*linear_attn.conv1d*", "*self_attention.conv1d*",
                "*linear_attn.in_proj_a*", "*linear_attn.in_proj_b*", "*mixer.conv1d*",
            )
        ),
        {"parent_class": "nn.Embedding", "quantizer_name": "*", "enable": False},
    ],
}  # fmt: skip
"""What its `configs/ptq/units/NAME` say, as far as effc has such layers."""
KINDS = ("weight_quantizer", "input_quantizer", "output_quantizer")
MOST_ENTRIES = 1000


@dataclass(kw_only=True)
class Format:
    """How one side of the products of some modules is rounded: integers of `bits`, in blocks, or fp8."""

    bits: int = 8
    is_fp8: bool = False
    block: int | None = None
    is_dynamic: bool = False
    of_tokens: bool = False


@dataclass(kw_only=True)
class State:
    """What the entries so far make of the modules of a pattern; None is in float."""

    weight: Format | None = None
    input: Format | None = None
    at: int = 0
    """The place of the last entry that named the pattern."""
    is_named: bool = False


@dataclass(kw_only=True)
class Layers:
    """What all entries ask for: by pattern of modules, and by class of layer."""

    states: dict[str, State] = field(default_factory=lambda: {"*": State()})
    off: set[str] = field(default_factory=set)
    cache: Format | None = None


def read(keys: Keys, wish: Wish, *, target: str | None, mode: str | None) -> None:
    """Read settings into a wish. Raises RecipeError for a recipe that does something else than quantise."""
    about = keys.inner("metadata")
    if about is not None:
        kind = about.take("recipe_type", str, "ptq")
        if kind != "ptq":
            raise RecipeError(
                f"metadata.recipe_type: {shown(kind)} is not post-training quantisation",
                hint="ModelOpt does it itself; a recipe of effc prunes, tunes and quantises: docs/recipes.md",
            )
        wish.became(about.path("recipe_type"), "passes")
        about.drop("says what the recipe is for", "description")
        about.close()
    wish.target = "tensorrt"
    imports = keys.take("imports", dict, {})
    wish.became(
        [f"imports.{name}" for name in imports], "what they stand for where $import names them"
    )
    section = keys.inner("quantize")
    inner = section if section is not None else keys
    layers = Layers()
    _entries(inner, wish, layers, {str(k): v for k, v in imports.items()})
    how = _algorithm(inner, wish)
    inner.drop("says what a search counts", "effective_bits", lost=True)
    if section is not None:
        section.close()
    _passes(wish, layers, how, target or wish.target)


def _entries(keys: Keys, wish: Wish, layers: Layers, imports: Mapping[str, Any]) -> None:
    found = keys.left.pop("quant_cfg", None)
    path = keys.path("quant_cfg")
    if isinstance(found, dict):  # as it was written until 0.40: by pattern
        first = sorted(found.items(), key=lambda item: item[0] != "default")
        found = [_old(name, value) for name, value in first]
    if not isinstance(found, list) or not found:
        whole = "$import" in keys.left
        hint = (
            "write out what $import stands for: effc has not ModelOpt's own files"
            if whole
            else HINT
        )
        raise RecipeError(f"{path}: is no list of quantisers", hint=hint)
    entries: list[tuple[str, Any]] = []
    for number, entry in enumerate(found):
        if isinstance(entry, dict) and "$import" in entry:
            name = _imported(entry["$import"], imports)
            if len(entry) > 1 or name not in UNITS:
                why = NO_FORMAT if _is_other(name) else f"{NO_IMPORT}; write its entries out"
                wish.lost(f"{path}[{number}].$import", f"{shown(str(entry['$import']))}: {why}")
                wish.rounds = True
                continue
            wish.became(f"{path}[{number}].$import", f"the entries of {name}")
            entries += [("", unit) for unit in UNITS[name]]
        else:
            entries.append((f"{path}[{number}]", entry))
    if len(entries) > MOST_ENTRIES:
        raise RecipeError(f"{path}: has more than {MOST_ENTRIES} entries", hint=HINT)
    for number, (place, entry) in enumerate(entries):
        if not isinstance(entry, dict):
            raise RecipeError(f"{place}: {shown(str(entry))} is not a mapping", hint=HINT)
        # entries of ModelOpt's own units are told of by the unit's name
        _entry(Keys(entry, wish if place else Wish(), place), layers, imports, number)


def _old(name: Any, value: Any) -> Any:
    """An entry of the older mapping, `"*weight_quantizer": {…}` or `"nn.BatchNorm1d": {"*": {…}}`."""
    if name == "default":
        return {"quantizer_name": "*", **_split(value)}
    if isinstance(value, dict) and isinstance(inner := value.get("*"), dict):
        return {"parent_class": name, "quantizer_name": "*", **_split(inner)}
    return {"quantizer_name": name, **_split(value)}


def _split(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"cfg": value}
    rest = {k: v for k, v in value.items() if k != "enable"}
    switch = {"enable": value["enable"]} if "enable" in value else {}
    return {**({"cfg": rest} if rest else {}), **switch}


def _imported(value: Any, imports: Mapping[str, Any]) -> str:
    """The last name of what an import stands for, which is how ModelOpt's own files are told."""
    text = str(imports.get(str(value), value))
    return text.removesuffix(".yaml").removesuffix(".yml").rpartition("/")[2]


def _is_other(name: str) -> bool:
    return any(word in name for word in OTHERS)


def _entry(keys: Keys, layers: Layers, imports: Mapping[str, Any], number: int) -> None:
    wish, path = keys.wish, keys.place
    name, parent = keys.take("quantizer_name", str, "*"), keys.take("parent_class", str)
    is_on, cfg = keys.take("enable", bool, True), keys.left.pop("cfg", None)
    format_, is_known = _format(cfg, keys, imports) if is_on and cfg else (None, True)
    keys.close()
    if parent is not None:
        _class(wish, path, layers, parent, is_on=is_on, has_cfg=bool(cfg))
        return
    module, kind = _pattern(name)
    if kind == "cache":
        if format_ is not None:
            layers.cache = format_
        wish.became(
            path, f"{name}: the cache of keys and values{'' if is_on else ' stays in float'}"
        )
        return
    if kind in ("output_quantizer", "other") and is_on:
        wish.lost(path, f"{name}: effc rounds weights and what layers read, nothing else")
        return
    if is_on and cfg and not is_known:
        wish.rounds = True
    state = layers.states.setdefault(module, _copied(layers.states["*"]))
    everything = list(layers.states.values()) if module == "*" else [state]
    for one in everything:
        if kind in ("weight_quantizer", "all") and (cfg or not is_on):
            one.weight = format_ if is_on else None
        if kind in ("input_quantizer", "all") and (cfg or not is_on):
            one.input = format_ if is_on else None
    state.at, state.is_named = number, True
    if not cfg and is_on:
        wish.lost(
            path, f"{name}: turned on again, and effc does not know what it was; write its cfg"
        )
        return
    side = {"weight_quantizer": "weights", "input_quantizer": "what layers read", "all": "all"}.get(
        kind, kind
    )
    place = "everywhere" if module == "*" else f"in modules {module}"
    wish.became(path, f"{side} {place}: {_told(format_) if is_on and is_known else 'in float'}")


def _told(made: Format | None) -> str:
    if made is None:
        return "in float"
    word = "fp8" if made.is_fp8 else f"{made.bits} bit"
    return f"{word} in blocks of {made.block}" if made.block else word


def _copied(state: State) -> State:
    return State(weight=state.weight, input=state.input)


def _pattern(name: str) -> tuple[str, str]:
    """The pattern of modules in a pattern of quantisers, and which quantisers of theirs."""
    if "bmm_quantizer" in name:
        return "*", "cache" if "[kv]" in name or "k_bmm" in name or "v_bmm" in name else "other"
    for kind in KINDS:
        if name.endswith(kind):
            module = name.removesuffix(kind)
            return (module if module.endswith("*") else module.removesuffix(".")) or "*", kind
    return name, "other" if name.endswith("_quantizer") else "all"


def _class(
    wish: Wish, path: str, layers: Layers, parent: str, *, is_on: bool, has_cfg: bool
) -> None:
    op = LAYERS.get(parent)
    if op is None:
        wish.became(path, f"{parent}: {NEVER}", is_lost=is_on)
    elif is_on:
        why = "effc rounds layers of one class as all others" if has_cfg else "is on by itself"
        wish.became(path, f"{parent}: {why}", is_lost=has_cfg)
        wish.rounds = wish.rounds or has_cfg
    else:
        layers.off.add(op)
        wish.became(path, f"ops: without {op}")


def _format(cfg: Any, keys: Keys, imports: Mapping[str, Any]) -> tuple[Format | None, bool]:
    """How a quantiser rounds, and whether effc has that; what it has not is named."""
    wish = keys.wish
    if isinstance(cfg, list):
        wish.lost(keys.path("cfg"), "formats one after the other: effc rounds to one")
        return None, False
    if not isinstance(cfg, dict):
        raise keys.error("cfg", f"{shown(str(cfg))} is not a mapping")
    if "$import" in cfg:
        name = _imported(cfg["$import"], imports)
        if name not in NUMERICS:
            why = NO_FORMAT if _is_other(name) else NO_IMPORT
            wish.lost(keys.path("cfg.$import"), f"{shown(name)}: {why}")
            return None, False
        wish.became(keys.path("cfg.$import"), f"the format {name}")
        cfg = {**NUMERICS[name], **{k: v for k, v in cfg.items() if k != "$import"}}
    inner = Keys(cfg, wish, keys.path("cfg"))
    made, bits = Format(), inner.left.pop("num_bits", 8)
    is_known = _bits(made, bits, inner)
    is_known = _blocks(made, inner) and is_known
    kind = inner.take("type", str, "static")
    if kind == "dynamic":
        made.is_dynamic = True
    wish.became(inner.paths(*({"type"} & {*cfg})), f"{kind} ranges")
    if "axis" in inner.left:
        axis = inner.left.pop("axis")
        finer = "every output channel of a weight has a scale, and what layers read has one"
        wish.became(inner.path("axis"), finer, is_lost=axis not in (None, 0))
    calibrator = inner.left.pop("calibrator", None)
    if calibrator is not None:
        what = (
            "exact ends"
            if calibrator == "max"
            else "effc has no such calibrator; ranges as algorithm says"
        )
        wish.became(inner.path("calibrator"), what, is_lost=calibrator != "max")
    if inner.left.get("unsigned") is True:
        inner.drop("a grid around 0, with a sign", "unsigned", lost=True)
    inner.drop("as effc does", "unsigned", "enable", "fake_quant")
    inner.drop(
        "the code at the far end is used where the target's kernels take it",
        "narrow_range",
        lost=True,
    )
    inner.drop("the graph says what stays in float", "trt_high_precision_dtype", lost=True)
    inner.drop("is of training", "pass_through_bwd", "learn_amax", lost=True)
    inner.drop("says what a search counts", "effective_bits", lost=True)
    inner.close()
    return (made if is_known else None), is_known


def _bits(made: Format, bits: Any, keys: Keys) -> bool:
    text = str(bits).replace(" ", "").strip("()[]")
    if isinstance(bits, int) and not isinstance(bits, bool):
        made.bits = bits
        if bits in range(3, 9):
            keys.wish.became(keys.path("num_bits"), f"bits: {bits}")
            return True
    elif text in ("e4m3", "4,3"):
        made.is_fp8 = True
        keys.wish.became(keys.path("num_bits"), "dtype: fp8")
        return True
    keys.wish.lost(
        keys.path("num_bits"),
        f"effc has no numbers of {text[:20]}: integers of 3 to 8 bit and fp8 (e4m3)",
    )
    return False


def _blocks(made: Format, keys: Keys) -> bool:
    """Blocks along the last axis; others, and scales that are rounded themselves, effc has not."""
    sizes = keys.inner("block_sizes")
    if sizes is None:
        return True
    along = {k: sizes.left.pop(k) for k in list(sizes.left) if k.lstrip("-").isdigit()}
    is_known = list(along) == ["-1"] and (along["-1"] is None or isinstance(along["-1"], int))
    if is_known:
        made.block, made.of_tokens = along["-1"], along["-1"] is None
        if made.block is not None and made.block < 1:
            raise sizes.error("-1", f"{made.block} is no size")
        told = "a scale for every row" if made.block is None else f"group: {made.block}"
        sizes.wish.became(sizes.path("-1"), told)
    else:
        sizes.wish.lost(sizes.paths(*along), "effc has blocks along the last axis alone")
    if sizes.take("type", str, "static") == "dynamic" and not made.of_tokens:
        sizes.wish.lost(sizes.path("type"), "effc has no blocks whose scales are found as it runs")
        is_known = False
    else:
        sizes.wish.became(sizes.path("type"), "as the scales are")
    if sizes.left.get("scale_bits") is not None:
        sizes.drop("effc rounds no scales", "scale_bits", "scale_block_sizes", lost=True)
        is_known = False
    sizes.close()
    return is_known


def _algorithm(keys: Keys, wish: Wish) -> dict[str, Any]:
    """What the calibration makes of passes: options for `quantize`, and whether `smooth` or `awq` go in front."""
    found = keys.left.pop("algorithm", None)
    path = keys.path("algorithm")
    if isinstance(found, list):
        if len(found) > 1:
            wish.lost(path, "effc takes the first of several algorithms")
        found = found[0] if found else None
    inner = Keys(found, wish, path) if isinstance(found, dict) else None
    method = inner.take("method", str) if inner is not None else found
    if method is not None and not isinstance(method, str):
        raise keys.error("algorithm", f"{shown(str(method))} is no name")
    where = inner.path("method") if inner is not None else path
    made: dict[str, Any] = {"range": "minmax"}
    if method in (None, "max"):
        wish.became(where, "range: minmax")
    elif method == "mse":
        made["weight_range"] = "mse"
        wish.became(where, "weight_range: mse, and range: minmax")
    elif method == "smoothquant":
        made["smooth"] = True
        wish.became(where, "the pass smooth, and range: minmax")
    elif method in ("awq_lite", "awq_clip", "awq_full"):
        made["awq"] = method != "awq_clip"
        if method != "awq_lite":
            made["weight_range"] = "mse"
        more = (
            ""
            if method == "awq_lite"
            else "; weights are cut by weight_range: mse, not by what outputs lose"
        )
        wish.became(
            where, f"{'the pass awq' if made['awq'] else 'ranges'}{more}", is_lost=bool(more)
        )
    elif method == "gptq":
        made["rounding"] = "gptq"
        wish.became(where, "rounding: gptq")
    else:
        wish.lost(where, f"effc has no {shown(method)}; range: minmax")
    if inner is not None:
        inner.drop(
            "chosen for every value by the error that is expected", "alpha", "alpha_step", lost=True
        )
        damping = inner.take("perc_damp", float)
        if damping is not None:
            wish.became(inner.path("perc_damp"), "0.01, as in the paper", is_lost=damping != 0.01)
        inner.drop("128 columns at once, which changes no code", "block_size")
        layerwise = "effc measures all layers in one run over the samples, of the model in float"
        inner.drop(layerwise, "layerwise", "use_sequential", "sequential", lost=True)
        inner.drop(
            "is of several processes", "distributed_sync", "sync_expert_weight_amax", lost=True
        )
        inner.close()
    return made


def _passes(wish: Wish, layers: Layers, how: dict[str, Any], target: str) -> None:
    """One `quantize` for every format, patterns that came last first, and what goes in front of all of them."""
    if layers.cache is not None:
        if layers.cache.is_fp8 or layers.cache.bits != 8:
            wish.lost(
                "quant_cfg",
                "a cache of keys and values has integers of 8 bit in effc (quantize-cache), no other codes",
            )
        elif target in ("ort", "openvino", "onnx"):
            wish.passes.append({"pass": "quantize-cache"})
        else:
            wish.lost("quant_cfg", f"target {target} takes no cache of integers")
    everything = layers.states.pop("*")
    if "embedding" not in layers.off:
        wish.became(
            "quant_cfg", "tables that are looked up stay in float, as ModelOpt's defaults have it"
        )
    named = sorted(layers.states.items(), key=lambda item: -item[1].at)
    wish.rounds = wish.rounds or any(
        s.weight or s.input for s in (everything, *(s for _, s in named))
    )
    behind: list[str] = []
    made: list[dict[str, Any]] = []
    for pattern, state in named:
        if state.weight is None:
            behind += _modules(pattern)
        elif (state.weight, state.input) != (everything.weight, everything.input):
            made += _of(wish, state, how, target, layers.off, _modules(pattern), behind)
    if everything.weight is not None:
        made += _of(wish, everything, how, target, layers.off, [], behind)
    elif everything.input is not None:
        wish.lost("quant_cfg", "what layers read is rounded beside weights alone")
    if how.get("smooth") and made and all(p.get("activation_bits") != 16 for p in made):
        made.insert(0, {"pass": "smooth"})
    wish.passes += made


def _modules(pattern: str) -> list[str]:
    """Patterns of the paths of modules: `*mlp.gate.*` means what is inside of it, and the layer itself."""
    return [pattern.removesuffix(".*"), pattern] if pattern.endswith(".*") else [pattern]


def _of(
    wish: Wish,
    state: State,
    how: dict[str, Any],
    target: str,
    off: set[str],
    modules: list[str],
    out: list[str],
) -> list[dict[str, Any]]:
    """The passes for one format of weights and of what layers read."""
    weight, read = state.weight, state.input
    assert weight is not None
    select: dict[str, Any] = {
        **({"module": modules} if modules else {}),
        **({"exclude": out[:]} if out else {}),
    }
    common: dict[str, Any] = {"select": select} if select else {}
    ops = [op for op in ("linear", "conv1d", "conv2d") if op not in off]
    made: dict[str, Any] = {"pass": "quantize", "ops": ops, **common}
    if weight.is_fp8:
        if read is None or not read.is_fp8 or read.is_dynamic:
            wish.lost(
                "quant_cfg",
                "fp8 is on both sides of a product in effc, with one range measured for what it reads",
            )
        if weight.block is not None:
            wish.lost("quant_cfg", "fp8 has no blocks in effc: every output channel has a scale")
        return [{**made, "dtype": "fp8", "range": "minmax"}]
    made["bits"] = weight.bits
    made |= {k: v for k, v in how.items() if k in ("weight_range", "rounding")}
    is_alone = read is None or read.is_fp8 or weight.block is not None
    if read is not None and is_alone:
        why = (
            "blocks of weights go with activations in float"
            if weight.block
            else "fp8 beside integers is in no kernel of effc's"
        )
        wish.lost("quant_cfg", f"{why}: activation_bits: 16")
    if is_alone:
        made["activation_bits"] = 16
        if weight.block:
            made["group"] = weight.block
    else:
        assert read is not None
        made |= {"activation_bits": read.bits, "range": how["range"]}
        if read.is_dynamic or read.of_tokens:
            _dynamic(wish, made, read, target)
    if not how.get("awq") or not is_alone:
        if how.get("awq"):
            wish.lost("algorithm", "the pass awq is for weights beside activations in float")
        return [made]
    grid = {"bits": weight.bits, "group": weight.block}
    return [{"pass": "awq", **grid, **common}, made]


def _dynamic(wish: Wish, made: dict[str, Any], read: Format, target: str) -> None:
    from effc.backends.dialect import DIALECTS

    if not DIALECTS[target].token_scales:
        wish.lost("quant_cfg", f"{target} finds no ranges as it runs: they are measured on samples")
        return
    del made["range"]
    made["activation_scale"] = "token"
    if not read.of_tokens:
        wish.lost(
            "quant_cfg",
            "a scale for every row as it runs (activation_scale: token), not one for all",
        )
