"""Look at an ONNX file with the rules of a target, and write another with what can be put right put right."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from effc import scratch
from effc.backends import onnx_in
from effc.errors import EffcError, PackageError, UsageError, VerifyError
from effc.lint import any_target, on_openvino, on_ort, on_tensorrt  # noqa: F401  # they make rules
from effc.lint.rule import ERROR, RULES, TARGETS, Hit, Rule
from effc.table import unknown

Array = np.ndarray[Any, Any]
ROUNDS = 3
"""How often the rules are gone through: what one puts right may let another see."""
SAME = 1e-4
"""Relative L2 that a repaired file may be from the file, both computed node by node in float."""
SIZES = (2, 1, 8, 32)
"""What free sizes are tried as, in that order."""
DATA_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A place where a rule applies, in words."""

    id: str
    level: str
    node: str
    op: str
    tensor: str
    evidence: str
    is_fixable: bool

    @classmethod
    def of(cls, rule: Rule, hit: Hit) -> Finding:
        return cls(
            id=rule.id, level=rule.level, node=hit.node.name or "", op=hit.node.op_type, tensor=hit.tensor,
            evidence=hit.evidence, is_fixable=hit.repair is not None,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What was put right, what of the file is left, and how far its numbers moved: relative L2, the worst output."""

    done: list[Finding]
    left: list[Finding]
    gap: float


def chosen(target: str, only: Collection[str] = (), without: Collection[str] = ()) -> list[Rule]:
    """The rules of a target, by id. Raises UsageError for a word that nobody knows."""
    if target not in TARGETS:
        raise UsageError(unknown("target", target, TARGETS), hint=f"one of {', '.join(TARGETS)}")
    for word in (*only, *without):
        if word not in RULES:
            raise UsageError(unknown("rule", word, RULES), hint="docs/lint.md lists the rules")
    return [
        found
        for id, found in sorted(RULES.items())
        if target in found.targets and (not only or id in only) and id not in without
    ]


def check(path: Path, rules: Collection[Rule]) -> list[Finding]:
    """Every place of a file where one of the rules applies, errors first. Raises SourceError."""
    return _findings(opened(path), rules)


def _findings(model: ir.Model, rules: Collection[Rule]) -> list[Finding]:
    found = [Finding.of(rule, hit) for rule, hit in _hits(model, rules)]
    return sorted(found, key=lambda f: f.level != ERROR)


def opened(path: Path) -> ir.Model:
    """The model of a file with the shapes that follow from its inputs. Raises SourceError."""
    model = onnx_in.load(path)
    model.graph.meta["functions"] = frozenset(model.functions)
    return _shaped(model)


def _shaped(model: ir.Model) -> ir.Model:
    """With shapes, where they can be worked out: what the file says itself may be wrong or not there."""
    try:
        found = ShapeInferencePass(data_prop=False)(model).model
    except Exception:  # a graph that breaks the rules of its operators is looked at all the same
        return model
    found.graph.meta.update(model.graph.meta)
    return found


def _hits(model: ir.Model, rules: Collection[Rule]) -> Iterator[tuple[Rule, Hit]]:
    for rule in rules:
        for hit in rule.find(model.graph):
            yield rule, hit


def repair(path: Path, place: Path, rules: Collection[Rule]) -> Repaired:
    """Write `place`, a file like `path` with what can be put right put right. Raises VerifyError where numbers move.

    Nothing is written where nothing was found that can be put right; `place` may be `path`.
    """
    model = opened(path)
    done: list[Finding] = []
    for _ in range(ROUNDS):
        before = len(done)
        for rule in rules:
            for hit in list(rule.find(model.graph)):
                if hit.repair is not None:
                    done.append(Finding.of(rule, hit))
                    hit.repair()
            _drop_dead(model.graph)
        if len(done) == before:
            break
        model = _shaped(model)
    left = _findings(model, rules)
    if not done:
        return Repaired(done=[], left=left, gap=0.0)
    with scratch.held() as held:
        made = held / place.name
        ir.save(model, made, external_data=_data_name(made, model))
        gap = difference(path, made)
        if not gap <= SAME:
            raise VerifyError(
                f"{path} gives other numbers when it is put right: relative L2 {gap:.2g}",
                hint="leave the fix out, and tell us: a rule of lint is wrong",
            )
        _publish(made, place)
    return Repaired(done=done, left=left, gap=gap)


def _drop_dead(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for title, value in list(graph.initializers.items()):
        if not value.uses() and value not in outputs:
            del graph.initializers[title]


def _data_name(place: Path, model: ir.Model) -> str | None:
    held = model.graph.initializers.values()
    size = sum(v.const_value.nbytes for v in held if v.const_value is not None)
    return f"{place.name}.data" if size > DATA_BYTES else None


def _publish(made: Path, place: Path) -> None:
    """Put a file, and the data beside it, where they are wanted: each whole or not at all, the graph last."""
    mark = uuid.uuid4().hex[:8]
    try:
        for part in sorted(
            made.parent.glob(f"{made.name}*"), reverse=True
        ):  # data before the graph
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


def difference(one: Path, other: Path) -> float:
    """Relative L2 of the outputs of two files on the same drawn inputs, the worst output.

    Both are computed node by node, as they stand. Raises VerifyError where the first does not run.
    """
    why: Exception | None = None
    for size in SIZES:
        try:
            feeds, exact = _outputs(one, size, None)
        except EffcError as error:
            why = error
            continue
        _, found = _outputs(other, size, feeds)
        return max((_gap(a, b) for a, b in zip(exact, found, strict=True)), default=0.0)
    raise VerifyError(
        f"{one} does not run, so nothing can be said of a file that is made of it: {why}",
        hint="without --fix it is looked at and left as it is",
    ) from why


def _gap(exact: Array, found: Array) -> float:
    if exact.shape != found.shape:
        return float("inf")
    a, b = exact.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    there = np.isfinite(a)
    if not np.array_equal(a[~there], b[~there], equal_nan=True):
        return float("inf")
    return float(np.linalg.norm(b[there] - a[there]) / max(float(np.linalg.norm(a[there])), 1e-30))


def _outputs(
    path: Path, size: int, feeds: dict[str, Array] | None
) -> tuple[dict[str, Array], list[Array]]:
    from effc.backends.ort_engine import PlainEngine

    engine = PlainEngine(path, threads=1)
    if feeds is None:
        draw = np.random.default_rng(0)
        feeds = {p.name: _drawn(draw, p.dtype, p.shape, size) for p in engine.inputs}
    return feeds, list(engine(feeds).values())


def _drawn(draw: np.random.Generator, dtype: str, shape: tuple[Any, ...], size: int) -> Array:
    sizes = [n if isinstance(n, int) and n > 0 else size for n in shape]
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return draw.standard_normal(sizes).astype(kind)
    return np.ones(sizes, kind)
