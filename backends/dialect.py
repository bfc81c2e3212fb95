"""The dialect of each target, as data. Every rule has its reason and where it was measured."""

from effc.dialect import Dialect
from effc.errors import RecipeError
from effc.quant.scheme import Scheme
from effc.table import Table

_UINT8 = Scheme(bits=8, signed=False, symmetric=False)

ORT = Dialect(
    name="ort",
    opset=23,
    activation=_UINT8,
    smooth_gain_db=8.0,
    token_scales=True,
    narrow_tables=True,
    cache_codes=True,
    joins_codes=True,
    reasons={
        "joins_codes": "two quantise nodes, a concatenation of bytes and one dequantise are one QLinearConv",
        "cache_codes": "attention for one token reads the codes as they are; for many they are made floats in front",
        "opset": "23 keeps attention one operator; benchmarks/opset.py measures it against 21",
        "narrow_tables": "one kernel looks up a row and scales it, on the bytes that the output layer reads",
        "token_scales": "the integer product takes a scale of 1, and its rows are scaled behind it",
        "smooth_gain_db": "the scaling is a multiplication of its own, and a scale per channel in the quantise node is "
        "slower still: it is for the few activations that gain much (benchmarks/ranges.py)",
        "activation": "uint8 with a zero point: the x86 kernels multiply unsigned by signed, int8 activations fall "
        "to slower ones",
        "quantized_ops": "only layers with constant weights: quantising additions and norms as well is slower",
        "conv_output": "a convolution without a grid behind it runs in float",
        "conv_bias_int32": "the fused convolution wants its bias on the grid s_x·s_w",
        "conv_residual": "a residual sum of integers is one kernel and reads bytes",
        "overflow_fix": "x86 kernels without VNNI add two products in 16 bit and saturate; wider weight scales keep "
        "every pair below that, so an engine gives the same sums on every processor (benchmarks/overflow.py)",
    },
)

OPENVINO = Dialect(
    name="openvino",
    opset=23,
    activation=Scheme(bits=8, signed=True, symmetric=True, narrow=False),
    conv_output=False,
    conv_bias_int32=False,
    smooth_gain_db=1.0,
    cache_codes=True,
    reasons={
        "joins_codes": "not tried: the multiplication stays, and is fused into the quantise node",
        "cache_codes": "made floats in front of attention",
        "opset": "23 keeps attention one operator",
        "smooth_gain_db": "the scaling is fused into the quantise node and costs nothing",
        "activation": "int8 without a zero point, which is corrected for in a step of its own, and with all codes: a "
        "clip between quantise and dequantise would keep the layer from integers",
        "quantized_ops": "only layers with constant weights: quantising additions and norms as well is slower",
        "conv_output": "a convolution is fused with what is in front of it alone; a grid behind it only loses",
        "conv_bias_int32": "the bias is added in float behind the integer sums",
        "conv_residual": "a residual sum is fused with the convolution in front of it where what it adds is integers",
        "overflow_fix": "kernels without VNNI shift signed codes to unsigned ones and add two products in 16 bit, "
        "which saturate; wider weight scales keep every pair below that",
    },
)

TENSORRT = Dialect(
    name="tensorrt",
    opset=23,
    activation=Scheme(bits=8, signed=True, symmetric=True, narrow=False),
    quantized_ops=("linear", "conv1d", "conv2d"),
    conv_output=False,
    conv_bias_int32=False,
    conv_residual=False,
    overflow_fix=False,
    smooth_gain_db=8.0,
    weight_zero_point=False,
    fp8=True,
    rest="fp16",
    reasons={
        "joins_codes": "not tried on a GPU: the multiplication stays",
        "cache_codes": "not tried on a GPU",
        "weight_zero_point": "the parser refuses a weight with a zero point other than 0",
        "smooth_gain_db": "what the norm or the layer in front takes up is free; else it is a multiplication, "
        "for the few activations that gain much",
        "fp8": "GPUs of capability 8.9 and above multiply it",
        "rest": "kernels of a GPU are fast in 16 bit",
        "opset": "23 keeps attention one operator, for which there are kernels in 16 bit; it is decomposed at 21 where "
        "the builder has none for the sizes",
        "activation": "int8 with zero point 0: the parser refuses any other",
        "quantized_ops": "products and convolutions; a table that is looked up stays in 16 bit, for which there is a "
        "kernel",
        "conv_output": "the builder fuses what is behind a convolution itself",
        "conv_bias_int32": "the bias is added in float behind the integer sums",
        "conv_residual": "the builder places residual sums itself",
        "overflow_fix": "sums are of 32 bit on every GPU",
    },
)

ONNX = Dialect(
    name="onnx",
    opset=21,
    activation=_UINT8,
    token_scales=True,
    narrow_tables=True,
    cache_codes=True,
    fp8=True,
    joins_codes=True,
    reasons={
        "joins_codes": "standard, and half the bytes of a concatenation of floats",
        "cache_codes": "written as arithmetic, which every runtime computes",
        "narrow_tables": "a DequantizeLinear in blocks behind a Gather, which is standard",
        "token_scales": "written as arithmetic, which every runtime computes",
        "fp8": "where it will run is not known, and GPUs have kernels",
        "opset": "21 is the first with 4-bit and block-wise DequantizeLinear, and what most runtimes read today",
        "activation": "as onnxruntime likes it; other runtimes re-read the grid from the graph",
        "quantized_ops": "layers with constant weights",
        "conv_output": "so that runtimes which fuse on both sides can",
        "conv_bias_int32": "so that runtimes which fuse on both sides can",
        "conv_residual": "so that runtimes which fuse on both sides can",
        "overflow_fix": "where it will run is not known, and x86 kernels without VNNI saturate",
    },
)

EAGER = Dialect(
    name="eager",
    opset=0,
    activation=_UINT8,
    token_scales=True,
    narrow_tables=True,
    cache_codes=True,
    fp8=True,
    joins_codes=True,
    reasons={
        "joins_codes": "as the ONNX has it",
        "cache_codes": "as the ONNX has it",
        "narrow_tables": "as the ONNX has it",
        "token_scales": "as the ONNX has it",
        "fp8": "as the ONNX has it",
        "activation": "the same grid as onnxruntime's, to compare with it number by number",
    },
)

DIALECTS = Table("target", {}, error=RecipeError)
for _dialect in (ORT, OPENVINO, TENSORRT, ONNX, EAGER):
    DIALECTS.add(_dialect.name, _dialect)
