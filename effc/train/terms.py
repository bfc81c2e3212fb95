"""What a training does beside lowering its loss: terms, by the word that a recipe uses.

A term belongs to what a pass put into a graph (`Graph.pending`). It may add to the loss, put values in the place of
tensors at every step (a schedule, or a parameter cut off from its gradient), have a rate of its own for some of them,
say what held-out samples judge, and tell of itself along the way. All of it hangs on the step and on the tensors alone,
so that a training that goes on after a break is the one that had none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from effc.ir.program import Graph

Live = Mapping[str, Tensor]
"""The tensors that are trained, by the names of the graph."""


@dataclass(frozen=True, kw_only=True)
class Own:
    """How a tensor is trained that does not go with the others: its rate at every step, and a norm of its own."""

    rate: Callable[[int], float]
    weight_decay: float = 0.0


class Course(Protocol):
    """A term in one training of one graph; one that inherits says only what it does."""

    word: str

    def owns(self) -> Mapping[str, Own]:
        """Tensors with a rate of their own, whose gradient is clipped by itself."""
        return {}

    def stands(self, step: int, live: Live) -> dict[str, Tensor]:
        """What stands in the graph in a step, and behind the last in what comes out, by the names of tensors."""
        return {}

    def judged(self, step: int, live: Live) -> dict[str, Tensor]:
        """What stands there where held-out samples judge; nothing where that is the same."""
        return {}

    def is_ready(self, step: int) -> bool:
        """Whether what is trained may come out as it is behind so many steps."""
        return True

    def marks(self) -> Collection[int]:
        """Steps behind which the curve is to have a point, beside those that it has anyway."""
        return ()

    def losses(self, step: int, live: Live) -> dict[str, Tensor]:
        """What is added to the loss, by name."""
        return {}

    def told(self, step: int, live: Live) -> dict[str, Any]:
        """What a curve shows of it: numbers, and histograms as lists of counts."""
        ...


class Term(Protocol):
    """The options of a term, which begin a course."""

    @property
    def term(self) -> str: ...

    def begin(self, graph: Graph, steps: int, rate: Callable[[int], float]) -> Course:
        """Raises TuneError where the graph has not what the term is for. `rate` is that of all other tensors."""
        ...


def begin(
    terms: Sequence[Term], graph: Graph, steps: int, rate: Callable[[int], float]
) -> list[Course]:
    return [term.begin(graph, steps, rate) for term in terms]
