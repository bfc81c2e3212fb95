"""A refit file: the weights that changed of a TensorRT engine whose weights can be exchanged, for who opens it.

An engine is compiled for a GPU, and its bytes are no place to patch. What was built with `weights: refittable` takes
other weights by name instead, and its ONNX, which lies beside it in the package, has those names and types: the network
is strongly typed, so the types are the engine's. The file has every weight in which the new package differs from the
old one, so it is always put on the old package's engine and ONNX, and each such file replaces the one before.

    safetensors       name → values; codes of 4 bits two in a byte, under `int4` in the metadata
    __metadata__      form, engine and onnx (sha256 of what it is for), release, int4, signature (ed25519)

The signature is over `CONTEXT` and the sha256 of the file with zeros in the place of the signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx

from effc import bounded, package
from effc.delta import make, packet, slot, weights
from effc.delta.codec import HARMED
from effc.errors import BackendUnavailable, DeltaError, LoweringError

FORM = "effc refit 1"
CONTEXT = b"effc refit 1\0"
UNSIGNED = "0" * 2 * packet.SIGNATURE
KINDS: dict[int, tuple[str, int]] = {
    onnx.TensorProto.FLOAT: ("F32", 4),
    onnx.TensorProto.FLOAT16: ("F16", 2),
    onnx.TensorProto.BFLOAT16: ("BF16", 2),
    onnx.TensorProto.FLOAT8E4M3FN: ("F8_E4M3", 1),
    onnx.TensorProto.INT64: ("I64", 8),
    onnx.TensorProto.INT32: ("I32", 4),
    onnx.TensorProto.INT8: ("I8", 1),
    onnx.TensorProto.UINT8: ("U8", 1),
}
"""Types of ONNX by their words in safetensors, and their bytes."""
_WIDTHS = dict(KINDS.values())
_NO_NUMBER = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E4M3": ("u1", 0x7F),
}
"""Bits that are all set in what is no finite number, by type."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """The values of a weight as they lie in memory; `dtype` is the word of safetensors, or I4 for two in a byte."""

    dtype: str
    shape: tuple[int, ...]
    values: bytes


@dataclass(frozen=True, kw_only=True)
class Refit:
    """What is put on an engine: `engine` and `onnx` are the sha256 of the two files that it is for."""

    engine: str
    onnx: str
    release: int
    weights: dict[str, Weight]


def made(old: Path, new: Path, *, release: int) -> Refit:
    """The weights in which the ONNX of a new package differs from that beside an old package's engine.

    Raises DeltaError where the old engine takes no other weights, or more than weights has changed.
    """
    engine, name, manifest = _engine(old)
    if engine.get("options", {}).get("weights") != "refittable":
        raise DeltaError(
            f"{engine['path']} has its weights for good",
            hint="compile the old package with targets: [{tensorrt: {weights: refittable}}], where there is a driver",
        )
    _, other, _ = _engine(new)
    known, wanted = weights.read(old, name), weights.read(new, other)
    if known.tensors != wanted.tensors or name != other:
        raise DeltaError(f"{name} has other weights in the new package", hint=make.FROZEN)
    sides = [_contents(root, name, known) for root in (old, new)]
    graphs = {slot.graph_of(side, known.tensors.values()) for side in sides}
    if len(graphs) > 1:
        raise DeltaError(f"{name} is another graph in the new package", hint=make.FROZEN)
    found = {}
    for word, tensor in sorted(known.tensors.items()):
        a, b = (
            side[tensor.file][tensor.offset : tensor.offset + tensor.length].tobytes()
            for side in sides
        )
        if a != b:
            found[word] = _weight(word, known.kinds[word], tensor.shape, b)
    return Refit(
        engine=engine["sha256"], onnx=manifest["files"][name], release=release, weights=found
    )


def _engine(root: Path) -> tuple[Mapping[str, Any], str, Mapping[str, Any]]:
    """The entry of a package's engine for TensorRT, the name of its ONNX, and the manifest."""
    if broken := package.check(root):
        raise DeltaError(f"{root} is not whole: {broken[0]}", hint=package.UNHARMED)
    manifest = slot.manifest_of(root)
    engines = [e for e in manifest["engines"] if e["target"] == "tensorrt"]
    if len(engines) != 1:
        raise DeltaError(
            f"{root} has {len(engines)} engines for tensorrt, and a refit file is for one",
            hint="compile the target tensorrt, each role into a package of its own",
        )
    name = str(PurePosixPath(engines[0]["path"]).with_suffix(".onnx"))
    if name not in manifest["files"]:
        raise DeltaError(f"{root} has no {name}", hint="get an unharmed package")
    return engines[0], name, manifest


def _contents(root: Path, name: str, known: weights.Weights) -> dict[str, Any]:
    files = {name, *(tensor.file for tensor in known.tensors.values())}
    return {file: np.frombuffer((root / file).read_bytes(), np.uint8) for file in files}


def _weight(name: str, kind: int, shape: tuple[int, ...], values: bytes) -> Weight:
    if kind == onnx.TensorProto.INT4:
        return Weight(dtype="I4", shape=shape, values=values)
    if kind not in KINDS:
        raise DeltaError(
            f"{name} is {onnx.TensorProto.DataType.Name(kind)}, which no refit file holds",
            hint="send the package itself",
        )
    word = KINDS[kind][0]
    if not _is_finite(word, values):
        raise DeltaError(f"{name} has values that are no numbers", hint="look at the training")
    return Weight(dtype=word, shape=shape, values=values)


def _is_finite(dtype: str, values: bytes) -> bool:
    if dtype not in _NO_NUMBER:
        return True
    kind, bits = _NO_NUMBER[dtype]
    return not (np.frombuffer(values, kind) & bits == bits).any()


def written(refit: Refit, key: Path) -> bytes:
    """The file, signed, the same for the same weights and key. Raises DeltaError where the key is none."""
    signer = packet.private_key(key)
    header: dict[str, Any] = {}
    at = 0
    for name, each in sorted(refit.weights.items()):
        four = each.dtype == "I4"
        header[name] = {
            "dtype": "U8" if four else each.dtype,
            "shape": [len(each.values)] if four else list(each.shape),
            "data_offsets": [at, at + len(each.values)],
        }
        at += len(each.values)
    four_bits = {n: list(w.shape) for n, w in refit.weights.items() if w.dtype == "I4"}
    header["__metadata__"] = {
        "form": FORM, "engine": refit.engine, "onnx": refit.onnx, "release": str(refit.release),
        "int4": json.dumps(four_bits, sort_keys=True), "signature": UNSIGNED,
    }  # fmt: skip
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    values = [each.values for _, each in sorted(refit.weights.items())]
    bare = b"".join([struct.pack("<Q", len(text)), text, *values])
    return _with(bare, UNSIGNED, signer.sign(_message(bare)).hex())


def _message(bare: bytes) -> bytes:
    return CONTEXT + hashlib.sha256(bare).digest()


def _with(content: bytes, old: str, new: str) -> bytes:
    """The file with another signature in its place, which is that of the metadata's last word."""
    return content.replace(f'"signature":"{old}"'.encode(), f'"signature":"{new}"'.encode(), 1)


def read(content: bytes, keys: Sequence[str], *, engine: str, onnx_file: str, above: int) -> Refit:
    """What is in a refit file for the engine and ONNX file with these sha256. Raises DeltaError.

    `keys` are public keys in hex, of which one has signed it; nothing of the file is believed before. `above` is the
    release that was put on last, 0 for none: older ones do not come back.
    """
    header, start = bounded.header_of(content, "the file", DeltaError)
    told = header.pop("__metadata__", None)
    if not isinstance(told, dict) or told.get("form") != FORM:
        raise DeltaError("the file is no refit file, or one of another version", hint=HARMED)
    signature = told.get("signature")
    if not isinstance(signature, str) or len(signature) != len(UNSIGNED):
        raise DeltaError("the file is not signed", hint=HARMED)
    packet.check_signed(_message(_with(content, signature, UNSIGNED)), signature, keys)
    for what, is_for, here in (
        ("engine", told.get("engine"), engine),
        ("ONNX file", told.get("onnx"), onnx_file),
    ):
        if is_for != here:
            raise DeltaError(
                f"the weights are for another {what}: {str(is_for)[:12]}, and not {here[:12]}",
                hint="have a refit file made from the package that lies here",
            )
    try:
        four_bits = json.loads(told["int4"])
        found = {
            name: _read(line, content[start:], four_bits.get(name)) for name, line in header.items()
        }
        release = int(told["release"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DeltaError(
            f"the file has a header that does not fit it: {error!r}", hint=HARMED
        ) from error
    if release <= above:
        raise DeltaError(
            f"release {release} is not above {above}, which was put on before",
            hint="have a refit file made with a greater release",
        )
    if strange := sorted(n for n, w in found.items() if not _is_finite(w.dtype, w.values)):
        raise DeltaError(f"{strange[0]} has values that are no numbers", hint=HARMED)
    return Refit(engine=engine, onnx=onnx_file, release=release, weights=found)


def _read(line: Mapping[str, Any], data: bytes, four_bits: Sequence[int] | None) -> Weight:
    start, end = line["data_offsets"]
    dtype, shape = ("I4", four_bits) if four_bits is not None else (line["dtype"], line["shape"])
    count = math.prod(shape)
    size = -(-count // 2) if four_bits is not None else count * _WIDTHS[dtype]
    if not 0 <= start <= end <= len(data) or end - start != size:
        raise ValueError("places")
    return Weight(dtype=dtype, shape=tuple(shape), values=data[start:end])


def told(old: Path, refit: Refit) -> dict[str, Any]:
    """What is in a refit file, and whether TensorRT knows its names in the network of the old package's ONNX file.

    It needs no GPU to say so; where the library is not there, or does not take the file, that is told. Raises
    DeltaError where it knows another name.
    """
    from effc.backends import tensorrt_build

    _, name, _ = _engine(old)
    checked = ""
    try:
        if strange := tensorrt_build.unknown_weights(old / name, sorted(refit.weights)):
            raise DeltaError(
                f"TensorRT knows no weight {strange[0]!r} that can be exchanged",
                hint="send the package itself where that weight changes",
            )
        checked = tensorrt_build.library().__version__
    except (BackendUnavailable, LoweringError) as error:
        why = error.what
    return {
        "engine": refit.engine, "onnx": refit.onnx, "release": refit.release,
        "weights": len(refit.weights), "bytes": sum(len(w.values) for w in refit.weights.values()),
        "checked_with": checked, "not_checked": "" if checked else why,
    }  # fmt: skip


def lines(told: Mapping[str, Any]) -> list[str]:
    """The same for a person."""
    checked = (
        f"TensorRT {told['checked_with']} knows each by its name; that an engine takes them is seen on a GPU alone"
        if told["checked_with"]
        else f"names are not checked: {told['not_checked']}"
    )
    return [
        f"release {told['release']} for engine {told['engine'][:12]}: {told['weights']} weights, {told['bytes']} bytes",
        checked,
    ]
