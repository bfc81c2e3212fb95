"""Groups of coupled dimensions as plain data, as a table, and as a drawing of who writes and who reads each.

A drawing has a row for every group and a column for every layer, in order of execution: a filled square where the layer
writes the group, a ring where it reads it. A residual stream is a row from left to right; the width of a feed-forward
net is two squares and a ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from effc.charts import Html, tag
from effc.ir.program import Graph, place_of
from effc.passes.coupling import Group, coupled_dims

Json = dict[str, Any]
LETTER, ROW, COLUMN = 6.3, 16, 9
"""Widths of a letter and a column and the height of a row, in pixels."""
STYLE = """
svg { background: #ffffff; font: 11px ui-monospace, monospace; }
text { fill: #1c2127; } .refused text, text.note { fill: #57616b; }
line { stroke: #dedfe1; } rect { fill: #0b6b6b; } circle { fill: #ffffff; stroke: #0b6b6b; stroke-width: 2; }
.refused rect { fill: #b9bec4; } .refused circle { stroke: #b9bec4; }
"""


def describe(graph: Graph) -> Json:
    """The groups of a graph: sizes, what a unit saves, members, and why some cannot lose units."""
    coupling = coupled_dims(graph)
    tensors = [t for t in graph.tensors().values() if t.is_floating_point()]
    return {
        "prunable_share": coupling.share(),
        "parameters": sum({place_of(t): t.numel() for t in tensors}.values()),
        "groups": [_described(group) for group in coupling.groups.values()],
    }


def _described(group: Group) -> Json:
    why = group.stop
    return {
        "name": group.name,
        "size": group.size,
        "parameters_per_unit": group.parameters,
        "macs_per_unit": group.macs,
        "prunable": group.is_prunable,
        "reason": str(why) if why is not None else None,
        "hint": (why.hint or None) if why is not None else None,
        "members": [
            {"tensor": m.tensor, "dim": m.dim, "indices_per_unit": m.per_unit()}
            for m in group.members
        ],
        "writers": list(group.writers),
        "readers": list(group.readers),
        "rewritten": list(group.rewritten),
    }


def lines(role: str, found: Mapping[str, Any]) -> list[str]:
    """A row for every group; those that can lose units first."""
    groups = sorted(found["groups"], key=lambda g: not g["prunable"])
    free = sum(g["prunable"] for g in groups)
    head = (
        f"coupling {role}: {len(groups)} groups, {free} prunable, which {found['prunable_share']:.1%} of "
        f"{_count(found['parameters'])} parameters lie on"
    )
    width = max((len(g["name"]) for g in groups), default=5)
    rows = [f"    {'group':{width}}  units  parameters/unit  MACs/unit  prunable"]
    for g in groups:
        word = "yes" if g["prunable"] else f"no: {g['reason']}"
        if g["hint"]:
            word += f"; {g['hint']}"
        rows.append(
            f"    {g['name']:{width}}  {g['size']:5}  {_count(g['parameters_per_unit']):>15}  "
            f"{_count(g['macs_per_unit']):>9}  {word}"
        )
    return [head, *rows]


def _count(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def drawing(roles: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG of the groups of every role, one below the other; letters do not depend on the page around it."""
    parts: list[Html] = []
    top, width = 0.0, 0.0
    for role, found in roles.items():
        part, size = _matrix(found["groups"], role)
        parts.append(tag("g", *part, transform=f"translate(0 {top:.0f})"))
        top, width = top + size[1], max(width, size[0])
    return tag(
        "svg",
        tag("title", "Coupled dimensions"),
        tag("desc", "A filled square writes the group, a ring reads it; grey groups lose no unit."),
        Html(f"<style>{STYLE}</style>"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        width=f"{width:.0f}",
        height=f"{top:.0f}",
        role="img",
    )


def _matrix(groups: list[Json], role: str) -> tuple[list[Html], tuple[float, float]]:
    """Rows and columns of one graph, and how wide and high they are."""
    both: Iterable[str] = itertools.chain.from_iterable(g["writers"] + g["readers"] for g in groups)
    layers = list(dict.fromkeys(both))
    labels = [f"{g['name']} · {g['size']}" for g in groups]
    left = LETTER * max((len(label) for label in labels), default=0) + 16
    foot = LETTER * max((len(layer) for layer in layers), default=0)
    right = left + COLUMN * len(layers)
    head = f"{role}: {len(groups)} groups, {len(layers)} layers"
    found = [tag("text", head, x=8, y=14, class_="note")]
    for row, (group, label) in enumerate(zip(groups, labels, strict=True)):
        y = 24 + ROW * row
        marks = []
        for kind in ("readers", "writers"):
            for layer in group[kind]:
                x = left + COLUMN * layers.index(layer)
                title = tag("title", f"{layer} {'writes' if kind == 'writers' else 'reads'} it")
                if kind == "writers":
                    marks.append(tag("rect", title, x=x, y=y + 4, width=8, height=8))
                else:
                    marks.append(tag("circle", title, cx=x + 4, cy=y + 8, r=3))
        saves = f"{_count(group['parameters_per_unit'])} parameters a unit"
        found.append(
            tag(
                "g",
                tag("title", group["reason"] or saves),
                tag("line", x1=left, x2=right, y1=y + 8, y2=y + 8),
                tag("text", label, x=8, y=y + 12),
                *marks,
                class_=None if group["prunable"] else "refused",
            )
        )
    bottom = 24 + ROW * len(groups)
    for column, layer in enumerate(layers):
        turn = f"translate({left + COLUMN * column + 1:.0f} {bottom + 6}) rotate(90)"
        found.append(tag("text", layer, class_="note", transform=turn))
    return found, (max(right, 240) + 16, bottom + foot + 24)
