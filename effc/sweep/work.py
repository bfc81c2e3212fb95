"""One trial: a recipe with its settings, compiled, measured, and written down.

It runs in a process of Ray's, on whatever machine that is. What an earlier attempt finished is in the cache.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effc import alone, cache, compiler, recipe
from effc.bench import cpu_name
from effc.delta import whole
from effc.errors import BackendUnavailable, EffcError, PackageError, UsageError, is_failure
from effc.machine import cpu_features, default_threads, installed
from effc.progress import Progress
from effc.scratch import NO_ROOM

Json = dict[str, Any]
FILE = "trial.json"
OUT = "package"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker is told."""

    name: str
    base: str
    overrides: tuple[str, ...]
    settings: Mapping[str, Any]
    folder: str
    """Of this trial, on a disk that driver and workers share."""
    key: str
    """What the trial is made of, see `drive`."""
    code: str
    """The digest of the driver's effc."""
    threads: int | None = None
    keep: bool = True


def run(job: Job) -> Json:
    """The record of a trial, which lies in its folder too. An error of the trial is its result."""
    check(job)
    started, progress = time.time(), Progress()
    record: Json = {
        "name": job.name, "settings": dict(job.settings), "key": job.key, "effc": installed("effc"),
        "machine": {"cpu": cpu_name(), "features": cpu_features(), "threads": job.threads or default_threads()},
        "host": platform.node(),
    }  # fmt: skip
    folder = Path(job.folder)
    try:
        with alone.computing():
            made = recipe.read(Path(job.base), [*job.overrides, "gate=false"])
            result = compiler.run(made, folder / OUT, threads=job.threads, progress=progress)
        record |= {
            "state": "done",
            "values": values(result.report),
            "metric": result.report["metric"],
        }
        record["bench"] = result.report["bench"]
    except BackendUnavailable as error:
        record |= {"state": "lost", "error": _told(error)}  # it may be installed by the next time
    except EffcError as error:
        record |= {"state": "failed", "error": _told(error)}
    except MemoryError:
        hint = "ask for more, so that fewer run beside it: memory: 8GB"
        record |= {
            "state": "lost",
            "error": {"kind": "MemoryError", "what": "memory ran out", "hint": hint},
        }
    except OSError as error:
        record |= {
            "state": "lost" if error.errno in NO_ROOM else "failed",
            "error": {
                "kind": type(error).__name__, "what": f"{platform.node()}: {error.strerror or error}",
                "where": error.filename if isinstance(error.filename, str) else None,
                "hint": "free some disk space" if error.errno in NO_ROOM else None,
            },
        }  # fmt: skip
    except BaseException as error:
        if not is_failure(error):
            raise
        record |= {
            "state": "failed",
            "error": {"kind": type(error).__name__, "what": str(error)[:2000], "hint": None},
        }
    if not job.keep:
        shutil.rmtree(folder / OUT, ignore_errors=True)
    record["seconds"] = round(time.time() - started, 3)
    record["stages"] = {
        s.name: {"seconds": round(s.seconds, 3), "cached": s.cached}
        for s in progress.stages.values()
    }
    try:
        write(folder / FILE, record)
    except OSError as error:
        what = f"{platform.node()} cannot keep its record: {error.strerror or error}"
        return {
            **record,
            "state": "lost",
            "error": {"kind": type(error).__name__, "what": what, "hint": "free some disk space"},
        }
    return record


def check(job: Job) -> None:
    """Raise where this worker has another effc than the driver (UsageError), or not the shared disk (PackageError)."""
    own = cache.code_digest()
    if own != job.code:
        raise UsageError(
            f"the worker on {platform.node()} has another effc ({installed('effc')}, code {own[:8]}) than the "
            f"driver (code {job.code[:8]})",
            hint="install the same effc on every machine",
        )
    folder = Path(job.folder)
    if not folder.parent.is_dir() or not Path(job.base).is_file():
        raise PackageError(
            f"the worker on {platform.node()} does not see {folder.parent} or {job.base}",
            hint="name places on a disk that all machines share",
        )
    folder.mkdir(exist_ok=True)


def values(report: Mapping[str, Any]) -> Json:
    """What a trial is worth: numbers of which less is better, with their ends, and as they are `shown`."""
    found: Json = {"size": {"value": report["model_bytes"]}}
    metric = report["metric"]
    if metric is not None:
        sign = -1 if metric["higher_is_better"] else 1
        half = abs(metric["high"] - metric["low"]) / 2
        value = sign * metric["engine"]
        found["accuracy"] = {
            "value": value, "low": value - half, "high": value + half, "shown": metric["engine"],
            "name": metric["name"],
        }  # fmt: skip
    else:
        drifts = [
            d["rel_l2"]
            for of in report["verify"].values()
            for case in of.values()
            for d in case.values()
        ]
        if drifts:
            found["accuracy"] = {"value": max(drifts), "shown": max(drifts), "name": "drift"}
    shapes = (report["bench"] or {}).get("shapes", [])
    if shapes:
        found["latency"] = {
            "value": _mean(s["engine_ms"] for s in shapes),
            "low": _mean(s["engine_ms"] * (s["ratio"] / s["high"] if s["ratio"] else 1) for s in shapes),
            "high": _mean(s["engine_ms"] * (s["ratio"] / s["low"] if s["ratio"] else 1) for s in shapes),
        }  # fmt: skip
    return found


def _mean(times: Any) -> float:
    """The geometric mean, in which a short shape counts as much as a long one."""
    logs = [math.log(t) for t in times]
    return math.exp(sum(logs) / len(logs))


def _told(error: EffcError) -> Json:
    return {
        "kind": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "hint": error.hint,
    }


def write(file: Path, content: Any) -> None:
    """JSON that is whole or not there."""
    whole.write(file, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
