"""A graph as text that a person can read and a test can compare.

    %linear: f32[batch, 4] = linear(%x, @fc.weight, @fc.bias)

`%` is a computed value or an input, `@` a tensor of the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from effc.ir.edit import tensor_name
from effc.ir.program import Graph, Program
from effc.ir.select import op_name

_SHORT = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def show(item: Program | Graph, *, exact: bool = False) -> str:
    """The graphs of a program, or one graph, one line per node; numbers in six digits unless `exact`."""
    if isinstance(item, Program):
        graphs = list(item)
        if len(graphs) == 1:
            return show(graphs[0], exact=exact)
        return "\n\n".join(f"# {graph.role}\n{show(graph, exact=exact)}" for graph in graphs)
    names = dict(zip(item.exported.graph_signature.user_inputs, item.inputs, strict=True))
    lifted = {n.name: name for n in item.fx.nodes if (name := tensor_name(item, n)) is not None}
    lines = []

    def word(value: Any) -> str:
        return _value(value, lifted, exact)

    for node in item.fx.nodes:
        if node.op == "placeholder" and node.name in names:
            lines.append(f"%{node.name}{_type(item, node)} = input")
        elif node.op == "call_function":
            parts = [word(a) for a in node.args]
            parts += [f"{k}={word(v)}" for k, v in node.kwargs.items()]
            lines.append(f"%{node.name}{_type(item, node)} = {op_name(node)}({', '.join(parts)})")
        elif node.op == "output":
            outputs = zip(item.outputs, node.args[0], strict=True)
            lines.append("return " + ", ".join(f"{name}={word(v)}" for name, v in outputs))
    return "\n".join(lines)


def shape_words(graph: Graph, shape: Any) -> list[str]:
    """A shape with the names of its free dimensions: `["batch", "2*sequence", "384"]`."""
    return [_dimension(graph, size) for size in shape]


def _dimension(graph: Graph, size: Any) -> str:
    return re.sub(r"[a-z]+\d+", lambda m: graph.dims.get(m.group(), m.group()), str(size))


def _type(graph: Graph, node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ""
    short = _SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f": {short}[{', '.join(shape_words(graph, value.shape))}]"


def _value(value: Any, lifted: dict[str, str], exact: bool) -> str:
    if isinstance(value, fx.Node):
        return "@" + lifted[value.name] if value.name in lifted else "%" + value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(v, lifted, exact) for v in value) + "]"
    if isinstance(value, float):
        return repr(value) if exact else f"{value:g}"
    return str(value).removeprefix("torch.")


def graph_digest(programs: Iterable[Program]) -> str:
    """sha256 over the text of the graphs and every tensor in them."""
    total = hashlib.sha256()
    for graph in (graph for program in programs for graph in program):
        total.update(show(graph, exact=True).encode())
        if graph.pending:
            total.update(json.dumps(graph.pending, sort_keys=True).encode())
        _add(total, graph.tensors())
    return total.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes of tensors."""
    total = hashlib.sha256()
    _add(total, tensors)
    return total.hexdigest()


def _add(total: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if not tensor.is_meta:  # of shapes alone
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
