"""A TensorRT engine on a GPU of this machine.

An engine file is code that the driver runs: who opens one has compared its sha256 with a manifest before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from effc.backends.base import Array, EngineBase, Port, cannot_run
from effc.backends.tensorrt_build import Log, is_rtx, library
from effc.errors import BackendUnavailable, LoweringError

ELSEWHERE = "open it on a machine with a GPU that it was built for"


@functools.cache
def obstacle() -> str | None:
    """Why no engine can run on this machine; None where one can."""
    try:
        library()
    except BackendUnavailable as error:
        return error.what
    try:
        from cuda.bindings import driver
    except ImportError:
        return "cuda-bindings is not installed"
    try:
        (status,) = driver.cuInit(0)
        if int(status) != 0:
            return f"its NVIDIA driver does not work ({status.name})"
        status, count = driver.cuDeviceGetCount()
    except Exception:  # what the bindings raise where they find no driver has changed over time
        return "it has no NVIDIA driver"
    return None if int(status) == 0 and count else "it has no NVIDIA GPU"


def _called(result: Sequence[Any]) -> Any:
    """What a call of the driver gives. Raises LoweringError where it failed."""
    status, *values = result
    if int(status) != 0:
        raise LoweringError(
            f"the GPU's driver says {status.name}",
            hint="nvidia-smi shows what else holds the GPU and its memory",
        )
    return values[0] if len(values) == 1 else values


class TensorRtEngine(EngineBase):
    """An engine file on the first GPU, its buffers kept from call to call, in one CUDA graph where the library can.

    Raises BackendUnavailable where no GPU of this machine runs it, with the reason that the library gives.
    """

    def __init__(self, path: Path, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
        if (why := obstacle()) is not None:
            raise BackendUnavailable(
                f"a TensorRT engine cannot run on this machine: {why}", hint=ELSEWHERE
            )
        from cuda.bindings import driver

        self._path, self.inputs, self.outputs = path, inputs, outputs
        self._cuda, self._buffers = driver, dict[str, tuple[int, int]]()
        self._context: Any = None
        device = _called(driver.cuDeviceGet(0))
        _called(driver.cuCtxSetCurrent(_called(driver.cuDevicePrimaryCtxRetain(device))))
        self._stream = _called(driver.cuStreamCreate(0))
        log = Log()
        self._logger = log.logger()
        self._runtime = library().Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BackendUnavailable(
                f"{path.name} cannot run here: {' '.join(log.errors) or 'the library gives no reason'}",
                hint=ELSEWHERE,
            )
        self._engine, self._context = engine, _context(engine)

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        try:
            return self._run({p.name: np.ascontiguousarray(feeds[p.name]) for p in self.inputs})
        except LoweringError as error:
            raise cannot_run("tensorrt", self._path, feeds, self.inputs, error) from error

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        cuda, context = self._cuda, self._context
        for name, value in feeds.items():
            if not context.set_input_shape(name, value.shape):
                raise LoweringError(f"{name} {list(value.shape)} is outside the engine's profile")
            place = self._place(name, value.nbytes)
            _called(cuda.cuMemcpyHtoDAsync(place, value.ctypes.data, value.nbytes, self._stream))
        found = {}
        for port in self.outputs:
            made = np.empty(tuple(context.get_tensor_shape(port.name)), np.dtype(port.dtype))
            self._place(port.name, made.nbytes)
            found[port.name] = made
        if not context.execute_async_v3(int(self._stream)):
            raise LoweringError("the engine stopped")
        for name, made in found.items():
            place = self._buffers[name][0]
            _called(cuda.cuMemcpyDtoHAsync(made.ctypes.data, place, made.nbytes, self._stream))
        _called(cuda.cuStreamSynchronize(self._stream))
        return found

    def _place(self, name: str, size: int) -> int:
        """Device memory for a tensor, made anew where it was too small."""
        place, room = self._buffers.get(name, (0, 0))
        if room < size:
            if place:
                _called(self._cuda.cuMemFree(place))
            place, room = int(_called(self._cuda.cuMemAlloc(size))), size
            self._buffers[name] = place, room
        self._context.set_tensor_address(name, place)
        return place

    def close(self) -> None:
        for place, _ in self._buffers.values():
            self._cuda.cuMemFree(place)
        self._buffers.clear()
        self._context = self._engine = self._runtime = None


def _context(engine: Any) -> Any:
    if not is_rtx():
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = library().CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)
