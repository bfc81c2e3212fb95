"""`ort_config.json` of optimum: an ORTConfig with the sections optimization and quantization, or the latter alone."""

from __future__ import annotations

from effc.backends.dialect import DIALECTS
from effc.settings import ort
from effc.settings.keys import Keys, Wish

NAMES = ort.Names(
    weights="weights_dtype", activations="activations_dtype", activations_symmetric="activations_symmetric",
    weights_symmetric="weights_symmetric", format="format", ops="operators_to_quantize", nodes="nodes_to_quantize",
    nodes_out="nodes_to_exclude",
)  # fmt: skip
FUSED = "effc fuses in the graph, and ONNX Runtime when the file is opened"
DATA = "effc fetches no data: --calib FILE names samples"
PAIRS = ("qdq_add_pair_to_weight", "qdq_dedicated_pair")


def read(keys: Keys, wish: Wish, *, target: str | None, mode: str | None) -> None:
    """Read settings into a wish."""
    keys.drop("effc writes the opset that the target's kernels are in", "opset", lost=True)
    keys.drop(
        "weights above 256 MiB lie in one file beside the graph",
        "use_external_data_format",
        "one_external_file",
    )
    keys.drop("says who wrote the settings", "optimum_version", "transformers_version")
    if (section := keys.inner("optimization")) is not None:
        _optimization(section, wish)
    calibration = keys.inner("calibration")
    is_plain = "is_static" in keys.left
    section = keys if is_plain else keys.inner("quantization")
    if section is not None:
        _quantization(section, wish, target, calibration)
        if not is_plain:
            section.close()
    elif calibration is not None:
        calibration.close("nothing is quantised")


def _quantization(keys: Keys, wish: Wish, target: str | None, calibration: Keys | None) -> None:
    wish.rounds = True
    is_tensorrt = all(keys.left.get(pair) is True for pair in PAIRS)
    wish.target = "tensorrt" if is_tensorrt else "ort"
    chosen = target or wish.target
    for pair in PAIRS:
        became = "weights are stored as codes behind one dequantise node, which every target takes"
        keys.told(pair, bool, became, lost=bool(keys.left.get(pair)) and chosen != "tensorrt")
    is_static = keys.take("is_static", bool, True)
    is_token = not is_static and DIALECTS[chosen].token_scales
    how = "activation_scale: token, a scale for every row as it runs, where ONNX Runtime has one for all"
    other = f"{chosen} finds no ranges as it runs: they are measured on samples"
    became = "ranges measured on samples" if is_static else how if is_token else other
    wish.became(keys.path("is_static"), became, is_lost=not (is_static or is_token))
    keys.drop("follows from is_static", "mode")
    made = ort.quantize(keys, NAMES, is_static=is_static, target=chosen)
    axes = keys.take("qdq_op_type_per_channel_support_to_axis", dict)
    if axes is not None:
        wish.became(
            keys.path("qdq_op_type_per_channel_support_to_axis"),
            "scales lie along the output channels of every layer",
            is_lost=axes != {"MatMul": 1},
        )
    if made is None:
        if calibration is not None:
            calibration.close("nothing is quantised")
        return
    wish.passes.append(made)
    if calibration is not None:
        _calibration(calibration, wish, made, is_static)
    elif is_static:
        wish.became(
            keys.path("is_static"), f"no calibration method stands in the settings; {ort.OWN_RANGE}"
        )


def _calibration(keys: Keys, wish: Wish, made: dict[str, object], is_static: bool) -> None:
    if not is_static:
        keys.close("nothing is measured: ranges are found as it runs")
        return
    keys.drop(DATA, "dataset_name", "dataset_config_name", "dataset_split", lost=True)
    count = keys.take("dataset_num_samples", int)
    if count is not None:
        if count < 1:
            raise keys.error("dataset_num_samples", f"{count} is no number of samples")
        wish.calib["samples"] = count
        wish.became(keys.path("dataset_num_samples"), f"calib.samples: {count}")
    if isinstance(method := keys.left.get("method"), str):
        keys.left["method"] = method.rpartition(".")[2]
    ort.ranges(keys, made, method="method", percentile="percentile")
    keys.drop(ort.HISTOGRAM, "num_bins", "num_quantized_bins", lost=True)
    keys.drop(ort.EXACT, "moving_average", "averaging_constant", lost=True)
    keys.close()


def _optimization(keys: Keys, wish: Wish) -> None:
    if keys.left.get("fp16") is True:
        wish.passes.append({"pass": "mixed-precision", "dtype": "fp16"})
        keys.told(
            "fp16", bool, "mixed-precision in fp16, which is for GPUs: a CPU computes it in float32"
        )
    approximate = "effc changes no activation function"
    if keys.left.get("enable_gelu_approximation") is True:
        keys.told("enable_gelu_approximation", bool, approximate, lost=True)
    if keys.left.get("optimize_for_gpu") is True:
        why = "a GPU is a target, tensorrt; effc has none for ONNX Runtime's CUDA kernels"
        keys.told("optimize_for_gpu", bool, why, lost=True)
    keys.drop(
        FUSED,
        *[
            k
            for k in keys.left
            if k.startswith(("disable_", "enable_", "optim", "use_", "no_", "fp16"))
        ],
    )
    keys.close()
