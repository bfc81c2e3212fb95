"""A delta as a file, `up.effd`: a signed header and payloads, read without trust.

    "effd" version  u32                            8 bytes
    length of the header                           u32
    header, JSON in one zstd frame
    payloads, one behind the other
    ed25519 signature of all of the above          64 bytes

The signature is over `CONTEXT` and the sha256 of the bytes in front of it, and is looked at before anything else is
read. The public key lies on the device, never in the file: a file can only be signed by it or not.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from effc import bounded, paths
from effc.delta import codec
from effc.delta.codec import HARMED, Tensor
from effc.errors import DeltaError

MAGIC = b"effd\x01\0\0\0"
CONTEXT = b"effc weight delta 1\0"
ANCHOR = "anchor"
"""In the place of a base: the release holds all of its target but the graph, which any package that takes it has."""
SIGNATURE = 64
MOST_HEADER = 16 << 20
MOST_ENTRIES = 1 << 20
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the base and the payload that makes it the target's."""

    tensor: Tensor
    encoding: str
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Text:
    """A file that is sent whole, packed with the base's file of that name as its dictionary; in an anchor with none."""

    name: str
    length: int
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Vector:
    """Inputs of an engine, and what some elements of its outputs must be.

    `inputs` are (name, dtype, shape), `outputs` (name, number of elements, elements looked at); the payload has the
    arrays one behind the other, outputs as float32. `tolerance` is the largest relative L2 distance.
    """

    engine: str
    tolerance: float
    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, int, int], ...]
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class Packet:
    """A delta: from the package `base` to the package `target`, each the sha256 of a manifest; or an anchor.

    The `base` of an anchor is `ANCHOR`, and nothing in it is a difference to anything.
    `counter` is greater in every release; `graph` is the sha256 of the engines without the tensors that are patched;
    `error` is what is left of the change, from 0 to 1, for who reads it.
    """

    base: str
    target: str
    counter: int
    graph: str
    error: float
    entries: tuple[Entry, ...]
    texts: tuple[Text, ...]
    vectors: tuple[Vector, ...]

    @property
    def is_anchor(self) -> bool:
        return self.base == ANCHOR


def keygen(private: Path, public: Path) -> str:
    """Write a new pair of keys, the private one for its owner's eyes; gives the public key in hex."""
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    word = _hex(key.public_key())
    for place, text, mode in ((private, pem, 0o600), (public, f"{word}\n".encode(), 0o644)):
        try:
            file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise DeltaError(
                f"{place} cannot be written: {error.strerror}",
                hint="name a file that is not there; keys are never replaced",
            ) from error
        with os.fdopen(file, "wb") as stream:
            stream.write(text)
    return word


def _hex(key: ed25519.Ed25519PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def private_key(file: Path) -> ed25519.Ed25519PrivateKey:
    """The key in a file that `keygen` wrote. Raises DeltaError."""
    text = bounded.content(paths.plain(file, DeltaError), str(file), DeltaError, 1 << 16)
    try:
        key = serialization.load_pem_private_key(text, None)
    except (ValueError, TypeError) as error:
        raise DeltaError(
            f"{file} has no private key", hint="effc delta keygen writes one"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise DeltaError(f"{file} has a key of another kind", hint="effc delta keygen writes one")
    return key


def public_word(file: Path) -> str:
    """The public key in a file that `keygen` wrote, in hex. Raises DeltaError."""
    word = bounded.text_of(file, DeltaError, 1 << 16).strip()
    if len(word) != 64 or not _HEX.issuperset(word):
        raise DeltaError(f"{file} has no public key", hint="effc delta keygen writes one")
    return word


def written(packet: Packet, key: ed25519.Ed25519PrivateKey) -> bytes:
    """The file of a delta, the same for the same delta and key."""
    header = {
        "base": packet.base, "target": packet.target, "counter": packet.counter,
        "graph": packet.graph, "error": packet.error,
        "entries": [
            [e.tensor.name, e.tensor.file, e.tensor.offset, e.tensor.length, e.tensor.dtype,
             e.tensor.width, list(e.tensor.shape), e.encoding, len(e.payload)]
            for e in packet.entries
        ],
        "texts": [[t.name, t.length, len(t.payload)] for t in packet.texts],
        "vectors": [
            [v.engine, v.tolerance, [list(p) for p in v.inputs], [list(p) for p in v.outputs], len(v.payload)]
            for v in packet.vectors
        ],
    }  # fmt: skip
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    head = codec.packed(text, codec.TIGHT)
    held: list[Entry | Text | Vector] = [*packet.entries, *packet.texts, *packet.vectors]
    payloads = [each.payload for each in held]
    body = b"".join([MAGIC, struct.pack("<I", len(head)), head, *payloads])
    return body + key.sign(CONTEXT + hashlib.sha256(body).digest())


def read(file: Path, most_bytes: int) -> bytes:
    """The bytes of a delta that the user named. Raises DeltaError where it has more than that many."""
    return bounded.content(paths.plain(file, DeltaError), str(file), DeltaError, most_bytes)


def check_signature(content: bytes, keys: Sequence[str]) -> None:
    """Raise DeltaError where none of the trusted keys has signed these bytes."""
    if len(content) < len(MAGIC) + 4 + SIGNATURE or content[: len(MAGIC)] != MAGIC:
        raise DeltaError("the file is no delta, or one of another version", hint=HARMED)
    message = CONTEXT + hashlib.sha256(memoryview(content)[:-SIGNATURE]).digest()
    check_signed(message, content[-SIGNATURE:].hex(), keys)


def check_signed(message: bytes, signature: str, keys: Sequence[str]) -> None:
    """Raise DeltaError where none of the trusted keys has made a signature, in hex, of a message."""
    for word in keys:
        try:
            key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(word))
            key.verify(bytes.fromhex(signature), message)
            return
        except (InvalidSignature, ValueError):
            continue
    raise DeltaError("the signature is by none of the trusted keys", hint=HARMED)


def parsed(content: bytes) -> Packet:
    """What is in the bytes of a delta. Raises DeltaError for what is none; who signed it is asked elsewhere."""
    if len(content) < len(MAGIC) + 4 + SIGNATURE or content[: len(MAGIC)] != MAGIC:
        raise DeltaError("the file is no delta, or one of another version", hint=HARMED)
    (length,) = struct.unpack_from("<I", content, len(MAGIC))
    at = len(MAGIC) + 4
    head = content[at : at + length]
    header = bounded.json_of(
        codec.unpacked(head, MOST_HEADER, name="the header"), "the header", DeltaError
    )
    rest = _Rest(content, at + length, len(content) - SIGNATURE)
    try:
        found = _packet(header, rest)
    except (KeyError, TypeError, ValueError) as error:
        raise DeltaError(f"the header is none of a delta: {error!r}", hint=HARMED) from error
    if rest.at != rest.end:
        raise DeltaError("there are bytes in the file that nothing names", hint=HARMED)
    return found


@dataclass(kw_only=False)
class _Rest:
    """Payloads that nobody has taken yet."""

    content: bytes
    at: int
    end: int

    def take(self, length: Any) -> bytes:
        size = _count(length)
        if self.at + size > self.end:
            raise DeltaError("the file ends before its payloads do", hint=HARMED)
        self.at += size
        return self.content[self.at - size : self.at]


def _packet(header: Any, rest: _Rest) -> Packet:
    if max(len(header["entries"]), len(header["texts"]), len(header["vectors"])) > MOST_ENTRIES:
        raise ValueError("too many entries")
    found = Packet(
        base=header["base"] if header["base"] == ANCHOR else _sha(header["base"]),
        target=_sha(header["target"]),
        counter=_count(header["counter"]),
        graph=_sha(header["graph"]),
        error=float(header["error"]),
        entries=tuple(_entry(line, rest) for line in header["entries"]),
        texts=tuple(
            Text(name=_word(name), length=_count(length), payload=rest.take(size))
            for name, length, size in header["texts"]
        ),
        vectors=tuple(_vector(line, rest) for line in header["vectors"]),
    )
    if found.is_anchor and (relative := [e for e in found.entries if e.encoding != "bytes"]):
        name = paths.shown(relative[0].tensor.name)
        raise DeltaError(f"tensor {name} of an anchor is a difference to a base", hint=HARMED)
    return found


def _entry(line: Any, rest: _Rest) -> Entry:
    name, file, offset, length, dtype, width, shape, encoding, size = line
    if width not in (1, 2, 4, 8) or _count(length) % width or dtype not in ("", *codec.FLOATS):
        raise ValueError(f"entry {name!r}")
    tensor = Tensor(
        name=_word(name), file=_word(file), offset=_count(offset), length=length, dtype=dtype,
        width=width, shape=tuple(map(_count, shape)),
    )  # fmt: skip
    return Entry(tensor=tensor, encoding=_word(encoding), payload=rest.take(size))


def _vector(line: Any, rest: _Rest) -> Vector:
    engine, tolerance, inputs, outputs, size = line
    return Vector(
        engine=_word(engine),
        tolerance=float(tolerance),
        inputs=tuple((_word(n), _word(d), tuple(map(_count, s))) for n, d, s in inputs),
        outputs=tuple((_word(n), _count(a), _count(b)) for n, a, b in outputs),
        payload=rest.take(size),
    )


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{value!r} is no count")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError("no word")
    return value


def _sha(value: Any) -> str:
    if not isinstance(value, str) or len(value) != 64 or not _HEX.issuperset(value):
        raise ValueError(f"{value!r} is no sha256")
    return value


def show(found: Packet) -> dict[str, Any]:
    """What is in a delta, as plain JSON."""
    return {
        "base": found.base, "target": found.target, "counter": found.counter, "error": found.error,
        "entries": [
            {"name": e.tensor.name, "file": e.tensor.file, "shape": list(e.tensor.shape),
             "encoding": e.encoding, "bytes": len(e.payload)}
            for e in found.entries
        ],
        "files": {t.name: len(t.payload) for t in found.texts},
        "tests": [v.engine for v in found.vectors],
    }  # fmt: skip


def show_lines(found: Mapping[str, Any]) -> list[str]:
    """`show`, with the `bytes` of the file and whether it was `signed` by a key that was asked for, for a person."""
    who = "signed by that key" if found["signed"] else "signature not looked at"
    head = f"release {found['counter']}: {found['base'][:12]} → {found['target'][:12]}, {found['bytes']} bytes, {who}"
    lines = [head, f"    {found['error']:.3g} of the change is left out"]
    for entry in found["entries"]:
        size = "×".join(map(str, entry["shape"]))
        lines.append(
            f"    {entry['encoding']:8}{entry['bytes']:>10}  {paths.word(entry['name'])} [{size}]"
        )
    return lines + [
        f"    file    {size:>10}  {paths.word(n)}" for n, size in found["files"].items()
    ]


def number(text: str) -> int:
    """A whole number that somebody else wrote; 0 for what is none, or is longer than any that is meant."""
    return int(text) if text.isdecimal() and len(text) < 20 else 0
