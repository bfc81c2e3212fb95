"""ONNX Runtime on the CPU: the graph written the way its kernels are fastest, opened without spinning threads.

The rewrites that matter most, each measured (benchmarks/opset.py):

* a quantised linear layer becomes one `MatMulIntegerToFloat` with its bias inside, at every optimisation level;
* attention takes `[batch, sequence, hidden]` as it is, so four transposes per layer go;
* the residual addition in front of a layer norm is written `Sum`: as `Add` it is fused into SkipLayerNormalization,
  whose kernel is several times slower than the two nodes that it replaces.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
import onnxruntime

from effc import scratch
from effc.backends.alone import peak_rss_mb
from effc.backends.base import (
    Array,
    BackendBase,
    Lowered,
    Site,
    Unsupported,
    at_least,
)
from effc.backends.dialect import ORT
from effc.backends.eager import described
from effc.backends.onnx import save, to_onnx, unsupported, weight_sites
from effc.backends.onnx_narrow import store_behind_casts
from effc.backends.ort_adapter import leave_open
from effc.backends.ort_engine import OrtEngine, opened, session, session_options
from effc.backends.ort_rewrites import rewrite
from effc.causal import DECODE
from effc.dialect import Dialect
from effc.errors import LoweringError
from effc.ir.program import Graph
from effc.progress import Step, silent

INT8_KERNELS = frozenset(
    (
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "QLinearMatMul",
        "QGemm",
        "QLinearConv",
        "ConvInteger",
        "MatMulNBits",
        "QAttention",
        "Gather",
        "GatherBlockQuantized",
    )
)
_PASS_THROUGH = ("Transpose", "Reshape", "Cast")


class Ort(BackendBase):
    """ONNX Runtime's CPU provider; the engine is a `model.onnx` that plain onnxruntime opens."""

    name: ClassVar[str] = "ort"
    dialect: ClassVar[Dialect] = ORT

    def supports(self, graph: Graph) -> list[Unsupported]:
        return unsupported(graph, self.dialect.opset)

    def lower(self, graph: Graph, directory: Path, step: Step = silent) -> Lowered:
        """Write `model.onnx`, open it once, and read from the optimised graph which sites really run in int8."""
        model = to_onnx(graph, self.dialect.opset)
        rewrite(model, one_token=graph.role == DECODE)
        leave_open(graph, model)
        store_behind_casts(model)
        files = save(model, directory)
        return described(
            graph, self.name, directory, files, self.dialect.opset,
            sites=tuple(inspect(graph, directory / files[0])),
            requires=(at_least("onnxruntime", onnxruntime.__version__),),
        )  # fmt: skip

    def open(self, lowered: Lowered, *, threads: int | None = None) -> OrtEngine:
        return opened(lowered, threads=threads)

    def peak_rss_mb(self, lowered: Lowered, feeds: Mapping[str, Array], threads: int) -> float:
        return peak_rss_mb(_ALONE, lowered.path, feeds, threads)


_ALONE = """
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
run = lambda feeds: session.run(None, feeds)
"""


def optimized(path: Path) -> ir.Model:
    """The graph that onnxruntime really runs for a file."""
    with scratch.held() as directory:
        options = session_options(1)
        target = directory / "optimized.onnx"
        options.optimized_model_filepath = str(target)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        try:
            session(path, options)
        except LoweringError:
            if shutil.disk_usage(directory).free < 2 * path.stat().st_size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from None
            raise
        model = ir.load(target)
        for value in model.graph.initializers.values():
            value.const_value = None  # only names are read; the weights file goes with the folder
        return model


def inspect(graph: Graph, path: Path) -> list[Site]:
    """What became of every quantised place, read from the optimised graph."""
    places = weight_sites(graph)
    if not places:
        return []
    consumers: dict[str, list[ir.Node]] = {}
    for node in optimized(path).graph:
        for value in node.inputs:
            if value is not None and value.name:
                consumers.setdefault(value.name, []).append(node)
    return [_site(name, word, weight, consumers) for name, word, weight in places]


def _site(name: str, word: str, weight: str, consumers: Mapping[str, list[ir.Node]]) -> Site:
    candidates = [
        node
        for key in (weight, *(f"{weight}{tail}" for tail in (".t", ".nbits", ".nbits.table")))
        for node in consumers.get(key, ())
    ]
    seen = 0
    while candidates and seen < 100:
        seen += 1
        node = candidates.pop(0)
        if node.op_type in _PASS_THROUGH:
            candidates += [n for v in node.outputs for n in consumers.get(v.name or "", ())]
            continue
        is_lookup = node.op_type in ("Gather", "GatherBlockQuantized")
        if is_lookup != (word == "embedding"):
            continue
        if node.op_type in INT8_KERNELS:
            return Site(name=name, op=word, kernel=node.op_type, int8=True)
        reason = "onnxruntime found no int8 kernel for the pattern and computes in float"
        return Site(name=name, op=word, kernel=node.op_type, int8=False, reason=reason)
    reason = "the integer weight was folded into float when the session was made"
    return Site(name=name, op=word, kernel="float", int8=False, reason=reason)
