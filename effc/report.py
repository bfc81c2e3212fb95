"""What a compile did, in words and numbers, for a person and for a script.

A speed has its interval and a metric its sample count beside it; a site that does not run in integers is named with
the reason. Times are in files that the manifest lists as not reproducible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from effc.package import dump

Json = dict[str, Any]


def write(stage: Path, content: Mapping[str, Any]) -> None:
    """bench.json, timings.json, report.json and report.txt of a package."""
    if content.get("bench"):
        (stage / "bench.json").write_text(dump(content["bench"]), encoding="utf-8")
    (stage / "timings.json").write_text(dump(content["timings"]), encoding="utf-8")
    (stage / "report.json").write_text(dump(content), encoding="utf-8")
    (stage / "report.txt").write_text(text(content) + "\n", encoding="utf-8")


def text(content: Mapping[str, Any]) -> str:
    """The whole report as plain text."""
    lines = [
        *_size(content),
        *_sites(content),
        *_drift(content),
        *_metric(content),
        *_bench(content),
    ]
    return "\n".join(lines)


def _size(content: Mapping[str, Any]) -> list[str]:
    before, after = content["source_bytes"], content["model_bytes"]
    return [f"size      {before / 1e6:.1f} → {after / 1e6:.1f} MB ({before / max(after, 1):.1f}×)"]


def _sites(content: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    sites = content["sites"]
    for op in sorted({s["op"] for s in sites}):
        chosen = [s for s in sites if s["op"] == op]
        fused = sum(s["int8"] for s in chosen)
        lines.append(f"sites     {fused}/{len(chosen)} {op} in integer kernels")
    for site in [s for s in sites if not s["int8"]][:20]:
        lines.append(f"          {site['name']} ({site['kernel']}): {site['reason']}")
    return lines


def _drift(content: Mapping[str, Any]) -> list[str]:
    lines = []
    for label, outputs in next(iter(content["verify"].values()), {}).items():
        for name, d in outputs.items():
            lines.append(
                f"verify    {label}: {name} max abs {d['max_abs']:.3g}, relative L2 {d['rel_l2']:.3g}, "
                f"cosine {d['cosine']:.5f}"
            )
    return lines


def _metric(content: Mapping[str, Any]) -> list[str]:
    m = content.get("metric")
    return [metric_line(m)] if m else []


def metric_line(m: Mapping[str, Any]) -> str:
    return (
        f"metric    {m['name']} {m['reference']:.4f} → {m['engine']:.4f}, difference "
        f"{m['engine'] - m['reference']:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}] (95 %, n = {m['n']})"
    )


def _bench(content: Mapping[str, Any]) -> list[str]:
    return bench_lines(content["bench"]) if content.get("bench") else []


def bench_lines(bench: Mapping[str, Any]) -> list[str]:
    """The table of a bench: one line a shape, reference and engine in ms, ratio with its 99 % interval."""
    lines = []
    for s in bench["shapes"]:
        against = ", ".join(f"{n} {a['ms']:.2f}" for n, a in sorted(s.get("against", {}).items()))
        lines.append(
            f"bench     {shape_word(s)}: {s['engine_ms']:.2f} ms ({against}), {ratio_word(s)}"
        )
    lines.append(f"          {bench['threads']} threads, {bench['cpu']}")
    return lines


def shape_word(shape: Mapping[str, Any]) -> str:
    return (
        f"{shape['batch']}x{shape['length']}" if shape.get("length") else f"batch {shape['batch']}"
    )


def ratio_word(s: Mapping[str, Any]) -> str:
    if s.get("ratio") is None:
        return "no reference"
    word = "faster" if s["low"] > 1 else "slower" if s["high"] < 1 else "not distinguishable"
    return f"{s['ratio']:.2f}× [{s['low']:.2f}, {s['high']:.2f}] {word}"


def read(path: Path) -> Json:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def names(items: Iterable[str]) -> str:
    return ", ".join(sorted(items)) or "none"
