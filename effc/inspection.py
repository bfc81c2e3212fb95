"""What the commands on a finished package do: verify, bench, inspect; and what a machine and effc itself have.

No command here runs code that a package names, unless the user says to trust it. A model is loaded where the user names
it, or where the package remembers a model directory that still is the one it was made from.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effc import bench as benchmark
from effc import package, peers, report
from effc.backends import BACKENDS, DISTRIBUTIONS, TARGETS
from effc.backends.base import Lowered
from effc.engine import entry_of, refuse
from effc.engine import lowered as lowered_of
from effc.errors import BackendUnavailable, PackageError, SourceError, UsageError
from effc.intuition import FILE, ROLE
from effc.machine import cpu_features, default_threads, installed
from effc.progress import Progress

Json = dict[str, Any]


def verify(
    out: Path,
    *,
    model: str | None,
    calib: str | None,
    metric: str | None,
    threads: int | None,
    progress: Progress,
    trust_code: bool = False,
) -> Json:
    """Integrity of a package; with its model, drift of every engine by output and the task metric of the first too.

    The model is `model`, or with `trust_code` what the package remembers. Raises VerifyError where the package is not
    what its manifest says.
    """
    manifest = _whole(out, progress)
    found: Json = {
        "files": len(manifest.files),
        "model_bytes": manifest.model_bytes(out),
        "outputs": {},
        "cases": {},
        "stand_ins": {},
        "metric": None,
    }
    if model is None and not trust_code:
        if metric is not None:
            raise UsageError("--metric compares with the model", hint=NAME_THE_MODEL)
        return found
    from effc import measure, metrics

    wanted = metrics.parse(metric) if metric else None
    spec = _source_of(out, manifest, model, trust_code)
    parts = _open(out, manifest, spec, calib, progress)
    source, samples, original = parts[manifest.engines[0].role]
    if wanted is not None:
        wanted.check(source)
    threads = threads or default_threads()
    with progress.stage("verify") as step:
        for number, entry in enumerate(manifest.engines):
            source, samples, original = parts[entry.role]
            cases = measure.verify_engine(
                source,
                original.only(),
                lowered_of(out, entry),
                samples,
                _lossy(manifest, entry),
                threads,
                step,
            )
            found["outputs"] = found["outputs"] or measure.worst_known(cases)
            if (why := _obstacle_of(lowered_of(out, entry))) is not None:
                found["stand_ins"][manifest.label(entry)] = why
            prefix = f"{manifest.label(entry)}: " if number else ""
            found["cases"] |= {f"{prefix}{label}": drifts for label, drifts in cases.items()}
    if wanted is not None:
        lowered = lowered_of(out, manifest.engines[0])
        source, samples, original = parts[manifest.engines[0].role]
        with progress.stage("metric") as step:
            found["metric"] = measure.task_metric(
                source, original.only(), lowered, wanted, threads, step,
                _teller(out, manifest, manifest.engines[0]),
            )  # fmt: skip
    return found


NAME_THE_MODEL = "add --model MODEL, or --trust-code to run the factory that the package remembers, if you trust it"


def _whole(out: Path, progress: Progress) -> package.Manifest:
    """The manifest of a package that is what its manifest says. Raises VerifyError for any other."""
    with progress.stage("integrity"):
        manifest = package.read(out)
        refuse(out, package.check(out))
    return manifest


def _teller(out: Path, manifest: package.Manifest, entry: package.EngineEntry) -> Lowered | None:
    """The engine of a package that says what texts are about, for an engine that is told; None where there is none."""
    found = manifest.engine(entry.target, ROLE)
    return lowered_of(out, found) if found is not None and entry.role != ROLE else None


def _lossy(manifest: package.Manifest, entry: package.EngineEntry) -> bool:
    mine = entry.target, entry.role
    return any(p.effect == "lossy" and (p.target, p.role) == mine for p in manifest.passes)


def _source_of(out: Path, manifest: package.Manifest, model: str | None, trust_code: bool) -> Json:
    """The model that the user named, or else the one that the package remembers. Raises UsageError without any."""
    from effc.causal import PAST
    from effc.source import guess

    spec: Any = guess(model) if model is not None else _remembered(out, trust_code)
    if spec is not None and "python" not in spec and manifest.kind == "causal-lm":
        names = [port.name for port in manifest.engines[0].inputs]
        spec = {**spec, "cache": any(name.startswith(PAST) for name in names)}
        roles = [r for r in dict.fromkeys(e.role for e in manifest.engines) if r != ROLE]
        if len(roles) > 1:
            spec["roles"] = roles
    if spec is not None and "python" not in spec:
        spec = {**spec, **_told(out, manifest)}
    if spec is not None and "onnx" in spec and "tokenizer" not in spec and _has_words(manifest):
        spec = {**spec, "tokenizer": str(out)}
    if spec is None:
        raise UsageError(
            f"this compares with the model, and {out} remembers none that may be loaded",
            hint=NAME_THE_MODEL,
        )
    return dict(spec)


def _has_words(manifest: package.Manifest) -> bool:
    """Whether a package holds what makes inputs of texts or pictures."""
    return any(re.match(r"tokenizer|vocab|preprocessor_config", name) for name in manifest.files)


def _told(out: Path, manifest: package.Manifest) -> Json:
    """What says of requests what they are about: the package's own centroids, and the encoder where it was."""
    if all(engine.role != ROLE for engine in manifest.engines):
        return {}
    content = package.read_json(out, "local.json")
    source = content.get("source") if isinstance(content, dict) else None
    place = source.get("embedder") if isinstance(source, dict) else None
    if not isinstance(place, str) or not os.path.isdir(place):
        raise UsageError(
            f"{out} is told what requests are about by an encoder, which is not where it was",
            hint="put it back, or run effc verify without --model",
        )
    return {"intuition": str(out / FILE), "embedder": place}


def _remembered(out: Path, trust_code: bool) -> Json | None:
    """What a package was made from: a model directory that is still there, or a factory where code is trusted."""
    try:
        content = package.read_json(out, "local.json")
    except PackageError:
        return None
    source = content.get("source") if isinstance(content, dict) else None
    if not isinstance(source, dict):
        return None
    for word in ("transformers", "diffusers"):
        place = source.get(word)
        if isinstance(place, str) and os.path.isdir(place):
            return {word: place}
    place = source.get("checkpoint")
    if isinstance(place, str) and os.path.isdir(place):
        return {"task": source.get("task"), "checkpoint": place}
    for word in ("gguf", "onnx"):
        file = source.get(word)
        if isinstance(file, str) and os.path.isfile(file):
            beside = source.get("tokenizer")
            return {word: file, **({"tokenizer": beside} if isinstance(beside, str) else {})}
    return source if trust_code and isinstance(source.get("python"), str) else None


def _open(
    out: Path, manifest: package.Manifest, spec: Json, calib: str | None, progress: Progress
) -> Any:
    """By role: source, samples and graph of the model that a package was made from. Raises SourceError for another."""
    from effc import compiler
    from effc.ir.program import Program
    from effc.recipe import WORDS, CalibSpec
    from effc.samples import Samples
    from effc.source import load
    from effc.trajectories import at_a_time

    with progress.stage("load"):
        source = load(spec)
    if source.digest != manifest.source.get("digest"):
        named = next(spec[word] for word in WORDS if word in spec)
        raise SourceError(
            f"{named} is not the model that {out} was made from",
            hint="its digest differs from the manifest's; name the right one, or, where a factory was called with "
            "options, leave --model out and add --trust-code",
        )
    times = (manifest.data or {}).get("times")
    if source.scheduler is not None and isinstance(times, list) and times:
        source = at_a_time(source, times)
    with progress.stage("trace"):
        original = compiler.trace_source(source)
    drawn = CalibSpec(file=calib) if calib else None
    parts = {role: source.only(role) for role in source.modules}
    return {
        role: (part, Samples(part, drawn), Program({role: original[role]}))
        for role, part in parts.items()
    }


def verify_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"integrity  {found['files']} files as the manifest says, {found['model_bytes'] / 1e6:.1f} MB of model"
    ]
    lines += report.stand_ins(found)
    for label, outputs in found["cases"].items():
        lines += [f"parity     {label}: {line}" for line in report.drift_lines(outputs)]
    if found["metric"]:
        lines.append(report.metric_line(found["metric"]))
    return lines


def parse_shapes(text: str) -> tuple[Any, ...]:
    """`1x16,8x128,1x1+128` as batch, length and, where there is one, past. Raises UsageError for anything else."""
    shapes: list[tuple[int, ...]] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:x(\d*))?(?:\+(\d+))?", part.strip(), re.ASCII)
        sizes = [int(size or 1) for size in found.groups()[:2]] if found else [0]
        past = found and found[3]
        if min(sizes) < 1 or past == "0":
            raise UsageError(
                f"--shapes {part!r} is not BATCHxLENGTH, nor BATCHxLENGTH+PAST",
                hint="--shapes 1x16,8x128",
            )
        shapes.append((*sizes, int(past)) if past else tuple(sizes))
    return tuple(shapes)


def bench(
    out: Path,
    *,
    model: str | None,
    against: Sequence[str],
    calib: str | None,
    metric: str | None,
    shapes: Sequence[Any],
    budget_s: float,
    threads: int | None,
    streams: int,
    progress: Progress,
    target: str | None = None,
    trust_code: bool = False,
) -> Json:
    """Timings of a package's engine against its model and other engines, with parity and, where asked, the metric.

    The engine is that of `target`, the first where none is given.
    """
    from effc import build, measure, metrics
    from effc.recipe import BenchSpec

    if not math.isfinite(budget_s):
        raise UsageError(f"--budget {budget_s} never ends", hint="--budget 10, in seconds")
    wanted = metrics.parse(metric) if metric else None
    manifest = _whole(out, progress)
    entry = entry_of(out, manifest, target)
    threads = threads or default_threads()
    others = {_name_of(word): _opener(word, threads) for word in against}
    model_spec = _source_of(out, manifest, model, trust_code)
    source, samples, original = _open(out, manifest, model_spec, calib, progress)[entry.role]
    if wanted is not None:
        wanted.check(source)
    lowered = lowered_of(out, entry)
    with progress.stage("verify") as step:
        cases = measure.verify_engine(
            source, original.only(), lowered, samples, _lossy(manifest, entry), threads, step
        )
    measured = None
    if wanted is not None:
        with progress.stage("metric") as step:
            measured = measure.task_metric(
                source,
                original.only(),
                lowered,
                wanted,
                threads,
                step,
                _teller(out, manifest, entry),
            )
    spec = BenchSpec(shapes=tuple(shapes), threads=threads, budget_s=budget_s)
    with progress.stage("bench") as step:
        timed = measure.time_engine(
            source, original, lowered, samples, spec, threads, step, others, streams
        )
    return {
        **timed.to_json(),
        "target": entry.target,
        "sha256": entry.sha256,
        "role": entry.role,
        "outputs": measure.worst_known(cases),
        "metric": measured,
        "model_bytes": manifest.model_bytes(out, entry),
        "versions": build.versions(),
    }


def _name_of(word: str) -> str:
    """What `--against` is called in the results: as typed, unless that is one of the names that stand there anyway."""
    return os.path.abspath(word) if word in ("engine", "float", "torch") else word


def _opener(word: str, threads: int) -> Callable[[], Any]:
    from effc.backends import onnx_file
    from effc.backends.ort_engine import OrtEngine
    from effc.measure import opener

    path = Path(word)
    if os.path.isdir(path):
        refuse(path, package.check(path))
        return opener(lowered_of(path, package.read(path).engines[0]), threads)
    if os.path.isfile(path) and path.suffix == ".onnx":
        path = path.resolve()
        refuse(path, onnx_file.problems(path.parent, path.name))
        return lambda: OrtEngine(path, threads=threads)
    raise UsageError(
        f"--against {word} is neither a package nor an .onnx file",
        hint="--against OTHER_OUT, or --against float.onnx",
    )


def is_package(model: str) -> bool:
    """Whether a word names a package, whole or not, rather than a model."""
    return os.path.lexists(Path(model) / package.MANIFEST)


def inspect(model: str, *, target: str, graph: bool, coupling: bool = False) -> Json:
    """What a package holds, or what effc sees in a model: sites that quantize would take, by operator."""
    path = Path(model)
    if is_package(model):
        manifest = package.read(path)
        return {"package": dataclasses.asdict(manifest), "bytes": manifest.model_bytes(path)}
    from effc import compared, compiler, coupled

    file = compared.described(path) if compared.is_file(model) else None
    if file is not None and file["quantised"] is not None:
        return {"file": file}
    from effc.backends.dialect import DIALECTS
    from effc.ir.select import op_name, site_names
    from effc.ir.show import show
    from effc.passes import CANONICAL, PASSES
    from effc.passes.pipeline import apply
    from effc.source import guess, load

    dialect = DIALECTS[target]
    source = load(guess(model))
    program = compiler.trace_source(source)
    probes = {role: [dict(inputs)] for role, inputs in source.inputs.items()}
    for word in CANONICAL:
        apply(PASSES[word](), program, probes=probes)
    roles: Json = {}
    for item in program:
        names = site_names(item)
        sites = PASSES["quantize"]().resolve(dialect).sites(item)
        roles[item.role] = {
            "nodes": len(list(item.nodes)),
            "weight_bytes": item.weight_bytes(),
            "inputs": list(item.inputs),
            "outputs": list(item.outputs),
            "sites": [{"name": names[n], "op": op_name(n)} for n in sites],
            "unsupported": [dataclasses.asdict(u) for u in BACKENDS[target]().supports(item)],
        }
        if graph:
            roles[item.role]["graph"] = show(item)
        if coupling:
            roles[item.role]["coupling"] = coupled.describe(item)
    rules = {k: v for k, v in dataclasses.asdict(dialect).items() if k != "reasons"}
    return {
        "kind": source.kind,
        "name": source.name,
        "target": target,
        "dialect": rules,
        "reasons": dict(dialect.reasons),
        "roles": roles,
    }


def inspect_lines(found: Mapping[str, Any]) -> list[str]:
    if "package" in found:
        manifest = found["package"]
        name = manifest["source"].get("name", "a model without a name")
        lines = [f"{manifest['kind']} made from {name}, {found['bytes'] / 1e6:.1f} MB of model"]
        for e in manifest["engines"]:
            lines.append(
                f"{e['path']}: {e['target']}, opset {e['opset']}, {e['int8_sites']}/{e['total_sites']} sites in "
                f"integer kernels, needs {', '.join(e['requires']) or 'nothing more'}"
            )
            for side in ("inputs", "outputs"):
                for port in e[side]:
                    shape = ", ".join(str(s) for s in port["shape"])
                    lines.append(f"    {side[:-1]} {port['name']}: {port['dtype']} [{shape}]")
            lines += [
                f"    float: {s['name']} ({s['kernel']}): {s['reason']}"
                for s in e["float_sites"]
                if s["kernel"] != "unknown"
            ]
        for p in manifest["passes"]:
            lines.append(f"{p['name']}: {p['sites']} sites, {p['effect']}")
        return lines
    if "file" in found:
        from effc import compared

        return compared.lines(found)
    lines = [f"{found['name']}, {found['kind']}"]
    if any("coupling" in r for r in found["roles"].values()):
        return [*lines, *_coupling_lines(found)]
    for rule, reason in found["reasons"].items():
        lines.append(f"{found['target']} {rule}: {_rule(found['dialect'].get(rule))} — {reason}")
    for role, r in found["roles"].items():
        lines.append(
            f"graph {role}: {r['nodes']} nodes, {r['weight_bytes'] / 1e6:.1f} MB, {len(r['sites'])} sites"
        )
        lines += [f"    {s['op']:10} {s['name']}" for s in r["sites"]]
        lines += [f"    unsupported {u['node']}: {u['reason']}" for u in r["unsupported"]]
        if "graph" in r:
            lines.append(r["graph"])
    return lines


def _coupling_lines(found: Mapping[str, Any]) -> list[str]:
    from effc import coupled

    return [
        line
        for role, r in found["roles"].items()
        for line in (*coupled.lines(role, r["coupling"]), *([r["graph"]] if "graph" in r else []))
    ]


def drawing(found: Mapping[str, Any]) -> str:
    """The groups of an inspected model as SVG."""
    from effc import coupled

    return coupled.drawing({role: r["coupling"] for role, r in found["roles"].items()})


def _rule(value: Any) -> str:
    if isinstance(value, Mapping):
        sign = "int" if value["signed"] else "uint"
        return f"{sign}{value['bits']} {'symmetric' if value['symmetric'] else 'asymmetric'}"
    return ", ".join(value) if isinstance(value, tuple | list) else str(value)


def passes() -> Json:
    """Every pass: what it does, its effect, its options with their defaults."""
    from effc.passes import PASSES
    from effc.recipe import defaults_of

    found: Json = {}
    for word in PASSES:
        kind = PASSES[word]
        summary = (kind.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
        options = {name: _default(value) for name, (_, value) in defaults_of(kind).items()}
        found[word] = {
            "effect": kind.effect,
            "summary": " ".join(summary.split()),
            "options": options,
        }
    return found


def _default(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {k: v for k, v in dataclasses.asdict(value).items() if v not in ("*", ())}
    return list(value) if isinstance(value, tuple) else value


def doctor(model: str | None = None, place: str | None = None) -> Json:
    """CPU, memory, versions, and every target with the line that installs it where it is missing.

    A planned target is never available; it has no such line where what it needs is here already. Beside it stands who
    serves places that effc has no target for, or, of a `place` and perhaps a model, which tool serves it.
    """
    names = (
        "effc",
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "numpy",
        "openvino",
    )
    targets: Json = {}
    for target in TARGETS:
        distribution, wanted = DISTRIBUTIONS.get(target, (target, target))
        here, why = installed(distribution) is not None, None
        try:
            why = BACKENDS[target]().obstacle() if here else None
        except BackendUnavailable:
            here = False
        targets[target] = {
            "available": here,
            "install": None if here else f"pip install {wanted}",
            "obstacle": why,
        }
    asked = peers.everywhere() if place is None else peers.answer(model, place)
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": benchmark.cpu_name(),
        "features": cpu_features(),
        "cores": os.cpu_count(),
        "versions": {name: installed(name) for name in names},
        "targets": targets,
        "elsewhere" if place is None else "answer": asked,
    }


def _obstacle_of(lowered: Lowered) -> str | None:
    found: str | None = BACKENDS[lowered.target]().obstacle(lowered)
    return found


def doctor_lines(found: Mapping[str, Any]) -> list[str]:
    features = ", ".join(found["features"]) or "none that matter"
    lines = [
        f"python     {found['python']} on {found['platform']}",
        f"cpu        {found['cpu']}",
        f"features   {features}",
    ]
    fast = {"avx512_vnni", "avx_vnni", "asimddp", "i8mm", "amx_int8"} & set(found["features"])
    if not fast:
        lines.append("           no int8 dot product here: int8 engines may be slower than float")
    lines += [
        f"{name:10} {number or 'not installed'}" for name, number in found["versions"].items()
    ]
    for target, t in found["targets"].items():
        word = "available" if t["available"] else t["install"] or "installed"
        if t["obstacle"]:
            word = f"engines are built here and not run: {t['obstacle']}"
        lines.append(f"target     {target}: {word}")
    for peer in found.get("elsewhere", {}).values():
        lines.append(
            f"elsewhere  {', '.join(peer['words'])}: {peer['tool']}; effc doctor --for says why"
        )
    if (answer := found.get("answer")) is not None:
        own = answer["effc"] or f"effc does not serve {answer['target']}"
        lines += [f"answer     {own}", *peers.lines(answer["elsewhere"])]
    return lines
