"""Where the tensors of an engine lie in the files of its package, to the byte, and which are codes of which scales.

A device patches bytes and knows no ONNX. So the maker looks: for tensors beside the file at the place that the file
names, and for those inside by the few fields of the protobuf encoding that lead to them, as `onnx` gives no places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx

from effc.backends import onnx_file
from effc.delta import codec
from effc.delta.codec import Array, Tensor
from effc.errors import DeltaError

_GRAPH, _INITIALIZER, _NAME, _RAW = 7, 5, 8, 9
"""Field numbers of ModelProto.graph, GraphProto.initializer, TensorProto.name and raw_data, fixed by the format."""
_FLOATS: dict[int, str] = {onnx.TensorProto.FLOAT: "float32", onnx.TensorProto.FLOAT16: "float16"}
_FOUR_BITS = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)


@dataclass(frozen=True, kw_only=True)
class Coded:
    """A weight in codes: value = (code − zero) · scale, along `axis` or in blocks of it. Names of initialisers.

    `bits` is 0 where the type of the codes says how wide they are; else they lie as MatMulNBits reads them,
    [rows, blocks, bytes], with a scale for each block and around the middle where there is no zero point. `others` are
    scales and zero points by which the same codes are read elsewhere: what moves one must move all.
    """

    codes: str
    scale: str
    zero: str | None
    axis: int
    block: int
    bits: int = 0
    others: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for name in (self.codes, self.scale, self.zero, *self.others) if name]


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
    found: dict[str, Coded] = {}
    for each in _read_as_codes(model):
        if each.codes not in tensors or each.scale not in tensors:
            continue
        first = found.setdefault(each.codes, each)
        first, other = (each, first) if each.bits and not first.bits else (first, each)
        beside = dict.fromkeys([*first.others, *other.names[1:], *other.others])
        others = tuple(name for name in beside if name not in (first.scale, first.zero))
        found[each.codes] = replace(first, others=others)
    scales = [name for each in found.values() for name in {each.scale, *each.others}]
    yield from (
        each
        for _, each in sorted(found.items())
        if all(scales.count(name) == 1 for name in (each.scale, *each.others))
    )


def _read_as_codes(model: onnx.ModelProto) -> Iterator[Coded]:
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        inputs, told = node.input, {a.name: a.i for a in node.attribute}
        if node.op_type == "DequantizeLinear":
            yield Coded(
                codes=_stored(made, inputs[0]), scale=inputs[1], zero=_named(inputs, 2),
                axis=told.get("axis", 1), block=told.get("block_size", 0),
            )  # fmt: skip
        elif node.op_type in _PRODUCTS:
            codes, scale, zero = (_named(inputs, place) for place in _PRODUCTS[node.op_type])
            codes = _stored(made, codes or "")
            yield Coded(codes=codes, scale=scale or "", zero=zero, axis=-1, block=0)
        elif node.op_type == "MatMulNBits":
            bits = told.get("bits", 4)
            yield Coded(
                codes=inputs[1], scale=inputs[2], zero=_named(inputs, 3), axis=-1,
                block=told["block_size"], bits=bits if bits in _MIDDLES and not _named(inputs, 4) else -1,
            )  # fmt: skip
        elif node.op_type == "GatherBlockQuantized":
            table = made[inputs[0]].input[0] if _made_by(made, inputs[0], "Reshape") else inputs[0]
            yield Coded(codes=table, scale=inputs[2], zero=_named(inputs, 3), axis=-1, block=0)
        elif node.op_type == "Mul":
            rows = [_rows(made, name) for name in inputs]
            for row, size in (rows, rows[::-1]):  # rows of a table, and a scale for each of them
                if row and size and row[1] and not size[1]:
                    wide = _made_by(made, size[0], "Unsqueeze")  # or folded, where it is small
                    scale = made[size[0]].input[0] if wide else size[0]
                    yield Coded(codes=row[0], scale=scale, zero=None, axis=0, block=0)


def _stored(made: Mapping[str, onnx.NodeProto], name: str) -> str:
    """The codes themselves, where some of 4 bit are made wider before they are read."""
    return made[name].input[0] if _made_by(made, name, "Cast") else name


def _named(inputs: Sequence[str], place: int) -> str | None:
    return inputs[place] if len(inputs) > place and inputs[place] else None


def _made_by(made: Mapping[str, onnx.NodeProto], name: str, kind: str) -> bool:
    return name in made and made[name].op_type == kind


def _rows(made: Mapping[str, onnx.NodeProto], name: str) -> tuple[str, bool] | None:
    """What a value is rows of, and whether they were codes; None where it is no rows."""
    if _made_by(made, name, "Sub"):  # of a table that MatMulNBits reads as well, around the middle
        name = made[name].input[0]
    cast = _made_by(made, name, "Cast")
    name = made[name].input[0] if cast else name
    if cast and _made_by(made, name, "Reshape"):
        name = made[name].input[0]
    if not _made_by(made, name, "Gather") or any(a.i for a in made[name].attribute):
        return None
    return made[name].input[0], cast


# numbers of bytes, and back

_INTEGERS: dict[int, tuple[str, int, int]] = {
    onnx.TensorProto.INT8: ("<i1", -128, 127),
    onnx.TensorProto.UINT8: ("<u1", 0, 255),
    onnx.TensorProto.INT32: ("<i4", -(2**31), 2**31 - 1),
}
_MIDDLES = {4: 8, 8: 128}
"""What MatMulNBits takes for 0, by its bits, where it has no zero points."""


def code_range(weights: Weights, coded: Coded) -> tuple[int, int]:
    """The least and the greatest code of a weight. Raises KeyError where what it is written in is none of ours."""
    if coded.bits:
        return 0, 2 * _MIDDLES[coded.bits] - 1
    kind = weights.kinds[coded.codes]
    if kind in _FOUR_BITS:
        return (-8, 7) if kind == onnx.TensorProto.INT4 else (0, 15)
    return _INTEGERS[kind][1:]


def grid(
    weights: Weights, coded: Coded, content: Mapping[str, bytes]
) -> tuple[Array, Array, Array]:
    """The codes of a weight, and a scale and a zero point for each. Raises KeyError where a type is none of ours."""
    if coded.bits:
        return _blocks(weights, coded, content)
    codes = _array(weights, coded.codes, content)
    scale = _spread(_array(weights, coded.scale, content), coded, codes.shape)
    if coded.zero is None:
        return codes, scale, np.broadcast_to(np.int8(0), codes.shape)
    return codes, scale, _spread(_array(weights, coded.zero, content), coded, codes.shape)


def bytes_of(weights: Weights, coded: Coded, codes: Array) -> bytes:
    """Codes as they lie in the file."""
    kind = weights.kinds[coded.codes]
    if coded.bits == 4 or kind in _FOUR_BITS:
        return codec.paired(codes.reshape(-1).astype(np.int8).view(np.uint8)).tobytes()
    return codes.astype(_INTEGERS[kind][0]).tobytes()


def _blocks(
    weights: Weights, coded: Coded, content: Mapping[str, bytes]
) -> tuple[Array, Array, Array]:
    """The same of what MatMulNBits reads: [rows, blocks, block]; each row of packed zero points ends with its byte."""
    rows, blocks, _ = weights.tensors[coded.codes].shape
    codes = _unpacked(content[coded.codes], coded.bits).reshape(rows, blocks, coded.block)
    scale = _array(weights, coded.scale, content).reshape(rows, blocks, 1)
    zero = np.full((rows, blocks), _MIDDLES[coded.bits], np.uint8)
    if coded.zero is not None:
        if weights.kinds[coded.zero] != onnx.TensorProto.UINT8:
            raise KeyError(coded.zero)
        zero = _unpacked(content[coded.zero], coded.bits).reshape(rows, -1)[:, :blocks]
    return codes, np.broadcast_to(scale, codes.shape), np.broadcast_to(zero[..., None], codes.shape)


def _unpacked(content: bytes, bits: int) -> Array:
    found = np.frombuffer(content, np.uint8)
    return codec.halves(found) if bits == 4 else found


def _array(weights: Weights, name: str, content: Mapping[str, bytes]) -> Array:
    kind, shape = weights.kinds[name], weights.tensors[name].shape
    if kind in _FOUR_BITS:
        found = _unpacked(content[name], 4)[: math.prod(shape)].reshape(shape)
        return (found ^ 8).astype(np.int8) - 8 if kind == onnx.TensorProto.INT4 else found
    written = _FLOATS.get(kind) or _INTEGERS[kind][0]
    return np.frombuffer(content[name], written).reshape(shape)


def _spread(scale: Array, coded: Coded, shape: tuple[int, ...]) -> Array:
    """A scale or zero point for each code."""
    if coded.block:
        repeated = np.repeat(scale, coded.block, axis=coded.axis)
        return np.take(repeated, range(shape[coded.axis]), axis=coded.axis)
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(()), shape)
    sizes = [1] * len(shape)
    sizes[coded.axis] = -1
    return np.broadcast_to(scale.reshape(sizes), shape)
