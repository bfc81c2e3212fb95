"""A delta of two packages: what of the new one is worth its bytes, put on the old one as a device will, and signed.

The old package is what devices hold, to the byte, and the result of a delta is written as the next one's old package
(`mirror`). So what one delta leaves is in the change that the next one sees, and errors do not add up (closed loop).
Weights of codes keep their scales where that pays: the new value is rounded to the old grid, and only codes that
change are sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from effc import package, paths, scratch
from effc.delta import codec, packet, rate, slot, steps, weights
from effc.delta.codec import Array
from effc.delta.packet import Entry, Packet, Text, Vector
from effc.delta.rate import Candidate, Part, Unit
from effc.delta.weights import Weights
from effc.errors import DeltaError
from effc.plain import sealed

LOOKED_AT = 64
"""Elements of an output that a test vector has."""
TOLERANCE = 0.02
LOOSE = 1.05
"""How much larger than a budget what is chosen at first may be, as naming it may take less than is reckoned."""
FROZEN = "compile the new weights with the same recipe and --decisions OLD/decisions.json"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A delta, the bytes of its file, and what it does in numbers."""

    packet: Packet
    content: bytes
    numbers: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A package: its manifest as in a slot, the bytes of its files, and the weights of its engines."""

    manifest: dict[str, Any]
    text: str
    contents: dict[str, Array]
    weights: dict[str, Weights]


def make(
    old: Path,
    new: Path,
    *,
    key: Path,
    counter: int,
    budget: int | None = None,
    max_error: float | None = None,
    inputs: Mapping[str, Array] | None = None,
    importance: Mapping[str, Array | float] | None = None,
    encodings: Sequence[str] | None = None,
    mirror: Path | None = None,
    anchor: bool = False,
) -> Made:
    """The delta from one package to another, and with `mirror` the package that a device will hold.

    With `anchor` it is no difference: every package of the graph that both have can take it, and gets all of the new.
    Lossless where neither `budget` (bytes of the whole file) nor `max_error` is given. `max_error` is the share of
    the change that may be left, √(Σ h·left² ÷ Σ h·change²). `importance` has h by the name of an initialiser,
    `encodings` are those that may be used for numbers, all where not given, and `inputs` feeds the test vectors. Raises
    DeltaError where the packages do not fit or the budget is too small.
    """
    if max_error is not None and not 0 <= max_error < 1:
        raise DeltaError(f"{max_error} is no share of an error", hint="--max-error 0.1")
    if strange := sorted(set(encodings or ()) - {*codec.LOSSY, *codec.EXACT}):
        raise DeltaError(
            f"{strange[0]!r} is no encoding",
            hint=f"one of {', '.join((*codec.EXACT, *codec.LOSSY))}",
        )
    if anchor and any(how is not None for how in (budget, max_error, importance, encodings)):
        raise DeltaError(
            "an anchor sends all of a package, and leaves nothing out",
            hint="make it without --budget, --max-error and --importance",
        )
    signer = packet.private_key(key)
    before, after = _side(old), _side(new)
    _compare(before, after)
    bare = _Bare(before, after, counter, inputs, anchor)
    if anchor:
        return _built(bare, _all(after), 0.0, signer).kept(mirror)
    if before.text == after.text:
        return _built(bare, (), 0.0, signer).kept(mirror)
    if budget is None and not max_error:
        return _built(bare, _exact(before, after), 0.0, signer).kept(mirror)
    units = _units(before, after, importance or {})
    if encodings is not None:
        units = [_only(unit, encodings) for unit in units]
    change = sum(unit.candidates[0].error for unit in units)
    room = float("inf") if budget is None else LOOSE * budget
    beside = 0  # bytes that are no payloads, as far as is known
    while True:
        chosen = rate.allocate(units, most_bytes=room, most_error=(max_error or 0) ** 2 * change)
        parts = [part for way in chosen for part in way.parts]
        if not all(part.is_tight for part in parts):
            units = [rate.tightened(*each) for each in zip(units, chosen, strict=True)]
            continue  # what that saves is room for more
        left = sum(way.error for way in chosen)
        size = sum(len(part.payload) for part in parts)
        is_least = not parts or room <= 0  # what has to be sent is left
        if budget is None or is_least or size + beside <= budget:
            error = float(np.sqrt(left / change)) if change else 0.0
            found = _built(bare, parts, error, signer)
            made = found.made
            beside = len(made.content) - size
            if budget is None or len(made.content) <= budget:
                return found.kept(mirror)
            if is_least:
                raise DeltaError(
                    f"{len(made.content)} bytes are needed to send nothing but manifest, tests and what has no error",
                    hint="give a larger --budget",
                )
        spent = sum(way.bytes for way in chosen)
        room = min(room, spent) - max(1, size + beside - budget)


def arrays_of(file: Path) -> dict[str, Array]:
    """The arrays of a .safetensors file that the user named. Raises DeltaError."""
    import safetensors
    from safetensors.numpy import load

    with paths.plain(file, DeltaError) as stream:
        content = stream.read()
    try:
        return load(content)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DeltaError(
            f"{file} has no arrays: {error}", hint="write it with safetensors.numpy.save_file"
        ) from error


def _side(root: Path) -> _Side:
    if broken := package.check(root):
        raise DeltaError(f"{root} is not whole: {broken[0]}", hint=package.UNHARMED)
    manifest = slot.manifest_of(root)
    text, _ = slot.slot_texts(manifest)
    contents = {n: np.frombuffer((root / n).read_bytes(), np.uint8) for n in manifest["files"]}
    engines = [e["path"] for e in manifest["engines"]]
    if strange := [name for name in engines if not name.endswith(".onnx")]:
        raise DeltaError(
            f"{strange[0]} is an engine whose weights have no place in the file",
            hint="deltas are for targets ort, onnx and openvino; effc delta refit is for tensorrt",
        )
    return _Side(
        manifest=manifest, text=text, contents=contents,
        weights={name: weights.read(root, name) for name in engines},
    )  # fmt: skip


def _compare(before: _Side, after: _Side) -> None:
    """Raise DeltaError where more than weights has changed between two packages."""
    for what, a, b in (
        ("other files", set(before.contents), set(after.contents)),
        ("other engines", list(before.weights), list(after.weights)),
    ):
        if a != b:
            raise DeltaError(f"the new package has {what}", hint=FROZEN)
    for name, known in before.weights.items():
        tensors = known.tensors.values()
        if known != after.weights[name] or (
            slot.graph_of(before.contents, tensors) != slot.graph_of(after.contents, tensors)
        ):
            raise DeltaError(f"{name} is another graph in the new package", hint=FROZEN)


def _bytes(side: _Side, tensor: codec.Tensor) -> bytes:
    return side.contents[tensor.file][tensor.offset : tensor.offset + tensor.length].tobytes()


# what can be sent


def _exact(before: _Side, after: _Side) -> list[Part]:
    """Every tensor that changed, as it is."""
    found = {}
    for known in before.weights.values():
        for tensor in known.tensors.values():
            old, new = _bytes(before, tensor), _bytes(after, tensor)
            if old != new:  # engines may share a tensor in one file
                found[tensor.file, tensor.offset] = rate.exact(tensor, old, new).tightened()
    return [found[place] for place in sorted(found)]


def _all(after: _Side) -> list[Part]:
    """Every tensor, as its bytes."""
    every = {
        (t.file, t.offset): t for known in after.weights.values() for t in known.tensors.values() if t.length
    }  # fmt: skip
    return [
        Part(tensor=t, encoding="bytes", payload=codec.packed(_bytes(after, t))).tightened()
        for t in every.values()
    ]


def _units(before: _Side, after: _Side, importance: Mapping[str, Array | float]) -> list[Unit]:
    seen: set[tuple[str, int]] = set()
    found = []
    for known in before.weights.values():
        for coded in known.coded:
            held = [known.tensors[n] for n in coded.names if n in known.tensors]
            places = {(t.file, t.offset) for t in held}
            sent = {(t.file, t.offset) for t in held if _bytes(before, t) != _bytes(after, t)}
            if sent & seen:  # by another engine, or with a zero point that two weights share
                continue
            if len(held) < len(coded.names):
                continue
            olds, news = ({t.name: _bytes(side, t) for t in held} for side in (before, after))
            seen |= places
            found.append(steps.unit(known, coded, olds, news, importance.get(coded.codes, 1.0)))
        for name, tensor in known.tensors.items():
            old, new = _bytes(before, tensor), _bytes(after, tensor)
            if old == new or _at(known, name) in seen:
                continue
            seen.add(_at(known, name))
            if tensor.dtype:
                found.append(rate.floats(tensor, old, new, importance.get(name, 1.0)))
            else:  # what it stands for is not known, so it is sent as it is
                found.append(
                    Unit(name=name, candidates=(Candidate(error=0.0, parts=(rate.exact(tensor, old, new),)),))
                )  # fmt: skip
    return [unit for unit in found if unit.candidates[0].error or unit.candidates[0].parts]


def _only(unit: Unit, encodings: Sequence[str]) -> Unit:
    """A unit with the ways that are made of these encodings alone; one that has no other way than one stays so."""
    first, *more = unit.candidates
    held = [way for way in more if all(part.encoding in encodings for part in way.parts)]
    return replace(unit, candidates=(first, *held))


def _at(known: Weights, name: str) -> tuple[str, int]:
    tensor = known.tensors.get(name)
    return (tensor.file, tensor.offset) if tensor else (name, -1)


# the file


class _Bare:
    """What a delta has beside its tensors, and the target that comes of them."""

    def __init__(
        self, before: _Side, after: _Side, counter: int, inputs: Mapping[str, Array] | None, anchor: bool
    ) -> None:  # fmt: skip
        self.before, self.after, self.counter, self.inputs = before, after, counter, inputs
        self.anchor = anchor
        self.patched = {t.file for w in before.weights.values() for t in w.tensors.values()}

    def target(self, entries: Sequence[Entry]) -> tuple[dict[str, Array], str]:
        """The files of the target, and its manifest: the new one with the sha256 of what came of the old files."""
        contents = {
            n: (self.before if n in self.patched else self.after).contents[n].copy()
            for n in self.after.contents
        }
        slot.patch(contents, entries)
        files = {n: hashlib.sha256(c.data).hexdigest() for n, c in contents.items()}
        engines = [{**e, "sha256": files[e["path"]]} for e in self.after.manifest["engines"]]
        by_role = {(e["target"], e["role"]): e["sha256"] for e in engines}
        links = [
            {**link, "sha256": by_role[link["target"], link["producer"]]}
            for link in self.after.manifest["links"]
        ]
        told = {**self.after.manifest, "files": files, "engines": engines, "links": links}
        return contents, slot.slot_texts(told)[0]

    def texts(self, contents: Mapping[str, Array], text: str) -> tuple[Text, ...]:
        """The files that are sent whole: those that differ, and in an anchor all but engines, which are the graph."""
        given = {n: c.tobytes() for n, c in sorted(contents.items()) if n not in self.patched}
        held = {n: self.before.contents[n].tobytes() for n in given}
        given[slot.MANIFEST], held[slot.MANIFEST] = text.encode(), self.before.text.encode()
        return tuple(
            _text(name, b"" if self.anchor else held[name], new)
            for name, new in given.items()
            if new != held[name] or (self.anchor and name not in self.before.weights)
        )


@dataclass(frozen=True, kw_only=True)
class _Built:
    """A delta with the files and the manifest of its target."""

    made: Made
    contents: dict[str, Array]
    text: str

    def kept(self, mirror: Path | None) -> Made:
        """The delta, its target written where it is asked for."""
        if mirror is not None:
            with package.staged(mirror) as stage:
                _write(stage.package, self.contents, self.text)
        return self.made


def _built(bare: _Bare, parts: Sequence[Part], error: float, signer: Any) -> _Built:
    entries = tuple(
        Entry(tensor=p.tensor, encoding=p.encoding, payload=p.payload)
        for p in sorted(parts, key=lambda p: (p.tensor.file, p.tensor.offset))
    )
    contents, text = bare.target(entries)
    before = bare.before
    found = Packet(
        base=packet.ANCHOR if bare.anchor else slot.id_of(before.text),
        target=slot.id_of(text), counter=bare.counter, graph="", error=error,
        entries=entries, texts=bare.texts(contents, text), vectors=(),
    )  # fmt: skip
    found = replace(found, graph=slot.graph_of(before.contents, (e.tensor for e in entries)))
    if text != before.text or bare.anchor:
        with scratch.held() as place:
            _write(place / "out", contents, text)
            vectors = [
                _vector(place / "out", e, bare.inputs) for e in bare.after.manifest["engines"]
            ]
        found = replace(found, vectors=tuple(vectors))
    content = packet.written(found, signer)
    full = sum(bare.before.contents[name].size for name in sorted(bare.patched))
    numbers = {
        "bytes": len(content), "full_bytes": full, "share": len(content) / full if full else 0.0,
        "error": error, "base": found.base, "target": found.target, "counter": found.counter,
        "tensors": len(entries),
        "encodings": {w: sum(e.encoding == w for e in entries) for w in sorted({e.encoding for e in entries})},
    }  # fmt: skip
    made = Made(packet=found, content=content, numbers=numbers)
    return _Built(made=made, contents=contents, text=text)


def _text(name: str, old: bytes, new: bytes) -> Text:
    import zstandard

    known = zstandard.ZstdCompressionDict(old, zstandard.DICT_TYPE_RAWCONTENT) if old else None
    frame = zstandard.ZstdCompressor(level=19, dict_data=known).compress(new)
    return Text(name=name, length=len(new), payload=frame)


def _write(place: Path, contents: Mapping[str, Array], text: str) -> None:
    for name, content in contents.items():
        file = paths.inside(place, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.tobytes())
    schema = package.SCHEMA
    (place / slot.VOLATILE).write_text(sealed({"schema": schema, "files": {}}), encoding="utf-8")
    (place / slot.MANIFEST).write_text(text, encoding="utf-8")


def _vector(root: Path, engine: Mapping[str, Any], given: Mapping[str, Array] | None) -> Vector:
    """A test vector of an engine as it will be on the device, which is run for it here."""
    feeds = {}
    for port in engine["inputs"]:
        name = port["name"]
        feeds[name] = given[name] if given and name in given else _made_up(port)
        feeds[name] = np.ascontiguousarray(feeds[name].astype(np.dtype(port["dtype"])))
    try:
        outputs = slot.session(root, engine)(feeds)
    except Exception as error:
        raise DeltaError(
            f"{engine['path']} does not run on the inputs of its test: {error}",
            hint="give inputs that it runs on: --self-test FILE.safetensors, an array for each input",
        ) from error
    numbers = {n: v for n, v in outputs.items() if v.size and np.issubdtype(v.dtype, np.number)}
    if not numbers or not all(np.isfinite(v).all() for v in numbers.values()):
        raise DeltaError(f"{engine['path']} has outputs that are no numbers", hint=FROZEN)
    looked = {n: slot.looked_at(v, min(LOOKED_AT, v.size)) for n, v in numbers.items()}
    content = b"".join(
        [*(v.tobytes() for v in feeds.values()), *(v.tobytes() for v in looked.values())]
    )
    return Vector(
        engine=engine["path"], tolerance=TOLERANCE, payload=codec.packed(content, codec.TIGHT),
        inputs=tuple((n, v.dtype.name, v.shape) for n, v in feeds.items()),
        outputs=tuple((n, numbers[n].size, v.size) for n, v in looked.items()),
    )  # fmt: skip


def _made_up(port: Mapping[str, Any]) -> Array:
    """Something to feed a port: drawn numbers, ones for a mask, and for codes 0 and 1, which any table has."""
    named = {"batch": 1}
    shape = [size if isinstance(size, int) else named.get(size, 4) for size in port["shape"]]
    count = int(np.prod(shape, dtype=np.int64))
    if np.issubdtype(np.dtype(port["dtype"]), np.floating):
        return np.random.default_rng(0).normal(size=shape)
    if "mask" in port["name"]:
        return np.ones(shape, np.int64)
    return (np.arange(count) % 2).reshape(shape)


def lines(made: Made) -> list[str]:
    """What a delta does, for a person."""
    n = made.numbers
    ways = ", ".join(f"{count} {word}" for word, count in n["encodings"].items()) or (
        "nothing fits" if n["error"] else "nothing changed"
    )
    return [
        f"{n['base'][:12]} → {n['target'][:12]}: {n['tensors']} tensors ({ways})",
        f"{n['bytes']} bytes, {n['share']:.2%} of {n['full_bytes']}; {n['error']:.3g} of the change is left out",
    ]
