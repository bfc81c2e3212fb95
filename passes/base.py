"""What a pass is: a frozen dataclass whose fields are its options, and which returns how many sites it changed.

    @dataclass(frozen=True, kw_only=True)
    class DropDropout(Pass):
        name = "drop-dropout"

        def rewrite(self, graph, stats):
            sites = Select(op="dropout").sites(graph)
            for node in sites:
                replace(graph, node, node.args[0])
            return len(sites)

A pass asks for statistics and never gathers them; what it decides from them goes through `stats.decide`, so that
the same step can be taken again, on other weights, without the data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

from torch import Tensor

from effc import intuition
from effc.calib.probe import Probe
from effc.dialect import Dialect
from effc.errors import CalibrationError, PreconditionError
from effc.ir.check import Drift
from effc.ir.program import Graph, Program

Effect = Literal["exact", "lossy"]
FILES = ("file", "adapter", "adapters", "centroids", "beside", "apart")
"""Options of passes that name a file or a folder, or several."""


def of_files(options: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Options of a pass with every name of a file or folder among them changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        return [changed(v) for v in value] if isinstance(value, list | tuple) else value

    return {k: changed(v) if k in FILES else v for k, v in options.items()}


class Stats:
    """What was measured for a pass, and what the pass decided from it."""

    def __init__(
        self,
        collectors: dict[str, Any] | None = None,
        recorded: dict[str, Any] | None = None,
        kept: dict[str, Tensor] | None = None,
        train: Trainer | None = None,
        clock: Clock | None = None,
        shelf: Shelf | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._collectors = collectors or {}
        self._recorded = recorded
        self._kept = kept if kept is not None else {}
        self._train = train
        self._clock = clock
        self.shelf = shelf
        """Where a pass that takes long keeps what it has, so that a killed one goes on; None without such a place."""
        self._progress = progress
        self.decisions: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        """What a pass has to tell beside its decisions, such as the curve of a training; it decides nothing."""

    def __getitem__(self, key: str) -> Any:
        """The collector that watched `key`. Raises CalibrationError where nothing was measured for it."""
        if key not in self._collectors:
            raise CalibrationError(
                f"nothing was measured for {key!r}",
                hint="the recorded decisions are of another choice of layers; calibrate again",
            )
        return self._collectors[key]

    def afresh(self) -> Stats:
        """The same measurements, of which nothing is decided."""
        return Stats(self._collectors)

    def progress(self, done: int, total: int) -> None:
        """Say how far a pass is that takes long."""
        if self._progress is not None:
            self._progress(done, total)

    def decide(self, key: str, make: Callable[[], Any]) -> Any:
        """A decision under a stable key: made now, or taken from the record where one is replayed.

        The value must be plain JSON. Raises CalibrationError where a replayed record does not know the key.
        """
        if self._recorded is None:
            value = make()
        elif key in self._recorded:
            value = self._recorded[key]
        else:
            raise CalibrationError(
                f"the recorded decisions say nothing about {key!r}",
                hint="the graph differs from the one that was recorded; calibrate again",
            )
        self.decisions[key] = value
        return value

    def decide_tensor(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """A decision too large for a record, which holds its sha256: a replay makes it again, and the same.

        Raises CalibrationError where a replay makes another one.
        """
        known = (self._recorded or {}).get(key)
        tensor = self._kept[known] if known in self._kept else make()
        digest = hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        if self.decide(key, lambda: digest) != digest:
            raise CalibrationError(
                f"what was decided for {key!r} comes out differently from the recorded decisions",
                hint="it hangs on weights, calibration data and processor; compile again without --decisions",
            )
        self._kept[digest] = tensor
        return tensor

    def train(self, pass_: Pass, graph: Graph) -> dict[str, Tensor]:
        """The tensors of a graph by name as training leaves them. Raises PreconditionError where nobody trains."""
        if self._train is None:
            raise PreconditionError(
                f"{pass_.name} trains, and nobody has said on what",
                hint="`effc tune` and `effc compile` do; in Python, effc.apply(…, train=effc.trainer(model, batches))",
            )
        return self._train(pass_, graph, self)

    @property
    def clock(self) -> Clock:
        """What says how long graphs take. Raises PreconditionError where there is none."""
        if self._clock is None:
            raise PreconditionError(
                "the pass asks how long graphs take, and there is no clock",
                hint="`effc compile` has one; in Python, effc.apply(…, clock=effc.clock(TARGET, feeds))",
            )
        return self._clock


@dataclass(frozen=True, kw_only=True)
class Model:
    """What files for others say of a model: its name, its kind, and what stands before its own names in the graph."""

    name: str
    kind: str
    stem: str


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One rewriting step. Override `rewrite`, and whatever else the step needs."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    name: ClassVar[str]
    effect: ClassVar[Effect] = "exact"
    tolerance: ClassVar[float] = 1e-5
    """Largest relative L2 drift that an exact pass may show on probe inputs."""

    graphs: tuple[str, ...] = ()
    """Roles to work on; all where empty."""

    trains: ClassVar[bool] = False
    """Whether the pass trains the graph."""
    renews: ClassVar[bool] = False
    """Whether values behind the pass are others, or of other sizes, than those before it: no node answers for that."""
    shrinks: ClassVar[bool] = False
    """Whether the graph is smaller behind it, and an engine of it should be faster."""
    chain: ClassVar[str] = ""
    """Passes of one chain work on what the first of them put into the graph: they are taken back together."""
    is_meant: ClassVar[bool] = False
    """Whether the model is meant to be another behind the pass, as with a user's adapter: it is never taken back."""
    is_shared: ClassVar[bool] = False
    """Whether engines that go on with each other's cache must all have the pass, and decide the same."""

    @property
    def times(self) -> bool:
        """Whether the pass asks how long graphs take."""
        return False

    def untimed(self) -> Self:
        """What the pass may do, where nobody can say how long graphs take: for a plan."""
        return self

    def takes(self, role: str) -> bool:
        """Whether the pass works on the graph of that role; on the encoder of requests only where it is named."""
        return role in self.graphs if self.graphs else role != intuition.ROLE

    @property
    def measures(self) -> bool:
        """Whether the pass cannot do without calibration data."""
        return False

    @property
    def measures_again(self) -> bool:
        """Whether a replay needs the data too, because the record holds no more than the sha256 of a decision."""
        return False

    def resolve(self, dialect: Dialect) -> Self:
        """This pass with the options that it leaves to the target filled in."""
        return self

    def agrees(self, behind: Sequence[Pass]) -> None:
        """Raise PreconditionError where the passes behind it in a recipe are not what it prepares a graph for."""

    def requires(self, program: Program) -> None:
        """Raise PreconditionError where the graph is not ready, naming the pass that would help."""

    def probes(self, graph: Graph) -> Iterable[Probe]:
        """What is to be measured before `rewrite`."""
        return ()

    def rewrite(self, graph: Graph, stats: Stats) -> int:
        """Change the graph in place; give the number of sites changed, 0 where it was left as it was."""
        raise NotImplementedError

    def gives(self, outputs: Sequence[str]) -> tuple[str, ...]:
        """Names of the outputs of a graph that it has rewritten, of those that it had: the same ones for most."""
        return tuple(outputs)

    def ensures(self, program: Program) -> None:
        """Raise PostconditionError where the pass did not do what it is for."""

    def files(self, graph: Graph, model: Model) -> Mapping[str, bytes]:
        """What of the pass is of use to others once the graph is trained, as files by name; none for most."""
        return {}


class Shelf(Protocol):
    """Keeps tensors by a word until the pass is done, and is given none that were kept for other work."""

    def get(self, word: str) -> dict[str, Tensor] | None: ...

    def put(self, word: str, tensors: Mapping[str, Tensor]) -> None: ...


Trainer = Callable[[Pass, Graph, Stats], dict[str, Tensor]]
"""Trains a graph as a pass asks: its tensors by name, as they are then."""

Clock = Callable[[Iterable[Graph]], Sequence[Sequence[float]]]
"""How long graphs take on the target, in ms: [graphs, sessions]. Each is run beside the first in every session, so what
a session has against one it has against both; graphs are taken one by one, and not kept."""


@dataclass(frozen=True, kw_only=True)
class PassRecord:
    """What a pass did: enough to report it, and with `decisions` enough to do it again."""

    name: str
    options: dict[str, Any]
    effect: str
    sites: int
    seconds: float
    nodes: tuple[int, int]
    bytes: tuple[int, int]
    drift: Drift | None = None
    decisions: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    """What else there is to tell of it, by graph."""

    @property
    def is_lossy(self) -> bool:
        """Whether it did something that is not exact."""
        return self.effect == "lossy" and self.sites > 0

    def line(self) -> str:
        """`fold-batchnorm: 53 sites, 1 204 → 1 151 nodes, 0.4 s`"""
        before, after = (f"{n:,}".replace(",", " ") for n in self.nodes)
        text = f"{self.name}: {self.sites} sites, {before} → {after} nodes"
        if self.bytes[0] != self.bytes[1]:
            text += f", {self.bytes[0] / 1e6:.1f} → {self.bytes[1] / 1e6:.1f} MB"
        if self.drift is not None:
            text += f", drift {self.drift.rel_l2:.2g}"
        elif self.sites and self.effect == "exact":
            text += ", not verified: no probes"
        return f"{text}, {self.seconds:.1f} s"
