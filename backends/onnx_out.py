"""An ONNX file that is made of another: held against it on drawn inputs, then written as a whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from effc import scratch
from effc.backends.base import Array, Port
from effc.errors import PackageError

DATA_BYTES = 256 << 20
"""Weights above that lie beside the graph."""


def shaped(model: ir.Model) -> ir.Model:
    """With shapes and types, where they can be worked out: what the file says itself may be wrong or not there."""
    kept = dict(model.graph.meta)
    try:
        found = ShapeInferencePass(data_prop=False)(model).model
    except Exception:  # a graph that breaks the rules of its operators is looked at all the same
        return model
    found.graph.meta.update(kept)
    return found


def drop_dead(graph: ir.Graph) -> None:
    """Take out nodes and initialisers that nothing reads."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for title, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[title]


def write(model: ir.Model, place: Path, check: Callable[[Path], float]) -> float:
    """Write a model where it is wanted once `check` has seen the file, and give what `check` gives."""
    held_bytes = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    with scratch.held() as held:
        made = held / place.name
        ir.save(model, made, external_data=f"{made.name}.data" if held_bytes > DATA_BYTES else None)
        found = check(made)
        _publish(made, place)
    return found


def _publish(made: Path, place: Path) -> None:
    """Put a file, and the data beside it, where they are wanted: each whole or not at all, the graph last."""
    mark = uuid.uuid4().hex[:8]
    try:
        for part in sorted(made.parent.glob(f"{made.name}*"), reverse=True):
            aside = place.with_name(f".{part.name}.{mark}")
            try:
                aside.write_bytes(part.read_bytes())
                os.replace(aside, place.with_name(part.name))
            finally:
                aside.unlink(missing_ok=True)
    except OSError as error:
        raise PackageError(
            f"{place} cannot be written: {error.strerror}", hint="name a file in a directory"
        ) from error


def drawn(
    ports: Sequence[Port],
    size: int,
    *,
    ranges: Mapping[str, float] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Array]:
    """Inputs of a file: a normal draw, and ones of whole numbers. `size` is what free sizes are.

    `ranges` are the largest values that inputs have, `shapes` what shapes they have, by name.
    """  # fmt: skip
    draw = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for port in ports:
        sizes = [n if isinstance(n, int) and n > 0 else size for n in port.shape]
        sizes = list((shapes or {}).get(port.name, sizes))
        kind = np.dtype(port.dtype)
        scale = (ranges or {}).get(port.name, 3.0) / 3
        values = draw.standard_normal(sizes) * scale if kind.kind == "f" else np.ones(sizes)
        made[port.name] = values.astype(kind)
    return made


def gap(exact: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    """Relative L2 between outputs, the worst of them; infinite where shapes differ, or what is no number."""
    return max((_gap(exact[name], found[name]) for name in exact), default=0.0)


def _gap(exact: Array, found: Array) -> float:
    if exact.shape != found.shape:
        return float("inf")
    a, b = exact.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    there = np.isfinite(a)
    if not np.array_equal(a[~there], b[~there], equal_nan=True):
        return float("inf")
    return float(np.linalg.norm(b[there] - a[there]) / max(float(np.linalg.norm(a[there])), 1e-30))
