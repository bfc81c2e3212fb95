"""A TensorRT engine on a GPU of this machine.

An engine file is code that the driver runs: who opens one has compared its sha256 with a manifest before.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effc.backends.base import Array, EngineBase, Port, cannot_run
from effc.backends.cuda import Memory
from effc.backends.tensorrt_build import Log, is_rtx, library
from effc.errors import BackendUnavailable, LoweringError

ELSEWHERE = "open it on a machine with a GPU that it was built for"


class TensorRtEngine(EngineBase):
    """An engine file on the first GPU, its buffers kept from call to call, in one CUDA graph where the library can.

    `weights` is the ONNX file that an engine without weights takes them from. One call runs at a time. Raises
    BackendUnavailable where the GPU does not run it, with the reason that the library gives.
    """

    def __init__(
        self,
        path: Path,
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
        *,
        weights: Path | None = None,
    ) -> None:
        self._path, self.inputs, self.outputs = path, inputs, outputs
        self._memory, self._turn, log = Memory(), threading.Lock(), Log()
        self._logger = log.logger()
        self._runtime = library().Runtime(self._logger)
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            self._memory.close()
            raise BackendUnavailable(
                f"{path.name} cannot run here: {' '.join(log.errors) or 'the library gives no reason'}",
                hint=ELSEWHERE,
            )
        if weights is not None:
            self._refit(weights, log)
        self._context = _context(self._engine)
        if self._context is None:
            self.close()
            raise BackendUnavailable(
                f"{path.name} was read and cannot run: {' '.join(log.errors) or 'the library gives no reason'}",
                hint="nvidia-smi shows what else holds the GPU and its memory",
            )

    def _refit(self, weights: Path, log: Log) -> None:
        refitter = library().Refitter(self._engine, self._logger)
        parser = library().OnnxParserRefitter(refitter, self._logger)
        if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
            self.close()
            raise LoweringError(
                f"{self._path.name} does not take the weights of {weights.name}: {' '.join(log.errors)}",
                hint="compile it again",
            )

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = {p.name: np.ascontiguousarray(feeds[p.name]) for p in self.inputs}
        try:
            for port in self.inputs:
                if given[port.name].dtype != np.dtype(port.dtype):
                    raise LoweringError(
                        f"{port.name} is {given[port.name].dtype}, not {port.dtype}",
                        hint=f"give it as {port.dtype}",
                    )
            with self._turn, self._memory.current():
                return self._run(given)
        except LoweringError as error:
            raise cannot_run("tensorrt", self._path, feeds, self.inputs, error) from error

    def _run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        context, memory = self._context, self._memory
        for name, value in feeds.items():
            if not context.set_input_shape(name, value.shape):
                raise LoweringError(
                    f"{name} {list(value.shape)} is outside the engine's profile",
                    hint="the manifest has the profile; compile with a wider one",
                )
            context.set_tensor_address(name, memory.upload(name, value))
        found = {
            p.name: np.empty(tuple(context.get_tensor_shape(p.name)), np.dtype(p.dtype))
            for p in self.outputs
        }
        for name, made in found.items():
            context.set_tensor_address(name, memory.place(name, made.nbytes))
        if not context.execute_async_v3(memory.stream):
            raise LoweringError(
                "the engine stopped", hint="nvidia-smi shows what became of the GPU"
            )
        for name, made in found.items():
            memory.download(name, made)
        memory.synchronize()
        return found

    def close(self) -> None:
        self._context = self._engine = self._runtime = None  # before the memory that they use
        self._memory.close()


def _context(engine: Any) -> Any:
    if not is_rtx():
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = library().CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    return engine.create_execution_context(config)
