"""From a traced program to engine files: passes in the dialect of a target, then its backend.

Everything that takes long and always comes out the same is looked for in the cache first, under the sha256 of what it
is made from: ranges under the graph and the data, engine files under the rewritten graph. So a compile that was killed
repeats what is quick and takes the rest.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from effc import measure, package
from effc.backends import BACKENDS, DISTRIBUTIONS
from effc.backends.base import Lowered, Port, Site
from effc.backends.dialect import DIALECTS
from effc.bench import Case, cpu_name
from effc.cache import Cache, Entry, key_of
from effc.calib.calibrator import MASK, tensors_for
from effc.calib.data import Batch
from effc.calib.probe import held_bytes
from effc.calib.slopes import SlopeProbe
from effc.causal import DECODE
from effc.errors import CalibrationError
from effc.ir.program import Program
from effc.ir.show import graph_digest
from effc.machine import cpu_features, installed
from effc.passes import CANONICAL, PASSES
from effc.passes.base import Pass, PassRecord
from effc.passes.pipeline import apply, options_of
from effc.progress import Progress
from effc.recipe import BenchSpec, Recipe
from effc.samples import Samples
from effc.source import Source

if TYPE_CHECKING:
    from effc.checkpoint import Checkpoint
    from effc.timing import Clock
    from effc.tuning import Tuner

Json = dict[str, Any]
TENSORS = "tensors.safetensors"


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """What of a recipe's passes is not done: whole passes by their place, and modules left out of others."""

    dropped: frozenset[int] = frozenset()
    excluded: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def dropping(self, indices: Iterable[int]) -> Rollback:
        """This and those passes not done at all."""
        return dataclasses.replace(self, dropped=self.dropped.union(indices))

    @property
    def key(self) -> tuple[Any, ...]:
        return tuple(sorted(self.dropped)), tuple(sorted(self.excluded.items()))

    def without(self, index: int, modules: Sequence[str]) -> Rollback:
        """This and those modules left out of the pass at `index`."""
        known = self.excluded.get(index, ())
        wider = tuple(sorted({*known, *modules}))
        return dataclasses.replace(self, excluded={**self.excluded, index: wider})

    def apply(self, index: int, pass_: Pass) -> Pass | None:
        """The pass as it is done; None where it is not."""
        if index in self.dropped:
            return None
        modules = self.excluded.get(index, ())
        if not modules:
            return pass_
        select: Any = pass_.select  # type: ignore[attr-defined]  # only passes with a choice of sites lose some
        words = (select.exclude,) if isinstance(select.exclude, str) else tuple(select.exclude)
        narrower = dataclasses.replace(select, exclude=(*words, *modules))
        return dataclasses.replace(pass_, select=narrower)  # type: ignore[call-arg]

    def to_json(self, passes: Sequence[Pass]) -> Json:
        """As it stands in decisions.json, by the key of the pass."""
        return {
            f"{i}:{pass_.name}": {"dropped": True}
            if i in self.dropped
            else {"exclude": list(self.excluded[i])}
            for i, pass_ in enumerate(passes)
            if i in self.dropped or self.excluded.get(i)
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], passes: Sequence[Pass]) -> Rollback:
        """Raises CalibrationError where the record is none, or of other passes than these."""
        places = {f"{i}:{pass_.name}": i for i, pass_ in enumerate(passes)}
        dropped, excluded = set(), {}
        for key, what in content.items() if isinstance(content, Mapping) else [("", None)]:
            index = places.get(key)
            modules = what.get("exclude") if isinstance(what, Mapping) else None
            if index is not None and isinstance(what, Mapping) and what.get("dropped") is True:
                dropped.add(index)
            elif (
                index is not None and hasattr(passes[index], "select")
                and isinstance(modules, list) and all(isinstance(m, str) for m in modules)
            ):  # fmt: skip
                excluded[index] = tuple(modules)
            else:
                raise CalibrationError(
                    f"what the recorded decisions say of the gate is not about this recipe: {key!r}",
                    hint="compile again without --decisions",
                )
        return cls(dropped=frozenset(dropped), excluded=excluded)


NOTHING = Rollback()


def chained(passes: Sequence[Pass], indices: Iterable[int]) -> frozenset[int]:
    """Those passes, and all that are of one chain with one of them."""
    found = frozenset(indices)
    chains = {passes[i].chain for i in found} - {""}
    return found | {i for i, pass_ in enumerate(passes) if pass_.chain in chains}


def pruning(passes: Sequence[Pass], lossy: Iterable[int]) -> frozenset[int]:
    """Of passes that lost something those that prune, and train from there on: a whole engine has none of them."""
    lost = frozenset(lossy)
    found = chained(passes, {i for i in lost if passes[i].shrinks or passes[i].chain})
    return found | {i for i in lost if found and i > min(found) and passes[i].trains}


def revocable(passes: Sequence[Pass], lossy: Iterable[int]) -> frozenset[int]:
    """Of passes that lost something those that a gate may take back: not what makes the model that is meant.

    An adapter of the user's makes it, and a training with no pruning in front of it.
    """
    lost = frozenset(lossy)
    kept = {i for i in lost if passes[i].is_meant or passes[i].trains}
    return lost - (kept - pruning(passes, lost))


@dataclass(frozen=True, kw_only=True)
class Built:
    """What the passes made of a program for one target, and the files that came of it."""

    target: str
    program: Program
    records: tuple[PassRecord, ...]
    lowered: tuple[Lowered, ...]
    rollback: Rollback = NOTHING
    steps: Mapping[int, PassRecord] = field(default_factory=dict)
    """Records of the recipe's own passes by their place in it; one that was rolled back is missing."""
    before: Mapping[int, Program] = field(default_factory=dict)
    """The program as each of them found it."""
    roles: tuple[str, ...] = ("main",)
    """Roles of the whole program, of which this is one."""

    @property
    def role(self) -> str:
        return self.program.only().role

    @property
    def label(self) -> str:
        return package.label(self.role, self.target, self.roles)

    def prefix(self, targets: Sequence[str]) -> str:
        """What stands before the key of a step in decisions.json, where there are several engines."""
        return prefix(self.role, self.target, self.roles, targets)

    @property
    def lossy(self) -> bool:
        return any(record.is_lossy for record in self.records)

    @property
    def first(self) -> Lowered:
        return self.lowered[0]


def prefix(role: str, target: str, roles: Sequence[str], targets: Sequence[str]) -> str:
    """What stands before the key of a step in decisions.json, where there are several engines."""
    words = [target] * (len(targets) > 1) + [role] * (len(set(roles)) > 1)
    return "".join(f"{word}/" for word in words)


def names(role: str, target: str, roles: Sequence[str], key: str) -> list[str]:
    """What a key may be called in decisions.json, whether there were several targets or not."""
    return [prefix(role, target, roles, targets) + key for targets in (("", ""), ("",))]


@dataclass(frozen=True, kw_only=True)
class _Shelf:
    """What a pass that takes long has so far, as entries of the cache under a key of the pass."""

    cache: Cache
    key: str

    def get(self, word: str) -> dict[str, Tensor] | None:
        entry = self.cache.get(key_of("part", of=self.key, word=word))
        try:
            return None if entry is None else load_file(entry.directory / TENSORS)
        except (OSError, SafetensorError):  # dropped meanwhile
            return None

    def put(self, word: str, tensors: Mapping[str, Tensor]) -> None:
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self.cache.put(key_of("part", of=self.key, word=word), None, {TENSORS: save(held)})


@dataclass(frozen=True, kw_only=True)
class Builder:
    """One graph of a source under one recipe, ready to be built for any target and any rollback."""

    recipe: Recipe
    source: Source
    samples: Samples
    original: Program
    progress: Progress
    cache: Cache
    decisions: Mapping[str, Any] | None = None
    """Those of an earlier compile that are replayed; None where this one makes its own."""
    roles: tuple[str, ...] = ("main",)
    """Roles of the whole program."""
    checkpoint: Checkpoint | None = None
    """What training made before; nothing is trained then."""
    threads: int | None = None
    """Those on which graphs are timed, where a pass asks for it; the machine's cores where not given."""
    twin: Builder | None = None
    """The builder of another role that has the same graph; exact passes are then done once for both."""
    shared: frozenset[int] = frozenset()
    """Places of the passes that the twin has alike: what it decided is taken over."""
    _canonical: dict[str, tuple[Program, list[PassRecord]]] = field(default_factory=dict)
    _kept: dict[tuple[int, str], tuple[str, dict[str, Tensor]]] = field(default_factory=dict)
    _decided: dict[tuple[int, str], Json] = field(default_factory=dict)
    """What shared passes decided first, by place and target."""

    @property
    def role(self) -> str:
        return self.original.only().role

    @property
    def alike(self) -> range:
        """Places up to the last pass that the twin has alike, which both engines do whole: it is to find one graph."""
        return range(max(self.shared, default=-1) + 1)

    @cached_property
    def identity(self) -> str:
        """sha256 of the model as it was traced."""
        if self.twin is not None:
            return self.twin.identity
        return graph_digest([self.original])

    @cached_property
    def samples_key(self) -> str | None:
        """What the samples are, or None where somebody's code makes them or what is made of them."""
        return self.samples.key()

    @cached_property
    def first_batch(self) -> dict[str, list[Any]]:
        """The first calibration batch of every role, for measuring drift on real data."""
        found = {}
        for graph in self.original:
            first = next(iter(self.samples(graph.role)), None)
            found[graph.role] = [tensors_for(graph, first.inputs)] if first is not None else []
        return found

    @cached_property
    def tuner(self) -> Tuner:
        """What trains where a pass of the recipe does."""
        from effc.tuning import Tuner

        return Tuner(
            source=self.source, teacher=self.original.only(), calib=self.recipe.calib,
            cache=self.cache, checkpoint=self.checkpoint,
            made=self.twin.tuner.made if self.twin is not None and self.shared else {},
        )  # fmt: skip

    def clock(self, index: int, target: str, step: Any) -> Clock:
        """What says how long graphs take that the pass at `index` of the recipe thinks of."""
        from effc.timing import Clock, deciding

        def case(lowered: Lowered) -> Case:
            most = measure.longest(self.source, self.original.only())
            shapes, ports = [self._clocked], lowered.inputs
            return measure.shaped_cases(
                self.samples, shapes, ports, most, lowered.profile, last_only=True
            )[0]

        return Clock(
            target=target, case=case, threads=self.recipe.threads(self.threads),
            options=self.recipe.target_options.get(target),
            behind=deciding(p for p in self.recipe.passes[index + 1 :] if p.takes(self.role)),
            batches=lambda: itertools.islice(self.samples(self.role), 1), step=step,
        )  # fmt: skip

    @property
    def _clocked(self) -> Sequence[int]:
        """The shape that graphs are timed on: of the fewest rows that a bench has, the longest."""
        shapes = measure.of_role((self.recipe.bench or BenchSpec()).shapes, self.role)
        if self.role != DECODE:
            shapes = [shape for shape in shapes if len(shape) == 2] or shapes
        return max(shapes, key=lambda shape: (-shape[0], *shape[1:]))

    @cached_property
    def _probes(self) -> dict[str, list[dict[str, Any]]]:
        return {role: _exact_probes(inputs) for role, inputs in self.source.inputs.items()}

    def build(
        self,
        target: str,
        place: Path,
        rollback: Rollback | None = None,
        known: Mapping[int, Json] | None = None,
    ) -> Built:
        """Rewrite and lower into `place`. `known` are decisions that a build with less rolled back has made."""
        if rollback is None:
            rollback = self.recorded_rollback(target)
        built = self.rewrite(target, rollback, known)
        return dataclasses.replace(built, lowered=tuple(self._lower(built, place)))

    def rewrite(
        self,
        target: str,
        rollback: Rollback = NOTHING,
        known: Mapping[int, Json] | None = None,
        first: int | None = None,
    ) -> Built:
        """All passes of the recipe, or the `first`, in the dialect of one target, on a clone; nothing is lowered."""
        program, records = self.cleaned(target)
        program, records = program.clone(), list(records)
        steps, before = {}, {}
        for index, given in enumerate(self.recipe.passes[:first]):
            pass_ = rollback.apply(index, given)
            if pass_ is None or not pass_.takes(self.role):
                continue
            before[index] = program.clone()
            steps[index] = self._step(pass_, index, program, target, (known or {}).get(index))
            records.append(steps[index])
        return Built(
            target=target, program=program, records=tuple(records), lowered=(), rollback=rollback,
            steps=steps, before=before, roles=self.roles,
        )  # fmt: skip

    def cleaned(self, target: str) -> tuple[Program, list[PassRecord]]:
        """The program after the exact clean-up passes; it is made once.

        Where the model itself is to be trained and written, those that would put another tensor in the place of one of
        its parameters are left out: a transposed or folded one is none that the model knows.
        """
        if target not in self._canonical and self.twin is not None:
            program, records = self.twin.cleaned(target)
            graph = dataclasses.replace(program.only().clone(), role=self.role)
            self._canonical[target] = Program({self.role: graph}), records
        if target not in self._canonical:
            program, records = self.original.clone(), []
            for word in CANONICAL if self.recipe.canonicalize else ():
                before = program.clone()
                with self.progress.stage(word):
                    record = apply(
                        PASSES[word](), program, dialect=DIALECTS[target], probes=self._probes
                    )
                if self.source.kept is not None and _parameters(before) - _parameters(program):
                    program = before
                    continue
                records.append(record)
            self._canonical[target] = program, records
        return self._canonical[target]

    def _step(
        self, pass_: Pass, index: int, program: Program, target: str, known: Json | None
    ) -> PassRecord:
        """One pass of the recipe: its decisions replayed, or known, or in the cache, or made now."""
        kept = self.kept(pass_, index, program, target)
        if pass_.measures_again and not kept:
            known = None  # those of another graph
        replayed = self.recorded(target, f"{index}:{pass_.name}")
        if known is None and replayed is None:
            known = self.taken_over(index, target)
        key = self._decisions_key(pass_, index, program, target) if replayed is None else None
        with self.cache.alone(key if known is None else None):
            return self._made(pass_, index, program, target, known, replayed, kept, key)

    def _made(
        self, pass_: Pass, index: int, program: Program, target: str, known: Json | None, replayed: Json | None,
        kept: dict[str, Tensor], key: str | None,
    ) -> PassRecord:  # fmt: skip
        stored = self.cache.get(key) if key is not None and known is None else None
        recorded = replayed if replayed is not None else known
        if stored is not None:
            recorded = stored.value
            kept.update(_tensors(stored))
            self.progress.reuse(pass_.name)
        is_replay = replayed is not None
        with self.progress.stage(pass_.name) as step:
            try:
                record = self._apply(pass_, program, target, recorded, is_replay, kept, step, index)
            except CalibrationError:
                if recorded is None or is_replay or (index in self.shared and stored is None):
                    raise
                record = self._apply(pass_, program, target, None, False, kept, step, index)
        if key is not None and stored is None and known is None:
            self.cache.put(key, record.decisions, {n: _npy(t) for n, t in kept.items()})
        if index in self.shared:
            self._decided.setdefault((index, target), record.decisions)
        return record

    def taken_over(self, index: int, target: str) -> Json | None:
        """What the twin decided in a pass that both have alike; None where this is the first of them."""
        if self.twin is None or index not in self.shared:
            return None
        found = self.twin._decided.get((index, target))
        theirs = f"{self.twin.role}/"
        return found and {f"{self.role}/{key.removeprefix(theirs)}": v for key, v in found.items()}

    def kept(self, pass_: Pass, index: int, program: Program, target: str) -> dict[str, Tensor]:
        """What a pass chose by data for this very graph and a record has no room for, by sha256; to be added to.

        It is held for the first graph that the pass is given, that of the whole recipe: where less of the pass is done
        nothing is chosen again, and where a pass in front is taken back the graph is another.
        """
        if not pass_.measures_again:
            return {}
        digest = graph_digest([program])
        first, found = self._kept.setdefault((index, target), (digest, {}))
        return found if first == digest else {}

    def _apply(
        self,
        pass_: Pass,
        program: Program,
        target: str,
        recorded: Json | None,
        replayed: bool,
        kept: dict[str, Tensor],
        step: Any,
        index: int,
    ) -> PassRecord:
        lossy = pass_.effect == "lossy"
        suffices = recorded is not None and (bool(kept) or not pass_.measures_again)

        def batches(role: str) -> Iterator[Batch]:
            probes = list(pass_.resolve(DIALECTS[target]).probes(program[role]))
            keeps_all = any(isinstance(probe, SlopeProbe) for probe in probes)
            return self.samples.beside(held_bytes(probes), keeps_all=keeps_all)(role)

        total = self.samples.batches(self.role)
        return apply(
            pass_,
            program,
            batches if (lossy or pass_.measures) and not suffices else None,
            dialect=DIALECTS[target],
            probes=self.first_batch if lossy and not replayed else self._probes,
            recorded=recorded,
            progress=lambda _, done, of: step(done, of or total),
            kept=kept,
            train=self.tuner.trainer(index, step) if pass_.trains else None,
            clock=self.clock(index, target, step) if pass_.times else None,
            shelf=self._shelf(pass_, index, program, target),
        )

    def _shelf(self, pass_: Pass, index: int, program: Program, target: str) -> _Shelf | None:
        if not pass_.measures_again or self.cache.root is None:
            return None
        key = self.key_of_pass("part", pass_, program, target)
        return None if key is None else _Shelf(cache=self.cache, key=key)

    def _decisions_key(self, pass_: Pass, index: int, program: Program, target: str) -> str | None:
        if not pass_.measures and not pass_.times:
            return None
        timed = self._timed_under(index, target) if pass_.times else {}
        return self.key_of_pass("decisions", pass_, program, target, **timed)

    def _timed_under(self, index: int, target: str) -> Json:
        """What times hang on beside the graph."""
        clock = self.clock(index, target, None)
        options = clock.options and dataclasses.asdict(clock.options)
        return {
            "threads": clock.threads, "shape": list(self._clocked), "cpu": [cpu_name(), *cpu_features()],
            "behind": [(pass_.name, options_of(pass_)) for pass_ in clock.behind],
            "target_options": options, "tool": installed(DISTRIBUTIONS[target][0]), "gpu": BACKENDS[target]().gpu(),
        }  # fmt: skip

    def key_of_pass(
        self, stage: str, pass_: Pass, program: Program, target: str, **parts: Any
    ) -> str | None:
        """The key of something that a pass makes of a program; None where somebody's own code has a part in it."""
        is_ours = type(pass_).__module__.startswith("effc.")  # of others the code may change
        if self.samples_key is None or not is_ours:
            return None
        pass_ = pass_.resolve(DIALECTS[target])
        return key_of(
            stage, graph=graph_digest([program]), role=self.role, name=pass_.name, options=options_of(pass_),
            samples=self.samples_key, target=target, versions=versions(), **parts,
        )  # fmt: skip

    def recorded(self, target: str, key: str) -> Any:
        """What an earlier compile decided in a step; None where nothing is replayed. Raises CalibrationError."""
        if self.decisions is None:
            return (
                self.checkpoint.decision(f"{target}/{self.role}/{key}") if self.checkpoint else None
            )
        for name in names(self.role, target, self.roles, key):
            if name in self.decisions:
                return self.decisions[name]
        raise CalibrationError(
            f"the recorded decisions know no step {key!r}",
            hint=f"they know {', '.join(sorted(self.decisions)) or 'none'}; compile again without --decisions",
        )

    def recorded_rollback(self, target: str) -> Rollback:
        """What an earlier compile took back; nothing where nothing is replayed. Raises CalibrationError."""
        for name in names(self.role, target, self.roles, "gate"):
            if self.decisions is not None and name in self.decisions:
                return Rollback.from_json(self.decisions[name], self.recipe.passes)
        return NOTHING

    def _lower(self, built: Built, place: Path) -> list[Lowered]:
        asked = self.recipe.target_options.get(built.target)
        kind = BACKENDS[built.target]
        backend = kind() if asked is None else kind(asked)
        made = []
        for graph in built.program:
            directory = package.engine_dir(
                place, graph.role, built.target, self.roles, self.recipe.targets
            )
            key = key_of(
                "lower", graph=graph_digest([Program({graph.role: graph})]), role=graph.role, target=built.target,
                asked=asked and dataclasses.asdict(asked),
                ports=[list(graph.inputs), list(graph.outputs)], cpu=cpu_features(), versions=versions(),
                tool=installed(DISTRIBUTIONS[built.target][0]), made_with=backend.made_with(),
            )  # fmt: skip
            with self.cache.alone(key):
                entry = self.cache.get(key)
                if entry is not None and entry.copy_to(directory):
                    self.progress.reuse("lower")
                    made.append(_lowered(entry.value, directory))
                    continue
                with self.progress.stage("lower") as step:
                    lowered = backend.lower(graph, directory, step)
                files = {name: directory / name for name in lowered.files}
                self.cache.put(key, _plain(lowered), files)
                made.append(lowered)
        return made


def _npy(tensor: Tensor) -> bytes:
    stream = io.BytesIO()
    np.save(stream, tensor.numpy(), allow_pickle=False)
    return stream.getvalue()


def _tensors(entry: Entry) -> dict[str, Tensor]:
    """The files of an entry that `_npy` made."""
    found = {name: np.load(entry.directory / name, allow_pickle=False) for name in entry.files}
    return {name: torch.from_numpy(array) for name, array in found.items()}


def _plain(lowered: Lowered) -> Json:
    return {k: v for k, v in dataclasses.asdict(lowered).items() if k != "directory"}


def _lowered(content: Json, directory: Path) -> Lowered:
    """What `_plain` made plain."""

    def ports(side: str) -> tuple[Port, ...]:
        return tuple(Port(**{**p, "shape": tuple(p["shape"])}) for p in content[side])

    return Lowered(**{
        **content,
        "directory": directory,
        "files": tuple(content["files"]),
        "inputs": ports("inputs"),
        "outputs": ports("outputs"),
        "sites": tuple(Site(**s) for s in content["sites"]),
        "requires": tuple(content["requires"]),
    })  # fmt: skip


def _parameters(program: Program) -> set[str]:
    """Names of the parameters of the one graph of a program."""
    held = program.only().exported.state_dict
    return {name for name, tensor in held.items() if isinstance(tensor, torch.nn.Parameter)}


def _exact_probes(inputs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What exact passes are held to: the example, and the example with half of its first row masked."""
    probes = [dict(inputs)]
    mask = inputs.get(MASK)
    if mask is not None and mask.dim() == 2 and mask.shape[1] > 1:
        padded = mask.clone()
        padded[0, mask.shape[1] // 2 :] = 0
        probes.append({**inputs, MASK: padded})
    return probes


def versions() -> dict[str, str]:
    """Versions that decide the bytes of an output."""
    names = ("effc", "torch", "transformers", "tokenizers", "numpy", "pillow")
    known = {name: installed(name) for name in (*names, "onnx-ir", "onnxscript", "onnxruntime")}
    return {name: found.split("+")[0] for name, found in known.items() if found is not None}
