"""Gives trials to workers of Ray, and keeps what is known on disk after each of them.

    DIR/sweep.json              what is tried
    DIR/trials/NAME/trial.json  what came of a trial
    DIR/trials/NAME/package     its engine
    DIR/front.json, front.html  the best so far

A trial that is finished is not done again when the same sweep is started anew; what an unfinished one had finished is
in the cache of effc, which all workers of a machine share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import bounded, cache, recipe, scratch
from effc.build import versions
from effc.delta import whole
from effc.errors import BackendUnavailable, PackageError, RecipeError, UsageError
from effc.machine import default_threads
from effc.sweep import front, space, work
from effc.sweep.space import Range, Spec, Trial

Json = dict[str, Any]
Say = Callable[[str], None]
INSTALL = "pip install 'effc[sweep]'"
REACH_S = 5.0
"""An address that takes no connection for so long is taken for none."""
MOST_FILES = 10_000
"""Of a folder so many files are looked at."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Who works: so many at once, on this machine or on Ray's cluster at `address`; engines have `threads`."""

    workers: int | None = None
    address: str | None = None
    threads: int | None = None


def run(file: Path, out: Path, settings: Settings, say: Say = lambda line: None) -> Json:
    """Try everything that a sweep's file names, and give what `front.json` has.

    Raises RecipeError where the file or its base is wrong, PackageError where `out` holds something else or another
    sweep is at work in it, UsageError where the address does not answer or a worker has another effc,
    BackendUnavailable without Ray.
    """
    spec, base = space.read(file)
    text = bounded.text_of(base, RecipeError)
    trials = space.grid(spec)
    for trial in trials:
        _check(base, trial)
    with _mine(out, spec, text):
        threads = settings.threads or max(1, int(spec.cpus))
        asks = _Asks(spec, trials, lambda trial: _job(trial, spec, base, text, out, threads))
        for record in asks.known():
            say(f"{record['name']}: {record['state']} before")
        if asks.left():
            with _ray(settings, spec) as (ray, workers):
                _drive(ray, workers, spec, asks, out, say)
        return _keep(spec, asks.records, out)


def _drive(ray: Any, workers: int, spec: Spec, asks: _Asks, out: Path, say: Say) -> None:
    limits = {"num_cpus": spec.cpus, "max_retries": spec.attempts - 1}
    if spec.memory_bytes is not None:
        limits["memory"] = spec.memory_bytes
    task = ray.remote(**limits)(work.run)
    running: dict[Any, work.Job] = {}
    while True:
        while len(running) < workers and (job := asks.next()) is not None:
            running[task.remote(job)] = job
        if not running:
            return
        (done, *_), _ = ray.wait(list(running))
        job = running.pop(done)
        try:
            record = ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # of `work.check` alone: no other trial would fare better
        except ray.exceptions.RayError as error:
            record = _lost(job, error, spec.attempts)
        asks.tell(record)
        _keep(spec, asks.records, out)
        say(_line(record, spec))


def _lost(job: work.Job, error: Exception, attempts: int) -> Json:
    """The record of a trial whose workers died; it is tried again when the sweep is started anew."""
    record: Json = {
        "name": job.name, "settings": dict(job.settings), "key": job.key, "state": "lost",
        "error": {
            "kind": type(error).__name__, "what": f"its worker died {attempts} times",
            "hint": "start the sweep again; where memory ran out, ask for it: memory: 8GB",
        },
    }  # fmt: skip
    folder = Path(job.folder)
    folder.mkdir(exist_ok=True)
    work.write(folder / work.FILE, record)
    return record


class _Asks:
    """Which trial is next, from a list or a search, and what is known of those before."""

    def __init__(
        self, spec: Spec, trials: Sequence[Trial], job: Callable[[Trial], work.Job]
    ) -> None:
        self.spec, self.job = spec, job
        self.records: list[Json] = []
        self.waiting = [job(trial) for trial in trials]
        self.search = _Search(spec) if spec.search == "tpe" else None

    def known(self) -> list[Json]:
        """Take what an earlier run of the same sweep finished, of a search whatever that had asked for."""
        if self.search is not None:
            self.records += self.search.before(self.job)
        for job in list(self.waiting):
            if (record := _record(job)) is not None:
                self.waiting.remove(job)
                self.records.append(record)
        return list(self.records)

    def left(self) -> bool:
        return bool(self.waiting) or self.search is not None

    def next(self) -> work.Job | None:
        if self.waiting:
            return self.waiting.pop(0)
        while self.search is not None and (trial := self.search.ask()) is not None:
            job = self.job(trial)
            if (known := _record(job)) is None:
                return job
            self.tell(known)
        return None

    def tell(self, record: Json) -> None:
        self.records.append(record)
        if self.search is not None:
            self.search.tell(record)


class _Search:
    """Optuna's sampler: every choice hangs on what is known by then. A choice that it makes twice is one trial."""

    def __init__(self, spec: Spec) -> None:
        try:
            import optuna
        except ImportError as error:
            raise BackendUnavailable("a search needs Optuna", hint=INSTALL) from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.spec, self.left = spec, spec.trials or 0
        self.failed, self.done = optuna.trial.TrialState.FAIL, optuna.trial.TrialState.COMPLETE
        self.study = optuna.create_study(
            directions=["minimize"] * len(spec.objectives),
            sampler=optuna.samplers.TPESampler(seed=spec.seed, n_startup_trials=min(10, max(2, self.left // 3))),
        )  # fmt: skip
        self.asked: dict[str, Any] = {}
        self.told: dict[str, Json] = {}

    def ask(self) -> Trial | None:
        while self.left > 0:
            self.left -= 1
            asked = self.study.ask()
            trial = space.named({p: self._value(asked, p, v) for p, v in self.spec.space.items()})
            if trial.name in self.told:
                self._tell(asked, self.told[trial.name])
            elif trial.name in self.asked:
                self.study.tell(asked, state=self.failed)  # is at work already
            else:
                self.asked[trial.name] = asked
                return trial
        return None

    def before(self, job: Callable[[Trial], work.Job]) -> Iterator[Json]:
        """Records of choices of this space that lie there already, each told to the sampler as one of its trials."""
        import optuna

        kinds = {place: self._kind(values) for place, values in self.spec.space.items()}
        for file in sorted(
            Path(job(Trial(name="any", settings={})).folder).parent.glob(f"*/{work.FILE}")
        ):
            found = bounded.read_json(file, PackageError)
            settings = found.get("settings") if isinstance(found, dict) else None
            if (
                not isinstance(settings, dict)
                or list(settings) != list(self.spec.space)
                or not self.left
            ):
                continue
            record = _record(job(space.named(settings)))
            if record is None:
                continue
            params = {
                p: v.index(settings[p]) if isinstance(v, list) else settings[p]
                for p, v in self.spec.space.items()
            }
            values = record.get("values", {})
            is_whole = all(o in values for o in self.spec.objectives)
            self.study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=kinds, state=self.done if is_whole else self.failed,
                    values=[values[o]["value"] for o in self.spec.objectives] if is_whole else None,
                )
            )  # fmt: skip
            self.told[record["name"]] = record
            self.left -= 1
            yield record

    @staticmethod
    def _kind(values: list[Any] | Range) -> Any:
        import optuna

        if isinstance(values, list):
            return optuna.distributions.CategoricalDistribution(list(range(len(values))))
        if values.whole:
            return optuna.distributions.IntDistribution(
                int(values.low), int(values.high), log=values.log
            )
        return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)

    def tell(self, record: Json) -> None:
        self.told[record["name"]] = record
        if (asked := self.asked.pop(record["name"], None)) is not None:
            self._tell(asked, record)

    def _tell(self, asked: Any, record: Json) -> None:
        values = record.get("values", {})
        if all(o in values for o in self.spec.objectives):
            self.study.tell(asked, [values[o]["value"] for o in self.spec.objectives])
        else:
            self.study.tell(asked, state=self.failed)

    @staticmethod
    def _value(asked: Any, place: str, values: list[Any] | Range) -> Any:
        if isinstance(values, list):
            return values[asked.suggest_categorical(place, list(range(len(values))))]
        if values.whole:
            return asked.suggest_int(place, int(values.low), int(values.high), log=values.log)
        return asked.suggest_float(place, values.low, values.high, log=values.log)


def _job(trial: Trial, spec: Spec, base: Path, text: str, out: Path, threads: int) -> work.Job:
    code = cache.code_digest()
    made = [text, dict(trial.settings), threads, code, versions(), _files(base, text, trial)]
    parts = json.dumps(made, sort_keys=True, ensure_ascii=False)
    return work.Job(
        name=trial.name, base=str(base), overrides=tuple(trial.overrides), settings=trial.settings,
        folder=str(out.resolve() / "trials" / trial.name), key=hashlib.sha256(parts.encode()).hexdigest(),
        code=code, threads=threads, keep=spec.keep,
    )  # fmt: skip


def _files(base: Path, text: str, trial: Trial) -> list[tuple[str, int, int]]:
    """Every file that a trial's recipe names, or that lies in a folder that it names: its size, and when it changed."""
    _, data = recipe.load_yaml(text, str(base))
    found: list[tuple[str, int, int]] = []
    for word in sorted(set(_words([data, dict(trial.settings)]))):
        place = next(
            (p for p in (base.parent / word, base.parent / word.partition(":")[0]) if p.exists()),
            None,
        )
        if place is None or place == base.parent:
            continue
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        stats = [(file, file.stat()) for file in files[:MOST_FILES]]
        found += [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]
    return found


def _words(value: Any) -> Iterator[str]:
    """All texts in plain values that may name a file, and keys that are those of a metric."""
    if isinstance(value, str) and value and len(value) < 1024 and "\0" not in value:
        yield value
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _words(part)
    if isinstance(value, dict):
        yield from (key for key in value if isinstance(key, str) and key.endswith(".py"))


def _record(job: work.Job) -> Json | None:
    """What came of a trial before; None where that is nothing, is of something else, or is to be tried again."""
    file = Path(job.folder) / work.FILE
    if not file.is_file():
        return None
    found = bounded.read_json(file, PackageError)
    is_mine = isinstance(found, dict) and found.get("key") == job.key
    return found if is_mine and found.get("state") in ("done", "failed") else None


def _check(base: Path, trial: Trial) -> None:
    """Raise RecipeError where a trial's recipe is none, before any work is done."""
    try:
        recipe.read(base, [*trial.overrides, "gate=false"])
    except RecipeError as error:
        raise RecipeError(error.what, where=f"trial {trial.name}", hint=error.hint) from error


@contextmanager
def _mine(out: Path, spec: Spec, text: str) -> Iterator[None]:
    """The folder of a sweep, which one driver at a time works in."""
    about = {"effc": 1, "spec": json.loads(spec.model_dump_json()), "base": text}
    file = out / "sweep.json"
    if out.exists() and not out.is_dir():
        raise PackageError(f"{out} is no folder", hint="name another place: -o DIR")
    if out.is_dir() and any(out.iterdir()) and not file.is_file():
        raise PackageError(f"{out} has something else in it", hint="name another place: -o DIR")
    if file.is_file() and bounded.read_json(file, PackageError) != about:
        raise PackageError(
            f"{out} holds another sweep: its file or its base has changed",
            hint="name another place with -o; what both have in common is in the cache",
        )
    out.mkdir(parents=True, exist_ok=True)
    if not file.is_file():
        work.write(file, about)
    (out / "trials").mkdir(exist_ok=True)
    with (out / ".lock").open("a") as stream:
        if not scratch.take(stream.fileno()):
            raise PackageError(f"another sweep is at work in {out}", hint="wait for it, or end it")
        yield


@contextmanager
def _ray(settings: Settings, spec: Spec) -> Iterator[tuple[Any, int]]:
    """Ray, and how many trials it takes at once."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise BackendUnavailable("a sweep needs Ray", hint=INSTALL) from error
    own = settings.workers or max(1, int(default_threads() // spec.cpus))
    asked: Json = {"include_dashboard": False, "num_cpus": max(1, round(own * spec.cpus))}
    if settings.address is not None:
        _reach(settings.address)
        asked = {"address": settings.address}
    try:
        ray.init(**asked, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"Ray does not start: {str(error).splitlines()[0]}",
            hint="--address HOST:6379 of `ray start --head`",
        ) from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        asks = {"CPU": spec.cpus, "memory": float(spec.memory_bytes or 0)}
        fits = [node for node in nodes if all(node.get(n, 0) >= most for n, most in asks.items())]
        if not fits:
            has: Json = max(nodes, key=lambda node: float(node.get("CPU", 0)), default={})
            raise UsageError(
                f"a trial asks for {spec.cpus:g} CPUs and {asks['memory'] / 1e9:.1f} GB, and no machine of Ray's has "
                f"as much; the largest has {has.get('CPU', 0):g} and {has.get('memory', 0) / 1e9:.1f} GB",
                hint="ask for less: cpus, memory",
            )
        cpus = sum(float(node["CPU"]) for node in fits)
        yield ray, settings.workers or max(1, int(cpus // spec.cpus))
    finally:
        ray.shutdown()


def _reach(address: str) -> None:
    """Raise UsageError where nobody answers at an address of host and port."""
    place = address.removeprefix("ray://")
    host, colon, port = place.rpartition(":")
    if not colon:  # `auto`, `local`: Ray's own words
        return
    try:
        with socket.create_connection((host, int(port)), timeout=REACH_S):
            pass
    except (OSError, ValueError) as error:
        raise UsageError(
            f"nobody answers at {address}: {error}",
            hint="--address HOST:6379, where `ray start --head` runs",
        ) from error


def _keep(spec: Spec, records: Sequence[Json], out: Path) -> Json:
    """The best so far, on disk."""
    records = sorted(records, key=lambda r: str(r["name"]))
    found = front.fronts(records, spec.objectives)
    made = front.to_json(found, records, spec.objectives)
    work.write(out / "front.json", made)
    whole.write(out / "front.html", front.page(found, records, spec.objectives))
    return made


def lines(found: Json) -> list[str]:
    """What `run` gave, for a terminal."""
    records = list(found["trials"].values())
    return front.lines(front.fronts(records, found["objectives"]), records, found["objectives"])


def _line(record: Json, spec: Spec) -> str:
    if record["state"] != "done":
        return f"{record['name']}: {record['state']}, {record['error']['what']}"
    cells = (front.cell(o, record["values"][o]) for o in spec.objectives if o in record["values"])
    cached = sum(stage["cached"] for stage in record["stages"].values())
    return f"{record['name']}: {', '.join(cells)} ({record['seconds']:.0f} s, {cached} stages done before)"
