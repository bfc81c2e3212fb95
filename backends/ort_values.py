"""Every node of an ONNX file on the values of the graph that it was made from: which of them computes something else?

torch's exporter names values after the nodes of the graph that it translates, and no rewrite gives a name away. So a
copy of the file is cut wherever a name is known: each value becomes an output, and who reads it reads an input that is
fed from the graph. One run of the copy then gives what every node makes of exact inputs, and a fault stays where it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from effc import scratch
from effc.backends import onnx
from effc.backends.base import Array
from effc.backends.onnx_export import prepared
from effc.backends.ort_engine import session, session_options
from effc.errors import LoweringError, first_line
from effc.ir.align import computed
from effc.ir.program import Graph
from effc.ir.select import site_names
from effc.ir.values import Values

EXACT = 1e-4
"""Relative L2 that a node of a file may be from the same node in torch."""
BLOCKWISE = 0.05
"""The same for products that round their float input to 8 bit, block by block."""
BORDER = 0.01
"""Share of codes that may be one step off, since a sum may lie on the border of two."""


@dataclass(frozen=True, kw_only=True)
class Off:
    """A value of a file that is not what the graph has under its name."""

    value: str
    site: str
    nodes: tuple[str, ...]
    """What computes it from known values: names of nodes of the file, the last first."""
    op: str
    rel_l2: float
    most: float
    """What it may be."""
    place: int

    @property
    def reason(self) -> str:
        far = f"{self.rel_l2:.2g} (relative L2, at most {self.most:g})"
        return f"on the same inputs {self.value} is {far} from the graph that it was made of"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a file computes otherwise than its graph, in order of execution, and how much of it was compared."""

    off: tuple[Off, ...]
    compared: int
    """Nodes of the file whose own value is known from the graph; others answer with the next such one behind them."""
    of: int
    """Nodes of the file that compute something from its inputs."""


def as_it_stands(
    path: Path, feeds: Mapping[str, Array], threads: int | None = None
) -> dict[str, Array]:
    """The outputs of an ONNX file none of whose nodes is fused, moved or computed beforehand."""
    opened = session(path, _options(optimized=False, threads=threads))
    names = [v.name for v in opened.get_outputs()]
    given = {v.name: feeds[v.name] for v in opened.get_inputs()}
    return dict(zip(names, opened.run(names, given), strict=True))


def _options(*, optimized: bool, threads: int | None = None) -> onnxruntime.SessionOptions:
    options = session_options(threads)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


class Nodes:
    """The values of a graph on one batch, under the names that they have in a file of that opset."""

    def __init__(self, graph: Graph, feeds: Mapping[str, Tensor], opset: int) -> None:
        self.graph = _exported(graph, opset)
        self.feeds = {name: self.graph.coded(name, value) for name, value in feeds.items()}
        self.known = _known(self.graph, feeds)

    def check(self, path: Path, *, optimized: bool = False) -> Checked:
        """Compare an ONNX file with the graph that it was made from.

        `optimized` lets onnxruntime fuse nodes, as far as that does not cross a known value.
        """
        model = ir.load(path)
        count = _computed(model)
        cut = _cut(model, self.known, self.graph)
        if not cut:
            return Checked(off=(), compared=0, of=count)
        mine = _run(model, cut, self.known, self.feeds, optimized)
        names = {n.name: site for n, site in site_names(self.graph).items()}
        found = []
        for place, (value, nodes) in enumerate(cut.items()):
            most = BLOCKWISE if any(_is_blockwise(n) for n in nodes) else EXACT
            gap = _gap(mine[value], self.known[value].numpy())
            if not gap <= most:
                found.append(
                    Off(
                        value=value, site=names[value], op=nodes[0].op_type, rel_l2=gap, most=most,
                        place=place, nodes=tuple(n.name or n.op_type for n in nodes),
                    )
                )  # fmt: skip
        last = {id(nodes[0]) for nodes in cut.values()}
        return Checked(off=tuple(found), compared=len(last), of=count)


def _exported(graph: Graph, opset: int) -> Graph:
    """The graph as it is translated, under the names that values have in a file."""
    program = prepared(graph.clone().exported, opset)
    return dataclasses.replace(graph, exported=program)


def _known(graph: Graph, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every computed tensor of the graph by name, but what depends on constants alone."""
    wanted = computed(graph)
    values = Values(graph, feeds, more=dict.fromkeys(wanted, 1))
    with torch.no_grad():
        found = {node.name: values(node) for node in wanted}
    return {name: v.contiguous() for name, v in found.items() if isinstance(v, Tensor)}


def _computed(model: ir.Model) -> int:
    """How many nodes of a model compute something from its inputs."""
    inputs, found = set(model.graph.inputs), set()
    for node in model.graph:
        if any(v is not None and (v in inputs or v.producer() in found) for v in node.inputs):
            found.add(node)
    return len(found)


def _cut(model: ir.Model, known: Mapping[str, Tensor], graph: Graph) -> dict[str, list[ir.Node]]:
    """Cut a model at its known values, in place; gives those that it computes, with the nodes that do."""
    (output,) = [n for n in graph.fx.nodes if n.op == "output"]
    returned = dict(zip(graph.outputs, output.args[0], strict=True))
    names = {name: node.name for name, node in returned.items()}
    values: dict[str, ir.Value] = {}
    for node in model.graph:
        for value in node.outputs:
            name = (value.name or "").removesuffix("_inner")
            name = names.get(name, name) if value.is_graph_output() else name
            if name in known and name not in values:
                values[name] = value
    ours = set(values.values())
    nodes = {name: _region(value, ours) for name, value in values.items()}
    model.graph.outputs.clear()
    for name, value in values.items():
        kind = ir.TensorType(ir.DataType.from_numpy(known[name].numpy().dtype))
        fed = ir.Value(name=f"{name}::fed", type=kind, shape=ir.Shape(known[name].shape))
        value.replace_all_uses_with(fed)
        value.name, value.type, value.shape = f"{name}::made", kind, None
        model.graph.inputs.append(fed)
        model.graph.outputs.append(value)
    return nodes


def _region(value: ir.Value, known: set[ir.Value]) -> list[ir.Node]:
    """The nodes that compute a value from known ones and constants."""
    found: list[ir.Node] = []
    todo = [value.producer()]
    while todo:
        node = todo.pop(0)
        if node is None or node in found:
            continue
        found.append(node)
        todo += [v.producer() for v in node.inputs if v is not None and v not in known]
    return found


def _run(
    model: ir.Model,
    cut: Mapping[str, list[ir.Node]],
    known: Mapping[str, Tensor],
    feeds: Mapping[str, Tensor],
    optimized: bool,
) -> dict[str, Array]:
    with scratch.held() as place:
        files = onnx.save(model, place)
        try:
            opened = session(place / files[0], _options(optimized=optimized))
            wanted = {v.name for v in opened.get_inputs()}
            given = {f"{name}::fed": known[name].numpy() for name in cut}
            given |= {name: value.numpy() for name, value in feeds.items()}
            made = opened.run(
                [f"{name}::made" for name in cut], {k: v for k, v in given.items() if k in wanted}
            )
        except Exception as error:
            raise LoweringError(
                f"onnxruntime cannot run the nodes of the file one by one: {first_line(error)}",
                hint="compile with the onnxruntime of the manifest's versions",
            ) from error
    return dict(zip(cut, made, strict=True))


def _is_blockwise(node: ir.Node) -> bool:
    return node.op_type == "MatMulNBits" and node.attributes.get_int("accuracy_level", 0) == 4


def _gap(mine: Any, theirs: Array) -> float:
    """‖mine − theirs‖ / ‖theirs‖; a few codes may be one step off."""
    a, b = np.asarray(mine), np.asarray(theirs)
    if a.shape != b.shape:
        return float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, x - y)
    if not np.isfinite(gap).all():
        return float("inf")
    if a.dtype in (np.uint8, np.int8) and np.abs(gap).max(initial=0) <= 1:
        few = max(1, int(BORDER * gap.size))
        if np.count_nonzero(gap) <= few:
            return 0.0
    norm = float(np.linalg.norm(np.where(np.isfinite(y), y, 0.0)))
    return float(np.linalg.norm(gap)) / norm if norm else float(np.linalg.norm(gap))
