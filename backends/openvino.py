"""OpenVINO on the CPU: the ONNX file is read and compiled by the runtime when it is opened.

What is not quantised is computed in the type of a hint and not of the graph: bfloat16 beside integers where the
processor multiplies it, else float. The hint stands in the manifest, so that verify, bench and gate, and whoever
deploys the package, all use the same; so does the type of a cache of keys and values, which the runtime holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import openvino
from torch import fx

from effc.backends.alone import peak_rss_mb
from effc.backends.base import Array, BackendBase, Lowered, Site, Unsupported, at_least
from effc.backends.dialect import OPENVINO
from effc.backends.eager import described
from effc.backends.onnx import save, to_onnx, unsupported, weight_sites
from effc.backends.onnx_match import only_consumer
from effc.backends.onnx_narrow import drop_zeros, store_int4
from effc.backends.openvino_engine import (
    PORTS,
    Layer,
    OpenVinoEngine,
    compiled_anew,
    config,
    has_bf16,
    is_held,
    layers,
    opened,
)
from effc.backends.openvino_state import StatefulEngine, pairs
from effc.backends.options import OpenVinoOptions
from effc.causal import DECODE
from effc.dialect import Dialect
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.progress import Step, silent
from effc.quant.ops import DEQUANTIZE

_PASS_THROUGH = ("DequantizeLinear", "Transpose", "Cast", "Reshape", "Identity")
_INTEGERS = ("i8", "u8", "i4", "u4")


def precision(is_quantised: bool) -> str:
    """The type of everything that is not quantised: a graph in float stays exact."""
    return "bf16" if is_quantised and has_bf16() else "f32"


class OpenVino(BackendBase):
    """OpenVINO's CPU plugin; the package holds the `model.onnx` that it compiles."""

    name: ClassVar[str] = "openvino"
    dialect: ClassVar[Dialect] = OPENVINO

    def __init__(self, asked: OpenVinoOptions | None = None) -> None:
        self._asked = asked or OpenVinoOptions()

    def supports(self, graph: Graph) -> list[Unsupported]:
        return unsupported(graph, self.dialect.opset)

    def lower(self, graph: Graph, directory: Path, step: Step = silent) -> Lowered:
        """Write `model.onnx`, compile it once, and read from the compiled graph which sites really run in int8."""
        places = weight_sites(graph)
        model = to_onnx(graph, self.dialect.opset)
        store_int4(model)
        drop_zeros(model)
        readers = _readers(model)
        files = save(model, directory)
        options = self._options(graph, bool(places))
        path = directory / files[0]
        kernels = layers(compiled_anew(path, config(options, None))) if places else {}
        return described(
            graph,
            self.name,
            directory,
            files,
            self.dialect.opset,
            sites=tuple(
                _site(name, word, readers.get(weight) or readers.get(f"{weight}.int4", []), kernels)
                for name, word, weight in places
            ),
            requires=(at_least("openvino", openvino.__version__),),
            options=options,
        )

    def _options(self, graph: Graph, is_quantised: bool) -> dict[str, str]:
        kind: str = self._asked.precision
        held: str = self._asked.cache
        kind = precision(is_quantised) if kind == "auto" else kind
        found: dict[str, str] = {"precision": kind, "hint": self._asked.hint}
        if any(map(_is_weight_only, graph.nodes)):
            found["products"] = self._asked.products
        if not pairs(graph.inputs):
            return found
        if held == "auto":  # a prompt is read faster with ports, a token written faster without
            held = "inside" if graph.role == DECODE else PORTS
        return {**found, "cache": kind if held == "inside" else held}

    def open(
        self, lowered: Lowered, *, threads: int | None = None
    ) -> OpenVinoEngine | StatefulEngine:
        return opened(lowered, threads=threads)

    def peak_rss_mb(self, lowered: Lowered, feeds: Mapping[str, Array], threads: int) -> float:
        opening = _ALONE_HELD if is_held(lowered.options) else _ALONE
        opening = opening.format(settings=config(lowered.options, threads))
        return peak_rss_mb(opening, lowered.path, feeds, threads)


_ALONE = """
import openvino
request = openvino.Core().compile_model(path, "CPU", {settings}).create_infer_request()
run = request.infer
"""
_ALONE_HELD = """
import openvino
from effc.backends.openvino_state import StatefulEngine, stateful
core = openvino.Core()
made = core.compile_model(stateful(core.read_model(path)), "CPU", {settings})
engine = StatefulEngine(pathlib.Path(path), made)
run = lambda feeds: engine.carry(feeds, ("logits",))
"""


def _is_weight_only(node: fx.Node) -> bool:
    """Whether a layer has a quantised weight, and an input that is not."""
    if op_name(node) != "linear":
        return False
    value, weight = (part.target if isinstance(part, fx.Node) else None for part in node.args[:2])
    return weight is DEQUANTIZE and value is not DEQUANTIZE


def _readers(model: ir.Model) -> dict[str, list[str]]:
    """Names of a tensor, and of the nodes that compute with it behind those that only unpack it.

    A layer that the runtime made of several nodes may have lost the name of each, and still reads the tensor.
    """
    return {
        name: [name, *dict.fromkeys(_behind(value))]
        for name, value in model.graph.initializers.items()
    }


def _behind(value: ir.Value) -> Iterator[str]:
    for use in value.uses():
        if use.node.op_type in _PASS_THROUGH and use.idx == 0:
            for output in use.node.outputs:
                yield from _behind(output)
        else:
            yield from _called(use.node)


def _called(node: ir.Node) -> Iterator[str]:
    """What a layer may be called by: its node, the addition of a constant behind it, or the output that it is."""
    yield node.name or ""
    (made, *others) = node.outputs
    if made.is_graph_output():
        yield made.name or ""
    add = None if others else only_consumer(made, "Add")
    if add is not None and any(v is not None and v.const_value is not None for v in add.inputs):
        yield from _called(add)


def _site(name: str, word: str, known: list[str], kernels: Mapping[str, list[Layer]]) -> Site:
    """`known` are the names under which the runtime may know the layer that reads the weight of a place."""
    found = [layer for other in known for layer in kernels.get(other, ())]
    fitting = [layer for layer in found if (layer[0] == "Gather") == (word == "embedding")]
    wanted = sorted(fitting, key=lambda layer: layer[1] not in _INTEGERS)
    kernel, kind = wanted[0] if wanted else ("unknown", "")
    if kind in _INTEGERS:
        return Site(name=name, op=word, kernel=f"{kernel} {kind}", int8=True)
    reason = (
        f"openvino computes it in {kind}"
        if wanted
        else "openvino has no layer of that name: its weight was folded or its layer fused with another"
    )
    return Site(name=name, op=word, kernel=kernel, int8=False, reason=reason)
