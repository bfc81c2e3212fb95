"""An ONNX file that somebody else wrote, read without trust.

    model = onnx_in.load(path)

What comes out is a graph whose every value is made before it is read, in words of operators that are known, with
tensors as long as their shapes say; those that lie outside the file are in plain files beside it, and not read yet.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from effc import bounded, paths
from effc.backends.onnx_file import MOST_BYTES, external_problems
from effc.errors import SourceError, first_line

HINT = "export it again, or get an unharmed copy"
OUTSIDE = "export it again with its weights as external data beside it"
_OLDEST = 7
"""The opset from which on operators broadcast as they do today."""
_FIELDS = {"raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"}


def load(path: Path) -> ir.Model:
    """The model in a file that the user named, ready to be looked at and changed. Raises SourceError."""
    proto = read(path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise _broken(path, first_line(error)) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def read(path: Path) -> onnx.ModelProto:
    """The same as protobuf, checked, its external data unread. Raises SourceError."""
    stream = paths.plain(path, SourceError)
    if (size := os.fstat(stream.fileno()).st_size) > MOST_BYTES:
        stream.close()
        raise SourceError(f"{path} has {size} bytes, more than an ONNX file can have", hint=OUTSIDE)
    content = bounded.content(stream, str(path), SourceError, MOST_BYTES)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's own, without a public name
        raise _broken(path, first_line(error)) from error
    try:
        wrong = _problem(model)
        outside = external_problems(path.parent, path.name, model, None)
    except ValueError as error:  # text in it that is no UTF-8
        raise _broken(path, str(error)) from error
    if wrong:
        raise _broken(path, wrong)
    if outside:
        raise SourceError(outside[0], where=str(path), hint=paths.HINT)
    return model


def _broken(path: Path, why: str) -> SourceError:
    return SourceError(f"{path} is no ONNX file that can be read: {why}", hint=HINT)


def _problem(model: onnx.ModelProto) -> str | None:
    """The first reason why a file is not taken."""
    if not model.graph.output:
        return "it has no graph that gives anything"
    imported = {entry.domain: entry.version for entry in model.opset_import}
    opset, newest = imported.get("", imported.get("ai.onnx", 0)), onnx.defs.onnx_opset_version()
    if not _OLDEST <= opset <= newest:
        return f"it has opset {opset}, and {_OLDEST} to {newest} are known"
    if wrong := next(filter(None, map(_wrong_tensor, _tensors(model.graph))), None):
        return wrong
    return _unordered(model.graph, frozenset()) or _miscalled(model.graph, opset)


def _miscalled(graph: onnx.GraphProto, opset: int) -> str | None:
    """A node that has too few inputs for its operator, too many, or not one that it must have."""
    for node in graph.node:
        for inner in _graphs(node):
            if wrong := _miscalled(inner, opset):
                return wrong
        try:
            schema = (
                onnx.defs.get_schema(node.op_type, opset, "")
                if node.domain in ("", "ai.onnx")
                else None
            )
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
            return f"{_called(node)} has {what}"
    return None


def _unordered(graph: onnx.GraphProto, outer: frozenset[str]) -> str | None:
    """A node that reads what nothing in front of it makes: values of a cycle, of a later node, of nobody."""
    seen = {v.name for v in graph.input} | {t.name for t in graph.initializer}
    seen |= {t.values.name for t in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name and name not in seen and name not in outer:
                return f"{_called(node)} reads {paths.shown(name)}, which nothing before it makes"
        for inner in _graphs(node):
            if wrong := _unordered(inner, outer | seen):
                return wrong
        for name in filter(None, node.output):
            if name in seen:
                return f"{_called(node)} makes {paths.shown(name)}, which is there already"
            seen.add(name)
    gone = [v.name for v in graph.output if v.name not in seen and v.name not in outer]
    return f"nothing makes its output {paths.shown(gone[0])}" if gone else None


def _called(node: onnx.NodeProto) -> str:
    return f"{paths.word(node.op_type)} {paths.shown(node.name)}"


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
        for inner in _graphs(node):
            yield from _tensors(inner)


def _wrong_tensor(tensor: Any) -> str | None:
    """Why the bytes of a tensor are not those of its shape; one that lies outside is looked at elsewhere."""
    name = paths.shown(tensor.name)
    if any(size < 0 for size in tensor.dims):
        return f"tensor {name} has a negative size"
    if tensor.data_type == onnx.TensorProto.STRING:
        return None
    try:
        kind = ir.DataType(tensor.data_type)
        bits = kind.bitwidth
    except (ValueError, TypeError):
        return f"tensor {name} has an unknown type {tensor.data_type}"
    count = math.prod(tensor.dims)
    wanted = -(-count * bits // 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        told = {entry.key: entry.value for entry in tensor.external_data}
        length = told.get("length", "")
        is_other = length.isdecimal() and int(length) != wanted
        return f"tensor {name} has {length} bytes and needs {wanted}" if is_other else None
    if tensor.raw_data:
        has = len(tensor.raw_data)
        return None if has == wanted else f"tensor {name} has {has} bytes and needs {wanted}"
    stored = max(len(getattr(tensor, field)) for field in _FIELDS - {"raw_data"})
    per = 1 if bits >= 8 else 8 // bits
    per_number = 2 if kind in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128) else 1
    needs = -(-count // per) * per_number
    return None if stored == needs else f"tensor {name} has {stored} numbers and needs {needs}"
