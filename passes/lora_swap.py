"""Adapters of low rank as an engine takes them in exchange for others, while it runs.

    y = W x + b + s B A x   →   y = W x + b + (x Aᵀ) (s Bᵀ)          Aᵀ [in, r],  s Bᵀ [r, out]

The two are constants of the graph under the names `LAYER.swap_A` and `LAYER.swap_B`, as they are multiplied: with
nothing folded into them, transposed or scaled behind. A backend whose runtime can put other values in the place of
constants leaves them open for that (`backends/ort_adapter.py`); for any other they are what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from effc.errors import PreconditionError
from effc.ir.edit import replace, tensor_of
from effc.ir.program import Graph, Program
from effc.ir.splice import matched, small_graph, splice
from effc.nn import lora
from effc.passes.base import Pass, Stats
from effc.passes.lora import Place, adapted, places, read_of


class Swapped(nn.Module):
    """What a layer gives and the change beside it, of x […, in] and `base` […, out]."""

    swap_A: Tensor
    swap_B: Tensor

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.register_buffer(lora.SWAP_A, a)
        self.register_buffer(lora.SWAP_B, b)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        return base + torch.matmul(torch.matmul(x, self.swap_A), self.swap_B)


@dataclass(frozen=True, kw_only=True)
class SwapLora(Pass):
    """Leaves the adapters of linear layers open to be exchanged in a running engine."""

    name = "swap-lora"

    def requires(self, program: Program) -> None:
        for graph in program:
            if not self.takes(graph.role):
                continue
            found = places(graph)
            if not found:
                raise PreconditionError(
                    f"{self.name}: no adapter is attached to {graph.role!r}",
                    hint="put `attach-lora` in front of it, and no `merge-lora`",
                )
            for place in found:
                if place.magnitude is not None:
                    raise PreconditionError(
                        f"{self.name}: the adapter of {adapted(graph, place)} is in DoRA's form, "
                        "which scales what the layer itself gives",
                        hint="merge it, or train it as lora or rslora",
                    )

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        found = places(graph)
        traced: dict[Any, Graph] = {}
        known: dict[tuple[fx.Node, fx.Node], dict[str, fx.Node]] = {}
        stems: list[str] = []
        for place in found:
            module = _module(graph, place)
            inputs: list[Any] = [read_of(place.layer), place.layer]
            values = [node.meta["val"] for node in inputs]
            key = module.swap_A.shape, *((str(tuple(v.shape)), v.dtype) for v in values)
            if key not in traced:
                traced[key] = small_graph(module, values)
            shared = known.get((place.a, place.b))
            (made,) = splice(
                graph, place.output, module, inputs, adapted(graph, place), like=traced[key],
                scope=place.layer, shared=shared,
            )  # fmt: skip
            hit = matched(traced[key], made) or {}
            if shared is None:
                known[place.a, place.b] = {word: hit[word] for word in (lora.SWAP_A, lora.SWAP_B)}
                stems.append(adapted(graph, place))
            replace(graph, place.output, made)
        graph.pending[lora.SWAP] = {"layers": stems}
        return len(found)


def _module(graph: Graph, place: Place) -> Swapped:
    a, b = tensor_of(graph, place.a), tensor_of(graph, place.b)
    return Swapped(
        a.detach().T.contiguous(), (b.detach().double().T * place.scale).to(b.dtype).contiguous()
    )
