"""Products in 16 bit, what is sensitive in 32: written into the graph as casts, which is all that TensorRT obeys.

    matrix products, convolutions, attention, embeddings            16 bit, their weights too
    what only moves or combines their values, element by element    as what it reads
    norms, softmax, exponents, powers, sums over an axis            32 bit

Inputs and outputs keep their types (Micikevicius et al. 2018, section 3, for which operators are sensitive).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx
from torch.export.graph_signature import TensorArgument

from effc.calib.collectors import MinMax
from effc.calib.probe import Probe
from effc.ir.edit import insert, is_constant, lift, tensor_name, tensor_of
from effc.ir.program import Graph, Origin
from effc.ir.select import Select, op_name, site_names, value_key
from effc.passes.base import Pass, Stats

aten = torch.ops.aten

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEADROOM = 4.0
"""A value that came within this factor of the largest number of fp16 in calibration stays in 32 bit."""
PRODUCTS = frozenset(
    (
        "linear", "conv1d", "conv2d", "conv_transpose2d", "matmul", "bmm", "mm", "addmm",
        "baddbmm", "scaled_dot_product_attention", "embedding",
    )
)  # fmt: skip
MASKED = frozenset(("add", "add_", "sub", "where", "minimum", "scaled_dot_product_attention"))
"""What reads a mask as numbers, the smallest of which stands for minus infinity."""
FOLLOWERS = frozenset(
    (
        "add", "add_", "sub", "mul", "mul_", "neg", "relu", "relu_", "relu6", "gelu", "silu", "silu_",
        "tanh", "sigmoid", "hardtanh", "leaky_relu", "clamp", "maximum", "minimum", "where",
        "max_pool2d", "upsample_nearest2d", "dropout", "view", "reshape", "_unsafe_view",
        "transpose", "permute", "t", "expand", "expand_as", "unsqueeze", "squeeze", "flatten",
        "slice", "select", "cat", "stack", "split", "split_with_sizes", "chunk", "getitem",
        "contiguous", "clone", "repeat", "roll", "flip", "pad", "constant_pad_nd",
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MixedPrecision(Pass):
    """Computes products, and what only moves or combines their values, in `dtype`; all that is sensitive in float32.

    `check_range` measures, and leaves in float32 what comes near the largest number of fp16, 65504.
    """

    name = "mixed-precision"
    effect = "lossy"

    dtype: Literal["fp16", "bf16"] = "fp16"
    check_range: bool = False
    select: Select = field(default_factory=Select)

    @property
    def measures(self) -> bool:
        return self.check_range and self.dtype == "fp16"

    def probes(self, graph: Graph) -> Iterable[Probe]:
        if not self.measures:
            return
        names = site_names(graph)
        for node in _seen(graph, self.select):
            yield Probe(key=value_key(graph, names, node), node=node, collector=MinMax())

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        names = site_names(graph)

        def too_large() -> list[str]:
            limit = torch.finfo(torch.float16).max / HEADROOM
            keys = [value_key(graph, names, n) for n in _seen(graph, self.select)]
            return [key for key in dict.fromkeys(keys) if _largest(stats[key]) > limit]

        wide: set[str] = set()
        if self.measures:
            wide = set(stats.decide(f"{graph.role}:wide", too_large))
        kept = frozenset(n for n in graph.fx.nodes if value_key(graph, names, n) in wide)
        narrow = _narrow(graph, self.select, kept)
        _Casts(graph, DTYPES[self.dtype]).write(narrow)
        return len(narrow)


def _seen(graph: Graph, select: Select) -> list[fx.Node]:
    """Values that would be in 16 bit: those that are computed so, and what they read."""
    narrow = _narrow(graph, select, frozenset())
    found = dict.fromkeys(n for node in narrow for n in (*node.all_input_nodes, node))
    return [n for n in found if _is_tensor(n) and _gives_float(n) and not is_constant(graph, n)]


def _largest(seen: MinMax) -> float:
    return max(-seen.low, seen.high)


def _narrow(graph: Graph, select: Select, wide: frozenset[fx.Node]) -> dict[fx.Node, None]:
    """Nodes to compute in 16 bit; not those that are `wide`, nor those that read one."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if not _gives_float(node) or not wide.isdisjoint((node, *node.all_input_nodes)):
            continue
        if _computes_narrow(node, select) or (
            op_name(node) in FOLLOWERS and any(read in found for read in node.all_input_nodes)
        ):
            found[node] = None
    for node in graph.nodes:  # a weight of integers is read in the type of its scale
        is_weight = op_name(node) == "dequantize" and is_constant(graph, node.args[0])
        if is_weight and all(reader in found for reader in node.users):
            least = float(tensor_of(graph, node.args[1]).abs().min())  # type: ignore[arg-type]
            if least >= torch.finfo(torch.float16).tiny:
                found[node] = None
    return found


def _computes_narrow(node: fx.Node, select: Select) -> bool:
    return op_name(node) in PRODUCTS and select.matches(node) and not _is_integer_product(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], Tensor)


def _gives_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return bool(parts) and all(isinstance(p, Tensor) and p.dtype == torch.float32 for p in parts)


def _is_integer_product(node: fx.Node) -> bool:
    """Whether a layer reads a quantised activation: it runs on integers, and its output is float."""
    read = node.args[0] if node.args else None
    return (
        isinstance(read, fx.Node) and op_name(read) == "dequantize" and op_name(node) != "embedding"
    )


class _Casts:
    """The edits: every value is cast once for all that read it, every constant is stored in the type it is read in."""

    def __init__(self, graph: Graph, dtype: torch.dtype) -> None:
        self.graph, self.dtype = graph, dtype
        self.made: dict[tuple[fx.Node, torch.dtype, bool], fx.Node] = {}

    def write(self, narrow: Mapping[fx.Node, None]) -> None:
        masks = _masks(self.graph)
        for node in list(self.graph.nodes):
            wanted = self.dtype if node in narrow else torch.float32

            def cast(read: fx.Node, node: fx.Node = node, wanted: torch.dtype = wanted) -> fx.Node:
                actual = self.dtype if read in narrow else torch.float32
                is_mask = read in masks and op_name(node) in MASKED
                return read if actual == wanted else self._as(read, wanted, node, is_mask)

            node.args = fx.node.map_arg(node.args, cast)
            node.kwargs = fx.node.map_arg(node.kwargs, cast)
        output = self.graph.fx.output_node()
        read: dict[str, fx.Node] = {n.name: n for n in output.all_input_nodes}
        for spec in self.graph.exported.graph_signature.output_specs:
            node = read[spec.arg.name]
            if node in narrow:
                made = self._as(node, torch.float32, output, False)
                output.replace_input_with(node, made)
                spec.arg = TensorArgument(made.name)

    def _as(self, read: fx.Node, wanted: torch.dtype, before: fx.Node, is_mask: bool) -> fx.Node:
        value = read.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return read  # integers, and the parts of a split, which stand as a list
        key = read, wanted, is_mask
        if key not in self.made:
            self.made[key] = self._made(read, wanted, before, is_mask)
        return self.made[key]

    def _made(self, read: fx.Node, wanted: torch.dtype, before: fx.Node, is_mask: bool) -> fx.Node:
        most = torch.finfo(
            wanted
        ).max  # beyond it is infinity, and a softmax over a row of that is NaN
        if is_constant(self.graph, read):
            name = tensor_name(self.graph, read) or ""
            origin, word = self.graph.origins[name], str(wanted).removeprefix("torch.")
            origin = Origin(origin.source, (*origin.transforms, word))
            tensor = tensor_of(self.graph, read).clamp(-most, most).to(wanted)
            return lift(self.graph, f"{name}_{word}", tensor, origin)
        if is_mask:
            read = insert(self.graph, before, aten.clamp.default, (read, -most, most))
        return insert(self.graph, before, aten.to.dtype, (read, wanted))


def _masks(graph: Graph) -> set[fx.Node]:
    """Float values that depend on integer or boolean inputs and on single numbers alone."""
    found: set[fx.Node] = set()
    plain: set[fx.Node] = set()
    for node in graph.fx.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if not isinstance(value, Tensor):
                continue
            is_scalar = is_constant(graph, node) and value.numel() == 1
            if is_scalar or value.dtype in (torch.bool, torch.int64, torch.int32):
                plain.add(node)
        elif node.op == "call_function" and all(n in plain for n in node.all_input_nodes):
            plain.add(node)
            if isinstance(value, Tensor) and value.is_floating_point():
                found.add(node)
    return found
