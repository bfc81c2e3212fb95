"""Timings of a package that were taken on another machine, joined to its report.

`effc bench OUT --json FILE` says by sha256 which engine it timed. With those numbers the report shows what the engine
gained and how far it was from the model there. The gate is not asked again: it spoke for the machine that compiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effc import package, report, report_shape
from effc.errors import PackageError, UsageError

BENCH, TEXT = "bench.json", "report.txt"
REWRITTEN = (BENCH, report.REPORT, TEXT, report.HTML)


def join(out: Path, found: Any, where: str) -> str:
    """Put a bench that `where` holds into the report of a package; gives the machine that it is of.

    Raises UsageError where it is no bench of an engine of this package, PackageError where the package is not whole.
    """
    manifest, content = report.known(out, but=REWRITTEN)
    engines = content["manifest"]["engines"]
    timed = found.get("sha256") if isinstance(found, dict) else None
    role = found.get("role") if isinstance(found, dict) else None
    same = [e for e in engines if e["sha256"] == timed]
    entry = next((e for e in same if e["role"] == role), next(iter(same), None))
    if entry is None or not isinstance(found.get("outputs"), dict):
        raise UsageError(
            f"{where} times no engine of {out}",
            hint=f"on the other machine, with a copy of this package: effc bench {out} --json FILE",
        )
    target = package.label(entry["role"], entry["target"], [e["role"] for e in engines])
    told = content if entry is engines[0] else content["others"][target]
    before = told["bench"] or {}
    _refuse_changed(out, before.get("sha256") == timed)
    told["bench"] = {**found, **({"others": before["others"]} if "others" in before else {})}
    if told is not content and content["bench"]:
        content["bench"].setdefault("others", {})[target] = found
    if found.get("metric"):
        told["metric"] = found["metric"]
    machine = str(found.get("gpu") or found.get("cpu") or "another machine")
    content.setdefault("elsewhere", {})[target] = machine
    content["verify"].setdefault(target, {})[f"on {machine}"] = found["outputs"]
    try:
        report_shape.check(content, where)
    except PackageError as error:
        raise UsageError(error.what, hint="it is not what `effc bench --json` writes") from error
    texts = {
        BENCH: package.dump(content["bench"]),
        TEXT: report.text(content) + "\n",
        report.HTML: report.rendered(out, manifest, content, beside=True),
        report.REPORT: package.dump(content),
    }
    if BENCH not in manifest.unhashed:  # nothing was timed where it was compiled
        del texts[BENCH]
    package.replace(out, texts)
    return machine


def _refuse_changed(out: Path, joined: bool) -> None:
    """Raises PackageError where report.json is not as it was written, unless a join that was killed has changed it."""
    if joined:
        return
    if broken := [word for word in package.check(out) if word.startswith(report.REPORT)]:
        raise PackageError(f"{out}: {broken[0]}", hint=package.UNHARMED)
