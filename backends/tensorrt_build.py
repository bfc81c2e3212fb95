"""From an ONNX file to a TensorRT engine, without a GPU: the builder of TensorRT-RTX, or of enterprise TensorRT.

TensorRT-RTX compiles ahead of time for compute capabilities that are named, on any processor. What is in the graph is
what is built: the network is strongly typed, so precision is what casts and quantise nodes say.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import scratch
from effc.backends import cuda
from effc.backends.tensorrt_profile import Sizes, shapes_of
from effc.errors import BackendUnavailable, LoweringError
from effc.progress import Step, silent

log = logging.getLogger(__name__)

RTX_GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""Compute capabilities that TensorRT-RTX builds for."""


@functools.cache
def library() -> Any:
    """TensorRT-RTX; enterprise TensorRT where only that is there, or only that runs on the GPU that is here.

    Raises BackendUnavailable.
    """
    try:
        import tensorrt_rtx_bindings
        import tensorrt_rtx_libs  # noqa: F401  # loads the shared libraries that the bindings want
    except ImportError as error:
        if (found := _enterprise()) is not None:
            return found
        raise BackendUnavailable(
            f"target tensorrt needs TensorRT-RTX, which cannot be loaded: {error}",
            hint="pip install 'effc[tensorrt]'",
        ) from error
    is_foreign = cuda.obstacle() is None and cuda.gpu()[1] not in RTX_GPUS
    return (_enterprise() if is_foreign else None) or tensorrt_rtx_bindings


def _enterprise() -> Any:
    try:
        import tensorrt
    except ImportError:
        return None
    return tensorrt


def is_rtx() -> bool:
    return bool(library().__name__.startswith("tensorrt_rtx"))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an engine is built for. `profile` is by name of the dimension; `compute` are words such as `sm86`."""

    profile: Mapping[str, Sizes]
    compute: tuple[str, ...] = ()
    windows: bool = False
    refittable: bool = False
    stripped: bool = False


@dataclass(frozen=True, kw_only=True)
class Built:
    """An engine's bytes, and how many layers its network has."""

    engine: memoryview
    layers: int


class Log:
    """The errors that the library says."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def logger(self) -> Any:
        trt, log = library(), self

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.ERROR:
                    log.errors.append(message)

        return Logger()


def build(
    path: Path,
    plan: Plan,
    names: Mapping[str, Sequence[int | str]],
    *,
    places: Mapping[str, str] | None = None,
    step: Step = silent,
) -> Built:
    """An engine from an ONNX file. `names` are the shapes of its inputs, `places` where each of its nodes is from.

    `step` is told how many steps of the builder's outermost phase are done.

    Raises LoweringError with every node that the parser refuses, or with the builder's own first reason.
    """
    said_by = Log()
    logger = said_by.logger()
    with _hushed() as aside:
        builder, network, _parser = _parsed(path, said_by, logger, places or {})
        config = builder.create_builder_config()
        config.progress_monitor = monitor = _monitor(step)
        _configure(config, plan)
        config.add_optimization_profile(_profile(builder, plan, names))
        made = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if made is None:
        said = [*said_by.errors, *aside] or ["it gave no reason"]
        if (plan.refittable or plan.stripped) and "CUDA" in said[0].upper():
            raise BackendUnavailable(
                "tensorrt makes engines with weights outside only where there is an NVIDIA driver",
                hint="leave `weights` out, or compile where there is one",
            )
        raise LoweringError(
            f"tensorrt cannot build {path.name}: {_first(said[0])}{_about(said, places or {})}",
            hint="leave the part out of 16 bit with `exclude`, or choose other compute capabilities",
        )
    return Built(engine=memoryview(made), layers=network.num_layers)


def _parsed(
    path: Path, said_by: Log, logger: Any, places: Mapping[str, str]
) -> tuple[Any, Any, Any]:
    """A builder, the network of an ONNX file, and the parser, which holds the network's weights."""
    trt = library()
    try:
        builder = trt.Builder(logger)
    except TypeError as error:  # enterprise TensorRT without a driver
        why = " ".join(said_by.errors) or str(error)
        raise BackendUnavailable(
            f"TensorRT {trt.__version__} makes no builder here: {_first(why)}",
            hint="pip install 'effc[tensorrt]' for TensorRT-RTX, which builds without a GPU",
        ) from error
    flags = trt.NetworkDefinitionCreationFlag
    typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise _refused(parser, places)
    return builder, network, parser


def unknown_weights(path: Path, names: Sequence[str]) -> list[str]:
    """Names by which no weight of an ONNX file's network can be exchanged, as the library sees it, without a GPU.

    Raises BackendUnavailable where there is no library, LoweringError where its parser refuses the file.
    """
    said_by = Log()
    logger = said_by.logger()
    with _hushed():
        _builder, network, _parser = _parsed(path, said_by, logger, {})
        return [name for name in names if not network.mark_weights_refittable(name)]


def _monitor(step: Step) -> Any:
    """What tells `step` of the builder's outermost phase."""
    trt = library()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, number: int) -> bool:
            """Whether to go on. What `step` raises would be lost in the library: it is kept, and raised behind it."""
            try:
                if (total := self.totals.get(phase_name)) is not None:
                    step(number + 1, total)
            except BaseException as error:
                self.stopped = error
            return self.stopped is None

        def phase_finish(self, phase_name: str) -> None:
            """Nothing is drawn of an end."""

    return Monitor()


def _configure(config: Any, plan: Plan) -> None:
    trt = library()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 is float32: 16 bit is asked for by name
    if plan.compute:
        if not hasattr(config, "set_compute_capability"):
            raise BackendUnavailable(
                "enterprise TensorRT builds for the GPU of this machine alone",
                hint="pip install 'effc[tensorrt]' for TensorRT-RTX, or leave `compute` out",
            )
        config.num_compute_capabilities = len(plan.compute)
        for place, word in enumerate(plan.compute):
            config.set_compute_capability(getattr(trt.ComputeCapability, word.upper()), place)
    if plan.windows:
        config.runtime_platform = trt.RuntimePlatform.WINDOWS_AMD64
    if plan.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if plan.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)


def _profile(builder: Any, plan: Plan, names: Mapping[str, Sequence[int | str]]) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in names.items():
        profile.set_shape(name, *shapes_of(shape, plan.profile))
    return profile


def _refused(parser: Any, places: Mapping[str, str]) -> LoweringError:
    found = []
    for number in range(parser.num_errors):
        error = parser.get_error(number)
        where = places.get(error.node_name(), "")
        operator = error.node_operator() or "node"
        found.append(f"{operator} {where or error.node_name()}: {_first(error.desc())}")
    lines = list(dict.fromkeys(found)) or ["it gave no reason"]
    for line in lines[5:]:
        log.warning("tensorrt refuses %s", line)
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return LoweringError(
        f"tensorrt refuses {len(lines)} nodes: " + "; ".join(lines[:5]) + more,
        hint="write the module without them, or choose another target",
    )


def _about(said: Sequence[str], places: Mapping[str, str]) -> str:
    """The places in the model that an error of the builder names, by the names of nodes in it."""
    text = " ".join(said)
    found = [place for name, place in places.items() if place and f"'{name}'" in text]
    return f" (at {', '.join(dict.fromkeys(found[:3]))})" if found else ""


def _first(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"


@contextmanager
def _hushed() -> Iterator[list[str]]:
    """With what the library writes to stderr past its logger kept aside, line by line."""
    said: list[str] = []
    with scratch.held() as place:
        kept, log = os.dup(2), os.open(place / "stderr", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            os.dup2(log, 2)
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.lseek(log, 0, os.SEEK_SET)
            with os.fdopen(log, encoding="utf-8", errors="replace") as stream:
                said += [line.strip() for line in stream if line.strip()]
