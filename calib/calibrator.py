"""Runs a graph over batches and lets collectors watch named nodes.

An `fx.Interpreter` runs what the watched nodes hang on and nothing else, and frees every value after its last use, so
memory is that of one batch and a few fixed-size sketches, however many samples there are. No module is changed and
nothing is left in the graph. Padded positions (`attention_mask` 0) are left out: nobody reads them, and they would
widen the ranges.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from effc import heap, many
from effc.calib.data import Array, Batch
from effc.calib.probe import Probe, fitting
from effc.calib.slopes import SlopeProbe, SlopeWatcher
from effc.errors import CalibrationError
from effc.ir.program import Graph

MASK = "attention_mask"
KEPT = ("placeholder", "output")


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, probes: Mapping[fx.Node, list[Probe]]) -> None:
        needed, copies = _up_to(module.graph, probes)
        super().__init__(module, garbage_collect_values=True, graph=needed)
        self.probes = {copies[node]: found for node, found in probes.items()}
        self.mask: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for probe in self.probes.get(n, ()):
            try:
                mask = fitting(self.mask, value, getattr(probe.collector, "positions", 1))
                probe.collector.update(value, mask)
            except CalibrationError as error:
                raise CalibrationError(f"{error.what} at {probe.key}", hint=error.hint) from error
        return value


def _up_to(
    whole: fx.Graph, watched: Collection[fx.Node]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """The calls of a graph that the `watched` nodes hang on, without outputs, and which node became which.

    What nobody reads of those in front, such as the logits or the keys and values that a language model gives, is not
    computed, and no value waits for an output.
    """
    made, copies, left = fx.Graph(), dict[fx.Node, fx.Node](), set(watched)
    for node in whole.nodes:
        if node.op == "placeholder" or left:
            copies[node] = made.node_copy(node, copies.__getitem__)
            left.discard(node)
    made.output(())
    seen = {copies[node] for node in watched}
    made.eliminate_dead_code(lambda n: n in seen or n.op in KEPT or n.is_impure())
    return made, copies


def collect(
    graph: Graph,
    probes: Iterable[Probe],
    batches: Iterable[Batch],
    *,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The collectors by key after all `batches`, of which each of several processes runs its share (`effc.many`).

    Raises CalibrationError where there is no data, where a batch lacks an input or has one of another dtype, or
    where a watched value is not a number.
    """
    wanted: dict[fx.Node, list[Probe]] = {}
    collectors: dict[str, Any] = {}
    sloped: list[SlopeProbe] = []
    for probe in probes:
        if isinstance(probe, SlopeProbe):
            collectors[probe.key] = probe.collector
            sloped.append(probe)
        elif probe.key not in collectors:
            collectors[probe.key] = probe.collector
            wanted.setdefault(probe.node, []).append(probe)
    if not collectors:
        return {}
    watcher = _Watcher(graph.exported.graph_module, wanted) if wanted else None
    slopes = SlopeWatcher(graph, sloped) if sloped else None
    seen = 0
    with torch.no_grad():
        for batch in itertools.islice(batches, many.rank(), None, many.count()):
            feeds = tensors_for(graph, batch.inputs)
            mask = feeds.get(MASK)
            if watcher is not None:
                watcher.mask = mask.bool() if mask is not None else None
                watcher.run(*graph.arguments(feeds))
                watcher.env.clear()
            if slopes is not None:
                slopes.run(feeds, mask)
            seen += 1
            heap.trim()  # the next batch is of another length
            if on_batch is not None:
                on_batch(seen * many.count())
    if many.count() > 1:
        every = many.gathered((seen, collectors))
        seen = sum(count for count, _ in every)
        collectors = {
            key: functools.reduce(lambda a, b: a.merge(b), (own[key] for _, own in every))
            for key in collectors
        }
    if not seen:
        raise CalibrationError(
            "there is no calibration data",
            hint="give some with --calib FILE, or in the recipe's section calib",
        )
    return collectors


def tensors_for(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Tensor]:
    """A batch as torch tensors. Raises CalibrationError where it does not fit the graph's inputs."""
    wanted: dict[str, Wanted] = {}
    for name, node in graph.input_nodes().items():
        value = node.meta["val"]
        sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
        is_of_numbers = name in graph.codes and name in inputs and inputs[name].dtype.kind == "f"
        dtype = torch.float32 if is_of_numbers else value.dtype  # the graph rounds them itself
        wanted[name] = np.dtype(str(dtype).removeprefix("torch.")), sizes
    made = fitted(inputs, wanted)
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in made.items()}


Wanted = tuple[np.dtype[Any], Sequence[int | str]]
"""Type and sizes of an input; a size that is free is a word."""


def fitted(inputs: Mapping[str, Array], wanted: Mapping[str, Wanted]) -> dict[str, Array]:
    """The inputs that are wanted, cast where nothing is lost but width.

    Raises CalibrationError where one is missing, or is of another sort or other sizes.
    """
    made = {}
    for name, (dtype, sizes) in wanted.items():
        if name not in inputs:
            raise CalibrationError(
                f"a calibration batch has no input {name!r}",
                hint=f"it has {', '.join(sorted(inputs)) or 'none'}; the model takes {', '.join(wanted)}",
            )
        given = inputs[name]
        if given.dtype.kind not in "fiub" or (given.dtype.kind == "f") != (dtype.kind == "f"):
            raise CalibrationError(
                f"calibration input {name!r} is {given.dtype}, the model takes {dtype}",
                hint="save the array in that type",
            )
        if given.ndim != len(sizes) or any(
            isinstance(want, int) and want != have
            for want, have in zip(sizes, given.shape, strict=True)
        ):
            raise CalibrationError(
                f"calibration input {name!r} has shape {list(given.shape)}, "
                f"the model takes [{', '.join(map(str, sizes))}]",
                hint="the first axis counts the samples, the others are those of the input",
            )
        made[name] = given.astype(dtype, copy=False)
    return made
