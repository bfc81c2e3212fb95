"""Rows at a time, so that a run stays within the memory that the user gives it (`--max-ram`).

What a batch needs is read from the graph's shapes (`ir.memory`), so no run has to fail before a smaller one is tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from effc.errors import CalibrationError
from effc.ir.memory import peak_bytes, whole_bytes
from effc.ir.program import Graph
from effc.progress import resident_mb

Array = np.ndarray[Any, np.dtype[Any]]
Dims = Mapping[str, Mapping[int, str]]

KERNELS = 2.0
"""A run needs this many times its activations: kernels have room of their own, and memory comes in pieces."""


@dataclass(frozen=True)
class Room:
    """Bytes that activations may take, and how the rows of a batch are found: by the dimension called `batch`."""

    graph: Graph
    dims: Dims
    left_bytes: float
    max_bytes: int
    statistics_bytes: int = 0
    """What of the rest is kept for what a pass measures."""
    keeps_all: bool = False
    """Whether every activation is kept to the end, for slopes."""

    def pieces(self, feeds: Mapping[str, Array]) -> Iterator[dict[str, Array]]:
        """The feeds in as few pieces as fit. Raises CalibrationError where a single row does not."""
        rows = self.rows(feeds)
        axes = {n: a for n, named in self._axes().items() for a, w in named.items() if w == "batch"}
        count = max((feeds[n].shape[a] for n, a in axes.items() if n in feeds), default=1)
        if rows >= count:
            yield dict(feeds)
            return
        for start in range(0, count, rows):
            chosen = slice(start, start + rows)
            yield {
                name: value[(slice(None),) * axes[name] + (chosen,)] if name in axes else value
                for name, value in feeds.items()
            }

    def rows(self, feeds: Mapping[str, Array]) -> int:
        """How many rows of these fit at once: all of them, or a half, a quarter …"""
        sizes: dict[str, int] = {}
        for name, axes in self._axes().items():
            for axis, word in axes.items():
                if name in feeds:
                    sizes.setdefault(word, feeds[name].shape[axis])
        count = sizes.get("batch", 1)
        while True:
            held = whole_bytes if self.keeps_all else peak_bytes
            needed = KERNELS * held(self.graph, {**sizes, "batch": count})
            if needed <= self.left_bytes:
                return count
            if count == 1:
                raise self._refusal(sizes, needed)
            count = (count + 1) // 2

    def beside(self, statistics_bytes: int, *, keeps_all: bool = False) -> Room:
        """The room that is left beside what a pass measures."""
        left = self.left_bytes - statistics_bytes
        return dataclasses.replace(
            self, left_bytes=left, statistics_bytes=statistics_bytes, keeps_all=keeps_all
        )

    def _refusal(self, sizes: Mapping[str, int], needed: float) -> CalibrationError:
        beside, hint = "", "give it more, or shorter samples (calib: {max_length: N})"
        if self.statistics_bytes > needed:
            beside = f" beside {self.statistics_bytes / 1e6:.0f} MB of statistics"
            hint = "give it more, or take fewer layers by `select`; `rounding: nearest` measures less than gptq"
        if self.left_bytes + self.statistics_bytes <= 0:
            hint = "the process and the weights hold more than that already: give it more"
        return CalibrationError(
            f"one sample of shape {_words(sizes)} needs about {needed / 1e6:.0f} MB, and of --max-ram "
            f"{self.max_bytes / 1e6:.0f} MB {max(self.left_bytes, 0) / 1e6:.0f} MB are left{beside}",
            hint=hint,
        )

    def _axes(self) -> Dims:
        return {name: self.dims.get(name, {0: "batch"}) for name in self.graph.inputs}


def within(max_bytes: int, graph: Graph, dims: Dims) -> Room:
    """The room that is left of `max_bytes` beside what this process holds already, and an engine's own weights."""
    used = (resident_mb() or 0.0) * 1e6
    used += sum(t.numel() * t.element_size() for t in graph.tensors().values())
    return Room(graph, dims, max_bytes - used, max_bytes)


def _words(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{word} {size}" for word, size in {**sizes, "batch": 1}.items())
