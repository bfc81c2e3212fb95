"""What a pass wants measured: the value of one node, by one collector, under a key that outlives the trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor, fx

from effc.quant.scheme import Scheme


class Collector(Protocol):
    """Fixed-size statistics of a stream of tensors."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None: ...

    def merge(self, other: Self) -> Self: ...

    def range(self, scheme: Scheme) -> tuple[float, float]: ...

    def held_bytes(self, shape: Sequence[int]) -> int:
        """What it takes for values of a shape, however many are seen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Watch `node` with `collector`; two probes of one key are one measurement."""

    key: str
    node: fx.Node
    collector: Any


def fitting(mask: Tensor | None, value: Tensor, positions: int = 1) -> Tensor | None:
    """The mask where it is of this value: over its first axis and the one of its positions."""
    if mask is None or value.dim() < 3:
        return None
    return mask if (value.shape[0], value.shape[positions]) == mask.shape else None


def held_bytes(probes: Iterable[Probe]) -> int:
    """What the collectors of probes take together, with the largest twice: a batch has one of its own first.

    A collector that several probes share counts once.
    """
    keys = {probe.key: probe for probe in probes}
    found = {id(probe.collector): probe for probe in keys.values()}
    each: list[int] = [p.collector.held_bytes(p.node.meta["val"].shape) for p in found.values()]
    return sum(each) + max(each, default=0)
