"""What an engine is worth, measured against the user's own module: drift, the task's metric, time.

Compile, verify and bench ask the same questions; here is where each is answered, once.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from effc import bench as benchmark
from effc import metrics, scratch
from effc.backends import BACKENDS
from effc.backends.base import Engine, EngineBase, Lowered, Port
from effc.backends.eager import GraphEngine, ModuleEngine, described, ports_beside
from effc.calib.calibrator import MASK
from effc.causal import DECODE, KEEP, PAST, PREFILL, in_steps, typed
from effc.errors import VerifyError
from effc.foreign.file import data_files, parsed
from effc.ir.program import Graph, Program
from effc.passes.uncertain import unsteady
from effc.progress import Counted, Step, silent
from effc.recipe import BenchSpec
from effc.samples import LENGTHS, Samples
from effc.source import Source
from effc.verify import OutputDrift, Tolerance, parity

Json = dict[str, Any]


def opened(lowered: Lowered, threads: int) -> Engine:
    """An engine to ask for numbers: what stands in for it where this machine cannot run it."""
    backend = BACKENDS[lowered.target]()
    choice = backend.open if backend.obstacle(lowered) is None else backend.stand_in
    return _typed(choice(lowered, threads=threads))


class _Typed(EngineBase):
    """An engine with a cache of codes, which takes a made-up or an empty cache as everybody does."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inputs, self.outputs = engine.inputs, engine.outputs
        self._dtypes = dtypes(engine.inputs)

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        return self._engine(typed(feeds, self._dtypes))

    def ready(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._engine.ready(typed(feeds, self._dtypes))

    def close(self) -> None:
        self._engine.close()


def dtypes(ports: Sequence[Port]) -> dict[str, str]:
    return {port.name: port.dtype for port in ports}


def _typed(engine: Any) -> Engine:
    is_coded = any(p.name.startswith(PAST) and p.dtype == "int8" for p in engine.inputs)
    found: Engine = _Typed(engine) if is_coded else engine
    return found


def of_user(
    source: Source, graph: Graph, threads: int, beside: Sequence[Port] | None = None
) -> Engine:
    """What the user runs today: their own file in ONNX Runtime where the model is one, elsewhere their module in torch.

    Of its outputs those of the graph, and of these what an engine `beside` it has. Raises VerifyError where there are
    none.
    """
    if source.file is None:
        return ModuleEngine(source.module, graph, beside)
    from effc.backends.ort_engine import FileEngine

    return FileEngine(source.file, *ports_beside(graph, beside), threads=threads)


def check_reading(source: Source, graph: Graph) -> None:
    """Hold the graph that an ONNX file was read into against the file, run by ONNX Runtime, on examples.

    Raises VerifyError where they differ: quantisation would hide it later.
    """
    if source.file is None:
        return
    feeds = {name: value.numpy() for name, value in source.inputs[graph.role].items()}
    rows = {name: np.concatenate([f, f[:1]]) for name, f in feeds.items() if f.ndim}
    free = all(source.dims[graph.role][name].get(0) == "batch" for name in rows)
    cases = [feeds, {**feeds, **rows}] if rows and free else [feeds]
    try:
        with of_user(source, graph, 1) as file:
            drifts = parity(file, GraphEngine(graph), cases)
        Tolerance().check(drifts, where=str(source.file))
    except VerifyError as error:
        raise VerifyError(
            f"effc reads the file as another model: {error.what}", where=str(source.file),
            hint="please report the file; until then compile the model from torch: module:factory",
        ) from error  # fmt: skip


def verify_engine(
    source: Source,
    graph: Graph,
    lowered: Lowered,
    samples: Samples,
    lossy: bool,
    threads: int,
    step: Step = silent,
) -> dict[str, Json]:
    """Drift of an engine from the user's module, by kind of data and output; what its graph lacks was dropped.

    Raises VerifyError where an engine that should be exact is not, or gives values that are not numbers.
    """
    found: dict[str, Json] = {}
    with (
        of_user(source, graph, threads, lowered.outputs) as reference,
        opened(lowered, threads) as engine,
    ):
        most = longest(source, graph)
        found_cases = cases(source, samples, engine.inputs, most, lowered.profile)
        for number, (label, first, batches) in enumerate(found_cases, 1):
            left, right = (in_steps(run, first) if first else run for run in (reference, engine))
            drifts = parity(left, right, batches)
            if not lossy and lowered.is_float:
                Tolerance().check(drifts, where=f"{lowered.target}, {label}")
            found[label] = {name: dataclasses.asdict(d) for name, d in drifts.items()}
            step(number, len(found_cases))
    return found


PLAIN_OPSET = 21
MOST_LOWERED = 0.25
"""Relative L2 that an engine may be from the graph that it was made of: codes flip at the borders of rounding."""


def check_lowering(graph: Graph, lowered: Lowered, samples: Samples, threads: int) -> OutputDrift:
    """How far an engine is from its own rewritten graph, the worst output; quantisation is in both.

    Raises VerifyError where that is more than rounding can do: then the lowering is wrong, whatever the drift of
    quantisation hides.
    """
    with opened(lowered, threads) as engine:
        shapes = [(2, 32)] if samples.has_length() else [(2, 1)]
        most, profile = longest(samples.source, graph), lowered.profile
        cases = shaped_cases(samples, shapes, engine.inputs, most, profile)
        feeds = [case.feeds for case in cases]
        first = (dict(b.inputs) for b in itertools.islice(samples(graph.role), 1))
        feeds += [f for f in first if fits(engine.inputs, f, profile)]
        drifts = parity(GraphEngine(graph), engine, feeds)
    left_out = unsteady(graph)
    drifts = {name: drift for name, drift in drifts.items() if name not in left_out}
    name, worst = max(drifts.items(), key=lambda item: item[1].rel_l2)
    if not worst.rel_l2 <= MOST_LOWERED:
        raise VerifyError(
            f"output {name!r} of the engine is {worst.rel_l2:.2g} (relative L2) from the graph that it was made of",
            where=lowered.target,
            hint="this is a fault of the lowering, not of quantisation; please report the model",
        )
    return worst


def longest(source: Source, graph: Graph) -> int:
    """The longest input that a model takes, as its settings and its graph say."""
    limits = [source.processor.max_length if source.processor is not None else None]
    limits += [graph.largest(word) for word in LENGTHS]
    return min((n for n in limits if n is not None), default=sys.maxsize)


Profile = Mapping[str, tuple[int, int, int]]


def cases(
    source: Source,
    samples: Samples,
    ports: Sequence[Port],
    most: int,
    profile: Profile | None = None,
) -> list[tuple[str, int, list[Any]]]:
    """What an engine is compared on: kind of data, how many tokens are read in a run of their own, and batches.

    Calibration data, held-out data of the same file, shapes of 1 and 8 rows, a padded batch, and for a model with a
    cache what is read behind one that it made; but for what is outside of a `profile`. Batches come in pieces where
    memory is bounded.
    """
    found: list[tuple[str, int, list[Any]]] = []
    (role,) = source.inputs
    drawn = {"calibration": itertools.islice(samples(role), 4), "held out": samples.held_out()}
    for label, batches in drawn.items():
        feeds = [dict(batch.inputs) for batch in batches]
        if kept := [f for f in feeds if fits(ports, f, profile)]:
            found.append((label, 0, kept))
    shapes = [(rows, length) for rows in (1, 8) for length in (4, 32, 128)]
    found += [(c.word, 0, [c.feeds]) for c in shaped_cases(samples, shapes, ports, most, profile)]
    processor = source.processor
    if processor is not None and processor.cache:
        for batch, length, past in PASTS:
            if length + past > most:
                continue
            shaped = samples.shaped(batch, past + length)
            if fits(ports, samples.shaped(batch, length, past), profile):
                found.append((f"{batch}x{length} behind {past}", past, [shaped]))
    padded = _padded(samples, min(32, most)) if samples.has_length() else None
    if padded is not None and fits(ports, padded, profile):
        found.append(("padded", 0, [padded]))
    return [
        (label, first, [p for feeds in whole for p in samples.pieces(feeds)])
        for label, first, whole in found
    ]


def _padded(samples: Samples, length: int) -> Json | None:
    """One short and one long row in a batch, the short one padded."""
    feeds = samples.shaped(2, length)
    if MASK not in feeds:
        return None
    for name in {MASK, "input_ids"} & set(feeds):
        feeds[name][0, length // 4 + 1 :] = 0
    return feeds


PASTS = ((2, 1, 31), (1, 3, 17))
"""Batch, length and what is in the cache already, where a model has one."""


def fits(ports: Sequence[Port], feeds: Mapping[str, Any], profile: Profile | None = None) -> bool:
    """Whether feeds have the sizes that an engine's fixed dimensions want, and its free ones allow."""
    bounds = profile or {}
    for port in ports:
        if port.name not in feeds:
            raise VerifyError(
                f"the engine takes {port.name!r}, which the model does not",
                hint="it was made from another model, or a pass added the input and the source has none of that name: "
                "for attach-rank1 name `intuition` in the source, or set gates: router",
            )
        shape = feeds[port.name].shape
        if len(shape) != len(port.shape):
            return False
        for want, have in zip(port.shape, shape, strict=True):
            low, _, high = (want,) * 3 if isinstance(want, int) else bounds.get(want, (have,) * 3)
            if not low <= have <= high:
                return False
    return True


def task_metric(
    source: Source,
    graph: Graph,
    lowered: Lowered,
    metric: metrics.Metric,
    threads: int,
    step: Step = silent,
    teller: Lowered | None = None,
) -> Json:
    """The task metric of model and engine on the same samples, with the interval of their difference."""
    reference = of_model(source, graph, metric, threads, step)
    mine = of_engine(source, lowered, metric, threads, step, teller=teller)
    compared = metrics.compare(metric, reference, mine)
    return {**dataclasses.asdict(compared), "data": metrics.describe(metric.file)}


def of_model(
    source: Source,
    graph: Graph,
    metric: metrics.Metric,
    threads: int,
    step: Step = silent,
    samples: Samples | None = None,
) -> metrics.Samples:
    """Per-sample results of the user's own module."""
    with _torch_threads(threads), of_user(source, graph, threads) as model:
        return metric.measure(Counted(_pieced(model, samples), step), source.processor)


def of_engine(
    source: Source,
    lowered: Lowered,
    metric: metrics.Metric,
    threads: int,
    step: Step = silent,
    samples: Samples | None = None,
    teller: Lowered | None = None,
) -> metrics.Samples:
    """Per-sample results of an engine; `teller` is that which says what texts are about, where it is compiled too."""
    processor = source.processor
    with ExitStack() as stack:
        if teller is not None and processor is not None and processor.teller is not None:
            own, processor = processor.teller, copy.copy(processor)
            processor.teller = own.by(stack.enter_context(opened(teller, threads)))
        engine = stack.enter_context(opened(lowered, threads))
        return metric.measure(Counted(_pieced(engine, samples), step), processor)


class _Pieced:
    """An engine that takes its inputs in pieces, where memory is bounded, and puts the outputs together again."""

    def __init__(self, engine: Any, samples: Samples) -> None:
        self._engine, self._samples = engine, samples

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        parts = [self._engine(piece) for piece in self._samples.pieces(feeds)]
        if len(parts) == 1:
            return dict(parts[0])
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _pieced(engine: Any, samples: Samples | None) -> Any:
    return engine if samples is None or samples.room is None else _Pieced(engine, samples)


def opener(lowered: Lowered, threads: int) -> Callable[[], Engine]:
    """What opens an engine, for a comparison."""
    return lambda: _typed(BACKENDS[lowered.target]().open(lowered, threads=threads))


def plain_export(
    graph: Graph, place: Path, target: str, options: Mapping[str, Any] | None = None
) -> Lowered:
    """torch's own float export into a directory, for the runtime of a target: what everybody has without effc."""
    from effc.backends.onnx import save, to_onnx

    files = save(to_onnx(graph, PLAIN_OPSET, translate=False), place)
    return plain(graph, place, files, target, options)


def plain_of(
    source: Source,
    graph: Graph,
    place: Path,
    target: str,
    options: Mapping[str, Any] | None = None,
) -> Lowered:
    """What everybody has without effc on the runtime of a target: the user's own file, or torch's float export."""
    if source.file is None:
        return plain_export(graph, place, target, options)
    names = (source.file.name, *data_files(source.file, parsed(source.file)))
    for name in names:  # some targets write what they make of a file beside it
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.file.parent / name, place / name)
    return plain(graph, place, names, target, options)


def plain(
    graph: Graph,
    place: Path,
    files: tuple[str, ...],
    target: str,
    options: Mapping[str, Any] | None = None,
) -> Lowered:
    """A plain float export that lies in a directory already, made to be opened as an engine with those options is."""
    shared = {
        k: v for k, v in (options or {}).items() if k not in ("precision", "cache")
    }  # but for what is to gain
    exported = described(graph, target, place, files, PLAIN_OPSET, options=shared)
    found: Lowered = BACKENDS[target]().plain(graph, exported)
    return found


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
    exported: Lowered | None = None,
) -> benchmark.BenchResult:
    """Engine against the user's module in torch and against the plain float export on the same runtime, interleaved.

    `exported` is that export where it has been made. An engine without files is compared with it on ONNX Runtime.
    """
    graph = original.only()
    with _torch_threads(threads), scratch.held() as place:
        runtime = lowered.target if lowered.files else "ort"
        options = lowered.options if runtime == lowered.target else None
        exported = exported or plain_of(source, graph, place, runtime, options)
        theirs: dict[str, Callable[[], Engine]] = {
            "torch": lambda: ModuleEngine(source.module, graph)
        }
        if source.file is not None:  # and "float" is that file where the runtime is ONNX Runtime
            theirs = {} if runtime == "ort" else {"file": lambda: of_user(source, graph, threads)}
        openers = {
            "engine": opener(lowered, threads),
            "float": opener(exported, threads),
            **theirs,
            **(against or {}),
        }
        most = longest(source, graph)
        shapes = of_role(spec.shapes, graph.role)
        cases = shaped_cases(samples, shapes, lowered.inputs, most, lowered.profile, last_only=True)
        timed = benchmark.compare(
            openers, cases, threads=threads, budget_s=spec.budget_s, seed=spec.seed,
            streams=streams, references=("float", *theirs), progress=step,
        )  # fmt: skip
        timed = dataclasses.replace(timed, gpu=BACKENDS[runtime]().gpu())
        largest = max(cases, key=lambda c: c.batch * (c.length or 1), default=None)
        if largest is None or not lowered.files:
            return timed
        backend = BACKENDS[runtime]()
        memory = {
            name: backend.peak_rss_mb(low, typed(largest.feeds, dtypes(low.inputs)), threads)
            for name, low in (("engine", lowered), ("float", exported))
        }
        known = {name: mb for name, mb in memory.items() if mb is not None}
        return dataclasses.replace(timed, peak_rss_mb=known)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_role(shapes: Iterable[Sequence[int]], role: str) -> list[Sequence[int]]:
    """The shapes that an engine is timed on: what writes has one token and a filled cache, what reads has neither."""
    shapes = list(shapes)
    if role == PREFILL:
        return [shape for shape in shapes if len(shape) == 2] or shapes
    if role == DECODE:
        return [shape for shape in shapes if len(shape) > 2] or shapes
    return shapes


def shaped_cases(
    samples: Samples,
    shapes: Iterable[Sequence[int]],
    ports: Sequence[Port],
    most: int = sys.maxsize,
    profile: Profile | None = None,
    *,
    last_only: bool = False,
) -> list[benchmark.Case]:
    """Inputs of those shapes that an engine can take, each once; the example's shape where it takes none of them.

    Lengths above `most` are cut to it; a shape with a past is for models with a cache. `last_only` asks a language
    model for the logits of the last position, as whoever writes with it does.
    """
    cases: dict[str, benchmark.Case] = {}
    for batch, wanted, *rest in shapes:
        past = rest[0] if rest else 0
        processor = samples.source.processor
        if past and (processor is None or not processor.cache or wanted + past > most):
            continue
        feeds = samples.shaped(batch, min(wanted, most), past)
        rows, length = samples.shape_of(feeds)
        if last_only and KEEP in feeds:
            feeds[KEEP] = feeds[KEEP][-1:]
        case = benchmark.Case(batch=rows, length=length, feeds=feeds, past=past)
        if fits(ports, feeds, profile):
            cases.setdefault(case.word, case)
    if not cases:
        feeds = samples.example()
        rows, length = samples.shape_of(feeds)
        cases["example"] = benchmark.Case(batch=rows, length=length, feeds=feeds)
    return list(cases.values())


def worst_known(cases: Mapping[str, Json]) -> Json:
    """Per output, the drift over held-out data where there is any, else over calibration data or the largest case."""

    def samples(label: str) -> int:
        return sum(int(d["n"]) for d in cases[label].values())

    label = next((n for n in ("held out", "calibration") if n in cases), max(cases, key=samples))
    return dict(cases[label])
