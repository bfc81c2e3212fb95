"""Writes docs/results.md, and the table of the README, from benchmarks/results/*.json: no number is typed.

python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effc.stats import student, wilson

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
DEMO = RESULTS / "demo.txt"
END = "<!-- end -->"

Json = dict[str, Any]

HEAD = """# What was measured

Every table here is made by `benchmarks/tables.py` from the files in `benchmarks/results`, which the script named
above each table wrote. Ratios are plain float ÷ engine, so above 1 the engine is faster; in brackets a 99 % interval
(Student, over sessions in each of which both are opened anew), with n counted runs of the engine. Engines take turns
in one process, with threads that do not spin. Differences of a metric have a 95 % interval: of paired shares where
samples are right or wrong, else a paired bootstrap over samples. Results of unlike processors stand side by side and
are never compared with each other. A result whose revision is not recorded is of an earlier state of the code, with
intervals from drawing timing blocks again.
"""


def results(name: str) -> Iterator[Json]:
    """Every result of one benchmark: a processor or a model each."""
    for file in sorted([*RESULTS.glob(f"{name}.json"), *RESULTS.glob(f"{name}-*.json")]):
        yield json.loads(file.read_text(encoding="utf-8"))


def circumstances(found: Json) -> str:
    features = ", ".join(found["features"]) or "no feature that matters"
    versions = ", ".join(f"{n} {v}" for n, v in found["versions"].items())
    revision = found.get("revision", "not recorded")
    return (
        f"{found['cpu']} ({features}); Python {found['python']}, {versions}; revision {revision}."
    )


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
    ]


def size(shape: Json) -> str:
    if not shape["length"]:
        return f"batch {shape['batch']}"
    behind = f" behind {shape['past']}" if shape.get("past") else ""
    return f"{shape['batch']}×{shape['length']}{behind}"


def ratio(found: Json, n: int) -> str:
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}], n = {n}"


def metric_row(m: Json) -> str:
    gap = m["engine"] - m["reference"]
    return (
        f"{m['reference']:.4f} → {m['engine']:.4f} ({gap:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}], "
        f"n = {m['n']:,})"
    )


def minilm() -> list[str]:
    lines = ["## MiniLM-L6-v2 to int8 (benchmarks/minilm.py)", ""]
    for found in results("minilm"):
        bench = found["bench"]
        lines += [circumstances(found) + f" {bench['threads']} threads.", ""]
        rows = [
            [
                size(s),
                f"{s['against']['float']['ms']:.1f}",
                f"{s['against']['torch']['ms']:.1f}",
                f"{s['engine_ms']:.1f}",
                ratio(s["against"]["float"], s["n"]),
            ]
            for s in bench["shapes"]
        ]
        lines += table(
            ["batch × length", "float ms", "torch ms", "engine ms", "float ÷ engine"], rows
        )
        before, after = found["source_bytes"] / 1e6, found["model_bytes"] / 1e6
        lines += [
            f"Geometric mean {found['geometric_mean']:.2f}. Size {before:.1f} → {after:.1f} MB; "
            f"{found['int8_sites']}/{found['total_sites']} sites in integer kernels. "
            f"Compiled in {found['compile_s']:.0f} s with a peak of {found['compile_peak_mb'] / 1e3:.1f} GB, on "
            f"{found['calibration']['n']} sentences. "
            f"Two compiles give {'the same' if found['identical'] else 'different'} bytes. "
            f"An embedding alone and in a padded batch differs by {found['neighbours_max_abs']:.1g} at most "
            f"(n = {found['neighbours_n']} sentences).",
            "",
        ]
        if bench["metric"]:
            lines += [f"STS-B (English test), Spearman: {metric_row(bench['metric'])}.", ""]
    return lines


def models() -> list[str]:
    lines = ["## Other models with their task (benchmarks/models.py)", ""]
    for found in results("models"):
        lines += [circumstances(found), ""]
        rows = [
            [
                r["name"],
                f"{r['metric']['name']} {metric_row(r['metric'])}",
                f"{r['bytes'][0] / 1e6:.1f} → {r['bytes'][1] / 1e6:.1f} MB",
                "; ".join(f"{size(s)}: {ratio(s, s['n'])}" for s in r["shapes"]),
            ]
            for r in found["rows"]
        ]
        lines += table(["model", "metric", "size", "faster reference ÷ engine"], rows)
    return lines


def coverage() -> list[str]:
    lines = ["## Architectures with random weights (benchmarks/coverage.py)", ""]
    for found in results("coverage"):
        if found["name"] == "coverage-all":
            continue
        lines += [circumstances(found), ""]
        rows = [
            [r["name"], f"{r['int8_sites']}/{r['total_sites']}", f"{r['rel_l2']:.3f}", ""]
            if r["ok"]
            else [r["name"], "", "", r["reason"]]
            for r in found["rows"]
        ]
        lines += table(
            ["architecture", "sites fused", "drift (relative L2)", "refused because"], rows
        )
    return lines


def coverage_all() -> list[str]:
    lines = ["## Every configuration type of transformers (benchmarks/coverage.py --all)", ""]
    lines += [
        "Each type that transformers knows, made small with random weights by one set of rules, compiled, and held "
        "against torch at up to three batches and lengths, of which one was traced. Agrees: every output within "
        "0.001 (relative L2) in float, 0.3 in int8. Types are taken in an order drawn once, so that those tried are a "
        "sample of all; the interval is Wilson's, 95 %, over types.",
        "",
    ]
    for found in results("coverage-all"):
        rows = found["rows"]
        states = Counter(r["state"] for r in rows)
        built = [r for r in rows if r["state"] != "not built"]
        lines += [
            circumstances(found) + f" Target {found['target']}, quantize {found['quantize']}. "
            f"{len(rows)} of {found['types']} types tried, {len(built)} built; "
            f"not tried: {found['types'] - len(rows)}.",
            "",
        ]
        kinds = sorted({r.get("kind", "not told") for r in built})
        states_seen = [
            s
            for s in ("agrees", "refused", "differs", "not compared", "crashed", "time", "memory")
            if states[s]
        ]
        body = [
            [kind, str(len(of)), *(str(sum(r["state"] == s for r in of)) for s in states_seen)]
            for kind in kinds
            if (of := [r for r in built if r.get("kind", "not told") == kind])
        ]
        body.append(["all", str(len(built)), *(str(states[s]) for s in states_seen)])
        lines += table(["what goes in", "built", *states_seen], body)
        share = wilson(states["agrees"], len(built))
        worst = max((r["rel_l2"] for r in rows if r["state"] == "agrees"), default=0.0)
        more = sum(len(r["sizes"]) > 1 for r in rows if r["state"] == "agrees")
        lines += [
            f"{states['agrees'] / max(1, len(built)):.0%} [{share.low:.0%}, {share.high:.0%}] of the types that build "
            f"agree (n = {len(built)}), the furthest by {worst:.1g}; {more} of them at other sizes than the traced "
            f"ones too, the rest have no others. Wrong without a word: {states['differs']}.",
            "",
        ]
        others = [r for r in built if r["state"] != "agrees"]
        lines += table(
            ["type", "what became of it", "why"],
            [[r["type"], r.get("error", r["state"]), _why(r)] for r in others],
        )
        unbuilt = [r for r in rows if r["state"] == "not built"]
        if unbuilt:
            lines += table(["not built", "why"], [[r["type"], _why(r)] for r in unbuilt])
    return lines


def _why(row: Json) -> str:
    where = f" ({row['where']})" if row.get("where") else ""
    return (str(row.get("reason", "")) + where).replace("|", "\\|").replace("\n", " ")


def prunable() -> list[str]:
    lines = ["## What can be pruned with nothing said about the model (benchmarks/prunable.py)", ""]
    lines += [
        "The part of all parameters that lies on a dimension which can lose units, found without any hint, and how "
        "many groups that is. Error: removed against masked, half of every group removed at random, the largest "
        "relative L2 of three. Torch-Pruning was given no hint either: its groups run where the net still gives "
        "outputs of the same shape after half of one is removed, and are exact where these are those of the net with "
        "the same channels set to 0, to a thousandth. Random weights; transformers have four layers.",
        "",
    ]
    for found in results("prunable"):
        lines += [circumstances(found), ""]
        versions = {(r["torch_pruning"] or {}).get("version") for r in found["rows"]} - {None}
        other = f"Torch-Pruning {min(versions)}" if versions else "Torch-Pruning"
        rows = []
        for r in found["rows"]:
            mine = r["effc"]
            last = mine.get("converted", mine)
            worst = max(mine["rel_l2"], last["rel_l2"])
            rows.append(
                [
                    f"{r['name']}, {r['parameters'] / 1e6:.1f} M"
                    if r["parameters"] > 1e5
                    else r["name"],
                    f"{mine['share']:.1%}, {mine['prunable']}/{mine['groups']}",
                    f"{last['share']:.1%}" if last is not mine else "—",
                    f"{worst:.1e}",
                    *_theirs(r["torch_pruning"]),
                    f"{mine['seconds']:.2f}",
                ]
            )
        lines += table(
            [
                "network",
                "prunable, groups",
                "after layernorm-to-rmsnorm",
                "error",
                f"{other}: runs",
                "exact",
                "seconds",
            ],
            rows,
        )
    return lines


def _theirs(found: Json | None) -> list[str]:
    if found is None:
        return ["not measured", ""]
    if "reason" in found:
        return [found["reason"], ""]
    count = found["groups"]
    return [f"{found['shares'][word]:.1%}, {found[word]}/{count}" for word in ("running", "exact")]


def gpuless() -> list[str]:
    lines = ["## Engines for GPUs, built without one (benchmarks/gpuless.py)", ""]
    lines += [
        "Size, layers, seconds to write the ONNX and build, drift of the ONNX from the model, relative L2; † attention "
        "decomposed. In brackets what onnxruntime is expected to be from kernels that sum integers and round once.",
        "",
    ]
    for found in results("gpuless"):
        lines += [circumstances(found), ""]
        rows = [r for r in found["rows"] if not r["compute"]]
        words = list(dict.fromkeys(r["precision"] for r in rows))
        cells = {(r["name"], r["precision"]): _built(r) for r in rows}
        names = dict.fromkeys(r["name"] for r in rows)
        lines += table(
            ["architecture", *words],
            [[name, *(cells.get((name, word), "") for word in words)] for name in names],
        )
        twins = [r["same"] for r in found["rows"] if r.get("same") is not None]
        lines += [f"Built twice, {sum(twins)} of {len(twins)} engines are the same bytes.", ""]
        lines += [
            f"One engine for {', '.join(r['compute'])} ({r['name']}, {r['precision']}): {_built(r)}."
            for r in found["rows"]
            if r["compute"]
        ]
        free = {r["name"]: r["profile"] for r in rows if "profile" in r}
        lines += ["", "Free sizes, least, usual and largest:", ""]
        by_profile: dict[str, list[str]] = {}
        for name, profile in free.items():
            by_profile.setdefault(profile, []).append(name)
        lines += [f"* {p or 'none'}: {', '.join(names)}" for p, names in by_profile.items()]
        if refused := [r for r in found["rows"] if "refused" in r]:
            lines += ["", "Refused:", ""]
            lines += [f"* {r['name']}, {r['precision']}: {r['refused']}" for r in refused]
        lines += [""]
    return lines


def _built(row: Json) -> str:
    if "refused" in row:
        return "refused"
    mark = "†" if row["why"] else ""
    gap = f" [{row['gap']}]" if row["gap"] else ""
    size = f"{row['bytes'] / 1e3:.0f} kB, {row['layers']} layers, {row['seconds']:.1f} s"
    return f"{size}, {row['rel_l2']:.2g}{gap}{mark}"


def sixteen() -> list[str]:
    lines = ["## What 16 bit costs (benchmarks/sixteen.py)", ""]
    lines += [
        "The graph that a TensorRT engine is built from, on ONNX Runtime, against the model; n is of samples or of "
        "positions. Then drift with one kind of operator more in 16 bit: what it gives is rounded, what it sums inside "
        "is not, so that is the least that it would cost.",
        "",
    ]
    for found in results("sixteen"):
        lines += [circumstances(found), ""]
        rows = found["rows"]
        arms = list(dict.fromkeys(r["arm"] for r in rows))
        own = [r for r in rows if r["arm"] == arms[0]]
        lines += table(
            ["model", "type", "held out: relative L2, largest difference", "metric", "verdict"],
            [
                [
                    r["model"],
                    r["dtype"],
                    _outputs(r),
                    metric_row(r["metric"]),
                    r["metric"]["verdict"],
                ]
                for r in own
            ],
        )
        cells = {(r["model"], r["dtype"], r["arm"]): _worst(r) for r in rows}
        pairs = dict.fromkeys((r["model"], r["dtype"]) for r in rows)
        lines += table(
            ["model", "type", *arms],
            [[*pair, *(cells.get((*pair, arm), "none there") for arm in arms)] for pair in pairs],
        )
    return lines


def _outputs(row: Json) -> str:
    return "; ".join(
        f"{name} {d['rel_l2']:.2g}, {d['max_abs']:.2g} (n = {d['n']})"
        for name, d in row["outputs"].items()
    )


def _worst(row: Json) -> str:
    return row.get("failed") or f"{max(d['rel_l2'] for d in row['outputs'].values()):.2g}"


def rules() -> list[str]:
    lines = ["## What each rule of the ort dialect is worth (benchmarks/opset.py)", ""]
    for found in results("opset"):
        lines += [circumstances(found), ""]
        shapes = found["bench"]["shapes"]
        names = sorted(shapes[0]["against"])
        rows = [[n, *(ratio(s["against"][n], s["against"][n]["n"]) for s in shapes)] for n in names]
        lines += table(["form ÷ engine", *map(size, shapes)], rows)
    return lines


def lowering() -> list[str]:
    lines = ["## How long lowering takes (benchmarks/lowering.py)", ""]
    for found in results("lowering"):
        lines += [circumstances(found), ""]
        rows = []
        for row in found["rows"]:
            steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["steps"].items())
            rows.append(
                [str(row["layers"]), row["arm"], f"{row['mb']} MB", steps, f"{row['total']:.1f} s"]
            )
        lines += table(["layers", "by", "written", "seconds, one run", "together"], rows)
    return lines


def ranges() -> list[str]:
    lines = ["## What each way to choose ranges is worth (benchmarks/ranges.py)", ""]
    lines += ["Each arm has what those above it have; `smooth` says how many layers it scaled.", ""]
    for found in results("ranges"):
        lines += [circumstances(found), ""]
        rows = [
            [
                r["model"],
                r["target"],
                f"{r['arm']}, {r['smooth_sites']} layers" if r["arm"] == "smooth" else r["arm"],
                f"{r['drift']:.3f}",
                f"{metric_row(r['metric'])} {r['metric']['verdict']}",
            ]
            for r in found["rows"]
        ]
        lines += table(["model", "target", "arm", "drift (relative L2, held out)", "metric"], rows)
    return lines


def slicing() -> list[str]:
    lines = ["## What a residual width is cut by (benchmarks/slicing.py)", ""]
    for found in results("slicing"):
        lines += [
            f"The vision transformer on Fashion-MNIST with fewer than its {found['of']} channels, on ort, without any "
            "training after it. The last column is what principal directions have before the arm. "
            + circumstances(found), "",
        ]  # fmt: skip
        rows = [
            [
                f"{r['channels']} ({100 * r['channels'] / found['of']:.0f} %)",
                r["arm"],
                metric_row(r["model"]),
                gained(r["directions"]) if r["arm"] != "principal directions" else "",
            ]
            for r in found["rows"]
        ]
        lines += table(["width", "cut by", "accuracy", "principal directions"], rows)
    return lines


def gained(m: Json) -> str:
    """How far the second of two arms is before the first."""
    return f"{m['engine'] - m['reference']:+.4f} [{m['low']:+.4f}, {m['high']:+.4f}] {m['verdict']}"


def noised() -> list[str]:
    lines = ["## What few bits cost a vision transformer (benchmarks/noisy.py)", ""]
    for found in results("noisy"):
        lines += [
            f"The vision transformer on Fashion-MNIST, whose accuracy on these {found['n']} pictures is "
            f"{found['accuracy']:.4f}: linear layers with weights and activations of so many bits, on grids without a "
            "zero point. Means over draws of calibration pictures; intervals of 95 % from pictures "
            "drawn again. KL is from the float model's answers, and its ratio to that of clip search is of the same "
            "pictures; the last column counts those that the first draw alone has right: of the arm, of clip search. "
            + circumstances(found), "",
        ]  # fmt: skip
        rows = [
            [
                str(r["bits"]) + (", outliers" if r["model"] == "outliers" else ""),
                r["arm"],
                str(r["draws"]),
                f"{r['accuracy']:.4f}",
                f"{r['change']:+.4f} [{r['change_interval'][0]:+.4f}, {r['change_interval'][1]:+.4f}]",
                f"{r['kl']:.5f}",
                f"{r['kl_ratio']:.2f} [{r['kl_ratio_interval'][0]:.2f}, {r['kl_ratio_interval'][1]:.2f}]",
                f"{r['logit_error']:.4f}",
                "{} : {}".format(*r["mcnemar"]),
            ]
            for r in sorted(
                found["rows"], key=lambda r: (r["model"] == "outliers", r["bits"], r["kl"])
            )
        ]
        head = ["bits", "arm", "draws", "accuracy", "from float", "KL", "of clip search", "logits²",
                "right alone"]  # fmt: skip
        lines += table(head, rows)
        lines += [
            "Each way to choose grids beside the same with uniform noise (as the paper has it) and with offsets, on "
            "the pictures and draws of both: KL ÷ KL, below 1 the second is better. The interval is of pictures "
            "drawn again; a verdict wants every draw of calibration pictures on the same side too.", "",
        ]  # fmt: skip
        rows = [
            [
                str(r["bits"]) + (", outliers" if r["model"] == "outliers" else ""),
                r["base"],
                r["arm"],
                str(r["draws"]),
                "{:.5f} → {:.5f}".format(*r["kl"]),
                f"{r['kl_ratio']:.2f} [{r['kl_ratio_interval'][0]:.2f}, {r['kl_ratio_interval'][1]:.2f}]",
                ", ".join(f"{one:.2f}" for one in r["kl_ratio_by_draw"]),
                beside_one(*r["kl_ratio_interval"], r["kl_ratio_by_draw"]),
            ]
            for r in sorted(found["pairs"], key=lambda r: (r["model"] == "outliers", r["bits"]))
        ]
        head = ["bits", "grids", "beside", "draws", "KL", "ratio", "by draw", ""]
        lines += table(head, rows)
    return lines


def unseen() -> list[str]:
    lines = ["## Six bits on models that nothing was tuned for (benchmarks/unseen.py)", ""]
    for found in results("unseen"):
        lines += [
            f"Linear layers with weights and activations of {found['bits']} bits, on grids without a zero point, by "
            "arms of the table above: a Swin and a DeiT, small ones that `examples/noisyquant/train.py` trained for "
            "some minutes, and MiniLM-L6-v2 on pairs of STS-B. The error of every sample is that of the engine beside "
            "the float model; its ratio to clip search is of the same samples, with an interval of 95 % from samples "
            "drawn again. The score is accuracy, and Spearman's correlation for MiniLM. " + circumstances(found), "",
        ]  # fmt: skip
        rows = [
            [
                r["model"],
                r["arm"],
                f"{r['draws']} × {r['n']:,}",
                f"{r['measure']} {r['error']:.5f}",
                f"{r['ratio']:.2f} [{r['ratio_interval'][0]:.2f}, {r['ratio_interval'][1]:.2f}]",
                ", ".join(f"{one:.2f}" for one in r["ratio_by_draw"]),
                f"{r['float_score']:.4f} → {r['score']:.4f}",
            ]
            for r in found["rows"]
        ]
        head = ["model", "arm", "draws × samples", "error", "of clip search", "by draw", "score"]
        lines += table(head, rows)
        lines += [
            "What the gate says of a compile of `level alike, offsets, gptq`, on what metric and time may lose where a "
            "recipe says nothing:", "",
        ]  # fmt: skip
        rows = [
            [r["model"], r["target"], _taken_back(r["rolled_back"]), "; ".join(r["checks"])]
            for r in found["gates"]
        ]
        lines += table(["model", "target", "taken back", "checks of what is left"], rows)
    return lines


def searching() -> list[str]:
    lines = ["## What the search for offsets costs (benchmarks/searching.py)", ""]
    for found in results("searching"):
        lines += [
            f"A vision transformer of random weights of DeiT-S's size, {found['sites']} layers to {found['bits']} "
            f"bits with {found['samples']} pictures: one core works {found['cpu_s']:.0f} s for it, with at most "
            f"{found['peak_mb']:,} MB. Beside other work on that core it took {found['wall_s']:.0f} s. "
            + circumstances(found), "",
        ]  # fmt: skip
    return lines


def beside_one(low: float, high: float, by_draw: list[float]) -> str:
    """What an interval of a ratio of errors says, where every draw says the same."""
    if high < 1 and max(by_draw) < 1:
        return "better"
    return "worse" if low > 1 and min(by_draw) > 1 else "not distinguishable"


def rounding() -> list[str]:
    lines = ["## What ways to round weights cost a language model (benchmarks/rounding.py)", ""]
    for found in results("rounding"):
        lines += [
            "stories260K on ort. Perplexity of the model and of the engine, as a mean over draws of "
            f"{found['samples']} calibration samples, with the 95 % interval of the difference; `nearest` says the "
            "same beside the arm above it that rounds to the nearest. " + circumstances(found), "",
        ]  # fmt: skip
        rows = [
            [
                r["text"],
                r["arm"],
                str(r["draws"]),
                f"{metric_row(r['model'])} {100 * r['model']['drop']:+.1f} %",
                metric_row(r["nearest"]) if "nearest" in r else "",
            ]
            for r in sorted(found["rows"], key=lambda r: str(r["text"]))
        ]
        lines += table(["text", "arm", "draws", "perplexity", "from nearest"], rows)
    return lines


def decoder() -> list[str]:
    lines = ["## Language models beside other tools (benchmarks/decoder.py)", ""]
    for found in results("decoder"):
        versions = ", ".join(f"{n} {v}" for n, v in sorted(found["peer_versions"].items()))
        sizes = ", ".join(f"{n} {b / 1e6:.0f} MB" for n, b in sorted(found["model_bytes"].items()))
        lines += [
            f"{found['model']}, {found['threads']} threads, batch 1: reading {found['prompt']} tokens (`prefill`) and "
            f"writing one behind {found['past']} (`decode`). effc's two engines lie in one package: int8 reads, and "
            "4-bit weights, rounded to the nearest on symmetric grids, write, which costs this model much. "
            "The ratio is each one's time ÷ that of effc's engine for it, with its 99 % interval. "
            + (f"{versions}. " if versions else "") + f"{sizes}. {circumstances(found)}", "",
        ]  # fmt: skip
        cases = found["cases"]
        names = sorted({name for case in cases.values() for name in case["against"]})
        rows = [["effc", *(f"{case['engine_ms']:.2f} ms" for case in cases.values())]]
        for name in names:
            cells = []
            for case in cases.values():
                other = case["against"].get(name)
                told = f"{other['ms']:.2f} ms, {ratio(other, other['n'])}" if other else ""
                cells.append(told)
            rows.append([name, *cells])
        lines += table(["engine", *cases], rows)
        for role, metric in sorted(found["quality"].items()):
            if metric:
                lines += [
                    f"Perplexity of `{role}` over {metric['n']} tokens: {metric_row(metric)}.",
                    "",
                ]
        lines += ["Where the time of a run goes, by operator, with ONNX Runtime's profiler on:", ""]
        for word, case in cases.items():
            rows = []
            for name, of in case["profile"].items():
                spent = ", ".join(
                    f"{op} {ms:.2f} ({of['count'][op]})" for op, ms in list(of["ms"].items())[:8]
                )
                rows.append([word, name, str(of["nodes"]), spent])
            lines += table(["case", "engine", "nodes", "milliseconds (nodes) of the largest"], rows)
        for name, why in sorted(found["left_out"].items()):
            lines += [f"`{name}` could not be made: {why}", ""]
    return lines


def pruned() -> list[str]:
    lines = ["## What pruning costs in accuracy (benchmarks/pruning.py)", ""]
    for found in results("pruning"):
        units = found["units"]
        revisions = sorted({of["revision"] for of in units.values() if "revision" in of})
        lines += [
            "Every group that can be pruned loses that part of its units; then "
            f"{found['steps']} steps of distillation in batches of {found['batch']}, then int8. Accuracy on "
            f"{found['tested']:,} test pictures, the mean over seeds; in brackets the 95 % interval of the paired "
            "difference from random units, Student's over seeds, for each row by itself."
            f"{_looked(units)} "
            + circumstances({**found, "revision": ", ".join(revisions)}), "",
        ]  # fmt: skip
        names = [key.removesuffix(" whole") for key in units if key.endswith(" whole")]
        for name in names:
            rows = []
            for ratio, ranking, seeds in _rankings(units, name):
                cells = []
                for stage in ("pruned", "tuned", "int8"):
                    own, chance = _beside_chance(units, name, ratio, ranking, seeds, stage)
                    gap = student(own - chance)
                    beside = "" if ranking == "random" else f" ({gap.low:+.3f}, {gap.high:+.3f})"
                    cells.append(f"{own.mean():.4f}{beside}")
                share = units[f"{name}: {ranking}, {ratio}, {seeds[0]}"]["share"]
                rows.append([ratio, ranking, str(len(seeds)), f"{100 * share:.0f} %", *cells])
            whole = units[f"{name} whole"]["accuracy"]
            lines += [f"{name}, {whole:.4f} whole:", ""]
            lines += table(
                ["ratio", "ranking", "seeds", "parameters gone", "pruned", "tuned", "int8"], rows
            )
            for ratio in dict.fromkeys(ratio for ratio, _, _ in _rankings(units, name)):
                timed = units[f"{name} latency {ratio}"]
                words = ", ".join(f"{word} {ratio_of(of)}" for word, of in timed.items())
                lines += [f"Time of the whole ÷ pruned by {ratio}, one picture: {words}.", ""]
    return lines


def _rankings(units: Json, name: str) -> list[tuple[str, str, list[str]]]:
    """Ratio, ranking and seeds of the units of a model."""
    found: dict[str, dict[str, list[str]]] = {}
    for key in units:
        if key.startswith(f"{name}: "):
            ranking, ratio, seed = key.removeprefix(f"{name}: ").split(", ")
            found.setdefault(ratio, {}).setdefault(ranking, []).append(seed)
    return [(q, ranking, seeds) for q, of in found.items() for ranking, seeds in of.items()]


GREW = {"ViT, residual width": 3}
"""Cases of pruning to which seeds were added after a look at so many."""


def _looked(units: Json) -> str:
    """What the intervals of a case do not count: that it was looked at before it had all its seeds."""
    found = ""
    for name, first in GREW.items():
        seeds = {len(seeds) for _, _, seeds in _rankings(units, name)}
        if seeds and max(seeds) > first:
            found += (
                f" {name}: {max(seeds) - first} of the {max(seeds)} seeds were added after a look at the first "
                f"{first}, which the intervals do not count."
            )
    return found


def _beside_chance(
    units: Json, name: str, ratio: str, ranking: str, seeds: list[str], stage: str
) -> tuple[Any, Any]:
    """Accuracy of a ranking behind a stage, and of units drawn by chance, a number a seed."""
    own, chance = (
        np.array([units[f"{name}: {r}, {ratio}, {s}"][stage] for s in seeds])
        for r in (ranking, "random")
    )
    return own, chance


def ratio_of(shape: dict[str, Any]) -> str:
    other = shape["against"]["whole"]
    return ratio(other, other["n"])


def cached() -> list[str]:
    lines = ["## What a cache of integers is worth (benchmarks/cache.py)", ""]
    for found in results("cache"):
        lines += [
            f"A model of random weights, {found['layers']} layers as wide as SmolLM2-135M's, 4-bit weights, "
            f"{found['threads']} threads, batch 1. The ratio is a cache of floats ÷ one of integers, with its 99 % "
            "interval. " + circumstances(found), "",
        ]  # fmt: skip
        rows = []
        for row in found["rows"]:
            past, megabytes, other = row.get("past", 0), row["cache_mb"], row["against"]["floats"]
            rows.append([
                row["role"], str(row["length"]), str(past), f"{row['engine_ms']:.2f} ms", ratio(other, other["n"]),
                f"{megabytes['floats']} → {megabytes['codes']} MB",
            ])  # fmt: skip
        lines += table(
            ["engine", "tokens", "behind", "with integers", "floats ÷ integers", "cache"], rows
        )
    return lines


def narrowed() -> list[str]:
    lines = ["## What a quarter less width is worth to a language model (benchmarks/narrow.py)", ""]
    for found in results("narrow"):
        sizes = found["sizes"]
        lines += [
            f"A model of random weights: {sizes['num_hidden_layers']} layers of {sizes['hidden_size']:,} channels, a "
            f"table of {sizes['vocab_size']:,} words; {found['ratio']:.0%} of the residual width gone, "
            f"threads: {found['threads']}, batch 1. Reading is of 128 tokens, writing of one behind 128; integers are "
            "of 8 bit on both sides of a product, and of 4 bit in weights. In brackets the 99 % interval. "
            + circumstances(found), "",
        ]  # fmt: skip
        words = (
            "whole ÷ narrow", "plain ÷ whole", "plain ÷ narrow", "plain, last position ÷ narrow",
        )  # fmt: skip
        rows = [
            [
                f"{r['role']}, {r['kind']}, {r['target']}", f"{r['whole_ms']:.2f} → {r['ms']:.2f}",
                *(ratio(r[word], r["n"]) for word in words),
            ]
            for r in found["rows"]
        ]  # fmt: skip
        lines += table(["engine", "ms", *words], rows)
    return lines


def adapted() -> list[str]:
    lines = ["## What adapters cost beside integers (benchmarks/adapters.py)", ""]
    for found in results("adapters"):
        lines += [
            f"An encoder of random weights, {found['layers']} layers, {found['batch']} rows of {found['length']} "
            f"tokens, {found['threads']} threads; products of bytes, adapters of rank {found['rank']} or "
            f"{found['sizes'][0]} · {found['sizes'][1]} experts in float or 16 bit. In brackets the 99 % interval. "
            + circumstances(found), "",
        ]  # fmt: skip
        words = ("÷ none", "÷ stack, one", "÷ lora")
        rows = [
            [
                f"{r['width']}, {r['target']}, {r['kind']}", f"{r['ms']:.2f}",
                *(ratio(r[word], r["n"]) if word in r else "" for word in words),
            ]
            for r in found["rows"]
        ]  # fmt: skip
        lines += table(["width, engine, adapters", "ms", *words], rows)
        apart = max(r["row by row"] for r in found["rows"] if "row by row" in r)
        lines += [
            f"A row of a mixed batch differs from the same row alone by {apart:.1g} at most.",
            "",
        ]
    return lines


def experts() -> list[str]:
    lines = ["## Experts told what a request is about, beside LoRA (benchmarks/mor1e.py)", ""]
    for found in results("mor1e"):
        arms, about = found["arms"], found["about"]
        model = found.get("model", "MiniLM-L6-v2")
        lines += [
            f"{model}, {len(about['tasks'])} tasks, {found['data']['n']:,} training samples, the mean over seeds of "
            "each task's own score. Adapters of every arm train about as many numbers, with routers counted, for as "
            "many steps of the same samples. `ahead` is mor1e less the arm in the mean over tasks, paired over seeds, "
            "with Student's interval of 95 %: below 0 the arm is better. What arms are is in examples/mor1e/arms.py. "
            + circumstances(found), "",
        ]  # fmt: skip
        tasks = list(next(iter(arms.values()))["score"])
        untrained = found.get("untrained", {})
        rows = [
            [
                name, f"{arm['trainables']:,}", str(len(arm["mean"])),
                *(f"{_mean(arm['score'][task]):.3f}" for task in tasks),
                f"{_mean(arm['mean']):.4f}", _with_ends(found["ahead"].get(name)),
            ]
            for name, arm in arms.items()
        ]  # fmt: skip
        if untrained:
            scores = [f"{untrained[task]:.3f}" for task in tasks]
            rows.append(
                ["before training", "", "", *scores, f"{_mean(untrained.values()):.4f}", ""]
            )
        lines += table(["arm", "trainables", "seeds", *tasks, "mean", "ahead"], rows)
        shares = ", ".join(
            f"{task} {purity:.0%}"
            for task, purity in zip(
                about["task_of_clusters"], about["purity_of_clusters"], strict=True
            )
        )
        lines += [
            f"Of the {len(about['clusters'])} clusters of training prompts {about['purity']:.0%} of the prompts are of "
            f"their cluster's task ({shares}). A score moves by {about['score_std_over_requests']:.3f} between "
            f"requests (standard deviation) around {about['score_mean']:.3f}.", "",
        ]  # fmt: skip
        if "adapter_overhead" in found:
            over = found["adapter_overhead"]
            lines += [
                f"Engine of mor1e, seed 0: {found['export_max_abs']:.1g} at most from the graph, experts in fewer "
                f"products {found['fused_max_abs']:.1g} from those that were trained, a batch of unlike requests "
                f"{found['mixed_batch_max_abs']:.1g} from each alone; folded for one cluster its outputs move by "
                f"{found['static_fold_err']:.3f} (relative). Time of experts ÷ none in float, {over['batch']} rows of "
                f"{over['length']} tokens, {over['threads']} threads: {over['ratio']:.2f} [{over['low']:.2f}, "
                f"{over['high']:.2f}].", "",
            ]  # fmt: skip
        left = found.get("left_out", {})
        if left:
            names = list(next(iter(left.values()))["score"])
            rows = [
                [
                    task, f"{of['untrained']:.3f}",
                    *(f"{_mean(of['score'][arm]):.3f} (n = {len(of['score'][arm])})" for arm in names),
                ]
                for task, of in left.items()
            ]  # fmt: skip
            lines += [
                "Tasks that neither experts nor clusters know, each left out of a training:",
                "",
            ]
            lines += table(["task", "before training", *names], rows)
    return lines


def tuned_narrow() -> list[str]:
    """Language models that lose width while they are tuned."""
    lines = ["## What pruning while tuning is worth to a language model (benchmarks/pat.py)", ""]
    for found in (*results("pat-stories260k"), *results("pat-smollm2")):
        arms = found["arms"]
        counts = sorted({len(of["ppl"]) for of in arms.values()})
        data = found["data"]
        lines += [
            f"{found['model']}, a quarter of the residual width gone in every arm but the first, over "
            f"{' or '.join(map(str, counts))} seeds; perplexity of {data['n']:,} tokens of text that nobody trained "
            "on. Differences are of the logarithm of perplexity, paired by seed, with Student's 95 % interval: above 0 "
 "is worse than the arm that the column names, and chance is a set of channels or directions that the seed draws. "
            f"Beside chance, which varies by orders, the interval is Wilcoxon's where there are {FOR_RANKS} "
            "seeds or more; seeds behind the first five were added when those had been looked at. "
            "Answers are the share of right ones among four, the mean of four tasks, and their difference from lora's; "
            "seconds are those of the training, beside whatever else the machine did. " + circumstances(found), "",
        ]  # fmt: skip
        rows = []
        for arm, of in arms.items():
            control = next(
                (name for name in arms if name == f"{arm.partition(',')[0]}, random mask"), None
            )
            beside = [
                _log_gap(of, arms[other], by_ranks=other == control)
                if other in arms and arm != other
                else ""
                for other in (*BESIDE, control)
            ]
            answers = _answers(of)
            rows.append([
                arm, str(len(of["ppl"])), f"{of['trainables']:,}", f"{np.mean(of['seconds']):.0f}",
                f"{np.mean(of['ppl']):.2f}", *beside, f"{answers.mean():.3f}",
                _gap(*_both(answers, _answers(arms["lora"]))) if arm != "lora" else "",
            ])  # fmt: skip
        heads = [f"beside {other}" for other in (*BESIDE, "chance")]
        lines += table(
            [
                "arm",
                "seeds",
                "trainables",
                "s",
                "perplexity",
                *heads,
                "answers",
                "answers − lora's",
            ],
            rows,
        )
        if "pat, no identity" in arms:
            few = len(arms["pat, no identity"]["ppl"])
            spread = ", ".join(
                f"{np.std(np.log(arms[arm]['ppl'][:few]), ddof=1):.4f} {word}"
                for arm, word in (("pat", "with"), ("pat, no identity", "without"))
            )
            gap = _log_gap(arms["pat"], arms["pat, no identity"])
            lines += [
                f"Spread of log-perplexity over {few} seeds: {spread} the identity loss; with beside without: {gap}.",
                "",
            ]
        lines += [
            f"The folded graph is {found['fold_rel_err_fp32']:.1e} from the masked one in float32 and "
            f"{found['fold_rel_err_fp64']:.1e} in float64, the engine {found['engine_rel_l2']:.1e} from the folded. "
            f"Linear layers keep {found['linear_param_ratio']:.4f} of their parameters.", "",
        ]  # fmt: skip
    return lines


FOR_RANKS = 6
"""Differences that an interval of 95 % by ranks takes."""
BESIDE = ("lora", "pca then lora", "magnitude then lora")
"""What every arm is held against."""


def _answers(arm: Json) -> Any:
    """The share of right answers of every seed."""
    return np.mean([arm["tasks"][task] for task in arm["tasks"]], axis=0)


def _both(mine: Any, other: Any) -> tuple[Any, Any]:
    """The seeds that both have."""
    count = min(len(mine), len(other))
    return mine[:count], other[:count]


def _log_gap(mine: Json, other: Json, *, by_ranks: bool = False) -> str:
    """Difference of log-perplexity over the seeds that both have."""
    a, b = _both(*(np.log(of["ppl"]) for of in (mine, other)))
    return _by_ranks(a - b) if by_ranks and len(a) >= FOR_RANKS else _gap(a, b)


def narrow_encoders() -> list[str]:
    lines = ["## What pruning while tuning is worth to encoders (benchmarks/pat.py)", ""]
    for found in results("pat-encoders"):
        lines += [
            "A quarter of the residual width gone in every arm but the first; held to the model's own outputs. "
            "Accuracy in an engine, the mean over seeds; differences are paired by seed, with Student's 95 % interval. "
            + circumstances(found), "",
        ]  # fmt: skip
        for name, case in ((n, c) for n, c in found.items() if isinstance(c, dict) and "arms" in c):
            rows, counted = [], all("trainables" in of for of in case["arms"].values())
            for arm, of in case["arms"].items():
                score = np.array(of["score"])
                count = [f"{of['trainables'][0]:,}"] if counted else []
                cells = [
                    _gap(score, np.array(case["arms"][other]["score"])) if arm != other else ""
                    for other in ("lora", "pca then lora", "pca then pat, random mask")
                ]
                rows.append(
                    [
                        arm,
                        str(len(score)),
                        *count,
                        str(of["width"][0]),
                        f"{score.mean():.4f}",
                        *cells,
                    ]
                )
            lines += [f"{name}, {case['whole']:.4f} whole:", ""]
            heads = [
                "arm",
                "seeds",
                *(["trainables"] if counted else []),
                "width",
                "accuracy",
                "beside lora",
                "beside pca then lora",
                "beside chance",
            ]
            lines += table(heads, rows)
    return lines


def _gap(mine: Any, other: Any) -> str:
    """The mean of paired differences, with its interval."""
    if len(mine) < 2:
        return f"{(mine - other).mean():+.4f}"
    found = student(mine - other)
    return f"{(mine - other).mean():+.4f} ({found.low:+.4f}, {found.high:+.4f})"


def _by_ranks(differences: Any) -> str:
    """The median of the means of all pairs of differences, and Wilcoxon's 95 % interval (Hodges and Lehmann, 1963).

    It asks nothing of how differences are spread but that they are as far above their middle as below. Below six of
    them there is no such interval.
    """
    count = len(differences)
    first, second = np.triu_indices(count)
    means = np.sort((differences[first] + differences[second]) / 2)
    signs = np.array(list(itertools.product((0, 1), repeat=count)))
    sums = signs @ np.arange(1, count + 1)
    left = max(k for k in range(len(means) // 2) if k == 0 or (sums < k).mean() <= 0.025)
    return f"{np.median(means):+.4f} ({means[left - 1]:+.4f}, {means[-left]:+.4f})"


def trained() -> list[str]:
    lines = ["## What training while pruning costs beside LoRA (benchmarks/training.py)", ""]
    for found in results("training"):
        first = {arm: rounds[0]["trainables"] for arm, rounds in found["rounds"].items()}
        lines += [
            f"{found['layers']} layers of {found['width']} channels, {found['batch']} rows of {found['length']} tokens "
            f"a step, {found['threads']} thread; {first['pat']:,} trainables in PAT and {first['lora']:,} in LoRA. "
            "PAT ÷ LoRA, with Student's 95 % interval over rounds of one process each. " + circumstances(found), "",
        ]  # fmt: skip
        rows = []
        for word, key, digits in (
            ("seconds a step", "step_s", 3), ("peak memory, MB", "peak_mb", 0), ("of it by training", "added_mb", 0),
        ):  # fmt: skip
            logs = np.array(found["logs"][key])
            gap = student(logs)
            means = [
                f"{np.mean([r[key] for r in found['rounds'][arm]]):.{digits}f}"
                for arm in ("lora", "pat")
            ]
            ends = f"{math.exp(logs.mean()):.2f} [{math.exp(gap.low):.2f}, {math.exp(gap.high):.2f}], n = {len(logs)}"
            rows.append([word, *means, ends])
        lines += table(["", "LoRA", "PAT", "PAT ÷ LoRA"], rows)
    return lines


def sized() -> list[str]:
    lines = ["## What pruning buys, with and without sizes that pay (benchmarks/sizes.py)", ""]
    for found in results("sizes"):
        lines += [
            f"Nets of random weights on ONNX Runtime, batch 1, threads: {found['threads']}. The ratio is unpruned ÷ "
            "pruned in the same precision, and in the last column pruned as the ratio says ÷ pruned to sizes that pay, "
            "so above 1 those are faster; in brackets the 99 % interval. " + circumstances(found), "",
        ]  # fmt: skip
        rows = [
            [
                f"{r['net']}, {r['kind']}", f"{r['pruned']:.0%}",
                "as the ratio says" if r["align"] == "plain" else f"`align: {r['align']}`", _moved(r),
                f"{r['parameters']:.0%}", f"{r['whole_ms']:.2f} → {r['ms']:.2f}", ratio(r, r["n"]),
                ratio(r["against_plain"], r["n"]) if r["against_plain"] else "",
            ]
            for r in found["rows"]
        ]  # fmt: skip
        lines += table(
            ["net", "pruned", "sizes", "changed", "parameters left", "ms", "unpruned ÷ pruned",
             "as the ratio says ÷ these"], rows,
        )  # fmt: skip
    return lines


def _moved(row: Json) -> str:
    """`922 → 896` of so many kinds of groups, and what it took to choose them."""
    if not row["kinds"]:
        return ""
    words = [f"{wanted} → {kept}" for _, wanted, kept in row["moved"]]
    return f"{', '.join(words) or 'none'} of {row['kinds']} kinds; {row['seconds']:.0f} s"


def peers() -> list[str]:
    lines = [
        "## Beside other tools (benchmarks/peers.py)", "",
        "All are calibrated on the same samples and take turns with 2 threads, those more than five times slower than "
        "`effc ort` in turns of their own. The ratio is the time of each ÷ that of "
        "`effc ort`, with its 99 % interval, so above 1 effc's ONNX Runtime engine is faster. `effc ort` and `effc "
        "openvino` are what one compile for both ships: where integers do not pay, its gate has taken them back. "
        "`made in` is a process of its own: seconds and peak memory.", "",
    ]  # fmt: skip
    known = [found for found in results("peers") if "made" in found]
    lines += [_over_all(known), ""]
    for found in known:
        versions = ", ".join(f"{n} {v}" for n, v in found["peer_versions"].items())
        lines += [f"### {found['model']}", "", f"{versions}. {circumstances(found)}", ""]
        metric = found["metric"]
        names = [found["engine"], *sorted(found["shapes"][0]["against"])]
        rows = [_peer(found, name, metric) for name in names]
        heads = [*map(size, found["shapes"]), "drift", *([metric] if metric else []), "made in"]
        lines += table(["engine", *heads], rows)
        lines += [_best(found), ""]
        for name, why in sorted(found["left_out"].items()):
            lines += [f"`{name}` could not be made: {why}", ""]
    return lines


def _peer(found: Json, name: str, metric: str | None) -> list[str]:
    times = []
    for shape in found["shapes"]:
        other = shape["against"].get(name)
        ms = shape["engine_ms"] if other is None else other["ms"]
        times.append(f"{ms:.2f} ms" + ("" if other is None else f", {ratio(other, other['n'])}"))
    of = found["quality"][name]
    whole = "effc, both, all int8" if name.endswith("all int8") else "effc, both, gated"
    made = found["made"].get(name) or (found["made"][whole] if name.startswith("effc") else None)
    peak = "" if made is None or made["peak_mb"] is None else f", {made['peak_mb']:.0f} MB"
    took = "" if made is None else f"{made['seconds']:.0f} s{peak}"
    sites = found["int8_sites"].get(name)
    word = name if sites is None else f"{name} ({sites[0]} of {sites[1]} places in integers)"
    value = f"{of['metric']:.4f}" if "metric" in of else ""
    quality = [f"{of['drift']:.3f}", *([value] if metric else [])]
    return [word, *times, *quality, took]


RUNTIMES = {
    "of all": (("effc ort", "effc openvino"), ""),
    "on ONNX Runtime": (("effc ort",), "ort"),
    "on OpenVINO": (("effc openvino",), ("openvino", "nncf")),
}
"""What effc ships, and what the names of those beside it begin with."""


def _shares(found: Json, title: str) -> list[float]:
    """By shape, time of the fastest of all others ÷ that of the fastest engine that effc ships; for some runtimes."""
    ours, theirs = RUNTIMES[title]
    shares = []
    for shape in found["shapes"]:
        times = {found["engine"]: shape["engine_ms"]}
        times |= {n: o["ms"] for n, o in shape["against"].items()}
        mine = [times[name] for name in ours if name in times]
        others = [m for n, m in times.items() if not n.startswith("effc") and n.startswith(theirs)]
        if mine:
            shares.append(min(others) / min(mine))
    return shares


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.prod(values) ** (1 / len(values))


def _best(found: Json) -> str:
    """The fastest engine that effc ships beside the fastest of all others, and each runtime for itself."""
    told = []
    for title in RUNTIMES:
        if shares := _shares(found, title):
            each = ", ".join(f"{s:.2f}" for s in shares)
            told.append(f"{title} {_mean(shares):.2f} ({each})")
    return "Fastest peer ÷ effc's fastest, geometric mean (each shape): " + "; ".join(told) + "."


def _over_all(found: Sequence[Json]) -> str:
    """The same over models, each with its own mean."""
    told = []
    for title in RUNTIMES:
        means = [_mean(shares) for f in found if (shares := _shares(f, title))]
        told.append(f"{title} {_mean(means):.2f} ({', '.join(f'{m:.2f}' for m in means)})")
    names = ", ".join(f["model"] for f in found)
    return f"Fastest peer ÷ effc's fastest, geometric mean over {names}: {'; '.join(told)}."


def exact() -> list[str]:
    lines = ["## What each exact pass is worth (benchmarks/exact.py)", ""]
    for found in results("exact"):
        lines += [circumstances(found), ""]
        for row in found["rows"]:
            kind = "int8" if row["int8"] else "float"
            lines += [
                f"{row['model']} on {row['target']}, {kind}; form ÷ engine with all exact passes:",
                "",
            ]
            rows = []
            for form in row["shapes"][0]["against"]:
                word = form.removeprefix("without ").removeprefix("with ")
                sites = row["sites"].get(word)
                times = [ratio(s["against"][form], s["against"][form]["n"]) for s in row["shapes"]]
                rows.append([form, "" if sites is None else str(sites), *times])
            lines += table(["form", "places", *map(size, row["shapes"])], rows)
    return lines


def kernels() -> list[str]:
    lines = [
        "## Forms of a matrix product (benchmarks/kernels.py)",
        "",
        "The best form bounds what an int8 engine of mostly matrix products can gain over float on a processor.",
        "",
    ]
    for found in results("kernels"):
        lines += [circumstances(found), ""]
        names = sorted(found["ratios"], key=lambda n: -found["ratios"][n])
        rows = [
            [
                n,
                *(f"{s['ms']['float'] / s['ms'][n]:.2f}" for s in found["shapes"]),
                f"{found['ratios'][n]:.2f}",
            ]
            for n in names
        ]
        heads = [f"{s['rows']}×{s['inner']}×{s['columns']}" for s in found["shapes"]]
        lines += table(["float ÷ form", *heads, "geometric mean"], rows)
    return lines


def lint() -> list[str]:
    lines = [
        "## What lint finds, in time (benchmarks/lint.py)",
        "",
        "One layer with the fault and one without; where the advice is `--fix` it is the file that `effc lint --fix` "
        "wrote. A row without a rule is a claim that did not hold, and of which there is none.",
        "",
    ]
    for found in results("lint"):
        threads = found["threads"]
        lines += [circumstances(found) + f" {threads} thread{'s' if threads > 1 else ''}.", ""]
        rows = [
            [
                p["rule"] or "–", p["target"], p["layer"], p["advice"], f"{p['fault_ms']:.3f}",
                f"{p['without_ms']:.3f}", ratio(p, p["n"]),
            ]
            for p in found["places"]
        ]  # fmt: skip
        heads = ["rule", "target", "layer", "advice", "fault ms", "without ms", "fault ÷ without"]
        lines += table(heads, rows)
        model = found["model"]
        shape, against = model["shape"], model["shape"]["against"]
        fixed = ", ".join(f"{n} × {word}" for word, n in model["fixed"].items())
        before, after = model["float_products"]
        lines += [
            f"MiniLM-L6-v2 as onnxruntime's `quantize_static` makes int8 of it by default, batch × length "
            f"{size(shape)}: `--fix` put right {fixed}. Products in float {before} → {after}, in integers "
            f"{model['integer_products'][0]} → {model['integer_products'][1]}; outputs node by node off by a relative "
            f"L2 of {model['gap']:.1g}; {against['fault']['ms']:.1f} → {shape['engine_ms']:.1f} ms, ratio "
            f"{ratio(against['fault'], shape['n'])}. Plain float takes {against['float']['ms']:.1f} ms.",
            "",
        ]
    return lines


def foreign() -> list[str]:
    lines = ["## ONNX files from elsewhere to int8 (benchmarks/foreign.py)", ""]
    for found in results("foreign"):
        threads = found["threads"]
        lines += [circumstances(found) + f" {threads} thread{'s' if threads > 1 else ''}.", ""]
        models = {"paraphrase-MiniLM-L3-v2": found, **found["nets"]}
        rows = [
            [
                name, target, size(s), f"{s['ms']:.2f}", f"{s['engine_ms']:.2f}", ratio(s, s["n"]),
                f"{told['file_bytes'] / 1e6:.1f} → {told[target]['bytes'] / 1e6:.1f} MB",
                f"{told[target]['rel_l2']:.2g}",
            ]
            for name, told in models.items() for target in ("ort", "openvino") for s in told[target]["shapes"]
        ]  # fmt: skip
        heads = [
            "file", "target", "batch × length", "the file in ONNX Runtime, ms", "engine ms", "file ÷ engine", "size",
            "relative L2",
        ]  # fmt: skip
        lines += table(heads, rows)
        sts = "; ".join(f"{t} {metric_row(found[t]['metric'])}" for t in ("ort", "openvino"))
        quantised = found["quantised"]
        (drift,) = quantised["outputs"].values()
        lines += [
            "The first is a sentence encoder; the others have random weights, and how far they are from their files "
            f"says nothing of trained ones. STS-B (English test), Spearman: {sts}. A file of MiniLM-L6-v2 that "
            f"somebody else quantised, held against the float model: {metric_row(quantised['metric'])}, relative L2 "
            f"{drift['rel_l2']:.2g}.",
            "",
        ]
    return lines


def overflow() -> list[str]:
    lines = ["## Overflow of 16-bit sums (benchmarks/overflow.py)", ""]
    for found in results("overflow"):
        lines += [circumstances(found), ""]
        rows = [
            [f"{r['inputs']}×{r['outputs']}", f"{max(r['fixed']):.1e}", f"{max(r['free']):.1e}"]
            for r in found["engine"]
        ]
        lines += table(["layer", "engine off, with the fix", "without"], rows)
        cost = found["bits_lost"]
        lines += [
            f"On the {found['layers']} layers of MiniLM the fix costs {cost['8 bit, fixed']:.2f} bit of a weight; "
            f"7-bit weights cost {cost['7 bit']:.2f}.",
            "",
        ]
    return lines


def verdicts() -> list[str]:
    lines = ["## How often a verdict of speed is right (benchmarks/verdicts.py)", ""]
    said = {
        "aa": "an engine and itself",
        "neighbour": "the same, beside a process that keeps one core busy",
        "slowdown": "one layer more than the reference",
    }
    for found in results("verdicts"):
        lines += [circumstances(found) + f" {found['settings']['threads']} threads.", ""]
        rows = [
            [
                said[name],
                *(str(part[word]) for word in ("better", "worse", "not distinguishable")),
                f"{part['engine_ms']:.2f}",
                f"± {100 * part['half_width']:.1f} %",
                f"{part['seconds']:.1f}",
            ]
            for name, part in found["parts"].items()
        ]
        heads = ["better", "worse", "not distinguishable", "engine ms", "interval", "seconds each"]
        lines += table(["compared", *heads], rows)
        share = found["share"]
        lines += [
            "Both are engines of onnxruntime; a compile times torch beside them, in the same budget. "
            f"Measured for {found['long_s']:.0f} s, the layer more makes reference ÷ engine {share['ratio']:.4f} "
            f"[{share['low']:.4f}, {share['high']:.4f}].",
            "",
        ]
    return lines


def gated() -> list[str]:
    lines = [
        "## Naive int8 and gated int8 (benchmarks/gate.py)",
        "",
        "The same recipe with the gate off and on. Afterwards both are timed anew, and measured on samples that no "
        "gate has seen. Random models have no task: their labels are their own float answers. Taken back are layers, "
        "or the whole pass.",
        "",
    ]
    for found in results("gate"):
        rows = []
        for r in found["rows"]:
            for word in ("naive", "gated"):
                one = r[word]
                rows.append(
                    [
                        r["name"] if word == "naive" else "",
                        word,
                        "; ".join(f"{size(s)}: {ratio(s, s['n'])}" for s in one["shapes"]),
                        f"{one['metric']['name']} {metric_row(one['metric'])}",
                        f"{one['bytes'] / 1e6:.2f} MB",
                        _taken_back(one["gate"]["rolled_back"]),
                        "; ".join(one["beyond"]) or "nothing",
                    ]
                )
        for where in sorted({circumstances(r["circumstances"]) for r in found["rows"]}):
            lines += [where, ""]
        heads = [
            "",
            "faster reference ÷ engine",
            "metric",
            "size",
            "taken back",
            "beyond its bound",
        ]
        lines += table(["model", *heads], rows)
    return lines


def _taken_back(rolled_back: list[Json]) -> str:
    def word(sites: list[str]) -> str:
        if sites == ["all"]:
            return "the pass"
        return "1 layer" if len(sites) == 1 else f"{len(sites)} layers"

    return ", ".join(word(r["sites"]) for r in rolled_back) or "nothing"


def faults() -> list[str]:
    lines = ["## Faults that explain names (benchmarks/faults.py)", ""]
    for found in results("faults"):
        planted = [r for r in found["rows"] if r["fault"] is not None]
        clean = [r for r in found["rows"] if r["fault"] is None]
        lines += [circumstances(found), ""]
        rows = []
        for subject, place in sorted({(r["subject"], r["place"]) for r in planted}):
            these = [r for r in planted if (r["subject"], r["place"]) == (subject, place)]
            named = sum(r["named"] for r in these)
            seconds = sorted(r["seconds"] for r in these)[len(these) // 2]
            missed = ", ".join(r["fault"] for r in these if not r["named"])
            rows.append([subject, place, f"{named} of {len(these)}", missed, f"{seconds:.1f}"])
        lines += table(["program", "planted in", "named first", "missed", "seconds"], rows)
        accused = sum(r["accused"] > 0 for r in clean)
        lines += [f"Of {len(clean)} copies without a fault, {accused} had a node accused.", ""]
        drawn = found["held_out"]
        kinds: dict[str, list[Json]] = {}
        for row in drawn["rows"]:
            kinds.setdefault(row["subject"], []).append(row)
        each = ", ".join(
            f"{name} {sum(r['named'] for r in rows)} of {len(rows)}"
            for name, rows in sorted(kinds.items())
        )
        falsely = sum(row["accused"] > 0 for row in drawn["clean"])
        lines += [
            f"Bounds were chosen on the faults above. Of {drawn['n']} more, drawn with seed {drawn['seed']} on other "
            f"models, {drawn['named']} are named: {each}; of {len(drawn['clean'])} copies without a fault, {falsely} "
            "had a node accused.",
            "",
        ]
    return lines


MEMORY = {
    "peak_mb": "peak MB",
    "calibration_mb": "peak MB in calibration",
    "seconds": "seconds",
    "calibration_s": "of which calibration",
}


def memory() -> list[str]:
    lines = ["## Memory of a compile and the number of samples (benchmarks/memory.py)", ""]
    for found in results("memory"):
        lines += [circumstances(found), ""]
        rows = [[f"{r['samples']:,}", *(f"{r[n]:.0f}" for n in MEMORY)] for r in found["rows"]]
        lines += table(["sentences", *MEMORY.values()], rows)
        lines += [f"The largest of either peak is {found['spread']:.1%} above the smallest.", ""]
    return lines


def plans() -> list[str]:
    lines = ["## What a plan foretells (benchmarks/plan.py)", ""]
    for found in results("plan"):
        lines += [circumstances(found), ""]
        rows = [
            [
                r["name"],
                f"{r['predicted_s']:.0f} → {r['real_s']:.0f}",
                f"{r['predicted_mb']:.0f} → {r['real_mb']:.0f}",
                f"{r['predicted_bytes'] / 1e6:.2f} → {r['real_bytes'] / 1e6:.2f}",
            ]
            for r in found["rows"]
        ]
        lines += table(["model", "seconds: plan → compile", "peak MB", "size MB"], rows)
    return lines


def torture() -> list[str]:
    lines = ["## Spoilt inputs, kills and full disks (tools/torture.py)", ""]
    for found in results("malformed"):
        lines += [circumstances(found), ""]
        codes = ", ".join(f"{n} × {code}" for code, n in sorted(found["codes"].items()))
        lines += [
            f"{found['inputs']} spoilt inputs of {len(found['kinds'])} kinds, seed {found['seed']}: "
            f"{len(found['failed'])} ended otherwise than they may. Exit codes {codes}; at most "
            f"{found['longest_s']:.1f} s and {found['peak_mb']} MB, of which {found['idle_mb']} MB before any input.",
            "",
        ]
    rows = [
        [
            found["model"],
            f"{found['killed']} of {found['trials']}",
            f"{found['undisturbed_s']:.0f} s",
            f"{found['again_s_mean']:.0f} s",
            ", ".join(f"{stage} {n}" for stage, n in sorted(found["stages"].items())),
            f"{len(found['failed'])}",
            circumstances(found),
        ]
        for found in results("kills")
    ]
    if rows:
        heads = [
            "killed",
            "undisturbed",
            "run again (mean)",
            "killed in",
            "failed",
            "circumstances",
        ]
        lines += ["SIGKILL at moments drawn evenly, and the same command again:", ""]
        lines += table(["model", *heads], rows)
    rows = [
        [
            found["model"],
            f"{found['trials']}",
            ", ".join(f"{n} × {code}" for code, n in sorted(found["codes"].items())),
            ", ".join(f"{stage} {n}" for stage, n in sorted(found["stages"].items())),
            f"{len(found['failed'])}",
            circumstances(found),
        ]
        for found in results("full")
    ]
    if rows:
        lines += ["A disk without room, and the same command again with room:", ""]
        lines += table(
            ["model", "trials", "exit codes", "ended in", "failed", "circumstances"], rows
        )
    return lines


def summary() -> str:
    """The README's table: one line a processor."""
    rows = []
    for found in results("minilm"):
        shapes = found["bench"]["shapes"]
        best = next((f for f in found["features"][::-1] if "vnni" in f or "amx_int8" in f), "avx2")
        rows.append(
            [
                f"{found['cpu']}, {best}",
                *(ratio(s["against"]["float"], s["n"]) for s in shapes),
                metric_row(found["bench"]["metric"]),
            ]
        )
    heads = [f"{size(s)}" for s in next(results("minilm"))["bench"]["shapes"]]
    return "\n".join(table(["processor", *heads, "STS-B Spearman"], rows)).strip()


def best_rankings() -> str:
    """The README's table of pruning: rankings above chance, all of a network asked at once, in faster graphs."""
    best: dict[tuple[str, str], tuple[float, list[str]]] = {}
    looked = ""
    for found in results("pruning"):
        units = found["units"]
        names = dict.fromkeys(key.partition(": ")[0] for key in units if ": " in key)
        asked = {name: _rankings(units, name) for name in names}
        every = Counter(
            network(name) for name, rows in asked.items() for _, word, _ in rows if word != "random"
        )
        looked = _looked(units)
        for name, rows in asked.items():
            for gone, ranking, seeds in rows:
                own, chance = _beside_chance(units, name, gone, ranking, seeds, "int8")
                gap = student(own - chance, 1 - 0.05 / every[network(name)])
                time = units[f"{name} latency {gone}"]["int8"]["against"]["whole"]
                if ranking == "random" or gap.low <= 0 or time["low"] <= 1:
                    continue
                share = units[f"{name}: {ranking}, {gone}, {seeds[0]}"]["share"]
                row = [
                    name, f"{share:.0%}", ranking, f"{units[f'{name} whole']['accuracy']:.4f} → {own.mean():.4f}",
                    f"{gap.low:+.4f}, {gap.high:+.4f}", str(len(seeds)), ratio(time, time["n"]),
                ]  # fmt: skip
                if (name, gone) not in best or own.mean() > best[name, gone][0]:
                    best[name, gone] = own.mean(), row
    heads = ["model", "parameters gone", "ranking", "accuracy", "above chance", "seeds", "faster"]
    return "\n".join([*table(heads, [row for _, row in best.values()]), looked.strip()]).strip()


def network(name: str) -> str:
    """Which network a case of pruning is of: `ViT` of `ViT, align 16`."""
    return name.partition(",")[0]


def demo() -> str:
    """What `make demo` printed, the lines of the compile: `bash tools/demo.sh | tee benchmarks/results/demo.txt`."""
    lines = DEMO.read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("size"))
    last = next(i for i, line in enumerate(lines) if line.endswith("is ready"))
    return "\n".join(f"    {line}" for line in lines[first : last + 1])


def filled(text: str, source: str, content: str) -> str:
    """`text` with `content` between the marks that name its source."""
    before, mark, rest = text.partition(f"<!-- from {source} -->")
    if not mark or END not in rest:
        raise SystemExit(f"README.md has no place for {source}")
    return f"{before}{mark}\n{content}\n{END}{rest.partition(END)[2]}"


def deltas() -> list[str]:
    lines = ["## Weight deltas (benchmarks/delta.py)", ""]
    for found in results("delta"):
        full, steps = found["full_bytes"], found["steps"]
        lines += [circumstances(found), ""]
        lines += [
            f"MiniLM-L6 in int8 for ONNX Runtime, {full / 1e6:.1f} MB of engine, its head tuned in {steps['head']} "
            f"steps; from there norms and head in {steps['norms']}, or everything in {steps['everything']}, on SST-2 "
            f"in batches of {steps['batch']}. Accuracy on {found['sentences']:,} dev sentences; a share of the "
            "gain has a 95 % interval, a paired bootstrap over them. Bytes are those of the signed file.",
            "",
            "Whole packages: "
            + ", ".join(f"{n} {a:.4f}" for n, a in sorted(found["accuracy"].items()))
            + ".",
            "",
        ]
        rows = [
            [
                r["arm"],
                f"{r['budget']:.1%}" if r["budget"] else "none, lossless",
                f"{r['bytes']:,}",
                f"{r['bytes'] / full:.2%}",
                f"{r['error']:.3f}",
                f"{r['accuracy']:.4f}" if "accuracy" in r else "",
                f"{r['gain']:.2f} [{r['low']:.2f}, {r['high']:.2f}]" if "accuracy" in r else "",
            ]
            for r in found["arms"]
        ]
        heads = ["budget", "bytes", "of the engine", "change left out", "accuracy", "of the gain"]
        lines += table(["arm", *heads], rows)
        if by_steps := found.get("by_steps"):
            rows = [
                [
                    str(r["steps"]),
                    *(f"{r[k]:,} ({r[k] / full:.2%})" for k in ("bytes", "bytes_from_last")),
                    f"{r['accuracy']:.4f}",
                ]
                for r in by_steps
            ]
            lines += ["Everything tuned for longer, lossless:", ""]
            lines += table(["steps", "bytes", "from the stop before", "accuracy"], rows)
        rounds, large = found["chain"], found["large"]
        equal = sum(r["files_equal"] and r["answers_equal"] for r in rounds)
        lines += [
            f"In {equal} of {len(rounds)} chained rounds of at most {max(r['bytes'] for r in rounds):,} bytes the "
            "device's files and answers were those of its maker's mirror, to the bit; there and back was "
            f"{'' if found['there_and_back'] else 'NOT '}the same to the byte.",
            "",
            f"A package of {large['weights'] / 1e6:.0f} million weights in int8: a delta of {large['bytes']:,} bytes "
            f"was taken in {large['apply_s']:.1f} s ({large['apply_cpu_s']:.1f} s of a processor, at a load of "
            f"{large['load']:.0f}), with {large['times_package']:.2f} times the package on the disk at most.",
            "",
        ]
    return lines


def delta_faults() -> list[str]:
    lines = ["## Faults on a device that takes weight deltas (benchmarks/delta_faults.py)", ""]
    for found in results("delta_faults"):
        faults = found["faults"]
        lines += [circumstances(found), ""]
        lines += [
            f"{faults['survived']:,} of {faults['injected']:,} faults survived, seed {found['seed']}, a package of "
            f"{found['package_bytes'] / 1e6:.1f} MB: a store started after each and served the old or the new package, "
            "every file and every answer of it by sha256. Faults in anchors also hit stores of which nothing was whole "
            "before: these served nothing, and said so, or the new package, and took a whole anchor afterwards.",
            "",
        ]
        rows = [
            [kind, f"{c['survived']} of {c['injected']}", "; ".join(sorted(c["reasons"])) or "—"]
            for kind, c in sorted(found["kinds"].items())
        ]
        lines += table(["fault", "survived", "refused because"], rows)
        rows = [
            [word, ", ".join(f"{where} {n}" for where, n in sorted(hit.items()))]
            for word, hit in sorted(found["kills"].items())
        ]
        lines += ["Where the kills hit:", "", *table(["act", "moment"], rows)]
    return lines


def linked() -> list[str]:
    lines = ["## Updates over a slow line (benchmarks/delta_link.py)", ""]
    for found in results("delta_link"):
        lines += [
            f"Deltas of MiniLM-L6 in int8, lossless, over a line that loses {found['loss']:.0%} of its pieces of "
            f"{found['piece']:,} bytes and the connection with each, to a device that answers a sentence of 32 tokens "
            "every 25 ms meanwhile. Medians in seconds; waiting is the 99th percentile before and during an update, "
            "and its ratio has a 95 % interval, a bootstrap over updates. " + circumstances(found), "",
        ]  # fmt: skip
        rows = []
        for of in found["lines"]:
            took, wait, p99 = of["seconds"], of["p99_ms"], of["p99_ratio"]
            rows.append([
                of["model"], f"{of['mbit']:g}", str(of["updates"]), f"{of['bytes']:,}", str(of["broken"]),
                *(f"{took[word]:.2f}" for word in ("make", "fetch", "take")),
                f"{wait['idle']:.1f} → {wait['during']:.1f}",
                f"{p99['ratio']:.2f} [{p99['low']:.2f}, {p99['high']:.2f}]",
                str(of.get("failed_calls", "")),
            ])  # fmt: skip
        heads = ["Mbit/s", "updates", "bytes", "broken", "make", "fetch", "take", "ms", "÷ idle", "failed"]  # fmt: skip
        lines += table(["to", *heads], rows)
        for name, of in found.get("asked", {}).items():
            lines += [
                f"Asked without a pause while {of['updates']} releases to {name} and back were taken: the longest gap "
                f"between two answers was {of['longest_gap_ms']:.1f} ms ({of['median_gap_ms']:.1f} in the median "
                f"release), the longest answer while none was taken {of['longest_idle_ms']:.1f} ms, and "
                f"{of['failed_calls']} of {of['answers']:,} calls failed.",
                "",
            ]
    return lines


def looped() -> list[str]:
    lines = ["## Device and cloud over a slow line (benchmarks/delta_loop.py)", ""]
    for found in results("delta_loop"):
        lines += [
            "Device and cloud of examples/cloud_device in its plan `fast`, each a process, over a line that is as slow "
            f"up as down and loses {found['loss']:.0%} of its pieces of {found['piece']:,} bytes and the connection "
            "with each. Median seconds of the wall for each stage of a round, all of them on one machine; `wait` is "
            "the device's for a release, with the cloud's stages in it. While a release is fetched and taken the "
            f"device answers a picture every {found['every_s'] * 1e3:.0f} ms; waiting is the 99th percentile before "
            "and during an update, and its ratio has a 95 % interval, a bootstrap over rounds. "
            + circumstances(found),
            "",
        ]  # fmt: skip
        many = found["lines"]
        stages = "answer calibrate pack up wait train compile weigh make fetch take round"
        rows = [[name, *(f"{of['seconds'][name]:.2f}" for of in many)] for name in stages.split()]
        rows += [
            ["rounds", *(str(of["rounds"]) for of in many)],
            ["bytes up", *(f"{of['bytes_up']:,}" for of in many)],
            ["bytes down", *(f"{of['bytes_down']:,}" for of in many)],
            ["connections that broke, of looks for a release too", *(str(of["broken"]) for of in many)],
            ["accuracy", *(f"{of['accuracy'][0]:.3f} → {of['accuracy'][1]:.3f}" for of in many)],
            ["device is its cloud's mirror", *("yes" if of["mirror_equal"] else "NO" for of in many)],
            ["waiting, ms", *(f"{of['p99_ms']['idle']:.1f} → {of['p99_ms']['during']:.1f}" for of in many)],
            ["÷ idle", *("{ratio:.2f} [{low:.2f}, {high:.2f}]".format(**of["p99_ratio"]) for of in many)],
            ["calls that failed", *(f"{of['failed_calls']} of {of['answers']:,}" for of in many)],
        ]  # fmt: skip
        lines += table(["", *(f"{of['mbit']:g} Mbit/s" for of in many)], rows)
    return lines


def kept_fresh() -> list[str]:
    lines = ["## A device kept fresh from a cloud (benchmarks/cloud_device.py)", ""]
    for found in results("cloud_device"):
        plan, most = found["plan"], found["arms"]
        shown = [arms["akd"] for arms in most.values() if "akd" in arms]
        lines += [
            "Answers to questions about drawn shapes and words of their captions, "
            f"{found['parameters'] / 1e6:.1f} million parameters in int8, {plan['rounds']} rounds of {plan['stream']} "
            f"pictures in a domain that the student was not trained for, {found['data']['n']} test pictures. "
            "Accuracy is the engine's behind the last round. `recovered` is the gain over that of training on every "
            "label, by seeds that both have; differences are paired over seeds with Student's interval of 95 %. Bytes "
            "up are of the pictures as JPEG of quality 75, bytes down of the engine's weights in every round; "
            "signatures, manifests and tests count. The encoder is frozen on both sides, and `labels` trains every "
            "tensor of the answerer behind it and no other, so what can change is a part of those weights: `lossless` "
            "is what all of the change takes. What arms are is in examples/cloud_device/arms.py. "
            + circumstances(found),
            "",
            f"Of what labels give, akd recovered {_recovery(found['recovered']['akd'])} over {', '.join(most)} "
            f"({', '.join(f'of {t} alone {_recovery(r)}' for t, r in found['recovered_by_task'].items())}), with "
            f"at most {max(a['up_share_most'] for a in shown):.2%} up and "
            f"{max(a['down_share_most'] for a in shown):.2%} down in a round. {found['faults']['survived']:,} of "
            f"{found['faults']['injected']:,} spoiled releases were refused while the engine answered on, "
            f"{found['payloads']['refused']:,} of {found['payloads']['injected']:,} spoiled payloads at the cloud, "
            f"and the device was {'' if found['mirror_equal'] else 'NOT '}its cloud's mirror in every closed round.",
            "",
        ]
        for domain, arms in most.items():
            lines += [f"### {domain}", "", *_arms_of_cloud(domain, arms, found)]
        lines += _shifted(found)
    return lines


def _recovery(found: Json) -> str:
    if found["share"] is None:
        return "—"
    ends = f" [{found['low']:.3f}, {found['high']:.3f}]" if "low" in found else ""
    return f"{found['share']:.3f}{ends}"


def _with_ends(found: Json | None) -> str:
    """A mean with its interval, where it has one."""
    if found is None:
        return ""
    ends = f" [{found['low']:+.4f}, {found['high']:+.4f}]" if "low" in found else ""
    return f"{found['mean']:+.4f}{ends}"


def _arms_of_cloud(domain: str, arms: Json, found: Json) -> list[str]:
    above, ahead = found["above_chance"][domain], found["ahead"][domain]
    soon = found["soon"].get(domain, {})
    rows = [
        [
            name, str(a["seeds"]), f"{_mean(a['before']):.3f} → {_mean(a['accuracy']):.3f}",
            "—" if a["recovered"] is None else f"{a['recovered']:.3f}",
            f"{a['source_after'] - a['source_before']:+.3f}",
            f"{a['up_share']:.2%}", f"{a['down_share']:.2%}", f"{a['left']:.2f}", _with_ends(ahead.get(name)),
            _with_ends(above.get(name)),
        ]
        for name, a in arms.items()
    ]  # fmt: skip
    heads = [
        "seeds",
        "accuracy",
        "recovered",
        "by day",
        "up",
        "down",
        "change left",
        "akd is ahead",
        "above chance",
    ]
    lines = table(["arm", *heads], rows)
    if "akd" not in arms:
        return lines
    own = arms["akd"]
    near = own["apart"]
    lines += [
        f"What was trained in akd would take {own['fp16_share']:.2%} of the weights a round in float16, or "
        f"{own['zlib_share']:.2%} through zlib, to a device that runs adapters beside its weights. From teacher to "
        f"student, 1 − CKA of the last features went from {near['before']['features']:.3f} to "
        f"{near['after']['features']:.3f}, and KL of answers from {near['before']['answers']:.3f} to "
        f"{near['after']['answers']:.3f} (the float student).", "",
    ]  # fmt: skip
    told = [
        f"{name} {each['seconds']:.1f}"
        if each["seconds"] is not None
        else f"{name} only in {each['reached']} of {each['seeds']} seeds"
        for name, each in soon.items()
        if name in ("akd", "all tokens", "random", "labels")
    ]
    if told:
        lines += [
            "Seconds of a processor in the cloud until the float student had nine tenths of what labels gave it, "
            f"looked at every 25 steps: {', '.join(told)}.", "",
        ]  # fmt: skip
    return lines


def _shifted(found: Json) -> list[str]:
    lines: list[str] = []
    for arm, told in found["shifts"].items():
        drifts = told["drift"] or [None] * len(told["course"])
        rows = [["before", *(f"{v:.3f}" for v in told["before"].values()), ""]]
        rows += [
            [
                f"{i}, {domain}",
                *(f"{row[d]:.3f}" for d in told["before"]),
                "" if off is None else f"{off:.3f}",
            ]
            for i, (domain, row, off) in enumerate(
                zip(told["course"], told["matrix"], drifts, strict=True), 1
            )
        ]
        lines += [
            f"### Three shifts, one after the other: {arm}, {told['seeds']} seeds", "",
            *table(["round", *told["before"], "off the cloud's"], rows),
            f"Backward transfer {_with_ends(told['backward_transfer'])}; of all domains behind the last round "
            f"{_with_ends(told['last'])}.", "",
        ]  # fmt: skip
    if found["closed_less_open"]:
        lines += [
            f"The closed loop is {_with_ends(found['closed_less_open'])} ahead of the open one, over all domains.",
            "",
        ]
    return lines


PARTS: dict[Callable[[], list[str]], tuple[str, ...]] = {
    minilm: ("minilm",),
    models: ("models",),
    gated: ("gate",),
    coverage: ("coverage",),
    coverage_all: ("coverage-all",),
    prunable: ("prunable",),
    lowering: ("lowering",),
    rules: ("opset",),
    exact: ("exact",),
    ranges: ("ranges",),
    slicing: ("slicing",),
    noised: ("noisy",),
    unseen: ("unseen",),
    searching: ("searching",),
    rounding: ("rounding",),
    peers: ("peers",),
    decoder: ("decoder",),
    cached: ("cache",),
    pruned: ("pruning",),
    sized: ("sizes",),
    narrowed: ("narrow",),
    adapted: ("adapters",),
    experts: ("mor1e",),
    tuned_narrow: ("pat-stories260k", "pat-smollm2"),
    narrow_encoders: ("pat-encoders",),
    trained: ("training",),
    gpuless: ("gpuless",),
    sixteen: ("sixteen",),
    kernels: ("kernels",),
    lint: ("lint",),
    foreign: ("foreign",),
    overflow: ("overflow",),
    verdicts: ("verdicts",),
    faults: ("faults",),
    memory: ("memory",),
    plans: ("plan",),
    torture: ("malformed", "kills", "full"),
    deltas: ("delta",),
    delta_faults: ("delta_faults",),
    linked: ("delta_link",),
    looped: ("delta_loop",),
    kept_fresh: ("cloud_device",),
}
"""The sections of the page, in order, and the results that they are made of; without any a section is left out."""


def main(check: bool) -> int:
    parts = [part for part, names in PARTS.items() if any(any(results(n)) for n in names)]
    page = "\n".join([HEAD, *(line for part in parts for line in part())]).rstrip() + "\n"
    readme = README.read_text(encoding="utf-8")
    readme = filled(readme, "tools/demo.sh", f"\n{demo()}\n")
    readme = filled(readme, "benchmarks/tables.py: pruning", best_rankings())
    wanted = {PAGE: page, README: filled(readme, "benchmarks/tables.py", summary())}
    stale = [
        f for f, text in wanted.items() if not f.is_file() or f.read_text(encoding="utf-8") != text
    ]
    for file in stale:
        print(f"{file.name} is not what the results say" if check else f"wrote {file}")
        if not check:
            file.write_text(wanted[file], encoding="utf-8")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
