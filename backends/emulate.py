"""What fused integer kernels compute, to the last integer: a reference beside the float graph and ONNX Runtime.

    y  =  s_x · s_w · Σ (q_x − z_x)(q_w − z_w)  +  b        sums of 32 bit, one rounding to the type of y

A graph run node by node rounds its dequantised operands to float32 before it multiplies, and its sums as it goes.
Kernels of a GPU, and of a CPU with a dot product of integers, multiply the codes and round once. Sums are kept exact
here, in float64, which holds every integer below 2⁵³; a sum that 32 bit does not hold is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from effc.errors import LoweringError
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.quant.ops import DEQUANTIZE, QUANTIZE, spread

LAYERS = ("linear", "conv1d", "conv2d")
INT32_MAX = 2**31 - 1


def integer_products(graph: Graph) -> list[fx.Node]:
    """Layers of which input and weight are integers, in order of execution."""
    return [n for n in graph.nodes if op_name(n) in LAYERS and _is_integer(n)]


def _is_integer(node: fx.Node) -> bool:
    reads = node.args[:2]
    quantised = all(isinstance(n, fx.Node) and n.target is DEQUANTIZE for n in reads)
    if not quantised or reads[0].args[0].target is not QUANTIZE:  # type: ignore[union-attr]
        return False
    return all(not n.args[0].meta["val"].is_floating_point() for n in reads)  # type: ignore[union-attr]


def emulated(
    graph: Graph, feeds: Mapping[str, Tensor], sums: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The outputs of a graph whose layers on integers are computed as fused kernels do.

    `sums` is filled with the integer sums of every such layer, by the name of its node. Raises LoweringError where one
    does not fit into 32 bit.
    """
    with torch.no_grad():
        found = _Emulator(graph, sums).run(*graph.arguments(feeds))
    return dict(zip(graph.outputs, found, strict=True))


class _Emulator(fx.Interpreter):
    def __init__(self, graph: Graph, sums: dict[str, Tensor] | None) -> None:
        super().__init__(graph.exported.graph_module)
        self.products = set(integer_products(graph))
        self.sums = sums
        self.user_to_last_uses = self._last_uses()

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """What may be forgotten behind every node: products read the codes too that their operands are made of."""
        found: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            reads = list(node.all_input_nodes)
            if node in self.products:
                reads += [part for pair in reads for part in pair.all_input_nodes]
            fresh = [read for read in dict.fromkeys(reads) if read not in seen]
            seen.update(fresh)
            found[node] = fresh
        return found

    def run_node(self, n: fx.Node) -> Any:
        return self._product(n) if n in self.products else super().run_node(n)

    def _product(self, node: fx.Node) -> Tensor:
        x, x_scale = self._codes(node.args[0])
        weight, w_scale = self._codes(node.args[1])
        rest = node.args[3:]
        total: Tensor = node.target(x, weight, None, *rest)  # type: ignore[operator]
        shape = [1] * total.dim()
        shape[1 if op_name(node).startswith("conv") else -1] = -1
        scale = x_scale * (w_scale.reshape(shape) if w_scale.dim() else w_scale)
        bias = node.args[2] if len(node.args) > 2 else None
        shift: Tensor | None = None
        if isinstance(bias, fx.Node) and bias.target is DEQUANTIZE:  # on the grid of the sums
            total = total + self.env[bias.args[0]].double().reshape(shape)  # type: ignore[index]
        elif isinstance(bias, fx.Node):
            shift = self.env[bias].double().reshape(shape)
        if float(total.abs().max()) > INT32_MAX:
            raise LoweringError(
                f"a sum of integers of {node.name!r} does not fit into 32 bit",
                hint="leave the layer in float",
            )
        if self.sums is not None:
            self.sums[node.name] = total.to(torch.int64)
        made = total * scale
        if shift is not None:
            made = made + shift
        return made.to(node.meta["val"].dtype)

    def _codes(self, pair: Any) -> tuple[Tensor, Tensor]:
        """What a dequantise node reads, its zero point taken off, and its scale, both in float64."""
        codes, scale, zero = (self.env[part] for part in pair.args[:3])
        axis, group = pair.args[3:5]
        return codes.double() - spread(zero, codes, axis, group).double(), scale.double()
