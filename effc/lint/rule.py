"""A rule of lint, and what it says of a place in a graph.

A rule looks at an ONNX graph and yields a `Hit` for each place that costs what its `cost` says on its targets. Where
the place can be put right without another number coming out, the hit knows how: `repair` edits the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

ERROR, WARNING = "error", "warning"
"""Does not open, does not run or gives other numbers; or takes time, room or accuracy for nothing."""
ORT, OPENVINO, TENSORRT = "ort", "openvino", "tensorrt"
TARGETS = (ORT, OPENVINO, TENSORRT)


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A place where a rule applies: the node, the tensor, and what of them shows it."""

    node: ir.Node
    tensor: str
    evidence: str
    repair: Callable[[], None] | None = field(default=None, compare=False)


Find = Callable[[ir.Graph], Iterator[Hit]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`what` is found, what it costs on the `targets`, and what to do about it."""

    id: str
    level: str
    targets: tuple[str, ...]
    what: str
    cost: str
    fix: str
    find: Find = field(repr=False, compare=False)


RULES: dict[str, Rule] = {}


def rule(
    id: str, level: str, *targets: str, what: str, cost: str, fix: str
) -> Callable[[Find], Find]:
    """Make a rule of a function that finds its places. Its id is never given to another."""

    def known(find: Find) -> Find:
        assert id not in RULES and set(targets) <= set(TARGETS)
        RULES[id] = Rule(
            id=id, level=level, targets=targets, what=what, cost=cost, fix=fix, find=find
        )
        return find

    return known
