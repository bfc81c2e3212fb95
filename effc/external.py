"""Tensors of an ONNX model that lie outside its file, found without trust.

A tensor may lie at a `location` that is text. A runtime follows it, so it is held against the rules of `paths` first,
wherever in the model it stands: in initialisers, in attributes, in the graphs inside nodes, in functions.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from effc import paths
from effc.errors import EffcError

MOST_BYTES = (2 << 30) - 1
"""Of an ONNX file: where protobuf ends."""
_KEYS = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, kw_only=True)
class External:
    """A tensor whose bytes lie in another file; `wrong` says what of its description cannot be."""

    tensor: str
    location: str = ""
    offset: int = 0
    length: int | None = None
    wrong: str = ""


def external(model: onnx.ModelProto) -> Iterator[External]:
    """Every tensor of a model that lies in another file, wherever in the model it is described."""
    todo: list[Any] = [model.graph, *model.functions]
    for part in model.training_info:
        todo += [part.initialization, part.algorithm]
    while todo:
        graph = todo.pop()
        if isinstance(graph, onnx.GraphProto):
            yield from _described(graph.initializer)
            yield from _described(
                t for s in graph.sparse_initializer for t in (s.values, s.indices)
            )
        attributes = [a for node in graph.node for a in node.attribute]
        attributes += getattr(graph, "attribute_proto", ())
        for attribute in attributes:
            sparse = [attribute.sparse_tensor, *attribute.sparse_tensors]
            yield from _described([attribute.t, *attribute.tensors])
            yield from _described(t for s in sparse for t in (s.values, s.indices))
            todo += [attribute.g, *attribute.graphs]


def _described(tensors: Any) -> Iterator[External]:
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            yield _external(tensor)


def _external(tensor: Any) -> External:
    told = {entry.key: entry.value for entry in tensor.external_data}
    if len(told) != len(tensor.external_data) or not {"location"} <= told.keys() <= _KEYS:
        return External(tensor=tensor.name, wrong="its external data are described wrongly")
    numbers = {key: told[key] for key in ("offset", "length") if key in told}
    if not all(n.isascii() and n.isdecimal() and len(n) < 20 for n in numbers.values()):
        return External(tensor=tensor.name, wrong="its external data have no place in numbers")
    whole = {key: int(number) for key, number in numbers.items()}
    return External(tensor=tensor.name, location=told["location"], **whole)  # type: ignore[arg-type]


def confined(
    root: Path,
    name: str,
    data: External,
    listed: Container[str] | None,
    sizes: dict[str, int | str],
) -> str | None:
    """Why the bytes of a tensor may not be read; None where they may. `sizes` remembers files already opened."""
    if data.location not in sizes:
        sizes[data.location] = _size(root, name, data.location, listed)
    size = sizes[data.location]
    if isinstance(size, str):
        return size
    end = data.offset + (data.length or 0)
    return f"it ends at byte {end} of {data.location}, which has {size}" if end > size else None


def _size(root: Path, name: str, location: str, listed: Container[str] | None) -> int | str:
    try:
        paths.parts(location)
        full = (PurePosixPath(name).parent / location).as_posix()
        if listed is not None and full not in listed:
            return f"its data lie in {full}, which the manifest does not list"
        with paths.opened(root, full, alone=True) as stream:
            return stream.seek(0, 2)
    except EffcError as error:
        return error.what
