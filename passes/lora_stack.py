"""Several adapters of low rank in one engine, chosen for every row of a batch.

    y = W x + b + B[k] A[k] x          k, one number a row: which adapter it has, 0 for none

A [adapters + 1, r, in] and B [adapters + 1, out, r] hold the adapters of a layer above each other, each with its scale
in B, and narrower ones filled up with 0. A row reads its own two matrices and nothing of another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effc.adapter import Adapter, Low, read
from effc.errors import PreconditionError
from effc.ir.edit import add_input, redirect
from effc.ir.program import Graph, Program
from effc.ir.splice import small_graph, splice
from effc.nn import lora
from effc.passes.base import Pass, Stats
from effc.passes.lora import Site, fitted, hold_recorded, read_of
from effc.passes.rank1 import first_rows, refuse_rows

INPUT = "adapter"
"""The input that says which adapter a row has."""


class Stacked(nn.Module):
    """What a layer gives and what each row's adapter adds, of x [batch, …, in], `base` and k [batch]."""

    stack_A: Tensor
    stack_B: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("stack_A", a)
        self.register_buffer("stack_B", b)

    def forward(self, x: Tensor, base: Tensor, which: Tensor) -> Tensor:
        a = self.stack_A.index_select(0, which)
        b = self.stack_B.index_select(0, which)
        rows = x.unsqueeze(1) if x.dim() == 2 else x
        change = (rows @ a.transpose(1, 2)) @ b.transpose(1, 2)
        return base + (change.squeeze(1) if x.dim() == 2 else change)


@dataclass(frozen=True, kw_only=True)
class StackLora(Pass):
    """Puts several adapters of PEFT beside their layers; an input `adapter` [batch] says which of them a row has.

    0 is none of them, and k is the k-th of `adapters`.
    """

    name = "stack-lora"
    renews = True
    effect = "lossy"
    is_meant = True

    adapters: tuple[str, ...] = ()

    def requires(self, program: Program) -> None:
        if not self.adapters:
            raise PreconditionError(
                f"{self.name} puts nothing anywhere",
                hint="adapters: [DIR, DIR], as PEFT wrote them",
            )
        given = [read(Path(place)) for place in self.adapters]
        for place, adapter in zip(self.adapters, given, strict=True):
            if any(low.magnitude is not None for low in adapter.layers.values()):
                raise PreconditionError(
                    f"{self.name}: {place} is in DoRA's form, which scales what the layer itself gives",
                    hint="merge it, or train it as lora or rslora",
                )
        for graph in program:
            if self.takes(graph.role):
                self._refuse(graph, given)

    def _refuse(self, graph: Graph, given: Sequence[Adapter]) -> None:
        """Raise PreconditionError where a layer cannot have an adapter for every row."""
        if INPUT in graph.inputs:
            raise PreconditionError(
                f"{self.name}: the graph has an input {INPUT!r} already",
                where=f"graph {graph.role!r}",
                hint="put all adapters into one stack-lora",
            )
        sites = [site for site, _ in self._stacks(graph, given)]
        refuse_rows(self.name, graph, sites, "merge-lora takes an adapter of such a layer")
        for site in sites:
            if any(layer.args[0].meta["val"].dim() > 3 for layer in site.layers):  # type: ignore[union-attr]
                raise PreconditionError(
                    f"{self.name}: {site.name} reads more than a sequence for every row",
                    where=f"graph {graph.role!r}",
                    hint="adapters stand beside layers that read [batch, in] or [batch, length, in]",
                )

    def _stacks(
        self, graph: Graph, given: Sequence[Adapter]
    ) -> list[tuple[Site, list[tuple[int, Low, bool]]]]:
        """Sites, and which adapters have something for each."""
        found: dict[str, tuple[Site, list[tuple[int, Low, bool]]]] = {}
        for place, adapter in enumerate(given, 1):
            for site, low in fitted(graph, adapter, self.adapters[place - 1]):
                found.setdefault(site.name, (site, []))[1].append((place, low, adapter.rooted))
        return list(found.values())

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        given = [read(Path(place)) for place in self.adapters]
        digests = "+".join(adapter.digest for adapter in given)
        hold_recorded(graph, stats, digests, " and ".join(self.adapters))
        stacks = self._stacks(graph, given)
        like = first_rows(graph)
        which = add_input(graph, INPUT, like, torch.ones(2, dtype=torch.int64))
        traced: dict[Any, Graph] = {}
        changed = 0
        for site, lows in stacks:
            module = Stacked(*_above_each_other(lows, len(given)))
            for layer in site.layers:
                inputs: list[Any] = [read_of(layer), layer, which]
                values = [node.meta["val"] for node in inputs]
                key = (len(module.stack_A[0]), *((str(tuple(v.shape)), v.dtype) for v in values))
                if key not in traced:
                    traced[key] = small_graph(module, values)
                users = list(layer.users)
                (made,) = splice(
                    graph, layer.next, module, inputs, site.name, like=traced[key], scope=layer
                )
                redirect(graph, layer, made, users)
                changed += 1
        stats.notes["adapters"] = len(given)
        return changed


def _above_each_other(lows: Sequence[tuple[int, Low, bool]], count: int) -> tuple[Tensor, Tensor]:
    """A [count + 1, r, in] and B [count + 1, out, r], with the scale in B; 0 where an adapter has nothing."""
    first = lows[0][1]
    rank = max(low.rank for _, low, _ in lows)
    a = first.a.new_zeros(count + 1, rank, first.a.shape[1])
    b = first.b.new_zeros(count + 1, len(first.b), rank)
    for place, low, rooted in lows:
        scale = lora.scale_of(low.alpha, low.rank, rooted=rooted)
        a[place, : low.rank] = low.a
        b[place, :, : low.rank] = (low.b.double() * scale).to(low.b.dtype)
    return a, b
