"""What lint found, for people, for scripts and for code review: lines, JSON and SARIF 2.1.0."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from effc.lint.rule import ERROR, RULES, Rule
from effc.lint.run import Finding

SARIF = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def lines(path: Path, target: str, found: Sequence[Finding]) -> list[str]:
    """A finding in three lines: where, what it costs, and what to do."""
    told = []
    for one in found:
        rule = RULES[one.id]
        what = f"{one.op} {one.node}".strip()
        told += [
            f"{path}: {one.level} {one.id} {what}: {rule.what} ({one.evidence})",
            f"    cost: {rule.cost}",
            f"    fix{', by --fix' if one.is_fixable else ''}: {rule.fix}",
        ]
    return [*told, f"{path}: {summary(found)} for {target}"]


def summary(found: Sequence[Finding]) -> str:
    if not found:
        return "nothing was found"
    errors = sum(one.level == ERROR for one in found)
    parts = [_count(errors, "error"), _count(len(found) - errors, "warning")]
    can = sum(one.is_fixable for one in found)
    return " and ".join(p for p in parts if p) + (f", {can} of them by --fix" if can else "")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}" if number else ""


def to_json(
    path: Path, target: str, found: Sequence[Finding], others: Sequence[Any] = ()
) -> dict[str, Any]:
    return {
        "model": path.name,
        "target": target,
        "findings": [{**_plain(one), **_of_rule(RULES[one.id])} for one in found],
        "counts": dict(sorted(Counter(one.id for one in found).items())),
        "elsewhere": [peer.to_json() for peer in others],
    }


def _plain(one: Finding) -> dict[str, Any]:
    return {
        "id": one.id, "level": one.level, "node": one.node, "op": one.op, "tensor": one.tensor,
        "evidence": one.evidence, "fixable": one.is_fixable,
    }  # fmt: skip


def _of_rule(rule: Rule) -> dict[str, Any]:
    return {"what": rule.what, "cost": rule.cost, "fix": rule.fix}


def sarif(
    found: Iterable[tuple[Path, str, Sequence[Finding]]], rules: Sequence[Rule]
) -> dict[str, Any]:
    """One run of lint over files and targets. A node has no line in a binary file: its name stands as logical place."""
    places = {rule.id: number for number, rule in enumerate(rules)}
    results = [
        _result(path, target, one, places[one.id]) for path, target, all_ in found for one in all_
    ]
    driver = {
        "name": "effc lint", "version": version("effc"), "semanticVersion": version("effc"),
        "informationUri": "https://pypi.org/project/effc/", "rules": [_rule(r) for r in rules],
    }  # fmt: skip
    run = {"tool": {"driver": driver}, "columnKind": "utf16CodeUnits", "results": results}
    return {"$schema": SARIF, "version": "2.1.0", "runs": [run]}


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.what},
        "fullDescription": {"text": f"{rule.what}. {rule.cost}."},
        "help": {"text": rule.fix},
        "defaultConfiguration": {"level": rule.level},
        "properties": {"targets": list(rule.targets)},
    }


def _result(path: Path, target: str, one: Finding, place: int) -> dict[str, Any]:
    rule = RULES[one.id]
    text = f"{one.op} {one.node}: {rule.what} ({one.evidence}). {rule.cost}. {rule.fix}."
    uri = quote(path.as_posix() if not path.is_absolute() else os.path.relpath(path))
    node = {
        "name": one.node or one.op,
        "fullyQualifiedName": f"{path.name}/{one.node}",
        "kind": "member",
    }
    return {
        "ruleId": one.id,
        "ruleIndex": place,
        "level": one.level,
        "message": {"text": text},
        "locations": [
            {
                "physicalLocation": {"artifactLocation": {"uri": uri}},
                "logicalLocations": [node],
            }
        ],
        "partialFingerprints": {"place/v1": f"{one.id}:{one.node}:{one.tensor}"},
        "properties": {"target": target, "tensor": one.tensor, "fixable": one.is_fixable},
    }
