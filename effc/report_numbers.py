"""A number on a page, and the place in report.json that it comes from.

`At` walks through a report and remembers the way, so that what is printed carries its path: `data-key` where it stands
there as it is, with `data-over` or `data-less` where it is divided by another one or another one is taken off.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from effc.charts import Html, tag


class At:
    """A place in a report: what stands there, and the path that leads to it. Beyond a leaf there is nothing."""

    __slots__ = ("raw", "trail")

    def __init__(self, raw: Any, trail: tuple[str | int, ...] = ()) -> None:
        self.raw, self.trail = raw, trail

    def __getitem__(self, step: str | int) -> At:
        inside = isinstance(self.raw, dict if isinstance(step, str) else list)
        try:
            found = self.raw[step] if inside else None
        except (KeyError, IndexError):
            found = None
        return At(found, (*self.trail, step))

    def __iter__(self) -> Iterator[At]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.raw) if isinstance(self.raw, dict | list) else 0

    def __bool__(self) -> bool:
        return self.raw is not None and self.raw is not False and self.raw not in ("", [], {})

    def __str__(self) -> str:
        return "—" if self.raw is None else str(self.raw)

    def pairs(self) -> list[tuple[str, At]]:
        return [(key, self[key]) for key in self.raw or ()]

    @property
    def key(self) -> str:
        """`bench.shapes.0.ratio`; a dot in a name has a backslash before it."""
        return ".".join(re.sub(r"([\\.])", r"\\\1", str(step)) for step in self.trail)


def curve_words(curve: Any) -> str:
    """`held-out loss 0.51 → 0.043 in 200 steps, the least at 150, 12 s`"""
    points = [p for p in curve if p["held"] is not None and p.get("counts", True)]
    if not points:
        ends = [p["loss"] for p in curve if p["loss"] is not None]
        words = f"loss {ends[0]:.3g} → {ends[-1]:.3g}" if ends else "no loss"
        return f"{words} in {curve[-1]['step']} steps, {curve[-1]['seconds']:.0f} s"
    end = f"in {curve[-1]['step']} steps"
    if points[0].get("score") is not None:
        best = max(points, key=lambda p: p["score"])
        words = f"held-out score {points[0]['score']:.4f} → {best['score']:.4f} {end}"
        return f"{words}, the best at {best['step']}, {curve[-1]['seconds']:.0f} s"
    best = min(points, key=lambda p: p["held"])
    words = f"held-out loss {points[0]['held']:.3g} → {best['held']:.3g}"
    return f"{words} {end}, the least at {best['step']}, {curve[-1]['seconds']:.0f} s"


def gate_words(gates: Any) -> str:
    """`48 of 64 channels stay; their gates were within 0.012 of 0 and 1, and 3 had not decided`"""
    words = f"{gates['kept']} of {gates['of']} channels stay; their gates were within {gates['gap']:.2g} of 0 and 1"
    return f"{words}, and {gates['undecided']} had not decided" if gates["undecided"] else words


def whole_words(whole: Any) -> str:
    """`left whole, since in multiples of 16 too little of them would go: fc1 (32 units), fc2 (48), and 4 more`"""
    (first, size), *others = whole["groups"].items()
    names = [f"{first} ({size} units)", *(f"{name} ({size})" for name, size in others[:2])]
    more = f", and {len(others) - 2} more" if len(others) > 2 else ""
    return f"left whole, since in multiples of {whole['align']} too little of them would go: {', '.join(names)}{more}"


def block_words(blocks: Any) -> str:
    """`7 blocks learned in 61 s, 55 s foretold; 2 taken from before`"""
    seconds, foretold = (
        sum(b[word] for b in blocks if not b["resumed"]) for word in ("seconds", "predicted_s")
    )
    names = {b["block"] for b in blocks}
    resumed = {b["block"] for b in blocks if b["resumed"]}
    more = f"; {len(resumed)} taken from before" if resumed else ""
    return f"{len(names)} blocks learned in {seconds:.0f} s, {foretold:.0f} s foretold{more}"


def size_words(sizes: Any) -> list[str]:
    """What the groups of a pruned graph bought, a line for every kind, and all of them together.

    `fc1 and 11 alike: 1 536 → 1 152 units (1 075 wished for; tried 1 088), 30.1 → 24.5 ms [24.3, 24.7]`
    """
    whole, lines = sizes["whole_ms"], []
    for kind in sizes["kinds"]:
        first, *rest = kind["groups"]
        alike = f" and {len(rest)} alike" if rest else ""
        units = f"{kind['size']:,} → {kind['kept']:,} units".replace(",", " ")
        if kind["kept"] == kind["size"]:
            units = f"all {kind['size']:,} units stay, fewer are slower".replace(",", " ")
        others = [
            str(t["units"])
            for t in kind["tried"]
            if t["units"] not in (kind["kept"], kind["wanted"])
        ]
        notes = [f"{kind['wanted']} wished for"] if kind["wanted"] != kind["kept"] else []
        notes += [f"tried {', '.join(others)}"] if others else []
        noted = f" ({'; '.join(notes)})" if notes else ""
        lines.append(f"{first}{alike}: {units}{noted}, {_took(whole, kind['bought'])}")
    asked = f" at a ratio of {sizes['ratio']:.3g}" if sizes["ratio"] is not None else ""
    alone = whole + sum(kind["bought"]["ms"] - whole for kind in sizes["kinds"])
    together = f"all{asked}: {_took(whole, sizes['together'])}"
    return [
        *lines,
        f"{together}; the sum of the lines is {alone:.3g} ms" if len(lines) > 1 else together,
    ]


def _took(whole_ms: float, took: Any) -> str:
    """`30.1 → 24.5 ms [24.3, 24.7]`"""
    return f"{whole_ms:.3g} → {took['ms']:.3g} ms [{took['low']:.3g}, {took['high']:.3g}]"


def find(content: Any, key: str) -> Any:
    """What stands in a report under the key of a place; None where there is nothing."""
    for step in re.findall(r"(?:[^\\.]|\\.)+", key):
        name = re.sub(r"\\(.)", r"\1", step)
        if isinstance(content, list):
            content = content[int(name)] if int(name) < len(content) else None
        else:
            content = content.get(name) if isinstance(content, dict) else None
    return content


def _digits(value: float, pattern: str) -> str:
    """A number as people write it: a true minus, groups of three, a sign for what has no end, powers for the absurd."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 1e15:
        pattern = ".3e"
    return f"{value:{pattern}}".replace(",", "\u202f").replace("-", "−")


def _significant(value: float) -> str:
    """Three digits that count, in a column as well."""
    return _digits(value, "#.3g").removesuffix(".") if value else "0"


def _bytes(value: float) -> str:
    for power, unit, pattern in ((3, "GB", ".2f"), (2, "MB", ".1f"), (1, "kB", ".1f")):
        if value >= 1000**power:
            return f"{_digits(value / 1000**power, pattern)} {unit}"
    return f"{_digits(value, '.0f')} B"


FORMATS: dict[str, Callable[[float], str]] = {
    "count": partial(_digits, pattern=",.0f"),
    "bytes": _bytes,
    "ms": partial(_digits, pattern=",.2f"),
    "mb": partial(_digits, pattern=",.0f"),
    "seconds": lambda value: _digits(value, ".3f" if abs(value) < 0.1 else ",.1f"),
    "ratio": lambda value: _digits(value, ",.2f") + "×",
    "smaller": lambda value: _digits(value, ",.1f") + "×",
    "end": partial(_digits, pattern=",.2f"),
    "drift": _significant,
    "cosine": partial(_digits, pattern=".5f"),
    "metric": partial(_digits, pattern=".4f"),
    "signed": partial(_digits, pattern="+.4f"),
    "bound": partial(_digits, pattern=".4g"),
    "db": partial(_digits, pattern=".1f"),
    "share": lambda value: _digits(100 * value, ".1f") + " %",
    "level": lambda value: _digits(100 * value, ".0f") + " %",
}


def number(
    kind: str, value: At, over: At | None = None, less: At | None = None, *, element: str = "span"
) -> Html:
    """A number of the report, or what it is beside another one, in an element that says so."""
    found = value.raw
    for other, act in ((over, _divided), (less, _difference)):
        if other is not None:
            found = None if None in (found, other.raw) else act(found, other.raw)
    return tag(
        element,
        "—" if found is None else FORMATS[kind](found),
        class_="n",
        data_key=value.key,
        data_as=kind,
        data_over=over.key if over is not None else None,
        data_less=less.key if less is not None else None,
    )


def _divided(a: float, b: float) -> float:
    return a / max(b, 1)


def _difference(a: float, b: float) -> float:
    return a - b
