"""ONNX graphs written by hand, a node a line: what lint and migration are tried on.

net = Net()
net.give(net.add("MatMul", net.quantized(net.input("x", ["n", 16])), net.codes(16, 8)))
net.save(path)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
Array = np.ndarray[Any, Any]


class Net:
    """A graph in the making. Values are their names; weights are drawn from one seed."""

    def __init__(self, opset: int = 21, ir: int = 10, **domains: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.opset, self.ir = opset, ir
        self.draw = np.random.default_rng(0)
        self.domains = {"com.microsoft": 1} | domains

    def input(self, name: str, shape: list[Any], kind: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def const(self, value: Any, kind: Any = None, name: str | None = None) -> str:
        array = np.asarray(value, kind if kind is None or isinstance(kind, type) else None)
        name = name or f"c{len(self.tensors)}"
        self.tensors.append(
            numpy_helper.from_array(array, name)
            if not isinstance(kind, int)
            else helper.make_tensor(name, kind, array.shape, array.ravel().tolist())
        )
        return name

    def add(self, op: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        domain = attributes.pop("domain", "")
        count = attributes.pop("outputs", 1)
        place = len(self.nodes)
        names = [
            out or f"{op.lower()}_{place}",
            *(f"{op.lower()}_{place}.{n}" for n in range(1, count)),
        ]
        node = helper.make_node(
            op, list(inputs), names, f"{op}_{place}", domain=domain, **attributes
        )
        self.nodes.append(node)
        return names[0]

    def weight(self, *shape: int, scale: float = 0.1) -> Array:
        return (self.draw.standard_normal(shape) * scale).astype(np.float32)

    def q(
        self, x: str, scale: Any = 0.05, zero: Any = 128, kind: Any = np.uint8, **more: Any
    ) -> str:
        s = self.const(scale, np.float32) if not isinstance(scale, str) else scale
        return self.add("QuantizeLinear", x, s, self.const(zero, kind), **more)

    def dq(
        self, x: str, scale: Any = 0.05, zero: Any = 128, kind: Any = np.uint8, **more: Any
    ) -> str:
        s = self.const(scale, np.float32) if not isinstance(scale, str) else scale
        return self.add("DequantizeLinear", x, s, self.const(zero, kind), **more)

    def quantized(
        self, x: str, scale: Any = 0.05, zero: Any = 128, kind: Any = np.uint8, **more: Any
    ) -> str:
        return self.dq(self.q(x, scale, zero, kind, **more), scale, zero, kind, **more)

    def signed(self, x: str, scale: Any = 0.05) -> str:
        return self.quantized(x, scale, 0, np.int8)

    def codes(
        self, *shape: int, axis: int | None = None, kind: Any = np.int8, zero: int = 0
    ) -> str:
        """A weight stored as integers, behind its DequantizeLinear; one scale per index of `axis`."""
        low, high = (-64, 64) if kind is np.int8 else (64, 192)
        values = self.draw.integers(low, high, shape).astype(kind)
        size = () if axis is None else (shape[axis],)
        scale = np.full(size, 0.002, np.float32) * (1 + self.draw.random(size, np.float32))
        zeros = self.const(np.full(size, zero, kind))
        more = {} if axis is None else {"axis": axis}
        return self.add(
            "DequantizeLinear",
            self.const(values),
            self.const(scale.astype(np.float32)),
            zeros,
            **more,
        )

    def give(self, name: str, shape: Any = None, kind: int = FLOAT) -> str:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.tensors)
        used = {n.domain for n in self.nodes if n.domain}
        opsets = [helper.make_opsetid("", self.opset)]
        opsets += [helper.make_opsetid(d, self.domains.get(d, 1)) for d in sorted(used)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=self.ir)

    def save(self, path: Path | str) -> Path:
        onnx.save(self.model(), str(path))
        return Path(path)
