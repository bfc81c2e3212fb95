"""An ONNX file that somebody else wrote, read without trust and refused where it is not a plain float graph.

What comes out is a model whose nodes stand in order, whose functions are written out, and whose tensors were looked
at: none lies outside the folder of the file, none holds what is no number. Everything else is refused by the name of
the node or the tensor, because a graph that is read wrongly would be compiled wrongly.
"""

from __future__ import annotations

import graphlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from effc import bounded, paths
from effc.errors import SourceError, first_line
from effc.external import confined, external

MOST_BYTES = (2 << 30) - 1
"""Where protobuf ends."""
OLDEST = 7
OWN = ("", "ai.onnx")
"""How the domain of ONNX's own operators is spelled."""
RUNTIME = "com.microsoft"
"""Operators of ONNX Runtime, which its optimiser writes into files."""
_PLAIN = "export the model in float32, without it"


def parsed(path: Path) -> onnx.ModelProto:
    """The model in a file that the user named, its external data unread. Raises SourceError."""
    stream = paths.plain(path, SourceError)
    if (size := os.fstat(stream.fileno()).st_size) > MOST_BYTES:
        stream.close()
        raise SourceError(
            f"{path} has {size} bytes, and an ONNX file ends at 2 GiB",
            hint="save its tensors beside it: onnx.save(model, FILE, save_as_external_data=True)",
        )
    content = bounded.content(stream, str(path), SourceError, MOST_BYTES)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's own, without a public name
        raise SourceError(
            f"{path} is no ONNX file, or was cut short: {first_line(error)}", hint=bounded.HINT
        ) from error
    if not model.graph.node or not model.graph.output:
        raise SourceError(
            f"{path} holds no graph: {len(model.graph.node)} nodes, {len(model.graph.output)} outputs",
            hint="it is no ONNX model, or was cut short",
        )
    return model


def read(path: Path, proto: onnx.ModelProto) -> ir.Model:
    """What was parsed of a file, whole and in order. Raises SourceError, naming the node or tensor in the way."""
    try:
        _refuse_versions(proto)
        _refuse_nodes(proto)
        _refuse_tensors(path, proto)
        _order(proto)
        model = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        common.InlinePass()(model)
        model.graph.sort()
    except SourceError as error:
        raise SourceError(error.what, where=str(path), hint=error.hint) from error
    except Exception as error:
        raise SourceError(
            f"{path} is no whole ONNX model: {first_line(error)}", hint=bounded.HINT
        ) from error
    _refuse_odd_numbers(path, model)
    return model


def digest(path: Path, proto: onnx.ModelProto) -> str:
    """sha256 over a file and what lies beside it of its tensors, by name."""
    total = hashlib.sha256()
    for name in (path.name, *data_files(path, proto)):
        total.update(name.encode())
        with (path.parent / name).open("rb") as stream:  # which was looked at already
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def data_files(path: Path, proto: onnx.ModelProto) -> list[str]:
    """Names of the files beside it that its tensors lie in. Raises SourceError for one that leads elsewhere."""
    found: set[str] = set()
    sizes: dict[str, int | str] = {}
    for data in external(proto):
        wrong = data.wrong or confined(path.parent, path.name, data, None, sizes)
        if wrong:
            raise SourceError(
                f"tensor {paths.shown(data.tensor)}: {wrong}",
                where=str(path),
                hint="its data must be a plain file in the folder of the model, whole and under its own name",
            )
        found.add(data.location)
    return sorted(found)


def graphs(proto: onnx.ModelProto) -> Iterator[Any]:
    """The graph of a model and the bodies of its functions."""
    yield proto.graph
    yield from proto.functions


def _refuse_versions(proto: onnx.ModelProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    opsets = {o.domain: o.version for o in proto.opset_import}
    version = max((opsets.get(word, 0) for word in OWN), default=0)
    if not OLDEST <= version <= newest:
        raise SourceError(
            f"the file asks for opset {version}, and effc reads {OLDEST} to {newest}",
            hint="export it in another: torch.onnx.export(…, opset_version=21)",
        )


def _refuse_nodes(proto: onnx.ModelProto) -> None:
    """Raise for control flow and for operators of a domain that nobody here knows."""
    known = {*OWN, RUNTIME, *(f.domain for f in proto.functions)}
    for graph in graphs(proto):
        for node in graph.node:
            word = named(node)
            kinds = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
            if any(a.type in kinds for a in node.attribute):
                raise SourceError(
                    f"{word} holds a graph of its own, and effc reads graphs without control flow",
                    hint="export the model with that branch taken or that loop written out",
                )
            if node.domain not in known:
                raise SourceError(
                    f"{word} is of the domain {paths.shown(node.domain)}, which effc does not know",
                    hint="export the model in ONNX's own operators",
                )


def named(node: Any) -> str:
    """A node as it stands in a message."""
    name = node.name or next(iter(node.output), "")
    return f"node {paths.shown(str(name))} ({paths.word(str(node.op_type))})"


def _refuse_tensors(path: Path, proto: onnx.ModelProto) -> None:
    if proto.graph.sparse_initializer:
        raise SourceError("the file holds sparse tensors, which effc does not read", hint=_PLAIN)
    for value in proto.graph.input:
        if not value.type.HasField("tensor_type"):
            raise SourceError(
                f"input {paths.shown(value.name)} is no tensor", hint="export a model of tensors"
            )
    data_files(path, proto)


def _order(proto: onnx.ModelProto) -> None:
    """Raise where a value has two makers or none, or hangs on itself, in the graph and in functions."""
    for graph in graphs(proto):
        is_graph = isinstance(graph, onnx.GraphProto)
        given = [v.name if is_graph else v for v in graph.input]
        if is_graph:
            given += [tensor.name for tensor in graph.initializer]
        known = set(given)
        makers: dict[str, int] = {}
        for place, node in enumerate(graph.node):
            for name in filter(None, node.output):
                if name in makers or name in known:
                    raise SourceError(
                        f"{named(node)} writes {paths.shown(name)}, which is written already",
                        hint=bounded.HINT,
                    )
                makers[name] = place
        ends = [v.name if is_graph else v for v in graph.output]
        for node, name in [(n, v) for n in graph.node for v in n.input] + [(None, v) for v in ends]:
            if name and name not in makers and name not in known:
                who = named(node) if node is not None else "the graph"
                raise SourceError(
                    f"{who} reads {paths.shown(name)}, which nothing makes", hint=bounded.HINT
                )
        behind = {
            place: {makers[name] for name in node.input if name in makers}
            for place, node in enumerate(graph.node)
        }
        try:
            graphlib.TopologicalSorter(behind).prepare()
        except graphlib.CycleError as error:
            raise SourceError(
                f"{named(graph.node[error.args[1][0]])} hangs on its own output: the graph has a cycle",
                hint=bounded.HINT,
            ) from error


def _refuse_odd_numbers(path: Path, model: ir.Model) -> None:
    """Raise for tensors of half precision, which say little of what was trained, and for what is cut short."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None:
            raise SourceError(
                f"tensor {paths.shown(name)} has no values", where=str(path), hint=bounded.HINT
            )
        if tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise SourceError(
                f"tensor {paths.shown(name)} is {tensor.dtype.name.lower()}, and targets take float32",
                where=str(path),
                hint="give the model as it was trained, in float32; --quantize fp16 makes the narrow one",
            )
        try:
            tensor.numpy()
        except Exception as error:
            raise SourceError(
                f"tensor {paths.shown(name)} cannot be read: {first_line(error)}",
                where=str(path),
                hint=bounded.HINT,
            ) from error
