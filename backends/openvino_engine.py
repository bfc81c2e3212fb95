"""An ONNX file compiled for this processor by OpenVINO, with settings that stand in the manifest.

A compiled model is kept in effc's cache, under the sha256 of the file, the settings, the version and the processor; one
that is damaged there is compiled anew.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from effc import cache
from effc.backends.base import Array, EngineBase, Lowered, Port, cannot_run, refuses
from effc.backends.openvino_state import StatefulEngine, stateful
from effc.errors import BackendUnavailable
from effc.machine import cpu_features

PORTS = "ports"
"""The cache of a language model that goes in and out."""
GROUP = 32
"""Activations that share a scale where they are rounded to 8 bit as an engine runs: what openvino does by itself."""
UNKEPT = ("RoPE",)
"""Layers that openvino 2026.4 exports without all of their settings: they compute something else when imported."""
_UNPACKING = ("Const", "Convert", "Reorder", "Transpose", "Output")
"""Layers that read a tensor and compute nothing with it."""
BF16 = ("avx512_bf16", "amx_bf16", "bf16")
"""Instructions with which a product in bfloat16 is faster than one in float."""


def has_bf16() -> bool:
    return not set(BF16).isdisjoint(cpu_features())


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
    if is_held(options):
        found["KV_CACHE_PRECISION"] = options["cache"]
    if "products" in options:
        found["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP if options["products"] == "int8" else 0
    return found


def is_held(options: Mapping[str, Any]) -> bool:
    """Whether the runtime holds the cache of a language model, instead of taking and giving it."""
    return bool(options.get("cache", PORTS) != PORTS)


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
    made = compiled_anew(path, settings)
    if kept.root is not None and not _is_unkept(made):
        kept.put(key, None, {"blob": made.export_model().getvalue()})
    return made


def _is_unkept(made: Any) -> bool:
    return any(kind in UNKEPT for known in layers(made).values() for kind, _ in known)


def compiled_anew(path: Path, settings: Mapping[str, Any]) -> Any:
    """A file compiled for this processor, its cache held inside where the settings have a type for it."""
    try:
        model = _core().read_model(str(path))
        made = stateful(model) if "KV_CACHE_PRECISION" in settings else model
        return _core().compile_model(made, "CPU", dict(settings))
    except Exception as error:
        raise refuses("openvino", openvino.__version__, path, error) from error


Layer = tuple[str, str]
"""Kind of a layer of a compiled model, and the type that it computes in."""


def layers(made: Any) -> dict[str, list[Layer]]:
    """What became of the nodes and tensors of a file, by their names: a layer of its own, or those that read it."""
    found: dict[str, list[Layer]] = {}
    for node in made.get_runtime_model().get_ops():
        info = _told(node)
        kind = info.get("layerType", "unknown"), info.get("runtimePrecision", "unknown")
        if kind[0] in _UNPACKING:
            continue
        names = [name.partition("/")[0] for name in info.get("originalLayersNames", "").split(",")]
        sources = [value.get_node() for value in node.input_values()]
        names += [n.get_friendly_name() for n in sources if _told(n).get("layerType") == "Const"]
        for name in names:
            found.setdefault(name, []).append(kind)
    return found


def _told(node: Any) -> dict[str, str]:
    return {name: value.astype(str) for name, value in node.get_rt_info().items()}


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


def opened(lowered: Lowered, *, threads: int | None = None) -> OpenVinoEngine | StatefulEngine:
    """The engine of files that were lowered for openvino."""
    if not is_held(lowered.options):
        return OpenVinoEngine(lowered.path, lowered.options, threads=threads)
    made = compiled(lowered.path, config(lowered.options, threads))
    return StatefulEngine(lowered.path, made, lowered.inputs, lowered.outputs)
