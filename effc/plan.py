"""What a compile will take, stage by stage, before it is run: seconds, memory, disk.

Loading, tracing and the exact passes are done for real, since they are quick. Everything over data is probed with two
batches and multiplied: the rate of the second batch, in values of input, holds for calibration, verification and the
metric. Writing the engine is estimated from the number of nodes and the speed that tracing showed.

Of a model directory without weights the shapes are planned with. The rate is then that of the multiplications of the
graph at the speed of one large product, and a pass that looks at values is not tried.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effc import measure, metrics, package
from effc.backends.base import EngineBase, Port
from effc.backends.dialect import DIALECTS
from effc.backends.eager import GraphEngine, ports
from effc.build import Builder, pruning
from effc.cache import Cache
from effc.calib.data import Batch
from effc.errors import PassError
from effc.ir.memory import peak_bytes, whole_bytes
from effc.ir.program import Graph, Program, place_of
from effc.passes.base import Pass
from effc.passes.pipeline import apply
from effc.progress import Progress, resident_mb
from effc.recipe import Recipe
from effc.room import KERNELS, within
from effc.source import Source
from effc.timing import EACH_S

Json = dict[str, Any]

LOWER_S, LOWER_S_PER_NODE = 1.5, 0.004
"""Seconds of writing a graph as ONNX and opening the file, as a whole and per node (benchmarks/plan.py)."""
TIMINGS = 12
"""Graphs that a pass has timed which asks how long they take: several sizes of two or three kinds of groups."""
UNTRIED = "not tried: it looks at values, and what is behind it was planned without it"
COPIES = 3.0
"""Copies of the weights that are alive while an engine is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a compile as it is expected: `how` is `measured`, `probed`, `estimated` or `given`."""

    name: str
    seconds: float
    memory_mb: float
    disk_mb: float
    how: str
    note: str = ""
    """What else there is to say."""


def plan(
    recipe: Recipe,
    out: Path,
    *,
    progress: Progress,
    threads: int | None = None,
    decisions: Json | None = None,
    max_ram_bytes: int | None = None,
) -> Json:
    """Every stage of a compile with what it will take, and what it will write. Writes nothing.

    What a search takes where the gate is not met, and what the cache spares, nobody knows beforehand. Raises what the
    compile itself would raise before its first long stage.
    """
    from effc.compiler import builders_of, opened

    package.check_output(Path(os.path.abspath(out)))
    threads = recipe.threads(threads)
    metric = metrics.parse(recipe.metric) if recipe.metric else None
    source, original = opened(recipe, progress, shapes=True)
    metric = metric or source.metric
    if metric is not None:
        for role in source.main:
            metric.check(source.only(role))
    found: list[Json] = []
    builders = builders_of(
        recipe, source, original, Progress(), Cache(None), decisions=decisions, threads=threads
    )
    for role, builder in builders.items():
        left_mb = math.inf
        if max_ram_bytes is not None:
            left_mb = max(0.0, within(max_ram_bytes, original[role], {}).left_bytes / 1e6)
        with progress.stage("probe"):
            asked = metric if role in source.main else None
            made = _Probe(builder, asked, progress, threads, left_mb).result()
        if found:  # the model is loaded and traced once
            made["stages"] = [s for s in made["stages"] if s["name"] not in ("load", "trace")]
        found.append(made)
    stages = [stage for made in found for stage in made["stages"]]
    return {
        **found[0],
        "model_bytes": sum(made["model_bytes"] for made in found),
        "stages": stages,
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "memory_mb": max(stage["memory_mb"] for stage in stages),
        "disk_mb": round(sum(stage["disk_mb"] for stage in stages), 1),
    }


class _Probe:
    def __init__(
        self, builder: Builder, metric: metrics.Metric | None, progress: Progress, threads: int,
        left_mb: float,
    ) -> None:  # fmt: skip
        self.builder, self.recipe, self.source = builder, builder.recipe, builder.source
        self.samples, self.original, self.left_mb = builder.samples, builder.original, left_mb
        self.metric, self.progress, self.threads = metric, progress, threads
        self.graph = self.original.only()
        self.how = "estimated" if self.graph.is_of_shapes else "probed"
        self.base_mb = resident_mb() or 0.0
        if self.graph.is_of_shapes:
            self.base_mb += self.graph.weight_bytes() / 1e6
        self.stages: list[Stage] = []
        self.compared = 0
        """Engines that are made for no more than to be timed beside another."""

    def result(self) -> Json:
        for name in ("load", "trace"):
            self._add(name, self.progress.stages[name].seconds, how="measured")
        self.rate = self._rate()
        sizes = [self._target(target) for target in self.recipe.targets]
        self._verify()
        self._metric()
        self._bench()
        return {
            "stages": [dataclasses.asdict(stage) for stage in self.stages],
            "model_bytes": sizes[0],
            "threads": self.threads,
            "may_search": self.recipe.gate is not None and bool(self.recipe.passes),
        }

    def _add(
        self, name: str, seconds: float, *, extra_mb: float = 0.0, disk_mb: float = 0.0, how: str,
        note: str = "",
    ) -> None:  # fmt: skip
        self.stages.append(
            Stage(
                name=name, seconds=round(seconds, 1), memory_mb=round(self.base_mb + extra_mb),
                disk_mb=round(disk_mb, 1), how=how, note=note,
            )
        )  # fmt: skip

    def _rate(self) -> float:
        """Seconds per value of input of the model in torch, from the second of two runs."""
        first = [dict(b.inputs) for b in itertools.islice(self.samples(self.graph.role), 2)]
        feeds = (first or [self.samples.example()])[-1]
        if self.graph.is_of_shapes:
            return _flops(self.graph, feeds) / _flops_a_second() / _values(feeds)
        engine = GraphEngine(self.graph)
        engine(feeds)
        started = time.perf_counter()
        engine(feeds)
        return (time.perf_counter() - started) / _values(feeds)

    def _target(self, target: str) -> int:
        """The passes of one target on two batches, and its engine; gives the bytes that it will have."""
        started = time.perf_counter()
        program, _ = self.builder.cleaned(target)
        program = program.clone()
        self._add("exact passes", time.perf_counter() - started, how="measured")
        rollback, total = (
            self.builder.recorded_rollback(target),
            self.samples.batches(self.graph.role),
        )
        lossy: dict[int, float] = {}
        for index, given in enumerate(self.recipe.passes):
            pass_ = rollback.apply(index, given)
            if pass_ is None or not pass_.takes(self.graph.role):
                continue
            recorded = self.builder.recorded(target, f"{index}:{given.name}")
            data = list(itertools.islice(self.samples(self.graph.role), 2))
            if pass_.measures_again:
                recorded = None  # two batches decide something else than all
            if recorded is not None:
                data = []
            is_taken_over = self.builder.twin is not None and index in self.builder.shared
            if pass_.trains:
                lossy[index] = 0.0
                if not is_taken_over:
                    self._train(pass_, index, program, data)
                continue
            quick = pass_.untimed() if recorded is None else pass_
            measures = bool(data) and pass_.resolve(DIALECTS[target]).measures
            started = time.perf_counter()
            note = self._apply(quick, program, data, target, recorded)
            seconds, need = time.perf_counter() - started, 0.0
            if is_taken_over:
                continue
            if quick is not pass_:
                seconds += TIMINGS * (EACH_S + self._lower_s(program.only()))
            if measures and total is not None:
                count = max(0, total - 2)
                seconds += count * self.rate * _values(data[-1].inputs) * 1.5
                need = min(self.left_mb, self._activations_mb(data[-1].inputs))
            self._add(
                pass_.name, seconds, extra_mb=need, how="estimated" if note else "probed", note=note
            )
            if pass_.effect == "lossy":
                lossy[index] = seconds
        self._lower("lower", program.only())
        self._unpruned(lossy)
        return program.weight_bytes()

    def _unpruned(self, lossy: Mapping[int, float]) -> None:
        """The engine that a pruned one is timed beside: lossy passes behind pruning once more, and its file."""
        gate, bench = self.recipe.gate, self.recipe.bench
        dropped = pruning(self.recipe.passes, lossy)
        if not dropped or gate is None or not gate.latency or bench is None:
            return
        first = min(dropped)
        again = sum(s for i, s in lossy.items() if i > first and i not in dropped)
        self._lower("the same unpruned", self.graph, more_s=again)
        self.compared += 1

    def _apply(
        self, pass_: Pass, program: Program, data: Sequence[Batch], target: str, recorded: Any
    ) -> str:
        """Try a pass; why it was not, where it needs values and there are none."""
        dialect = DIALECTS[target]
        if not program.only().is_of_shapes:
            apply(pass_, program, data or None, dialect=dialect, recorded=recorded)
            return ""
        try:
            if pass_.resolve(dialect).measures and recorded is None:
                return UNTRIED
            apply(pass_, program, dialect=dialect, recorded=recorded)
        except PassError as error:
            if type(error) is not PassError:  # it says what is wrong with the recipe
                raise
            return UNTRIED
        return ""

    def _train(self, pass_: Any, index: int, program: Program, data: Sequence[Batch]) -> None:
        """Two steps of a training, for all of them; memory is that of a step's own batch."""
        pass_.requires(program)
        graph = program.only()
        tensors, names = graph.tensors(), pass_.trained(graph)
        trained = {place_of(tensors[name]): tensors[name] for name in names}
        count = sum(tensor.numel() for tensor in trained.values())
        held_mb = sum(tensor.nbytes for tensor in trained.values()) / 1e6
        feeds = self.builder.tuner.inputs(pass_, graph)
        need = 4 * held_mb  # gradients, moments, and the best
        need += whole_bytes(graph, self._sizes(feeds)) / 1e6
        if graph.is_of_shapes:
            # where most weights are trained, their gradients are as much work again
            is_whole = count > graph.weight_bytes() / 8
            step_s = _values(feeds) * self.rate * (2 + is_whole + bool(pass_.distill))
        else:
            step_s = self._step_timed(pass_, index, program, data)
        note = f"{count:,} numbers are trained"
        self._add(pass_.name, 1.1 * pass_.steps * step_s, extra_mb=need, how=self.how, note=note)

    def _step_timed(self, pass_: Any, index: int, program: Program, data: Sequence[Batch]) -> float:
        """Seconds of a step, the mean of two."""
        few = min(pass_.samples, 2 * pass_.batch)
        brief = dataclasses.replace(pass_, steps=2, samples=few, held=0)
        train = self.builder.tuner.trainer(index, lambda done, of: None)
        record = apply(brief, program, data or None, train=train)
        curve = next(note for name, note in record.notes.items() if name.endswith("/curve"))
        seconds: float = curve[-1]["seconds"] / curve[-1]["step"]
        return seconds

    def _lower_s(self, graph: Graph) -> float:
        return LOWER_S + LOWER_S_PER_NODE * sum(1 for _ in graph.nodes)

    def _lower(self, name: str, graph: Graph, *, more_s: float = 0.0) -> None:
        seconds = more_s + self._lower_s(graph)
        weights_mb = graph.weight_bytes() / 1e6
        self._add(
            name, seconds, extra_mb=COPIES * weights_mb, disk_mb=2 * weights_mb, how="estimated"
        )

    def _activations_mb(self, feeds: Mapping[str, Any]) -> float:
        return KERNELS * peak_bytes(self.graph, self._sizes(feeds)) / 1e6

    def _sizes(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        """Free dimensions by name."""
        sizes: dict[str, int] = {}
        dims = self.source.dims.get(self.graph.role, {})
        for name, value in feeds.items():
            for axis, word in dims.get(name, {0: "batch"}).items():
                sizes.setdefault(word, value.shape[axis])
        return sizes

    def _verify(self) -> None:
        inputs, _ = ports(self.graph)
        most = measure.longest(self.source, self.graph)
        found = [
            f
            for _, _, feeds in measure.cases(self.source, self.samples, inputs, most)
            for f in feeds
        ]
        values = sum(map(_values, found))
        need = max(map(self._activations_mb, found), default=0.0)
        engines = len(self.recipe.targets) * (2 + bool(self.recipe.passes)) + self.compared
        need = min(self.left_mb, 2 * need)
        self._add("verify", values * self.rate * engines, extra_mb=need, how=self.how)

    def _metric(self) -> None:
        """The metric over an engine that answers noise, to see what it would ask: all but the answers is real."""
        if self.metric is None or isinstance(self.metric, metrics.Own):
            return
        _, outputs = ports(self.graph)
        asked = _Noise(self.graph, outputs, self.source)
        started = time.perf_counter()
        self.metric.measure(asked, self.source.processor)
        reading = time.perf_counter() - started
        seconds = 2 * (reading + asked.values * self.rate)
        self._add("metric", seconds, extra_mb=2 * asked.most_bytes / 1e6, how=self.how)

    def _bench(self) -> None:
        spec = self.recipe.bench
        if spec is None:
            return
        weights_mb = self.original.weight_bytes() / 1e6
        cases = measure.shaped_cases(
            self.samples,
            measure.of_role(spec.shapes, self.graph.role),
            ports(self.graph)[0],
            measure.longest(self.source, self.graph),
            last_only=True,
        )
        need = max(self._activations_mb(case.feeds) for case in cases)
        self._lower("lower (float reference)", self.graph)
        seconds = len(cases) * spec.budget_s * 1.05 + 4
        self._add("bench", seconds, extra_mb=2 * weights_mb + 2 * need, how="given")


class _Noise(EngineBase):
    """An engine that gives noise of the right shape, another for every row, and counts what it is asked.

    Noise and not zeros, since a cosine of zeros is none and a metric refuses it.
    """

    def __init__(self, graph: Graph, outputs: tuple[Port, ...], source: Source) -> None:
        self.graph, self.outputs = graph, outputs
        self.inputs = ports(graph)[0]
        self.dims = source.dims.get(graph.role, {})
        self.noise = np.abs(np.random.default_rng(0).standard_normal(4099))  # a prime: rows differ
        self.values = 0
        self.most_bytes = 0

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.values += _values(feeds)
        sizes: dict[str, int] = {}
        for name, value in feeds.items():
            for axis, word in self.dims.get(name, {0: "batch"}).items():
                sizes.setdefault(word, value.shape[axis])
        made = {}
        for port in self.outputs:
            shape = [sizes.get(s, 1) if isinstance(s, str) else s for s in port.shape]
            rows = [n if axis in (0, len(shape) - 1) else 1 for axis, n in enumerate(shape)]
            filled = np.resize(self.noise.astype(port.dtype), rows)
            made[port.name] = np.broadcast_to(filled, shape)
        self.most_bytes = max(self.most_bytes, peak_bytes(self.graph, sizes))
        return made


def _flops(graph: Graph, feeds: Mapping[str, Any]) -> int:
    """Operations of the products of a graph of shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        graph.run({name: torch.as_tensor(value).to("meta") for name, value in feeds.items()})
    return int(counter.get_total_flops())


def _flops_a_second() -> float:
    """Operations a second of a product of 1024 by 1024 by 1024, the fastest of five."""
    square, seconds = torch.ones(1024, 1024), []
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(square, square)
        seconds.append(time.perf_counter() - started)
    return 2 * 1024**3 / min(seconds)


def _values(feeds: Mapping[str, Any]) -> int:
    """Values of the first input: tokens, or pixels."""
    return max(1, int(next(iter(feeds.values())).size))


def lines(found: Mapping[str, Any]) -> list[str]:
    """The plan as a table."""
    made = [f"{'stage':24} {'time':>8} {'memory':>9} {'disk':>9}  how"]
    for s in found["stages"]:
        made.append(
            f"{s['name']:24} {s['seconds']:6.1f} s {s['memory_mb']:6.0f} MB {s['disk_mb']:6.1f} MB  {s['how']}"
            + (f"; {s['note']}" if s["note"] else "")
        )
    made.append(
        f"{'in all':24} {found['seconds']:6.1f} s {found['memory_mb']:6.0f} MB {found['disk_mb']:6.1f} MB  "
        f"{found['threads']} threads; the engine will have about {found['model_bytes'] / 1e6:.1f} MB"
    )
    if found["may_search"]:
        made.append(
            "where the gate is not met a search comes on top, as long as --time-budget lets it"
        )
    return made
