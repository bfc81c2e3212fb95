"""What a compile did, in words and numbers, for a person and for a script.

A speed has its interval and a metric its sample count beside it; a site that does not run in integers is named with
the reason. Times are in files that the manifest lists as not reproducible. Here are the files and the text; the page
for a browser is in `report_html`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effc import bounded, package, paths, report_html, report_shape
from effc.bench import cpu_name, verdict, word_of
from effc.errors import PackageError
from effc.machine import cpu_features
from effc.package import dump
from effc.passes import CANONICAL
from effc.report_numbers import block_words, curve_words, gate_words, size_words, whole_words

Json = dict[str, Any]

REPORT, HTML, RECIPE = "report.json", "report.html", "recipe.yaml"


def write(stage: Path, content: Mapping[str, Any]) -> None:
    """bench.json, timings.json, report.json, report.txt and report.html of a package; all else of it is there."""
    timed = [
        of["bench"] for of in (content, *content.get("others", {}).values()) if of.get("bench")
    ]
    if timed:  # the first has the others in it
        (stage / "bench.json").write_text(dump(timed[0]), encoding="utf-8")
    (stage / "timings.json").write_text(dump(content["timings"]), encoding="utf-8")
    machine = {"cpu": cpu_name(), "features": cpu_features()}
    written = dump({"machine": machine, **content})
    (stage / REPORT).write_text(written, encoding="utf-8")
    (stage / "report.txt").write_text(text(content) + "\n", encoding="utf-8")
    files = {
        name: package.digest(stage / name)
        for name in sorted(paths.below(stage))
        if name not in (*package.UNHASHED, package.MANIFEST)
    }
    recipe = (stage / RECIPE).read_text(encoding="utf-8") if RECIPE in files else ""
    found = json.loads(written)
    report_shape.check(found, REPORT)
    page = report_html.page(found, files=files, recipe=recipe, beside=True)
    (stage / HTML).write_text(page, encoding="utf-8")


def rebuilt(out: Path, *, beside: bool) -> str:
    """report.html of a whole package, anew from its report.json; `beside` says whether it is to lie there.

    Raises PackageError where the package is not whole, but for report.html itself, and where report.json is missing,
    damaged, or of another package.
    """
    return rendered(out, *known(out, but=(HTML,)), beside=beside)


def known(out: Path, *, but: tuple[str, ...]) -> tuple[package.Manifest, Json]:
    """Manifest and report of a package that is whole, `but` perhaps for those files. Raises PackageError."""
    manifest = package.read(out)
    if REPORT not in manifest.unhashed:
        raise PackageError(f"{out} has no {REPORT}", hint="compile it again with this effc")
    replaced = {
        f"{name} {word}" for name in but for word in ("is missing", "differs from its sha256")
    }
    if broken := [word for word in package.check(out) if word not in replaced]:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise PackageError(
            f"{out} is not what it is said to be: {'; '.join(broken[:5])}{more}",
            hint=package.UNHARMED,
        )
    content = package.read_json(out, REPORT)
    report_shape.check(content, str(out / REPORT))
    told = content["manifest"]
    if [e["sha256"] for e in told["engines"]] != [e.sha256 for e in manifest.engines]:
        raise PackageError(f"{out / REPORT} is that of another package", hint=package.UNHARMED)
    return manifest, content


def rendered(out: Path, manifest: package.Manifest, content: Json, *, beside: bool) -> str:
    """report.html of a package."""
    recipe = _text(out, RECIPE) if RECIPE in manifest.files else ""
    files = dict(sorted(manifest.files.items()))
    return report_html.page(content, files=files, recipe=recipe, beside=beside)


def _text(out: Path, name: str) -> str:
    found = bounded.content(paths.opened(out, name), name, PackageError)
    try:
        return found.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(f"{out / name} is not UTF-8 text", hint=package.UNHARMED) from error


def text(content: Mapping[str, Any]) -> str:
    """The whole report as plain text."""
    lines = [
        *_size(content),
        *_passes(content),
        *_sites(content),
        *stand_ins(content),
        *_drift(content),
        *_lowering(content),
        *_gaps(content),
        *_worth(content),
    ]
    for target, other in content.get("others", {}).items():
        lines += [f"engine    {target}, {other['model_bytes'] / 1e6:.1f} MB", *_worth(other)]
    return "\n".join(lines)


def _size(content: Mapping[str, Any]) -> list[str]:
    before, after = content["source_bytes"], content["model_bytes"]
    return [f"size      {before / 1e6:.1f} → {after / 1e6:.1f} MB ({before / max(after, 1):.1f}×)"]


def _passes(content: Mapping[str, Any]) -> list[str]:
    """What every pass of the recipe changed, and the exact passes that go before it in one line."""
    lines: list[str] = []
    for target in content["verify"]:
        passes = [p for p in content["passes"] if p["target"] == target]
        clean = [p for p in passes if p["name"] in CANONICAL and p["sites"]]
        if clean:
            words = ", ".join(f"{p['name']} {p['sites']}" for p in clean)
            counts = _step(clean[0]["nodes"][0], clean[-1]["nodes"][1])
            lines.append(f"pass      {_of(content, target)}{words} sites, {counts} nodes")
        for p in (p for p in passes if p["name"] not in CANONICAL):
            if not p["sites"]:
                if p["effect"] == "exact":
                    continue
                lines.append(
                    f"warning   {_of(content, target)}{p['name']} changed nothing: no site fits it"
                )
                continue
            text = f"{p['name']}: {p['sites']} sites, {_step(*p['nodes'])} nodes"
            if p["bytes"][0] != p["bytes"][1]:
                text += f", {p['bytes'][0] / 1e6:.1f} → {p['bytes'][1] / 1e6:.1f} MB"
            if p["drift"]:
                text += f", drift {p['drift']['rel_l2']:.2g}"
            lines.append(f"pass      {_of(content, target)}{text}")
            for name, note in p.get("notes", {}).items():
                if name.endswith("/curve"):
                    lines.append(f"          {curve_words(note)}")
                if name.endswith("/gates"):
                    lines.append(f"          {gate_words(note)}")
                if name.endswith("/blocks"):
                    lines.append(f"          {block_words(note)}")
                if name.endswith("/whole"):
                    lines.append(f"          {whole_words(note)}")
                if name.endswith("/sizes"):
                    lines += [f"          {words}" for words in size_words(note)]
    return lines


def _step(before: int, after: int) -> str:
    return f"{before:,} → {after:,}".replace(",", " ")


def _sites(content: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    sites = content["sites"]
    for target, op in sorted({(s["target"], s["op"]) for s in sites}):
        chosen = [s for s in sites if (s["target"], s["op"]) == (target, op)]
        fused = [s for s in chosen if s["int8"]]
        kernels = ", ".join(sorted({s["kernel"] for s in fused}))
        within = f" ({kernels})" if kernels else ""
        told = f"{len(fused)}/{len(chosen)} {op} fused{within}"
        if all(s["kernel"] == "unknown" for s in chosen):
            told = f"{len(chosen)} {op} written in 8 bit or less: {chosen[0]['reason']}"
        lines.append(f"sites     {_of(content, target)}{told}")
    slow = [s for s in sites if not s["int8"] and s["kernel"] != "unknown"]
    for site in slow[:20]:
        lines.append(f"          {site['name']} ({site['kernel']}): {site['reason']}")
    return lines


def _of(content: Mapping[str, Any], target: str) -> str:
    """The target in front of a line, where there is more than one."""
    return f"{target}: " if len(content["verify"]) > 1 else ""


def stand_ins(content: Mapping[str, Any]) -> list[str]:
    """Engines that this machine cannot run, and why."""
    lines = []
    for target, why in content.get("stand_ins", {}).items():
        elsewhere = content.get("elsewhere", {}).get(target)
        timed = f"timed on {elsewhere} alone" if elsewhere else "not timed"
        lines.append(
            f"stand-in  {target} was not run where it was compiled, and {timed}: {why}; its ONNX ran on onnxruntime"
        )
    return lines


def _gaps(content: Mapping[str, Any]) -> list[str]:
    """How far onnxruntime is from kernels that sum integers and round once, where a target has those."""
    return [
        f"gap       {_of(content, e['target'])}kernels that sum integers and round once are expected to be "
        f"{e['options']['gap']} (relative L2) from onnxruntime"
        for e in content["manifest"]["engines"]
        if "gap" in e.get("options", {})
    ]


def _drift(content: Mapping[str, Any]) -> list[str]:
    return [
        f"verify    {_of(content, target)}{label}: {line}"
        for target, cases in content["verify"].items()
        for label, outputs in cases.items()
        for line in drift_lines(outputs)
    ]


def drift_lines(outputs: Mapping[str, Any]) -> list[str]:
    """A line an output; of those that differ in a number alone, such as `present.0.key`, the worst."""
    groups: dict[str, list[Any]] = {}
    for name, d in outputs.items():
        groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(d)
    lines = []
    for name, group in groups.items():
        d = max(group, key=lambda each: each["rel_l2"])
        many = f" ({len(group)}, the worst)" if len(group) > 1 else ""
        lines.append(
            f"{name}{many} max abs {d['max_abs']:.3g}, relative L2 {d['rel_l2']:.3g}, cosine {d['cosine']:.5f}"
        )
    return lines


def _lowering(content: Mapping[str, Any]) -> list[str]:
    return [
        f"lowering  {_of(content, target)}engine against its own graph: relative L2 {d['rel_l2']:.3g}"
        for target, d in content["lowering"].items()
    ]


def _worth(of: Mapping[str, Any]) -> list[str]:
    """Metric, bench and gate of one engine."""
    lines = metric_lines(of["metric"]) if of.get("metric") else []
    lines += bench_lines(of["bench"]) if of.get("bench") else []
    return [*lines, *_gate(of.get("gate"))]


def metric_lines(m: Mapping[str, Any]) -> list[str]:
    """A metric, and below it the further scores that it has."""
    further = [
        f"          {name} {of['reference']:.4f} → {of['engine']:.4f} "
        f"[{of['low']:+.4f}, {of['high']:+.4f}]"
        for name, of in (m.get("parts") or {}).items()
    ]
    return [metric_line(m), *further]


def metric_line(m: Mapping[str, Any]) -> str:
    test = f", McNemar p = {m['mcnemar']['p']:.2g}" if m.get("mcnemar") else ""
    ends = (
        f" [{m['low']:+.4f}, {m['high']:+.4f}]" if m.get("drawn") != 1 else ", without an interval"
    )
    return (
        f"metric    {m['name']} {m['reference']:.4f} → {m['engine']:.4f}, difference "
        f"{m['engine'] - m['reference']:+.4f}{ends} "
        f"({100 * m['level']:g} %, n = {m['n']}{tokens_word(m)}{test}) {m['verdict']}"
    )


def tokens_word(m: Mapping[str, Any]) -> str:
    """What is behind a number of tokens: how many texts they are of, which are what the interval draws again."""
    count, unit = m.get("drawn"), m.get("unit")
    if unit not in ("document", "window"):
        return ""
    of = " of one document" if unit == "window" else ""
    return f" tokens in {count} {unit}{'s' if count != 1 else ''}{of}"


def bench_lines(bench: Mapping[str, Any]) -> list[str]:
    """The table of a bench: one line a shape, reference and engine in ms, ratio with its 99 % interval."""
    lines = []
    for s in bench["shapes"]:
        against = ", ".join(f"{n} {a['ms']:.2f}" for n, a in sorted(s.get("against", {}).items()))
        word = word_of(s)
        once = ", opened once" if s.get("openings") == 1 else ""
        lines.append(
            f"bench     {word}: {s['engine_ms']:.2f} ms ({against}), {ratio_word(s)}{once}"
        )
    load = ", ".join(f"{n} {ms:.0f}" for n, ms in bench["load_ms"].items() if n != "torch")
    memory = ", ".join(f"{n} {mb:.0f}" for n, mb in bench["peak_rss_mb"].items())
    lines.append(f"          load {load} ms; peak memory {memory} MB")
    streams = f", {bench['streams']} streams" if bench["streams"] > 1 else ""
    machine = f"{bench['gpu']} beside {bench['cpu']}" if bench.get("gpu") else bench["cpu"]
    lines.append(f"          {bench['threads']} threads{streams}, {machine}")
    return lines


def ratio_word(s: Mapping[str, Any]) -> str:
    if s.get("ratio") is None:
        return "no reference"
    return f"{s['ratio']:.2f}× [{s['low']:.2f}, {s['high']:.2f}] {verdict(s['low'], s['high'])}"


def _gate(gate: Mapping[str, Any] | None) -> list[str]:
    """What was asked of the engine, how that went, and what of the passes was taken back for it."""
    if not gate or gate["verdict"] == "off":
        return []
    tried = f", {gate['tried']} tried" if (gate.get("tried") or 0) > 1 else ""
    tried += ", out of time" if gate.get("ran_out_of_time") else ""
    lines = [f"gate      {gate['verdict']}{tried}"]
    lines += [f"          {check['text']}" for check in gate["checks"]]
    for back in gate["rolled_back"]:
        reasons = back.get("reasons") or {}
        some = ", ".join(f"{s} ({reasons[s]})" if s in reasons else s for s in back["sites"][:3])
        more = f" and {len(back['sites']) - 3} more" if len(back["sites"]) > 3 else ""
        where = f": {some}{more}" if some else ""
        lines.append(f"          rolled back {back['pass']}{where}; because {back['why']}")
    return lines
