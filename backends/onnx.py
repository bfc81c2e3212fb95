"""From a graph to an ONNX file: quantise and dequantise nodes stay what they are, names are the user's own.

Operators are translated by `onnx_export`. What is left: names of inputs, outputs and free dimensions, a tied table on
disk once, and a file that is the same bytes every time.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
from torch import fx

from effc.backends.base import Array, BackendBase, Lowered, Port, Site, Unsupported
from effc.backends.dialect import ONNX
from effc.backends.eager import GraphEngine, described, ports
from effc.backends.onnx_export import decomposed, registry, translated, untranslated
from effc.dialect import Dialect
from effc.errors import LoweringError
from effc.ir.program import Graph
from effc.ir.select import module_path, op_name
from effc.progress import Step, silent
from effc.quant.ops import DEQUANTIZE

EXTERNAL_BYTES = 1 << 28
"""Models above this many bytes keep their weights in a file beside the graph: protobuf ends at 2 GiB, and is slow
long before."""
FILE = "model.onnx"
DATA = "model.onnx.data"


def unsupported(graph: Graph, opset: int) -> list[Unsupported]:
    """Every node that cannot be written as ONNX of that opset."""
    known = registry(opset, ours=True)
    exported = decomposed(graph.clone().exported, known)
    return [
        Unsupported(
            node=_where(n), op=op_name(n), reason=f"no ONNX translation is known for {n.target}"
        )
        for n in untranslated(exported.graph.nodes, known)
    ]


def _where(node: fx.Node) -> str:
    return module_path(node) or node.name


def to_onnx(
    graph: Graph, opset: int, *, translate: bool = True, places: dict[str, str] | None = None
) -> ir.Model:
    """The graph as an ONNX model. `translate=False` has torch's own operators for everything: the float reference.

    `places` is filled with where each node is from: the path of its module, and the node of the graph.

    Raises LoweringError where the exporter gives up, with its first reason.
    """
    try:
        model = translated(graph.clone().exported, opset, ours=translate)
    except Exception as error:
        raise LoweringError(
            f"graph {graph.role!r} cannot be written as ONNX opset {opset}: {_reason(error)}",
            where=_node_of(error, graph),
            hint="run with --debug for the exporter's whole explanation",
        ) from error
    _rename_ports(graph, model)
    if places is not None:
        places.update(_places(model))
    strip(model)
    if translate:
        share_transposed(model)
    return model


def share_transposed(model: ir.Model) -> None:
    """Read a tied output layer from the embedding table: one copy on disk, transposed when a session is made."""
    tables = [
        v
        for v in model.graph.initializers.values()
        if any(u.node.op_type == "Gather" for u in v.uses())
    ]
    for value in list(model.graph.initializers.values()):
        readers = [use.node for use in value.uses()]
        if not readers or value.shape is None or any(n.op_type != "MatMul" for n in readers):
            continue
        for table in tables:
            if not _is_transpose(value, table):
                continue
            node = ir.node(
                "Transpose", [table], attributes={"perm": [1, 0]}, name=f"{table.name}.t"
            )
            node.outputs[0].name = f"{table.name}.t"
            model.graph.insert_before(readers[0], node)
            value.replace_all_uses_with(node.outputs[0])
            del model.graph.initializers[value.name or ""]
            break


def _is_transpose(value: ir.Value, table: ir.Value) -> bool:
    a, b = value.const_value, table.const_value
    if a is None or b is None or a.dtype != b.dtype or len(a.shape) != 2:
        return False
    if tuple(a.shape) != tuple(reversed(tuple(b.shape))):
        return False
    return bool((a.numpy() == b.numpy().T).all())


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _node_of(error: BaseException | None, graph: Graph) -> str | None:
    """The node whose translation failed, as the exporter's messages name it, with the module that it is of."""
    while error is not None:
        if found := re.search(r"translating node %(\w+)", str(error)):
            name = found.group(1)
            path = next((module_path(n) for n in graph.nodes if n.name == name), "")
            return f"node {name} of {path}" if path else f"node {name}"
        error = error.__cause__
    return None


def _rename_ports(graph: Graph, model: ir.Model) -> None:
    if both := sorted(set(graph.inputs) & set(graph.outputs)):
        raise LoweringError(
            f"{', '.join(both)} of graph {graph.role!r} is an input and an output, which ONNX cannot name",
            hint="return it under another name",
        )
    _own_outputs(model)
    renamed = dict(zip(model.graph.inputs, graph.inputs, strict=True))
    renamed |= dict(zip(model.graph.outputs, graph.outputs, strict=True))
    wanted = set(renamed.values())
    for value in list(_values(model)):
        if value not in renamed and value.name in wanted:
            value.name = f"{value.name}_inner"
    for value, name in renamed.items():
        value.name = name
    for values, side in zip((model.graph.inputs, model.graph.outputs), ports(graph), strict=True):
        for value, port in zip(values, side, strict=True):
            value.shape = ir.Shape(port.shape)
    for value in _values(model):
        if value.shape is not None and not value.is_graph_input() and not value.is_graph_output():
            value.shape = ir.Shape([_renamed(graph, size) for size in value.shape])


def _own_outputs(model: ir.Model) -> None:
    """Give an output a value of its own where it is an input, a tensor of the model, or another output too."""
    seen: set[ir.Value] = set()
    for place, value in enumerate(model.graph.outputs):
        if value in seen or value.is_graph_input() or value.is_initializer():
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            node.outputs[0].name = f"{value.name}_out_{place}"
            model.graph.append(node)
            model.graph.outputs[place] = node.outputs[0]
        seen.add(model.graph.outputs[place])


def _renamed(graph: Graph, size: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(size, int):
        return size
    text = str(size.value) if size.value is not None else ""
    return re.sub(r"s\d+", lambda m: graph.dims.get(m.group(), m.group()), text) or None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _places(model: ir.Model) -> dict[str, str]:
    """By name of an ONNX node: the path of the module that it is from, and the node of the graph."""
    found = {}
    for node in model.graph:
        try:
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        except (SyntaxError, ValueError):
            continue
        if isinstance(scopes, list) and len(scopes) > 1 and node.name:
            found[node.name] = f"{scopes[-2]} ({scopes[-1]})" if scopes[-2] else str(scopes[-1])
    return found


def strip(model: ir.Model) -> None:
    """Take out what differs between machines: stack traces, docs, producer notes; keep module paths in node names."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.producer_name, model.producer_version = "effc", None
    model.graph.name = "main_graph"
    for node in model.graph:
        node.metadata_props.clear()
        node.meta.clear()
        node.doc_string = None
    for value in _values(model):
        value.metadata_props.clear()
        value.doc_string = None
    for function in list(model.functions):
        model.functions[function].metadata_props.clear()


def save(model: ir.Model, directory: Path) -> tuple[str, ...]:
    """Write the model, initialisers sorted by name; gives the files written, graph first."""
    ordered = sorted(model.graph.initializers.items())
    model.graph.initializers.clear()
    model.graph.initializers.update(ordered)
    imports = sorted(model.opset_imports.items())
    model.opset_imports.clear()
    model.opset_imports.update(imports)
    size = sum(v.const_value.nbytes for _, v in ordered if v.const_value is not None)
    directory.mkdir(parents=True, exist_ok=True)
    external = size > EXTERNAL_BYTES
    ir.save(model, directory / FILE, external_data=DATA if external else None)
    return (FILE, DATA) if external else (FILE,)


def weight_sites(graph: Graph) -> list[tuple[str, str, str]]:
    """Quantised places of a graph: module path, operator, and the name of the integer weight."""
    from effc.ir.edit import tensor_name

    found = []
    for node in graph.nodes:
        word = op_name(node)
        place = 0 if word == "embedding" else 1
        if word not in ("linear", "conv1d", "conv2d", "embedding") or len(node.args) <= place:
            continue
        weight = node.args[place]
        if isinstance(weight, fx.Node) and weight.target is DEQUANTIZE:
            weight = weight.args[0]
        name = tensor_name(graph, weight)
        if name is not None and graph.tensors()[name].element_size() == 1:
            found.append((module_path(node) or node.name, word, name))
    return found


class Onnx(BackendBase):
    """Plain ONNX with quantise and dequantise nodes, for any runtime that reads them."""

    name: ClassVar[str] = "onnx"
    dialect: ClassVar[Dialect] = ONNX

    def supports(self, graph: Graph) -> list[Unsupported]:
        return unsupported(graph, self.dialect.opset)

    def lower(self, graph: Graph, directory: Path, step: Step = silent) -> Lowered:
        files = save(to_onnx(graph, self.dialect.opset), directory)
        return described(
            graph,
            self.name,
            directory,
            files,
            self.dialect.opset,
            sites=tuple(
                Site(
                    name=path, op=word, kernel="unknown", int8=False, reason="no runtime was chosen"
                )
                for path, word, _ in weight_sites(graph)
            ),
        )

    def open(self, lowered: Lowered, *, threads: int | None = None) -> Any:
        from effc.backends.ort import Ort

        return Ort().open(lowered, threads=threads)

    def peak_rss_mb(self, lowered: Lowered, feeds: Mapping[str, Array], threads: int) -> float:
        from effc.backends.ort import Ort

        return Ort().peak_rss_mb(lowered, feeds, threads)


__all__ = ["GraphEngine", "Onnx", "Port", "save", "strip", "to_onnx", "unsupported", "weight_sites"]
