"""OpenVINO on the CPU: the ONNX file is read and compiled by the runtime when it is opened.

What is not quantised is computed in the type of a hint and not of the graph: bfloat16 beside integers where the
processor multiplies it, else float. The hint stands in the manifest, so that verify, bench and gate, and whoever
deploys the package, all use the same. A compiled model is kept in effc's cache, under the sha256 of the file, the
hints, the version and the processor; one that is damaged there is compiled anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import openvino

from effc import cache
from effc.backends.alone import peak_rss_mb
from effc.backends.base import (
    Array,
    BackendBase,
    EngineBase,
    Lowered,
    Port,
    Site,
    Unsupported,
    at_least,
    cannot_run,
    refuses,
)
from effc.backends.dialect import OPENVINO
from effc.backends.eager import described
from effc.backends.onnx import save, to_onnx, unsupported, weight_sites
from effc.backends.options import OpenVinoOptions
from effc.dialect import Dialect
from effc.errors import BackendUnavailable
from effc.ir.program import Graph
from effc.machine import cpu_features
from effc.progress import Step, silent

BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Instructions with which a product in bfloat16 is faster than one in float."""
_PASS_THROUGH = ("DequantizeLinear", "Transpose", "Cast", "Reshape", "Identity")
_INTEGERS = ("i8", "u8", "i4", "u4")


def has_bf16() -> bool:
    return not set(BF16).isdisjoint(cpu_features())


def precision(is_quantised: bool) -> str:
    """The type of everything that is not quantised: a graph in float stays exact."""
    return "bf16" if is_quantised and has_bf16() else "f32"


def config(options: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
    """What `compile_model` is told. Raises BackendUnavailable where this processor lacks what the options ask for."""
    kind = str(options.get("precision", "f32"))
    if kind == "bf16" and not has_bf16():
        raise BackendUnavailable(
            f"the engine computes in bfloat16, and this processor has none of {', '.join(BF16)}",
            hint="compile it on the kind of processor that it will run on",
        )
    hint = str(options.get("hint", "latency"))
    found: dict[str, Any] = {
        "PERFORMANCE_HINT": hint.upper(),
        "INFERENCE_PRECISION_HINT": kind,
    }
    if hint == "latency":
        found["NUM_STREAMS"] = 1
    if threads is not None:
        found["INFERENCE_NUM_THREADS"] = threads
    return found


@functools.cache
def _core() -> Any:
    """The one of this process. Each sets a stack for signals when it is made, and puts back the one before when it
    goes; where two are made and go in turn, the stack put back is gone already, and the next Ctrl-C kills."""
    return openvino.Core()


def compiled(path: Path, settings: Mapping[str, Any]) -> Any:
    """A file compiled for this processor, or taken from the cache. Raises LoweringError."""
    core, kept = _core(), cache.default()
    key = cache.key_of(
        "openvino", file=_digest(path), settings=dict(settings), version=openvino.__version__,
        cpu=[core.get_property("CPU", "FULL_DEVICE_NAME"), *cpu_features()],
    )  # fmt: skip
    entry = kept.get(key)
    if entry is not None:
        try:
            content = (entry.directory / "blob").read_bytes()
            return core.import_model(content, "CPU", dict(settings))
        except (OSError, RuntimeError):
            kept.forget(key)
    made = _compiled(path, settings)
    if kept.root is not None:
        kept.put(key, None, {"blob": made.export_model().getvalue()})
    return made


def _compiled(path: Path, settings: Mapping[str, Any]) -> Any:
    try:
        return _core().compile_model(str(path), "CPU", dict(settings))
    except Exception as error:
        raise refuses("openvino", openvino.__version__, path, error) from error


def _digest(path: Path) -> list[str]:
    """sha256 of a file, and of the weights beside it."""
    parts = (path, path.with_name(f"{path.name}.data"))
    return [cache.sha256(part) for part in parts if part.exists()]


class OpenVinoEngine(EngineBase):
    """An ONNX file compiled for this processor."""

    def __init__(
        self, path: Path, options: Mapping[str, Any] | None = None, *, threads: int | None = None
    ) -> None:
        self._path = path
        self.compiled: Any = compiled(path, config(options or {}, threads))
        self._request: Any = self.compiled.create_infer_request()
        self.inputs = tuple(map(_port, self.compiled.inputs))
        self.outputs = tuple(map(_port, self.compiled.outputs))

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {p.name: np.ascontiguousarray(feeds[p.name]) for p in self.inputs}
        try:
            found = self._request.infer(given, share_inputs=True, share_outputs=True)
        except Exception as error:
            raise cannot_run("openvino", self._path, feeds, self.inputs, error) from error
        return {p.name: np.array(found[place]) for place, p in enumerate(self.outputs)}

    def close(self) -> None:
        self._request = self.compiled = None


def _port(value: Any) -> Port:
    shape = tuple(
        size.get_length() if size.is_static else f"d{axis}"
        for axis, size in enumerate(value.partial_shape)
    )
    dtype = np.dtype(value.element_type.to_dtype()).name
    return Port(name=value.any_name, dtype=dtype, shape=shape)


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
        readers = _readers(model)
        files = save(model, directory)
        options = self._options(bool(places))
        path = directory / files[0]
        kernels = _kernels(_compiled(path, config(options, None))) if places else {}
        return described(
            graph,
            self.name,
            directory,
            files,
            self.dialect.opset,
            sites=tuple(
                _site(name, word, readers.get(weight, []), kernels) for name, word, weight in places
            ),
            requires=(at_least("openvino", openvino.__version__),),
            options=options,
        )

    def _options(self, is_quantised: bool) -> dict[str, str]:
        kind = self._asked.precision
        return {
            "precision": precision(is_quantised) if kind == "auto" else kind,
            "hint": self._asked.hint,
        }

    def open(self, lowered: Lowered, *, threads: int | None = None) -> OpenVinoEngine:
        return OpenVinoEngine(lowered.path, lowered.options, threads=threads)

    def peak_rss_mb(self, lowered: Lowered, feeds: Mapping[str, Array], threads: int) -> float:
        opening = _ALONE.format(settings=config(lowered.options, threads))
        return peak_rss_mb(opening, lowered.path, feeds, threads)


_ALONE = """
import openvino
request = openvino.Core().compile_model(path, "CPU", {settings}).create_infer_request()
run = request.infer
"""


def _readers(model: ir.Model) -> dict[str, list[str]]:
    """Names of the nodes that compute with each tensor of a model, behind those that only unpack it."""
    return {
        name: list(dict.fromkeys(_behind(value)))
        for name, value in model.graph.initializers.items()
    }


def _behind(value: ir.Value) -> Iterator[str]:
    for use in value.uses():
        if use.node.op_type in _PASS_THROUGH and use.idx == 0:
            for output in use.node.outputs:
                yield from _behind(output)
        else:
            yield use.node.name or ""


def _kernels(made: Any) -> dict[str, tuple[str, str]]:
    """By the name of a node of the file, the layer that it became in the compiled model, and the type of that."""
    found: dict[str, tuple[str, str]] = {}
    for node in made.get_runtime_model().get_ops():
        info = {name: value.astype(str) for name, value in node.get_rt_info().items()}
        for name in info.get("originalLayersNames", "").split(","):
            kind = info.get("layerType", "unknown"), info.get("runtimePrecision", "unknown")
            found.setdefault(name.partition("/")[0], kind)
    return found


def _site(name: str, word: str, readers: list[str], kernels: Mapping[str, tuple[str, str]]) -> Site:
    wanted = [kernels[reader] for reader in readers if reader in kernels]
    kernel, kind = wanted[0] if wanted else ("unknown", "")
    if kind in _INTEGERS:
        return Site(name=name, op=word, kernel=kernel, int8=True)
    reason = (
        f"openvino computes it in {kind}"
        if wanted
        else "openvino has no layer of that name: its weight was folded or its layer fused with another"
    )
    return Site(name=name, op=word, kernel=kernel, int8=False, reason=reason)
