"""How many units of a group stay: sizes that are faster on the target, and as many as a share of the time allows.

    e(s) = (T(N) − T(s)) / (N − s)        the time that every removed unit buys, where s of N units stay

Kernels work in tiles, so 300 channels may take as long as 304, or longer. Near the size that was wished for, multiples
of what kernels like are tried in the graph itself; one is taken where its e(s) is larger, 99 % sure over the sessions
of a clock. Groups that are alike, in shapes, operators and work, are tried together: they share a
measurement, and it stands out of the noise. What came of it is a record, which holds all that was measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from effc.errors import CalibrationError, PreconditionError
from effc.ir.axes import leaves
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.passes.base import Clock
from effc.passes.coupling import Coupling, Group, Member
from effc.stats import student

MULTIPLES = (64, 32, 16, 8, 4)
"""What kernels may like, the coarsest first: a cache line of int8, registers of floats, and parts of them."""
JOINT = (16, 8)
"""Multiples to which all groups at once are rounded, as a trial."""
MOST_TRIED = 4
"""Sizes that are tried for a kind of group beside the one that was wished for."""
LEVEL = 0.99
MOST_RATIO = 0.9
"""The largest part of every group that a latency budget may take."""
CLOSE = 0.02
"""A search stops where the time is less than this share under its budget."""
MOST_STEPS = 6

Array = np.ndarray[Any, np.dtype[Any]]
Counts = dict[str, int]
Shrink = Callable[[Mapping[str, int]], Graph]
"""The graph with so many units of those groups, whichever they are: the time is the same."""


@dataclass(frozen=True, kw_only=True)
class Took:
    """How long the graph takes with `units` of every group of a kind, in ms, and the 99 % interval."""

    units: int
    ms: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Groups that are alike, how many units were wished for and are kept, and what keeping them takes."""

    groups: tuple[str, ...]
    size: int
    wanted: int
    kept: int
    bought: Took
    tried: tuple[Took, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many units stay by group, and the times, in ms, that decided it."""

    counts: dict[str, int]
    whole_ms: float
    together: Took
    """All groups at once; `units` is how many go."""
    kinds: tuple[Kind, ...]
    ratio: float | None = None
    """The part of every group that a latency budget asked for."""

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["kinds"] = [
            {**k, "groups": list(k["groups"]), "tried": list(k["tried"])} for k in found["kinds"]
        ]
        return found


def read(recorded: Any, groups: Iterable[Group]) -> Sizes:
    """A record as it was written. Raises CalibrationError where it is none, or of other groups."""
    try:
        found: Sizes = TypeAdapter(Sizes).validate_python(recorded)
    except ValidationError:
        found = None  # type: ignore[assignment]
    if found is None or set(found.counts) != {group.name for group in groups}:
        raise CalibrationError(
            "the recorded sizes are of another model or other groups",
            hint="the record is of another model; prune again without it",
        )
    return found


# -- alignment


def step_of(group: Group, multiple: int) -> int:
    """How many units come and go at once, so that every dimension that holds the group is cut by that multiple."""
    steps = (multiple // math.gcd(multiple, _run(member)) for member in group.members)
    return math.lcm(1, *steps)


def _run(member: Member) -> int:
    """How many neighbouring indices belong to one unit: 64 for a head of that size, 1 for a channel within heads."""
    on = np.flatnonzero(member.places == 0)
    breaks = np.flatnonzero(np.diff(on) != 1)
    return int(breaks[0]) + 1 if len(breaks) else max(1, len(on))


def aligned(group: Group, count: int, step: int) -> int:
    """The multiple of `step` next to a count: at least one, and all units where it is not below them."""
    return min(group.size, max(step, round(count / step) * step))


def _nearest(group: Group, count: int, step: int) -> int:
    """The multiple of `step` next to a count; the count where that would be all units."""
    found = aligned(group, count, step)
    return found if found < group.size else count


def refuse_unaligned(groups: Iterable[Group], multiple: int) -> None:
    """Raise PreconditionError where a group has no size below its own that is a multiple."""
    bad = [group for group in groups if step_of(group, multiple) >= group.size]
    if bad:
        names = ", ".join(group.name for group in bad[:3])
        sizes = ", ".join(str(group.size) for group in bad[:3])
        raise PreconditionError(
            f"align: {multiple} leaves no size for {names}, of {sizes} units",
            hint=f"a smaller multiple, `align: auto`, or leave {'it' if len(bad) == 1 else 'them'} out by `groups`",
        )


# -- kinds


def kinds_of(coupling: Coupling, names: Iterable[str]) -> list[list[Group]]:
    """Groups by what their time hangs on: shapes of all that holds them, operators, and work."""
    tensors = coupling.graph.tensors()
    found: dict[Any, list[Group]] = {}
    ops: dict[Any, set[str]] = {}
    for use in coupling.reading.uses:
        for axis in (use.writes, use.reads):
            for unit in leaves(axis):
                ops.setdefault(unit, set()).add(op_name(use.node))
    for name in names:
        group = coupling.groups[name]
        shapes = sorted((tuple(tensors[m.tensor].shape), m.dim, _run(m)) for m in group.members)
        words = sorted(ops.get(group.unit, ()))
        key = (group.size, group.macs, group.parameters, tuple(shapes), tuple(words))
        found.setdefault(key, []).append(group)
    return list(found.values())


def candidates(group: Group, wanted: int) -> list[int]:
    """The size that was wished for, and multiples beside it that remove half to one and a half times as much."""
    reach, found = (group.size - wanted) / 2, [wanted]
    for multiple in MULTIPLES:
        step = step_of(group, multiple)
        for size in (wanted // step * step, -(-wanted // step) * step):
            if 0 < size < group.size and abs(size - wanted) <= reach and size not in found:
                found.append(size)
    return found[: 1 + MOST_TRIED]


# -- choice


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """Chooses sizes for the groups of one graph by a clock."""

    coupling: Coupling
    shrink: Shrink
    clock: Clock

    def near(self, wanted: Mapping[str, int]) -> Sizes:
        """Sizes near those that were wished for, where they are faster; a group that pruning slows down stays whole."""
        counts: Counts = {}
        kinds = self._tried(wanted)
        for kind in kinds:
            kept = kind.best()
            step = _step(kind.groups[0], kept)
            for group in kind.groups:
                same = wanted[group.name] == kind.wanted or kept == group.size
                counts[group.name] = kept if same else aligned(group, wanted[group.name], step)
        counts = self._jointly(counts, wanted)
        return self._sizes(counts, [(kind, _middle(kind.groups, counts)) for kind in kinds])

    def _jointly(self, counts: Counts, wanted: Mapping[str, int]) -> Counts:
        """These sizes, or all rounded to one multiple where that buys more for a parameter, and sure.

        A layer in blocks is fast between layers in blocks: what no kind shows alone, all of them may show together.
        """
        groups = [self.coupling.groups[name] for name in counts]
        rounded = [
            {g.name: _nearest(g, wanted[g.name], step_of(g, multiple)) for g in groups}
            for multiple in JOINT
        ]
        others = [c for n, c in enumerate(rounded) if c not in (counts, *rounded[:n])]
        if not others:
            return counts

        def graphs() -> Iterator[Graph]:
            yield self.coupling.graph
            yield from map(self.shrink, (counts, *others))

        _, rows = _shares(self.clock(graphs()))
        gone = [sum((g.size - c[g.name]) * g.parameters for g in groups) for c in (counts, *others)]
        every = sum(g.size * g.parameters for g in groups)
        mine, *theirs = [(1 - row) * every / max(1, n) for row, n in zip(rows, gone, strict=True)]
        level = 1 - (1 - LEVEL) / len(others)
        better = [n for n, bought in enumerate(theirs) if _is_sure(bought - mine, level)]
        best = max(better, key=lambda n: float(theirs[n].mean()), default=None)
        return counts if best is None else others[best]

    def steps(self, wanted: Mapping[str, int]) -> Counts:
        """By group, of what its size near the one wished for should be a multiple."""
        return {
            group.name: _step(group, kind.best())
            for kind in self._tried(wanted)
            for group in kind.groups
        }

    def within(self, share: float, counts_at: Callable[[float], Counts]) -> Sizes:
        """The largest sizes that `counts_at` gives for a ratio whose time is at most that share of the whole graph's.

        A false position search; times are measured on the graph with all groups at once. Raises PreconditionError
        where the most that may be removed leaves more.
        """
        low, high = (0.0, 1.0), (MOST_RATIO, self._share(counts_at(MOST_RATIO)))
        if high[1] > share:
            raise PreconditionError(
                f"a latency budget of {share:g} cannot be met: with {MOST_RATIO:.0%} of every group gone "
                f"the graph takes {high[1]:.2f} of its time",
                hint="a larger budget, or more `groups`: `effc inspect MODEL --coupling` lists what keeps others whole",
            )
        for _ in range(MOST_STEPS):
            if high[1] > share - CLOSE or counts_at(low[0]) == counts_at(high[0]):
                break
            part = (low[1] - share + CLOSE / 2) / max(low[1] - high[1], 1e-9)
            ratio = low[0] + min(0.9, max(0.1, part)) * (high[0] - low[0])
            found = ratio, self._share(counts_at(ratio))
            low, high = (found, high) if found[1] > share else (low, found)
        counts = counts_at(high[0])
        kinds = [
            _Tried(groups=g, wanted=_middle(g, counts)) for g in kinds_of(self.coupling, counts)
        ]
        return self._sizes(counts, [(kind, kind.wanted) for kind in kinds], round(high[0], 4))

    def _share(self, counts: Counts) -> float:
        _, (row,) = _shares(self.clock([self.coupling.graph, self.shrink(counts)]))
        return float(np.exp(np.log(row).mean()))

    def _tried(self, wanted: Mapping[str, int]) -> list[_Tried]:
        """Every kind at its candidates."""
        kinds = [
            _Tried(groups=groups, wanted=_middle(groups, wanted))
            for groups in kinds_of(self.coupling, wanted)
        ]
        trials = [(kind, n) for kind in kinds for n in candidates(kind.groups[0], kind.wanted)]

        def graphs() -> Iterator[Graph]:
            yield self.coupling.graph
            for kind, size in trials:
                yield self.shrink({group.name: size for group in kind.groups})

        _, rows = _shares(self.clock(graphs()))
        for (kind, size), row in zip(trials, rows, strict=True):
            kind.shares[size] = row
        return kinds

    def _sizes(
        self, counts: Counts, kinds: Sequence[tuple[_Tried, int]], ratio: float | None = None
    ) -> Sizes:
        """The record; what is not measured yet is: all groups at once, and each kind as it is kept."""
        fresh = [
            kind
            for kind, kept in kinds
            if kept not in kind.shares or any(counts[g.name] != kept for g in kind.groups)
        ]

        def graphs() -> Iterator[Graph]:
            yield self.coupling.graph
            yield self.shrink(counts)
            for kind in fresh:
                yield self.shrink({g.name: counts[g.name] for g in kind.groups})

        whole_ms, (together, *rows) = _shares(self.clock(graphs()))
        bought = {id(kind): row for kind, row in zip(fresh, rows, strict=True)}
        gone = sum(self.coupling.groups[name].size - count for name, count in counts.items())
        return Sizes(
            counts=dict(counts), whole_ms=round(whole_ms, 4), ratio=ratio,
            together=_took(gone, together, whole_ms),
            kinds=tuple(
                Kind(
                    groups=tuple(g.name for g in kind.groups), size=kind.groups[0].size,
                    wanted=kind.wanted, kept=kept,
                    bought=_took(kept, bought.get(id(kind), kind.shares.get(kept)), whole_ms),
                    tried=tuple(_took(n, row, whole_ms) for n, row in sorted(kind.shares.items())),
                )
                for kind, kept in kinds
            ),
        )  # fmt: skip


@dataclass(kw_only=True)
class _Tried:
    """Groups that are alike, the middle of what was wished for them, and the share of the time by size, [sessions]."""

    groups: list[Group]
    wanted: int
    shares: dict[int, Array] = field(default_factory=dict)

    def best(self) -> int:
        """The size whose removed units buy most, where that is sure; all units where even that is really slower."""
        size = self.groups[0].size

        def bought(units: int) -> Array:
            found: Array = (1 - self.shares[units]) * size / (size - units)
            return found

        others = [s for s in self.shares if s != self.wanted]
        level = 1 - (1 - LEVEL) / max(1, len(others))  # sure of all at once (Bonferroni)
        better = [s for s in others if _is_sure(bought(s) - bought(self.wanted), level)]
        best = max(better, key=lambda s: float(bought(s).mean()), default=self.wanted)
        return size if _is_sure(self.shares[best] - 1) else best


def _is_sure(values: Array, level: float = LEVEL) -> bool:
    """Whether the mean is above 0, by more than floats are rounded."""
    return student(values, level).low > 1e-9


def _middle(groups: Iterable[Group], counts: Mapping[str, int]) -> int:
    return int(statistics.median_low(counts[group.name] for group in groups))


def _shares(times: Sequence[Sequence[float]]) -> tuple[float, list[Array]]:
    """Times of several graphs in ms, [sessions] each, as ms of the first and shares of it of the others."""
    whole, *rows = (np.asarray(row, np.float64) for row in times)
    return float(whole.mean()), [row / whole for row in rows]


def _took(units: int, shares: Any, whole_ms: float) -> Took:
    """Mean and interval over sessions of the logarithm: what disturbs a run multiplies it."""
    logs = np.log(shares)
    found = student(logs, LEVEL)
    ms, low, high = (round(whole_ms * math.exp(v), 4) for v in (logs.mean(), found.low, found.high))
    return Took(units=units, ms=ms, low=low, high=high)


def _step(group: Group, count: int) -> int:
    """The coarsest step that a count is a multiple of, and that is not more than an eighth of the group."""
    steps = (step_of(group, multiple) for multiple in MULTIPLES)
    return next((s for s in steps if count % s == 0 and s <= group.size / 8), 1)
