"""Every configuration type of transformers: made small, compiled, and held against torch at several sizes.

Each type has a process of its own with limits of time and memory, and a JSON file in a folder, so that a run goes on
where it was stopped. `coverage.py --all` is the door.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import common
import numpy as np
import tiny
import torch

import effc
from effc.errors import EffcError

TOLERANCE = 1e-3
"""Relative L2 of an output, which `effc.verify.Tolerance` has too."""
CPU_S, WALL_S, MEMORY = 120, 600, 10 << 30
Row = dict[str, Any]
_READY: tiny.Built | None = None


def source() -> effc.Source:
    """The factory that a compile is given: the network that this process has made."""
    assert _READY is not None
    return _READY.source()


def kind_of(names: list[str]) -> str:
    """What goes in, in a word."""
    words = {
        "text": ("input_ids", "inputs_embeds", "inputs"),
        "picture": ("pixel_values", "image", "flattened_patches", "pixel_values_videos"),
        "sound": ("input_features", "input_values", "audio_mel", "spectrogram", "audio_input_ids"),
        "series": ("past_values",),
    }
    found = [word for word, of in words.items() if any(name in of for name in names)]
    return " and ".join(found) or "states"


def row_of(word: str, target: str, quantize: str) -> Row:
    """What became of one type."""
    global _READY
    row: Row = {"type": word}
    try:
        built = _READY = tiny.build(word)
    except tiny.NotBuilt as error:
        return {**row, "state": "not built", "reason": str(error)}
    names = list(built.module_inputs)
    row |= {
        "kind": kind_of(names),
        "inputs": {n: list(v.shape) for n, v in built.inputs(*built.sizes[0]).items()},
        "fixed": sorted(built.fixed),
        "free": sorted({w for axes in built.free.values() for w in axes.values()}),
        "parameters": built.parameters,
        "plan": built.plan.kind,
    }
    place = Path(tempfile.mkdtemp(prefix="effc-every-"))
    try:
        effc.compile("every:source", place / "out", target=target, quantize=quantize, bench=False,
                     **({} if quantize == "none" else {"calib": _calibration(built, place), "samples": 8}))  # fmt: skip
        return {**row, **compared(built, place / "out", target, quantize)}
    except EffcError as error:
        return {**row, "state": "refused", "error": type(error).__name__, "reason": error.what,
                "where": error.where, "hint": error.hint}  # fmt: skip
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _calibration(built: tiny.Built, place: Path) -> Path:
    values = [built.inputs(*built.sizes[0]) for _ in range(4)]
    np.savez(
        place / "calib.npz",
        **{n: np.concatenate([v[n].numpy() for v in values]) for n in values[0]},
    )
    return place / "calib.npz"


def compared(built: tiny.Built, out: Path, target: str, quantize: str) -> Row:
    """The engine and torch at every size that the model runs with: the largest gap of an output."""
    worst, seen, finite = 0.0, [], 1.0
    with effc.Engine.open(out, threads=1) as engine:
        wanted = {port.name: port for port in engine.inputs}
        for batch, length in built.sizes:
            given = built.inputs(batch, length)
            feeds = {n: v.numpy() for n, v in given.items() if n in wanted}
            with torch.no_grad():
                truth = built.module(**given)
            if not _fits(feeds, wanted):
                continue
            made = engine(feeds)
            if missing := truth.keys() - made.keys():
                return {
                    "state": "differs",
                    "reason": f"the engine lacks {', '.join(sorted(missing))}",
                }
            for name, value in truth.items():
                worst = max(worst, gap(value.numpy(), made[name]))
                finite = min(finite, _finite(value.numpy()))
            seen.append([batch, length])
    if not seen or not finite:
        why = "no size fits the engine" if not seen else "an output has no number to compare"
        return {"state": "not compared", "reason": why, "sizes": seen}
    allowed = TOLERANCE if quantize == "none" and target == "ort" else 0.3
    state = "agrees" if worst <= allowed else "differs"
    return {"state": state, "rel_l2": worst, "sizes": seen, "finite": round(finite, 4)}


def _finite(a: Any) -> float:
    """The share of an output's numbers that are compared as numbers."""
    usual = np.isfinite(a) & (np.abs(a) < 1e30) if a.dtype.kind == "f" else np.ones(a.shape, bool)
    return float(usual.mean()) if usual.size else 1.0


def _fits(feeds: dict[str, Any], ports: dict[str, Any]) -> bool:
    """Whether an engine says that it takes these shapes: what it fixed, it says."""
    return all(
        not isinstance(size, int) or size == have
        for name, value in feeds.items()
        for size, have in zip(ports[name].shape, value.shape, strict=True)
    )


def gap(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖a‖ over what is finite, infinite where shapes or what is finite differ; of whole numbers the share
    that differ."""
    if a.shape != b.shape:
        return float("inf")
    if a.dtype.kind != "f":
        return float((a != b).mean()) if a.size else 0.0
    finite = np.isfinite(a) & (np.abs(a) < 1e30)
    if not (finite == (np.isfinite(b) & (np.abs(b) < 1e30))).all():
        return float("inf")
    if not np.array_equal(np.sign(a[~finite]), np.sign(b[~finite]), equal_nan=True):
        return float("inf")
    x, y = a[finite].astype(np.float64), b[finite].astype(np.float64)
    norm = float(np.linalg.norm(x))
    return float(np.linalg.norm(x - y)) / norm if norm else float(np.linalg.norm(y))


def alone(word: str, file: Path, target: str, quantize: str) -> None:
    """One type in a process of its own, whose limits end it and nothing else."""
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
            log = os.open(file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                row = row_of(word, target, quantize)
            except MemoryError:
                row = {"type": word, "state": "memory", "reason": f"more than {MEMORY >> 30} GB"}
            except BaseException as error:
                import traceback

                traceback.print_exc()
                row = {
                    "type": word,
                    "state": "crashed",
                    "error": type(error).__name__,
                    "reason": str(error)[:400],
                }
            row["cpu_s"] = round(time.process_time(), 1)
            _written(file, row)
            code = 0
        finally:
            os._exit(code)
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() - started > WALL_S:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    _, status = os.waitpid(pid, 0)
    if not file.exists():
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        late = number in (signal.SIGXCPU, signal.SIGKILL)
        _written(file, {"type": word, "state": "time" if late else "crashed",
                        "reason": f"more than {CPU_S} s" if late else f"signal {number}"})  # fmt: skip


def _written(file: Path, row: Row) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(row) + "\n", encoding="utf-8")
    os.replace(part, file)


def run(
    state: Path,
    words: list[str],
    target: str = "ort",
    quantize: str = "none",
    until: float | None = None,
) -> list[Row]:
    """Rows of the types in order, made where they are not there; no further one is begun after `until`, in
    seconds since the epoch."""
    state.mkdir(parents=True, exist_ok=True)
    os.environ["EFFC_CACHE"] = "off"
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    left = [w for w in words if not (state / f"{w}.json").exists()]
    if left and (until is None or time.time() < until):
        _warm()
    revision = common.circumstances()["revision"]
    for word in left:
        if until is not None and time.time() > until:
            break
        file = state / f"{word}.json"
        alone(word, file, target, quantize)
        row = {**json.loads(file.read_text(encoding="utf-8")), "revision": revision}
        _written(file, row)
        why = f"{row.get('error', '')} {str(row.get('reason', ''))[:120]!r}"
        print(f"{word:32} {row['state']:10} {row.get('rel_l2', why)}", flush=True)
    rows = []
    for word in words:  # to the first that is not done: those behind it would be a choice
        file = state / f"{word}.json"
        if not file.exists():
            break
        rows.append(json.loads(file.read_text(encoding="utf-8")))
    return rows


def _warm() -> None:
    """What every process needs, loaded once in front of all forks: modules, and translations of operators."""
    from effc.backends.dialect import DIALECTS
    from effc.backends.onnx import to_onnx

    for word in ("bert", "vit"):
        built = tiny.build(word)
        program = effc.trace(built.module, built.inputs(*built.sizes[0]), dims=built.free)
        to_onnx(program.only(), DIALECTS["ort"].opset)


def small(row: Row) -> Row:
    """A row without what hangs on this machine, its reasons cut to a line."""
    kept = {k: v for k, v in row.items() if k not in ("cpu_s", "hint", "plan")}
    for word in ("reason", "where"):
        if kept.get(word):
            line = " ".join(str(kept[word]).split("\n", 2)[:2])
            kept[word] = re.sub(r"(/[^ /]+)+/site-packages/", "", line)[:200]
    return kept


def summary(rows: list[Row]) -> str:
    found = Counter(row["state"] for row in rows)
    built = sum(found.values()) - found["not built"]
    return f"{len(rows)} types: {dict(found)}; {found['agrees']} of {built} that build agree"
