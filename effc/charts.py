"""Charts as inline SVG: bars, intervals, spreads of times, and a profile of layers.

Across, everything is in per cent, and down in pixels, so that a chart fits a phone and its letters stay as large as the
text around it. Colours are classes; the page says what they look like, by day, by night and on paper. What goes into
markup goes through `tag`, which escapes it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

MOST = 1e30
"""Numbers beyond this are not drawn, nor are infinite ones, nor those nearer to 0 than its inverse."""

ROOM = 13.0
"""Per cent of the width that a number on an axis needs, on a phone."""


class Html(str):
    """Text that is markup already; everything else is escaped where it becomes part of some."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """An element. Text in it is escaped, `Html` is not; `data_key` is `data-key`, `class_` is `class`."""
    words = [
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_word(value))}"'
        for key, value in attributes.items()
        if value is not None
    ]
    return Html(f"<{name}{''.join(words)}>{join(*inside)}</{name}>")


def join(*parts: object) -> Html:
    """Parts side by side, escaped where they are not markup."""
    return Html("".join(p if isinstance(p, Html) else html.escape(str(p)) for p in parts))


def _word(value: object) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def drawable(values: Iterable[float | None]) -> list[float]:
    """The values that have a place on paper."""
    return [v for v in values if v is not None and (v == 0 or 1 / MOST < abs(v) < MOST)]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From values to per cent of the width; with `log` by their logarithm, and then all are above 0."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Iterable[float | None], *, log: bool = False) -> Scale:
        """A scale with a little air on both sides of what it shows."""
        found = [v for v in drawable(values) if v > 0 or not log] or [1.0]
        low, high = min(found), max(found)
        if log:
            air = max((high / low) ** 0.06, 1.02)
            return cls(low=low / air, high=high * air, log=True)
        air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        return cls(low=low - air, high=high + air)

    def at(self, value: float) -> float:
        if self.log:
            value = max(value, self.low)
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, share))

    def x(self, value: float) -> str:
        return f"{self.at(value):.2f}%"

    def ticks(self) -> list[float]:
        """Round values within the scale, the rounder the sooner, as many as have room for their letters."""
        found: list[float] = []
        for value in self._round():
            if self.low <= value <= self.high and all(
                abs(self.at(value) - self.at(other)) >= ROOM for other in found
            ):
                found.append(value)
        return sorted(found)

    def _round(self) -> Iterator[float]:
        if self.log and self.high / self.low > 2:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1,), (2, 5), (3,), (1.5, 7)):
                yield from (m * 10.0**p for m in digits for p in powers)
            return
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 3))
        step *= max((m for m in (2, 5) if m * step * 3 <= self.high - self.low), default=1)
        first = math.ceil(self.low / step)
        yield from ((first + i) * step for i in range(16))


def figure(name: str, title: str, desc: str, height: float, *parts: object) -> Html:
    """An SVG as wide as its place, with a name and a description for those who do not see it."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", desc, id=f"{name}-desc"),
        *parts,
        class_="chart",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        width="100%",
        height=height,
    )


def _text(words: object, x: str, y: float, class_: str, anchor: str = "start") -> Html:
    return tag("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def _heading(label: str, words: object, y: float) -> Html:
    """What a row is called, on the left, and its numbers, on the right."""
    return join(_text(shortened(label), "0", y, "label"), _text(words, "100%", y, "value", "end"))


def shortened(name: str, most: int = 36) -> str:
    """A long path, mostly its end."""
    return name if len(name) <= most else f"{name[: most // 4]}…{name[1 + most // 4 - most :]}"


def _tick(value: float, unit: str) -> str:
    return f"{value:.6g}{unit}".replace("-", "−")


def _axis(scale: Scale, bottom: float, unit: str) -> Html:
    parts = []
    for value in scale.ticks():
        place = scale.at(value)
        anchor = "start" if place < 4 else "end" if place > 96 else "middle"
        x = scale.x(value)
        parts.append(tag("line", x1=x, x2=x, y1=0, y2=bottom, class_="grid"))
        parts.append(_text(_tick(value, unit), x, bottom + 16, "tick", anchor))
    return join(*parts)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of a bar chart; without a value it has no bar."""

    label: str
    value: float | None
    words: object
    tone: str = "engine"


def bars(name: str, title: str, desc: str, rows: Sequence[Bar]) -> Html:
    """Bars from 0, one below another."""
    most = max(drawable(row.value for row in rows), default=0.0)
    most = most if most > 0 else 1.0
    parts = []
    for number, row in enumerate(rows):
        y = 40 * number
        parts.append(_heading(row.label, row.words, y + 13))
        parts.append(tag("rect", x="0", y=y + 20, width="100%", height=8, rx=4, class_="track"))
        for value in drawable([row.value]):
            width = f"{max(0.4, 100 * max(value, 0.0) / most):.2f}%"
            bar = tag("rect", x="0", y=y + 20, width=width, height=8, rx=4, class_="fill")
            parts.append(tag("g", bar, class_=row.tone))
    return figure(name, title, desc, 40 * len(rows) - 8, *parts)


@dataclass(frozen=True, kw_only=True)
class Span:
    """A value with its interval."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    words: object
    tone: str = "engine"


def intervals(
    name: str,
    title: str,
    desc: str,
    rows: Sequence[Span],
    *,
    null: float | None = None,
    log: bool = False,
    unit: str = "",
) -> Html:
    """Values and intervals on one axis; `null` is the line that an interval should be clear of."""
    values = [v for row in rows for v in (row.value, row.low, row.high)]
    scale = Scale.over([*values, null], log=log)
    bottom = 46 * len(rows)
    parts: list[Html] = [_axis(scale, bottom, unit)]
    if null is not None:
        x = scale.x(null)
        parts.append(tag("line", x1=x, x2=x, y1=0, y2=bottom, class_="null"))
    for number, row in enumerate(rows):
        y = 46 * number
        middle = y + 28
        marks: list[Html] = []
        ends = drawable([row.low, row.high])
        if len(ends) == 2:
            left, right = map(scale.x, ends)
            marks.append(tag("line", x1=left, x2=right, y1=middle, y2=middle, class_="stem"))
            marks += [
                tag("line", x1=x, x2=x, y1=middle - 5, y2=middle + 5, class_="cap")
                for x in (left, right)
            ]
        marks += [
            tag("circle", cx=scale.x(v), cy=middle, r=5, class_="dot")
            for v in drawable([row.value])
        ]
        parts += [_heading(row.label, row.words, y + 13), tag("g", *marks, class_=row.tone)]
    return figure(name, title, desc, bottom + 22, *parts)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Times of one engine: evenly spaced quantiles where they are known, else the median and the 95th per cent."""

    label: str
    quantiles: Sequence[float]
    median: float | None
    p95: float | None
    words: object
    tone: str = "engine"

    @property
    def drawn(self) -> list[float]:
        return sorted(v for v in drawable(self.quantiles) if v > 0)


def spreads(name: str, title: str, desc: str, rows: Sequence[Spread], unit: str = "") -> Html:
    """Times on a logarithmic axis: how often each occurs, the middle half as a box, the median as a dot."""
    scale = Scale.over(
        [v for row in rows for v in (*row.drawn, row.median, row.p95)],
        log=True,
    )
    bottom = 62 * len(rows)
    parts: list[Html] = [_axis(scale, bottom, unit)]
    for number, row in enumerate(rows):
        y = 62 * number
        parts.append(_heading(row.label, row.words, y + 13))
        parts.append(tag("g", *_violin(row, scale, y + 38), class_=row.tone))
    return figure(name, title, desc, bottom + 22, *parts)


def _violin(row: Spread, scale: Scale, middle: float) -> list[Html]:
    found = row.drawn
    marks: list[Html] = []
    if len(found) >= 5:
        outline = tag("path", d=_outline([scale.at(v) for v in found]), class_="violin")
        marks.append(_stretched(outline, middle - 16, 32, "0 -1 100 2"))
        low, high = (scale.at(quantile(found, share)) for share in (0.25, 0.75))
        width = f"{max(high - low, 0.3):.2f}%"
        marks.append(
            tag("rect", x=f"{low:.2f}%", y=middle - 4, width=width, height=8, rx=2, class_="box")
        )
    elif len(ends := [v for v in drawable([row.median, row.p95]) if v > 0]) == 2:
        left, right = map(scale.x, ends)
        marks.append(tag("line", x1=left, x2=right, y1=middle, y2=middle, class_="stem"))
        marks.append(tag("line", x1=right, x2=right, y1=middle - 5, y2=middle + 5, class_="cap"))
    marks += [
        tag("circle", cx=scale.x(v), cy=middle, r=4.5, class_="dot")
        for v in drawable([row.median])
        if v > 0
    ]
    return marks


def quantile(found: Sequence[float], share: float) -> float:
    """The value below which a share of evenly spaced, sorted quantiles lies."""
    place = share * (len(found) - 1)
    first = min(int(place), len(found) - 2)
    return found[first] + (place - first) * (found[first + 1] - found[first])


def _outline(places: Sequence[float], steps: int = 64) -> str:
    """A closed path around a density estimate of places in per cent, 1 high at its highest, cut at both ends.

    Gaussian kernels, as wide as Silverman's rule says and never so narrow that a tie becomes a needle.
    """
    n = len(places)
    mean = sum(places) / n
    deviation = math.sqrt(sum((p - mean) ** 2 for p in places) / n)
    middle_half = (quantile(places, 0.75) - quantile(places, 0.25)) / 1.34
    width = max(0.9 * min(deviation, middle_half) * n**-0.2, 0.4)
    low, high = places[0] - width, places[-1] + width
    across = [low + (high - low) * i / steps for i in range(steps + 1)]
    density = [sum(math.exp(-0.5 * ((x - p) / width) ** 2) for p in places) for x in across]
    most = max(density)
    points = [(x, d / most) for x, d in zip(across, density, strict=True)]
    upper = [f"{x:.2f} {-d:.3f}" for x, d in points]
    lower = [f"{x:.2f} {d:.3f}" for x, d in reversed(points)]
    return "M" + " L".join([*upper, *lower]) + " Z"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Signal to noise behind a site: with everything before it quantised too, and of the site alone."""

    name: str
    sqnr_db: float | None
    local_db: float | None
    share: float | None


PLOT, GAP, FOOT = 150, 22, 54
LETTERS, LINE = 18.0, 14
"""Per cent of the width that the label of a dot needs, and its height."""
"""Pixels of a profile: signal to noise, nothing, shares."""


def profile(name: str, title: str, desc: str, layers: Sequence[Layer]) -> Html:
    """Layers in the order of the graph: signal to noise above, each one's share of the error below.

    Names of the axes stand left of the drawing, where the page leaves room.
    """
    scale = Scale.over(v for layer in layers for v in (layer.sqnr_db, layer.local_db))
    floor = PLOT + GAP + FOOT
    parts: list[Html] = []
    for value in scale.ticks():
        y = _down(scale, value)
        parts.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(_text(_tick(value, " dB"), "-8", y + 4, "tick", "end"))
    parts.append(tag("line", x1="0", x2="100%", y1=floor, y2=floor, class_="grid"))
    parts.append(_text("share", "-8", floor - FOOT / 2 + 4, "tick", "end"))
    parts.append(_trace([layer.local_db for layer in layers], scale, "float"))
    parts.append(_trace([layer.sqnr_db for layer in layers], scale, "engine"))
    parts += _shares(layers, floor)
    parts += _hints(layers, floor)
    return figure(name, title, desc, floor + 4, *parts)


def curve(name: str, title: str, desc: str, lines: Mapping[str, Sequence[float | None]]) -> Html:
    """Values in equal steps across, one line each; `lines` are by tone."""
    scale = Scale.over(v for values in lines.values() for v in values)
    parts: list[Html] = []
    for value in scale.ticks():
        y = _down(scale, value)
        parts.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(_text(_tick(value, ""), "-8", y + 4, "tick", "end"))
    parts += [_trace(values, scale, tone) for tone, values in lines.items()]
    return figure(name, title, desc, PLOT + 4, *parts)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A dot of a scatter, and what it is called."""

    label: str
    across: float
    up: float
    tone: str = "engine"


def scatter(
    name: str, title: str, desc: str, marks: Sequence[Mark], *, unit: str = "", tall: int = 320
) -> Html:
    """Dots by what they cost, on a logarithmic axis, and what they bring; marks that cost nothing have no place on it.

    A label that would lie on another goes below it.
    """
    shown = [m for m in marks if m.across > 0 and drawable([m.across]) and drawable([m.up])]
    wide = Scale.over([m.across for m in shown], log=True)
    high = Scale.over(m.up for m in shown)
    parts: list[Html] = [_axis(wide, tall, unit)]
    for value in high.ticks():
        y = tall * (1 - high.at(value) / 100)
        parts.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        parts.append(_text(_tick(value, ""), "-8", y + 4, "tick", "end"))
    taken: list[tuple[float, float]] = []
    for mark in sorted(shown, key=lambda m: -m.up):
        x, y = wide.at(mark.across), tall * (1 - high.at(mark.up) / 100)
        low = y + 4
        while any(abs(x - other) < LETTERS and abs(low - at) < LINE for other, at in taken):
            low += 1
        taken.append((x, low))
        anchor, aside = ("end", -8) if x > 100 - LETTERS else ("start", 8)
        dot = tag("circle", tag("title", mark.label), cx=f"{x:.2f}%", cy=y, r=4, class_="dot")
        word = tag(
            "text", mark.label, x=f"{x:.2f}%", y=low, dx=aside, class_="tick", text_anchor=anchor
        )
        parts.append(tag("g", dot, word, class_=mark.tone))
    return figure(name, title, desc, tall + 22, *parts)


def columns(name: str, title: str, desc: str, counts: Sequence[Sequence[int]]) -> Html:
    """Histograms in equal steps across, one a column: the lowest bin at the foot, the darker the more are in it."""
    pitch = 100 / max(len(counts), 1)
    parts: list[Html] = []
    for i, bins in enumerate(counts):
        tall, total = PLOT / max(len(bins), 1), max(sum(bins), 1)
        for place, count in enumerate(bins):
            if not count:
                continue
            parts.append(
                tag(
                    "rect", tag("title", f"{count} of {total}"), x=f"{(i + 0.05) * pitch:.2f}%",
                    y=f"{PLOT - (place + 1) * tall:.2f}", width=f"{0.9 * pitch:.2f}%",
                    height=f"{tall:.2f}", class_="bin", fill_opacity=f"{(count / total) ** 0.5:.2f}",
                )
            )  # fmt: skip
    return figure(name, title, desc, PLOT + 4, *parts)


def _down(scale: Scale, value: float) -> float:
    return PLOT * (1 - scale.at(value) / 100)


def _trace(values: Sequence[float | None], scale: Scale, tone: str) -> Html:
    """Dots in equal steps across, and the line through them."""
    pitch = 100 / max(len(values), 1)
    points = [
        ((i + 0.5) * pitch, _down(scale, v))
        for i, value in enumerate(values)
        for v in drawable([value])
    ]
    line = tag("path", d="M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in points), class_="trace")
    dots = [tag("circle", cx=f"{x:.2f}%", cy=y, r=3, class_="dot") for x, y in points]
    return (
        tag("g", _stretched(line, 0, PLOT, f"0 0 100 {PLOT}"), *dots, class_=tone)
        if points
        else join()
    )


def _stretched(drawing: Html, y: float, height: float, box: str) -> Html:
    """A drawing that is pulled to the whole width; lines keep theirs."""
    return tag("svg", drawing, x="0", y=y, width="100%", height=height, viewBox=box,
               preserveAspectRatio="none")  # fmt: skip


def _shares(layers: Sequence[Layer], floor: float) -> list[Html]:
    pitch = 100 / max(len(layers), 1)
    most = max(drawable(layer.share for layer in layers), default=0.0)
    most = most if most > 0 else 1.0
    bars = []
    for i, layer in enumerate(layers):
        for share in drawable([layer.share]):
            tall = max(1.0, FOOT * max(share, 0.0) / most)
            x, width = f"{(i + 0.15) * pitch:.2f}%", f"{0.7 * pitch:.2f}%"
            bars.append(tag("rect", x=x, y=floor - tall, width=width, height=tall, class_="share"))
    return bars


def _hints(layers: Sequence[Layer], floor: float) -> list[Html]:
    """What a pointer that rests on a layer is told."""
    pitch = 100 / max(len(layers), 1)
    found = []
    for i, layer in enumerate(layers):
        values = (("in the engine", layer.sqnr_db), ("alone", layer.local_db))
        said = ", ".join(f"{word} {v:.1f} dB" for word, value in values for v in drawable([value]))
        hint = tag("title", f"{layer.name}: {said}")
        x, width = f"{i * pitch:.2f}%", f"{pitch:.2f}%"
        found.append(tag("rect", hint, x=x, y=0, width=width, height=floor, class_="hit"))
    return found
