"""A page that shows what was measured: accuracy by round, bytes, how far one arm is ahead, and what shifts leave.

It loads nothing, and its drawings are those of `effc.charts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import arms as made_of
from plans import SHOWN, WHOLE

from effc.charts import Bar, Html, Mark, Span, bars, curve, intervals, join, scatter, tag

Json = dict[str, Any]
TONES = ("engine", "float", "torch", "other", "good")
SHARES = {
    "recovered": "Accuracy gained, of what training on every label gains.",
    "up_share": "Bytes up, of the pictures as JPEG.",
    "down_share": "Bytes down, of the engine's weights a round.",
}
BOUGHT = {
    "down": (
        "down_share",
        (*made_of.DOWNLINK, WHOLE),
        "Bytes down, of the engine's weights a round, and what they bring.",
    ),
    "up": (
        "up_share",
        (*made_of.UPLINK, "all tokens", WHOLE, *made_of.GRID),
        "Bytes up, of the pictures as JPEG, and what they bring.",
    ),
}
BESIDE = {"fp16_share": "adapters, fp16", "zlib_share": "adapters, fp16, zlib"}
"""What the same training would take where nothing is chosen."""
STYLE = """
:root { --page: #f6f6f4; --card: #fff; --ink: #1c2127; --muted: #57616b; --line: #dedfe1; --track: #e9e9e7;
  --engine: #0b6b6b; --float: #5d6977; --torch: #9a5500; --other: #6f4699; --good: #1a6b3a; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #131619; --card: #1a1e22; --ink: #e6e9ec;
  --muted: #a2acb6; --line: #30363c; --track: #2a3036; --engine: #4ec5bd; --float: #98a5b5; --torch: #e0a255;
  --other: #b9a0e2; --good: #62c98d; } }
.engine { --tone: var(--engine); } .float { --tone: var(--float); } .torch { --tone: var(--torch); }
.other { --tone: var(--other); } .good { --tone: var(--good); }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 1.25rem;
  margin: 1rem 0; }
figure { margin: 1rem 0 1rem 3.5rem; } p { max-width: 70ch; color: var(--muted); }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; color: var(--muted); }
.legend li::before { content: ""; display: inline-block; width: .7em; height: .7em; border-radius: 50%;
  background: var(--tone); margin-right: .45em; }
.chart { display: block; overflow: visible; font-size: 13px; } .chart text { fill: var(--ink); }
.chart .tick { fill: var(--muted); font-size: 11.5px; } .chart .track { fill: var(--track); }
.chart .fill, .chart .dot { fill: var(--tone); } .chart .grid { stroke: var(--line); }
.chart .null { stroke: var(--muted); stroke-dasharray: 3 3; }
.chart .stem, .chart .cap { stroke: var(--tone); stroke-width: 2; }
.chart .trace { fill: none; stroke: var(--tone); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; }
th, td { text-align: right; padding: .35rem .6rem; }
th:first-child { text-align: left; } tr + tr > * { border-top: 1px solid var(--line); }
"""


def drawn(found: Json) -> str:
    """The page of what `summary.told` gives."""
    parts = [tag("h1", "A device and its cloud"), tag("p", _lede(found))]
    for domain, arms in found["arms"].items():
        parts += [_section(f"In the domain {domain}", *_domain(domain, arms, found))]
    if found["shifts"]:
        parts.append(_section("Three shifts, one after the other", *_shifts(found)))
    title = tag("title", "A device and its cloud")
    head = tag("head", Html('<meta charset="utf-8">'), title, tag("style", Html(STYLE)))
    return "<!doctype html>\n" + tag("html", head, tag("body", *parts), lang="en")


def _lede(found: Json) -> str:
    share, faults = found["recovered_fraction"], found["faults"]
    up = _share(found["bytes_up"], found["jpeg_bytes"])
    down = _share(found["bytes_down"], found["full_bytes"])
    return (
        f"{'—' if share is None else f'{share:.2f}'} of what training on every label gives, for "
        f"{found['bytes_up']:,} bytes up ({up} of the pictures as JPEG) and {found['bytes_down']:,} down ({down} of "
        f"the engine's weights a round). {faults['survived']} of {faults['injected']} faults survived."
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.2%}" if whole else "—"


def _section(title: str, *parts: object) -> Html:
    return tag("section", tag("h2", title), *parts)


def _domain(domain: str, arms: Mapping[str, Json], found: Json) -> Iterator[Html]:
    lines = {name: arms[name] for name in (SHOWN, WHOLE, "random", "no teacher", "energy") if name in arms}  # fmt: skip
    start = {
        name: [sum(a["before"]) / len(a["before"]), *a["by_round"]] for name, a in lines.items()
    }
    yield tag("p", "Accuracy of the engine before the first round and after each.")
    yield from _lined(f"{domain}-rounds", start)
    listed = [name for name in arms if name not in made_of.GRID]
    for key, words in SHARES.items():
        rows = [
            Bar(label=name, value=share, words=f"{share:.2%}", tone=tone)
            for name in listed
            for share, tone in [(arms[name][key], "engine" if name == SHOWN else "float")]
            if share is not None
        ]
        yield tag("p", words)
        yield tag("figure", bars(f"{domain}-{key}", words, "a share for each arm", rows))
    yield from _bought(domain, arms)
    ahead = found["ahead"][domain]
    rows = [_span(name, ahead[name]) for name in ahead if name not in made_of.GRID]
    if rows:
        yield tag("p", f"How far {SHOWN} is ahead of each, with an interval of 95 % over seeds.")
        what = "a difference of accuracies"
        yield tag("figure", intervals(f"{domain}-ahead", "Ahead", what, rows, null=0.0))
    yield _table(
        ["arm", "seeds", "accuracy", "of labels", "by day", "up", "down", "seconds"],
        [
            [
                name, str(a["seeds"]), f"{sum(a['accuracy']) / len(a['accuracy']):.3f}",
                "—" if a["recovered"] is None else f"{a['recovered']:.2f}", f"{a['source_after']:.3f}",
                f"{a['up_share']:.2%}", f"{a['down_share']:.2%}", f"{a['cloud_s']:.0f}",
            ]
            for name, a in arms.items()
        ],
    )  # fmt: skip


def _bought(domain: str, arms: Mapping[str, Json]) -> Iterator[Html]:
    """What every arm recovers, or its accuracy where that has no share of anything, against the bytes that it took."""
    is_share = all(arm["recovered"] is not None for arm in arms.values())

    def brought(arm: Json) -> float:
        return float(arm["recovered"] if is_share else sum(arm["accuracy"]) / len(arm["accuracy"]))

    for way, (key, listed, words) in BOUGHT.items():
        marks = [
            Mark(label=n, across=100 * arms[n][key], up=brought(arms[n]), tone="engine" if n == SHOWN else "float")
            for n in listed if n in arms
        ]  # fmt: skip
        note = "" if is_share else " Accuracy, as no arm was trained on labels."
        if way == "down" and SHOWN in arms:
            whole = "lossless" if "lossless" in arms else SHOWN
            marks += [
                Mark(label=n, across=100 * arms[SHOWN][k], up=brought(arms[whole]), tone="other")
                for k, n in BESIDE.items()
            ]
            note += f" Whole sets of adapters were not sent: they stand as high as {whole}."
        if sum(mark.across > 0 for mark in marks) < 2:
            continue
        yield tag("p", words + note)
        yield tag(
            "figure",
            scatter(f"{domain}-bought-{way}", words, "a dot for each arm", marks, unit=" %"),
        )


def _span(name: str, each: Json) -> Span:
    ends = f" [{each['low']:+.3f}, {each['high']:+.3f}]" if "low" in each else ""
    return Span(
        label=name, value=each["mean"], low=each.get("low"), high=each.get("high"),
        words=f"{each['mean']:+.3f}{ends}, {each['seeds']} seeds",
    )  # fmt: skip


def _shifts(found: Json) -> Iterator[Html]:
    for arm, told in found["shifts"].items():
        rows = [told["before"], *told["matrix"]]
        yield tag("h3", f"{arm}: accuracy in every domain, {told['seeds']} seeds")
        yield from _lined(f"shifts-{arm}", {d: [row[d] for row in rows] for d in told["before"]})
        yield tag("p", f"Backward transfer {told['backward_transfer']['mean']:+.3f}.")
        heads = ["behind round", *told["before"]]
        words = ["none", *(f"{i} ({d})" for i, d in enumerate(told["course"], 1))]
        cells = [[f"{value:.3f}" for value in row.values()] for row in rows]
        yield _table(heads, [[word, *row] for word, row in zip(words, cells, strict=True)])


def _lined(name: str, lines: Mapping[str, Sequence[float]]) -> Iterator[Html]:
    tones = dict(zip(lines, TONES, strict=False))
    yield tag("ul", *(tag("li", line, class_=tones[line]) for line in tones), class_="legend")
    shown = {tones[line]: values for line, values in lines.items() if line in tones}
    yield tag("figure", curve(name, "Accuracy", "by round, a line each", shown))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    body = [tag("tr", tag("th", row[0]), *(tag("td", cell) for cell in row[1:])) for row in rows]
    return tag("table", tag("tr", *(tag("th", head) for head in heads)), join(*body))
