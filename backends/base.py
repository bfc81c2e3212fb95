"""What every target offers, and what every engine looks like from outside.

A backend says what it cannot take (all of it, before any work), lowers a program into files, and opens them.
An engine is called with numpy arrays and gives numpy arrays, whatever runs inside, so that verify and bench
compare like with like.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from effc.errors import LoweringError, first_line
from effc.progress import Step, silent

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Port:
    """An engine's input or output: a numpy dtype name and a shape whose free dimensions are names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    grid: str = field(default="", compare=False)
    """Of codes, the sha256 of the sizes that they are multiples of, which a file's port does not say."""


@dataclass(frozen=True, kw_only=True)
class Unsupported:
    """A node that the target cannot take, and why."""

    node: str
    op: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Site:
    """A quantised place and what became of it: `kernel` is the op that runs it, `reason` why it is not int8."""

    name: str
    op: str
    kernel: str
    int8: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """Files of one role on one target. `files` are relative to `directory`; the first is the one to open."""

    role: str
    target: str
    directory: Path
    files: tuple[str, ...]
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sites: tuple[Site, ...] = ()
    requires: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """What it is opened with, as it stands in the manifest."""

    @property
    def path(self) -> Path:
        """The file to open."""
        return self.directory / self.files[0]

    @property
    def profile(self) -> dict[str, tuple[int, int, int]]:
        """Least, usual and largest of the free sizes that the engine is bound to; empty where it takes any."""
        found = {}
        for part in filter(None, str(self.options.get("profile", "")).split(";")):
            word, _, sizes = part.partition("=")
            least, usual, most = map(int, sizes.split(","))
            found[word] = least, usual, most
        return found

    @property
    def is_float(self) -> bool:
        """Whether everything that is not quantised is computed in float32."""
        kinds = self.options.get("precision", "f32"), self.options.get("cache", "f32")
        return kinds[0] == "f32" and kinds[1] in ("f32", "ports")


class Engine(Protocol):
    """A loaded engine: `with backend.open(lowered) as engine: outputs = engine(feeds)`."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def __call__(self, feeds: Mapping[str, Array]) -> dict[str, Array]: ...

    def carry(self, feeds: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]: ...

    def ready(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class EngineBase:
    """The half of an engine that is the same everywhere."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def carry(self, feeds: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]:
        """As a call, with arrays for what is `wanted`. The rest may be values of the runtime, to be fed again."""
        return self(feeds)  # type: ignore[operator,no-any-return]

    def ready(self, feeds: Mapping[str, Any]) -> Mapping[str, Any]:
        """What to call it with, for a clock to see a run as it is where the cache is carried on."""
        return feeds

    def close(self) -> None:
        """Give back what the engine holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Backend(Protocol):
    """One target. `threads` is how many cores an opened engine may use."""

    name: ClassVar[str]

    def supports(self, graph: Any) -> list[Unsupported]: ...

    def lower(self, graph: Any, directory: Path, step: Step = silent) -> Lowered:
        """Write the files of an engine; `step` is told how far a long build is."""

    def open(self, lowered: Lowered, *, threads: int | None = None) -> Engine: ...

    def obstacle(self, lowered: Lowered | None = None) -> str | None:
        """Why this machine cannot run an engine, or any where none is given; None where it can."""

    def gpu(self) -> str | None:
        """The GPU that engines run on; None where they run on the processor."""

    def made_with(self) -> str:
        """What decides the bytes of an engine beside its graph, its options and the target's distribution."""

    def stand_in(self, lowered: Lowered, *, threads: int | None = None) -> Engine:
        """What computes the same numbers on a machine that cannot run the engine."""

    def plain(self, graph: Any, lowered: Lowered) -> Lowered:
        """The plain float export of a graph, which lies in a directory already, as its runtime opens it."""

    def peak_rss_mb(
        self, lowered: Lowered, feeds: Mapping[str, Array], threads: int
    ) -> float | None:
        """Peak resident memory, in MB, of a process of the plain runtime that runs `feeds` through an engine; None
        where it cannot be measured.
        """


class BackendBase:
    """The half of a backend that runs wherever its runtime is installed."""

    def obstacle(self, lowered: Lowered | None = None) -> str | None:
        return None

    def gpu(self) -> str | None:
        return None

    def made_with(self) -> str:
        return ""

    def stand_in(self, lowered: Lowered, *, threads: int | None = None) -> Any:
        return self.open(lowered, threads=threads)

    def plain(self, graph: Any, lowered: Lowered) -> Lowered:
        return lowered

    def open(self, lowered: Lowered, *, threads: int | None = None) -> Any:
        raise NotImplementedError


# What backends with a runtime of their own say alike


def refuses(runtime: str, version: str, path: Path, error: Exception) -> LoweringError:
    """The letter of a runtime that does not open a file."""
    return LoweringError(
        f"{runtime} refuses {path.name}: {first_line(error)}",
        hint=f"this is {runtime} {version}; a newer one may read it",
    )


def cannot_run(
    runtime: str, path: Path, feeds: Mapping[str, Array], inputs: tuple[Port, ...], error: Exception
) -> LoweringError:
    """The letter of a runtime that opened a file and does not run it on these inputs."""
    shapes = {name: list(value.shape) for name, value in feeds.items()}
    return LoweringError(
        f"{runtime} cannot run {path.name} on {shapes}: {first_line(error)}",
        hint="the engine takes " + "; ".join(f"{p.name} {list(p.shape)}" for p in inputs),
    )


def at_least(distribution: str, version: str) -> str:
    """The requirement of an engine that was made with this version."""
    major, minor, *_ = version.split(".")
    return f"{distribution}>={major}.{minor}"
