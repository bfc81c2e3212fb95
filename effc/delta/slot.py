"""A package as it lies in a slot of a device: whether it is whole, its graph, its engines, and what they must answer.

A package in a slot has no files with measured times, and is known by the sha256 of its manifest (`id_of`), which has
those of all its files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effc import bounded, paths
from effc.backends import OPENERS
from effc.backends.base import Lowered, Port
from effc.delta import codec
from effc.delta.codec import HARMED, Array, Tensor
from effc.delta.packet import Entry, Vector
from effc.errors import DeltaError
from effc.machine import default_threads
from effc.plain import sealed

MANIFEST, VOLATILE = "manifest.json", "volatile.json"
MOST_MANIFEST = 16 << 20
MOST_VECTOR = 64 << 20
"""Inputs and outputs of a test vector, unpacked."""
Session = Callable[[Mapping[str, Array]], dict[str, Array]]


def manifest_of(root: Path) -> dict[str, Any]:
    """The manifest of a package, its own digest right. Raises DeltaError."""
    text = bounded.content(
        paths.opened(root, MANIFEST, DeltaError), MANIFEST, DeltaError, MOST_MANIFEST
    )
    return manifest_in(text, str(root))


def manifest_in(text: bytes, where: str) -> dict[str, Any]:
    """The manifest that a text is, its own digest right; `where` it is from. Raises DeltaError."""
    found: dict[str, Any] = bounded.json_of(text, f"{where}: {MANIFEST}", DeltaError)
    files = found.get("files") if isinstance(found, dict) else None
    engines = found.get("engines") if isinstance(found, dict) else None
    if (
        not isinstance(files, dict)
        or not isinstance(engines, list)
        or sealed(found).encode() != text
        or not all(isinstance(e, dict) and e.get("path") in files for e in engines)
    ):
        raise DeltaError(f"{where} has no whole {MANIFEST}", hint="get an unharmed package")
    for name in files:
        paths.parts(name, DeltaError)
    return found


def slot_texts(manifest: Mapping[str, Any]) -> tuple[str, str]:
    """manifest.json and volatile.json of a package in a slot, where files with measured times stay away."""
    bare = {**manifest, "unhashed": [VOLATILE]}
    return sealed(bare), sealed({"schema": manifest["schema"], "files": {}})


def id_of(text: str) -> str:
    """What a package in a slot is known by: the sha256 of its manifest, which has those of all its files."""
    return hashlib.sha256(text.encode()).hexdigest()


def problems(root: Path, wanted: str) -> list[str]:
    """What of a slot is not the package that it should hold, in words."""
    try:
        found = manifest_of(root)
        if id_of(sealed(found)) != wanted:
            return [f"{MANIFEST} is of another package"]
        return [
            f"{name} differs from its sha256"
            for name, sha in sorted(found["files"].items())
            if _sha256(root, name) != sha
        ]
    except (DeltaError, OSError) as error:
        return [getattr(error, "what", None) or str(error)]


def _sha256(root: Path, name: str) -> str:
    with paths.opened(root, name, DeltaError) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def graph_of(contents: Mapping[str, Array], tensors: Iterable[Tensor]) -> str:
    """sha256 of files of a package without these tensors of them; `contents` are the bytes of each.

    Raises DeltaError where the tensors lie over each other or outside their file.
    """
    total = hashlib.sha256()
    within: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        within.setdefault(tensor.file, []).append(tensor)
    for name, held in sorted(within.items()):
        content = contents[name]
        total.update(f"{name} {len(content)}\n".encode())
        at = 0
        for tensor in sorted(held, key=lambda t: t.offset):
            if not at <= tensor.offset <= tensor.offset + tensor.length <= len(content):
                raise DeltaError(f"tensor {tensor.name!r} lies outside of {name}", hint=HARMED)
            total.update(content[at : tensor.offset].data)
            at = tensor.offset + tensor.length
        total.update(content[at:].data)
    return total.hexdigest()


def patch(contents: Mapping[str, Array], entries: Iterable[Entry]) -> None:
    """Change the bytes of files, in place, tensor by tensor; `contents` are of the target and still the base's."""
    for entry in entries:
        tensor = entry.tensor
        place = contents[tensor.file][tensor.offset : tensor.offset + tensor.length]
        new = codec.decode(tensor, entry.encoding, entry.payload, place.tobytes())
        place[:] = np.frombuffer(new, np.uint8)


# engines


def session(root: Path, engine: Mapping[str, Any]) -> Session:
    """An engine of a package, opened as effc opens it, with the settings in the manifest.

    Raises DeltaError where its runtime does not take it, or this machine not the settings.
    """
    path = root / engine["path"]
    target = "ort" if engine["target"] == "onnx" else engine["target"]
    try:
        lowered = Lowered(
            role=engine["role"], target=target, directory=path.parent, files=(path.name,), opset=engine["opset"],
            inputs=_ports(engine["inputs"]), outputs=_ports(engine["outputs"]), options=engine.get("options", {}),
        )  # fmt: skip
        run: Session = OPENERS[target](lowered, threads=default_threads())
        return run
    except Exception as error:
        hint = getattr(error, "hint", None) or HARMED
        raise DeltaError(f"{path.name} cannot be opened: {error}", hint=hint) from error


def _ports(given: Iterable[Mapping[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(name=p["name"], dtype=p["dtype"], shape=tuple(p["shape"])) for p in given)


def looked_at(value: Array, count: int) -> Array:
    """`count` elements of an output, spread over it."""
    flat = np.asarray(value).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, count).astype(np.int64)].astype(np.float32)


def self_test(run: Session, vector: Vector) -> None:
    """Raise DeltaError where an engine does not answer a test vector as the maker's did."""
    try:
        sizes = [(np.dtype(kind), shape, math.prod(shape)) for _, kind, shape in vector.inputs]
    except TypeError:
        sizes = []
    if len(sizes) != len(vector.inputs) or any(kind.kind not in "biuf" for kind, *_ in sizes):
        raise DeltaError("a test vector has inputs that are no numbers", hint=HARMED)
    wanted = sum(kind.itemsize * n for kind, _, n in sizes) + 4 * sum(n for *_, n in vector.outputs)
    if wanted > MOST_VECTOR:
        raise DeltaError(f"a test vector unpacks to more than {MOST_VECTOR >> 20} MiB", hint=HARMED)
    content = codec.unpacked(vector.payload, wanted, name="a test vector")
    if len(content) != wanted or not vector.outputs:
        raise DeltaError("a test vector is of another size", hint=HARMED)
    feeds, at = {}, 0
    for (name, *_), (kind, shape, count) in zip(vector.inputs, sizes, strict=True):
        feeds[name] = np.frombuffer(content, kind, count, at).reshape(shape)
        at += kind.itemsize * count
    try:
        found = run(feeds)
    except Exception as error:
        raise DeltaError(f"the engine fails on a test vector: {error}", hint=HARMED) from error
    for name, elements, count in vector.outputs:
        want = np.frombuffer(content, "<f4", count, at)
        at += 4 * count
        if name not in found or found[name].size != elements:
            raise DeltaError(f"output {name!r} has another size in the test", hint=HARMED)
        off = float(np.linalg.norm(looked_at(found[name], count) - want))
        if not off <= vector.tolerance * float(np.linalg.norm(want)):
            raise DeltaError(
                f"output {name!r} is off by {off:.3g} in the test",
                hint="the release does not run as its maker saw it; what serves stays as it was",
            )


def mapped(file: Path) -> Array:
    """The bytes of a file, read as they are looked at; of one that is empty too, which has no map."""
    return np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
