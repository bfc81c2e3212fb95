"""An ONNX file that somebody else wrote, read without trust.

    proto = parsed(path)         # held against what every ONNX file must be
    model = load(path)           # the same, ready to be looked at and changed as it stands
    model = read(path, proto)    # or refused where it is not a plain float graph

In a file that is taken every value has one maker and hangs on none behind it, operators have the inputs that they must
have, tensors are as long as their shapes say, and what lies outside the file is in plain files beside it. Of what is to
be compiled `read` asks more: no control flow, no other domain, nothing sparse and nothing in half precision, because a
graph that is read wrongly would be compiled wrongly. Each refusal has the name of the node or the tensor.
"""

from __future__ import annotations

import graphlib
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from effc import bounded, paths
from effc.errors import SourceError, first_line
from effc.external import MOST_BYTES, confined, external

OLDEST = 7
"""The opset from which on operators broadcast as they do today."""
OWN = ("", "ai.onnx")
"""How the domain of ONNX's own operators is spelled."""
RUNTIME = "com.microsoft"
"""Operators of ONNX Runtime, which its optimiser writes into files."""
_PLAIN = "export the model in float32, without it"
_COMPLEX = (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128)
_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")


def parsed(path: Path) -> onnx.ModelProto:
    """The model in a file that the user named, its external data unread. Raises SourceError."""
    stream = paths.plain(path, SourceError)
    if (size := os.fstat(stream.fileno()).st_size) > MOST_BYTES:
        stream.close()
        raise SourceError(
            f"{path} has {size} bytes, more than an ONNX file can have",
            hint="save its tensors beside it: onnx.save(model, FILE, save_as_external_data=True)",
        )
    content = bounded.content(stream, str(path), SourceError, MOST_BYTES)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except Exception as error:  # protobuf's own, without a public name
        raise _broken(path, f"{first_line(error)}; it may be cut short") from error
    if not model.graph.node or not model.graph.output:
        nodes, outputs = len(model.graph.node), len(model.graph.output)
        raise _broken(path, f"it holds no graph: {nodes} nodes, {outputs} outputs")
    try:
        opset = _opset(model)
        data_files(path, model)
        for graph in graphs(model):
            _refuse_tensors(graph)
            _refuse_order(graph, frozenset())
            _refuse_calls(graph, _imported(getattr(graph, "opset_import", ())) or opset)
    except SourceError as error:
        raise SourceError(error.what, where=str(path), hint=error.hint) from error
    except ValueError as error:  # text in it that is no UTF-8
        raise _broken(path, str(error)) from error
    return model


def load(path: Path) -> ir.Model:
    """The model in a file that the user named, its nodes in order. Raises SourceError."""
    return _opened(path, parsed(path))


def read(path: Path, proto: onnx.ModelProto) -> ir.Model:
    """What was parsed of a file, its functions written out. Raises SourceError, which names the node or tensor."""
    try:
        _refuse_nodes(proto)
        _refuse_others(proto)
    except SourceError as error:
        raise SourceError(error.what, where=str(path), hint=error.hint) from error
    model = _opened(path, proto)
    try:
        common.InlinePass()(model)
        model.graph.sort()
    except Exception as error:
        raise _broken(path, first_line(error)) from error
    _refuse_half(path, model)
    return model


def _opened(path: Path, proto: onnx.ModelProto) -> ir.Model:
    try:
        model = ir.from_proto(proto)
        model.graph.sort()
    except Exception as error:
        raise _broken(path, first_line(error)) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
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


def named(node: Any) -> str:
    """A node as it stands in a message."""
    name = node.name or next(iter(node.output), "")
    return f"node {paths.shown(str(name))} ({paths.word(str(node.op_type))})"


def _broken(path: Path, why: str) -> SourceError:
    return SourceError(f"{path} is no ONNX file that can be read: {why}", hint=bounded.HINT)


# What every file must be


def _imported(entries: Iterable[Any]) -> int:
    """The version of ONNX's own operators among what a model, or a function, imports; 0 where it imports none."""
    return max((entry.version for entry in entries if entry.domain in OWN), default=0)


def _opset(proto: onnx.ModelProto) -> int:
    newest, version = onnx.defs.onnx_opset_version(), _imported(proto.opset_import)
    if not OLDEST <= version <= newest:
        raise SourceError(
            f"it has opset {version}, and {OLDEST} to {newest} are known",
            hint="export it in another: torch.onnx.export(…, opset_version=21)",
        )
    return version


def _inner(node: Any) -> Iterator[Any]:
    """The graphs inside a node."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _refuse_tensors(graph: Any) -> None:
    """Raise where the bytes of a tensor are not those of its shape."""
    tensors = list(graph.initializer) if isinstance(graph, onnx.GraphProto) else []
    for node in graph.node:
        for attribute in node.attribute:
            tensors += [*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors]
        for inner in _inner(node):
            _refuse_tensors(inner)
    for tensor in tensors:
        if wrong := _wrong(tensor):
            raise SourceError(f"tensor {paths.shown(tensor.name)} {wrong}", hint=bounded.HINT)


def _wrong(tensor: Any) -> str | None:
    if any(size < 0 for size in tensor.dims):
        return "has a negative size"
    if tensor.data_type == onnx.TensorProto.STRING:
        return None
    try:
        kind = ir.DataType(tensor.data_type)
        bits = kind.bitwidth
    except (ValueError, TypeError):
        return f"has an unknown type {tensor.data_type}"
    count = math.prod(tensor.dims)
    wanted = -(-count * bits // 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        told = {entry.key: entry.value for entry in tensor.external_data}
        has = int(told.get("length", wanted))
    elif tensor.raw_data:
        has = len(tensor.raw_data)
    else:
        stored = max(len(getattr(tensor, field)) for field in _FIELDS)
        per = 1 if bits >= 8 else 8 // bits
        needs = -(-count // per) * (2 if kind in _COMPLEX else 1)
        return None if stored == needs else f"has {stored} numbers and needs {needs}"
    return None if has == wanted else f"has {has} bytes and needs {wanted}"


def _given(graph: Any) -> set[str]:
    """The values that a graph, or a function, has before any node ran."""
    if not isinstance(graph, onnx.GraphProto):
        return set(graph.input)
    sparse = {tensor.values.name for tensor in graph.sparse_initializer}
    return {v.name for v in graph.input} | {t.name for t in graph.initializer} | sparse


def _ends(graph: Any) -> list[str]:
    return [v.name if isinstance(graph, onnx.GraphProto) else v for v in graph.output]


def _reads(node: Any) -> set[str]:
    """What a node reads, and what the graphs inside it read from outside of them."""
    found = set(node.input)
    for graph in _inner(node):
        made = _given(graph).union(*(each.output for each in graph.node))
        found |= set(_ends(graph)).union(*map(_reads, graph.node)) - made
    return found


def _refuse_order(graph: Any, outer: frozenset[str]) -> None:
    """Raise where a value has two makers or none, or hangs on itself; `outer` are values that are there already."""
    known = _given(graph)
    makers: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in makers or name in known:
                raise SourceError(
                    f"{named(node)} writes {paths.shown(name)}, which is written already",
                    hint=bounded.HINT,
                )
            makers[name] = place
    there = outer | known | makers.keys()
    for node in graph.node:
        for inner in _inner(node):
            _refuse_order(inner, there)
    for who, name in [(n, v) for n in graph.node for v in n.input] + [(None, v) for v in _ends(graph)]:  # fmt: skip
        if name and name not in there:
            reader = "the graph" if who is None else named(who)
            raise SourceError(
                f"{reader} reads {paths.shown(name)}, which nothing makes", hint=bounded.HINT
            )
    behind = {
        place: {makers[name] for name in _reads(node) if name in makers}
        for place, node in enumerate(graph.node)
    }
    try:
        graphlib.TopologicalSorter(behind).prepare()
    except graphlib.CycleError as error:
        raise SourceError(
            f"{named(graph.node[error.args[1][0]])} hangs on its own output: the graph has a cycle",
            hint=bounded.HINT,
        ) from error


def _refuse_calls(graph: Any, opset: int) -> None:
    """Raise for a node that has too few inputs for its operator, too many, or not one that it must have."""
    for node in graph.node:
        for inner in _inner(node):
            _refuse_calls(inner, opset)
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "") if node.domain in OWN else None
        except onnx.defs.SchemaError:
            continue  # nobody knows what it takes
        if schema is None:
            continue
        count = len(node.input)
        missing = [
            formal.name
            for formal, name in zip(schema.inputs, node.input, strict=False)
            if not name and formal.option == onnx.defs.OpSchema.FormalParameterOption.Single
        ]
        if missing or not schema.min_input <= count <= schema.max_input:
            what = f"no {missing[0]}" if missing else f"{count} inputs"
            raise SourceError(f"{named(node)} has {what}", hint=bounded.HINT)


# What is read to be compiled


def _refuse_nodes(proto: onnx.ModelProto) -> None:
    """Raise for control flow and for operators of a domain that nobody here knows."""
    known = {*OWN, RUNTIME, *(f.domain for f in proto.functions)}
    for graph in graphs(proto):
        for node in graph.node:
            if any(_inner(node)):
                raise SourceError(
                    f"{named(node)} holds a graph of its own, and effc reads graphs without control flow",
                    hint="export the model with that branch taken or that loop written out",
                )
            if node.domain not in known:
                raise SourceError(
                    f"{named(node)} is of the domain {paths.shown(node.domain)}, which effc does not know",
                    hint="export the model in ONNX's own operators",
                )


def _refuse_others(proto: onnx.ModelProto) -> None:
    """Raise for sparse tensors and for inputs that are no tensors."""
    if proto.graph.sparse_initializer:
        raise SourceError("the file holds sparse tensors, which effc does not read", hint=_PLAIN)
    for value in proto.graph.input:
        if not value.type.HasField("tensor_type"):
            raise SourceError(
                f"input {paths.shown(value.name)} is no tensor", hint="export a model of tensors"
            )


def _refuse_half(path: Path, model: ir.Model) -> None:
    """Raise for tensors of half precision, which say little of what was trained."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise SourceError(
                f"tensor {paths.shown(name)} is {tensor.dtype.name.lower()}, and targets take float32",
                where=str(path),
                hint="give the model as it was trained, in float32; --quantize fp16 makes the narrow one",
            )
