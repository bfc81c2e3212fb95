"""What of a lossy compile to take back until its gate is met: greedily, the worst first, while there is time.

Accuracy: every group of sites is quantised alone, and the error that it makes at the outputs ranks it. The worst are
left in float, 1, 2, 4 … of them until the metric holds, and then as few as still do (bisection).
Speed: sites of one operator and weight size run alike. The candidate is timed against itself without each such class,
and every class without which it is faster is left in float.
Then pruning and training are taken back, and other passes that have no single sites. Last of all every lossy pass is,
and the engine is the model itself, written for the target.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from effc import gate
from effc.backends.dialect import DIALECTS
from effc.build import NOTHING, Built, Rollback, chained, pruning, revocable
from effc.errors import CalibrationError, EffcError
from effc.ir.edit import is_constant
from effc.ir.program import Graph, Program
from effc.ir.select import module_path, op_name
from effc.passes.base import Pass, PassRecord
from effc.passes.pipeline import apply
from effc.trial import Lab, OutOfTime, Trial

log = logging.getLogger("effc")

MOST_GROUPS = 40
"""Above this many layers' worth of groups, sites are grouped by block."""
MOST_CLASSES = 8


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sites that are taken back together: the place of their pass, and their modules."""

    index: int
    name: str
    modules: tuple[str, ...]
    error: float = 0.0
    """Relative L2 at the outputs where nothing else is quantised."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search ended with: the candidate to ship, and how many were tried."""

    trial: Trial
    tried: int = 1
    seconds: float = 0.0
    ran_out: bool = False


def search(lab: Lab, base: Trial, *, time_budget_s: float | None = None) -> Found:
    """The best candidate with something of `base` taken back; `base` itself where that is content with its gate.

    A search that runs out of time gives the best so far; what was tried is in the cache, and the same compile goes on
    from there.
    """
    started, target, spec = time.monotonic(), base.built.target, lab.spec
    if spec is None or gate.is_content(spec, base.checks):
        return Found(trial=base)
    if time_budget_s is not None:
        lab.deadline = started + time_budget_s
    best, ran_out = base, False

    def keep(trial: Trial) -> None:
        nonlocal best
        best = min((best, trial), key=lambda t: (*gate.rank(spec, t.checks), _size(t.rollback)))
        log.info("tried %d: %s", lab.tried(target), "; ".join(check.text for check in trial.checks))

    try:
        for trial in _candidates(lab, base):
            keep(trial)
        left = set() if gate.is_content(spec, best.checks) else _to_take_back(lab, base)
        for dropped in wholes(lab.recipe.passes, left):
            if gate.is_content(spec, best.checks):
                break
            rollback = NOTHING.dropping(base.rollback.dropped | dropped)
            if (whole := _tried(lab, base, rollback, timed=True)) is not None:
                keep(whole)
    except OutOfTime:
        ran_out = True
    return Found(
        trial=best, tried=lab.tried(target), seconds=time.monotonic() - started, ran_out=ran_out
    )


def _size(rollback: Rollback) -> tuple[int, int]:
    return len(rollback.dropped), sum(len(m) for m in rollback.excluded.values())


def _candidates(lab: Lab, base: Trial) -> Iterator[Trial]:
    """Whole candidates, each with all its checks; the later build on what the earlier showed."""
    current = base
    if _is_bad(lab, base, "metric"):
        for trial in _for_accuracy(lab, base):
            current = trial
            yield trial
    if _is_bad(lab, current, "latency"):
        yield from _for_speed(lab, base, current)


def _is_bad(lab: Lab, trial: Trial, word: str) -> bool:
    """Whether a check of that kind was measured, and refuses or has a value beyond its bound."""
    assert lab.spec is not None
    mine = [check for check in trial.checks if check.name.startswith(word)]
    return not gate.is_content(lab.spec, mine)


def _to_take_back(lab: Lab, base: Trial) -> set[int]:
    """Lossy passes that did something, but those that other engines must have alike."""
    passes, steps = lab.recipe.passes, base.built.steps
    lossy = {i for i, record in steps.items() if record.is_lossy}
    alike = chained(passes, lab.builder.alike)
    if stay := sorted(lossy & alike):
        names = ", ".join(passes[i].name for i in stay)
        log.warning("not taken back for one of two engines that must have it alike: %s", names)
    return set(revocable(passes, lossy) - alike)


def wholes(passes: Sequence[Pass], lossy: Collection[int]) -> list[frozenset[int]]:
    """What to take back as a whole: pruning and training, then all that has no single sites, then everything."""
    pruned, every = pruning(passes, lossy), chained(passes, lossy)
    whole = pruned | {i for i in every if not is_partial(passes[i])}
    return [each for each in dict.fromkeys((pruned, whole, every)) if each]


def _tried(lab: Lab, base: Trial, rollback: Rollback, *, timed: bool) -> Trial | None:
    """A candidate with its checks; None where it cannot be built, or is not what the model does."""
    try:
        return lab.attempt(base.built, rollback, timed=timed)
    except EffcError as error:
        log.warning("a candidate of the search is left out: %s", error.what)
        return None


# Accuracy


def _for_accuracy(lab: Lab, base: Trial) -> Iterator[Trial]:
    ranked = sensitivity(lab, base.built)
    bad, good = 0, None
    for count in _counts(len(ranked)):
        if _holds(lab, base, ranked, count):
            good = count
            break
        bad = count
    if good is None:
        return
    yield from _one(lab, base, ranked, good)
    while good - bad > 1:
        middle = (good + bad) // 2
        if _holds(lab, base, ranked, middle):
            good = middle
            yield from _one(lab, base, ranked, good)
        else:
            bad = middle


def _counts(groups: int) -> list[int]:
    """1, 2, 4 … of that many groups, and all but one at last."""
    counts = [1 << power for power in range(groups.bit_length()) if 1 << power < groups]
    return counts if not counts or counts[-1] == groups - 1 else [*counts, groups - 1]


def _one(lab: Lab, base: Trial, ranked: Sequence[Group], count: int) -> Iterator[Trial]:
    """The candidate without the worst `count` groups, timed."""
    trial = _tried(lab, base, _without(base, ranked, count), timed=True)
    if trial is not None:
        yield trial


def _holds(lab: Lab, base: Trial, ranked: Sequence[Group], count: int) -> bool:
    """Whether the metric is within its bound without the worst `count` groups."""
    trial = _tried(lab, base, _without(base, ranked, count), timed=False)
    return trial is not None and not _is_bad(lab, trial, "metric")


def _without(base: Trial, ranked: Sequence[Group], count: int) -> Rollback:
    """The first `count` groups taken back; a pass that loses all of its groups is dropped."""
    made, kept = base.rollback, {group.index for group in ranked[count:]}
    for group in ranked[:count]:
        if group.index in kept:
            made = made.without(group.index, group.modules)
        else:
            made = dataclasses.replace(made, dropped=made.dropped | {group.index})
    return made


def sensitivity(lab: Lab, built: Built) -> list[Group]:
    """Every group of sites with the error that it makes alone, the worst first. Each is measured once and kept."""
    found = []
    for index, record in built.steps.items():
        pass_ = lab.recipe.passes[index]
        if not _is_divisible(lab, index, record):
            continue
        narrowed = built.rollback.apply(index, pass_)
        assert narrowed is not None
        groups = by_layer(narrowed, built, index)
        with lab.progress.stage("sensitivity") as step:
            for number, group in enumerate(groups, 1):
                lab.check_time()
                error = _alone(lab, built, index, narrowed, group)
                found.append(dataclasses.replace(group, error=error))
                for module in group.modules:
                    lab.reasons[built.target, index, module] = f"{error:.2g} of error alone"
                step(number, len(groups))
    return sorted(found, key=lambda g: (-g.error, g.name))


def _alone(lab: Lab, built: Built, index: int, pass_: Pass, group: Group) -> float:
    """Relative L2 at the outputs where only one group of sites is quantised."""
    before, decisions = built.before[index], built.steps[index].decisions
    key = lab.builder.key_of_pass(
        "sensitivity", pass_, before, built.target, modules=group.modules,
        decisions=json.dumps(decisions, sort_keys=True),
    )  # fmt: skip
    entry = lab.cache.get(key) if key is not None else None
    if entry is not None:
        return float(entry.value)
    select = dataclasses.replace(pass_.select, module=group.modules)  # type: ignore[attr-defined]
    only = dataclasses.replace(pass_, select=select)  # type: ignore[call-arg]
    options: Any = {
        "dialect": DIALECTS[built.target], "probes": lab.builder.first_batch,
        "kept": lab.builder.kept(pass_, index, before, built.target),
    }  # fmt: skip
    try:
        record = apply(only, before.clone(), recorded=decisions, **options)
    except CalibrationError:  # alone it reads a value that nobody measured
        record = apply(only, before.clone(), lab.samples, **options)
    error = record.drift.rel_l2 if record.drift is not None else 0.0
    if key is not None:
        lab.cache.put(key, error)
    return error


# Speed


def _for_speed(lab: Lab, base: Trial, current: Trial) -> Iterator[Trial]:
    """The candidate without the classes of sites that make it slower."""
    classes = [
        group
        for index, record in current.built.steps.items()
        if _is_divisible(lab, index, record)
        for group in by_kind(lab, current.built, index)
    ]
    slow = _slower_with(lab, base, current, classes[:MOST_CLASSES]) if len(classes) > 1 else []
    if 0 < len(slow) < len(classes):
        ranked = [*slow, *(group for group in classes if group not in slow)]
        trial = _tried(lab, base, _without(current, ranked, len(slow)), timed=True)
        if trial is not None:
            yield trial


def _slower_with(lab: Lab, base: Trial, current: Trial, classes: Sequence[Group]) -> list[Group]:
    """Classes of sites without which the candidate is faster at some shape, and slower at none."""
    assert lab.recipe.bench is not None
    others = {}
    for place, group in enumerate(classes):
        ranked = [group, *classes[:place], *classes[place + 1 :]]
        trial = _tried(lab, base, _without(current, ranked, 1), timed=False)
        if trial is not None:
            lab.drifts(trial.built)  # verified before it is timed
            others[group.name] = trial.built.first
    lab.check_time()
    found = lab.bench(current.built.first, lab.recipe.bench, others)
    slow = []
    for group in classes:
        if group.name not in others:
            continue
        against = [shape["against"][group.name] for shape in found["shapes"]]  # without ÷ with
        least = min(a["ratio"] for a in against)
        faster = any(a["high"] < 1 for a in against)
        if faster and not any(a["low"] > 1 for a in against):
            slow.append(group)
            for module in group.modules:
                lab.reasons[current.built.target, group.index, module] = (
                    f"{group.name} left in float: {least:.2f} of the time"
                )
    return slow


# Groups of sites


def is_partial(pass_: Pass) -> bool:
    """Whether a pass can leave sites out: it chooses them by `select`, and says which they are."""
    return hasattr(pass_, "select") and hasattr(pass_, "sites")


def _is_divisible(lab: Lab, index: int, record: PassRecord) -> bool:
    """Whether a pass lost something at sites of which some can be taken back."""
    is_whole = index in lab.builder.alike
    return record.is_lossy and is_partial(lab.recipe.passes[index]) and not is_whole


def _sites(pass_: Pass, program: Program) -> Iterator[tuple[Graph, fx.Node]]:
    for graph in program:
        if pass_.takes(graph.role):
            for node in pass_.sites(graph):  # type: ignore[attr-defined]
                yield graph, node


def by_layer(pass_: Pass, built: Built, index: int) -> list[Group]:
    """Sites that lie in one module together; by block where these are too many."""
    resolved = pass_.resolve(DIALECTS[built.target])
    paths = [module_path(node) for _, node in _sites(resolved, built.before[index])]
    parents = {path.rpartition(".")[0] for path in paths}
    name = _parent if len(parents) <= MOST_GROUPS else _block
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(name(path), []).append(literal(path))
    return [
        Group(index=index, name=word, modules=tuple(sorted(set(modules))))
        for word, modules in groups.items()
    ]


def _parent(path: str) -> str:
    parent, _, last = path.rpartition(".")
    return path if not parent or last.isdigit() else parent


def _block(path: str) -> str:
    """`encoder.layer.3` of `encoder.layer.3.output.dense`; the path itself where no part is a number."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else path


def by_kind(lab: Lab, built: Built, index: int) -> list[Group]:
    """Sites of one operator and one size of weight, the largest share of sites first."""
    pass_ = built.rollback.apply(index, lab.recipe.passes[index])
    assert pass_ is not None
    groups: dict[str, list[str]] = {}
    for graph, node in _sites(pass_.resolve(DIALECTS[built.target]), built.before[index]):
        weights = [list(n.meta["val"].shape) for n in node.all_input_nodes if is_constant(graph, n)]
        largest = max(weights, key=lambda shape: (len(shape), shape), default=[])
        word = f"{op_name(node)} {'×'.join(map(str, largest))}"
        groups.setdefault(word, []).append(literal(module_path(node)))
    found = [
        Group(index=index, name=word, modules=tuple(sorted(set(modules))))
        for word, modules in groups.items()
    ]
    return sorted(found, key=lambda g: (-len(g.modules), g.name))


def literal(path: str) -> str:
    """A shell pattern that matches a path and nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def rolled_back(lab: Lab, base: Trial, chosen: Trial) -> list[dict[str, Any]]:
    """What was taken back, the checks of the whole recipe that made it so, and what spoke against each site."""
    failed = gate.fails(lab.spec, base.checks) if lab.spec is not None else []
    texts = [check.text for check in base.checks if check.is_beyond or check in failed]
    why = "; ".join(texts) if chosen is not base else "recorded by an earlier compile"
    made: list[dict[str, Any]] = []
    for index, pass_ in enumerate(lab.recipe.passes):
        modules = chosen.rollback.excluded.get(index, ())
        if index in chosen.rollback.dropped:
            made.append({"pass": f"{index}:{pass_.name}", "sites": ["all"], "why": why})
        elif modules:
            keys = {m: (chosen.built.target, index, m) for m in modules}
            known = {m: lab.reasons[key] for m, key in keys.items() if key in lab.reasons}
            made.append(
                {
                    "pass": f"{index}:{pass_.name}",
                    "sites": list(modules),
                    "why": why,
                    "reasons": known,
                }
            )
    return made
