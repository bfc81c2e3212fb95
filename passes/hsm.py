"""Hybrid sparsification modules in a graph: put behind every writer of a residual stream, and their mask made hard.

`insert-hsm` puts them in, and the graph computes what it did. `tune` with the term `hsm` trains them while the mask
closes. `harden-hsm` makes the mask 0 and 1, and `fold-hsm` (`passes/hsm_fold.py`) takes the modules out again, and the
dropped width with them (PAT, AAAI 2025, arXiv 2408.14721; `effc/nn/hsm.py` has the formulas).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, fx

from effc.calib.probe import Probe
from effc.errors import CalibrationError, PreconditionError
from effc.ir.axes import Stop, of
from effc.ir.edit import lift, replace, sizes_of, tensor_name
from effc.ir.program import Graph, Origin, Program
from effc.ir.select import op_name
from effc.ir.splice import small_graph, splice
from effc.nn import hsm
from effc.nn.hsm import WORD, Gate, Hybrid, Mode
from effc.passes import layernorm
from effc.passes.base import Pass, Stats
from effc.passes.coupling import Coupling, Group, coupled_dims
from effc.passes.importance import IMPORTANCES
from effc.passes.tune import Tune
from effc.passes.writers import Place, places
from effc.table import unknown

log = logging.getLogger(__name__)

WIDE = 1024
"""Widths from here on are kept in multiples of 64, as kernels of GPUs cut them, and those below in multiples of 8."""


@dataclass(frozen=True, kw_only=True)
class InsertHsm(Pass):
    """Puts a hybrid sparsification module behind every writer of a residual stream; outputs stay as they are.

    `ratio` is the part of the width that will go, in whole multiples of `align`. `rank` is that of the change of basis,
    a number or a share of the width. `mask` says whether the channels that go are learned, or fixed and only faded out.
    The mask starts in the order of an `importance`, by `magnitude` in the mode effc and by none in the others, or the
    least important channels are those that are fixed.
    """

    name = "insert-hsm"
    chain = "hsm"

    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    align: Annotated[int, Field(ge=1)] | None = None
    rank: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] = 0.05
    mode: Mode = "effc"
    mask: Literal["trained", "frozen", "random"] = "trained"
    importance: str | None = None
    identity: bool = True
    embedding: Literal["full", "mask-only"] = "full"
    group: str | None = None
    seed: int = 0

    @property
    def measures(self) -> bool:
        return self.ranking is not None and bool(IMPORTANCES[self.ranking].measures)

    @property
    def ranking(self) -> str | None:
        """What channels are ranked by; None where by nothing."""
        if self.importance is None:
            return "magnitude" if self.mode == "effc" and self.mask != "random" else None
        return None if self.importance == "none" else self.importance

    def agrees(self, behind: Sequence[Pass]) -> None:
        names = [pass_.name for pass_ in behind]
        if self.mask != "trained" or HardenHsm.name not in names:
            return
        between = behind[: names.index(HardenHsm.name)]
        if not any(isinstance(p, Tune) and any(t.term == WORD for t in p.terms) for p in between):
            raise PreconditionError(
                f"the mask of {self.name} is to be trained, and nothing behind it trains it",
                hint="put {pass: tune, terms: [hsm], …} in front of harden-hsm, or set mask: random",
            )

    def requires(self, program: Program) -> None:
        for graph in program:
            if not self.takes(graph.role):
                continue
            if WORD in graph.pending:
                raise PreconditionError(
                    f"{self.name}: the graph has hybrid sparsification modules already",
                    where=f"graph {graph.role!r}",
                    hint="put harden-hsm and fold-hsm behind the first ones, or leave the second insert-hsm out",
                )
            group, _ = self._plan(coupled_dims(graph))
            if self.ranking is not None:
                IMPORTANCES[self.ranking]  # a word that nobody knows is refused before any work
                if self.mask == "random":
                    raise PreconditionError(
                        f"{self.name}: a random mask asks no importance",
                        hint="leave `importance` out, or set mask: frozen",
                    )
            self.count(group.size)
            self.rank_of(group.size)

    def count(self, width: int) -> int:
        """How many channels stay. Raises PreconditionError where no aligned number is left."""
        if self.ratio is None:
            raise PreconditionError(
                f"{self.name} needs the part of the width that is to go", hint="ratio: 0.25"
            )
        step = self.align or (64 if width >= WIDE else 8)
        found = step * math.ceil(width * (1 - self.ratio) / step - 0.5)
        if not 0 < found < width:
            raise PreconditionError(
                f"{self.name}: {1 - self.ratio:.3g} of a width of {width} is no multiple of {step} that is "
                f"above 0 and below {width}",
                hint="another ratio, or a smaller `align`",
            )
        return found

    def rank_of(self, width: int) -> int:
        """The rank of the change of basis. Raises PreconditionError where it is not below the width."""
        found = max(1, int(self.rank * width)) if isinstance(self.rank, float) else self.rank
        if found >= width:
            raise PreconditionError(
                f"{self.name}: rank {found} is not below the width {width}", hint="rank: 0.05"
            )
        return found

    def probes(self, graph: Graph) -> Iterable[Probe]:
        if self.ranking is not None:
            coupling = coupled_dims(graph)
            group, _ = self._plan(coupling)
            yield from IMPORTANCES[self.ranking]().probes(coupling, group)

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        coupling = coupled_dims(graph)
        group, found = self._plan(coupling)
        width = group.size
        count, rank = self.count(width), self.rank_of(width)
        dtype = found[0].value.meta["val"].dtype
        mask = self._mask(coupling, group, count, stats).to(dtype)
        start = next(iter(graph.nodes))
        place_on = "meta" if graph.is_of_shapes else "cpu"
        module = Gate(mask, is_trained=self.mask == "trained").to(place_on)
        (gate,) = _spliced(graph, start, module, [], WORD)
        traced: dict[Any, Graph] = {}
        for number, place in enumerate(found):
            mask_only = place.is_table and self.embedding == "mask-only"
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            hybrid = Hybrid(
                width, 0 if mask_only else rank, mode=self.mode, identity=self.identity, draw=draw, dtype=dtype
            )  # fmt: skip
            _put(graph, place, hybrid.to(place_on), gate, traced)
        graph.pending[WORD] = {
            "group": group.name, "width": width, "kept": count, "mode": self.mode, "mask": self.mask,
            "importance": self.ranking, "places": [place.name for place in found],
        }  # fmt: skip
        stats.notes["width"] = {"group": group.name, "of": width, "stay": count, "rank": rank}
        return len(found)

    def _mask(self, coupling: Coupling, group: Group, count: int, stats: Stats) -> Tensor:
        """m at first: 0, or from ½ down to −½ by importance; of a fixed mask 1 for what stays and −1 for the rest."""
        width, key = group.size, f"{coupling.graph.role}/{group.name}"
        if self.ranking is None and self.mask == "trained":
            return torch.zeros(width)
        order = _known(
            stats.decide(key, partial(self._order, coupling, group, count, stats)),
            width,
            width,
            key,
        )
        found = torch.full((width,), -1.0)
        found[order[:count]] = 1.0
        if self.mask == "trained":
            found[order] = torch.linspace(0.5, -0.5, width)
        return found

    def _order(self, coupling: Coupling, group: Group, count: int, stats: Stats) -> list[int]:
        """Channels, those that stay first."""
        width = group.size
        if self.mask == "random":
            draw = torch.Generator().manual_seed(self.seed)
            return [int(place) for place in torch.randperm(width, generator=draw)]
        if self.ranking is not None and not coupling.graph.is_of_shapes:
            scores = IMPORTANCES[self.ranking]().scores(coupling, group, stats)
            return [int(place) for place in hsm.ranked(scores)]
        first = (
            width - count if self.mode == "paper" else 0
        )  # the paper takes the first away, its code the last
        return [(first + place) % width for place in range(width)]

    def _plan(self, coupling: Coupling) -> tuple[Group, list[Place]]:
        """The width and its places. Raises PreconditionError with the reason where there are none."""
        if self.group is not None and self.group not in coupling.groups:
            raise PreconditionError(
                unknown("group", self.group, coupling.groups),
                hint="`effc inspect MODEL --coupling` lists the groups",
            )
        plans: list[tuple[Group, list[Place]]] = []
        refusals: list[tuple[str, Stop]] = []
        for group in _widths(coupling):
            if self.group not in (None, group.name):
                continue
            made = group.stop or places(coupling, group.unit)
            if isinstance(made, Stop):
                refusals.append((group.name, made))
            elif len(made) > 1:
                plans.append((group, made))
        if len(plans) == 1:
            return plans[0]
        if plans:
            names = [group.name for group, _ in plans]
            raise PreconditionError(
                f"{self.name}: there are several residual streams: {', '.join(names)}",
                hint=f"name one: group: {names[0]!r}",
            )
        raise self._refusal(coupling, refusals)

    def _refusal(self, coupling: Coupling, refusals: list[tuple[str, Stop]]) -> PreconditionError:
        streams, norms = layernorm.plan(coupling.graph)
        if streams:
            return PreconditionError(
                f"{self.name}: a LayerNorm takes the mean over a masked width too, and an RMSNorm does not",
                hint="put layernorm-to-rmsnorm in front",
            )
        if norms:
            name, why = norms[0]
            return PreconditionError(
                f"{self.name}: a mask over the width does not pass its LayerNorms; {name}: {why}",
                hint="this model's width cannot be pruned; prune-dims takes its other groups",
            )
        if not refusals:
            return PreconditionError(
                f"{self.name}: no norm reads a residual stream here",
                hint="prune-dims takes the groups that `effc inspect MODEL --coupling` lists",
            )
        name, why = refusals[0]
        return PreconditionError(
            f"{self.name}: {name} cannot be masked: {why}",
            hint=why.hint
            or "prune-dims takes the groups that `effc inspect MODEL --coupling` lists",
        )


@dataclass(frozen=True, kw_only=True)
class HardenHsm(Pass):
    """Makes the mask of hybrid sparsification modules 0 and 1: the channels of the largest mask stay."""

    name = "harden-hsm"
    chain = "hsm"
    effect = "lossy"
    renews = True

    def requires(self, program: Program) -> None:
        found = [inserted(graph, self.name) for graph in program if self.takes(graph.role)]
        if any(state.get("is_hard") for state in found):
            raise PreconditionError(
                f"{self.name}: the mask is hard already", hint="leave the second one out"
            )

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        state = graph.pending[WORD]
        tensors = graph.tensors()
        mask, tau, beta = (tensors[f"{WORD}.{name}"] for name in ("mask", "tau", "beta"))
        key = f"{graph.role}/{state['group']}"
        if not mask.is_meta and not bool(torch.isfinite(mask).all()):
            raise PreconditionError(
                f"{self.name}: the mask holds values that are no numbers",
                where=f"graph {graph.role!r}",
                hint="train it again with a lower `lr` or `mask_lr`",
            )
        if mask.is_meta:  # of a shape alone: some stay
            made = list(range(state["kept"]))
        else:
            made = stats.decide(key, lambda: hsm.kept(mask, state["kept"]).tolist())
        chosen = _known(made, state["width"], state["kept"], key)
        keep = torch.zeros(mask.shape)
        keep[list(chosen)] = 1
        if not mask.is_meta:
            stats.notes["gates"] = told = gates(mask, tau, beta, keep)
            _warn(told, is_open=not bool(tau))
        node = lift(graph, f"{WORD}.keep", keep, Origin(f"{WORD}.keep", (f"of {WORD}.mask",)))
        replace(graph, _gate(graph), node)
        graph.pending[WORD] = {**state, "is_hard": True}
        return 1


def gates(mask: Tensor, tau: Tensor, beta: Tensor, keep: Tensor) -> dict[str, Any]:
    """How far the gates are from the 0 and 1 that they become: the worst, and how many have not decided."""
    values = hsm.gate(mask, tau, beta).detach()
    apart = (values.clamp(0, 1) - values.clamp(0, 1).round()).abs()
    return {
        "kept": int(keep.sum()), "of": len(keep), "gap": float((values - keep).abs().max()),
        "undecided": int((apart > hsm.EDGE).sum()), "crossed": int(((values > 0.5) != (keep > 0.5)).sum()),
    }  # fmt: skip


def _warn(told: dict[str, Any], *, is_open: bool) -> None:
    """Say where a mask has not become what it is taken for."""
    hint = "train it for longer, or with a higher mask_lr: {pass: tune, terms: [{term: hsm, mask_lr: 0.01}]}"
    if is_open:
        log.warning(
            "harden-hsm: all gates are open as insert-hsm left them: nothing has trained the mask; "
            "put {pass: tune, terms: [hsm], …} in front"
        )
    elif told["crossed"]:
        log.warning(
            "harden-hsm: %d of %d gates are on the other side of what %d kept channels make of them; %s",
            told["crossed"], told["of"], told["kept"], hint,
        )  # fmt: skip
    elif told["undecided"]:
        log.warning(
            "harden-hsm: %d of %d gates had not decided, the worst by %.2f; %s",
            told["undecided"], told["of"], told["gap"], hint,
        )  # fmt: skip


def inserted(graph: Graph, name: str) -> dict[str, Any]:
    """What `insert-hsm` left to know. Raises PreconditionError for the pass `name` where it left nothing."""
    if WORD not in graph.pending:
        raise PreconditionError(
            f"{name}: there are no hybrid sparsification modules in the graph",
            where=f"graph {graph.role!r}",
            hint="put insert-hsm in front, and tune between",
        )
    return graph.pending[WORD]


# -- in the graph


def _widths(coupling: Coupling) -> list[Group]:
    """The widths that norms go over, in order of execution."""
    groups = {group.unit: group for group in coupling.groups.values()}
    reading = coupling.reading
    found = {}
    for node in coupling.graph.nodes:
        if op_name(node) in ("rms_norm", "layer_norm"):
            unit = of(reading.of(node)[-1])
            if unit in groups:
                found[unit] = groups[unit]
    return list(found.values())


def _put(
    graph: Graph, place: Place, module: Hybrid, gate: fx.Node, traced: dict[Any, Graph]
) -> None:
    value, seen = place.value, place.value.meta["val"]
    order = list(graph.fx.nodes)
    before = value.next if value.op != "placeholder" else min(place.readers, key=order.index)
    key = (module.rank, sizes_of(seen.shape), seen.dtype)
    if key not in traced:
        traced[key] = small_graph(module, [seen, gate.meta["val"]])
    name = f"{WORD}.{place.name}"
    (out,) = _spliced(graph, before, module, [value, gate], name, like=traced[key])
    for reader in place.readers:
        reader.replace_input_with(value, out)


def _spliced(
    graph: Graph,
    before: fx.Node,
    module: torch.nn.Module,
    inputs: list[fx.Node],
    name: str,
    like: Graph | None = None,
) -> tuple[fx.Node, ...]:
    """`splice`, with nodes that say that they are of a module of that name, and not of the one they stand in."""
    first = before.prev
    found = splice(graph, before, module, inputs, name, like=like)
    node = before.prev
    while node is not first and node.op == "call_function":
        node.meta["nn_module_stack"] = {name: (name, type(module).__name__)}
        node = node.prev
    return found


def _gate(graph: Graph) -> fx.Node:
    """The node of M."""
    for node in graph.nodes:
        if op_name(node) == "add" and tensor_name(graph, node.args[1]) == f"{WORD}.beta":
            return node
    raise AssertionError("the gate is gone")


def _known(units: Any, width: int, count: int, key: str) -> list[int]:
    """Channels from a record. Raises CalibrationError where they are none of this graph's."""
    fits = isinstance(units, list) and len(units) == len(set(units)) == count
    if not fits or not all(type(u) is int and 0 <= u < width for u in units):
        raise CalibrationError(
            f"the recorded channels of {key!r} are not {count} of {width}",
            hint="the record is of another recipe or model; compile again without it",
        )
    return list(units)
