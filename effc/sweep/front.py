"""The trials that no other beats in everything that is asked for; of unlike machines none beats another in time.

A trial is a record of `work`. What it is worth are numbers of which less is better: the metric's loss (or the engine's
drift), milliseconds, bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effc import charts
from effc.sweep.space import Objective

Json = dict[str, Any]
STYLE = """
:root { --page: #f6f6f4; --ink: #1c2127; --muted: #57616b; --line: #dedfe1; --engine: #0b6b6b; --other: #6f4699; }
@media (prefers-color-scheme: dark) { :root { --page: #131619; --ink: #e6e9ec; --muted: #a2acb6; --line: #30363c;
  --engine: #4ec5bd; --other: #b9a0e2; } }
.engine { --tone: var(--engine); } .other { --tone: var(--other); }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.5rem 1.5rem 4.5rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; } pre { overflow-x: auto; font-size: .8rem; }
.chart { display: block; overflow: visible; font-size: 13px; } .chart text { fill: var(--ink); }
.chart .tick { fill: var(--muted); font-size: 11.5px; } .chart .dot { fill: var(--tone); }
.chart .grid { stroke: var(--line); }
"""


@dataclass(frozen=True, kw_only=True)
class Front:
    """Records by what became of them; `near` are those that are beaten by less than the intervals say."""

    machine: Json
    best: tuple[Json, ...]
    near: tuple[Json, ...]
    rest: tuple[Json, ...]


def fronts(records: Sequence[Json], objectives: Sequence[Objective]) -> list[Front]:
    """A front for every kind of machine that trials ran on, or one where time is not asked for."""
    done = [
        r for r in records if r["state"] == "done" and all(o in r["values"] for o in objectives)
    ]
    groups: dict[str, list[Json]] = {}
    for record in sorted(done, key=lambda r: str(r["name"])):
        timed = "latency" in objectives
        groups.setdefault(
            json.dumps(record["machine"], sort_keys=True) if timed else "", []
        ).append(record)
    return [_front(group, objectives) for _, group in sorted(groups.items())]


def _front(group: Sequence[Json], objectives: Sequence[Objective]) -> Front:
    best, near, rest = [], [], []
    for record in group:
        others = [other for other in group if other is not record]
        if not any(_beats(other, record, objectives, "value", "value") for other in others):
            best.append(record)
        elif not any(_beats(other, record, objectives, "high", "low") for other in others):
            near.append(record)
        else:
            rest.append(record)
    machine = group[0]["machine"] if "latency" in objectives else {}
    best.sort(key=lambda r: [r["values"][o]["value"] for o in objectives])
    return Front(machine=machine, best=tuple(best), near=tuple(near), rest=tuple(rest))


def _beats(one: Json, other: Json, objectives: Sequence[Objective], mine: str, theirs: str) -> bool:
    """Whether one is as good in everything and better in something, by those ends of the intervals."""

    def end(record: Json, objective: Objective, word: str) -> float:
        value = record["values"][objective]
        return float(value.get(word, value["value"]))

    pairs = [(end(one, o, mine), end(other, o, theirs)) for o in objectives]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def to_json(
    found: Sequence[Front], records: Sequence[Json], objectives: Sequence[Objective]
) -> Json:
    def names(group: Sequence[Json]) -> list[str]:
        return [r["name"] for r in group]

    failed = [{"name": r["name"], "error": r["error"]} for r in records if r["state"] != "done"]
    return {
        "objectives": list(objectives),
        "fronts": [
            {"machine": f.machine, "best": names(f.best), "near": names(f.near), "rest": names(f.rest)} for f in found
        ],
        "failed": failed,
        "trials": {r["name"]: r for r in records},
    }  # fmt: skip


def lines(
    found: Sequence[Front], records: Sequence[Json], objectives: Sequence[Objective]
) -> list[str]:
    """What a terminal shows."""
    made = []
    for front in found:
        if front.machine:
            made.append(_machine(front.machine))
        wide = max((len(r["name"]) for r in (*front.best, *front.near)), default=5)
        made.append("  ".join(["trial".ljust(wide), *(o.rjust(24) for o in objectives)]))
        for mark, group in (("", front.best), (" ~", front.near)):
            for record in group:
                cells = (cell(o, record["values"][o]).rjust(24) for o in objectives)
                made.append("  ".join([record["name"].ljust(wide), *cells]) + mark)
        if front.near:
            made.append("~ is beaten, but by less than the intervals of both say")
        made.append(f"{len(front.rest)} more are beaten")
    made += [
        f"failed    {r['name']}: {r['error']['what']}" for r in records if r["state"] != "done"
    ]
    return made


def _machine(machine: Mapping[str, Any]) -> str:
    threads = machine["threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def cell(objective: str, value: Mapping[str, Any]) -> str:
    shown = value.get("shown", value["value"])
    if objective == "size":
        return f"{shown / 1e6:.2f} MB"
    ends = (
        f" [{value['low']:.3g}, {value['high']:.3g}]"
        if "low" in value and objective == "latency"
        else ""
    )
    return f"{shown:.4g}{ends}" + (" ms" if objective == "latency" else "")


def page(found: Sequence[Front], records: Sequence[Json], objectives: Sequence[Objective]) -> str:
    """The same as a page that loads nothing: for every machine what trials cost, beside their accuracy."""
    parts = [charts.tag("h1", "What is worth having")]
    cost = next((o for o in objectives if o != "accuracy"), None)
    for number, front in enumerate(found):
        title = _machine(front.machine) if front.machine else "all machines"
        parts.append(charts.tag("h2", title))
        if cost is not None and "accuracy" in objectives:
            parts.append(_scatter(f"front-{number}", title, front, cost))
    text = "\n".join(lines(found, records, objectives))
    parts.append(charts.tag("pre", text))
    body = "\n".join(str(part) for part in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>sweep</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n{body}\n'
        "</body></html>\n"
    )


def _scatter(name: str, title: str, front: Front, cost: Objective) -> charts.Html:
    scale, unit = (1.0, " ms") if cost == "latency" else (1e-6, " MB")
    marks = [
        charts.Mark(
            label=r["name"] if tone == "engine" else "", across=scale * r["values"][cost]["value"],
            up=r["values"]["accuracy"].get("shown", r["values"]["accuracy"]["value"]), tone=tone,
        )
        for tone, group in (("other", (*front.near, *front.rest)), ("engine", front.best))
        for r in group
    ]  # fmt: skip
    return charts.scatter(
        name, title, f"accuracy by {cost} of {len(marks)} trials", marks, unit=unit
    )
