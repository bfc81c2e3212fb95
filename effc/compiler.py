"""The whole way as one short function: load, trace, rewrite, lower, verify, time, package.

Nothing here knows a pass, a target or a paper by name; tables do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import bench as benchmark
from effc import metrics, package, report
from effc.backends import BACKENDS
from effc.backends.base import Engine, Lowered, Port
from effc.backends.dialect import DIALECTS
from effc.backends.eager import GraphEngine, ModuleEngine
from effc.calib.calibrator import MASK, tensors_for
from effc.errors import CalibrationError, LoweringError, SourceError, UsageError, VerifyError
from effc.ir.edit import keep_outputs
from effc.ir.program import Graph, Program
from effc.ir.show import show
from effc.ir.trace import trace
from effc.passes import CANONICAL, PASSES
from effc.passes.base import PassRecord
from effc.passes.pipeline import apply
from effc.progress import Counted, Progress, Step, silent
from effc.recipe import QUANTIZE_WORDS, BenchSpec, Recipe, build, read, without_bench
from effc.samples import LENGTHS, Samples
from effc.source import Source, guess, load
from effc.table import unknown
from effc.verify import OutputDrift, Tolerance, parity

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a compile made: the package and everything that was measured on the way."""

    out: Path
    report: Json

    @property
    def bench(self) -> Json:
        return dict(self.report["bench"] or {})

    def text(self) -> str:
        return report.text(self.report)


def compile(
    model: str | Path | Recipe,
    out: str | Path,
    *,
    target: str | Sequence[str] = "ort",
    quantize: str = "none",
    calib: str | Path | None = None,
    metric: str | None = None,
    samples: int = 128,
    bench: bool = True,
    threads: int | None = None,
    decisions: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compile a model, or a recipe, into the directory `out`.

    `model` is a transformers directory, `module:factory`, a `Recipe` or the path of one; for the first two the other
    options build a recipe. `decisions` replays the recorded ranges of an earlier compile. Raises an `EffcError`, and
    then `out` is what it was before.
    """
    replayed = decisions is not None
    if isinstance(model, Recipe) or str(model).endswith((".yaml", ".yml")):
        if quantize != "none" or calib is not None or metric is not None:
            raise UsageError(
                "a recipe says itself what to do; quantize, calib and metric do not go with it"
            )
        recipe = model if isinstance(model, Recipe) else read(Path(model), replayed=replayed)
    else:
        data = from_flags(
            str(model),
            target=target,
            quantize=quantize,
            calib=calib,
            metric=metric,
            samples=samples,
        )
        recipe = build(data, replayed=replayed)
    if not bench:
        recipe = without_bench(recipe)
    return run(recipe, Path(out), threads=threads, decisions=decisions, progress=progress)


def from_flags(
    model: str,
    *,
    target: str | Sequence[str] = "ort",
    quantize: str = "none",
    calib: str | Path | None = None,
    metric: str | None = None,
    samples: int = 128,
) -> Json:
    """The plain values of the recipe that command line flags stand for."""
    if quantize not in QUANTIZE_WORDS:
        raise UsageError(unknown("--quantize word", quantize, QUANTIZE_WORDS))
    data: Json = {
        "source": guess(model),
        "targets": [target] if isinstance(target, str) else list(target),
    }
    if calib is not None:
        data["calib"] = {"file": str(calib), "samples": samples}
    options = QUANTIZE_WORDS[quantize]
    if options is not None:
        data["passes"] = [{"pass": "quantize", **options}]
    if metric is not None:
        data["metric"] = metric
    return data


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the passes made of a program for one target, and the files that came of it."""

    target: str
    program: Program
    records: tuple[PassRecord, ...]
    lowered: tuple[Lowered, ...]

    @property
    def lossy(self) -> bool:
        return any(r.effect == "lossy" and r.sites for r in self.records)


def run(
    recipe: Recipe,
    out: Path,
    *,
    threads: int | None = None,
    decisions: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Compile a recipe into `out`; see `compile`. `threads` goes before what the recipe's bench says."""
    progress = progress or Progress()
    out = Path(os.path.abspath(out))
    threads = threads or (recipe.bench.threads if recipe.bench else None) or default_threads()
    package.check_output(out)
    metric = metrics.parse(recipe.metric) if recipe.metric else None
    with progress.stage("load"):
        source = load(recipe.source.as_mapping())
    if len(source.modules) != 1:
        raise SourceError(
            f"the source has {len(source.modules)} graphs ({', '.join(source.modules)}), and compile takes one",
            hint="compile each from a factory of its own",
        )
    metric = metric or source.metric
    if metric is not None:
        metric.check(source)
    samples = Samples(source, recipe.calib)
    with progress.stage("trace"):
        original = trace_source(source)
        _refuse_unsupported(original, recipe.targets)
    with package.staged(out) as stage:
        built = []
        for target in recipe.targets:
            program, records = rewrite(
                recipe, original, source, samples, target, decisions, progress
            )
            lowered = tuple(_lower(program, target, recipe, stage, progress))
            built.append(
                Built(target=target, program=program, records=tuple(records), lowered=lowered)
            )
        first = built[0].lowered[0]
        with progress.stage("verify") as step:
            drifts = {
                made.target: verify_engine(
                    source, original.only(), low, samples, made.lossy, threads, step
                )
                for made in built
                for low in made.lowered
            }
            lowering = {
                made.target: dataclasses.asdict(check_lowering(made, samples, threads))
                for made in built
                if made.lossy
            }
        measured = None
        if metric is not None:
            with progress.stage("metric") as step:
                measured = measure(source, original.only(), first, metric, threads, step)
        timed = None
        if recipe.bench is not None:
            with progress.stage("bench") as step:
                timed = time_engine(source, original, first, samples, recipe.bench, threads, step)
        content = _write(stage, recipe, source, samples, built)
        content |= {
            "verify": drifts,
            "lowering": lowering,
            "metric": measured,
            "bench": _bench_json(timed, drifts[first.target], measured, content["model_bytes"]),
            "timings": {name: round(s, 3) for name, s in progress.seconds.items()},
        }
        report.write(stage, content)
        package.write_manifest(stage, content["manifest"])
    content["manifest"] = json.loads((out / package.MANIFEST).read_text(encoding="utf-8"))
    return Result(out=out, report={**content, "out": str(out)})


def default_threads() -> int:
    return max(
        1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def trace_source(source: Source) -> Program:
    """Every module of a source as a graph under its role, with only the outputs that it wants kept."""
    graphs = {}
    for role, module in source.modules.items():
        program = trace(module, source.inputs[role], dims=source.dims.get(role), role=role)
        graph = program.only()
        if wanted := source.outputs.get(role):
            keep_outputs(graph, wanted)
        graphs[role] = graph
    return Program(graphs)


def _refuse_unsupported(program: Program, targets: Sequence[str]) -> None:
    for target in targets:
        backend = BACKENDS[target]()
        for graph in program:
            if found := backend.supports(graph):
                lines = [f"{u.node}: {u.reason}" for u in found[:5]]
                more = f" and {len(found) - 5} more" if len(found) > 5 else ""
                raise LoweringError(
                    f"target {target} cannot take {len(found)} nodes of graph {graph.role!r}: "
                    + "; ".join(lines) + more,
                    hint="write the module without them, or choose another target",
                )  # fmt: skip


def rewrite(
    recipe: Recipe,
    original: Program,
    source: Source,
    samples: Samples,
    target: str,
    decisions: Mapping[str, Any] | None,
    progress: Progress,
) -> tuple[Program, list[PassRecord]]:
    """All passes of a recipe in the dialect of one target, on a clone."""
    program = original.clone()
    probes = {role: _exact_probes(inputs) for role, inputs in source.inputs.items()}
    steps = [PASSES[word]() for word in CANONICAL] if recipe.canonicalize else []
    records = []
    total = math.ceil(recipe.calib.samples / recipe.calib.batch) if recipe.calib else None
    for index, pass_ in enumerate([*steps, *recipe.passes]):
        key = f"{index - len(steps)}:{pass_.name}"
        recorded = _recorded(decisions, target, key) if index >= len(steps) else None
        with progress.stage(pass_.name) as step:
            records.append(
                apply(
                    pass_,
                    program,
                    samples if pass_.effect == "lossy" and recorded is None else None,
                    dialect=DIALECTS[target],
                    probes=probes
                    if pass_.effect == "exact" or recorded is not None
                    else _probes(original, samples),
                    recorded=recorded,
                    progress=lambda _, done, step=step: step(done, total),  # type: ignore[misc]
                )
            )
    return program, records


def _exact_probes(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What exact passes are held to: the example, and the example with half of its first row masked."""
    probes = [dict(inputs)]
    mask = inputs.get(MASK)
    if mask is not None and mask.dim() == 2 and mask.shape[1] > 1:
        padded = mask.clone()
        padded[0, mask.shape[1] // 2 :] = 0
        probes.append({**inputs, MASK: padded})
    return probes


def _recorded(decisions: Mapping[str, Any] | None, target: str, key: str) -> Any:
    """What an earlier compile decided in a step; None where nothing is replayed. Raises CalibrationError."""
    if decisions is None:
        return None
    for name in (f"{target}/{key}", key):
        if name in decisions:
            return decisions[name]
    raise CalibrationError(
        f"the recorded decisions know no step {key!r}",
        hint=f"they know {', '.join(sorted(decisions)) or 'none'}; compile again without --decisions",
    )


def _probes(original: Program, samples: Samples) -> dict[str, list[Any]]:
    """The first calibration batch of every role, for measuring drift on real data."""
    found = {}
    for graph in original:
        first = next(iter(samples(graph.role)), None)
        found[graph.role] = [tensors_for(graph, first.inputs)] if first is not None else []
    return found


def _lower(
    program: Program, target: str, recipe: Recipe, stage: Path, progress: Progress
) -> list[Lowered]:
    backend = BACKENDS[target]()
    roles = list(program.graphs)
    made = []
    with progress.stage("lower"):
        for graph in program:
            place = package.engine_dir(stage, graph.role, target, roles, recipe.targets)
            made.append(backend.lower(graph, place))
    return made


def verify_engine(
    source: Source,
    graph: Graph,
    lowered: Lowered,
    samples: Samples,
    lossy: bool,
    threads: int,
    step: Step = silent,
) -> dict[str, Json]:
    """Drift of an engine from the user's module, by kind of data and output.

    Raises VerifyError where an engine that should be exact is not, or gives values that are not numbers.
    """
    found: dict[str, Json] = {}
    with (
        ModuleEngine(source.module, graph) as reference,
        BACKENDS[lowered.target]().open(lowered, threads=threads) as engine,
    ):
        cases = _cases(source, samples, engine, longest(source, graph))
        for number, (label, batches) in enumerate(cases, 1):
            drifts = parity(reference, engine, batches)
            if not lossy:
                Tolerance().check(drifts, where=f"{lowered.target}, {label}")
            found[label] = {name: dataclasses.asdict(d) for name, d in drifts.items()}
            step(number, len(cases))
    return found


MOST_LOWERED = 0.25
"""Relative L2 that an engine may be from the graph that it was made of: codes flip at the borders of rounding."""


def check_lowering(built: Built, samples: Samples, threads: int) -> OutputDrift:
    """How far an engine is from its own rewritten graph, the worst output; quantisation is in both.

    Raises VerifyError where that is more than rounding can do: then the lowering is wrong, whatever the drift of
    quantisation hides.
    """
    (graph,), (lowered,) = tuple(built.program), built.lowered
    with BACKENDS[built.target]().open(lowered, threads=threads) as engine:
        shapes = [(2, 32)] if samples.has_length() else [(2, 1)]
        cases = shaped_cases(samples, shapes, engine.inputs, longest(samples.source, graph))
        feeds = [case.feeds for case in cases]
        feeds += [dict(b.inputs) for b in itertools.islice(samples(graph.role), 1)]
        drifts = parity(GraphEngine(graph), engine, feeds)
    name, worst = max(drifts.items(), key=lambda item: item[1].rel_l2)
    if not worst.rel_l2 <= MOST_LOWERED:
        raise VerifyError(
            f"output {name!r} of the engine is {worst.rel_l2:.2g} (relative L2) from the graph that it was made of",
            where=built.target,
            hint="this is a fault of the lowering, not of quantisation; please report the model",
        )
    return worst


def longest(source: Source, graph: Graph) -> int:
    """The longest input that a model takes, as its settings and its graph say."""
    limits = [source.processor.max_length if source.processor is not None else None]
    limits += [graph.largest(word) for word in LENGTHS]
    return min((n for n in limits if n is not None), default=sys.maxsize)


def _cases(
    source: Source, samples: Samples, engine: Engine, most: int
) -> list[tuple[str, list[Any]]]:
    cases: list[tuple[str, list[Any]]] = []
    (role,) = source.inputs
    first = []
    for batch in samples(role):
        first.append(dict(batch.inputs))
        if len(first) == 4:
            break
    if first:
        cases.append(("calibration", first))
    if fresh := samples.held_out():
        cases.append(("held out", [dict(b.inputs) for b in fresh]))
    shapes = [(rows, length) for rows in (1, 8) for length in (4, 32, 128)]
    cases += [(c.word, [c.feeds]) for c in shaped_cases(samples, shapes, engine.inputs, most)]
    padded = _padded(samples, min(32, most)) if samples.has_length() else None
    if padded is not None and fits(engine.inputs, padded):
        cases.append(("padded", [padded]))
    return cases


def _padded(samples: Samples, length: int) -> Json | None:
    """One short and one long row in a batch, the short one padded."""
    feeds = samples.shaped(2, length)
    if MASK not in feeds:
        return None
    for name in {MASK, "input_ids"} & set(feeds):
        feeds[name][0, length // 4 + 1 :] = 0
    return feeds


def fits(ports: Sequence[Port], feeds: Mapping[str, Any]) -> bool:
    """Whether feeds have the sizes that an engine's fixed dimensions want."""
    for port in ports:
        if port.name not in feeds:
            raise VerifyError(
                f"the engine takes {port.name!r}, which the model does not",
                hint="it was made from another model",
            )
        shape = feeds[port.name].shape
        if len(shape) != len(port.shape):
            return False
        if any(
            isinstance(want, int) and want != have
            for want, have in zip(port.shape, shape, strict=True)
        ):
            return False
    return True


def measure(
    source: Source,
    graph: Graph,
    lowered: Lowered,
    metric: Any,
    threads: int,
    step: Step = silent,
) -> Json:
    """The task metric of model and engine on the same samples, with the interval of their difference."""
    with ModuleEngine(source.module, graph) as model:
        first = Counted(model, step)
        reference = metric.measure(first, source.processor)
    with BACKENDS[lowered.target]().open(lowered, threads=threads) as engine:
        second = Counted(engine, step, done=first.done, total=2 * first.done)
        mine = metric.measure(second, source.processor)
    compared = metrics.compare(metric, reference, mine)
    return {**dataclasses.asdict(compared), "data": metrics.describe(metric.file)}


def time_engine(
    source: Source,
    original: Program,
    lowered: Lowered,
    samples: Samples,
    spec: BenchSpec,
    threads: int,
    step: Any = None,
    against: Mapping[str, Any] | None = None,
    streams: int = 1,
) -> benchmark.BenchResult:
    """Engine against the user's module in torch and against the plain float export, in one interleaved run."""
    from effc.backends.onnx import save, to_onnx
    from effc.backends.ort import OrtEngine, peak_rss_mb

    graph = original.only()
    with _torch_threads(threads), tempfile.TemporaryDirectory(prefix="effc-") as place:
        files = save(to_onnx(graph, 21, translate=False), Path(place))
        openers = {
            "engine": lambda: BACKENDS[lowered.target]().open(lowered, threads=threads),
            "float": lambda: OrtEngine(Path(place) / files[0], threads=threads),
            "torch": lambda: ModuleEngine(source.module, graph),
            **(against or {}),
        }
        cases = shaped_cases(samples, spec.shapes, lowered.inputs, longest(source, graph))
        timed = benchmark.compare(
            openers, cases, threads=threads, budget_s=spec.budget_s, seed=spec.seed,
            streams=streams, references=("float", "torch"), progress=step,
        )  # fmt: skip
        largest = max(cases, key=lambda c: c.batch * (c.length or 1), default=None)
        if largest is None or not lowered.files:
            return timed
        places = {"engine": lowered.directory / lowered.files[0], "float": Path(place) / files[0]}
        memory = {n: peak_rss_mb(p, largest.feeds, threads) for n, p in places.items()}
        return dataclasses.replace(timed, peak_rss_mb=memory)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shaped_cases(
    samples: Samples,
    shapes: Iterable[tuple[int, int]],
    ports: Sequence[Port],
    most: int = sys.maxsize,
) -> list[benchmark.Case]:
    """Inputs of those shapes that an engine can take, each once; the example's shape where it takes none of them.

    Lengths above `most` are cut to it.
    """
    cases: dict[str, benchmark.Case] = {}
    for batch, wanted in shapes:
        feeds = samples.shaped(batch, min(wanted, most))
        rows, length = samples.shape_of(feeds)
        case = benchmark.Case(batch=rows, length=length, feeds=feeds)
        if fits(ports, feeds):
            cases.setdefault(case.word, case)
    if not cases:
        feeds = samples.example()
        rows, length = samples.shape_of(feeds)
        cases["example"] = benchmark.Case(batch=rows, length=length, feeds=feeds)
    return list(cases.values())


def _bench_json(
    timed: benchmark.BenchResult | None,
    drifts: Mapping[str, Json],
    metric: Json | None,
    model_bytes: int,
) -> Json | None:
    """bench.json as it is published: shapes, outputs, metric, model_bytes and the circumstances."""
    if timed is None:
        return None
    return {
        **timed.to_json(),
        "outputs": worst_known(drifts),
        "metric": metric,
        "model_bytes": model_bytes,
        "versions": versions(),
    }


def worst_known(cases: Mapping[str, Json]) -> Json:
    """Per output, the drift over held-out data where there is any, else over calibration data or the largest case."""

    def samples(label: str) -> int:
        return sum(int(d["n"]) for d in cases[label].values())

    label = next((n for n in ("held out", "calibration") if n in cases), max(cases, key=samples))
    return dict(cases[label])


def graph_digest(programs: Sequence[Program]) -> str:
    """sha256 over the text of the graphs and every tensor in them."""
    import torch

    total = hashlib.sha256()
    for graph in (graph for program in programs for graph in program):
        total.update(show(graph).encode())
        for name, tensor in sorted(graph.tensors().items()):
            total.update(name.encode())
            total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Versions that decide the bytes of an output."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("effc", "torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            found[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return found


def _write(
    stage: Path, recipe: Recipe, source: Source, samples: Samples, built: Sequence[Built]
) -> Json:
    """Everything of the package but the manifest file; gives what the report and the manifest say."""
    if source.directory is not None:
        package.copy_files(source.directory, source.files, stage)
    decisions: Json = {}
    origins: Json = {}
    for made in built:
        prefix = f"{made.target}/" if len(built) > 1 else ""
        steps = made.records[len(made.records) - len(recipe.passes) :]
        decisions |= {f"{prefix}{i}:{r.name}": r.decisions for i, r in enumerate(steps)}
        origins |= {
            prefix + graph.role: {n: dataclasses.asdict(o) for n, o in graph.origins.items()}
            for graph in made.program
        }
    (stage / "decisions.json").write_text(package.dump(decisions), encoding="utf-8")
    (stage / "origins.json").write_text(package.dump(origins), encoding="utf-8")
    (stage / "recipe.yaml").write_text(recipe.portable(), encoding="utf-8")
    (stage / "local.json").write_text(
        package.dump({"source": _absolute(recipe.source.as_mapping())}), encoding="utf-8"
    )
    engines = [_entry(low, stage) for made in built for low in made.lowered]
    passes = [
        {
            "name": r.name, "target": made.target, "options": r.options, "effect": r.effect,
            "sites": r.sites, "nodes": list(r.nodes), "bytes": list(r.bytes),
        }
        for made in built for r in made.records if r.sites
    ]  # fmt: skip
    manifest = {
        "schema": package.SCHEMA,
        "kind": source.kind,
        "engines": engines,
        "links": [],
        "source": {"name": source.name, "digest": source.digest},
        "data": samples.description(),
        "graph_digest": graph_digest([made.program for made in built]),
        "passes": passes,
        "decisions": "decisions.json",
        "origins": "origins.json",
        "versions": versions(),
    }
    first = built[0].lowered[0]
    return {
        "manifest": manifest,
        "passes": [
            {**dataclasses.asdict(r), "target": made.target, "decisions": len(r.decisions)}
            for made in built
            for r in made.records
        ],
        "sites": [
            {**dataclasses.asdict(s), "target": low.target}
            for made in built
            for low in made.lowered
            for s in low.sites
        ],
        "model_bytes": sum((first.directory / name).stat().st_size for name in first.files),
        "source_bytes": sum(_weight_bytes(m) for m in source.modules.values()),
        "data": samples.description(),
    }


def _absolute(source: Mapping[str, Any]) -> Json:
    """A source whose files are named from the root, so that it is found from any folder."""
    found = dict(source)
    if os.path.isdir(place := found.get("transformers", "")):
        found["transformers"] = os.path.abspath(place)
    file, _, function = found.get("python", "").rpartition(":")
    if os.path.isfile(file):
        found["python"] = f"{os.path.abspath(file)}:{function}"
    return found


def _weight_bytes(module: Any) -> int:
    places = {t.data_ptr(): t.numel() * t.element_size() for t in module.state_dict().values()}
    return sum(places.values())


def _entry(lowered: Lowered, stage: Path) -> Json:
    path = lowered.directory / lowered.files[0]
    slow = [s for s in lowered.sites if not s.int8]
    return {
        "role": lowered.role,
        "target": lowered.target,
        "path": path.relative_to(stage).as_posix(),
        "sha256": package.digest(path),
        "inputs": [dataclasses.asdict(p) for p in lowered.inputs],
        "outputs": [dataclasses.asdict(p) for p in lowered.outputs],
        "opset": lowered.opset,
        "requires": list(lowered.requires),
        "int8_sites": len(lowered.sites) - len(slow),
        "total_sites": len(lowered.sites),
        "float_sites": [
            {"name": s.name, "op": s.op, "kernel": s.kernel, "reason": s.reason} for s in slow
        ],
    }
