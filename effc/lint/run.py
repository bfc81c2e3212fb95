"""Look at an ONNX file with the rules of a target, and write another with what can be put right put right."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from effc import peers
from effc.backends import onnx_out
from effc.backends.base import Array
from effc.backends.ort_engine import PlainEngine
from effc.errors import EffcError, UsageError, VerifyError
from effc.foreign.file import load
from effc.lint import any_target, on_openvino, on_ort, on_tensorrt  # noqa: F401  # they make rules
from effc.lint.rule import ERROR, RULES, TARGETS, Hit, Rule
from effc.table import unknown

ROUNDS = 3
"""How often the rules are gone through: what one puts right may let another see."""
SAME = 1e-4
"""Relative L2 that a repaired file may be from the file, both computed node by node in float."""
SIZES = (2, 1, 8, 32)
"""What free sizes are tried as, in that order."""


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
        known = f"one of {', '.join(TARGETS)}"
        raise UsageError(unknown("target", target, TARGETS), hint=peers.hint(target) or known)
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
    model = load(path)
    model.graph.meta["functions"] = frozenset(model.functions)
    return onnx_out.shaped(model)


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
            onnx_out.drop_dead(model.graph)
        if len(done) == before:
            break
        model = onnx_out.shaped(model)
    left = _findings(model, rules)
    if not done:
        return Repaired(done=[], left=left, gap=0.0)

    def check(made: Path) -> float:
        gap = difference(path, made)
        if gap <= SAME:
            return gap
        raise VerifyError(
            f"{path} gives other numbers when it is put right: relative L2 {gap:.2g}",
            hint="leave the fix out, and tell us: a rule of lint is wrong",
        )

    gap = onnx_out.write(model, place, check)
    return Repaired(done=done, left=left, gap=gap)


def difference(one: Path, other: Path) -> float:
    """Relative L2 of the outputs of two files on the same drawn inputs, the worst output.

    Both are computed node by node, as they stand. Raises VerifyError where the first does not run.
    """
    why: Exception | None = None
    for size in SIZES:
        try:
            feeds, exact = _run(one, size, None)
        except EffcError as error:
            why = error
            continue
        return onnx_out.gap(exact, _run(other, size, feeds)[1])
    raise VerifyError(
        f"{one} does not run, so nothing can be said of a file that is made of it: {why}",
        hint="without --fix it is looked at and left as it is",
    ) from why


def _run(
    path: Path, size: int, feeds: dict[str, Array] | None
) -> tuple[dict[str, Array], dict[str, Array]]:
    with PlainEngine(path, threads=1) as engine:
        given = onnx_out.drawn(engine.inputs, size) if feeds is None else feeds
        return given, engine(given)
