"""What weights matter, known by the names of a model, by the initialisers of a package: what `make` asks for.

    h of W      →  h of what became of W          origins.json of the package says what that is
    W' = W·s    →  h' = h ÷ s²                    s is read from the values, where those of W are given

Codes have the importance of the weight that they stand for. A weight is transposed where the engine reads it so, and
joined where several became one. Where a pass did something else to it, its importance is not known, and that is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effc import bounded, paths
from effc.delta import slot, weights
from effc.delta.codec import Array
from effc.delta.weights import Coded, Weights
from effc.errors import DeltaError

TAILS = (".t", ".nbits")
"""What the ONNX has behind the name of a tensor that it holds otherwise."""
NARROW = ".int4"
"""And behind that where two of its codes lie in a byte."""
STAYS = ("int32", "quantize ")
"""Transforms, or how they begin, that leave what every element stands for."""
MOVES = ("tuned", "bias correction")
"""Transforms that give elements other values at the same places."""
SCALES = ("smooth", "awq", "level", "layer-scale")
"""Transforms that multiply channels."""
MOST_OFF = 0.05
"""How far, relative L2, values may be from the source's by one factor a channel: what rounding to codes leaves."""


def by_initialiser(
    package: Path, known: Mapping[str, Array], values: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """The importance of every initialiser of a package whose source is in `known`, in the shape that `make` takes.

    `known` has h ≥ 0 by the name that a tensor has in the source model, in its shape; `values` the tensors themselves,
    asked for where a pass has scaled channels. Raises DeltaError where h does not fit, or what a pass did is not known.
    """
    manifest = slot.manifest_of(package)
    text = bounded.content(
        paths.opened(package, "origins.json", DeltaError), "origins.json", DeltaError, 1 << 28
    )
    try:
        origins = json.loads(text)
        graphs = [origins[role] for role in _roles(manifest["engines"])]
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaError(
            f"{package} does not say where its tensors come from: {error!r}",
            hint="compile it with this version of effc",
        ) from error
    found: dict[str, Array] = {}
    for engine, graph in zip(manifest["engines"], graphs, strict=True):
        held = weights.read(package, engine["path"])
        found |= dict(_of_engine(package, held, graph, known, values or {}))
    return found


def _roles(engines: Sequence[Mapping[str, Any]]) -> list[str]:
    several = len({e["target"] for e in engines}) > 1
    return [f"{e['target']}/{e['role']}" if several else e["role"] for e in engines]


def _of_engine(
    package: Path, held: Weights, graph: Mapping[str, Any], known: Mapping[str, Array], values: Mapping[str, Array]
) -> Iterator[tuple[str, Array]]:  # fmt: skip
    codes = {each.codes: each for each in held.coded}
    beside = {name for each in held.coded for name in each.names[1:]}
    for name, tensor in held.tensors.items():
        wide = name.removesuffix(NARROW)
        tail = next((t for t in TAILS if wide.endswith(t)), "")
        origin = graph.get(wide) or graph.get(wide.removesuffix(tail))
        if name in beside or origin is None or not (name in codes or tensor.dtype):
            continue
        sources = origin["source"].split("+")
        if not all(source in known for source in sources):
            continue
        h, scales = _told(name, origin["transforms"], [known[s] for s in sources])
        h = _laid(name, tail, h, held, codes.get(name))
        if scales:
            if not all(source in values for source in sources):
                raise DeltaError(
                    f"{name!r} was scaled ({scales[0]}), and by how much is not known",
                    hint="give the values of the source model too",
                )
            source, _ = _told(name, origin["transforms"], [values[s] for s in sources])
            before = _laid(name, tail, source, held, codes.get(name))
            h = h / _factors(name, before, _values(package, held, name, codes)) ** 2
        yield name, np.ascontiguousarray(h)


def _told(name: str, transforms: Sequence[str], parts: Sequence[Array]) -> tuple[Array, list[str]]:
    """Tensors of the source as passes left their elements, and which of the passes scaled them."""
    scales = []
    arrays = [np.asarray(part, np.float64) for part in parts]
    for word in transforms:
        if word in SCALES:
            scales.append(word)
        elif word == "transpose":
            arrays = [a.T for a in arrays]
        elif word == "concatenate":
            arrays = [_joined(name, arrays)]
        elif not word.startswith((*STAYS, *MOVES)) or (scales and word in MOVES):
            raise DeltaError(
                f"what {word!r} made of the importance of {name!r} is not known",
                hint="leave its source out, or compile without that pass",
            )
    if len(arrays) > 1:
        raise DeltaError(
            f"{name!r} is of several tensors, and nothing says how", hint="leave its sources out"
        )
    return arrays[0], scales


def _joined(name: str, parts: Sequence[Array]) -> Array:
    try:
        return np.concatenate(parts)
    except ValueError as error:
        raise DeltaError(
            f"{name!r} is of several tensors, and what is known of them cannot be joined: {error}",
            hint="give each in the shape of the tensor in the source model",
        ) from error


def _laid(name: str, tail: str, h: Array, held: Weights, coded: Coded | None) -> Array:
    """An array as an initialiser has its elements; codes that are packed in blocks are unpacked, and padded with 0."""
    shape = held.tensors[name].shape
    if tail == ".t":
        h = h.T
    if coded is not None and coded.bits:
        rows, blocks, _ = shape
        room = blocks * coded.block - h.shape[-1] if h.ndim == 2 else -1
        if 0 <= room < coded.block and len(h) == rows:
            return np.pad(h, ((0, 0), (0, room))).reshape(rows, blocks, coded.block)
    elif h.shape == shape:
        return h
    raise DeltaError(
        f"the importance of {name!r} is {list(h.shape)}, which does not go with {list(shape)}",
        hint="give it in the shape of the tensor in the source model",
    )


def _values(package: Path, held: Weights, name: str, codes: Mapping[str, Coded]) -> Array:
    def content(each: str) -> bytes:
        tensor = held.tensors[each]
        with paths.opened(package, tensor.file, DeltaError) as stream:
            stream.seek(tensor.offset)
            return stream.read(tensor.length)

    if name not in codes:
        tensor = held.tensors[name]
        return np.frombuffer(content(name), f"<f{tensor.width}").reshape(tensor.shape)
    coded = codes[name]
    read, scale, zero = weights.grid(
        held, coded, {n: content(n) for n in coded.names if n in held.tensors}
    )
    found: Array = (read.astype(np.float64) - zero) * scale
    return found


def _factors(name: str, before: Array, after: Array) -> Array:
    """What the channels of one axis were multiplied by, as least squares say; 1 where nothing is left of one."""
    best, least = np.ones_like(before), np.inf
    for axis in range(before.ndim):
        others = tuple(i for i in range(before.ndim) if i != axis)
        size = (before**2).sum(others, keepdims=True)
        ratio = (before * after).sum(others, keepdims=True) / np.where(size, size, 1)
        off = float(np.linalg.norm(np.maximum(ratio, 0) * before - after))
        if off < least:
            best, least = np.broadcast_to(np.where(ratio > 0, ratio, 1.0), before.shape), off
    if least > MOST_OFF * float(np.linalg.norm(after)):
        raise DeltaError(
            f"{name!r} is no scaled {list(before.shape)} of the values that were given",
            hint="give the values of the model that the package was compiled of",
        )
    return best
