"""TensorRT: an engine built ahead of time, here or anywhere, for the GPUs that it is to run on.

What lies beside the engine makes it anew where that is wanted: the ONNX that it was built from, with every cast and
quantise node in it, the line that builds it with enterprise TensorRT's own tool, inputs, and what they should give.
Without a GPU that ONNX stands in for the engine when it is compared with the model; nothing is timed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch

from effc.backends import cuda
from effc.backends import tensorrt_build as build
from effc.backends import tensorrt_kit as kit
from effc.backends.base import Array, BackendBase, Lowered, Site, Unsupported, at_least
from effc.backends.dialect import TENSORRT
from effc.backends.eager import described, ports
from effc.backends.onnx import save, to_onnx, unsupported, weight_sites
from effc.backends.onnx_narrow import store_int4
from effc.backends.onnx_widen import NARROW, between_casts
from effc.backends.options import TensorRtOptions
from effc.backends.tensorrt_profile import profile_of, written
from effc.dialect import Dialect
from effc.errors import BackendUnavailable, LoweringError, RecipeError
from effc.ir.program import Graph
from effc.ir.select import op_name
from effc.progress import Step, silent

PORTABLE = "portable"
AHEAD_OF_TIME = ("sm80", "sm86", "sm89", "sm120", "sm121")
"""What an engine of TensorRT-RTX runs on that was built for no capability by name."""
FP8 = ("sm89", "sm120", "sm121")
"""Those that multiply numbers of 8 bit."""
ENGINE = "model.engine"
ENTERPRISE = "tensorrt>=11"
WHOLE, DECOMPOSED = 23, 21
"""Opsets with attention as one operator, which has kernels in 16 bit only, and without."""


class TensorRt(BackendBase):
    """TensorRT-RTX, or enterprise TensorRT where only that is installed."""

    name: ClassVar[str] = "tensorrt"
    dialect: ClassVar[Dialect] = TENSORRT

    def __init__(self, asked: TensorRtOptions | None = None) -> None:
        self._asked = asked or TensorRtOptions()

    def supports(self, graph: Graph) -> list[Unsupported]:
        if not self._is_kit:
            build.library()
        profile_of(graph, self._asked.profile)
        self._compute(graph)
        return unsupported(graph, DECOMPOSED)

    @property
    def _is_kit(self) -> bool:
        return self._asked.build == "kit"

    def _compute(self, graph: Graph) -> tuple[str, ...]:
        """The compute capabilities to build for; none where one engine for all is. Raises RecipeError."""
        asked = self._asked.compute
        if not any(t.dtype == torch.float8_e4m3fn for t in graph.tensors().values()):
            return asked
        if old := [word for word in asked if word not in FP8]:
            raise RecipeError(
                f"targets.tensorrt.compute names {', '.join(old)}, which has no fp8",
                hint=f"{', '.join(FP8)} have",
            )
        return asked or FP8

    def lower(self, graph: Graph, directory: Path, step: Step = silent) -> Lowered:
        """Write `model.onnx`, the kit, and `model.engine` where it is not left to the kit.

        Attention is whole where the builder has a kernel for it.
        """
        asked = self._asked
        plan = build.Plan(
            profile=profile_of(graph, asked.profile), compute=self._compute(graph),
            windows=asked.platform == "windows", refittable=asked.weights == "refittable",
            stripped=asked.weights == "stripped",
        )  # fmt: skip
        shapes = {port.name: port.shape for port in ports(graph)[0]}
        kinds, why = _attention_types(graph), ""
        opset = WHOLE if kinds and "torch.float32" not in kinds else DECOMPOSED
        made: build.Built | None = None
        while True:
            places: dict[str, str] = {}
            model = to_onnx(graph, opset, places=places)
            store_int4(model)
            widen_softmax(model)
            files = save(model, directory)
            if self._is_kit:
                break
            try:
                made = build.build(directory / files[0], plan, shapes, places=places, step=step)
                break
            except LoweringError as error:
                if opset == DECOMPOSED:
                    raise
                opset, why = DECOMPOSED, error.what
        options = {
            "platform": asked.platform,
            "profile": written(plan.profile),
            "weights": asked.weights,
        }
        if made is None:
            options["build"] = "kit"
        else:
            (directory / ENGINE).write_bytes(made.engine)
            files = (ENGINE, *files)
            options["compute"] = ",".join(plan.compute) or (
                PORTABLE if build.is_rtx() else cuda.gpu()[1]
            )
            options["layers"] = str(made.layers)
        if kinds:
            options["attention"] = "whole" if opset == WHOLE else "decomposed"
        if why:
            options["attention_refused"] = why
        made_kit = kit.write(graph, directory, files[0 if made is None else 1], plan.profile)
        if made_kit.gap is not None:
            options["gap"] = f"{made_kit.gap:.2g}"
        return described(
            graph, self.name, directory, (*files, *made_kit.files), opset,
            sites=tuple(_site(name, word) for name, word, _ in weight_sites(graph)),
            requires=(ENTERPRISE if made is None else _requirement(),), options=options,
        )  # fmt: skip

    def obstacle(self, lowered: Lowered | None = None) -> str | None:
        if lowered is not None and lowered.options.get("build") == "kit":
            return "the package has a kit that builds the engine with trtexec, and no engine"
        if (why := cuda.obstacle()) is not None or not build.is_rtx():
            return why
        built_for = lowered.options.get("compute", PORTABLE) if lowered is not None else PORTABLE
        runs_on = AHEAD_OF_TIME if built_for == PORTABLE else str(built_for).split(",")
        name, word = cuda.gpu()
        if word in runs_on:
            return None
        return f"its GPU, {name}, is {word}, and engines are for {', '.join(runs_on)}"

    def gpu(self) -> str:
        name: str = cuda.gpu()[0]
        return name

    def stand_in(self, lowered: Lowered, *, threads: int | None = None) -> Any:
        """The ONNX that the engine was built from, on ONNX Runtime, every value rounded where the graph says."""
        from effc.backends.onnx_widen import open_widened

        return open_widened(lowered.path.with_suffix(".onnx"), threads)

    def open(self, lowered: Lowered, *, threads: int | None = None) -> Any:
        """Raises BackendUnavailable where no GPU of this machine runs it, with the reason."""
        from effc.backends.tensorrt_engine import ELSEWHERE, TensorRtEngine

        if (why := self.obstacle(lowered)) is not None:
            raise BackendUnavailable(
                f"a TensorRT engine cannot run on this machine: {why}", hint=ELSEWHERE
            )
        weights = lowered.path.with_suffix(".onnx")
        is_stripped = lowered.options.get("weights") == "stripped"
        return TensorRtEngine(
            lowered.path, lowered.inputs, lowered.outputs, weights=weights if is_stripped else None
        )

    def plain(self, graph: Graph, lowered: Lowered) -> Lowered:
        """An engine of the float export, for the sizes and GPUs of the engine whose options it is to have."""
        options = {**lowered.options, "weights": "inside"}
        asked = str(options.get("compute", PORTABLE))
        profile = lowered.profile or profile_of(graph, {})
        plan = build.Plan(
            profile=profile, compute=() if asked == PORTABLE else tuple(asked.split(","))
        )
        made = build.build(lowered.path, plan, {p.name: p.shape for p in lowered.inputs})
        (lowered.directory / ENGINE).write_bytes(made.engine)
        return dataclasses.replace(lowered, files=(ENGINE, *lowered.files), options=options)

    def made_with(self) -> str:
        """What decides the bytes of an engine beside the graph, for the cache."""
        trt = build.library()
        return f"{trt.__name__} {trt.__version__} {'' if build.is_rtx() else cuda.gpu()}"

    def peak_rss_mb(self, lowered: Lowered, feeds: Mapping[str, Array], threads: int) -> None:
        """Memory of an engine on a GPU is not measured from outside."""


def _requirement() -> str:
    version = build.library().__version__
    return at_least("tensorrt-rtx-cu12-libs" if build.is_rtx() else "tensorrt", version)


def _attention_types(graph: Graph) -> set[str]:
    """The types that attention is computed in; none where a graph has none."""
    found = [n for n in graph.nodes if op_name(n) == "scaled_dot_product_attention"]
    return {str(n.meta["val"].dtype) for n in found}


def widen_softmax(model: ir.Model) -> int:
    """Softmax in float32: its sum has as many terms as there are positions.

    What attention that is whole does inside is the kernel's own choice: the parser takes no precision for it.
    """
    found = [n for n in model.graph if n.op_type == "Softmax" and n.outputs[0].dtype in NARROW]
    for node in found:
        between_casts(model, node)
    return len(found)


def _site(name: str, word: str) -> Site:
    return Site(
        name=name, op=word, kernel="unknown", int8=False,
        reason="TensorRT chooses kernels on the GPU",
    )  # fmt: skip
