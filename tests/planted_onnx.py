"""ONNX files with one known fault each, and files with none: what lint is held to.

`FAULTS` has by name the target, the ids that must be found there and no others, what the runtime makes of it, and the
graph. What the runtime makes of it: `float` (a layer of codes runs in float), `refused` (it does not open),
`fails` (it opens and does not run), `wrong` (other numbers than node by node), or nothing that a machine can see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nets import FLOAT, HALF, Net
from onnx import TensorProto

U8, S8 = (128, np.uint8), (0, np.int8)
INT4 = TensorProto.INT4
Build = Callable[[], Net]


@dataclass(frozen=True)
class Fault:
    target: str
    ids: frozenset[str]
    build: Build
    seen: str = ""


FAULTS: dict[str, Fault] = {}
CLEAN: dict[str, tuple[str, Build]] = {}


def fault(title: str, target: str, ids: str, build: Build, seen: str = "") -> None:
    assert title not in FAULTS
    FAULTS[title] = Fault(target, frozenset(ids.split()), build, seen)


def clean(title: str, targets: str, build: Build) -> None:
    for target in targets.split():
        CLEAN[f"{title} on {target}"] = (target, build)


def product(
    *,
    shape: tuple[Any, ...] = ("n", 16, 64),
    act: tuple[Any, Any] | None = U8,
    axis: int | None = 1,
    columns: int = 48,
    bias: str = "",
    behind: bool = False,
    kind: Any = np.int8,
    zero: int = 0,
    scale: Any = 0.05,
    op: str = "MatMul",
    off: float = 1.0,
    clip: bool = False,
    gemm: dict[str, Any] | None = None,
) -> Build:
    """activation · weight [+ bias], quantised as asked."""

    def build() -> Net:
        net = Net()
        x = net.input("x", list(shape))
        if act is not None and clip:
            low, high = (97, 159) if act[0] else (-31, 31)
            codes = net.q(x, scale, *act)
            bounds = [net.const(np.array(n, act[1])) for n in (low, high)]
            x = net.dq(net.add("Clip", codes, *bounds), scale, *act)
        elif act is not None:
            x = net.quantized(x, scale, *act)
        w = net.codes(shape[-1], columns, axis=axis, kind=kind, zero=zero)
        values = net.weight(columns)
        extra = []
        if bias == "int32":
            w_scale = next(t for t in net.tensors if t.name == net.nodes[-1].input[1])
            grid = np.frombuffer(w_scale.raw_data, np.float32) * np.float32(0.05 * off)
            codes = net.const(np.rint(values / grid).astype(np.int32))
            zeros = net.const(np.zeros(grid.shape, np.int32))
            extra = [net.add("DequantizeLinear", codes, net.const(grid), zeros, axis=0)]
        elif bias:
            extra = [net.const(values.reshape((1,) * (int(bias) - 1) + (columns,)))]
        if op == "Gemm":
            y = net.add("Gemm", x, w, *extra, **(gemm or {}))
        else:
            y = net.add("MatMul", x, w)
            y = net.add("Add", y, *extra) if extra else y
        if behind and act is not None:
            y = net.quantized(y, 0.05, *act)
        net.give(y)
        return net

    return build


def convolution(
    *,
    act: tuple[Any, Any] = U8,
    out: tuple[Any, Any] | None = U8,
    between: str = "",
    axis: int | None = 0,
    zero: int = 0,
    kind: Any = np.int8,
    bias: str = "float",
    off: float = 1.0,
    op: str = "Conv",
    channels: int = 32,
    inputs: int = 16,
    size: int = 8,
) -> Build:
    """A convolution of codes, and what is behind it."""

    def build() -> Net:
        net = Net()
        x = net.quantized(net.input("x", ["n", inputs, size, size]), 0.05, *act)
        turned = op == "ConvTranspose"
        shape = (inputs, channels, 3, 3) if turned else (channels, inputs, 3, 3)
        w = net.codes(*shape, axis=axis, kind=kind, zero=zero)
        values, extra = net.weight(channels), []
        if bias == "int32":
            w_scale = next(t for t in net.tensors if t.name == net.nodes[-1].input[1])
            grid = np.frombuffer(w_scale.raw_data, np.float32) * np.float32(0.05 * off)
            codes = net.const(np.rint(values / grid).astype(np.int32))
            zeros = net.const(np.zeros(grid.shape, np.int32))
            extra = [net.add("DequantizeLinear", codes, net.const(grid), zeros, axis=0)]
        elif bias:
            extra = [net.const(values)]
        y = net.add(op, x, w, *extra, pads=[1, 1, 1, 1])
        if between == "Clip":
            y = net.add("Clip", y, net.const(np.float32(0)), net.const(np.float32(6)))
        elif between:
            y = net.add(between, y)
        net.give(net.quantized(y, 0.05, *out) if out else y)
        return net

    return build


def halves(
    act: tuple[Any, Any],
    scales: tuple[float, float],
    after: bool = False,
    inputs: int = 8,
    size: int = 8,
) -> Build:
    """Two halves that are quantised, put together, and read by a convolution."""

    def build() -> Net:
        net = Net()
        parts = [net.input(n, ["n", inputs, size, size]) for n in "ab"]
        if not after:
            parts = [net.quantized(p, s, *act) for p, s in zip(parts, scales, strict=True)]
        x = net.add("Concat", *parts, axis=1)
        x = net.quantized(x, scales[0], *act) if after else x
        y = net.add("Conv", x, net.codes(32, 2 * inputs, 3, 3, axis=0), pads=[1, 1, 1, 1])
        net.give(net.quantized(y, 0.05, *act))
        return net

    return build


def four_bit(
    op: str = "MatMul",
    act: tuple[Any, Any] | None = None,
    block: int = 0,
    axis: int = 0,
    rows: int = 16,
    sizes: tuple[int, int] = (64, 48),
) -> Build:
    """A layer with a weight of 4 bit."""

    def build() -> Net:
        net = Net()
        is_conv = op == "Conv"
        x = net.input("x", ["n", 16, 8, 8] if is_conv else ["n", rows, sizes[0]])
        x = net.quantized(x, 0.05, *act) if act else x
        shape = (32, 16, 3, 3) if is_conv else sizes
        scales, more = [shape[axis]], {"axis": axis}
        if block:
            scales = list(shape)
            scales[axis] //= block
            more["block_size"] = block
        scale = net.const((0.02 * (1 + net.draw.random(scales))).astype(np.float32))
        codes = net.const(net.draw.integers(-7, 8, shape), INT4)
        w = net.add("DequantizeLinear", codes, scale, net.const(np.zeros(scales), INT4), **more)
        y = net.add(op, x, w, **({"pads": [1, 1, 1, 1]} if is_conv else {}))
        net.give(net.quantized(y, 0.05, *act) if is_conv and act else y)
        return net

    return build


def around(
    op: str,
    act: tuple[Any, Any] | None = U8,
    shape: tuple[Any, ...] = ("n", 16, 8, 8),
    **attributes: Any,
) -> Build:
    """An operator between two grids, or without."""

    def build() -> Net:
        net = Net()

        def gridded(x: str) -> str:
            return net.quantized(x, 0.05, *act) if act else x

        x = gridded(net.input("x", list(shape)))
        more = []
        if op == "LayerNormalization":
            size = shape[-1]
            more = [net.const(np.ones(size, np.float32)), net.const(np.zeros(size, np.float32))]
        if op in ("Add", "Mul"):
            more = [gridded(net.input("z", list(shape)))]
        net.give(gridded(net.add(op, x, *more, **attributes)))
        return net

    return build


def activation_axis(act: tuple[Any, Any]) -> Build:
    def build() -> Net:
        net = Net()
        x = net.input("x", ["n", 16, 64])
        scale = net.const((0.02 * (1 + net.draw.random(64))).astype(np.float32))
        zeros = net.const(np.full(64, act[0], act[1]))
        codes = net.add("QuantizeLinear", x, scale, zeros, axis=2)
        x = net.add("DequantizeLinear", codes, scale, zeros, axis=2)
        net.give(net.add("MatMul", x, net.codes(64, 48, axis=1)))
        return net

    return build


def dynamic() -> Net:
    net = Net()
    x = net.input("x", ["n", 16, 64])
    q = net.add("DynamicQuantizeLinear", x, outputs=3)
    v = net.const(net.draw.integers(-64, 64, (64, 48)).astype(np.int8))
    y = net.add("MatMulInteger", q, v, f"{q}.2", net.const(np.int8(0)))
    scale = net.add("Mul", f"{q}.1", net.const(np.float32(0.002)))
    net.give(net.add("Mul", net.add("Cast", y, to=FLOAT), scale))
    return net


def two_activations(act: tuple[Any, Any], rows: int = 16) -> Build:
    def build() -> Net:
        net = Net()
        x, z = net.input("x", ["n", rows, 64]), net.input("z", ["n", 64, rows])
        net.give(net.add("MatMul", net.quantized(x, 0.05, *act), net.quantized(z, 0.05, *act)))
        return net

    return build


def bad_scale(scale: float, act: tuple[Any, Any]) -> Build:
    return product(scale=scale, act=act)


def pair(kind: str, act: tuple[Any, Any] = U8) -> Build:
    """Pairs of quantise and dequantise that do not belong together, or are there twice."""

    def build() -> Net:
        net = Net()
        x = net.input("x", ["n", 16, 64])
        if kind == "other scale":
            x = net.dq(net.q(x, 0.05, *act), 0.08, *act)
        elif kind == "other zero point":
            x = net.dq(net.q(x, 0.05, 128, np.uint8), 0.05, 120, np.uint8)
        elif kind == "twice":
            x = net.quantized(net.quantized(x, 0.05, *act), 0.05, *act)
        elif kind == "float weight":
            x = net.quantized(x, 0.05, *act)
            w = net.quantized(net.const(net.weight(64, 48)), 0.003, *S8)
            net.give(net.add("MatMul", x, w))
            return net
        net.give(net.add("MatMul", x, net.codes(64, 48, axis=1)))
        return net

    return build


def constants(value: float) -> Build:
    def build() -> Net:
        net = Net()
        w = net.weight(64, 48)
        w[3, 4] = value
        net.give(net.add("MatMul", net.input("x", ["n", 16, 64]), net.const(w)))
        return net

    return build


def masked() -> Net:
    """A mask of -inf in front of a softmax, which is meant."""
    net = Net()
    mask = np.zeros((16, 16), np.float32)
    mask[np.triu_indices(16, 1)] = -np.inf
    net.give(net.add("Softmax", net.add("Add", net.input("x", ["n", 16, 16]), net.const(mask))))
    return net


def shared(
    act: tuple[Any, Any],
    readers: int,
    *,
    behind: bool = False,
    residual: bool = False,
    rows: int = 16,
    size: int = 64,
) -> Build:
    """Products that read one dequantised value, and a sum that reads it too."""  # fmt: skip

    def build() -> Net:
        net = Net()
        x = net.quantized(net.input("x", ["n", rows, size]), 0.05, *act)
        made = [net.add("MatMul", x, net.codes(size, size, axis=1)) for _ in range(readers)]
        made = [net.quantized(y, 0.05, *act) for y in made] if behind else made
        total = made[0]
        for value in made[1:] + ([x] if residual else []):
            total = net.add("Sub", total, value)
        net.give(total)
        return net

    return build


def of_domain(op: str, domain: str) -> Build:
    def build() -> Net:
        net = Net()
        net.give(net.add(op, net.input("x", ["n", 16, 64]), domain=domain))
        return net

    return build


def reshaped(shape: list[int], had: tuple[Any, ...] = ("n", 16, 64)) -> Build:
    def build() -> Net:
        net = Net()
        x = net.add("Reshape", net.input("x", list(had)), net.const(np.array(shape, np.int64)))
        net.give(net.add("Relu", x))
        return net

    return build


def attention(kind: int) -> Build:
    def build() -> Net:
        net = Net(23, ir=11)
        net.give(
            net.add("Attention", *(net.input(n, ["n", 4, "s", 32], kind) for n in "qkv")),
            None,
            kind,
        )
        return net

    return build


def plain_layers(opset: int = 21) -> Build:
    """A graph in float: nothing to say of it."""

    def build() -> Net:
        net = Net(opset)
        x = net.input("x", ["n", 16, 64])
        y = net.add(
            "Add", net.add("MatMul", x, net.const(net.weight(64, 48))), net.const(net.weight(48))
        )
        y = net.add(
            "LayerNormalization",
            y,
            net.const(np.ones(48, np.float32)),
            net.const(np.zeros(48, np.float32)),
        )
        y = net.add("Softmax", net.add("Relu", y))
        net.give(net.add("Reshape", y, net.const(np.array([0, -1], np.int64))))
        return net

    return build


def block(act: tuple[Any, Any]) -> Build:
    """A residual block of two layers, each read on a grid."""

    def build() -> Net:
        net = Net()
        x = net.input("x", ["n", "s", 64])
        h = net.add("MatMul", net.quantized(x, 0.05, *act), net.codes(64, 96, axis=1))
        h = net.add("Relu", net.add("Add", h, net.const(net.weight(96))))
        h = net.add("MatMul", net.quantized(h, 0.05, *act), net.codes(96, 64, axis=1))
        y = net.add("Add", x, net.add("Add", h, net.const(net.weight(64))))
        net.give(
            net.add(
                "LayerNormalization",
                y,
                net.const(np.ones(64, np.float32)),
                net.const(np.zeros(64, np.float32)),
            )
        )
        return net

    return build


def branches() -> Net:
    """Layers inside of both branches of a condition."""
    from onnx import helper

    net = Net()
    x = net.quantized(net.input("x", ["n", 16, 64]), 0.05, *S8)
    flag = net.input("flag", [], TensorProto.BOOL)
    w = net.codes(64, 48, axis=1)
    graphs = []
    for word in ("then", "else"):
        out = helper.make_tensor_value_info(f"{word}.y", FLOAT, None)
        nodes = [helper.make_node("MatMul", [x, w], [f"{word}.y"], f"{word}.product")]
        graphs.append(helper.make_graph(nodes, word, [], [out]))
    net.give(net.add("If", flag, then_branch=graphs[0], else_branch=graphs[1]))
    return net


STATIC = (4, 16, 64)

# onnxruntime
fault("int8 read by two products", "ort", "ORT001", shared(S8, 2), "float")
fault("int8 read by three, with grids", "ort", "ORT001", shared(S8, 3, behind=True), "float")
fault("int8 read by a product and a sum", "ort", "ORT001", shared(S8, 1, residual=True), "float")
fault("integers from outside of a branch", "ort", "ORT020", branches, "float")
fault(
    "int8 and a bias, fixed sizes",
    "ort",
    "ORT002",
    product(shape=STATIC, act=S8, bias="1"),
    "refused",
)
fault(
    "int8 and a bias and a grid, fixed sizes",
    "ort",
    "ORT002",
    product(shape=STATIC, act=S8, bias="1", behind=True),
    "refused",
)
fault("a bias, fixed sizes", "ort", "ORT003", product(shape=STATIC, bias="1"), "float")
fault("a bias behind a table", "ort", "ORT003", product(shape=("n", 64), bias="1"), "float")
fault(
    "a bias of rank 2 behind a table", "ort", "ORT003", product(shape=("n", 64), bias="2"), "float"
)
fault(
    "a Gemm with a float bias",
    "ort",
    "ORT004",
    product(shape=("n", 64), bias="1", op="Gemm"),
    "float",
)
fault(
    "a Gemm with an alpha",
    "ort",
    "ORT004",
    product(shape=("n", 64), bias="int32", op="Gemm", gemm={"alpha": 0.5}),
    "float",
)
fault(
    "a Gemm with a bias of another scale",
    "ort",
    "ORT005",
    product(shape=("n", 64), bias="int32", op="Gemm", off=4.0),
    "wrong",
)
fault(
    "the same with a grid behind it",
    "ort",
    "ORT005",
    product(shape=("n", 64), bias="int32", op="Gemm", off=4.0, behind=True),
    "wrong",
)
fault(
    "a table with a bias of another scale",
    "ort",
    "ORT005",
    product(shape=("n", 64), bias="int32", off=4.0),
    "wrong",
)
fault("scales along the sum, square", "ort", "ORT006", product(axis=0, columns=64), "wrong")
fault("scales along the sum, not square", "ort", "ORT006", product(axis=0), "fails")
fault(
    "scales along the sum of a Gemm",
    "ort",
    "ORT006",
    product(shape=("n", 64), axis=0, columns=64, op="Gemm"),
    "wrong",
)
fault("a convolution without a grid behind it", "ort", "ORT007", convolution(out=None), "float")
fault(
    "a convolution, HardSwish, a grid", "ort", "ORT007", convolution(between="HardSwish"), "float"
)
fault("a convolution, Sigmoid, a grid", "ort", "ORT007", convolution(between="Sigmoid"), "float")
fault("a rectifier and a grid with a sign", "ort", "ORT008", convolution(between="Relu"), "float")
fault("a clip and a grid with a sign", "ort", "ORT008", convolution(between="Clip"), "float")
fault("a rectifier and int8", "ort", "ORT008", convolution(between="Relu", act=S8, out=S8), "float")
fault(
    "a convolution with a bias of another scale",
    "ort",
    "ORT009",
    convolution(bias="int32", off=4.0),
    "float",
)
fault("two halves on one grid", "ort", "ORT010", halves(U8, (0.05, 0.05)), "float")
fault("two halves on two grids", "ort", "ORT010", halves(U8, (0.05, 0.02)), "float")
fault("4 bit per channel, 8-bit activations", "ort", "ORT011", four_bit(act=U8, axis=1), "float")
fault("4 bit in blocks, 8-bit activations", "ort", "ORT011", four_bit(act=U8, block=32), "float")
fault(
    "a convolution of 4 bit, 8-bit activations", "ort", "ORT011", four_bit("Conv", act=U8), "float"
)
fault("a convolution of 4 bit", "ort", "ORT012", four_bit("Conv"), "float")
fault("blocks of 8", "ort", "ORT013", four_bit(block=8), "float")
fault("blocks along the channels", "ort", "ORT013", four_bit(block=16, axis=1), "float")
fault("a scale per channel of activations", "ort", "ORT014", activation_axis(U8), "fails")
fault("activations of 16 bit", "ort", "ORT015", product(act=(32768, np.uint16)))
fault("a clip of int8 codes", "ort", "ORT016", product(act=S8, clip=True), "float")
for _op in ("LayerNormalization", "Gelu", "Tanh", "Erf"):
    fault(f"grids around {_op}", "ort", "ORT017", around(_op))
fault(
    "a transposed convolution between grids",
    "ort",
    "ORT017",
    convolution(op="ConvTranspose", axis=1),
    "float",
)
fault("a range that is found as it runs", "ort", "ORT018", dynamic)
fault("a convolution with scales along its input", "ort", "ORT019", convolution(axis=1), "float")

# openvino
fault("a weight with a zero point", "openvino", "OV001", product(zero=3), "float")
fault("a weight of uint8", "openvino", "OV001", product(kind=np.uint8, zero=128), "float")
fault("a convolution of uint8", "openvino", "OV001", convolution(kind=np.uint8, zero=128), "float")
fault("a convolution with a zero point", "openvino", "OV001", convolution(zero=3), "float")
fault("halves on two grids, openvino", "openvino", "OV002", halves(U8, (0.05, 0.02)), "float")
fault(
    "a scale per channel of activations, openvino",
    "openvino",
    "OV003",
    activation_axis(U8),
    "refused",
)
fault("a range that is found as it runs, openvino", "openvino", "OV004", dynamic, "float")
fault(
    "blocks along the channels, openvino",
    "openvino",
    "OV005",
    four_bit(block=16, axis=1),
    "refused",
)
fault("two activations with zero points", "openvino", "OV006", two_activations(U8), "float")
fault("scales along the sum, openvino", "openvino", "OV007", product(axis=0), "float")
fault("scales along the input of a convolution", "openvino", "OV007", convolution(axis=1), "float")
fault("4 bit and uint8 activations", "openvino", "OV008", four_bit(act=U8, axis=1), "float")
fault(
    "a transposed convolution of uint8",
    "openvino",
    "OV009",
    convolution(op="ConvTranspose", axis=1),
    "float",
)

# tensorrt
fault("uint8 around 128", "tensorrt", "TRT001", product(), "refused")
fault("int8 around 5", "tensorrt", "TRT001", product(act=(5, np.int8)), "refused")
fault(
    "a weight around 128", "tensorrt", "TRT001", product(act=S8, kind=np.uint8, zero=128), "refused"
)
fault(
    "a bias of int32",
    "tensorrt",
    "TRT002",
    product(shape=("n", 64), act=S8, op="Gemm", bias="int32"),
    "refused",
)
fault(
    "the bias of a convolution in int32",
    "tensorrt",
    "TRT002",
    convolution(act=S8, out=S8, bias="int32"),
    "refused",
)
fault("codes of 16 bit", "tensorrt", "TRT003", product(act=(0, np.int16)), "refused")
fault("halves on two grids, tensorrt", "tensorrt", "TRT004", halves(S8, (0.05, 0.02)))
fault("a range that is found as it runs, tensorrt", "tensorrt", "TRT005", dynamic, "refused")
fault(
    "an operator of onnxruntime",
    "tensorrt",
    "TRT005",
    of_domain("FastGelu", "com.microsoft"),
    "refused",
)
fault("attention in float32", "tensorrt", "TRT006", attention(FLOAT), "refused")

# anywhere
fault("a scale of zero", "tensorrt", "QDQ001", bad_scale(0.0, S8), "refused")
fault("a negative scale", "openvino", "QDQ001", bad_scale(-0.05, S8), "wrong")
fault("an infinite scale", "ort", "QDQ001", bad_scale(float("inf"), U8))
fault("another scale behind", "ort", "QDQ002", pair("other scale"))
fault("another zero point behind", "openvino", "QDQ002", pair("other zero point"))
fault("a weight with NaN", "ort", "QDQ003", constants(float("nan")))
fault("a value quantised twice", "openvino", "QDQ004", pair("twice", S8))
fault("a weight stored in float", "ort", "QDQ005", pair("float weight"))
fault("an operator of nobody", "ort", "ONX001", of_domain("Nonsense", "my.own"), "refused")
fault(
    "an operator that is not in the standard", "ort", "ONX001", of_domain("Nonsense", ""), "refused"
)
fault("a batch that is baked in", "ort", "ONX002", reshaped([1, 1024]), "fails")
fault(
    "a batch that is baked in, tensorrt", "tensorrt", "ONX002", reshaped([1, 16, 8, 8]), "refused"
)

ALL = "ort openvino tensorrt"
clean("plain float", ALL, plain_layers())
clean("plain float of opset 17", ALL, plain_layers(17))
clean("uint8 product", "ort openvino", product())
clean("uint8 product, free batch, bias", "ort openvino", product(bias="1"))
clean("uint8 product, bias of rank 3, fixed sizes", "ort openvino", product(shape=STATIC, bias="3"))
clean(
    "uint8 table with a grid behind it",
    "ort openvino",
    product(shape=("n", 64), bias="1", behind=True),
)
clean("uint8 Gemm without a bias", "ort openvino", product(shape=("n", 64), op="Gemm"))
clean(
    "uint8 Gemm with its own bias",
    "ort openvino",
    product(shape=("n", 64), op="Gemm", bias="int32"),
)
clean("uint8 without a zero point", ALL, product(act=(0, np.uint8)))
clean("uint8 read by three", "ort openvino", shared(U8, 3, residual=True))
clean("int8 read by three", "openvino tensorrt", shared(S8, 3, residual=True))
clean("int8 product, free batch", "ort", product(act=S8))
clean("int8 around 5", "ort openvino", product(act=(5, np.int8)))
clean("int8 Gemm", "ort", product(shape=("n", 64), act=S8, op="Gemm", bias="int32"))
clean("one scale for a weight", "ort openvino", product(axis=None))
clean("int8 product", "openvino tensorrt", product(act=S8, bias="1", shape=STATIC))
clean("uint8 convolution", "ort openvino", convolution())
clean("uint8 convolution, int32 bias", "ort openvino", convolution(bias="int32"))
clean(
    "uint8 convolution, rectifier, no sign",
    "ort openvino",
    convolution(between="Relu", out=(0, np.uint8)),
)
clean("int8 convolution", "openvino tensorrt", convolution(act=S8, out=S8))
clean(
    "int8 convolution without a grid behind it", "openvino tensorrt", convolution(act=S8, out=None)
)
clean(
    "int8 transposed convolution",
    "openvino tensorrt",
    convolution(act=S8, out=None, op="ConvTranspose", axis=1),
)
clean("halves with a grid behind", "ort openvino", halves(U8, (0.05, 0.05), after=True))
clean("halves on one grid", "openvino", halves(U8, (0.05, 0.05)))
clean("int8 halves on one grid", "tensorrt", halves(S8, (0.05, 0.05)))
clean("4 bit in blocks", ALL, four_bit(block=32))
clean("4 bit per channel", ALL, four_bit(axis=1))
clean("integer softmax", "ort", around("Softmax"))
clean("integer sum", "ort openvino", around("Add"))
clean("pool", "ort openvino", around("MaxPool", kernel_shape=[2, 2]))
clean("two activations", "ort", two_activations(U8))
clean("two int8 activations", "openvino tensorrt", two_activations(S8))
clean("a residual block", "ort openvino", block(U8))
clean("a residual block of int8", "openvino tensorrt", block(S8))
clean("attention in 16 bit", "tensorrt", attention(HALF))
clean("a reshape that keeps the batch", ALL, reshaped([0, -1]))
clean("a reshape of fixed sizes", ALL, reshaped([4, 1024], STATIC))
clean("infinity in a mask", ALL, masked)
clean("an operator of onnxruntime on ort", "ort openvino", of_domain("FastGelu", "com.microsoft"))
