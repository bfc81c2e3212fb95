"""One candidate: built, compared with the model, measured on its task, timed, and asked what the gate asks.

What always comes out the same is kept in the cache. Timings are kept only as long as the compile that made them is
unfinished: one that was killed takes them up again, and the next compile measures anew.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from effc import alone, gate, measure, metrics
from effc.backends import BACKENDS
from effc.backends.base import Lowered
from effc.bench import cpu_name
from effc.build import Builder, Built, Rollback, pruning, versions
from effc.cache import key_of
from effc.errors import EffcError
from effc.gate import Check
from effc.layers import layer_errors
from effc.machine import cpu_features
from effc.package import digest
from effc.recipe import BenchSpec, GateSpec

Json = dict[str, Any]
log = logging.getLogger("effc")

KEPT_S = 86400.0
"""A timing of an unfinished compile that is older than a day is taken again."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A candidate and what is known of it; `bench` is None where it was not timed, or not yet."""

    built: Built
    metric: Json | None = None
    bench: Json | None = None
    checks: tuple[Check, ...] = ()

    @property
    def rollback(self) -> Rollback:
        return self.built.rollback


class OutOfTime(Exception):
    """The time that a search may take is up."""


@dataclass(kw_only=True)
class Lab:
    """Where candidates are tried: one builder, room on disk, and the questions of the gate."""

    builder: Builder
    work: Path
    threads: int
    metric: metrics.Metric | None
    spec: GateSpec | None
    deadline: float = math.inf
    """When no new candidate is begun any more, on the monotonic clock."""
    reasons: dict[tuple[str, int, str], str] = field(default_factory=dict)
    """What speaks against a module of a pass on a target, where a search has found something."""
    beside: dict[str, Lowered] = field(default_factory=dict)
    """Engines of other targets, which every further one is timed beside."""
    tellers: dict[str, Lowered] = field(default_factory=dict)
    """By target, the engine that tells this one what texts are about: the metric is of both."""
    _tried: dict[Any, Trial] = field(default_factory=dict)
    _whole: dict[Any, Built | None] = field(default_factory=dict)
    """Unpruned engines; None where there is none to be had."""
    _timings: list[str] = field(default_factory=list)
    _reference: metrics.Samples | None = None
    _calls: int | None = None
    """How often the metric runs an engine, once that is known."""

    def __post_init__(self) -> None:
        self.progress, self.cache = self.builder.progress, self.builder.cache
        self.source, self.samples = self.builder.source, self.builder.samples
        self.recipe, self.original = self.builder.recipe, self.builder.original

    def build(
        self, target: str, rollback: Rollback | None = None, known: Mapping[int, Json] | None = None
    ) -> Built:
        """A candidate's files, in a directory of its own."""
        place = self.work / f"trial-{len(list(self.work.glob('trial-*')))}"
        place.mkdir()
        return self.builder.build(target, place, rollback, known)

    def drifts(self, built: Built) -> dict[str, Json]:
        """Drift of every engine from the model, by target. Raises VerifyError; see `measure.verify_engine`."""
        found = {}
        for low in built.lowered:
            key = self._key("verify", low, lossy=built.lossy, samples=self.builder.samples_key)

            def run(low: Lowered = low) -> Json:
                with self.progress.stage("verify") as step:
                    return measure.verify_engine(
                        self.source, self.original.only(), low, self.samples, built.lossy,
                        self.threads, step,
                    )  # fmt: skip

            found[built.target] = self._value("verify", key, run)
        return found

    def lowering(self, built: Built) -> Json | None:
        """How far an engine is from its own graph; None where nothing lossy was done."""
        if not built.lossy:
            return None
        key = self._key("lowering", built.first, samples=self.builder.samples_key)

        def run() -> Json:
            with self.progress.stage("verify"):
                graph = built.program.only()
                return dataclasses.asdict(
                    measure.check_lowering(graph, built.first, self.samples, self.threads)
                )

        made: Json = self._value("verify", key, run)
        return made

    def layers(self, built: Built) -> list[Json]:
        """Every quantised layer with the error that it makes, over one batch; see `layers.layer_errors`.

        Its reference is the graph before the first lossy pass, or the first behind one that changed sizes or trained.
        """
        passes = self.builder.recipe.passes
        last = max((i for i in built.steps if passes[i].renews), default=-1)
        first = next((i for i, r in built.steps.items() if i > last and r.is_lossy), None)
        if first is None:
            return []
        before, after = built.before[first].only(), built.program.only()
        feeds = self.builder.first_batch[after.role] or [dict(self.source.inputs[after.role])]
        with self.progress.stage("layers"):
            return layer_errors(before, after, feeds[0])

    def measured(self, built: Built) -> Trial:
        """A candidate with its metric, and the checks that follow from that."""
        trial = Trial(built=built, metric=self._metric(built.first))
        return dataclasses.replace(trial, checks=self._checks(trial))

    def timed(self, trial: Trial) -> Trial:
        """A measured candidate with its timing, and all checks."""
        if self.recipe.bench is None or self.obstacle(trial.built) is not None:
            return trial
        others = {**self.beside, **self._unpruned(trial.built)}
        timed = self.bench(trial.built.first, self.recipe.bench, others)
        trial = dataclasses.replace(trial, bench=timed)
        return dataclasses.replace(trial, checks=self._checks(trial))

    def _unpruned(self, built: Built) -> dict[str, Lowered]:
        """The same recipe without what prunes, and is trained from there on: a narrower engine may be slower.

        Nothing where the gate does not ask for it, or the engine cannot be made or is not what the model does. Raises
        OutOfTime.
        """
        lossy = {i for i, record in built.steps.items() if record.is_lossy}
        dropped = pruning(self.recipe.passes, lossy)
        if self.spec is None or not self.spec.latency or not dropped:
            return {}
        rollback = built.rollback.dropping(dropped)
        key = built.target, rollback.key
        if key not in self._whole:
            self.check_time()
            self._whole[key] = None
            try:
                whole = self.narrowed(built, rollback)
                self.drifts(whole)  # verified before it is timed
                self._whole[key] = whole
            except EffcError as error:
                log.warning("the engine is not timed beside the same unpruned: %s", error.what)
        found = self._whole[key]
        return {} if found is None else {gate.UNPRUNED: found.first}

    def obstacle(self, built: Built) -> str | None:
        """Why a candidate cannot be timed on this machine; None where it can."""
        found: str | None = BACKENDS[built.target]().obstacle(built.first)
        return found

    def finish(self) -> None:
        """Forget the timings: the compile is over, and the next one measures anew."""
        for key in self._timings:
            self.cache.forget(key)

    def _checks(self, trial: Trial) -> tuple[Check, ...]:
        if self.spec is None:
            return ()
        sizes = None
        if self.spec.size:
            sizes = model_bytes(trial.built.first), model_bytes(self.plain(trial.built.first))
        return gate.checks(
            self.spec, bench=trial.bench, metric=trial.metric, sizes=sizes,
            asked=self.recipe.gate_asks,
        )  # fmt: skip

    # The metric: samples of model and engine are kept, so that a search measures the model once.

    def _metric(self, lowered: Lowered) -> Json | None:
        if self.metric is None:
            return None
        described = metrics.describe(self.metric.file)
        names = {"metric": self.metric.name, "data": described, "samples": self.builder.samples_key}
        if self._reference is None:
            model = key_of("metric", **self._model, **names)
            self._reference = self._samples(model, lambda step: self._of_model(step))
        teller = self.tellers.get(lowered.target)
        told = {"teller": self._engine(teller)} if teller is not None else {}
        engine = self._key("metric", lowered, **names, **told)
        mine = self._samples(engine, lambda step: self._of_engine(lowered, step))
        compared = metrics.compare(self.metric, self._reference, mine)
        return {**dataclasses.asdict(compared), "data": described}

    def _of_model(self, step: Any) -> metrics.Samples:
        assert self.metric is not None

        def count(done: int, total: int | None) -> None:
            self._calls = done
            step(done, total)

        return measure.of_model(
            self.source, self.original.only(), self.metric, self.threads, count, self.samples
        )

    def _of_engine(self, lowered: Lowered, step: Any) -> metrics.Samples:
        assert self.metric is not None
        calls = self._calls
        return measure.of_engine(
            self.source, lowered, self.metric, self.threads, lambda done, _: step(done, calls),
            self.samples, self.tellers.get(lowered.target),
        )  # fmt: skip

    def _samples(self, key: str, make: Callable[[Any], metrics.Samples]) -> metrics.Samples:
        """Per-sample results from the cache, or made and put there. Those of somebody's own code are always made."""
        own = isinstance(self.metric, metrics.Own) or self.builder.samples_key is None
        entry = None if own else self.cache.get(key)
        if entry is not None:
            try:
                with np.load(entry.directory / "columns.npz", allow_pickle=False) as arrays:
                    columns = {name: arrays[name] for name in arrays.files}
            except (OSError, ValueError):
                pass  # it was dropped meanwhile
            else:
                self.progress.reuse("metric")
                return metrics.Samples(columns, unit=entry.value)
        with self.progress.stage("metric") as step:
            made = make(step)
        if not own:
            file = self.work / "columns.npz"
            np.savez(file, **made.columns)  # type: ignore[arg-type]
            self.cache.put(key, made.unit, {"columns.npz": file})
        return made

    # Time

    def plain(self, lowered: Lowered) -> Lowered:
        """The plain float export, for the runtime of an engine and opened as that is."""
        graph, place = self.original.only(), self.work / "plain"
        if self.source.file is not None:
            return measure.plain_of(self.source, graph, place, lowered.target, lowered.options)
        files = self._plain_files
        return measure.plain(graph, place, files, lowered.target, lowered.options)

    @cached_property
    def _plain_files(self) -> tuple[str, ...]:
        graph, place = self.original.only(), self.work / "plain"
        key = key_of("plain", graph=self.builder.identity, versions=versions())
        entry = self.cache.get(key)
        if entry is not None and entry.copy_to(place):
            return tuple(entry.value)
        with self.progress.stage("lower"):
            made = measure.plain_export(graph, place, "ort").files
        self.cache.put(key, list(made), {name: place / name for name in made})
        return made

    def bench(
        self,
        lowered: Lowered,
        spec: BenchSpec,
        against: Mapping[str, Lowered] | None = None,
    ) -> Json:
        """Timing of an engine beside its references, and beside other candidates where there are any."""
        others = {name: self._engine(low) for name, low in sorted((against or {}).items())}
        key = self._key(
            "bench", lowered, spec=dataclasses.asdict(spec), others=others, cpu_name=cpu_name(),
            threads=self.threads, samples=self.builder.samples_key,
        )  # fmt: skip
        self._timings.append(key)
        entry = self.cache.get(key)
        if entry is not None and time.time() - entry.value["time"] < KEPT_S:
            self.progress.reuse("bench")
            kept: Json = entry.value["bench"]
            return kept
        exported = self.plain(lowered)
        with self.progress.stage("bench") as step, alone.timing():
            timed = measure.time_engine(
                self.source, self.original, lowered, self.samples, spec, self.threads, step,
                {name: measure.opener(low, self.threads) for name, low in (against or {}).items()},
                exported=exported,
            )  # fmt: skip
        made = json.loads(json.dumps(timed.to_json()))
        self.cache.put(key, {"bench": made, "time": time.time()})
        return dict(made)

    # Keys

    @cached_property
    def _model(self) -> Json:
        return {
            "model": self.builder.identity,
            "file": self.source.digest if self.source.file is not None else None,
            "cpu": cpu_features(),
            "versions": versions(),
        }

    def _engine(self, lowered: Lowered) -> list[str]:
        return [digest(lowered.directory / name) for name in lowered.files]

    def _key(self, stage: str, lowered: Lowered, **parts: Any) -> str:
        return key_of(
            stage, **self._model, engine=self._engine(lowered), target=lowered.target,
            options=dict(lowered.options), ran=BACKENDS[lowered.target]().obstacle(lowered) is None,
            **parts,
        )  # fmt: skip

    def _value(self, stage: str, key: str, run: Callable[[], Any]) -> Any:
        """A result from the cache, or made and put there."""
        if self.builder.samples_key is None:  # data out of somebody's code: who knows
            return run()
        with self.cache.alone(key):
            entry = self.cache.get(key)
            if entry is not None:
                self.progress.reuse(stage)
                return entry.value
            made = run()
            self.cache.put(key, made)
        return made

    # What the search asks for

    def tried(self, target: str) -> int:
        """How many candidates there were for a target, the whole recipe among them."""
        return 1 + len([of for of, _ in self._tried if of == target])

    def narrowed(self, built: Built, rollback: Rollback) -> Built:
        """The same with more rolled back. Decisions are taken over, but behind what is not pruned or trained now."""
        passes, dropped = self.recipe.passes, rollback.dropped - built.rollback.dropped
        first = min((i for i in dropped if passes[i].renews), default=len(passes))
        known = {i: record.decisions for i, record in built.steps.items() if i < first}
        return self.build(built.target, rollback, known)

    def check_time(self) -> None:
        """Raises OutOfTime where the deadline has passed."""
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def attempt(self, base: Built, rollback: Rollback, *, timed: bool) -> Trial:
        """A candidate with more rolled back than `base`, whose decisions it takes over. Raises OutOfTime."""
        key = base.target, rollback.key
        trial = self._tried.get(key)
        if trial is None:
            self.check_time()
            trial = self.measured(self.narrowed(base, rollback))
            self._tried[key] = trial
        if timed and trial.bench is None:
            self.check_time()
            self.drifts(trial.built)  # verified before it is timed
            trial = self.timed(trial)
        self._tried[key] = trial
        return trial


def model_bytes(lowered: Lowered) -> int:
    """Bytes of an engine and the data beside it."""
    first = lowered.files[0]
    return sum(
        (lowered.directory / name).stat().st_size
        for name in lowered.files
        if name in (first, f"{first}.data")
    )
