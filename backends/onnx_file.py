"""What an ONNX file says of itself, read without a runtime and without trust: its ports, and where its data lie.

Tensors may lie outside the file, at a `location` that is text. A runtime follows it, so it is held against the rules of
`paths` first, wherever in the file it stands: in initialisers, in attributes, in the graphs inside nodes, in functions.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import onnx

from effc import bounded, paths
from effc.backends.base import Port
from effc.errors import EffcError, PackageError

MOST_BYTES = (2 << 30) - 1
"""Where protobuf ends."""
_KEYS = {"location", "offset", "length", "checksum"}


@dataclass(frozen=True, kw_only=True)
class External:
    """A tensor whose bytes lie in another file; `wrong` says what of its description cannot be."""

    tensor: str
    location: str = ""
    offset: int = 0
    length: int | None = None
    wrong: str = ""


def read(root: Path, name: str) -> onnx.ModelProto:
    """The model in a file below `root`, its external data unread. Raises PackageError."""
    content = bounded.content(paths.opened(root, name), name, PackageError, MOST_BYTES)
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
        return model
    except Exception as error:  # protobuf's own, without a public name
        raise PackageError(
            f"{name} is no ONNX file: {error}", where=str(root), hint=bounded.HINT
        ) from error


def problems(
    root: Path,
    name: str,
    *,
    inputs: Sequence[Port] | None = None,
    outputs: Sequence[Port] | None = None,
    opset: int | None = None,
    listed: Container[str] | None = None,
) -> list[str]:
    """What of an ONNX file below `root` is not what is said of it, in words; what is None is not asked.

    `listed` are the files that external data may lie in.
    """
    try:
        model = read(root, name)
        found = external_problems(root, name, model, listed)
        for side, said, values in (
            ("inputs", inputs, _inputs(model)),
            ("outputs", outputs, list(model.graph.output)),
        ):
            has = [_port(value) for value in values]
            if said is not None and has != list(said):
                found.append(f"{name} has {side} {_words(has)}, and not {_words(said)}")
        has_opset = max((o.version for o in model.opset_import if not o.domain), default=0)
        if opset is not None and has_opset != opset:
            found.append(f"{name} has opset {has_opset}, and not {opset}")
    except EffcError as error:
        return [error.what]
    except ValueError as error:  # text in it that is no UTF-8
        return [f"{name} is no ONNX file: {error}"]
    return found


def _inputs(model: onnx.ModelProto) -> list[Any]:
    """Inputs that a caller gives; an old file lists its initialisers there too."""
    owned = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in owned]


def _port(value: Any) -> Port:
    tensor = value.type.tensor_type
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    except KeyError:
        dtype = "no tensor"
    sizes = (d.dim_value if d.HasField("dim_value") else d.dim_param for d in tensor.shape.dim)
    return Port(name=value.name, dtype=dtype, shape=tuple(sizes))


def _words(ports: Sequence[Port]) -> str:
    words = [f"{p.name}: {p.dtype} [{', '.join(map(str, p.shape))}]" for p in ports[:4]]
    more = [f"{len(ports) - 4} more"] if len(ports) > 4 else []
    return "; ".join([*words, *more]) or "none"


def external_problems(
    root: Path, name: str, model: onnx.ModelProto, listed: Container[str] | None
) -> list[str]:
    """Every tensor whose bytes outside the file may not be read, and why; `listed` are the files they may lie in."""
    found = []
    sizes: dict[str, int | str] = {}
    for data in external(model):
        if (wrong := data.wrong or _confined(root, name, data, listed, sizes)) is not None:
            found.append(f"{name}: tensor {paths.shown(data.tensor)}: {wrong}")
    return found


def _confined(
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
