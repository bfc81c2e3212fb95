"""Workflows of Olive: a model, systems to run on, data, evaluators, and passes in order, each of a type with options.

Options stand beside the type of a pass or under its `config`, and those of the engine at the top or under `engine`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from effc.errors import RecipeError
from effc.paths import shown
from effc.settings import ort
from effc.settings.keys import HINT, Keys, Wish

TARGETS = {
    "CPUExecutionProvider": "ort",
    "OpenVINOExecutionProvider": "openvino",
    "TensorrtExecutionProvider": "tensorrt",
    "NvTensorRTRTXExecutionProvider": "tensorrt",
}
"""Targets by what Olive calls an execution provider."""
ENGINE = (
    "evaluate_input_model", "output_dir", "packaging_config", "cache_config", "cache_dir", "clean_cache",
    "clean_evaluation_cache", "enable_shared_cache", "log_severity_level", "ort_log_severity_level",
    "ort_py_log_severity_level", "log_to_file", "plot_pareto_frontier", "no_artifacts", "search_strategy", "evaluator",
    "host", "target", "output_name",
)  # fmt: skip
FIXED = "the command line says where; cache and log are effc's own"
CODE = "is code, and none is run; a factory of yours is a source: --model file.py:function"
FETCH = "effc fetches no data and no models: --calib FILE and --model name what lies here"
FUSED = "effc fuses in the graph, and the runtime when the file is opened"
SESSIONS = "sessions are set where the engine runs: docs/deploy.md"
WRITES = "effc traces the model and writes the ONNX itself"
SHARED = (
    "save_as_external_data",
    "all_tensors_to_one_file",
    "external_data_name",
    "size_threshold",
    "convert_attribute",
)
NAMES = ort.Names(
    weights="precision", activations="activation_type", activations_symmetric="activation_symmetric",
    weights_symmetric="weight_symmetric", format="quant_format", ops="op_types_to_quantize",
    ops_out="op_types_to_exclude", nodes="nodes_to_quantize", nodes_out="nodes_to_exclude",
)  # fmt: skip
OLD_WEIGHTS = "weight_type"


def read(keys: Keys, wish: Wish, *, target: str | None, mode: str | None) -> None:
    """Read settings into a wish."""
    _model(keys, wish)
    keys.drop("names the run", "workflow_id", "name")
    engine = keys.inner("engine")
    if engine is not None:
        keys.adopt(engine, *ENGINE)
        engine.close()
    wish.target = _system(keys, wish)
    passes = keys.take("passes", dict, {})
    chosen = target or wish.target
    used: list[str] = []
    for name, given in passes.items():
        several = given if isinstance(given, list) else [given]
        for number, entry in enumerate(several):
            place = f"passes.{name}[{number}]" if isinstance(given, list) else f"passes.{name}"
            if number:
                wish.lost(place, "another choice for a search: effc takes the first")
                continue
            used += _pass(entry, place, wish, chosen)
    _data(keys, wish, used)
    searched = "effc searches what to take back where its gate is not met, not among all options"
    keys.drop(searched, "search_strategy", "pass_flows", "auto_optimizer_config", lost=True)
    metrics = (
        "name the metric and its file in the recipe (metric:); the gate asks that it is not slower"
    )
    keys.drop(metrics, "evaluators", "evaluator", lost=True)
    keys.drop(FIXED, *ENGINE)
    keys.close()


def _open(value: Any, place: str, wish: Wish) -> Keys:
    """A component with its options beside the type, wherever they stand."""
    if not isinstance(value, dict):
        raise RecipeError(f"{place}: {shown(str(value))} is not a mapping", hint=HINT)
    keys = Keys(value, wish, place)
    inner = keys.inner("config")
    if inner is not None:
        keys.adopt(inner, *list(inner.left))
        inner.close("stands beside `config` too, and that holds")
    return keys


def _model(keys: Keys, wish: Wish) -> None:
    value = keys.left.pop("input_model", None)
    if value is None:
        return
    inner = _open(value, keys.path("input_model"), wish)
    kind = inner.take("type", str, "")
    wish.became(inner.path("type"), "effc sees itself what a model is")
    path = inner.left.pop("model_path", None)
    if isinstance(path, str):
        wish.model = path
        wish.became(
            inner.path("model_path"),
            "source, where it is a directory or file here; --model names another",
        )
    elif path is not None:
        wish.lost(inner.path("model_path"), f"effc opens directories and files here alone; {FETCH}")
    inner.drop(
        CODE,
        "model_script",
        "model_loader",
        "script_dir",
        "dummy_inputs_func",
        "model_attributes",
        lost=True,
    )
    inner.drop(
        f"{kind or 'the model'}: read from its directory",
        "task",
        "model_name",
        "hf_config",
        "load_kwargs",
    )
    inner.drop("effc takes inputs and outputs from the model", "io_config")
    inner.close()


def _system(keys: Keys, wish: Wish) -> str:
    """The target that the workflow's target system stands for."""
    systems = keys.take("systems", dict, {})
    wanted = keys.left.pop("target", None)
    found, told = "ort", keys.path("target")
    for name, value in systems.items():
        place = f"{keys.path('systems')}.{name}"
        inner = _open(value, place, wish)
        kind = inner.take("type", str, "")
        is_here = kind.lower() in ("localsystem", "")
        wish.became(inner.path("type"), "effc compiles where it is started", is_lost=not is_here)
        there = inner.path("accelerators")
        accelerators = inner.take("accelerators", list, [])
        for number in range(len(accelerators)):
            device = "device and memory are those of the machine that effc runs on"
            wish.became(
                f"{there}[{number}]", "another device" if number else device, is_lost=number > 0
            )
        first = accelerators[0] if accelerators and isinstance(accelerators[0], dict) else {}
        providers = first.get("execution_providers")
        providers = providers if isinstance(providers, list) else []
        names = [str(p[0]) if isinstance(p, list) and p else str(p) for p in providers]
        if names:
            where = f"{there}[0].execution_providers"
            is_wanted = wanted in (None, name) or wanted == value
            known = TARGETS.get(names[0])
            found = (known or "onnx") if is_wanted else found
            if known is None:
                why = "effc has no target of that name; `onnx` is plain ONNX with quantise nodes, which it may read"
                wish.lost(where, f"{names[0]}: {why}")
            else:
                wish.became(where, f"targets: [{known}]")
        inner.drop(
            "of a machine or environment elsewhere, which effc does not start",
            *inner.left,
            lost=True,
        )
    if wanted is not None:
        wish.became(told, f"targets: [{found}]")
    return found


def _pass(entry: Any, place: str, wish: Wish, target: str) -> list[str]:
    """Read one pass; gives the names of data that it is calibrated on."""
    keys = _open(entry, place, wish)
    kind = keys.take("type", str, "")
    keys.drop(
        "passes run here", "host", "evaluator", "output_name", "disable_search", "clean_run_cache"
    )
    keys.drop("weights above 256 MiB lie in one file beside the graph", *SHARED)
    data = keys.left.pop("data_config", None)
    if data is not None:
        name = data if isinstance(data, str) else ""
        wish.became(keys.path("data_config"), "calib", is_lost=not name)
    reader = READERS.get(kind.lower())
    if reader is None:
        why = OTHERS.get(kind.lower(), "effc has no such pass")
        is_harmless = why in (WRITES, FUSED)
        wish.rounds = wish.rounds or "quant" in kind.lower() or "awq" in kind.lower()
        wish.became(keys.path("type"), f"{kind}: {why}", is_lost=not is_harmless)
        keys.drop(f"an option of {kind}", *keys.left, lost=True)
        return []
    reader(keys, wish, target, kind)
    keys.close()
    return [data] if isinstance(data, str) else []


def _onnx(keys: Keys, wish: Wish, target: str, kind: str) -> None:
    wish.rounds = True
    mode = keys.take("quant_mode", str, "dynamic" if "dynamic" in kind.lower() else "static")
    is_static = mode != "dynamic"
    told = (
        "ranges measured on samples"
        if is_static
        else "a scale for every row, found as it runs, where the target has that"
    )
    wish.became([keys.path("type"), *keys.there("quant_mode")], f"quantize: {told}")
    if OLD_WEIGHTS in keys.left and "precision" not in keys.left:
        keys.move(keys, OLD_WEIGHTS, "precision")
    keys.drop("effc folds and shapes the graph itself", "quant_preprocess", "prepare_qdq_config")
    smooth = _extra(keys, wish)
    made = ort.quantize(keys, NAMES, is_static=is_static, target=target)
    if made is None:
        keys.drop("nothing is quantised", *keys.left, lost=True)
        return
    ort.ranges(keys, made, method="calibrate_method")
    keys.drop("effc calibrates the model in torch", "calibration_providers")
    keys.drop(
        "effc has no ranges or types of single tensors",
        "tensor_quant_overrides",
        "min_real_range",
        lost=True,
    )
    if smooth:
        wish.passes.append({"pass": "smooth"})
    wish.passes.append(made)


def _extra(keys: Keys, wish: Wish) -> bool:
    """Whether the further options of onnxruntime's quantiser ask for SmoothQuant; all others are named."""
    extra = keys.inner("extra_options")
    if extra is None:
        return False
    for key, own in (
        ("WeightSymmetric", "weight_symmetric"),
        ("ActivationSymmetric", "activation_symmetric"),
    ):
        if key in extra.left and own not in keys.left:
            keys.move(extra, key, own)
    smooth: bool = extra.take("SmoothQuant", bool, False)
    if smooth:
        wish.became(extra.path("SmoothQuant"), "the pass smooth")
    extra.drop(
        "chosen for every value by the error that is expected",
        "SmoothQuantAlpha",
        "SmoothQuantFolding",
        lost=True,
    )
    extra.drop(ort.EXACT, "CalibMovingAverage", "CalibMovingAverageConstant", lost=True)
    extra.close("an option of onnxruntime's quantiser that effc has not")
    return smooth


GROUP = ("group_size", "q_group_size", "block_size")
SYMMETRIC = ("sym", "is_symmetric")


def _weights(keys: Keys, wish: Wish, target: str, kind: str) -> None:
    """Weights alone, in groups: GPTQ, AWQ, and those that round to the nearest."""
    wish.rounds = True
    small = kind.lower()
    bits = keys.take("bits", int, 4)
    wish.became(keys.path("type"), f"{kind}: quantize with activation_bits: 16")
    if bits not in range(3, 9):
        wish.lost(keys.path("bits"), f"effc has weights of 3 to 8 bit, not of {bits}")
        keys.drop("nothing is quantised", *keys.left, lost=True)
        return
    wish.became(keys.there("bits"), f"bits: {bits}")
    made: dict[str, Any] = {"pass": "quantize", "bits": bits, "activation_bits": 16}
    size = next((keys.take(k, int) for k in GROUP if k in keys.left), None)
    size = (32 if "kquant" in small else 128) if size is None else size
    wish.became(
        keys.there(*GROUP),
        f"group: {size}" if size > 0 else "a scale for every output channel",
    )
    if size > 0:
        made["group"] = size
    symmetric = next((keys.take(k, bool) for k in SYMMETRIC if k in keys.left), None)
    zero = keys.take("zero_point", bool)
    if zero is not None or "awq" in small:
        symmetric = not (True if zero is None else zero)
    symmetric = "blockwisertn" in small if symmetric is None else symmetric
    if not symmetric and target == "tensorrt":
        wish.lost(
            keys.there("sym", "is_symmetric", "zero_point") or keys.path("type"),
            "tensorrt takes no weights with a zero point: a grid around 0",
        )
    elif not symmetric:
        made["weight_symmetric"] = False
    wish.became(
        keys.there("sym", "is_symmetric", "zero_point"),
        f"weight_symmetric: {str('weight_symmetric' not in made).lower()}",
    )
    if "gptq" in small:
        made["rounding"] = "gptq"
        damping = keys.take("damp_percent", float, 0.01)
        if damping == 0.01:
            wish.became(keys.there("damp_percent"), "0.01, as in the paper")
        else:
            wish.lost(keys.there("damp_percent"), f"{damping}: effc has 0.01")
        order = (
            "columns with the largest inputs go first, and scales are those of the weight as it was"
        )
        keys.drop(order, "desc_act", "static_groups")
        keys.drop(
            "effc measures all layers in one run over the samples", "true_sequential", lost=True
        )
    if "hqq" in small or "kquant" in small:
        made["weight_range"] = "mse"
        wish.lost(
            keys.path("type"),
            f"{kind} chooses scales in a way of its own; here by the least squared error",
        )
    if "awq" in small:
        grid = {k: v for k, v in made.items() if k in ("bits", "group", "weight_symmetric")}
        wish.passes.append({"pass": "awq", "group": None, **grid})
        wish.became(keys.path("type"), "the pass awq in front of it")
    if not small.startswith("onnx"):  # those of torch leave tables and the output layer alone
        made["ops"] = ["linear"]
        keys.left.setdefault("lm_head", False)
        wish.became(keys.path("type"), "ops: linear")
    out = _outside(keys, wish)
    if out:
        made["select"] = {"exclude": out}
        if wish.passes and wish.passes[-1]["pass"] == "awq":
            wish.passes[-1]["select"] = {"exclude": out}
    keys.drop(
        "activations are rounded to 8 bit in blocks as it runs (level 4)",
        "accuracy_level",
        lost=keys.left.get("accuracy_level") not in (None, 0, 4, "int8"),
    )
    keys.drop("blocks lie along the axis that is summed over", "axis")
    keys.drop(
        "effc knows the layers of a model from its graph",
        "layers_block_name",
        "outside_layer_modules",
        "inside_layer_modules",
    )
    keys.drop(
        "the kernel is the target's",
        "version",
        "duo_scaling",
        "export_compatible",
        "input_model_dtype",
        "fuse_layers",
        lost=True,
    )
    keys.drop(
        "other formats of single modules: write a quantize of its own with select",
        "overrides",
        lost=True,
    )
    wish.passes.append(made)


def _outside(keys: Keys, wish: Wish) -> list[str]:
    """Modules whose weights stay in float."""
    out = ort.modules(keys, "nodes_to_exclude") if "nodes_to_exclude" in keys.left else []
    if "modules_to_not_convert" in keys.left:
        out += [f"*{word}*" for word in keys.words("modules_to_not_convert") or ()]
        wish.became(keys.path("modules_to_not_convert"), "select.exclude")
    if "nodes_to_include" in keys.left:
        keys.drop("name modules in select", "nodes_to_include", lost=True)
    if "lm_head" in keys.left or "exclude_lm_head" in keys.left:
        with_head = keys.take("lm_head", bool, False)
        without = keys.take("exclude_lm_head", bool)
        with_head = with_head or without is False
        wish.became(
            keys.there("lm_head", "exclude_lm_head") or keys.path("type"),
            "with the output layer" if with_head else "select.exclude: lm_head",
        )
        out += [] if with_head else ["lm_head"]
    keys.drop("tables that are looked up have 8 bit", "embeds", lost=True)
    return out


def _half(keys: Keys, wish: Wish, target: str, kind: str) -> None:
    wish.passes.append({"pass": "mixed-precision", "dtype": "fp16"})
    wish.became(keys.path("type"), "mixed-precision in fp16; on a CPU smaller and not faster")
    keys.drop(
        "inputs and outputs keep their types",
        "keep_io_types",
        lost=keys.left.get("keep_io_types") is False,
    )
    keys.drop(
        "effc chooses itself what stays in float32; select names modules", *keys.left, lost=True
    )


def _builder(keys: Keys, wish: Wish, target: str, kind: str) -> None:
    word = keys.take("precision", str, "fp32").lower()
    wish.became(keys.path("type"), WRITES)
    if word in ("int4", "uint4"):
        wish.rounds = True
        size = keys.take("int4_block_size", int, 32)
        made: dict[str, Any] = {"pass": "quantize", "bits": 4, "activation_bits": 16, "group": size}
        made["ops"] = ["linear"]
        if keys.take("int4_is_symmetric", bool, True) is False:
            made["weight_symmetric"] = False
        wish.became(
            keys.there("precision", "int4_block_size", "int4_is_symmetric"),
            f"bits: 4, group: {size}, ops: linear",
        )
        wish.passes.append(made)
    elif word in ("fp16", "bf16"):
        wish.passes.append({"pass": "mixed-precision", "dtype": word})
        wish.became(keys.path("precision"), f"mixed-precision in {word}")
    elif word != "fp32":
        wish.rounds = True
        wish.lost(keys.path("precision"), f"effc has no {word} for a whole model")
    keys.drop("an option of onnxruntime-genai's model builder", *keys.left, lost=True)


def _openvino(keys: Keys, wish: Wish, target: str, kind: str) -> None:
    wish.rounds = True
    wish.passes += [{"pass": "smooth"}, {"pass": "quantize"}]
    wish.became(keys.path("type"), "smooth and quantize: int8 with ranges measured on samples")
    preset = keys.take("preset", str)
    wish.became(
        keys.paths("preset"),
        "int8 without a zero point, as the target has it",
        is_lost=preset == "MIXED",
    )
    keys.drop("effc sees the layers itself", "model_type", "target_device")
    keys.drop(
        "the gate asks it of the metric: gate: {metric: {max_drop: N}}",
        "max_drop",
        "drop_type",
        lost=True,
    )
    keys.drop(CODE, "transform_fn", "validation_func", "user_script", "script_dir", lost=True)
    keys.drop("name modules in select", "ignored_scope", "ignored_scope_type", lost=True)
    keys.drop("an option of NNCF that effc has not", "extra_configs", "reuse_cache", lost=True)


Reader = Callable[[Keys, Wish, str, str], None]
READERS: dict[str, Reader] = {
    **dict.fromkeys(("onnxquantization", "onnxstaticquantization", "onnxdynamicquantization"), _onnx),
    **dict.fromkeys(
        (
            "gptq", "gptqquantizer", "gptqmodel", "autoawqquantizer", "rtn", "kquant", "onnxblockwisertnquantization",
            "onnxhqqquantization", "onnxkquantquantization",
        ),
        _weights,
    ),
    "onnxfloattofloat16": _half,
    "ortmixedprecision": _half,
    "modelbuilder": _builder,
    "openvinoquantization": _openvino,
    "openvinoquantizationwithaccuracy": _openvino,
}  # fmt: skip
OTHERS = {
    **dict.fromkeys(("onnxconversion", "optimumconversion", "onnxopversionconversion", "openvinoconversion"), WRITES),
    "orttransformersoptimization": FUSED,
    "onnxpeepholeoptimizer": FUSED,
    "onnxquantizationpreprocess": FUSED,
    "onnxscriptfusion": FUSED,
    "ortsessionparamstuning": SESSIONS,
    "ortperftuning": SESSIONS,
    **dict.fromkeys(
        ("lora", "qlora", "dora", "loha", "lokr", "loftq"), "train the adapter elsewhere, and name it in attach-lora"
    ),
    **dict.fromkeys(("quarot", "spinquant"), "effc has no rotations for rounding"),
    "slicegpt": "pca-rotate and prune-dims slice a model too; their options are others",
    "sparsegpt": "effc takes units out (prune-dims), not single weights",
    "onnxbnb4quantization": "effc has no codes of 4 bit that are no integers (NF4, FP4)",
}  # fmt: skip


def _data(keys: Keys, wish: Wish, used: list[str]) -> None:
    """Samples, where a data config that a pass names is of a file that effc reads."""
    configs = (
        keys.take("data_configs", list, [])
        if not isinstance(keys.left.get("data_configs"), dict)
        else [
            {"name": name, **(value if isinstance(value, dict) else {})}
            for name, value in keys.take("data_configs", dict).items()
        ]
    )
    for number, value in enumerate(configs):
        inner = _open(value, f"{keys.path('data_configs')}[{number}]", wish)
        name = inner.take("name", str, "")
        if name not in used:
            wish.lost(inner.path("name"), f"{shown(name)}: no pass is calibrated on it")
            inner.drop("no pass is calibrated on it", *inner.left, lost=True)
            continue
        wish.became(inner.path("name"), "calib")
        inner.drop("effc makes inputs of samples itself", "type", "post_process_data_config")
        inner.drop(CODE, "user_script", "script_dir", lost=True)
        for part in ("load_dataset_config", "pre_process_data_config", "dataloader_config"):
            if (section := inner.inner(part)) is not None:
                _part(section, wish)
        inner.close()


def _part(keys: Keys, wish: Wish) -> None:
    params = keys.inner("params")
    if params is not None:
        keys.adopt(params, *list(params.left))
        params.close()
    keys.drop("effc reads files itself", "type")
    file = keys.left.pop("data_files", None)
    if isinstance(file, str):
        wish.calib["file"] = file
        wish.became(keys.path("data_files"), "calib.file, where it is here; --calib names another")
    elif file is not None:
        wish.lost(keys.path("data_files"), "effc reads one file")
    for key, word in (
        ("max_samples", "samples"),
        ("limit", "samples"),
        ("batch_size", "batch"),
        ("max_seq_len", "max_length"),
        ("max_length", "max_length"),
        ("source_max_len", "max_length"),
    ):
        count = keys.take(key, int)
        if count is not None and count > 0:
            wish.calib[word] = count
            wish.became(keys.path(key), f"calib.{word}: {count}")
        elif count is not None:
            wish.lost(keys.path(key), f"{count}: effc takes 1 and more")
    columns = keys.words("input_cols") if isinstance(keys.left.get("input_cols"), list) else None
    if columns:
        wish.calib["column"] = columns[0]
        wish.became(
            keys.path("input_cols"), f"calib.column: {columns[0]}", is_lost=len(columns) > 1
        )
    keys.drop(FETCH, "data_name", "subset", "split", "data_dir", "trust_remote_code", lost=True)
    keys.drop(
        "effc makes inputs of samples itself",
        "padding",
        "truncation",
        "model_name",
        "task",
        lost=True,
    )
    keys.drop("calibration needs no labels", "label_col", "label_cols")
    keys.close()
