"""An ONNX file in an onnxruntime session on the CPU, its threads not spinning; needs nothing that makes engines."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from effc.backends.base import Array, EngineBase, Lowered, Port, cannot_run, refuses

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def session_options(
    threads: int | None = None, *, fuse_integers: bool = True
) -> onnxruntime.SessionOptions:
    """Options under which engines may be compared: given threads, none of them spinning.

    Where integers are not fused every quantise and dequantise node is computed as it stands.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if not fuse_integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


RELU_RULES = ("ReluQuantRewrite", "ClipQuantRewrite")
"""Optimisers that leave a rectifier to the quantise node behind it, and wrongly so where that is fp8 (onnxruntime
1.32): its zero point 0 is not the end of its range."""


def session(
    path: Path, options: onnxruntime.SessionOptions, disabled: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:
        raise refuses("onnxruntime", onnxruntime.__version__, path, error) from error


class OrtEngine(EngineBase):
    """An ONNX file in an onnxruntime session."""

    def __init__(
        self, path: Path, *, threads: int | None = None, fuse_integers: bool = True
    ) -> None:
        self._path = path
        options = session_options(threads, fuse_integers=fuse_integers)
        disabled = () if fuse_integers else RELU_RULES
        self._session: onnxruntime.InferenceSession | None = session(path, options, disabled)
        self.inputs = tuple(_port(v) for v in self._session.get_inputs())
        self.outputs = tuple(_port(v) for v in self._session.get_outputs())
        self._names = [p.name for p in self.outputs]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        assert self._session is not None
        try:
            values = self._session.run(self._names, {p.name: feeds[p.name] for p in self.inputs})
        except Exception as error:
            raise cannot_run("onnxruntime", self._path, feeds, self.inputs, error) from error
        return dict(zip(self._names, values, strict=True))

    def carry(self, feeds: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]:
        assert self._session is not None
        value = onnxruntime.OrtValue
        given = {
            p.name: f if isinstance(f := feeds[p.name], value) else value.ortvalue_from_numpy(f)
            for p in self.inputs
        }
        try:
            made = self._session.run_with_ort_values(self._names, given)
        except Exception as error:
            shown = {name: f.numpy() for name, f in given.items()}
            raise cannot_run("onnxruntime", self._path, shown, self.inputs, error) from error
        found = zip(self._names, made, strict=True)
        return {name: each.numpy() if name in wanted else each for name, each in found}

    def close(self) -> None:
        self._session = None


class PlainEngine(OrtEngine):
    """A file computed node by node, as it stands: no optimiser has touched it."""

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self._path = path
        options = session_options(threads, fuse_integers=False)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = session(path, options)
        self.inputs = tuple(map(_port, self._session.get_inputs()))
        self.outputs = tuple(map(_port, self._session.get_outputs()))
        self._names = [p.name for p in self.outputs]


def _port(value: Any) -> Port:
    return Port(
        name=value.name, dtype=_DTYPES.get(value.type, value.type), shape=tuple(value.shape)
    )


def opened(lowered: Lowered, *, threads: int | None = None) -> OrtEngine:
    """The engine of files that were lowered for ort."""
    return OrtEngine(lowered.path, threads=threads)


class FileEngine(OrtEngine):
    """A file of the user's own, of whose outputs those of a graph are given, under the graph's ports."""

    def __init__(
        self,
        path: Path,
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        *,
        threads: int | None = None,
    ) -> None:
        super().__init__(path, threads=threads)
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._names = [port.name for port in outputs]
