"""Settings as other tools write them, by whose they are."""

from typing import Any

Json = dict[str, Any]

ORT_CONFIG: Json = {
    "one_external_file": True, "opset": None, "optimization": {}, "optimum_version": "1.23.3",
    "use_external_data_format": False,
    "quantization": {
        "activations_dtype": "QUInt8", "activations_symmetric": False, "format": "QDQ", "is_static": True,
        "mode": "QLinearOps", "nodes_to_exclude": ["/encoder/layer.0/output/dense/MatMul", "MatMul_12"],
        "nodes_to_quantize": [], "operators_to_quantize": ["Conv", "Gemm", "Clip", "MatMul", "Add", "Gather"],
        "per_channel": False, "qdq_add_pair_to_weight": False, "qdq_dedicated_pair": False,
        "qdq_op_type_per_channel_support_to_axis": {"MatMul": 1}, "reduce_range": True, "weights_dtype": "QInt8",
        "weights_symmetric": True,
    },
}  # fmt: skip
"""What `ORTQuantizer.quantize` leaves beside the model: `save_dir/ort_config.json`."""
DYNAMIC: Json = {
    **ORT_CONFIG,
    "quantization": {
        **ORT_CONFIG["quantization"], "is_static": False, "format": "QOperator", "mode": "IntegerOps",
        "operators_to_quantize": ["Conv", "MatMul", "Attention", "LSTM", "Gather", "EmbedLayerNormalization"],
        "nodes_to_exclude": [],
    },
}  # fmt: skip
CALIBRATION: Json = {
    "dataset_name": "glue", "dataset_config_name": "sst2", "dataset_split": "train", "dataset_num_samples": 20,
    "method": "CalibrationMethod.Percentile", "num_bins": 2048, "percentile": 99.999, "moving_average": None,
}  # fmt: skip

OFF = {"quantizer_name": "*", "enable": False}
INT8: Json = {
    "algorithm": "max",
    "quant_cfg": [
        OFF,
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
        {"quantizer_name": "*lm_head*", "enable": False},
        {"parent_class": "nn.BatchNorm1d", "quantizer_name": "*", "enable": False},
    ],
}
"""`INT8_DEFAULT_CFG` of ModelOpt."""
MIXED = """
metadata: {recipe_type: ptq, description: Two formats.}
imports:
  off: configs/ptq/units/base_disable_all
  int4_per_block: configs/numerics/int4_per_block
quantize:
  algorithm: {method: gptq, perc_damp: 0.01, layerwise: {enable: true}}
  quant_cfg:
  - $import: off
  - quantizer_name: '*weight_quantizer'
    cfg: {$import: int4_per_block, block_sizes: {-1: 16, type: static}}
  - quantizer_name: '*attention*weight_quantizer'
    cfg: {num_bits: 8, axis: 0}
  - quantizer_name: 'encoder.layer.1.*'
    enable: false
"""
"""A recipe of ModelOpt as it lies in a file, with a format of its own for attention."""

WORKFLOW: Json = {
    "input_model": {"type": "HfModel", "model_path": "tiny", "task": "text-classification"},
    "systems": {
        "local_system": {
            "type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
        }
    },
    "data_configs": [
        {
            "name": "words", "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "text", "split": "train", "data_files": "sentences.txt"},
            "pre_process_data_config": {"max_length": 64, "padding": "max_length", "max_samples": 12},
            "dataloader_config": {"batch_size": 4},
        },
        {"name": "others", "user_script": "evil.py"},
    ],
    "evaluators": {"common": {"metrics": [{"name": "accuracy", "type": "accuracy"}]}},
    "passes": {
        "conversion": {"type": "OnnxConversion", "target_opset": 17},
        "optimization": {"type": "OrtTransformersOptimization", "model_type": "bert"},
        "quantization": {
            "type": "OnnxQuantization",
            "config": {
                "data_config": "words", "quant_mode": "static", "precision": "uint8", "activation_type": "uint8",
                "calibrate_method": "MinMax", "per_channel": True, "quant_preprocess": True,
                "extra_options": {"SmoothQuant": True, "WeightSymmetric": True, "MatMulConstBOnly": True},
            },
        },
        "tuning": {"type": "OrtSessionParamsTuning", "io_bind": False},
    },
    "engine": {
        "search_strategy": {"execution_order": "joint", "sampler": "tpe"}, "evaluator": "common",
        "target": "local_system", "cache_dir": "cache", "output_dir": "models",
    },
}  # fmt: skip

MODES: Json = {
    "modes": ["fp16", "q8", "int8", "uint8", "q4", "q4f16", "bnb4"], "per_channel": True, "reduce_range": True,
    "block_size": None, "is_symmetric": True, "accuracy_level": None, "quant_type": 1, "op_block_list": None,
}  # fmt: skip
"""What `scripts/quantize.py` of transformers.js is called with, as it stands beside the files."""
PER_MODEL: Json = {
    "per_channel": True, "reduce_range": True,
    "per_model_config": {"model": {"op_types": ["Shape", "MatMul", "Gather", "Conv"], "weight_type": "QInt8"}},
}  # fmt: skip
"""The same of version 2."""
