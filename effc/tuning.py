"""What trains a graph in a compile: its samples, its teacher, and where the state of an unfinished run lies.

A run is looked for under what decides it: the graph, the model, the options and the data. It is taken from a checkpoint
that `effc tune` wrote, or from the cache, or made; an unfinished one goes on where it was killed.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from effc import many
from effc.cache import Cache, key_of
from effc.calib import data
from effc.calib.calibrator import tensors_for
from effc.calib.data import Record
from effc.checkpoint import AGAIN, Checkpoint, Made, apart
from effc.errors import TuneError
from effc.intuition import INPUT
from effc.ir.program import Graph, Program
from effc.ir.show import graph_digest
from effc.machine import installed
from effc.passes.base import Pass, Stats, Trainer
from effc.passes.pipeline import options_of
from effc.passes.tune import Tune
from effc.processor import Processor
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import Source
from effc.task import Task
from effc.train import gates, losses, terms
from effc.train.graph import InGraph, mask_of
from effc.train.loop import Run, Schedule, Score, fit
from effc.train.terms import Course

MOST_BYTES = 4 << 30
"""Samples are held in memory while they are trained on; more than this is refused."""
Step = Callable[[int, int | None], None]
SORTED_BATCHES = 16
"""Of so many batches' samples those of about one length go together."""
UNKEYED = ("file", "beside", "apart", "graphs")
"""Options that decide nothing by their names: files are known by their bytes."""
MASK, IDS = "attention_mask", "input_ids"
Array = np.ndarray[Any, np.dtype[Any]]
LABELLED = ("labels", "source")
"""Tasks whose samples must say what is right."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A batch on its way to a loss: inputs by name, and the labels of its samples where they have any."""

    feeds: Mapping[str, Tensor]
    labels: Tensor | None = None
    wanted: Mapping[str, Tensor] | None = None
    """What a task's own loss takes."""


Drawn = tuple[Callable[[int], Example], list[Example]]
"""What gives the batch of a step, and the batches that judge."""


@dataclass(kw_only=True)
class Tuner:
    """Trains graphs of one role of a source; what it made is given again where the same is asked."""

    source: Source
    teacher: Graph
    calib: CalibSpec | None
    cache: Cache
    checkpoint: Checkpoint | None = None
    """Where tensors are taken from, and nothing is trained."""
    made: dict[str, Made] = field(default_factory=dict)
    """Tensors and curve by key."""
    steps: dict[str, Made] = field(default_factory=dict)
    """The same by step and role, as `1.main`."""
    _samples: dict[Tune, str | None] = field(default_factory=dict)

    def trainer(self, index: int, progress: Step) -> Trainer:
        """What trains for the pass at `index` of the recipe."""

        def train(pass_: Pass, graph: Graph, stats: Stats) -> dict[str, Tensor]:
            assert isinstance(pass_, Tune)
            key = self._key(pass_, graph)
            if key not in self.made:
                found = self._taken(index, pass_, graph)
                if found is None and self._is_known(pass_):
                    found = self._cached(key)
                self.made[key] = found or self._trained(key, pass_, graph, progress)
            tensors, stats.notes["curve"] = self.steps[f"{index}.{graph.role}"] = self.made[key]
            return tensors

        return train

    def inputs(self, pass_: Tune, graph: Graph) -> dict[str, Any]:
        """Inputs of a step of a training, as arrays by name. Raises what reading its samples raises."""
        few = dataclasses.replace(
            pass_, samples=min(pass_.samples, pass_.batch), held=0, beside=(), apart=(),
            group_by_length=False,
        )  # fmt: skip
        drawn, *_ = self._examples(few, graph)
        return {name: tensor.numpy() for name, tensor in drawn(0).feeds.items()}

    def _key(self, pass_: Tune, graph: Graph) -> str:
        return key_of(
            "tune", graph=graph_digest([Program({graph.role: graph})]),
            teacher=graph_digest([Program({graph.role: self.teacher})]),
            options={k: v for k, v in options_of(pass_).items() if k not in UNKEYED},
            samples=self._samples_key(pass_),
            torch=installed("torch"), threads=torch.get_num_threads(),
        )  # fmt: skip

    def _is_known(self, pass_: Tune) -> bool:
        """Whether what is trained on is known by its bytes; somebody's own code may give anything."""
        return self._samples_key(pass_) is not None

    def _samples_key(self, pass_: Tune) -> str | None:
        """See `Samples.key`; files are read once for it."""
        if pass_ not in self._samples:
            samples = Samples(self.source, self._spec(pass_) or self.calib)
            more = [data.digest(Path(file)) for file in (*pass_.beside, *pass_.apart)]
            key = samples.key()
            self._samples[pass_] = key_of("beside", key=key, files=more) if key and more else key
        return self._samples[pass_]

    def _taken(self, index: int, pass_: Tune, graph: Graph) -> Made | None:
        if self.checkpoint is None:
            return None
        held, curve = self.checkpoint.tensors(index, graph.role)
        shapes = {name: tuple(t.shape) for name, t in graph.tensors().items()}
        given = {name: tuple(t.shape) for name, t in held.items()}
        places = InGraph(graph, pass_.trained(graph)).places
        for course in _courses(pass_, graph):
            places |= dict.fromkeys(course.stands(pass_.steps, held), 0)
        if given != {name: shapes[name] for name in places}:
            raise TuneError(f"{self.checkpoint.place} was trained in another graph", hint=AGAIN)
        return held, curve

    def _cached(self, key: str) -> Made | None:
        entry = self.cache.get(key)
        if entry is None:
            return None
        try:
            return load_file(entry.directory / "tensors.safetensors"), list(entry.value)
        except (OSError, SafetensorError):  # dropped meanwhile
            return None

    def _trained(self, key: str, pass_: Tune, graph: Graph, progress: Step) -> Made:
        module = InGraph(graph, self._names(pass_, graph), pass_.dropout)
        drawn, held, score = self._examples(pass_, graph)
        is_kept = self.cache.root is not None and self._is_known(pass_)
        folder = self.cache.root / "train" / key[:32] if self.cache.root and is_kept else None
        run = fit(
            module, _loss(pass_, self.teacher, self._task(pass_)), drawn, _schedule(pass_), held=held,
            folder=folder, progress=progress, courses=_courses(pass_, graph, held),
            precision=pass_.precision, score=score, shares=_shares(pass_, module), accumulate=pass_.accumulate,
        )  # fmt: skip
        tensors = module.tensors()
        curve = _curve(run)
        if is_kept and many.rank() == 0:
            self.cache.put(key, curve, {"tensors.safetensors": save(apart(tensors))})
        if folder is not None and many.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        return tensors, curve

    def _names(self, pass_: Tune, graph: Graph) -> list[str]:
        """Names of the tensors that are trained; of a model that is written itself its parameters and nothing else."""
        found = pass_.trained(graph)
        if self.source.kept is None:
            return found
        known = {name for name, _ in self.source.module.named_parameters(remove_duplicate=False)}
        return [name for name in found if name in known]

    def _spec(self, pass_: Tune) -> CalibSpec | None:
        """What the samples are drawn from: the file of the pass, else that of the calibration; None for neither."""
        calib = self.calib or CalibSpec()
        own = pass_.file is not None
        file = pass_.file if own else calib.file
        if file is None:
            return None
        return CalibSpec(
            file=file, column=pass_.column if own or pass_.column is not None else calib.column,
            samples=pass_.samples, seed=pass_.seed, batch=pass_.batch,
            max_length=pass_.max_length or calib.max_length,
        )  # fmt: skip

    def _task(self, pass_: Tune) -> Task | None:
        """The source's task where its own loss is asked for. Raises TuneError where it has none."""
        if pass_.task != "source":
            return None
        task = self.source.processor
        if not isinstance(task, Task):
            raise TuneError(
                "`task: source` is that of a source with a task, and this one has none",
                hint="source: {task: diaasq, encoder: DIR}, or `task: labels`",
            )
        return task

    def _examples(self, pass_: Tune, graph: Graph) -> tuple[*Drawn, Score | None]:
        spec, task = self._spec(pass_), self._task(pass_)
        if spec is None:
            if pass_.task in LABELLED:
                raise TuneError("labels are read from a file", hint="name one: `file: DATA`")
            if pass_.group_by_length:
                raise TuneError(
                    "batches as they are given are not grouped", hint="name a file: `file: DATA`"
                )
            batches = Samples(self.source, self.calib)(graph.role)
            given = [Example(feeds=tensors_for(graph, b.inputs)) for b in batches]
            return *_of_batches(pass_, given), None
        samples, labelled = Samples(self.source, spec), pass_.task in LABELLED
        records = _bounded(samples.records(labelled=labelled))
        held = list(itertools.islice(samples.records(left=True, labelled=labelled), pass_.held))
        if not held and pass_.held and len(records) > 1:  # the file has no more than was drawn
            count = min(pass_.held, max(1, len(records) // 8))
            records, held = records[:-count], records[-count:]

        def example(chosen: Sequence[Record]) -> Example:
            inputs = tensors_for(graph, samples.of_records(graph.role, chosen))
            if pass_.task == "answer" and chosen[0].text is not None:
                _refuse_cut(inputs, self.source.processor, spec.max_length)
            if task is not None:
                wanted = task.wanted([r.item for r in chosen])
                return Example(
                    feeds=inputs, wanted={n: torch.from_numpy(v) for n, v in wanted.items()}
                )
            marks = torch.tensor([r.label for r in chosen]) if labelled else None
            return Example(feeds=_shortened(graph, inputs), labels=marks)

        beside = _beside(task, pass_, held)
        sizes = _sizes(records) if pass_.group_by_length else None

        def drawn(number: int) -> Example:
            number, is_beside = divmod(number, 2) if beside else (number, 0)
            those = beside if is_beside else records
            mine = None if is_beside else sizes
            return example([those[i] for i in _chosen(len(those), pass_, number, mine)])

        judges = [example(held[i : i + pass_.batch]) for i in range(0, len(held), pass_.batch)]
        return drawn, judges, _score(task, graph, held) if task is not None and held else None


def trainer(teacher: Program, batches: Iterable[Mapping[str, Any]]) -> Trainer:
    """Who trains in `effc.apply(Tune(…), program, train=…)`: towards a program's outputs, on batches of inputs by name.

    The last batch judges where there are several.
    """
    given = [{name: np.asarray(value) for name, value in batch.items()} for batch in batches]

    def train(pass_: Pass, graph: Graph, stats: Stats) -> dict[str, Tensor]:
        assert isinstance(pass_, Tune)
        if pass_.task in LABELLED:
            raise TuneError("batches of inputs have no labels", hint="leave `task` out")
        module = InGraph(graph, pass_.trained(graph), pass_.dropout)
        drawn, held = _of_batches(pass_, [Example(feeds=tensors_for(graph, b)) for b in given])
        run = fit(
            module, _loss(pass_, teacher[graph.role]), drawn, _schedule(pass_), held=held,
            courses=_courses(pass_, graph, held), precision=pass_.precision, shares=_shares(pass_, module),
            accumulate=pass_.accumulate,
        )  # fmt: skip
        stats.notes["curve"] = _curve(run)
        return module.tensors()

    return train


def _beside(task: Task | None, pass_: Tune, held: Sequence[Record]) -> list[Record]:
    """Samples of what a task learns beside itself, none of them like those that judge here or elsewhere."""
    if task is None or not pass_.beside:
        return []
    judged = [record.item for record in held]
    for file in pass_.apart:
        judged += task.read(Path(file), labelled=False)
    return [Record(item=i) for file in pass_.beside for i in task.beside(Path(file), judged)]


def _courses(pass_: Tune, graph: Graph, held: Sequence[Example] = ()) -> list[Course]:
    own = terms.begin(pass_.terms, graph, pass_.steps, _schedule(pass_).rate)
    return [*own, *gates.begin(graph, _nearest(held))]


def _nearest(held: Sequence[Example]) -> list[int]:
    """How many samples are nearest to each cluster; nothing where nobody says what they are about."""
    scores = [example.feeds[INPUT] for example in held if INPUT in example.feeds]
    if not scores:
        return []
    counts: list[int] = (
        torch.cat(scores).argmax(-1).bincount(minlength=scores[0].shape[-1]).tolist()
    )
    return counts


def _curve(run: Run) -> list[dict[str, Any]]:
    return [dataclasses.asdict(point) for point in run.points]


def _schedule(pass_: Tune) -> Schedule:
    return Schedule(
        steps=pass_.steps, lr=pass_.lr, warmup=pass_.warmup, weight_decay=pass_.weight_decay,
        clip=pass_.clip, seed=pass_.seed, check_every=pass_.every or max(1, min(50, pass_.steps // 8)),
        patience=pass_.patience,
    )  # fmt: skip


def _refuse_cut(
    inputs: Mapping[str, Tensor], processor: Processor | None, most: int | None
) -> None:
    """Raise TuneError where a text is as long as is read: its last token, the answer, may be gone."""
    mask = mask_of(inputs)
    limit = processor.limit(most) if processor is not None else None
    if limit is not None and mask is not None and int(mask.sum(1).max()) >= limit:
        raise TuneError(
            f"a sample is cut to {limit} tokens, and its answer, the last of them, may be gone",
            hint="raise `max_length`, or leave long samples out of the file",
        )


def _shares(pass_: Tune, module: InGraph) -> list[float]:
    """What share of the learning rate every parameter has; one that has several names goes by the first."""
    names: dict[int, str] = {}
    for name, place in module.places.items():
        names.setdefault(place, name)
    return [pass_.rate_of(names[place]) for place in range(len(module.weights))]


def _score(task: Task, graph: Graph, held: Sequence[Record]) -> Score:
    """How good a module is at a task, by the task's own score of held-out samples."""

    def score(module: Any) -> float:
        def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
            return {n: v.numpy() for n, v in module(tensors_for(graph, feeds)).items()}

        return task.value(task.counts(run, [record.item for record in held]))

    return score


def _loss(
    pass_: Tune, teacher: Graph, task: Task | None = None
) -> Callable[[Any, Example], Tensor]:
    def loss(module: Any, example: Example) -> Tensor:
        feeds = example.feeds
        outputs, mask, found = module(feeds), mask_of(feeds), []
        if pass_.distill:
            far = losses.distillation(outputs, teacher.run(feeds), mask, pass_.temperature)
            found.append(pass_.distill * far)
        if pass_.task == "labels":
            assert example.labels is not None
            found.append(losses.labels(outputs, example.labels))
        if pass_.task in ("tokens", "answer"):
            of = losses.tokens if pass_.task == "tokens" else losses.answer
            found.append(of(outputs, feeds["input_ids"], mask))
        if task is not None:
            assert example.wanted is not None
            found.append(task.loss(outputs, example.wanted))
        return torch.stack(found).sum()

    return loss


def _of_batches(pass_: Tune, examples: list[Example]) -> Drawn:
    """Batches as they were given, in an order of its own every epoch; the last of them judges."""
    if not examples:
        raise TuneError("there is nothing to train on", hint="name a file: `file: DATA`")
    judges = examples[-1:] if len(examples) > 1 and pass_.held else []
    rest = examples[: len(examples) - len(judges)]

    def drawn(step: int) -> Example:
        epoch, place = divmod(step, len(rest))
        return rest[int(_order(pass_.seed, epoch, len(rest))[place])]

    return drawn, judges


def _chosen(count: int, pass_: Tune, number: int, sizes: Array | None = None) -> list[int]:
    """The samples of a batch: every epoch sees all of them once, in an order of its own.

    With `sizes` [samples] those of so many batches are sorted by them, and the batches come in an order of their own.
    """
    size = min(pass_.batch, count)
    if sizes is None:
        return _stream(count, pass_, number * size, size)
    many = min(SORTED_BATCHES, max(1, count // size))
    window, place = divmod(number, many)
    drawn = np.array(_stream(count, pass_, window * many * size, many * size))
    ranked = drawn[np.argsort(sizes[drawn], kind="stable")].reshape(many, size)
    mine = np.random.default_rng([pass_.seed, window, many]).permutation(many)[place]
    return [int(i) for i in ranked[mine]]


def _stream(count: int, pass_: Tune, first: int, size: int) -> list[int]:
    """So many samples from the first on, of one epoch behind the other."""
    found: list[int] = []
    while len(found) < size:
        epoch, place = divmod(first + len(found), count)
        order = _order(pass_.seed, epoch, count)
        found += order[place : place + size - len(found)].tolist()
    return found


def _sizes(records: Sequence[Record]) -> Array:
    """How long samples are, in tokens where they are arrays, else in characters. Raises TuneError where none is."""

    def of(record: Record) -> int:
        mask = (record.arrays or {}).get(MASK)
        if mask is not None:
            return int(mask.sum())
        if record.text is None:
            raise TuneError(
                "samples that are neither texts nor arrays with an attention_mask have no length",
                hint="leave `group_by_length` out",
            )
        return len(record.text) + len(record.text_pair or "")

    return np.array([of(record) for record in records])


def _shortened(graph: Graph, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs without positions at the end that are padded in every row, where the graph leaves their number free."""
    mask, nodes = mask_of(feeds), graph.input_nodes()
    if mask is None or IDS not in feeds:
        return feeds
    length, own = (nodes[name].meta["val"].shape[1] for name in (MASK, IDS))
    if isinstance(length, int) or str(length) != str(own):
        return feeds
    used = max([2, *(mask.any(0).nonzero().flatten() + 1).tolist()])

    def cut(name: str, tensor: Tensor) -> Tensor:
        for axis, size in enumerate(nodes[name].meta["val"].shape):
            if str(size) == str(length):
                tensor = tensor.narrow(axis, 0, min(used, tensor.shape[axis]))
        return tensor

    return {name: cut(name, tensor) for name, tensor in feeds.items()}


def _order(seed: int, epoch: int, count: int) -> Any:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _bounded(records: Iterable[Record]) -> list[Record]:
    """All samples in memory. Raises TuneError where that is too much of it."""
    found: list[Record] = []
    total = 0
    for record in records:
        arrays = [record.pixels, *(record.arrays or {}).values()]
        total += sum(a.nbytes for a in arrays if a is not None) + len(record.text or "")
        if total > MOST_BYTES:
            raise TuneError(
                f"the first {len(found)} samples are {total / 1e9:.0f} GB already",
                hint="train on fewer: `samples`",
            )
        found.append(record)
    return found
