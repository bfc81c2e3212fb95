"""Runs passes, and owns everything that is the same for each of them.

Clone at the door, calibrate, rewrite, refresh, check, record, blame. A pass that says it is exact is held to it on
probe inputs; one that says it is lossy has its drift measured and written down.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from effc.calib.calibrator import MASK, collect, tensors_for
from effc.calib.data import Batch
from effc.dialect import Dialect
from effc.errors import EffcError, PassError, PostconditionError, PreconditionError
from effc.ir.check import Drift, drift, problems
from effc.ir.double import doubled, in_double
from effc.ir.edit import refresh
from effc.ir.program import Graph, Program
from effc.passes.base import Clock, Pass, PassRecord, Shelf, Stats, Trainer, of_files

log = logging.getLogger(__name__)


class Data(Protocol):
    """Batches of one role, as often as asked."""

    def __call__(self, role: str) -> Iterable[Batch]: ...


Progress = Callable[[str, int, int | None], None]
"""What is done, how much of it, and of how much where that is known."""

NOISIER = 4.0
"""So many times the rounding of the graph before may be in the graph behind an exact pass."""


def apply(
    pass_: Pass,
    program: Program,
    data: Data | Iterable[Batch] | None = None,
    *,
    dialect: Dialect | None = None,
    probes: Mapping[str, Sequence[Mapping[str, Tensor]]] | None = None,
    recorded: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    kept: dict[str, Tensor] | None = None,
    train: Trainer | None = None,
    clock: Clock | None = None,
    shelf: Shelf | None = None,
) -> PassRecord:
    """Apply one pass to a program in place, and say what it did.

    `probes` are inputs by role on which the outputs before and after are compared; where none are given the first
    batch of `data` serves. `recorded` replays the decisions of an earlier run and needs no data, but for passes that
    measure again. `kept` holds decisions by sha256 that are too large for a record; they are looked up there, and those
    of this run added. `train` is who trains, for a pass that does, and `clock` what says how long graphs take. `shelf`
    is where a pass that takes long keeps what it has. On any error the program is as it was.
    """
    if dialect is not None:
        pass_ = pass_.resolve(dialect)
    if unknown := sorted(set(pass_.graphs) - set(program.graphs)):
        raise PreconditionError(
            f"{pass_.name}: there is no graph {', '.join(unknown)}",
            hint=f"graphs: {', '.join(program.graphs)}",
        )
    before = program.clone()
    started = time.perf_counter()
    try:
        pass_.requires(program)
        sites, decisions, notes = 0, {}, {}
        for graph in _graphs(pass_, program):
            stats = _stats(pass_, graph, data, recorded, progress, kept, train, clock, shelf)
            sites += _rewrite(pass_, graph, stats)
            decisions.update(stats.decisions)
            notes.update({f"{graph.role}/{name}": note for name, note in stats.notes.items()})
        pass_.ensures(program)
        probed = list(_probed(pass_, before, program, data, probes)) if sites else []
        gap = _compare(before, probed)
        if pass_.effect == "exact" and gap is not None and not _is_near(pass_, gap):
            _hold(pass_, gap, before, probed)
    except EffcError:
        program.graphs = before.graphs
        raise
    except Exception as error:
        program.graphs = before.graphs
        raise PassError(
            f"{pass_.name} failed: {type(error).__name__}: {error}",
            hint="--debug shows where; leave out what it fails on by `select`, or the pass",
        ) from error
    record = PassRecord(
        name=pass_.name,
        options=options_of(pass_),
        effect=pass_.effect,
        sites=sites,
        seconds=time.perf_counter() - started,
        nodes=(_nodes(before), _nodes(program)),
        bytes=(before.weight_bytes(), program.weight_bytes()),
        drift=gap,
        decisions=decisions,
        notes=notes,
    )
    log.info("%s", record.line())
    return record


def run(
    passes: Sequence[Pass],
    program: Program,
    data: Data | Iterable[Batch] | None = None,
    **options: Any,
) -> tuple[Program, list[PassRecord]]:
    """Apply passes in order to a clone; the caller's program is never touched."""
    program = program.clone()
    return program, [apply(pass_, program, data, **options) for pass_ in passes]


def options_of(pass_: Pass) -> dict[str, Any]:
    """The options of a pass as plain values, those left at None out, and of files their names alone."""
    options = {k: v for k, v in dataclasses.asdict(pass_).items() if v is not None and v != ()}
    return of_files(options, lambda word: Path(word).name)


def _graphs(pass_: Pass, program: Program) -> list[Graph]:
    return [graph for graph in program if pass_.takes(graph.role)]


def _batches(data: Data | Iterable[Batch] | None, role: str) -> Iterable[Batch]:
    if data is None:
        return ()
    return data(role) if callable(data) else data


def _stats(
    pass_: Pass,
    graph: Graph,
    data: Data | Iterable[Batch] | None,
    recorded: Mapping[str, Any] | None,
    progress: Progress | None,
    kept: dict[str, Tensor] | None,
    train: Trainer | None,
    clock: Clock | None,
    shelf: Shelf | None,
) -> Stats:
    known = None if recorded is None else dict(recorded)
    suffices = known is not None and (bool(kept) or not pass_.measures_again)
    wanted = [] if suffices else list(pass_.probes(graph))

    def made(seen: dict[str, Any]) -> Stats:
        return Stats(
            seen, recorded=known, kept=kept, train=train, clock=clock, shelf=shelf,
            progress=None if progress is None else partial(progress, pass_.name),
        )  # fmt: skip

    if not wanted:
        return made({})

    def on_batch(count: int) -> None:
        if progress is not None:
            progress("calibrate", count, None)

    seen = collect(graph, wanted, _batches(data, graph.role), on_batch=on_batch)
    return made(seen)


def _rewrite(pass_: Pass, graph: Graph, stats: Stats) -> int:
    version, outputs = _fingerprint(graph), graph.outputs
    sites = pass_.rewrite(graph, stats)
    if sites:
        refresh(graph)
        if graph.outputs != (told := pass_.gives(outputs)):
            raise PassError(
                f"{pass_.name} left graph {graph.role!r} with outputs {', '.join(graph.outputs)}, "
                f"and says {', '.join(told)}",
                hint="this is a fault of the pass; its `gives` names those that it adds or drops",
            )
        if broken := problems(graph):
            raise PassError(
                f"{pass_.name} left a broken graph: {'; '.join(broken[:5])}",
                hint="this is a fault of the pass; edit by effc.ir.edit",
            )
    elif _fingerprint(graph) != version:
        raise PassError(
            f"{pass_.name} says it changed nothing but edited graph {graph.role!r}",
            hint="this is a fault of the pass; return the number of sites that it changed",
        )
    return sites


def _fingerprint(graph: Graph) -> Any:
    """What an edit of any kind would change: calls, their arguments, and which tensor each name stands for."""
    calls = [(n.name, n.target, n.args, dict(n.kwargs)) for n in graph.fx.nodes]
    return calls, {name: tensor.data_ptr() for name, tensor in graph.tensors().items()}


def _nodes(program: Program) -> int:
    return sum(len(list(graph.nodes)) for graph in program)


Probed = tuple[Graph, list[dict[str, Tensor]]]


def _compare(before: Program, probed: Sequence[Probed]) -> Drift | None:
    """The worst drift over probe inputs; None where there is nothing to compare on."""
    worst: Drift | None = None
    for graph, feeds in probed:
        for feed in feeds:
            gap = _apart(before[graph.role].run(feed), graph.run(feed), feed)
            worst = gap if worst is None else worst.worst(gap)
    return worst


def _probed(
    pass_: Pass,
    before: Program,
    after: Program,
    data: Data | Iterable[Batch] | None,
    probes: Mapping[str, Sequence[Mapping[str, Tensor]]] | None,
) -> Iterator[Probed]:
    """Every graph that a pass worked on, with inputs for what it was and what it is."""
    for graph in _graphs(pass_, after):
        if graph.is_of_shapes:
            continue
        feeds = list((probes or {}).get(graph.role, ()))
        if not feeds:
            first = next(iter(_batches(data, graph.role)), None)
            feeds = [_of_either(before[graph.role], graph, first)] if first is not None else []
        yield graph, [_with_added(graph, given) for given in feeds]


def _apart(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], feed: Mapping[str, Tensor]
) -> Drift:
    """Drift of what both give as numbers, or both as codes; what one gives alone, its pass has said."""
    shared = {
        name: value
        for name, value in left.items()
        if name in right and right[name].is_floating_point() == value.is_floating_point()
    }
    return drift(shared, right, feed.get(MASK))


def _of_either(before: Graph, after: Graph, batch: Batch) -> dict[str, Tensor]:
    """A batch as both graphs take it; an input that a pass has added may be missing in it."""
    feed = tensors_for(before, batch.inputs)
    if set(after.inputs) <= set(batch.inputs):
        feed |= tensors_for(after, batch.inputs)
    return feed


def _with_added(after: Graph, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs for both graphs: one that this pass or one in front added has its example's rows, as many as there are."""
    known = after.exported.example_inputs
    made = dict(feed)
    for name in after.inputs:
        if name in feed or known is None or name not in known[1]:
            continue
        rows = len(next(iter(feed.values())))
        made[name] = known[1][name][torch.arange(rows) % len(known[1][name])]
    return made


def _is_near(pass_: Pass, gap: Drift) -> bool:
    return gap.rel_l2 <= pass_.tolerance


def _hold(pass_: Pass, gap: Drift, before: Program, probed: Sequence[Probed]) -> None:
    """Raise PostconditionError, but where the gap is no more than rounding that the model itself has."""
    moved = f"moved the outputs by {gap.rel_l2:.2g}"
    try:
        is_rounding = math.isfinite(gap.rel_l2) and all(
            _is_rounding(pass_, before[graph.role], graph, feeds) for graph, feeds in probed
        )
    except Exception as error:  # an operator that knows no float64: the gap stands as it is
        log.debug("%s cannot be held to in float64: %s", pass_.name, error)
        is_rounding = False
    if not is_rounding:
        raise PostconditionError(
            f"{pass_.name} is exact but {moved} (relative L2; at most {pass_.tolerance:g} is allowed)",
            hint="leave the pass out, and report the model that shows this",
        )
    log.info("%s %s in float32, and not in float64", pass_.name, moved)


def _is_rounding(
    pass_: Pass, before: Graph, after: Graph, feeds: Sequence[Mapping[str, Tensor]]
) -> bool:
    """Whether two graphs give the same in float64, and the second is about as near to that in float32 as the first."""
    wide, wide_after = in_double(before), in_double(after)
    for feed in feeds:
        exact = wide.run(doubled(feed))
        usual = _apart(exact, before.run(feed), feed).rel_l2
        mine = _apart(exact, after.run(feed), feed).rel_l2
        moved = _apart(exact, wide_after.run(doubled(feed)), feed)
        if not _is_near(pass_, moved) or not mine <= max(pass_.tolerance, NOISIER * usual):
            return False
    return True
