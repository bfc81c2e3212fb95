"""What the commands on a finished package do: verify, bench, inspect; and what a machine and effc itself have.

No command here runs code that a package names. A model is loaded only where the user names it, or where the package
remembers a model directory (never a factory) that still is the one it was made from.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from effc import bench as benchmark
from effc import package, report
from effc.errors import SourceError, UsageError, VerifyError
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
) -> Json:
    """Integrity of a package; with `model`, drift by output and the task metric too.

    Raises VerifyError where the package is not what its manifest says.
    """
    with progress.stage("integrity"):
        manifest = package.read(out)
        broken = package.check(out)
    if broken:
        raise VerifyError(
            f"{out} is not what its manifest says: {'; '.join(broken[:5])}",
            hint="compile it again, or get an unharmed copy",
        )
    found: Json = {
        "files": len(manifest.files),
        "model_bytes": manifest.model_bytes(out),
        "outputs": {},
        "cases": {},
        "metric": None,
    }
    if model is None:
        if metric is not None:
            raise UsageError("--metric compares with the model", hint="add --model MODEL")
        return found
    from effc import compiler, metrics

    wanted = metrics.parse(metric) if metric else None
    source, lowered, samples, original = _open(out, manifest, model, calib, progress)
    if wanted is not None:
        wanted.check(source)
    threads = threads or compiler.default_threads()
    lossy = any(p["effect"] == "lossy" for p in manifest.passes)
    with progress.stage("verify"):
        cases = compiler.verify_engine(source, original.only(), lowered, samples, lossy, threads)
    found["cases"] = cases
    found["outputs"] = compiler.worst_known(cases)
    if wanted is not None:
        with progress.stage("metric"):
            found["metric"] = compiler.measure(source, original.only(), lowered, wanted, threads)
    return found


def _open(
    out: Path, manifest: package.Manifest, model: str, calib: str | None, progress: Progress
) -> Any:
    """Source, first engine, samples and traced graph of a package and the model it was made from."""
    from effc import compiler
    from effc.recipe import CalibSpec
    from effc.samples import Samples
    from effc.source import guess, load

    with progress.stage("load"):
        source = load(guess(model))
    if source.digest != manifest.source.get("digest"):
        raise SourceError(
            f"{model} is not the model that {out} was made from",
            hint="its digest differs from the manifest's; give the right directory",
        )
    with progress.stage("trace"):
        original = compiler.trace_source(source)
    spec = CalibSpec(file=calib) if calib else None
    return source, _lowered(out, manifest.engines[0]), Samples(source, spec), original


def _lowered(out: Path, entry: package.EngineEntry) -> Any:
    from effc.backends.base import Lowered, Port

    path = package.inside(out, entry.path)

    def ports(items: Sequence[Mapping[str, Any]]) -> tuple[Port, ...]:
        return tuple(Port(name=i["name"], dtype=i["dtype"], shape=tuple(i["shape"])) for i in items)

    return Lowered(
        role=entry.role,
        target=entry.target,
        directory=path.parent,
        files=(path.name,),
        opset=entry.opset,
        inputs=ports(entry.inputs),
        outputs=ports(entry.outputs),
    )


def verify_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"integrity  {found['files']} files as the manifest says, {found['model_bytes'] / 1e6:.1f} MB of model"
    ]
    for label, outputs in found["cases"].items():
        for name, d in outputs.items():
            lines.append(
                f"parity     {label}: {name} max abs {d['max_abs']:.3g}, relative L2 {d['rel_l2']:.3g}, "
                f"cosine {d['cosine']:.5f} (n = {d['n']})"
            )
    if found["metric"]:
        lines.append(report.metric_line(found["metric"]))
    return lines


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """`1x16,8x128` as pairs. Raises UsageError for anything else."""
    shapes = []
    for part in text.split(","):
        batch, _, length = part.strip().partition("x")
        if (
            not batch.isdecimal()
            or not (length or "1").isdecimal()
            or int(batch) < 1
            or int(length or 1) < 1
        ):
            raise UsageError(f"--shapes {part!r} is not BATCHxLENGTH", hint="--shapes 1x16,8x128")
        shapes.append((int(batch), int(length or 1)))
    return tuple(shapes)


def bench(
    out: Path,
    *,
    model: str | None,
    against: Sequence[str],
    calib: str | None,
    metric: str | None,
    shapes: Sequence[tuple[int, int]],
    budget_s: float,
    threads: int | None,
    streams: int,
    progress: Progress,
) -> Json:
    """Timings of a package's engine against its model and other engines, with parity and, where asked, the metric."""
    from effc import compiler, metrics
    from effc.recipe import BenchSpec

    wanted = metrics.parse(metric) if metric else None
    with progress.stage("integrity"):
        manifest = package.read(out)
        if broken := package.check(out):
            raise VerifyError(f"{out} is not what its manifest says: {'; '.join(broken[:5])}")
    model = model or _remembered(out)
    threads = threads or compiler.default_threads()
    others = {_name_of(word): _opener(word, threads) for word in against}
    if model is None:
        raise UsageError(
            "bench compares with the model, and the package remembers none that is still there",
            hint="add --model MODEL",
        )
    source, lowered, samples, original = _open(out, manifest, model, calib, progress)
    if wanted is not None:
        wanted.check(source)
    lossy = any(p["effect"] == "lossy" for p in manifest.passes)
    with progress.stage("verify"):
        cases = compiler.verify_engine(source, original.only(), lowered, samples, lossy, threads)
    measured = None
    if wanted is not None:
        with progress.stage("metric"):
            measured = compiler.measure(source, original.only(), lowered, wanted, threads)
    spec = BenchSpec(shapes=tuple(shapes), threads=threads, budget_s=budget_s)
    with progress.stage("bench") as step:
        timed = compiler.time_engine(
            source, original, lowered, samples, spec, threads, step, others, streams
        )
    return {
        **timed.to_json(),
        "outputs": compiler.worst_known(cases),
        "metric": measured,
        "model_bytes": manifest.model_bytes(out),
        "versions": compiler.versions(),
    }


def _remembered(out: Path) -> str | None:
    """The model directory that a package was made from, where it is a directory and still there."""
    file = out / "local.json"
    if not file.is_file():
        return None
    place = report.read(file).get("source", {}).get("transformers")
    return place if isinstance(place, str) and Path(place).is_dir() else None


def _name_of(word: str) -> str:
    """What `--against` is called in the results: as typed, unless that is one of the names that stand there anyway."""
    return os.path.abspath(word) if word in ("engine", "float", "torch") else word


def _opener(word: str, threads: int) -> Callable[[], Any]:
    from effc.backends.ort import OrtEngine

    path = Path(word)
    if path.is_dir():
        path = package.inside(path, package.read(path).engines[0].path)
    if path.suffix != ".onnx" or not path.is_file():
        raise UsageError(f"--against {word} is neither a package nor an .onnx file")
    return lambda: OrtEngine(path, threads=threads)


def inspect(model: str, *, target: str, graph: bool) -> Json:
    """What a package holds, or what effc sees in a model: sites that quantize would take, by operator."""
    path = Path(model)
    if (path / package.MANIFEST).is_file():
        manifest = package.read(path)
        return {"package": dataclasses.asdict(manifest), "bytes": manifest.model_bytes(path)}
    from effc import compiler
    from effc.backends import BACKENDS
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
        lines = [
            f"{manifest['kind']} made from {manifest['source']['name']}, {found['bytes'] / 1e6:.1f} MB of model"
        ]
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
                f"    float: {s['name']} ({s['kernel']}): {s['reason']}" for s in e["float_sites"]
            ]
        for p in manifest["passes"]:
            lines.append(f"{p['name']}: {p['sites']} sites, {p['effect']}")
        return lines
    lines = [f"{found['name']}, {found['kind']}"]
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


FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "bf16",
)


def cpu_features() -> list[str]:
    """The instruction sets that decide which integer kernels are fast here."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            flags = next(
                (
                    ln.split(":", 1)[1].split()
                    for ln in stream
                    if ln.startswith(("flags", "Features"))
                ),
                [],
            )
    except OSError:
        return []
    return [name for name in FEATURES if name in flags]


def doctor() -> Json:
    """CPU, memory, versions, and every target with the line that installs it where it is missing."""
    from effc.backends import TARGETS

    versions: dict[str, str | None] = {}
    for name in (
        "effc",
        "torch",
        "transformers",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "numpy",
        "openvino",
    ):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    targets: Json = {}
    needs = {"ort": "onnxruntime", "onnx": "onnxscript"}
    for target in TARGETS:
        module = needs.get(target, target)
        here = importlib.util.find_spec(module) is not None
        targets[target] = {"available": here, "install": None if here else f"pip install {module}"}
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": benchmark.cpu_name(),
        "features": cpu_features(),
        "cores": os.cpu_count(),
        "versions": versions,
        "targets": targets,
    }


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
        lines.append(f"target     {target}: {'available' if t['available'] else t['install']}")
    return lines
