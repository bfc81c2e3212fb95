"""Where the tensors of an engine lie in the files of its package, to the byte, and which are codes of which scales.

A device patches bytes and knows no ONNX. So the maker looks: for tensors beside the file at the place that the file
names, and for those inside by the few fields of the protobuf encoding that lead to them, as `onnx` gives no places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx

from effc.backends import onnx_file
from effc.delta.codec import Array, Tensor
from effc.errors import DeltaError

_GRAPH, _INITIALIZER, _NAME, _RAW = 7, 5, 8, 9
"""Field numbers of ModelProto.graph, GraphProto.initializer, TensorProto.name and raw_data, fixed by the format."""
_FLOATS: dict[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
_FOUR_BITS = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A weight in codes: value = (code − zero) · scale, along `axis` or in blocks of it. Names of initialisers."""

    codes: str
    scale: str
    zero: str | None
    axis: int
    block: int


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The tensors of an engine by name, those that are codes, and what is needed to read either."""

    tensors: dict[str, Tensor]
    kinds: dict[str, int]
    coded: tuple[Coded, ...]


def read(root: Path, name: str) -> Weights:
    """The weights of the ONNX file `name` below `root`. Raises PackageError for a file that is none."""
    model = onnx_file.read(root, name)
    content = (root / name).read_bytes()
    inside = dict(_inside(content))
    tensors, kinds = {}, {}
    for proto in model.graph.initializer:
        place = _place(name, proto, inside)
        if place is None or not place[2]:
            continue  # without raw bytes it stays part of the graph
        file, offset, length = place
        kinds[proto.name] = proto.data_type
        tensors[proto.name] = Tensor(
            name=proto.name, file=file, offset=offset, length=length,
            dtype=_FLOATS.get(proto.data_type, ""), width=_width(proto.data_type, length),
            shape=tuple(proto.dims),
        )  # fmt: skip
    return Weights(tensors=tensors, kinds=kinds, coded=tuple(_coded(model, tensors)))


def _place(
    name: str, proto: Any, inside: dict[str, tuple[int, int]]
) -> tuple[str, int, int] | None:
    if proto.data_location != onnx.TensorProto.EXTERNAL:
        return (name, *inside[proto.name]) if proto.name in inside else None
    told = {entry.key: entry.value for entry in proto.external_data}
    file = str(PurePosixPath(name).parent / told["location"])
    if "length" not in told:
        raise DeltaError(f"{name}: tensor {proto.name!r} has no length", hint="compile it again")
    return file, int(told.get("offset", 0)), int(told["length"])


def _width(kind: int, length: int) -> int:
    try:
        width = onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    except (KeyError, ValueError):
        width = 1
    return width if width in (1, 2, 4, 8) and length % width == 0 else 1


def _inside(content: bytes) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names of initialisers, and where in the file their raw bytes begin and how many there are."""
    for number, start, end in _fields(content, 0, len(content)):
        if number != _GRAPH:
            continue
        for inner, begin, stop in _fields(content, start, end):
            if inner != _INITIALIZER:
                continue
            found = {f: (a, b) for f, a, b in _fields(content, begin, stop) if f in (_NAME, _RAW)}
            if _NAME in found and _RAW in found:
                a, b = found[_NAME]
                raw, past = found[_RAW]
                yield content[a:b].decode(), (raw, past - raw)


def _fields(content: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Field numbers of a protobuf message and the places of their values (https://protobuf.dev/programming-guides/encoding)."""
    while at < end:
        key, at = _varint(content, at)
        number, wire = key >> 3, key & 7
        start = at
        if wire == 0:
            _, at = _varint(content, at)
        elif wire == 2:
            size, start = _varint(content, at)
            at = start + size
        else:
            at += {1: 8, 5: 4}[wire]
        yield number, start, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


_PRODUCTS = {"MatMulIntegerToFloat": (1, 3, 5), "DynamicQuantizeMatMul": (1, 2, 3)}
"""Of ONNX Runtime's products with weights in codes: which inputs are the codes, their scales and zero points."""


def _coded(model: onnx.ModelProto, tensors: dict[str, Tensor]) -> Iterator[Coded]:
    """Weights in codes whose scale is constant, each once, and no scale that two weights share."""
    found = {
        each.codes: each
        for each in reversed([*_read_as_codes(model)])
        if each.codes in tensors and each.scale in tensors
    }
    scales = [each.scale for each in found.values()]
    yield from (found[codes] for codes in sorted(found) if scales.count(found[codes].scale) == 1)


def _read_as_codes(model: onnx.ModelProto) -> Iterator[Coded]:
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        inputs, told = node.input, {a.name: a.i for a in node.attribute}
        if node.op_type == "DequantizeLinear":
            yield Coded(
                codes=inputs[0], scale=inputs[1], zero=_named(inputs, 2), axis=told.get("axis", 1),
                block=told.get("block_size", 0),
            )  # fmt: skip
        elif node.op_type in _PRODUCTS:
            codes, scale, zero = (_named(inputs, place) for place in _PRODUCTS[node.op_type])
            yield Coded(codes=codes or "", scale=scale or "", zero=zero, axis=-1, block=0)
        elif node.op_type == "Mul":
            rows = [_rows(made, name) for name in inputs]
            for row, size in (rows, rows[::-1]):  # rows of a table, and a scale for each of them
                if row and size and row[1] and _made_by(made, size[0], "Unsqueeze"):
                    wide = made[size[0]]
                    yield Coded(codes=row[0], scale=wide.input[0], zero=None, axis=0, block=0)


def _named(inputs: Sequence[str], place: int) -> str | None:
    return inputs[place] if len(inputs) > place and inputs[place] else None


def _made_by(made: Mapping[str, onnx.NodeProto], name: str, kind: str) -> bool:
    return name in made and made[name].op_type == kind


def _rows(made: Mapping[str, onnx.NodeProto], name: str) -> tuple[str, bool] | None:
    """What a value is rows of, and whether they were codes; None where it is no rows."""
    cast = _made_by(made, name, "Cast")
    name = made[name].input[0] if cast else name
    if not _made_by(made, name, "Gather") or any(a.i for a in made[name].attribute):
        return None
    return made[name].input[0], cast


# numbers of bytes, and back


def array(weights: Weights, name: str, content: bytes) -> Array:
    """The numbers of a tensor in its shape, float64 for floats and int64 for codes. Raises KeyError for other types."""
    kind, shape = weights.kinds[name], weights.tensors[name].shape
    if kind in _FOUR_BITS:
        packed = np.frombuffer(content, np.uint8)
        found = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: math.prod(shape)]
        signed = found.astype(np.int64)
        return np.where(
            (signed > 7) & (kind == onnx.TensorProto.INT4), signed - 16, signed
        ).reshape(shape)
    if kind in _FLOATS:
        return np.frombuffer(content, _FLOATS[kind]).astype(np.float64).reshape(shape)
    return np.frombuffer(content, _INTEGERS[kind][0]).astype(np.int64).reshape(shape)


_INTEGERS: dict[int, tuple[str, int, int]] = {
    onnx.TensorProto.INT8: ("<i1", -128, 127),
    onnx.TensorProto.UINT8: ("<u1", 0, 255),
    onnx.TensorProto.INT32: ("<i4", -(2**31), 2**31 - 1),
}


def code_range(weights: Weights, name: str) -> tuple[int, int]:
    """The least and the greatest code of a tensor. Raises KeyError where its type is none of codes."""
    kind = weights.kinds[name]
    if kind in _FOUR_BITS:
        return (-8, 7) if kind == onnx.TensorProto.INT4 else (0, 15)
    return _INTEGERS[kind][1:]


def bytes_of(weights: Weights, name: str, codes: Array) -> bytes:
    """Codes as they lie in the file."""
    kind = weights.kinds[name]
    if kind not in _FOUR_BITS:
        return codes.astype(_INTEGERS[kind][0]).tobytes()
    flat = (codes.reshape(-1) & 15).astype(np.uint8)
    padded = np.zeros(-(-flat.size // 2) * 2, np.uint8)
    padded[: flat.size] = flat
    return (padded[::2] | padded[1::2] << 4).tobytes()


def spread(scale: Array, coded: Coded, shape: tuple[int, ...]) -> Array:
    """A scale or zero point for each code."""
    if coded.block:
        repeated = np.repeat(scale, coded.block, axis=coded.axis)
        return np.take(repeated, range(shape[coded.axis]), axis=coded.axis)
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(()), shape)
    sizes = [1] * len(shape)
    sizes[coded.axis] = -1
    return np.broadcast_to(scale.reshape(sizes), shape)
