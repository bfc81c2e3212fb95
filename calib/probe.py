"""What a pass wants measured: the value of one node, by one collector, under a key that outlives the trace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

from torch import Tensor, fx

from effc.quant.scheme import Scheme


class Collector(Protocol):
    """Fixed-size statistics of a stream of tensors."""

    def update(self, x: Tensor, mask: Tensor | None = None) -> None: ...

    def merge(self, other: Self) -> Self: ...

    def range(self, scheme: Scheme) -> tuple[float, float]: ...


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Watch `node` with `collector`; two probes of one key are one measurement."""

    key: str
    node: fx.Node
    collector: Any
