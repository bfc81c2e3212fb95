"""The report of a compile as one HTML file that loads nothing, runs nothing, and can be printed.

The layout is `templates/report.html`; here is what it needs besides the report itself: the charts, and the words for
what intervals say. What comes from outside is escaped by the template and by `charts.tag`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from effc import charts
from effc.bench import word_of
from effc.charts import Bar, Html, Layer, Span, Spread, join
from effc.package import UNHASHED, label
from effc.report_numbers import FORMATS, At, curve_words, number, size_words, whole_words
from effc.stats import Interval

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_BARS = 10
"""Layers that are named in the chart; the table has them all."""


def page(content: Mapping[str, Any], *, files: Mapping[str, str], recipe: str, beside: bool) -> str:
    """The whole page, from the plain JSON of a report that `report_shape.check` has seen.

    `files` are sha256 by name, `recipe` is recipe.yaml. `beside` says whether the page lies in the package, where
    links to other files of it lead somewhere.
    """
    r = At(content)
    bench, metric = r["bench"], r["metric"]
    engines = list(r["manifest"]["engines"])
    roles = [str(e["role"]) for e in engines]
    targets = [label(role, str(e["target"]), roles) for role, e in zip(roles, engines, strict=True)]
    layers = [(t, r["layers"][t]) for t in targets if r["layers"][t]]
    return _environment().get_template("report.html").render(
        r=r,
        name=r["manifest"]["source"]["name"].raw or "a model without a name",
        targets=targets,
        label=lambda e: label(str(e["role"]), str(e["target"]), roles),
        many=len(targets) > 1,
        speed=slowest_and_fastest(bench),
        drift=known_worst(r["verify"][targets[0]]),
        fused=fused(r["sites"], targets),
        metric_verdict=metric_verdict(metric),
        charts={
            "size": _sizes(r),
            "memory": _memory(bench["peak_rss_mb"]),
            "speed": _speed(bench),
            "latency": [_latency(i, s) for i, s in enumerate(bench["shapes"])],
            "metric": _difference(metric),
            "shares": _shares(metric),
            "stages": _stages(r),
        },
        curves=list(_curves(r["passes"])),
        whole=list(_whole(r["passes"])),
        bought=list(_bought(r["passes"])),
        layers=[(t, f, _profile(i, f), _shares_of_error(i, f)) for i, (t, f) in enumerate(layers)],
        files=files,
        unhashed=UNHASHED,
        recipe=recipe,
        beside=beside,
    )  # fmt: skip


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("effc"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {kind: partial(number, kind) for kind in FORMATS}
    made.filters |= {"tone": tone, "option": option, "shape": shape, "said": ratio_verdict}
    made.filters["in_order"] = in_order
    return made


# Words


def shape(s: At) -> str:
    return word_of(s.raw)


def option(value: At) -> str:
    """An option of a pass as it would stand in a recipe."""
    return value.raw if isinstance(value.raw, str) else json.dumps(value.raw, ensure_ascii=False)


def tone(word: object) -> str:
    """The colour of a verdict; the word itself always stands beside it."""
    good, bad = ("better", "pass", "passed"), ("worse", "fail", "refused")
    return "good" if str(word) in good else "bad" if str(word) in bad else "unsure"


def ratio_verdict(s: At) -> str:
    """What the interval of reference ÷ engine says."""
    return _verdict(s, null=1.0)


def metric_verdict(metric: At) -> str:
    """The printed word, or what the interval of engine − model says where none was printed."""
    if metric["verdict"]:
        return str(metric["verdict"])
    higher = metric["higher_is_better"].raw is not False
    return _verdict(metric, null=0.0, higher_is_better=higher)


def _verdict(of: At, *, null: float, higher_is_better: bool = True) -> str:
    low, high = of["low"].raw, of["high"].raw
    if low is None or high is None:
        return "not measured"
    return Interval(low, high).verdict(null, higher_is_better=higher_is_better)


# What stands for all


def slowest_and_fastest(bench: At) -> list[At]:
    """The lowest and the highest ratio of a bench; one where there is only one."""
    found = sorted((s["ratio"] for s in bench["shapes"] if s["ratio"]), key=lambda a: a.raw)
    return found if len(found) < 2 else [found[0], found[-1]]


def known_worst(cases: At) -> tuple[str, str, At] | None:
    """Kind of data, output and drift: over held-out data where there is any, else calibration or the largest case."""
    labels = [label for label, outputs in cases.pairs() if outputs]
    if not labels:
        return None
    largest = max(labels, key=lambda label: _samples(cases[label]))
    label: str = next((n for n in ("held out", "calibration") if n in labels), largest)
    name, worst = max(cases[label].pairs(), key=lambda item: item[1]["rel_l2"].raw or 0.0)
    return label, name, worst


def _samples(outputs: At) -> int:
    return sum(d["n"].raw or 0 for _, d in outputs.pairs())


def in_order(cases: At) -> list[tuple[str, At]]:
    """Kinds of data as they were measured: samples first, then shapes from small to large, then the rest."""

    def place(case: tuple[str, At]) -> tuple[int, list[int], str]:
        label, _ = case
        if label in ("calibration", "held out"):
            return 0, [], label
        shape = re.fullmatch(r"(?:batch )?(\d{1,9})(?:x(\d{1,9}))?", label)
        return (1, [int(n) for n in shape.groups("0")], "") if shape else (2, [], label)

    return sorted(cases.pairs(), key=place)


def fused(sites: At, targets: list[str]) -> list[dict[str, Any]]:
    """By target and operator: kernels of the sites in integers, how many those are, and how many there are."""
    found: dict[tuple[str, str], list[At]] = {}
    for site in sites:
        found.setdefault((str(site["target"]), str(site["op"])), []).append(site)
    order = sorted(found, key=lambda key: (targets.index(key[0]) if key[0] in targets else 99, key))
    rows = []
    for target, op in order:
        mine = [s for s in found[target, op] if s["int8"]]
        kernels = sorted({str(s["kernel"]) for s in mine})
        rows.append({"target": target, "op": op, "kernels": kernels, "int8": len(mine),
                     "all": len(found[target, op])})  # fmt: skip
    return rows


# Charts


_drawn = partial(number, element="tspan")


def _known(name: str) -> str:
    return name if name in ("engine", "float", "torch") else "other"


def _interval(kind: str, low: At, high: At) -> Html:
    return join("[", _drawn(kind, low), ", ", _drawn(kind, high), "]")


def _sizes(r: At) -> Html:
    rows = [
        Bar(label=label, value=r[key].raw, words=_drawn("bytes", r[key]), tone=tone)
        for label, key, tone in (
            ("weights of the model", "source_bytes", "float"),
            ("engine", "model_bytes", "engine"),
        )
    ]
    return charts.bars("size", "Bytes", "Weights of the model, and the engine.", rows)


def _memory(memory: At) -> Html | None:
    rows = [
        Bar(label=name, value=mb.raw, words=join(_drawn("mb", mb), " MB"), tone=_known(name))
        for name, mb in memory.pairs()
    ]
    desc = "Peak resident memory of a process that loads one engine and runs the largest shape."
    return charts.bars("memory", "Peak memory", desc, rows) if rows else None


def _speed(bench: At) -> Html | None:
    rows = [
        Span(
            label=shape(s),
            value=s["ratio"].raw,
            low=s["low"].raw,
            high=s["high"].raw,
            words=join(
                _drawn("ratio", s["ratio"]), " ", _interval("end", s["low"], s["high"]),
                " ", ratio_verdict(s),
            ),
            tone=tone(ratio_verdict(s)),
        )
        for s in bench["shapes"]
        if s["ratio"]
    ]  # fmt: skip
    desc = "Time of the faster reference ÷ time of the engine, with its 99 % interval, by shape."
    return (
        charts.intervals("speed", "Speed ratio", desc, rows, null=1.0, log=True, unit="×")
        if rows
        else None
    )


def _latency(place: int, s: At) -> Html:
    times = [("engine", s["engine_ms"], s["p95_ms"])]
    times += [(name, other["ms"], other["p95_ms"]) for name, other in s["against"].pairs()]
    rows = [
        Spread(
            label=name,
            quantiles=s["quantiles_ms"][name].raw or (),
            median=ms.raw,
            p95=p95.raw,
            words=join(_drawn("ms", ms), " ms, p95 ", _drawn("ms", p95)),
            tone=_known(name),
        )
        for name, ms, p95 in times
    ]
    desc = "Milliseconds of every counted run, by engine, on a logarithmic axis."
    return charts.spreads(f"latency-{place}", f"Latency of {shape(s)}", desc, rows)


def _difference(metric: At) -> Html | None:
    if not metric:
        return None
    low, high = metric["low"], metric["high"]
    value = metric["engine"].raw - metric["reference"].raw
    words = join(
        _drawn("signed", metric["engine"], less=metric["reference"]), " ",
        _interval("signed", low, high),
    )  # fmt: skip
    row = Span(
        label="engine − model",
        value=value,
        low=low.raw,
        high=high.raw,
        words=words,
        tone=tone(metric_verdict(metric)),
    )
    desc = f"Difference of {metric['name']} between engine and model, with its interval."
    return charts.intervals("difference", "Difference", desc, [row], null=0.0)


def _shares(metric: At) -> Html | None:
    rows = [
        Span(
            label={"reference": "model"}.get(name, name),
            value=metric[name].raw if name in ("reference", "engine") else None,
            low=ends[0].raw,
            high=ends[1].raw,
            words=join(_drawn("metric", metric[name]), " ", _interval("metric", ends[0], ends[1])),
            tone={"reference": "torch"}.get(name, _known(name)),
        )
        for name, ends in sorted(metric["wilson"].pairs(), reverse=True)
    ]
    desc = f"{metric['name']} of model and engine, each with its Wilson interval."
    return charts.intervals("shares", "Model and engine", desc, rows) if rows else None


def _stages(r: At) -> Html | None:
    stages = [(str(s["name"]), s["seconds"], s) for s in r["stages"]]
    if not stages:
        found = sorted(r["timings"].pairs(), key=lambda item: -(item[1].raw or 0.0))
        stages = [(name, seconds, At(None)) for name, seconds in found]
    rows = []
    for name, seconds, s in stages:
        words = join(_drawn("seconds", seconds), " s")
        if s["peak_mb"]:
            words = join(words, ", ", _drawn("mb", s["peak_mb"]), " MB")
        if s["cached"].raw:
            words = join(words, ", cached")
        rows.append(Bar(label=name, value=seconds.raw, words=words))
    desc = "Seconds of every stage of the compile, and where known its peak resident memory."
    return charts.bars("stages", "Stages", desc, rows) if rows else None


def _curves(passes: At) -> Iterator[tuple[At, str, Html, list[tuple[str, Html]]]]:
    """Passes that train, what came of it, the losses along the way, and what terms told of themselves."""
    for place, pass_ in enumerate(passes):
        for name, points in pass_["notes"].pairs():
            if not name.endswith("/curve") or not points:
                continue
            lines = {
                "float": [p["loss"].raw for p in points], "engine": [p["held"].raw for p in points],
            }  # fmt: skip
            desc = "The mean loss between two points of a training, and the loss of samples that it does not see."
            figure = charts.curve(f"curve-{place}", "Training", desc, lines)
            yield pass_, curve_words(points.raw), figure, list(_told(place, points))


def _told(place: int, points: At) -> Iterator[tuple[str, Html]]:
    """A drawing for everything that a term tells at every point: a line of numbers, or histograms side by side."""
    told = [p["told"].raw for p in points]
    terms = told[-1] if isinstance(told[-1], dict) else {}
    pairs = [(term, key) for term, last in terms.items() if isinstance(last, dict) for key in last]
    for count, (term, key) in enumerate(pairs):
        found = [At(t)[term][key].raw for t in told]
        name, title = f"told-{place}-{count}", f"{term}: {key}"
        counts = [v for v in found if isinstance(v, list) and all(type(n) is int for n in v)]
        if len(counts) == len(found) and key.endswith("by cluster"):
            yield title, _clusters(name, title, counts[-1])
        elif len(counts) == len(found):
            desc = "How many lie where from 0, at the foot, to 1, at every point of the training."
            yield title, charts.columns(name, title, desc, counts)
        elif all(v is None or type(v) in (int, float) for v in found):
            desc = "At every point of the training."
            yield title, charts.curve(name, title, desc, {"engine": found})


def _clusters(name: str, title: str, counts: list[int]) -> Html:
    """How many requests are of each cluster, the fullest first."""
    order = sorted(range(len(counts)), key=lambda place: -counts[place])
    rows = [
        Bar(label=f"cluster {n}", value=counts[n], words=f"{counts[n]} of {sum(counts)}")
        for n in order[:MOST_BARS]
    ]
    return charts.bars(
        name, title, "Held-out samples by the cluster that they are nearest to.", rows
    )


def _whole(passes: At) -> Iterator[tuple[At, str]]:
    """Passes that pruned in multiples of a number, and what that left whole."""
    for pass_ in passes:
        for name, whole in pass_["notes"].pairs():
            if name.endswith("/whole") and whole:
                yield pass_, whole_words(whole.raw)


def _bought(passes: At) -> Iterator[tuple[At, list[str]]]:
    """Passes that had graphs timed, and what every kind of group bought."""
    for pass_ in passes:
        for name, sizes in pass_["notes"].pairs():
            if name.endswith("/sizes") and sizes:
                yield pass_, size_words(sizes.raw)


def _profile(place: int, layers: At) -> Html:
    rows = [
        Layer(name=str(x["site"]), **{k: x[k].raw for k in ("sqnr_db", "local_db", "share")})
        for x in layers
    ]
    desc = "Signal to noise of every quantised site in the order of the graph, and its share of the error."
    return charts.profile(f"layers-{place}", "Error by layer", desc, rows)


def _shares_of_error(place: int, layers: At) -> Html | None:
    found = [x for x in layers if charts.drawable([x["share"].raw])]
    worst = sorted(found, key=lambda x: -x["share"].raw)[:MOST_BARS]
    rows = [
        Bar(label=str(x["site"]), value=x["share"].raw, words=_drawn("share", x["share"]))
        for x in worst
    ]
    desc = "The sites that add most to the error of the output."
    return (
        charts.bars(f"worst-{place}", "Largest shares of the error", desc, rows) if rows else None
    )
