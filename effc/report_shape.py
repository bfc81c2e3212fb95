"""What report.json may hold, so that whatever else lies there is one clear error and no broken page.

Who reads a package has not written it. Only types are checked: a report of an older effc lacks parts, and one of a
newer has more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from effc.errors import PackageError

Number = Annotated[float, Field(strict=True)] | None
"""Not what was measured where it is None; infinite where a layer has no error at all."""
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
Flag = Annotated[bool, Field(strict=True)]
Step = tuple[Count, Count]
Interval = tuple[Number, Number]


@dataclass(kw_only=True)
class Port:
    name: str
    dtype: str
    shape: list[int | str]


@dataclass(kw_only=True)
class Engine:
    target: str
    path: str
    sha256: str
    inputs: list[Port]
    outputs: list[Port]
    opset: Count
    int8_sites: Count = 0
    total_sites: Count = 0
    requires: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Manifest:
    """The part of manifest.json that a report shows."""

    kind: str
    engines: Annotated[list[Engine], Field(min_length=1)]
    source: dict[str, str] = field(default_factory=dict)
    graph_digest: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Drift:
    max_abs: Number = None
    rel_l2: Number = None
    cosine: Number = None
    n: Count | None = None


@dataclass(kw_only=True)
class Pass:
    name: str
    target: str
    sites: Count
    nodes: Step
    bytes: Step
    effect: str = ""
    seconds: Number = None
    decisions: Count = 0
    drift: Drift | None = None
    options: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Site:
    name: str
    op: str
    kernel: str
    int8: Flag
    target: str
    reason: str = ""


@dataclass(kw_only=True)
class Data:
    """A file or folder, by what is in it."""

    name: str = ""
    bytes: Count | None = None
    sha256: str | None = None
    samples: Count | None = None
    seed: Count | None = None


@dataclass(kw_only=True)
class McNemar:
    only_reference: Count
    only_engine: Count
    p: Number


@dataclass(kw_only=True)
class Metric:
    name: str
    reference: Annotated[float, Field(strict=True)]
    engine: Annotated[float, Field(strict=True)]
    low: Number
    high: Number
    n: Count
    higher_is_better: Flag = True
    level: Number = None
    verdict: str | None = None
    wilson: dict[str, Interval] | None = None
    mcnemar: McNemar | None = None
    parts: dict[str, dict[str, float]] | None = None
    drawn: Count | None = None
    unit: str | None = None
    data: Data | None = None


@dataclass(kw_only=True)
class Against:
    ms: Number = None
    p95_ms: Number = None
    ratio: Number = None
    low: Number = None
    high: Number = None
    n: Count | None = None


@dataclass(kw_only=True)
class Shape:
    batch: Count
    engine_ms: Number
    length: Count | None = None
    past: Count = 0
    p95_ms: Number = None
    n: Count | None = None
    reference: str | None = None
    reference_ms: Number = None
    ratio: Number = None
    low: Number = None
    high: Number = None
    against: dict[str, Against] = field(default_factory=dict)
    quantiles_ms: dict[str, list[Number]] | None = None


@dataclass(kw_only=True)
class Bench:
    shapes: list[Shape]
    threads: Count | None = None
    streams: Count | None = None
    cpu: str | None = None
    gpu: str | None = None
    load_ms: dict[str, Number] = field(default_factory=dict)
    first_run_ms: dict[str, Number] = field(default_factory=dict)
    peak_rss_mb: dict[str, Number] = field(default_factory=dict)


@dataclass(kw_only=True)
class Layer:
    site: str
    op: str = ""
    sqnr_db: Number = None
    local_db: Number = None
    share: Number = None
    rows: Count | None = None
    probes: Count | None = None


@dataclass(kw_only=True)
class Check:
    name: str
    verdict: str
    value: Number = None
    low: Number = None
    high: Number = None
    bound: Number = None
    text: str = ""


@dataclass(kw_only=True)
class RolledBack:
    step: Annotated[str, Field(alias="pass")]
    sites: list[str] = field(default_factory=list)
    why: str = ""
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(kw_only=True)
class Gate:
    verdict: str
    target: str = ""
    checks: list[Check] = field(default_factory=list)
    rolled_back: list[RolledBack] = field(default_factory=list)
    strict: Flag = False
    ran_out_of_time: Flag = False
    tried: Count | None = None
    seconds: Number = None


@dataclass(kw_only=True)
class Stage:
    name: str
    seconds: Number = None
    peak_mb: Number = None
    cached: Flag | Count = False


@dataclass(kw_only=True)
class Machine:
    cpu: str | None = None
    features: list[str] = field(default_factory=list)
    threads: Count | None = None


@dataclass(kw_only=True)
class Other:
    """What is said of an engine behind the first."""

    model_bytes: Count
    metric: Metric | None = None
    bench: Bench | None = None
    gate: Gate | None = None


@dataclass(kw_only=True)
class Report:
    """report.json; what others add to it later is optional here."""

    manifest: Manifest
    passes: list[Pass]
    sites: list[Site]
    verify: dict[str, dict[str, dict[str, Drift]]]
    source_bytes: Count
    model_bytes: Count
    lowering: dict[str, Drift] = field(default_factory=dict)
    timings: dict[str, Number] = field(default_factory=dict)
    data: Data | None = None
    metric: Metric | None = None
    bench: Bench | None = None
    layers: dict[str, list[Layer]] | None = None
    gate: Gate | None = None
    stand_ins: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    others: dict[str, Other] = field(default_factory=dict)
    stages: list[Stage] | None = None
    machine: Machine | None = None


@cache
def _adapter() -> TypeAdapter[Report]:
    return TypeAdapter(Report)


def check(content: Any, where: str) -> None:
    """Raise PackageError where `content` is not what a report holds; the first thing that is wrong is named."""
    try:
        _adapter().validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(p) for p in first["loc"])
        raise PackageError(
            f"{where}: {place + ': ' if place else ''}{first['msg']}",
            hint="it is no report of effc, or one of another version; compile again",
        ) from error
