"""Small models of the kinds that command lines in the wild are about, with the names of their inputs."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from nets import FLOAT, Net
from onnx import TensorProto


def convolutions(name: str = "images", opset: int = 17) -> Net:
    """A detector's beginning: convolutions with SiLU, a residual, a pool, a linear layer."""
    net = Net(opset, ir=8)
    x = net.input(name, ["batch", 3, 32, 32])
    for number, (a, b) in enumerate(((3, 8), (8, 8))):
        y = net.add(
            "Conv", x, net.const(net.weight(b, a, 3, 3)), net.const(net.weight(b)),
            pads=[1, 1, 1, 1], out=f"conv{number}",
        )  # fmt: skip
        y = net.add("Mul", y, net.add("Sigmoid", y), out=f"act{number}")
        x = net.add("Add", x, y, out="sum") if a == b else y
    x = net.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.add("Flatten", net.add("GlobalAveragePool", x), out="pooled")
    net.give(
        net.add(
            "Gemm",
            x,
            net.const(net.weight(10, 8)),
            net.const(net.weight(10)),
            transB=1,
            out="output0",
        ),
        ["batch", 10],
    )
    return net


def encoder(opset: int = 17) -> Net:
    """A transformer's layer over token ids: attention with a mask, norms, a feed-forward part."""
    net = Net(opset, ir=8)
    ids = net.input("input_ids", ["batch", "sequence"], TensorProto.INT64)
    mask = net.input("attention_mask", ["batch", "sequence"], TensorProto.INT64)
    x = net.add("Gather", net.const(net.weight(50, 16, scale=1.0)), ids)
    off = net.add("Sub", net.const(np.float32(1)), net.add("Cast", mask, to=FLOAT))
    off = net.add("Mul", off, net.const(np.float32(-3.4028235e38)))
    off = net.add("Unsqueeze", off, net.const(np.array([1], np.int64)))
    q, k, v = (net.add("MatMul", x, net.const(net.weight(16, 16))) for _ in range(3))
    scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 1]))
    scores = net.add("Add", net.add("Div", scores, net.const(np.float32(4))), off)
    x = net.add("Add", x, net.add("MatMul", net.add("Softmax", scores, axis=-1), v))
    x = net.add(
        "LayerNormalization",
        x,
        net.const(np.ones(16, np.float32)),
        net.const(np.zeros(16, np.float32)),
        out="normed",
    )
    h = net.add("Relu", net.add("MatMul", x, net.const(net.weight(16, 32)), out="up"), out="hidden")
    net.give(
        net.add(
            "Add", x, net.add("MatMul", h, net.const(net.weight(32, 16))), out="last_hidden_state"
        ),
        ["batch", "sequence", 16],
    )
    return net


def denoiser(opset: int = 17) -> Net:
    """A UNet's inputs: a picture, a context, a time."""
    net = Net(opset, ir=8)
    x = net.input("x", ["batch", 4, 16, 16])
    t = net.input("timesteps", ["batch"])
    context = net.input("context", ["batch", 7, 12])
    h = net.add("Conv", x, net.const(net.weight(8, 4, 3, 3)), pads=[1] * 4)
    time = net.add("Unsqueeze", net.add("Sin", t), net.const(np.array([1], np.int64)))
    time = net.add("Gemm", time, net.const(net.weight(1, 8)))
    h = net.add("Add", h, net.add("Unsqueeze", time, net.const(np.array([2, 3], np.int64))))
    c = net.add(
        "ReduceMean", net.add("MatMul", context, net.const(net.weight(12, 8))), axes=[1], keepdims=0
    )
    h = net.add("Add", h, net.add("Unsqueeze", c, net.const(np.array([2, 3], np.int64))))
    h = net.add("Mul", h, net.add("Sigmoid", h))
    net.give(
        net.add("Conv", h, net.const(net.weight(4, 8, 3, 3)), pads=[1] * 4, out="out"),
        ["batch", 4, 16, 16],
    )
    return net


def upscaler(opset: int = 17) -> Net:
    net = Net(opset, ir=8)
    x = net.input("input", ["batch", 3, "height", "width"])
    y = net.add(
        "Relu",
        net.add(
            "Conv", x, net.const(net.weight(12, 3, 3, 3)), net.const(net.weight(12)), pads=[1] * 4
        ),
    )
    net.give(net.add("DepthToSpace", y, blocksize=2, out="output"), ["batch", 3, None, None])
    return net


def explicit() -> Net:
    """A graph with grids of its own, as a tool of 10's time wrote it."""
    net = Net(17, ir=8)
    x = net.signed(net.input("images", ["batch", 3, 16, 16]), 0.03)
    y = net.add("Conv", x, net.codes(8, 3, 3, 3, axis=0), net.const(net.weight(8)), pads=[1] * 4)
    net.give(net.add("Relu", y, out="output"), ["batch", 8, 16, 16])
    return net


def cache(place: Path, scales: dict[str, float], kind: str = "hex") -> Path:
    """A calibration cache in one of its forms."""
    if kind == "hex":
        lines = [f"{name}: {struct.pack('>f', value).hex()}" for name, value in scales.items()]
        text = "\n".join(["TRT-8601-EntropyCalibration2", *lines, ""])
    elif kind == "json":
        import json

        text = json.dumps(
            {n: {"scale": v, "min": 0, "max": 0, "offset": 0} for n, v in scales.items()}
        )
    else:
        text = "".join(f"{name} {value * 127!r}\n" for name, value in scales.items())
    place.write_text(text)
    return place


DETECTOR = {
    "images": 3 / 127,
    "conv0": 2 / 127,
    "act0": 2 / 127,
    "sum": 3 / 127,
    "pooled": 1 / 127,
    "(Unnamed Layer* 3) [Constant]_output": 0.01,
}
"""Scales of `convolutions`, with one of a constant, as caches have them."""
